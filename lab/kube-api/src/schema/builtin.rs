//! What JSON schema does not say about the built-in kinds: how their lists merge, and their defaults.
//!
//! Source: the `+listType`, `+patchMergeKey` and defaulting functions of `k8s.io/api`, for the types that
//! the server has.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::{Builder, ListKind, Schema};

/// The definition of every object's metadata.
pub(crate) const OBJECT_META: &str = "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

/// What the tables know about one field.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    pub(super) list: Option<ListKind>,
    pub(super) atomic: bool,
    pub(super) default: Option<Value>,
}

/// Lists by type and field. Keys: the fields that tell items apart, the strategic merge key first; no keys
/// for a set; lists that are not here are atomic.
const LISTS: &[(&str, &str, &[&str])] = &[
    ("DaemonSetStatus", "conditions", &["type"]),
    ("DeploymentStatus", "conditions", &["type"]),
    ("ReplicaSetStatus", "conditions", &["type"]),
    ("StatefulSetStatus", "conditions", &["type"]),
    ("Container", "env", &["name"]),
    ("Container", "ports", &["containerPort", "protocol"]),
    ("Container", "volumeDevices", &["devicePath"]),
    ("Container", "volumeMounts", &["mountPath"]),
    ("EphemeralContainer", "env", &["name"]),
    ("EphemeralContainer", "ports", &["containerPort", "protocol"]),
    ("EphemeralContainer", "volumeDevices", &["devicePath"]),
    ("EphemeralContainer", "volumeMounts", &["mountPath"]),
    ("ContainerStatus", "volumeMounts", &["mountPath"]),
    ("NamespaceStatus", "conditions", &["type"]),
    ("NodeSpec", "podCIDRs", &[]),
    ("NodeStatus", "conditions", &["type"]),
    ("PodSpec", "containers", &["name"]),
    ("PodSpec", "ephemeralContainers", &["name"]),
    ("PodSpec", "hostAliases", &["ip"]),
    ("PodSpec", "imagePullSecrets", &["name"]),
    ("PodSpec", "initContainers", &["name"]),
    ("PodSpec", "resourceClaims", &["name"]),
    ("PodSpec", "schedulingGates", &["name"]),
    ("PodSpec", "topologySpreadConstraints", &["topologyKey", "whenUnsatisfiable"]),
    ("PodSpec", "volumes", &["name"]),
    ("PodStatus", "conditions", &["type"]),
    ("PodStatus", "podIPs", &["ip"]),
    ("PodStatus", "resourceClaimStatuses", &["name"]),
    ("ResourceRequirements", "claims", &["name"]),
    ("ServiceAccount", "secrets", &["name"]),
    ("ServiceSpec", "ports", &["port", "protocol"]),
    ("ServiceStatus", "conditions", &["type"]),
    ("Endpoint", "addresses", &[]),
    ("CustomResourceDefinitionStatus", "conditions", &["type"]),
    ("JSONSchemaProps", "x-kubernetes-validations", &["rule"]),
    ("ObjectMeta", "finalizers", &[]),
    ("ObjectMeta", "ownerReferences", &["uid"]),
];

/// Maps and structs that are one value.
const ATOMIC_FIELDS: &[(&str, &str)] = &[("PodSpec", "nodeSelector"), ("ServiceSpec", "selector")];

const ATOMIC_TYPES: &[&str] = &[
    "LabelSelector",
    "ObjectReference",
    "LocalObjectReference",
    "TypedLocalObjectReference",
    "SecretKeySelector",
    "ConfigMapKeySelector",
    "ObjectFieldSelector",
    "ResourceFieldSelector",
    "OwnerReference",
    "NodeSelector",
    "NodeSelectorTerm",
    "RoleRef",
    "Subject",
];

