//! Events: `ValidateEventCreate` and `ValidateEventUpdate` of `k8s.io/kubernetes/pkg/apis/core/validation`.
//!
//! The same objects have two versions. What comes by `events.k8s.io` must be complete, and only its series changes later.

use serde_json::{Value, json};

use super::immutable;
use crate::resource::Resource;
use crate::status::Cause;
use crate::validate;

/// Longest texts, in bytes.
const LIMITS: [(&str, usize); 3] = [("reportingInstance", 128), ("action", 128), ("reason", 128)];
const LONGEST_NOTE: usize = 1024;
/// What an Event of the old form alone has.
const DEPRECATED: [&str; 4] =
    ["deprecatedCount", "deprecatedFirstTimestamp", "deprecatedLastTimestamp", "deprecatedSource"];
/// All but the series and the metadata.
const FIXED: [&str; 10] = [
    "/regarding",
    "/reason",
    "/note",
    "/type",
    "/eventTime",
    "/action",
    "/related",
    "/reportingController",
    "/reportingInstance",
    "/deprecatedCount",
];

/// What is wrong with a new Event, or with one that was changed.
pub(super) fn check(resource: &Resource, event: &Value, old: Option<&Value>) -> Vec<Cause> {
    let is_new_form = resource.group == "events.k8s.io";
    let (object, note, controller) = match is_new_form {
        true => ("regarding", "note", "reportingController"),
        false => ("involvedObject", "message", "reportingComponent"),
    };
    let text = |field: &str| event[field].as_str().unwrap_or_default();
    let mut causes = Vec::new();
    let namespace = event["metadata"]["namespace"].as_str().unwrap_or_default();
    let about = event[object]["namespace"].as_str().unwrap_or_default();
    let is_timed = !event["eventTime"].is_null();
    let belongs = match (about, is_timed) {
        ("", true) => ["default", "kube-system"].contains(&namespace),
        ("", false) => namespace == "default",
        (about, false) => about == namespace,
        (_, true) => true,
    };
    if !belongs {
        let field = format!("{object}.namespace");
        causes.push(Cause::invalid(field, &json!(about), "does not match event.namespace"));
    }
    if is_timed {
        if let Some(why) = validate::label_key(text(controller)) {
            causes.push(Cause::invalid(controller, &event[controller], &why));
        }
        for (field, longest) in LIMITS {
            match text(field).len() {
                0 => causes.push(Cause::required(field, "")),
                length if length > longest => {
                    let rule = format!("can have at most {longest} characters");
                    causes.push(Cause::invalid(field, &json!(""), &rule));
                }
                _ => {}
            }
        }
        if text(note).len() > LONGEST_NOTE {
            let rule = format!("can have at most {LONGEST_NOTE} characters");
            causes.push(Cause::invalid(note, &json!(""), &rule));
        }
    }
    if !is_new_form {
        return causes;
    }
    let series = &event["series"];
    if !series.is_null() && old.is_none_or(|old| old["series"] != *series) {
        if series["count"].as_i64().unwrap_or(0) < 2 {
            causes.push(Cause::invalid("series.count", &series["count"], "should be at least 2"));
        }
        if series["lastObservedTime"].is_null() {
            causes.push(Cause::required("series.lastObservedTime", ""));
        }
    }
    match old {
        Some(old) => causes.extend(immutable(old, event, &FIXED)),
        None => {
            if !is_timed {
                causes.push(Cause::required("eventTime", ""));
            }
            if !["Normal", "Warning"].contains(&text("type")) {
                causes.push(Cause::invalid("type", &json!(""), "has invalid value"));
            }
            for field in DEPRECATED.iter().filter(|field| !is_unset(&event[**field])) {
                causes.push(Cause::invalid(*field, &json!(""), "needs to be unset"));
            }
        }
    }
    causes
}

fn is_unset(value: &Value) -> bool {
    value.is_null() || *value == 0 || value.as_object().is_some_and(serde_json::Map::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::builtin;

    fn checked(event: &Value, old: Option<&Value>) -> Vec<String> {
        let events = builtin::resources().iter().find(|r| r.is("events.k8s.io", "events")).expect("built in");
        check(events, event, old).into_iter().map(|cause| cause.field).collect()
    }

    fn event() -> Value {
        json!({
            "metadata": {"name": "a.1", "namespace": "app"},
            "eventTime": "2026-01-01T00:00:00.000000Z",
            "regarding": {"kind": "Service", "namespace": "app", "name": "a"},
            "reportingController": "isthmus-clustermesh-apiserver", "reportingInstance": "a-0",
            "action": "Export", "reason": "InvalidPort", "note": "no", "type": "Warning",
        })
    }

    #[test]
    fn a_new_event_is_complete_and_not_too_long() {
        assert_eq!(checked(&event(), None), [""; 0]);
        for field in ["eventTime", "type"] {
            let mut event = event();
            event.as_object_mut().expect("an object").shift_remove(field);
            assert_eq!(checked(&event, None), [field]);
        }
        for (field, length) in [
            ("action", 0),
            ("action", 129),
            ("reason", 0),
            ("reason", 129),
            ("reportingInstance", 0),
            ("note", 1025),
        ] {
            let mut event = event();
            event[field] = json!("x".repeat(length));
            assert_eq!(checked(&event, None), [field], "{length}");
        }
        let mut stranger = event();
        stranger["reportingController"] = json!("two words");
        assert_eq!(checked(&stranger, None), ["reportingController"]);
        let mut old_form = event();
        old_form["deprecatedCount"] = json!(1);
        assert_eq!(checked(&old_form, None), ["deprecatedCount"]);
    }

    #[test]
    fn what_is_about_no_namespace_is_told_in_the_default_one() {
        let mut event = event();
        event["regarding"] = json!({"kind": "ClusterPeer", "name": "beta"});
        assert_eq!(checked(&event, None), ["regarding.namespace"]);
        event["metadata"]["namespace"] = json!("default");
        assert_eq!(checked(&event, None), [""; 0]);
    }

    #[test]
    fn nothing_but_the_series_changes_later() {
        let old = event();
        let mut again = old.clone();
        again["series"] = json!({"count": 2, "lastObservedTime": "2026-01-01T00:01:00.000000Z"});
        assert_eq!(checked(&again, Some(&old)), [""; 0]);
        again["series"]["count"] = json!(1);
        assert_eq!(checked(&again, Some(&old)), ["series.count"]);
        let mut other = old.clone();
        other["note"] = json!("something else");
        assert_eq!(checked(&other, Some(&old)), ["note"]);
    }
}
