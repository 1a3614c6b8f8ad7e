//! What single kinds demand beyond their schema. Everything that is not here is the same for all kinds.

pub(crate) mod crds;
mod data;
mod events;
mod pods;
pub(crate) mod services;
mod structural;

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::api::{State, forget, now};
use crate::resource::Resource;
use crate::status::{ApiError, ApiResult, Cause};
use crate::store::{Key, Object};
use crate::validate;

/// Namespaces that every cluster has and that cannot be deleted.
const SYSTEM_NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Fills a new store with what a new cluster has.
pub(crate) fn bootstrap(state: &mut State) {
    for name in SYSTEM_NAMESPACES {
        seed(state, "", "namespaces", json!({ "metadata": { "name": name } }));
    }
    let api_port = state.addresses.api_server.map_or(443, |address| address.port());
    let service = json!({
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": { "component": "apiserver", "provider": "kubernetes" },
        },
        "spec": { "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": api_port }] },
    });
    seed(state, "", "services", service);
    if let Some(address) = state.addresses.api_server {
        let slice = json!({
            "metadata": {
                "name": "kubernetes",
                "namespace": "default",
                "labels": { "kubernetes.io/service-name": "kubernetes" },
            },
            "addressType": if address.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{ "addresses": [address.ip().to_string()], "conditions": { "ready": true } }],
            "ports": [{ "name": "https", "port": api_port, "protocol": "TCP" }],
        });
        seed(state, "discovery.k8s.io", "endpointslices", slice);
    }
    let rbac = "rbac.authorization.k8s.io";
    let everything = json!([
        { "apiGroups": ["*"], "resources": ["*"], "verbs": ["*"] },
        { "nonResourceURLs": ["*"], "verbs": ["*"] },
    ]);
    let paths = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    let own_access = json!([
        {
            "apiGroups": ["authorization.k8s.io"],
            "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
            "verbs": ["create"],
        },
        { "apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"], "verbs": ["create"] },
    ]);
    let discovery = json!([{ "nonResourceURLs": paths, "verbs": ["get"] }]);
    for (name, rules, group) in [
        ("cluster-admin", everything, crate::auth::MASTERS),
        ("system:discovery", discovery, "system:authenticated"),
        ("system:basic-user", own_access, "system:authenticated"),
    ] {
        let labels = json!({ "kubernetes.io/bootstrapping": "rbac-defaults" });
        let metadata = json!({ "name": name, "labels": labels });
        seed(state, rbac, "clusterroles", json!({ "metadata": metadata, "rules": rules }));
        let binding = json!({
            "metadata": metadata,
            "roleRef": { "apiGroup": rbac, "kind": "ClusterRole", "name": name },
            "subjects": [{ "apiGroup": rbac, "kind": "Group", "name": group }],
        });
        seed(state, rbac, "clusterrolebindings", binding);
    }
}

fn seed(state: &mut State, group: &str, plural: &str, mut object: Value) {
    let resource = state.registry.any_version(group, plural).expect("a built-in resource").clone();
    object["kind"] = json!(resource.kind);
    object["apiVersion"] = json!(resource.api_version());
    object["metadata"]["uid"] = json!(random_uid());
    object["metadata"]["creationTimestamp"] = json!(now());
    resource.schema.admit(&mut object);
    prepare_create(state, &resource, &mut object);
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    let key = Key::new(&text("namespace"), &text("name"));
    let object = state.store.put(&resource.collection, key, object);
    after_write(state, &resource, &object);
}

/// Nodes come with their status; of other kinds it is set by controllers, later.
pub(crate) fn keeps_status_on_create(resource: &Resource) -> bool {
    resource.is("", "nodes")
}

/// Kinds that count the changes of their spec.
pub(crate) fn has_generation(resource: &Resource) -> bool {
    resource.custom
        || ["apps", "discovery.k8s.io", "apiextensions.k8s.io", "networking.k8s.io"]
            .contains(&resource.group.as_str())
        || resource.is("", "pods")
}

