//! Create, update, patch and delete.
//!
//! Every write has the same way: read the object by its schema, merge it with what is there, let the kind
//! have its say, record who owns which field, check, commit.

mod delete;
mod patch;

use std::sync::Arc;

use chrono::{SecondsFormat, Utc};
use http::{HeaderMap, StatusCode, header};
use serde_json::{Value, json};

use super::read::one;
use super::{Answer, Api, Incoming, State};
use crate::fields::managed;
use crate::kinds;
use crate::protobuf;
use crate::request::{FieldValidation, Request, WriteOptions};
use crate::resource::Resource;
use crate::schema::Findings;
use crate::status::{ApiError, ApiResult, Cause};
use crate::store::{Key, Object};
use crate::validate;

impl Api {
    pub(super) fn create(&self, request: &Request, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let object = body_object(&request.resource, incoming)?;
        let options = request.query.write_options(incoming.headers)?;
        let (object, warnings) = self.state().create(request, object, &options, Ownership::Update)?;
        let mut answer = one(request, StatusCode::CREATED, &object);
        answer.warnings = warnings;
        Ok(answer)
    }

    pub(super) fn replace(&self, request: &Request, incoming: &Incoming<'_>) -> ApiResult<Answer> {
        let object = body_object(&request.resource, incoming)?;
        let options = request.query.write_options(incoming.headers)?;
        let (object, warnings) =
            self.state().update(request, &options, Ownership::Update, |_, _| Ok(object))?;
        let mut answer = one(request, StatusCode::OK, &object);
        answer.warnings = warnings;
        Ok(answer)
    }
}

/// How a write changes who owns which field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ownership {
    /// What the write changed is its manager's.
    Update,
    /// The merge has said so already (server-side apply).
    Applied,
}

/// What of an object a write may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// All but the status, where that is a subresource.
    Main,
    Status,
}

impl Part {
    fn of(request: &Request) -> Self {
        if request.subresource.as_deref() == Some("status") { Self::Status } else { Self::Main }
    }
}

impl State {
    /// Creates an object. Returns it, and warnings.
    pub(super) fn create(
        &mut self,
        request: &Request,
        mut object: Value,
        options: &WriteOptions,
        ownership: Ownership,
    ) -> ApiResult<(Arc<Object>, Vec<String>)> {
        let resource = request.resource.clone();
        let namespace = request.namespace.clone().unwrap_or_default();
        if resource.namespaced && namespace.is_empty() {
            return Err(ApiError::bad_request("an empty namespace may not be set during creation"));
        }
        check_namespace(&resource, &object, &namespace)?;
        if resource.status && !kinds::keeps_status_on_create(&resource) {
            remove(&mut object, "status");
        }
        fresh_metadata(&resource, &mut object, &namespace)?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        self.check_namespace_open(&resource, &namespace, &name)?;
        let key = Key::new(&namespace, &name);
        if self.store.get(&resource.collection, &key).is_some() {
            return Err(ApiError::already_exists(&resource, &name));
        }
        let findings = resource.schema.admit(&mut object);
        let (warnings, mut causes) = judge(&resource, &name, findings, options.validation)?;
        if ownership == Ownership::Update {
            managed::record_update(&resource, None, &mut object, &options.manager, None);
        }
        causes.extend(validate::metadata(&resource, &object));
        causes.extend(kinds::prepare_create(self, &resource, &mut object));
        if !causes.is_empty() {
            return Err(ApiError::invalid(&resource, &name, &causes));
        }
        if options.dry_run {
            return Ok((Object::new(object), warnings));
        }
        let object = self.store.put(&resource.collection, key, object);
        kinds::after_write(self, &resource, &object);
        Ok((object, warnings))
    }

