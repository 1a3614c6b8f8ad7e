//! Questions that are answered and not stored: who am I, what may I do.

use http::StatusCode;
use serde_json::{Value, json};

use super::{Answer, Api, Incoming, Payload};
use crate::auth::User;
use crate::rbac::{self, Attributes};
use crate::request::Request;
use crate::status::{ApiError, ApiResult};

impl Api {
    pub(super) fn review(
        &self,
        request: &Request,
        user: &User,
        incoming: &Incoming<'_>,
    ) -> ApiResult<Answer> {
        if request.verb != "create" || request.name.is_some() {
            return Err(ApiError::method_not_allowed());
        }
        let mut review = super::write::body_value(incoming)?;
        super::write::check_type(&request.resource, &mut review)?;
        review["status"] = match request.resource.kind.as_str() {
            "SelfSubjectReview" => {
                json!({ "userInfo": { "username": user.name, "groups": user.groups } })
            }
            "SelfSubjectRulesReview" => self.rules_of(user, &review["spec"]),
            "SubjectAccessReview" => {
                let groups = review["spec"]["groups"].as_array().into_iter().flatten();
                let other = User {
                    name: text(&review["spec"]["user"]).to_owned(),
                    groups: groups.filter_map(Value::as_str).map(str::to_owned).collect(),
                };
                self.access_of(&other, &review["spec"])
            }
            _ => self.access_of(user, &review["spec"]),
        };
        Ok(Answer::new(StatusCode::CREATED, Payload::Json(review)))
    }

    fn access_of(&self, user: &User, spec: &Value) -> Value {
        let state = self.state();
        let allowed = match (spec.get("resourceAttributes"), spec.get("nonResourceAttributes")) {
            (Some(asked), _) => {
                let attributes = Attributes {
                    verb: text(&asked["verb"]),
                    group: text(&asked["group"]),
                    resource: text(&asked["resource"]),
                    subresource: text(&asked["subresource"]),
                    namespace: text(&asked["namespace"]),
                    name: text(&asked["name"]),
                };
                rbac::allows(&state.store, user, &attributes)
            }
            (None, Some(asked)) => text(&asked["verb"]).to_uppercase().parse().is_ok_and(|method| {
                rbac::authorize_path(&state.store, user, &method, text(&asked["path"])).is_ok()
            }),
            (None, None) => false,
        };
        json!({ "allowed": allowed, "reason": if allowed { "RBAC: allowed by a binding" } else { "" } })
    }

    fn rules_of(&self, user: &User, spec: &Value) -> Value {
        let state = self.state();
        let everything = json!({ "apiGroups": ["*"], "resources": ["*"], "verbs": ["*"] });
        let mut rules: Vec<Value> =
            rbac::rules(&state.store, user, text(&spec["namespace"])).cloned().collect();
        if user.is_in(crate::auth::MASTERS) {
            rules.push(everything);
        }
        let (paths, resources): (Vec<Value>, Vec<Value>) =
            rules.into_iter().partition(|rule| rule.get("nonResourceURLs").is_some());
        json!({ "resourceRules": resources, "nonResourceRules": paths, "incomplete": false })
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