/// Completes a new object and says what is wrong with it.
pub(crate) fn prepare_create(state: &State, resource: &Resource, object: &mut Value) -> Vec<Cause> {
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "pods") => {
            pods::default_pod(object);
            pods::check_pod(object, "spec")
        }
        ("", "services") => services::prepare_create(&state.addresses, object),
        ("", "namespaces") => {
            namespace_label(object);
            Vec::new()
        }
        ("", "secrets") => data::secret(object, None),
        ("", "configmaps") => data::config_map(object, None),
        ("" | "events.k8s.io", "events") => events::check(resource, object, None),
        ("coordination.k8s.io", "leases") => lease(object),
        ("apps", _) => pods::prepare_workload(object),
        ("discovery.k8s.io", "endpointslices") => services::check_slice(object),
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => {
            subject_groups(object);
            Vec::new()
        }
        ("apiextensions.k8s.io", "customresourcedefinitions") => crds::prepare(state, object, None),
        _ => Vec::new(),
    }
}

/// Completes a changed object, takes back what may not change silently, and says what is wrong with it.
pub(crate) fn prepare_update(
    state: &State,
    resource: &Resource,
    status_write: bool,
    old: &Value,
    new: &mut Value,
) -> Vec<Cause> {
    if status_write {
        return Vec::new();
    }
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "pods") => {
            pods::default_pod(new);
            let mut causes = pods::check_pod(new, "spec");
            causes.extend(pods::check_update(old, new));
            causes
        }
        ("", "services") => services::prepare_update(&state.addresses, old, new),
        ("", "namespaces") => {
            namespace_label(new);
            // Only the finalize subresource changes these.
            new["spec"] = old["spec"].clone();
            Vec::new()
        }
        ("", "secrets") => data::secret(new, Some(old)),
        ("", "configmaps") => data::config_map(new, Some(old)),
        ("" | "events.k8s.io", "events") => events::check(resource, new, Some(old)),
        ("coordination.k8s.io", "leases") => lease(new),
        ("apps", _) => {
            let mut causes = pods::prepare_workload(new);
            causes.extend(immutable(old, new, &["/spec/selector"]));
            causes
        }
        ("discovery.k8s.io", "endpointslices") => {
            let mut causes = services::check_slice(new);
            causes.extend(immutable(old, new, &["/addressType"]));
            causes
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => {
            subject_groups(new);
            immutable(old, new, &["/roleRef"])
        }
        ("apiextensions.k8s.io", "customresourcedefinitions") => crds::prepare(state, new, Some(old)),
        _ => Vec::new(),
    }
}

/// What follows from a committed object.
pub(crate) fn after_write(state: &mut State, resource: &Resource, object: &Arc<Object>) {
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "services") => state.addresses.record(&object.value),
        ("", "namespaces") if !is_marked(&object.value) => default_service_account(state, &object.value),
        ("apiextensions.k8s.io", "customresourcedefinitions") => crds::register(state, &object.value),
        _ => {}
    }
}

/// What follows when an object has been marked for deletion and waits.
pub(crate) fn after_marked(state: &mut State, resource: &Resource, key: &Key) {
    if resource.is("", "namespaces") {
        empty_namespace(state, &key.name);
    } else if resource.is("apiextensions.k8s.io", "customresourcedefinitions") {
        crds::remove_instances(state, key);
    }
}

/// What follows when an object is gone.
pub(crate) fn after_delete(state: &mut State, resource: &Resource, object: &Value) {
    if resource.is("", "services") {
        state.addresses.forget(object);
    } else if resource.is("apiextensions.k8s.io", "customresourcedefinitions") {
        crds::unregister(state, object);
    }
    if resource.custom {
        crds::finish(state, resource);
    }
    if let Some(namespace) = object["metadata"]["namespace"].as_str() {
        finish_namespace(state, namespace);
    }
}

/// Whether an object of this name may be deleted at all.
pub(crate) fn may_delete(resource: &Resource, name: &str) -> ApiResult<()> {
    if resource.is("", "namespaces") && SYSTEM_NAMESPACES[..3].contains(&name) {
        return Err(ApiError::forbidden(resource, name, "this namespace may not be deleted"));
    }
    Ok(())
}

