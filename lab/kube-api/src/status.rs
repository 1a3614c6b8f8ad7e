//! Errors as Kubernetes says them: a `Status` object whose reason, message and details clients rely on.
//!
//! Messages follow `k8s.io/apimachinery/pkg/api/errors`, because people (and some clients) read them.

use serde_json::{Value, json};

use crate::resource::Resource;

/// The result of everything that can answer a client with a `Status`.
pub type ApiResult<T> = Result<T, ApiError>;

/// A failed request: HTTP code, machine-readable reason, and what was wrong.
///
/// Boxed, so that the success path of [`ApiResult`] stays small.
#[derive(Debug, Clone)]
pub struct ApiError(Box<Failure>);

#[derive(Debug, Clone)]
struct Failure {
    code: u16,
    reason: &'static str,
    message: String,
    /// `details` of the Status, an object (possibly empty).
    details: Value,
}

/// One thing wrong with one field, as `details.causes` lists them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// For instance `FieldValueInvalid`.
    pub reason: &'static str,
    /// Path of the field, for instance `spec.ports[0].port`.
    pub field: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl Cause {
    /// A value that is not allowed, with the rule it breaks.
    pub fn invalid(field: impl Into<String>, value: &Value, rule: &str) -> Self {
        let message = format!("Invalid value: {value}: {rule}");
        Self { reason: "FieldValueInvalid", field: field.into(), message }
    }

    /// A field that must be given.
    pub fn required(field: impl Into<String>, advice: &str) -> Self {
        let message =
            if advice.is_empty() { "Required value".into() } else { format!("Required value: {advice}") };
        Self { reason: "FieldValueRequired", field: field.into(), message }
    }

    /// A value outside of an enumeration.
    pub fn unsupported(field: impl Into<String>, value: &Value, allowed: &[&str]) -> Self {
        let allowed = allowed.iter().map(|a| format!("{a:?}")).collect::<Vec<_>>().join(", ");
        let message = format!("Unsupported value: {value}: supported values: {allowed}");
        Self { reason: "FieldValueNotSupported", field: field.into(), message }
    }

    /// A value that another one already uses.
    pub fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        Self {
            reason: "FieldValueDuplicate",
            field: field.into(),
            message: format!("Duplicate value: {value}"),
        }
    }

    /// A field that must not be given here.
    pub fn forbidden(field: impl Into<String>, rule: &str) -> Self {
        Self { reason: "FieldValueForbidden", field: field.into(), message: format!("Forbidden: {rule}") }
    }

    /// A value of the wrong JSON type.
    pub fn type_invalid(field: impl Into<String>, value: &Value, rule: &str) -> Self {
        let message = format!("Invalid value: {value}: {rule}");
        Self { reason: "FieldValueTypeInvalid", field: field.into(), message }
    }
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self(Box::new(Failure { code, reason, message: message.into(), details: json!({}) }))
    }

    fn about(mut self, resource: &Resource, name: &str) -> Self {
        self.0.details = json!({ "name": name, "kind": resource.plural });
        if !resource.group.is_empty() {
            self.0.details["group"] = json!(resource.group);
        }
        self
    }

    /// 400: the request itself makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401: no certificate, or one that names nobody.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 with the authorizer's sentence.
    pub fn forbidden(resource: &Resource, name: &str, why: &str) -> Self {
        let message = match name {
            "" => format!("{} is forbidden: {why}", resource.qualified()),
            _ => format!("{} {name:?} is forbidden: {why}", resource.qualified()),
        };
        Self::new(403, "Forbidden", message).about(resource, name)
    }

    /// 403 for a path that is no resource.
    pub fn forbidden_path(path: &str, why: &str) -> Self {
        Self::new(403, "Forbidden", format!("forbidden: {why} path {path:?}"))
    }

    /// 403 for anything else.
    pub fn forbidden_because(why: &str) -> Self {
        Self::new(403, "Forbidden", why)
    }

    /// 404: the resource exists, the object does not.
    pub fn not_found(resource: &Resource, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} {name:?} not found", resource.qualified()))
            .about(resource, name)
    }

    /// 404: no such path.
    pub fn no_such_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    /// 406.
    pub fn not_acceptable(offered: &str) -> Self {
        let message =
            format!("only the following media types are accepted: {offered}; ask for one of them in Accept");
        Self::new(406, "NotAcceptable", message)
    }

    /// 409: an object of that name is there already.
    pub fn already_exists(resource: &Resource, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{} {name:?} already exists", resource.qualified()))
            .about(resource, name)
    }

    /// 409: the object changed since the client read it, or another precondition failed.
    pub fn conflict(resource: &Resource, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {name:?}: {why}", resource.qualified());
        Self::new(409, "Conflict", message).about(resource, name)
    }

    /// 409: the resourceVersion the client sent is not the object's.
    pub fn modified(resource: &Resource, name: &str) -> Self {
        let why =
            "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(resource, name, why)
    }

    /// 409 of server-side apply: others own fields that the client wants to change.
    /// `conflicts` pairs a manager's description with a field path.
    pub fn apply_conflict(conflicts: &[(String, String)]) -> Self {
        let mut by_manager: Vec<(&str, Vec<&str>)> = Vec::new();
        for (manager, field) in conflicts {
            match by_manager.iter_mut().find(|(m, _)| m == manager) {
                Some((_, fields)) => fields.push(field),
                None => by_manager.push((manager, vec![field])),
            }
        }
        let listed: Vec<String> = by_manager
            .iter()
            .map(|(manager, fields)| match fields.as_slice() {
                [field] => format!("conflict with {manager}: {field}"),
                many => format!("conflicts with {manager}:\n- {}", many.join("\n- ")),
            })
            .collect();
        let plural = if conflicts.len() == 1 { "" } else { "s" };
        let message =
            format!("Apply failed with {} conflict{plural}: {}", conflicts.len(), listed.join("\n"));
        let mut error = Self::new(409, "Conflict", message);
        let causes: Vec<Value> = conflicts
            .iter()
            .map(|(manager, field)| {
                json!({ "reason": "FieldManagerConflict", "message": format!("conflict with {manager}"), "field": field })
            })
            .collect();
        error.0.details = json!({ "causes": causes });
        error
    }

    /// 410: that resourceVersion, or continue token, is no longer kept.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        Self::new(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit} bytes; split the object"),
        )
    }

    /// 415: the body's type cannot be read here.
    pub fn unsupported_media_type(got: &str, supported: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format ({got}) - accepted media types include: {supported}"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 422: the object was read and is not allowed.
    pub fn invalid(resource: &Resource, name: &str, causes: &[Cause]) -> Self {
        let listed: Vec<String> =
            causes
                .iter()
                .map(|c| {
                    if c.field.is_empty() { c.message.clone() } else { format!("{}: {}", c.field, c.message) }
                })
                .collect();
        let listed = match listed.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let kind = match resource.group.as_str() {
            "" => resource.kind.clone(),
            group => format!("{}.{group}", resource.kind),
        };
        let mut error = Self::new(422, "Invalid", format!("{kind} {name:?} is invalid: {listed}"));
        error.0.details = json!({
            "name": name,
            "group": resource.group,
            "kind": resource.kind,
            "causes": causes.iter().map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field})).collect::<Vec<_>>(),
        });
        if resource.group.is_empty() {
            error.0.details.as_object_mut().expect("built as an object above").shift_remove("group");
        }
        error
    }

    /// 422 for a patch that cannot be applied to the object.
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(422, "Invalid", message)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", message)
    }

    /// 504: a list "not older than" a revision that is still in the future.
    pub fn too_new(asked: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {asked}, current: {current}");
        let mut error = Self::new(504, "Timeout", message);
        error.0.details = json!({
            "retryAfterSeconds": 1,
            "causes": [{ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" }],
        });
        error
    }

    /// HTTP status code.
    pub fn code(&self) -> u16 {
        self.0.code
    }

    /// The machine-readable reason, for instance `NotFound`.
    pub fn reason(&self) -> &'static str {
        self.0.reason
    }

    /// The sentence for people.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The `Status` object.
    pub fn to_value(&self) -> Value {
        json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.0.message,
            "reason": self.0.reason,
            "details": self.0.details,
            "code": self.0.code,
        })
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for ApiError {}

/// The answer to a successful request that has no object to show.
pub fn success(resource: &Resource, name: &str, uid: &Value) -> Value {
    let mut details = json!({ "name": name, "kind": resource.plural, "uid": uid });
    if !resource.group.is_empty() {
        details["group"] = json!(resource.group);
    }
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details })
}