    /// Changes an object: `change` makes the new one of the old one. Returns the object as it is now, and
    /// warnings.
    pub(super) fn update(
        &mut self,
        request: &Request,
        options: &WriteOptions,
        ownership: Ownership,
        change: impl FnOnce(&Resource, &Value) -> ApiResult<Value>,
    ) -> ApiResult<(Arc<Object>, Vec<String>)> {
        let resource = request.resource.clone();
        let old = self.find(request)?;
        let name = request.name().to_owned();
        let namespace = request.namespace.clone().unwrap_or_default();
        let mut new = change(&resource, &old.value)?;
        check_namespace(&resource, &new, &namespace)?;
        check_identity(request, &old.value, &new)?;
        let findings = resource.schema.admit(&mut new);
        let (warnings, mut causes) = judge(&resource, &name, findings, options.validation)?;
        let part = Part::of(request);
        let mut new = keep_the_rest(&resource, part, &old.value, new);
        causes.extend(kinds::prepare_update(self, &resource, part == Part::Status, &old.value, &mut new));
        causes.extend(validate::metadata(&resource, &new));
        if !causes.is_empty() {
            return Err(ApiError::invalid(&resource, &name, &causes));
        }
        if kinds::has_generation(&resource) && spec_differs(&old.value, &new) {
            let generation = old.value["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
            new["metadata"]["generation"] = json!(generation);
        }
        if ownership == Ownership::Update {
            let subresource = request.subresource.as_deref();
            managed::record_update(&resource, Some(&old.value), &mut new, &options.manager, subresource);
        }
        let done = new["metadata"].get("deletionTimestamp").is_some() && is_released(&resource, &new);
        if !done && managed::same(&old.value, &new) {
            return Ok((old, warnings));
        }
        if options.dry_run {
            return Ok((Object::new(new), warnings));
        }
        let key = Key::new(&namespace, &name);
        let object = self.store.put(&resource.collection, key.clone(), new);
        kinds::after_write(self, &resource, &object);
        if done {
            self.remove_now(&resource, &key);
        }
        Ok((object, warnings))
    }

    fn check_namespace_open(&self, resource: &Resource, namespace: &str, name: &str) -> ApiResult<()> {
        if !resource.namespaced {
            return Ok(());
        }
        let namespaces = self.registry.any_version("", "namespaces").expect("namespaces are built in");
        let Some(found) = self.store.get(&namespaces.collection, &Key::new("", namespace)) else {
            return Err(ApiError::not_found(namespaces, namespace));
        };
        if found.value["metadata"].get("deletionTimestamp").is_some() {
            let why = format!(
                "unable to create new content in namespace {namespace} because it is being terminated"
            );
            return Err(ApiError::forbidden(resource, name, &why));
        }
        Ok(())
    }
}

/// The body as JSON, whatever format it came in.
pub(super) fn body_value(incoming: &Incoming<'_>) -> ApiResult<Value> {
    let media = content_type(incoming.headers);
    match media.as_str() {
        "" | "application/json" | "*/*" => serde_json::from_slice(&incoming.body)
            .map_err(|e| ApiError::bad_request(format!("the body is not JSON: {e}"))),
        "application/yaml" => yaml(&incoming.body),
        protobuf::MEDIA_TYPE => protobuf::decode(&incoming.body).map_err(ApiError::bad_request),
        other => {
            let readable = ["application/json", "application/yaml", protobuf::MEDIA_TYPE].join(", ");
            Err(ApiError::unsupported_media_type(other, &readable))
        }
    }
}

pub(super) fn yaml(body: &[u8]) -> ApiResult<Value> {
    serde_norway::from_slice(body)
        .map_err(|e| ApiError::bad_request(format!("error converting YAML to JSON: {e}")))
}

pub(super) fn content_type(headers: &HeaderMap) -> String {
    let text = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn body_object(resource: &Resource, incoming: &Incoming<'_>) -> ApiResult<Value> {
    let mut object = body_value(incoming)?;
    check_type(resource, &mut object)?;
    Ok(object)
}

/// Makes sure that the body is an object of the resource's kind and version.
pub(super) fn check_type(resource: &Resource, object: &mut Value) -> ApiResult<()> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the body must be a JSON object"));
    }
    let text = |field: &str| object[field].as_str().unwrap_or_default();
    let (kind, api_version) = (text("kind"), text("apiVersion"));
    let expected = resource.api_version();
    if !kind.is_empty() && kind != resource.kind {
        return Err(ApiError::bad_request(format!(
            "the object provided is a {kind}, not a {}: send it to its own resource",
            resource.kind
        )));
    }
    if !api_version.is_empty() && api_version != expected {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({api_version}) does not match the expected API version ({expected})"
        )));
    }
    if resource.custom && (kind.is_empty() || api_version.is_empty()) {
        return Err(ApiError::bad_request("Object 'Kind' or 'apiVersion' is missing in the body"));
    }
    if !matches!(object.get("metadata"), None | Some(Value::Object(_))) {
        return Err(ApiError::bad_request("metadata must be an object"));
    }
    object["kind"] = json!(resource.kind);
    object["apiVersion"] = json!(expected);
    if object.get("metadata").is_none() {
        object["metadata"] = json!({});
    }
    Ok(())
}

fn check_namespace(resource: &Resource, object: &Value, namespace: &str) -> ApiResult<()> {
    let given = object["metadata"]["namespace"].as_str().unwrap_or_default();
    if resource.namespaced && !given.is_empty() && given != namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

/// What the server says about a new object: when it was made, what it is called, who it is.
fn fresh_metadata(resource: &Resource, object: &mut Value, namespace: &str) -> ApiResult<()> {
    let metadata = object["metadata"].as_object_mut().expect("check_type made it one");
    if metadata.get("resourceVersion").and_then(Value::as_str).is_some_and(|v| !v.is_empty()) {
        return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
    }
    for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"] {
        metadata.shift_remove(field);
    }
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let prefix = text(metadata.get("generateName"));
    if text(metadata.get("name")).is_empty() && !prefix.is_empty() {
        // As the real server: at most 63 characters with the suffix.
        let end = prefix.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|at| *at <= 58).last();
        let name = format!("{}{}", &prefix[..end.unwrap_or(0)], kinds::random_suffix());
        metadata.insert("name".into(), json!(name));
    }
    if resource.namespaced {
        metadata.insert("namespace".into(), json!(namespace));
    } else {
        metadata.shift_remove("namespace");
    }
    metadata.insert("uid".into(), json!(kinds::random_uid()));
    metadata.insert("creationTimestamp".into(), json!(now()));
    if kinds::has_generation(resource) {
        metadata.insert("generation".into(), json!(1));
    }
    Ok(())
}

