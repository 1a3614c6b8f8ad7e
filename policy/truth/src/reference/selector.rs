//! Label selectors, as Kubernetes describes them.

use std::collections::BTreeMap;

use serde_json::Value;

/// Whether all of `matchLabels` and `matchExpressions` hold, for a way to look labels up.
///
/// `In` wants the key with one of the values; `NotIn` wants no such value, and holds without the key; an empty selector
/// matches everything.
pub(super) fn matches<'a>(selector: &Value, value_of: impl Fn(&str) -> Option<&'a str>) -> bool {
    let labels = selector.get("matchLabels").and_then(Value::as_object);
    let equal = labels.is_none_or(|labels| {
        labels.iter().all(|(key, wanted)| value_of(key).is_some_and(|value| Some(value) == wanted.as_str()))
    });
    equal
        && super::list(selector, "matchExpressions").iter().all(|expression| {
            let key = expression["key"].as_str().unwrap_or_default();
            let value = value_of(key);
            let listed = || super::list(expression, "values").iter().any(|known| known.as_str() == value);
            match expression["operator"].as_str().unwrap_or_default() {
                "In" => value.is_some() && listed(),
                "NotIn" => value.is_none() || !listed(),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                other => panic!("no such operator: {other}"),
            }
        })
}

/// Keys that a selector is about.
pub(super) fn keys(selector: &Value) -> Vec<&str> {
    let labels = selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten();
    let expressions = super::list(selector, "matchExpressions").iter();
    labels
        .map(|(key, _)| key.as_str())
        .chain(expressions.map(|expression| expression["key"].as_str().unwrap_or_default()))
        .collect()
}

/// The value of a label in the notation of Cilium's selectors: `source:key`, or a key of any source.
pub(super) fn cilium_label<'a>(labels: &'a BTreeMap<String, String>, key: &str) -> Option<&'a str> {
    match split(key) {
        (None, name) => labels
            .iter()
            .find(|(label, _)| label.split_once(':').is_some_and(|(_, known)| known == name))
            .map(|(_, value)| value.as_str()),
        (Some(source), name) => labels.get(&format!("{source}:{name}")).map(String::as_str),
    }
}

/// Source, unless it is any, and key.
pub(super) fn split(key: &str) -> (Option<&str>, &str) {
    match key.split_once(':') {
        Some(("any", name)) => (None, name),
        Some((source, name)) => (Some(source), name),
        None => (None, key),
    }
}
