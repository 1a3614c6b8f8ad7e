//! `metadata.managedFields`: who last set which field, and server-side apply, which goes by it.
//!
//! The rules are those of <https://kubernetes.io/docs/reference/using-api/server-side-apply/>.

use serde_json::{Value, json};

use super::Fields;
use crate::api::{forget, now};
use crate::resource::Resource;
use crate::status::{ApiError, ApiResult};

/// Fields that belong to the server, so to nobody.
const SERVERS_OWN: &[&[&str]] = &[
    &["f:apiVersion"],
    &["f:kind"],
    &["f:metadata", "f:name"],
    &["f:metadata", "f:namespace"],
    &["f:metadata", "f:uid"],
    &["f:metadata", "f:creationTimestamp"],
    &["f:metadata", "f:deletionTimestamp"],
    &["f:metadata", "f:deletionGracePeriodSeconds"],
    &["f:metadata", "f:resourceVersion"],
    &["f:metadata", "f:generation"],
    &["f:metadata", "f:selfLink"],
    &["f:metadata", "f:managedFields"],
];

/// One manager's entry.
#[derive(Debug, Clone)]
struct Entry {
    manager: String,
    apply: bool,
    subresource: String,
    api_version: String,
    time: String,
    fields: Fields,
}

/// Records that `manager` made `new` of `old` by an ordinary write.
pub fn record_update(
    resource: &Resource,
    old: Option<&Value>,
    new: &mut Value,
    manager: &str,
    subresource: Option<&str>,
) {
    let nothing = json!({ "metadata": {} });
    let before = old.unwrap_or(&nothing);
    // A client can clear the list by sending an empty one, and nothing else.
    let cleared = old.is_some() && new["metadata"]["managedFields"].as_array().is_some_and(Vec::is_empty);
    let mut entries = if cleared { Vec::new() } else { read(before) };
    if cleared {
        write(new, &entries);
        return;
    }
    let (changed, removed) = Fields::changes(resource.schema.at(), before, new);
    let changed = trimmed(changed, subresource);
    let removed = trimmed(removed, subresource);
    if !changed.is_empty() || !removed.is_empty() {
        let lost = changed.union(&removed);
        let subresource = subresource.unwrap_or_default();
        let mine =
            |entry: &Entry| entry.manager == manager && !entry.apply && entry.subresource == subresource;
        let mut own = entries.iter().position(mine).map(|at| entries.remove(at));
        for entry in &mut entries {
            entry.fields = entry.fields.without(&lost);
        }
        if !changed.is_empty() || own.is_some() {
            let fields = own.take().map(|own| own.fields).unwrap_or_default();
            entries.push(Entry {
                manager: manager.to_owned(),
                apply: false,
                subresource: subresource.to_owned(),
                api_version: resource.api_version(),
                time: now(),
                fields: fields.without(&removed).union(&changed),
            });
        }
    }
    write(new, &entries);
}

/// Server-side apply: what `live` becomes when `manager` applies `config`. A new object is made of an empty
/// `live`.
pub fn apply(
    resource: &Resource,
    live: &Value,
    config: &Value,
    manager: &str,
    subresource: Option<&str>,
    force: bool,
) -> ApiResult<Value> {
    undeclared(resource, config)?;
    let at = resource.schema.at();
    let mut entries = read(live);
    let sub = subresource.unwrap_or_default();
    let mine = |entry: &Entry| entry.manager == manager && entry.apply && entry.subresource == sub;
    let own = entries.iter().position(mine).map(|at| entries.remove(at));
    let wanted = trimmed(Fields::of(at, config), subresource);

    let mut merged = live.clone();
    Fields::merge(at, &mut merged, config);
    let (changed, _) = Fields::changes(at, live, &merged);
    let changed = changed.intersection(&wanted);
    let mut conflicts = Vec::new();
    for entry in &entries {
        let contested = entry.fields.intersection(&changed);
        conflicts.extend(contested.paths().into_iter().map(|path| (entry.described(), path)));
    }
    if !conflicts.is_empty() && !force {
        return Err(ApiError::apply_conflict(&conflicts));
    }
    for entry in &mut entries {
        entry.fields = entry.fields.without(&changed);
    }

    let before = own.as_ref().map(|own| own.fields.clone()).unwrap_or_default();
    let others = entries.iter().fold(Fields::default(), |all, entry| all.union(&entry.fields));
    before.prune(at, &mut merged, &wanted, &others);

    let unchanged =
        own.as_ref().filter(|own| own.fields == wanted && own.api_version == resource.api_version());
    let time = unchanged.map_or_else(now, |own| own.time.clone());
    if !wanted.is_empty() {
        entries.push(Entry {
            manager: manager.to_owned(),
            apply: true,
            subresource: sub.to_owned(),
            api_version: resource.api_version(),
            time,
            fields: wanted,
        });
    }
    write(&mut merged, &entries);
    Ok(merged)
}

