//! Secrets and ConfigMaps: what may be in them, and how much.

use base64::Engine as _;
use serde_json::{Value, json};

use super::immutable;
use crate::api::forget;
use crate::status::Cause;
use crate::validate;

/// All values together, in bytes: `MaxSecretSize` of `k8s.io/api`.
const MAX_BYTES: usize = 1024 * 1024;

/// Completes a Secret and says what is wrong with it.
pub(super) fn secret(secret: &mut Value, old: Option<&Value>) -> Vec<Cause> {
    merge_string_data(secret);
    let mut causes = sized_keys(secret, &["data"]);
    let has = |key: &str| secret["data"].get(key).is_some();
    let required: &[&str] = match secret["type"].as_str() {
        Some("kubernetes.io/tls") => &["tls.crt", "tls.key"],
        Some("kubernetes.io/dockerconfigjson") => &[".dockerconfigjson"],
        Some("kubernetes.io/ssh-auth") => &["ssh-privatekey"],
        _ => &[],
    };
    let missing = required.iter().filter(|key| !has(key));
    causes.extend(missing.map(|key| Cause::required(format!("data[{key}]"), "")));
    const ACCOUNT: &str = "kubernetes.io/service-account.name";
    let account = secret["metadata"]["annotations"][ACCOUNT].as_str().unwrap_or_default();
    if secret["type"] == "kubernetes.io/service-account-token" && account.is_empty() {
        causes.push(Cause::required(format!("metadata.annotations[{ACCOUNT}]"), ""));
    }
    if let Some(old) = old {
        causes.extend(immutable(old, secret, &["/type"]));
        causes.extend(sealed(old, secret, &["/data"]));
    }
    causes
}

/// What is wrong with a ConfigMap.
pub(super) fn config_map(map: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = sized_keys(map, &["data", "binaryData"]);
    for key in map["data"].as_object().into_iter().flatten().map(|(key, _)| key) {
        if map["binaryData"].get(key).is_some() {
            let rule = "duplicate of key present in binaryData";
            causes.push(Cause::invalid(format!("data[{key}]"), &json!(key), rule));
        }
    }
    causes.extend(old.into_iter().flat_map(|old| sealed(old, map, &["/data", "/binaryData"])));
    causes
}

/// `stringData` is a convenience for writers: it becomes `data`.
fn merge_string_data(secret: &mut Value) {
    let plain = secret.get("stringData").cloned().unwrap_or_default();
    forget(secret, "stringData");
    for (key, text) in plain.as_object().into_iter().flatten() {
        let bytes = text.as_str().unwrap_or_default();
        secret["data"][key] = json!(base64::engine::general_purpose::STANDARD.encode(bytes));
    }
}

fn sized_keys(object: &Value, fields: &[&str]) -> Vec<Cause> {
    let mut causes = Vec::new();
    let mut size = 0;
    for field in fields {
        for (key, value) in object[field].as_object().into_iter().flatten() {
            let text = value.as_str().unwrap_or_default();
            let encoded = object["kind"] == "Secret" || *field == "binaryData";
            size += if encoded { text.trim_end_matches('=').len() * 3 / 4 } else { text.len() };
            if let Some(why) = validate::data_key(key) {
                causes.push(Cause::invalid(format!("{field}[{key}]"), &json!(key), &why));
            }
        }
    }
    if size > MAX_BYTES {
        causes.push(Cause {
            reason: "FieldValueTooLong",
            field: fields.first().map_or_else(String::new, |field| (*field).to_owned()),
            message: format!("Too long: may not be more than {MAX_BYTES} bytes"),
        });
    }
    causes
}

/// What says that it is immutable stays as it is, and goes on saying so.
fn sealed(old: &Value, new: &Value, fields: &[&str]) -> Vec<Cause> {
    if old["immutable"] != true {
        return Vec::new();
    }
    let changed =
        fields.iter().chain(&["/immutable"]).filter(|field| old.pointer(field) != new.pointer(field));
    let rule = "field is immutable when `immutable` is set";
    changed.map(|field| Cause::forbidden(field.trim_start_matches('/'), rule)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(causes: Vec<Cause>) -> Vec<String> {
        causes.into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn a_secret_has_what_its_type_promises_and_keeps_it() {
        let of =
            |kind: &str, data: Value| json!({"kind": "Secret", "type": kind, "metadata": {}, "data": data});
        let mut pair = of("kubernetes.io/tls", json!({"tls.crt": "eA=="}));
        assert_eq!(fields(secret(&mut pair, None)), ["data[tls.key]"]);
        pair["stringData"] = json!({"tls.key": "x"});
        assert_eq!(fields(secret(&mut pair, None)), [""; 0]);
        let mut other = of("Opaque", json!({}));
        assert_eq!(fields(secret(&mut other, Some(&pair))), ["type"]);
        let mut token = of("kubernetes.io/service-account-token", json!({}));
        assert_eq!(secret(&mut token, None).len(), 1, "it names its account");
        pair["immutable"] = json!(true);
        let mut changed = pair.clone();
        changed["data"]["tls.key"] = json!("eQ==");
        assert_eq!(fields(secret(&mut changed, Some(&pair))), ["data"]);
    }

    #[test]
    fn keys_are_file_names_and_all_of_it_fits_into_a_mebibyte() {
        let of = |data: Value| json!({"kind": "ConfigMap", "metadata": {}, "data": data});
        for bad in ["", ".", "..", "..x", "a/b", "a b", &"x".repeat(254)] {
            assert_eq!(config_map(&of(json!({bad: ""})), None).len(), 1, "{bad:?}");
        }
        assert_eq!(fields(config_map(&of(json!({"ca.crt": "", "_-.A": "", ".x": ""})), None)), [""; 0]);
        assert_eq!(fields(config_map(&of(json!({"a": "x".repeat(MAX_BYTES)})), None)), [""; 0]);
        assert_eq!(fields(config_map(&of(json!({"a": "x".repeat(MAX_BYTES + 1)})), None)), ["data"]);
        let mut twice = of(json!({"a": ""}));
        twice["binaryData"] = json!({"a": ""});
        assert_eq!(fields(config_map(&twice, None)), ["data[a]"]);
    }
}
