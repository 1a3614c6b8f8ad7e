//! CustomResourceDefinitions: what is in them becomes resources of the server.

use std::sync::Arc;

use serde_json::{Value, json};

use super::structural;
use crate::api::{State, now};
use crate::resource::{Resource, custom};
use crate::status::Cause;
use crate::store::Key;
use crate::validate;

const GROUP: &str = "apiextensions.k8s.io";
const PLURAL: &str = "customresourcedefinitions";
/// Groups of the project itself must say who has agreed to them.
const APPROVED: &str = "api-approved.kubernetes.io";

/// Completes a CRD, checks it, and says in its status that it is established.
pub(super) fn prepare(state: &State, crd: &mut Value, old: Option<&Value>) -> Vec<Cause> {
    let names = &mut crd["spec"]["names"];
    let kind = names["kind"].as_str().unwrap_or_default().to_owned();
    if !kind.is_empty() {
        for (field, value) in [("singular", kind.to_lowercase()), ("listKind", format!("{kind}List"))] {
            if names.get(field).is_none() {
                names[field] = json!(value);
            }
        }
    }
    let mut causes = check(state, crd);
    for field in ["group", "scope"] {
        if let Some(old) = old
            && old["spec"][field] != crd["spec"][field]
        {
            causes.push(Cause::invalid(format!("spec.{field}"), &crd["spec"][field], "field is immutable"));
        }
    }
    if causes.is_empty() {
        causes = custom::resources(crd).err().unwrap_or_default();
    }
    crd["status"] = status(crd, old);
    causes
}

fn check(state: &State, crd: &Value) -> Vec<Cause> {
    let spec = &crd["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    let mut causes = Vec::new();
    let name = format!("{plural}.{group}");
    if crd["metadata"]["name"] != name {
        let rule = format!("must be spec.names.plural+\".\"+spec.group, which is {name:?}");
        causes.push(Cause::invalid("metadata.name", &crd["metadata"]["name"], &rule));
    }
    if !group.contains('.') {
        causes.push(Cause::invalid("spec.group", &spec["group"], "should be a domain with at least one dot"));
    }
    if !matches!(spec["scope"].as_str(), Some("Cluster" | "Namespaced")) {
        causes.push(Cause::unsupported("spec.scope", &spec["scope"], &["Cluster", "Namespaced"]));
    }
    if spec["conversion"]["strategy"].as_str().is_some_and(|strategy| strategy != "None") {
        causes.push(Cause::unsupported(
            "spec.conversion.strategy",
            &spec["conversion"]["strategy"],
            &["None"],
        ));
    }
    let versions = spec["versions"].as_array().map(Vec::as_slice).unwrap_or_default();
    for (index, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{index}]");
        if let Some(why) = validate::dns1035_label(version["name"].as_str().unwrap_or_default()) {
            causes.push(Cause::invalid(format!("{at}.name"), &version["name"], &why));
        }
        if let Some(schema) = version.pointer("/schema/openAPIV3Schema") {
            causes.extend(structural::check(schema, &format!("{at}.schema.openAPIV3Schema")));
        }
        for (number, column) in
            version["additionalPrinterColumns"].as_array().into_iter().flatten().enumerate()
        {
            causes.extend(check_column(column, &format!("{at}.additionalPrinterColumns[{number}]")));
        }
    }
    let protected = ["k8s.io", "kubernetes.io"]
        .iter()
        .any(|owner| group == *owner || group.ends_with(&format!(".{owner}")));
    if protected && crd["metadata"]["annotations"].get(APPROVED).is_none() {
        let advice = "protected groups must have approval annotation";
        causes.push(Cause::required(format!("metadata.annotations[{APPROVED}]"), advice));
    }
    if versions.iter().filter(|version| version["storage"] == true).count() != 1 {
        let rule = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid("spec.versions", &Value::from(versions.len()), rule));
    }
    if state.registry.any_version(&group, &plural).is_some_and(|taken| !taken.custom) {
        causes.push(Cause::invalid("spec.names.plural", &spec["names"]["plural"], "is a built-in resource"));
    }
    causes
}