/// Whoever applies a field must know that there is one: it is refused, where any other write would lose it. With a 500, as by
/// Kubernetes.
fn undeclared(resource: &Resource, config: &Value) -> ApiResult<()> {
    let unknown = resource.schema.admit(&mut config.clone()).unknown;
    let mut told: Vec<String> =
        unknown.iter().map(|path| format!(".{path}: field not declared in schema")).collect();
    let told = match told.len() {
        0 => return Ok(()),
        1 => told.remove(0),
        _ => format!("errors:\n  {}", told.join("\n  ")),
    };
    let metadata = |field: &str| config["metadata"][field].as_str().unwrap_or_default();
    let (namespace, name) = (metadata("namespace"), metadata("name"));
    let Resource { group, version, kind, .. } = resource;
    Err(ApiError::internal(format!(
        "failed to create typed patch object ({namespace}/{name}; {group}/{version}, Kind={kind}): {told}"
    )))
}

/// Whether two states of an object are the same but for the time and the resourceVersion.
pub fn same(old: &Value, new: &Value) -> bool {
    let comparable = |object: &Value| {
        let mut object = object.clone();
        forget(&mut object["metadata"], "resourceVersion");
        for entry in object["metadata"]["managedFields"].as_array_mut().into_iter().flatten() {
            forget(entry, "time");
        }
        object
    };
    comparable(old) == comparable(new)
}

impl Entry {
    /// As the message of a conflict names it.
    fn described(&self) -> String {
        match self.subresource.as_str() {
            "" => format!("{:?} using {}", self.manager, self.api_version),
            sub => format!("{:?} with subresource {sub:?} using {}", self.manager, self.api_version),
        }
    }
}

/// Without what the server owns, and with only what this subresource may write.
fn trimmed(mut fields: Fields, subresource: Option<&str>) -> Fields {
    for path in SERVERS_OWN {
        fields.remove(path);
    }
    if subresource == Some("status") {
        fields.0.retain(|step, _| step == "f:status" || step == "f:metadata");
    }
    fields
}

fn read(object: &Value) -> Vec<Entry> {
    let entries = object["metadata"]["managedFields"].as_array().into_iter().flatten();
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    entries
        .map(|entry| Entry {
            manager: text(entry, "manager"),
            apply: entry["operation"] == "Apply",
            subresource: text(entry, "subresource"),
            api_version: text(entry, "apiVersion"),
            time: text(entry, "time"),
            fields: Fields::from_value(&entry["fieldsV1"]),
        })
        .collect()
}

