//! Names, labels and annotations: the rules of `k8s.io/apimachinery/pkg/util/validation`.
//!
//! Each rule returns what is wrong, or nothing.

use serde_json::Value;

use crate::resource::Resource;
use crate::status::Cause;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

/// All annotations of an object together, in bytes.
const MAX_ANNOTATIONS: usize = 256 * 1024;

/// RFC 1123 subdomain: names of most objects.
pub fn dns1123_subdomain(text: &str) -> Option<String> {
    if text.len() > 253 {
        return Some("must be no more than 253 characters".into());
    }
    (!text.split('.').all(|part| is_dns_label(part, false))).then(|| SUBDOMAIN.into())
}

/// RFC 1123 label: names of namespaces and of ports.
pub fn dns1123_label(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some("must be no more than 63 characters".into());
    }
    (!is_dns_label(text, false)).then(|| LABEL.into())
}

/// RFC 1035 label: names of Services (before RelaxedServiceNameValidation).
pub fn dns1035_label(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some("must be no more than 63 characters".into());
    }
    (!is_dns_label(text, true)).then(|| LABEL_1035.into())
}

/// A key of a label or annotation: `[prefix/]name`.
pub fn label_key(text: &str) -> Option<String> {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    if let Some(prefix) = prefix
        && let Some(why) = dns1123_subdomain(prefix)
    {
        return Some(format!("prefix part {why}"));
    }
    if name.is_empty() {
        return Some("name part must be non-empty".into());
    }
    if name.len() > 63 {
        return Some("name part must be no more than 63 characters".into());
    }
    (!is_label_text(name)).then(|| QUALIFIED.into())
}

/// The value of a label.
pub fn label_value(text: &str) -> Option<String> {
    if text.len() > 63 {
        return Some("must be no more than 63 characters".into());
    }
    (!text.is_empty() && !is_label_text(text)).then(|| VALUE.into())
}

/// A key of a Secret or ConfigMap, which is the name of a file where it is mounted.
pub fn data_key(text: &str) -> Option<String> {
    if text.len() > 253 {
        return Some("must be no more than 253 characters".into());
    }
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if text.is_empty() || !text.bytes().all(fits) {
        return Some("a valid config key must consist of alphanumeric characters, '-', '_' or '.'".into());
    }
    (text == "." || text.starts_with("..")).then(|| "must not be '.' or start with '..'".into())
}

/// `metadata` of any object.
pub fn metadata(resource: &Resource, object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let metadata = &object["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else if let Some(why) = name_rule(resource)(name) {
        causes.push(Cause::invalid("metadata.name", &metadata["name"], &why));
    }
    for (field, check_value) in [("labels", true), ("annotations", false)] {
        let path = format!("metadata.{field}");
        for (key, value) in metadata[field].as_object().into_iter().flatten() {
            // Annotation keys may have upper case letters in the prefix.
            let lowered = if check_value { key.clone() } else { key.to_lowercase() };
            if let Some(why) = label_key(&lowered) {
                causes.push(Cause::invalid(path.clone(), &Value::from(key.as_str()), &why));
            }
            if check_value && let Some(why) = value.as_str().and_then(label_value) {
                causes.push(Cause::invalid(path.clone(), value, &why));
            }
        }
    }
    let annotations = metadata["annotations"].as_object();
    let size: usize =
        annotations.into_iter().flatten().map(|(k, v)| k.len() + v.as_str().map_or(0, str::len)).sum();
    if size > MAX_ANNOTATIONS {
        causes.push(Cause {
            reason: "FieldValueTooLong",
            field: "metadata.annotations".into(),
            message: format!("Too long: may not be more than {MAX_ANNOTATIONS} bytes"),
        });
    }
    for (index, finalizer) in metadata["finalizers"].as_array().into_iter().flatten().enumerate() {
        if let Some(why) = finalizer.as_str().and_then(label_key) {
            causes.push(Cause::invalid(format!("metadata.finalizers[{index}]"), finalizer, &why));
        }
    }
    for (index, owner) in metadata["ownerReferences"].as_array().into_iter().flatten().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().unwrap_or_default().is_empty() {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                causes.push(Cause::invalid(path, &Value::from(""), "must not be empty"));
            }
        }
    }
    causes
}

fn name_rule(resource: &Resource) -> fn(&str) -> Option<String> {
    if resource.path_segment_names {
        path_segment
    } else if resource.is("", "namespaces") {
        dns1123_label
    } else if resource.is("", "services") {
        dns1035_label
    } else {
        dns1123_subdomain
    }
}

/// Anything that fits between two slashes of a URL: names of RBAC objects.
fn path_segment(text: &str) -> Option<String> {
    if text == "." || text == ".." {
        return Some(format!("may not be '{text}'"));
    }
    text.find(['/', '%']).map(|at| format!("may not contain '{}'", &text[at..=at]))
}

fn is_dns_label(text: &str, letter_first: bool) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    bytes.iter().all(|b| alphanumeric(b) || *b == b'-')
        && bytes.first().is_some_and(|b| if letter_first { b.is_ascii_lowercase() } else { alphanumeric(b) })
        && bytes.last().is_some_and(alphanumeric)
}

fn is_label_text(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_rfc_1123() {
        for good in ["a", "a-b.c-d", "1", "0.a"] {
            assert_eq!(dns1123_subdomain(good), None, "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a..b", "a_b", "é", &"a".repeat(254)] {
            assert!(dns1123_subdomain(bad).is_some(), "{bad}");
        }
        assert!(dns1035_label("1a").is_some());
        assert!(dns1123_label("a.b").is_some());
    }

    #[test]
    fn label_keys_have_an_optional_prefix() {
        for good in ["a", "A_b.c", "example.com/name", "service.cilium.io/global"] {
            assert_eq!(label_key(good), None, "{good}");
        }
        for bad in ["", "/a", "a/", "a/b/c", "-a", "Ex.com/a", &"a".repeat(64)] {
            assert!(label_key(bad).is_some(), "{bad}");
        }
    }
}
