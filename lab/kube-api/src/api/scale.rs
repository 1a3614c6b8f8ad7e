//! Subresources that are views of an object, or shortcuts to change it: scale, binding, eviction, finalize.

use std::sync::Arc;

use http::StatusCode;
use serde_json::{Value, json};

use super::write::{Ownership, body_value, check_type, content_type};
use super::{Answer, Api, Incoming, Payload, forget, now};
use crate::kinds;
use crate::patch::json_patched;
use crate::request::Request;
use crate::resource::Scale;
use crate::status::{ApiError, ApiResult, Cause, success};
use crate::store::{Key, Object};

impl Api {
    pub(super) fn scale(&self, request: &Request, incoming: &Incoming<'_>, verb: &str) -> ApiResult<Answer> {
        let scale = request.resource.scale.clone().ok_or_else(ApiError::no_such_path)?;
        if verb == "get" {
            return Ok(Answer::ok(view(&scale, &self.state().find(request)?)));
        }
        let options = request.query.write_options(incoming.headers)?;
        let body = if verb == "patch" { patch_value(incoming)? } else { body_value(incoming)? };
        let mut state = self.state();
        let current = view(&scale, &state.find(request)?);
        let wanted = match (verb, content_type(incoming.headers).as_str()) {
            ("update", _) => body,
            ("patch", "application/json-patch+json") => {
                let patch: json_patch::Patch = serde_json::from_value(body)
                    .map_err(|e| ApiError::bad_request(format!("the patch is not readable: {e}")))?;
                json_patched(&current, &patch)?
            }
            ("patch", _) => {
                let mut wanted = current.clone();
                json_patch::merge(&mut wanted, &body);
                wanted
            }
            _ => return Err(ApiError::method_not_allowed()),
        };
        let revision = wanted["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        if !revision.is_empty() && current["metadata"]["resourceVersion"] != revision {
            return Err(ApiError::modified(&request.resource, request.name()));
        }
        let replicas = &wanted["spec"]["replicas"];
        let Some(count) = replicas.as_i64().or(replicas.is_null().then_some(0)).filter(|n| *n >= 0) else {
            let cause = Cause::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
            return Err(ApiError::invalid(&request.resource, request.name(), &[cause]));
        };
        let (object, _) = state.update(request, &options, Ownership::Update, |_, old| {
            let mut new = old.clone();
            set(&mut new, &scale.spec_replicas, json!(count));
            Ok(new)
        })?;
        Ok(Answer::ok(view(&scale, &object)))
    }

    /// What the scheduler does: says on which node a pod runs.
    pub(super) fn bind(&self, request: &Request, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let binding = body_value(incoming)?;
        let Some(node) = binding["target"]["name"].as_str().filter(|node| !node.is_empty()) else {
            let cause = Cause::required("target.name", "");
            return Err(ApiError::invalid(&request.resource, request.name(), &[cause]));
        };
        let mut state = self.state();
        let pod = state.find(request)?;
        if pod.value["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty()) {
            let why = format!(
                "pod {} is already assigned to node {}",
                request.name(),
                pod.value["spec"]["nodeName"]
            );
            return Err(ApiError::conflict(&request.resource, request.name(), &why));
        }
        let mut bound = pod.value.clone();
        bound["spec"]["nodeName"] = json!(node);
        let conditions = bound["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let mut conditions: Vec<Value> =
            conditions.into_iter().filter(|c| c["type"] != "PodScheduled").collect();
        conditions.push(json!({ "type": "PodScheduled", "status": "True", "lastTransitionTime": now() }));
        bound["status"]["conditions"] = json!(conditions);
        let key = Key::new(request.namespace.as_deref().unwrap_or_default(), request.name());
        state.store.put(&request.resource.collection, key, bound);
        let done =
            json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 });
        Ok(Answer::new(StatusCode::CREATED, Payload::Json(done)))
    }

    /// Deletes a pod. There are no disruption budgets here to forbid it.
    pub(super) fn evict(&self, request: &Request, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let eviction = body_value(incoming)?;
        let mut state = self.state();
        let pod = state.find(request)?;
        let key = Key::new(request.namespace.as_deref().unwrap_or_default(), request.name());
        let grace = eviction["deleteOptions"]["gracePeriodSeconds"].as_i64();
        let resource = request.resource.clone();
        state.delete_object(&resource, &key, grace);
        let done = success(&resource, request.name(), &pod.value["metadata"]["uid"]);
        Ok(Answer::new(StatusCode::CREATED, Payload::Json(done)))
    }

    /// Lets go of a namespace's own finalizers.
    pub(super) fn finalize(&self, request: &Request, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let mut wanted = body_value(incoming)?;
        check_type(&request.resource, &mut wanted)?;
        let mut state = self.state();
        let found = state.find(request)?;
        let mut namespace = found.value.clone();
        match wanted["spec"].get("finalizers") {
            Some(finalizers) => namespace["spec"]["finalizers"] = finalizers.clone(),
            None => forget(&mut namespace["spec"], "finalizers"),
        }
        let key = Key::new("", request.name());
        let object = state.store.put(&request.resource.collection, key, namespace);
        kinds::finish_namespace(&mut state, request.name());
        Ok(Answer::ok(object.value.clone()))
    }
}

/// Patches have media types of their own; their content is JSON all the same.
fn patch_value(incoming: &Incoming<'_>) -> ApiResult<Value> {
    serde_json::from_slice(&incoming.body)
        .map_err(|e| ApiError::bad_request(format!("the body is not JSON: {e}")))
}

fn view(scale: &Scale, object: &Arc<Object>) -> Value {
    let object = &object.value;
    let mut metadata = json!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object["metadata"].get(field) {
            metadata[field] = value.clone();
        }
    }
    let number = |path: &[String]| at(object, path).and_then(Value::as_i64).unwrap_or(0);
    let mut status = json!({ "replicas": number(&scale.status_replicas) });
    let selector = scale.selector.as_deref().and_then(|path| at(object, path));
    if let Some(selector) = selector.and_then(selector_text) {
        status["selector"] = json!(selector);
    }
    json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": metadata,
        "spec": { "replicas": number(&scale.spec_replicas) },
        "status": status,
    })
}

fn selector_text(selector: &Value) -> Option<String> {
    if let Some(text) = selector.as_str() {
        return Some(text.to_owned());
    }
    let labels = selector["matchLabels"].as_object()?;
    Some(
        labels
            .iter()
            .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
            .collect::<Vec<_>>()
            .join(","),
    )
}

fn at<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(object, |value, field| value.get(field))
}

fn set(object: &mut Value, path: &[String], value: Value) {
    let mut place = object;
    for field in path {
        if !place.is_object() {
            *place = json!({});
        }
        place = &mut place[field.as_str()];
    }
    *place = value;
}