/// How long an object is given to end, in seconds. Only pods on a node are given any time: their kubelet
/// deletes them with 0 when they have ended.
pub(crate) fn grace_period(resource: &Resource, object: &Value, asked: Option<i64>) -> i64 {
    let running = || {
        let ended = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        !ended && object["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty())
    };
    if !resource.is("", "pods") || !running() {
        return 0;
    }
    asked.unwrap_or_else(|| object["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30)).max(0)
}

/// Five characters for `generateName`, of those that spell no words.
pub(crate) fn random_suffix() -> String {
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let bytes = uuid::Uuid::new_v4().into_bytes();
    bytes[..5].iter().map(|b| char::from(LETTERS[usize::from(*b) % LETTERS.len()])).collect()
}

/// A new object's uid.
pub(crate) fn random_uid() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Whether an object waits for its deletion.
pub(crate) fn is_marked(object: &Value) -> bool {
    object["metadata"].get("deletionTimestamp").is_some()
}

/// Fields that keep their first value.
fn immutable(old: &Value, new: &Value, pointers: &[&str]) -> Vec<Cause> {
    let changed = pointers.iter().filter(|pointer| old.pointer(pointer) != new.pointer(pointer));
    changed
        .map(|pointer| {
            let field = pointer.trim_start_matches('/').replace('/', ".");
            Cause::invalid(field, new.pointer(pointer).unwrap_or(&Value::Null), "field is immutable")
        })
        .collect()
}

fn namespace_label(namespace: &mut Value) {
    let name = namespace["metadata"]["name"].clone();
    namespace["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
}

/// What the namespace and service account controllers do: content goes with its namespace.
fn empty_namespace(state: &mut State, namespace: &str) {
    let resources: Vec<Arc<Resource>> = state.registry.iter().filter(|r| r.namespaced).cloned().collect();
    for resource in resources {
        let keys: Vec<Key> =
            state.store.list(&resource.collection, Some(namespace)).map(|(key, _)| key.clone()).collect();
        for key in keys {
            state.delete_object(&resource, &key, None);
        }
    }
    finish_namespace(state, namespace);
}

/// Removes a namespace that is to be deleted once it is empty and nobody's finalizer holds it.
pub(crate) fn finish_namespace(state: &mut State, name: &str) {
    let namespaces = state.registry.any_version("", "namespaces").expect("built in").clone();
    let key = Key::new("", name);
    let Some(namespace) = state.store.get(&namespaces.collection, &key) else { return };
    let held = namespace.value["metadata"]["finalizers"].as_array().is_some_and(|f| !f.is_empty());
    if !is_marked(&namespace.value) || held || state.store.namespace_in_use(name, &namespaces.collection) {
        return;
    }
    let mut value = namespace.value.clone();
    forget(&mut value["spec"], "finalizers");
    state.store.put(&namespaces.collection, key.clone(), value);
    state.remove_now(&namespaces, &key);
}

fn default_service_account(state: &mut State, namespace: &Value) {
    let accounts = state.registry.any_version("", "serviceaccounts").expect("built in").clone();
    let Some(namespace) = namespace["metadata"]["name"].as_str() else { return };
    if state.store.get_ref(&accounts.collection, &Key::new(namespace, "default")).is_none() {
        let account = json!({ "metadata": { "name": "default", "namespace": namespace } });
        seed(state, "", "serviceaccounts", account);
    }
}

/// What is wrong with a Lease.
fn lease(lease: &Value) -> Vec<Cause> {
    let spec = &lease["spec"];
    let limits = [
        ("leaseDurationSeconds", 1, "greater than 0"),
        ("leaseTransitions", 0, "greater than or equal to 0"),
    ];
    let broken =
        limits.into_iter().filter(|(field, least, _)| spec[field].as_i64().is_some_and(|n| n < *least));
    broken
        .map(|(field, _, rule)| {
            Cause::invalid(format!("spec.{field}"), &spec[field], &format!("must be {rule}"))
        })
        .collect()
}

fn subject_groups(binding: &mut Value) {
    for subject in binding["subjects"].as_array_mut().into_iter().flatten() {
        if matches!(subject["kind"].as_str(), Some("User" | "Group")) && subject.get("apiGroup").is_none() {
            subject["apiGroup"] = json!("rbac.authorization.k8s.io");
        }
    }
}

/// A value that must be an address.
fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok()
}

/// A port's name.
fn port_name(field: String, name: &Value) -> Option<Cause> {
    let text = name.as_str().filter(|text| !text.is_empty())?;
    validate::dns1123_label(text).map(|why| Cause::invalid(field, name, &why))
}