/// Defaults by type and field, as JSON.
const DEFAULTS: &[(&str, &str, &str)] = &[
    ("PodSpec", "restartPolicy", r#""Always""#),
    ("PodSpec", "dnsPolicy", r#""ClusterFirst""#),
    ("PodSpec", "schedulerName", r#""default-scheduler""#),
    ("PodSpec", "terminationGracePeriodSeconds", "30"),
    ("PodSpec", "securityContext", "{}"),
    ("PodStatus", "phase", r#""Pending""#),
    ("Pod", "status", r#"{"phase":"Pending"}"#),
    ("Container", "terminationMessagePath", r#""/dev/termination-log""#),
    ("Container", "terminationMessagePolicy", r#""File""#),
    ("Container", "resources", "{}"),
    ("ContainerPort", "protocol", r#""TCP""#),
    ("Probe", "timeoutSeconds", "1"),
    ("Probe", "periodSeconds", "10"),
    ("Probe", "successThreshold", "1"),
    ("Probe", "failureThreshold", "3"),
    ("HTTPGetAction", "path", r#""/""#),
    ("HTTPGetAction", "scheme", r#""HTTP""#),
    ("ObjectFieldSelector", "apiVersion", r#""v1""#),
    ("ConfigMapVolumeSource", "defaultMode", "420"),
    ("SecretVolumeSource", "defaultMode", "420"),
    ("ProjectedVolumeSource", "defaultMode", "420"),
    ("DownwardAPIVolumeSource", "defaultMode", "420"),
    ("HostPathVolumeSource", "type", r#""""#),
    ("ServiceSpec", "type", r#""ClusterIP""#),
    ("ServiceSpec", "sessionAffinity", r#""None""#),
    ("ServicePort", "protocol", r#""TCP""#),
    ("ServiceStatus", "loadBalancer", "{}"),
    ("Service", "status", r#"{"loadBalancer":{}}"#),
    ("Namespace", "spec", r#"{"finalizers":["kubernetes"]}"#),
    ("Namespace", "status", r#"{"phase":"Active"}"#),
    ("Node", "spec", "{}"),
    ("Node", "status", "{}"),
    ("Secret", "type", r#""Opaque""#),
    ("DeploymentSpec", "replicas", "1"),
    ("DeploymentSpec", "revisionHistoryLimit", "10"),
    ("DeploymentSpec", "progressDeadlineSeconds", "600"),
    ("DeploymentSpec", "strategy", r#"{"type":"RollingUpdate"}"#),
    ("DeploymentStrategy", "type", r#""RollingUpdate""#),
    ("RollingUpdateDeployment", "maxSurge", r#""25%""#),
    ("RollingUpdateDeployment", "maxUnavailable", r#""25%""#),
    ("Deployment", "status", "{}"),
    ("ReplicaSetSpec", "replicas", "1"),
    ("ReplicaSet", "status", r#"{"replicas":0}"#),
    ("StatefulSetSpec", "replicas", "1"),
    ("StatefulSetSpec", "podManagementPolicy", r#""OrderedReady""#),
    ("StatefulSetSpec", "revisionHistoryLimit", "10"),
    ("StatefulSetSpec", "updateStrategy", r#"{"type":"RollingUpdate","rollingUpdate":{"partition":0}}"#),
    ("StatefulSet", "status", r#"{"replicas":0}"#),
    ("DaemonSetSpec", "revisionHistoryLimit", "10"),
    (
        "DaemonSetSpec",
        "updateStrategy",
        r#"{"type":"RollingUpdate","rollingUpdate":{"maxUnavailable":1,"maxSurge":0}}"#,
    ),
    (
        "DaemonSet",
        "status",
        r#"{"currentNumberScheduled":0,"numberMisscheduled":0,"desiredNumberScheduled":0,"numberReady":0}"#,
    ),
    ("discovery.v1.EndpointPort", "name", r#""""#),
    ("discovery.v1.EndpointPort", "protocol", r#""TCP""#),
    ("RoleRef", "apiGroup", r#""rbac.authorization.k8s.io""#),
    ("CustomResourceDefinitionSpec", "conversion", r#"{"strategy":"None"}"#),
];

/// The lists of a type that merge, with the fields that tell their items apart (none: their value does).
pub(crate) fn merging_lists(name: &str) -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    LISTS.iter().filter(move |(of, _, _)| *of == short(name)).map(|(_, field, keys)| (*field, *keys))
}

/// The schemas of these kinds, which share one arena. `roots` are definition names.
pub(crate) fn schemas(roots: &[String]) -> Vec<Schema> {
    let mut builder = Builder::new(definitions(), false);
    let ids = roots
        .iter()
        .map(|root| builder.node(&serde_json::json!({ "$ref": format!("#/$defs/{root}") }), 0))
        .collect::<Result<Vec<_>, _>>()
        .expect("the built-in definitions refer to each other only");
    builder.finish(ids)
}

/// Types that requests carry and that are no resources: options and views.
const BODIES: [(&str, &str); 4] = [
    ("DeleteOptions", "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions"),
    ("Eviction", "io.k8s.api.policy.v1.Eviction"),
    ("Binding", "io.k8s.api.core.v1.Binding"),
    ("Scale", "io.k8s.api.autoscaling.v1.Scale"),
];

/// The schema of a built-in kind, or of something else that requests carry.
pub(crate) fn schema_of(api_version: &str, kind: &str) -> Option<Schema> {
    static SCHEMAS: LazyLock<Vec<Schema>> =
        LazyLock::new(|| schemas(&BODIES.map(|(_, definition)| definition.to_owned())));
    let resource = crate::resource::builtin::resources()
        .iter()
        .find(|resource| resource.kind == kind && resource.api_version() == api_version);
    let body = || BODIES.iter().position(|(of, _)| *of == kind).and_then(|index| SCHEMAS.get(index));
    resource.map(|resource| &resource.schema).or_else(body).cloned()
}

/// The JSON schema of every built-in type by its full name, for instance `io.k8s.api.core.v1.Pod`.
pub fn definitions() -> &'static Map<String, Value> {
    static DEFINITIONS: LazyLock<Map<String, Value>> = LazyLock::new(crate::resource::builtin::definitions);
    &DEFINITIONS
}

/// What the tables say about a field; `name` is the full name of its type.
pub(super) fn facts(name: &str, field: &str) -> Option<Facts> {
    static FACTS: LazyLock<HashMap<(&str, &str), Facts>> = LazyLock::new(|| {
        let mut facts: HashMap<(&str, &str), Facts> = HashMap::new();
        for &(name, field, keys) in LISTS {
            facts.entry((name, field)).or_default().list = Some(match keys {
                [] => ListKind::Set,
                keys => ListKind::Map(keys.iter().map(|k| (*k).to_owned()).collect()),
            });
        }
        for &(name, field) in ATOMIC_FIELDS {
            facts.entry((name, field)).or_default().atomic = true;
        }
        for &(name, field, json) in DEFAULTS {
            let value = serde_json::from_str(json).expect("the table holds JSON");
            facts.entry((name, field)).or_default().default = Some(value);
        }
        facts
    });
    let qualified = name.rmatch_indices('.').nth(2).map_or(name, |(dot, _)| &name[dot + 1..]);
    FACTS.get(&(qualified, field)).or_else(|| FACTS.get(&(short(name), field))).cloned()
}

pub(super) fn is_atomic(name: &str) -> bool {
    ATOMIC_TYPES.contains(&short(name))
}

fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_names_a_field_that_exists() {
        let known = |name: &str, field: &str| {
            definitions().iter().any(|(full, definition)| {
                (short(full) == name || full.ends_with(&format!(".{name}")))
                    && definition["properties"].get(field).is_some()
            })
        };
        let rows = LISTS
            .iter()
            .map(|r| (r.0, r.1))
            .chain(ATOMIC_FIELDS.iter().copied())
            .chain(DEFAULTS.iter().map(|r| (r.0, r.1)));
        let strangers: Vec<_> = rows.filter(|(name, field)| !known(name, field)).collect();
        assert!(strangers.is_empty(), "no such fields: {strangers:?}");
        for name in ATOMIC_TYPES {
            assert!(definitions().keys().any(|full| short(full) == *name), "no such type: {name}");
        }
    }
}
