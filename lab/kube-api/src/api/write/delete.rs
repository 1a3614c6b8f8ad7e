//! Delete: preconditions, finalizers, grace, and what goes with a namespace or a CRD.

use chrono::{Duration, SecondsFormat, Utc};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::read::one;
use super::super::{Answer, Api, Incoming, Payload, State};
use super::{body_value, is_released};
use crate::kinds;
use crate::request::Request;
use crate::resource::Resource;
use crate::status::{ApiError, ApiResult, success};
use crate::store::Key;

/// `DeleteOptions`, from the body or the query.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DeleteOptions {
    grace_period_seconds: Option<i64>,
    preconditions: Option<Preconditions>,
    dry_run: Vec<String>,
    propagation_policy: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Preconditions {
    uid: Option<String>,
    resource_version: Option<String>,
}

impl Api {
    pub(in super::super) fn delete(&self, request: &Request, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let options = DeleteOptions::read(request, incoming)?;
        let mut state = self.state();
        let object = state.find(request)?;
        let key = Key::new(request.namespace.as_deref().unwrap_or_default(), request.name());
        options.check(request, &object.value)?;
        let resource = request.resource.clone();
        kinds::may_delete(&resource, request.name())?;
        if !options.dry_run.is_empty() {
            return Ok(one(request, StatusCode::OK, &object));
        }
        state.delete_object(&resource, &key, options.grace_period_seconds);
        match state.store.get(&resource.collection, &key) {
            Some(waiting) => Ok(one(request, StatusCode::OK, &waiting)),
            // Pods are answered with, as kubelets expect; of other things only the name is left.
            None if resource.is("", "pods") => Ok(one(request, StatusCode::OK, &object)),
            None => Ok(Answer::ok(success(&resource, request.name(), &object.value["metadata"]["uid"]))),
        }
    }

    pub(in super::super) fn delete_collection(
        &self,
        request: &Request,
        incoming: &Incoming<'_>,
    ) -> ApiResult<Answer> {
        let delete = DeleteOptions::read(request, incoming)?;
        let list = request.query.list_options(&request.resource.kind)?;
        let resource = request.resource.clone();
        let mut state = self.state();
        let doomed: Vec<(Key, Value)> = state
            .store
            .list(&resource.collection, request.namespace.as_deref())
            .filter(|(_, object)| list.selector.matches(&object.value))
            .map(|(key, object)| (key.clone(), object.value.clone()))
            .collect();
        if delete.dry_run.is_empty() {
            for (key, _) in &doomed {
                if kinds::may_delete(&resource, &key.name).is_ok() {
                    state.delete_object(&resource, key, delete.grace_period_seconds);
                }
            }
        }
        let list = json!({
            "kind": resource.list_kind,
            "apiVersion": resource.api_version(),
            "metadata": { "resourceVersion": state.store.revision().to_string() },
            "items": doomed.into_iter().map(|(_, object)| object).collect::<Vec<_>>(),
        });
        Ok(Answer::new(StatusCode::OK, Payload::Json(list)))
    }
}

impl State {
    /// Deletes an object, or marks it as to be deleted where something holds it back.
    pub(crate) fn delete_object(&mut self, resource: &Resource, key: &Key, grace: Option<i64>) {
        let Some(object) = self.store.get(&resource.collection, key) else { return };
        let mut value = object.value.clone();
        let grace = kinds::grace_period(resource, &value, grace);
        let metadata = &mut value["metadata"];
        let before = metadata["deletionGracePeriodSeconds"].as_i64();
        let first = metadata.get("deletionTimestamp").is_none();
        // A second request can shorten the grace, not lengthen it.
        if first || before.is_some_and(|before| grace < before) {
            let at = Utc::now() + Duration::seconds(grace);
            metadata["deletionTimestamp"] = json!(at.to_rfc3339_opts(SecondsFormat::Secs, true));
            metadata["deletionGracePeriodSeconds"] = json!(grace);
        }
        if first && resource.is("apiextensions.k8s.io", "customresourcedefinitions") {
            add_finalizer(metadata, kinds::crds::CLEANUP);
        }
        if first && kinds::has_generation(resource) {
            let generation = metadata["generation"].as_i64().unwrap_or(0) + 1;
            metadata["generation"] = json!(generation);
        }
        if is_released(resource, &value) {
            self.remove_now(resource, key);
            return;
        }
        if resource.is("", "namespaces") {
            value["status"]["phase"] = json!("Terminating");
        }
        if value != object.value {
            self.store.put(&resource.collection, key.clone(), value);
        }
        kinds::after_marked(self, resource, key);
    }

    /// Removes an object and what depended on nothing but it.
    pub(crate) fn remove_now(&mut self, resource: &Resource, key: &Key) {
        if let Some(gone) = self.store.delete(&resource.collection, key) {
            kinds::after_delete(self, resource, &gone.value);
        }
    }
}

fn add_finalizer(metadata: &mut Value, finalizer: &str) {
    let mut finalizers = metadata["finalizers"].as_array().cloned().unwrap_or_default();
    if !finalizers.iter().any(|f| f == finalizer) {
        finalizers.push(json!(finalizer));
    }
    metadata["finalizers"] = Value::Array(finalizers);
}

impl DeleteOptions {
    fn read(request: &Request, incoming: &Incoming<'_>) -> ApiResult<Self> {
        let mut options = if incoming.body.is_empty() {
            Self::default()
        } else {
            let body = body_value(incoming)?;
            serde_json::from_value(body)
                .map_err(|e| ApiError::bad_request(format!("the body is no DeleteOptions: {e}")))?
        };
        let query = &request.query;
        if !query.text("gracePeriodSeconds").is_empty() {
            let grace = query.text("gracePeriodSeconds").parse().map_err(|_| {
                ApiError::bad_request("gracePeriodSeconds must be a number of seconds, 0 for at once")
            })?;
            options.grace_period_seconds = Some(grace);
        }
        if query.text("dryRun") == "All" {
            options.dry_run.push("All".into());
        }
        if options.grace_period_seconds.is_some_and(|grace| grace < 0) {
            return Err(ApiError::bad_request("gracePeriodSeconds must not be negative"));
        }
        if let Some(policy) = &options.propagation_policy
            && !["Background", "Foreground", "Orphan"].contains(&policy.as_str())
        {
            return Err(ApiError::bad_request(format!(
                "propagationPolicy {policy:?} is not supported: use Background, Foreground or Orphan"
            )));
        }
        Ok(options)
    }

    fn check(&self, request: &Request, object: &Value) -> ApiResult<()> {
        let Some(preconditions) = &self.preconditions else { return Ok(()) };
        let wanted = [
            ("UID", "uid", &preconditions.uid),
            ("ResourceVersion", "resourceVersion", &preconditions.resource_version),
        ];
        for (title, field, wanted) in wanted {
            let is = object["metadata"][field].as_str().unwrap_or_default();
            if let Some(wanted) = wanted.as_ref().filter(|wanted| *wanted != is) {
                let why = format!(
                    "Precondition failed: {title} in precondition: {wanted}, {title} in object meta: {is}"
                );
                return Err(ApiError::conflict(&request.resource, request.name(), &why));
            }
        }
        Ok(())
    }
}