/// The update must be meant for this very object, in this very state, where it says so.
fn check_identity(request: &Request, old: &Value, new: &Value) -> ApiResult<()> {
    let resource = &request.resource;
    let given = |field: &str| new["metadata"][field].as_str().filter(|text| !text.is_empty());
    let is = |field: &str| old["metadata"][field].as_str().unwrap_or_default();
    if let Some(name) = given("name")
        && name != request.name()
    {
        let why = format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            request.name()
        );
        return Err(ApiError::bad_request(why));
    }
    if let Some(uid) = given("uid")
        && uid != is("uid")
    {
        let why =
            format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", is("uid"));
        return Err(ApiError::conflict(resource, request.name(), &why));
    }
    match given("resourceVersion") {
        Some(revision) if revision != "0" && revision != is("resourceVersion") => {
            Err(ApiError::modified(resource, request.name()))
        }
        None if request.verb == "update" && resource.custom => {
            let cause =
                Cause::invalid("metadata.resourceVersion", &json!(0), "must be specified for an update");
            Err(ApiError::invalid(resource, request.name(), &[cause]))
        }
        _ => Ok(()),
    }
}

/// The new object with everything from the old one that this write may not touch.
fn keep_the_rest(resource: &Resource, part: Part, old: &Value, mut new: Value) -> Value {
    if part == Part::Status {
        let mut merged = old.clone();
        match new.get("status") {
            Some(status) => merged["status"] = status.clone(),
            None => remove(&mut merged, "status"),
        }
        if !resource.custom {
            for field in ["labels", "annotations", "finalizers", "ownerReferences"] {
                set_or_remove(&mut merged["metadata"], field, new["metadata"].get(field).cloned());
            }
        }
        set_or_remove(
            &mut merged["metadata"],
            "managedFields",
            new["metadata"].get("managedFields").cloned(),
        );
        return merged;
    }
    if resource.status {
        set_or_remove(&mut new, "status", old.get("status").cloned());
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
        "resourceVersion",
        "selfLink",
    ] {
        set_or_remove(&mut new["metadata"], field, old["metadata"].get(field).cloned());
    }
    new
}

fn set_or_remove(object: &mut Value, field: &str, value: Option<Value>) {
    match value {
        Some(value) => object[field] = value,
        None => remove(object, field),
    }
}

pub(crate) fn remove(object: &mut Value, field: &str) {
    if let Some(object) = object.as_object_mut() {
        object.shift_remove(field);
    }
}

/// Whether anything but metadata and status changed.
fn spec_differs(old: &Value, new: &Value) -> bool {
    let spec = |object: &Value| {
        let mut fields: Vec<(String, Value)> = object
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| !["metadata", "status", "kind", "apiVersion"].contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        fields.sort_by(|a, b| a.0.cmp(&b.0));
        fields
    };
    spec(old) != spec(new)
}

/// Whether nothing holds back an object that is to be deleted.
pub(super) fn is_released(resource: &Resource, object: &Value) -> bool {
    let metadata = &object["metadata"];
    let finalizers = metadata["finalizers"].as_array().is_some_and(|f| !f.is_empty());
    let grace = metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0);
    !finalizers && grace == 0 && !resource.is("", "namespaces")
}

/// What reading by the schema found: errors at once, warnings, and causes to be reported with others.
fn judge(
    resource: &Resource,
    name: &str,
    findings: Findings,
    validation: FieldValidation,
) -> ApiResult<(Vec<String>, Vec<Cause>)> {
    let Findings { mismatches, causes, unknown } = findings;
    if !mismatches.is_empty() && resource.custom {
        let causes: Vec<Cause> = mismatches
            .iter()
            .map(|m| {
                let rule =
                    format!("{} in body must be of type {}: {}", m.path, m.expected, type_name(&m.got));
                Cause::type_invalid(&m.path, &m.got, &rule)
            })
            .collect();
        return Err(ApiError::invalid(resource, name, &causes));
    }
    let kind = &resource.kind;
    let refuse = |why: String| {
        ApiError::bad_request(format!(
            "{kind} in version {:?} cannot be handled as a {kind}: {why}",
            resource.version
        ))
    };
    if let Some(m) = mismatches.first() {
        return Err(refuse(format!(
            "json: cannot unmarshal {} into Go struct field {kind}.{} of type {}",
            type_name(&m.got),
            m.path,
            m.expected
        )));
    }
    let unknown: Vec<String> = unknown.iter().map(|path| format!("unknown field {path:?}")).collect();
    match validation {
        FieldValidation::Strict if !unknown.is_empty() => {
            Err(refuse(format!("strict decoding error: {}", unknown.join(", "))))
        }
        FieldValidation::Warn => Ok((unknown, causes)),
        _ => Ok((Vec::new(), causes)),
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Now, as Kubernetes writes times.
pub(crate) fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true)
}
