//! Patch, in its four formats.

use http::StatusCode;
use serde_json::Value;

use super::super::read::one;
use super::super::{Answer, Api, Incoming};
use super::{Ownership, check_type, content_type, yaml};
use crate::auth::User;
use crate::fields::managed;
use crate::patch::{json_patched, strategic};
use crate::rbac;
use crate::request::{Request, WriteOptions};
use crate::resource::Resource;
use crate::status::{ApiError, ApiResult, Cause};

const JSON_PATCH: &str = "application/json-patch+json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const STRATEGIC: &str = "application/strategic-merge-patch+json";
const APPLY: &str = "application/apply-patch+yaml";

impl Api {
    pub(in super::super) fn patch(
        &self,
        request: &Request,
        user: &User,
        incoming: &Incoming<'_>,
    ) -> ApiResult<Answer> {
        let options = request.query.write_options(incoming.headers)?;
        let format = content_type(incoming.headers);
        if format == APPLY {
            return self.apply(request, user, incoming, &options);
        }
        if format == STRATEGIC && request.resource.custom {
            return Err(ApiError::unsupported_media_type(
                STRATEGIC,
                &[JSON_PATCH, MERGE_PATCH, APPLY].join(", "),
            ));
        }
        let change = patcher(&format, &incoming.body)?;
        let (object, warnings) =
            self.state().update(request, &options, Ownership::Update, |resource, old| {
                let mut new = change(resource, old)?;
                check_type(resource, &mut new)?;
                Ok(new)
            })?;
        let mut answer = one(request, StatusCode::OK, &object);
        answer.warnings = warnings;
        Ok(answer)
    }

    fn apply(
        &self,
        request: &Request,
        user: &User,
        incoming: &Incoming<'_>,
        options: &WriteOptions,
    ) -> ApiResult<Answer> {
        let resource = &request.resource;
        if !options.manager_given {
            let cause = Cause::required("fieldManager", "is required for apply patch");
            return Err(ApiError::invalid(resource, request.name(), &[cause]));
        }
        let mut config = yaml(&incoming.body)?;
        let untyped = config.get("kind").is_none() || config.get("apiVersion").is_none();
        if untyped {
            return Err(ApiError::bad_request("an apply patch must say its apiVersion and kind"));
        }
        check_type(resource, &mut config)?;
        if config["metadata"].get("managedFields").is_some_and(|m| !m.is_null()) {
            return Err(ApiError::bad_request("metadata.managedFields must be nil in an apply patch"));
        }
        let subresource = request.subresource.as_deref();
        let mut state = self.state();
        let (status, (object, warnings)) = match state.find(request) {
            Ok(_) => {
                let changed = state.update(request, options, Ownership::Applied, |resource, old| {
                    managed::apply(resource, old, &config, &options.manager, subresource, options.force)
                })?;
                (StatusCode::OK, changed)
            }
            Err(missing) if subresource.is_some() => return Err(missing),
            Err(_) => {
                // What is applied and not there is made, which takes that right too.
                let creation = rbac::Attributes {
                    verb: "create",
                    group: &resource.group,
                    resource: &resource.plural,
                    subresource: "",
                    namespace: request.namespace.as_deref().unwrap_or_default(),
                    name: request.name(),
                };
                if !rbac::allows(&state.store, user, &creation) {
                    return Err(ApiError::forbidden(resource, request.name(), &creation.refusal(user)));
                }
                config["metadata"]["name"] = Value::from(request.name());
                let empty = serde_json::json!({ "metadata": {} });
                let object = managed::apply(resource, &empty, &config, &options.manager, None, true)?;
                (StatusCode::CREATED, state.create(request, object, options, Ownership::Applied)?)
            }
        };
        let mut answer = one(request, status, &object);
        answer.warnings = warnings;
        Ok(answer)
    }
}

type Patcher = Box<dyn FnOnce(&Resource, &Value) -> ApiResult<Value>>;

fn patcher(format: &str, body: &[u8]) -> ApiResult<Patcher> {
    let unreadable = |e: serde_json::Error| ApiError::bad_request(format!("the patch is not readable: {e}"));
    match format {
        JSON_PATCH => {
            let patch: json_patch::Patch = serde_json::from_slice(body).map_err(unreadable)?;
            Ok(Box::new(move |_, old| json_patched(old, &patch)))
        }
        MERGE_PATCH | STRATEGIC => {
            let patch: Value = serde_json::from_slice(body).map_err(unreadable)?;
            if !patch.is_object() {
                return Err(ApiError::bad_request("the patch must be a JSON object"));
            }
            let strategic_merge = format == STRATEGIC;
            Ok(Box::new(move |resource, old| {
                let mut new = old.clone();
                if strategic_merge {
                    strategic(resource.schema.at(), &mut new, &patch)?;
                } else {
                    json_patch::merge(&mut new, &patch);
                }
                Ok(new)
            }))
        }
        other => Err(ApiError::unsupported_media_type(
            other,
            &[JSON_PATCH, MERGE_PATCH, STRATEGIC, APPLY].join(", "),
        )),
    }
}