fn write(object: &mut Value, entries: &[Entry]) {
    let mut entries: Vec<&Entry> = entries.iter().filter(|entry| !entry.fields.is_empty()).collect();
    entries.sort_by(|a, b| (!a.apply, &a.time, &a.manager).cmp(&(!b.apply, &b.time, &b.manager)));
    let written: Vec<Value> = entries
        .into_iter()
        .map(|entry| {
            let mut value = json!({
                "manager": entry.manager,
                "operation": if entry.apply { "Apply" } else { "Update" },
                "apiVersion": entry.api_version,
                "time": entry.time,
                "fieldsType": "FieldsV1",
                "fieldsV1": entry.fields.to_value(),
            });
            if !entry.subresource.is_empty() {
                value["subresource"] = json!(entry.subresource);
            }
            value
        })
        .collect();
    if written.is_empty() {
        forget(&mut object["metadata"], "managedFields");
    } else {
        object["metadata"]["managedFields"] = Value::Array(written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::Registry;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn deployments() -> Arc<Resource> {
        Registry::builtin().any_version("apps", "deployments").expect("built in").clone()
    }

    fn applied(live: &Value, config: Value, manager: &str, force: bool) -> ApiResult<Value> {
        apply(&deployments(), live, &config, manager, None, force)
    }

    fn empty() -> Value {
        json!({ "metadata": {} })
    }

    #[test]
    fn two_managers_share_an_object_as_long_as_they_agree() {
        let first =
            applied(&empty(), json!({"spec": {"replicas": 1, "paused": true}}), "a", false).expect("new");
        let both = applied(&first, json!({"spec": {"replicas": 1}}), "b", false).expect("the same value");
        let error = applied(&both, json!({"spec": {"replicas": 2}}), "b", false).expect_err("a owns it");
        assert_eq!((error.code(), error.reason()), (409, "Conflict"));
        assert!(error.message().contains("conflict with \"a\" using apps/v1: .spec.replicas"), "{error}");
        let forced = applied(&both, json!({"spec": {"replicas": 2}}), "b", true).expect("forced");
        assert_eq!(forced["spec"], json!({"replicas": 2, "paused": true}));
        let without = applied(&forced, json!({"spec": {}}), "a", false).expect("a gives up");
        assert_eq!(without["spec"], json!({"replicas": 2}), "paused was a's alone");
    }

    #[test]
    fn items_of_keyed_lists_are_owned_one_by_one() {
        let containers = |names: &[&str]| {
            let list: Vec<Value> = names.iter().map(|n| json!({"name": n, "image": "i"})).collect();
            json!({"spec": {"template": {"spec": {"containers": list}}}})
        };
        let live = applied(&empty(), containers(&["a", "b"]), "one", false).expect("new");
        let live = applied(&live, containers(&["c"]), "two", false).expect("another item");
        let live = applied(&live, containers(&["b"]), "one", false).expect("a goes");
        let names: Vec<&str> = live["spec"]["template"]["spec"]["containers"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|c| c["name"].as_str())
            .collect();
        assert_eq!(names, ["b", "c"]);
    }

    #[test]
    fn an_update_takes_fields_over() {
        let live = applied(&empty(), json!({"spec": {"replicas": 1}}), "a", false).expect("new");
        let mut updated = live.clone();
        updated["spec"]["replicas"] = json!(5);
        record_update(&deployments(), Some(&live), &mut updated, "scaler", None);
        let entries = read(&updated);
        assert_eq!(entries.len(), 1, "a owns nothing any more: {updated}");
        assert_eq!(entries[0].manager, "scaler");
        assert_eq!(entries[0].fields.paths(), [".spec.replicas"]);
        let error = applied(&updated, json!({"spec": {"replicas": 1}}), "a", false).expect_err("scaler's");
        assert!(error.message().contains("\"scaler\""), "{error}");
    }

    #[test]
    fn fields_survive_their_wire_form() {
        let object = json!({"metadata": {"labels": {"a": "b"}, "finalizers": ["x/y"]},
            "spec": {"template": {"spec": {"containers": [{"name": "c", "ports": [{"containerPort": 80}]}]}}}});
        let fields = Fields::of(deployments().schema.at(), &object);
        assert_eq!(Fields::from_value(&fields.to_value()), fields);
        let wire = fields.to_value().to_string();
        assert!(wire.contains(r#"k:{\"containerPort\":80,\"protocol\":\"TCP\"}"#), "{wire}");
        assert!(wire.contains(r#"v:\"x/y\""#), "{wire}");
    }

    fn configs() -> impl Strategy<Value = Value> {
        let item = ("[a-c]", "[xy]").prop_map(|(name, image)| json!({ "name": name, "image": image }));
        let containers = prop::collection::vec(item, 0..4).prop_map(|mut items: Vec<Value>| {
            items.sort_by_key(|item| item["name"].to_string());
            items.dedup_by_key(|item| item["name"].to_string());
            items
        });
        let labels = prop::collection::btree_map("[a-c]", "[xy]", 0..3);
        (containers, labels, prop::option::of(0..3_i32)).prop_map(|(containers, labels, replicas)| {
            let mut config = json!({ "metadata": { "labels": labels }, "spec": { "template": { "spec": { "containers": containers } } } });
            if let Some(replicas) = replicas {
                config["spec"]["replicas"] = json!(replicas);
            }
            config
        })
    }

    fn has_all_of(object: &Value, config: &Value) -> bool {
        match (object, config) {
            (Value::Object(object), Value::Object(config)) => {
                config.iter().all(|(k, v)| object.get(k).is_some_and(|o| has_all_of(o, v)))
            }
            (Value::Array(object), Value::Array(config)) => {
                config.iter().all(|wanted| object.iter().any(|item| has_all_of(item, wanted)))
            }
            (object, config) => object == config,
        }
    }

    proptest! {
        #[test]
        fn what_is_applied_is_there_and_applying_it_again_changes_nothing(
            first in configs(), other in configs(), second in configs(),
        ) {
            let live = applied(&empty(), first, "one", true).expect("forced");
            let live = applied(&live, other.clone(), "two", true).expect("forced");
            let live = applied(&live, second.clone(), "one", true).expect("forced");
            prop_assert!(has_all_of(&live, &second), "{live}");
            let again = applied(&live, second, "one", false).expect("no conflict with oneself");
            prop_assert!(same(&live, &again), "{live} became {again}");
            // What the other applied and this one did not touch is there still.
            for container in other["spec"]["template"]["spec"]["containers"].as_array().expect("a list") {
                let containers = live["spec"]["template"]["spec"]["containers"].as_array().expect("a list");
                prop_assert!(containers.iter().any(|c| c["name"] == container["name"]), "{live}");
            }
        }
    }
}