/// A column that `kubectl get` shows.
fn check_column(column: &Value, path: &str) -> Vec<Cause> {
    const TYPES: [&str; 5] = ["integer", "number", "string", "boolean", "date"];
    const FORMATS: [&str; 8] = ["int32", "int64", "float", "double", "byte", "date", "date-time", "password"];
    let text = |field: &str| column[field].as_str().unwrap_or_default();
    let mut causes = Vec::new();
    if text("name").is_empty() {
        causes.push(Cause::required(format!("{path}.name"), ""));
    }
    if !TYPES.contains(&text("type")) {
        causes.push(Cause::unsupported(format!("{path}.type"), &column["type"], &TYPES));
    }
    if column.get("format").is_some() && !FORMATS.contains(&text("format")) {
        causes.push(Cause::unsupported(format!("{path}.format"), &column["format"], &FORMATS));
    }
    if !text("jsonPath").starts_with('.') {
        let rule = "must be a simple json path starting with .";
        causes.push(Cause::invalid(format!("{path}.jsonPath"), &column["jsonPath"], rule));
    }
    causes
}

fn status(crd: &Value, old: Option<&Value>) -> Value {
    let storage: Vec<&Value> = crd["spec"]["versions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|version| version["storage"] == true)
        .map(|version| &version["name"])
        .collect();
    let mut stored: Vec<Value> =
        old.and_then(|old| old["status"]["storedVersions"].as_array().cloned()).unwrap_or_default();
    stored.extend(storage.into_iter().filter(|name| !stored.contains(name)).cloned().collect::<Vec<_>>());
    let conditions = old.map(|old| old["status"]["conditions"].clone()).filter(|c| !c.is_null());
    let time = now();
    let condition = |kind: &str, reason: &str, message: &str| json!({ "type": kind, "status": "True", "lastTransitionTime": time, "reason": reason, "message": message });
    json!({
        "conditions": conditions.unwrap_or_else(|| json!([
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ])),
        "acceptedNames": crd["spec"]["names"],
        "storedVersions": stored,
    })
}

/// Makes the CRD's versions resources of the server.
pub(super) fn register(state: &mut State, crd: &Value) {
    // Checked when the CRD was prepared.
    let Ok(resources) = custom::resources(crd) else { return };
    let registry = Arc::make_mut(&mut state.registry);
    if let Some(resource) = resources.first() {
        registry.remove_custom(&resource.group, &resource.plural);
    }
    for resource in resources {
        registry.add(Arc::new(resource));
    }
}

/// Takes the CRD's resources away.
pub(super) fn unregister(state: &mut State, crd: &Value) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (group, plural) = (text(&crd["spec"]["group"]), text(&crd["spec"]["names"]["plural"]));
    Arc::make_mut(&mut state.registry).remove_custom(&group, &plural);
}

/// Deletes all objects of a CRD that is to be deleted.
pub(super) fn remove_instances(state: &mut State, crd: &Key) {
    let Some((plural, group)) = crd.name.split_once('.') else { return };
    let Some(resource) = state.registry.any_version(group, plural).cloned() else { return };
    let keys: Vec<Key> = state.store.list(&resource.collection, None).map(|(key, _)| key.clone()).collect();
    for key in keys {
        state.delete_object(&resource, &key, None);
    }
    finish(state, &resource);
}

/// Lets go of a CRD that is to be deleted once none of its objects are left.
pub(super) fn finish(state: &mut State, resource: &Resource) {
    let crds = state.registry.any_version(GROUP, PLURAL).expect("built in").clone();
    let key = Key::new("", &format!("{}.{}", resource.plural, resource.group));
    let Some(crd) = state.store.get(&crds.collection, &key) else { return };
    let left = state.store.list(&resource.collection, None).next().is_some();
    let ours = json!([CLEANUP]);
    if !super::is_marked(&crd.value) || left || crd.value["metadata"]["finalizers"] != ours {
        return;
    }
    state.remove_now(&crds, &key);
}

/// The finalizer that keeps a CRD as long as it has objects.
pub(crate) const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";
