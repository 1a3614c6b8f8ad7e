//! Selectors of labels.

use fastrand::Rng;
use serde_json::{Map, Value, json};

use crate::world::{Pod, World};

use super::{APPS, CLUSTERS, NAMESPACES, TEAMS, TIERS, one_in, pick};

/// One of the pods that policies can select.
pub(super) fn here<'a>(rng: &mut Rng, world: &'a World) -> &'a Pod {
    let here: Vec<&Pod> = world.pods.iter().filter(|pod| pod.here).collect();
    pick(rng, &here)
}

/// Of pods, in the notation of Kubernetes.
pub(super) fn pods(rng: &mut Rng, world: &World) -> Value {
    let mut selector = plain(rng, "", world);
    if one_in(rng, 8) {
        require(&mut selector, "io.cilium.k8s.policy.cluster", pick(rng, &CLUSTERS));
    }
    selector
}

/// Of namespaces.
pub(super) fn namespaces(rng: &mut Rng) -> Value {
    match rng.u8(..5) {
        0 => json!({}),
        1 => json!({"matchLabels": {"kubernetes.io/metadata.name": pick(rng, &NAMESPACES)}}),
        2 => json!({"matchLabels": {"team": pick(rng, &TEAMS)}}),
        3 => {
            json!({"matchExpressions": [{"key": "team", "operator": "NotIn", "values": [pick(rng, &TEAMS)]}]})
        }
        _ => json!({"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In",
                "values": [pick(rng, &NAMESPACES), pick(rng, &NAMESPACES)]}]}),
    }
}

/// Of the pods that a policy is for, mostly such that there are some.
pub(super) fn subject(rng: &mut Rng, world: &World, clusterwide: bool) -> Value {
    let mut selector = match rng.u8(..4) {
        0 | 1 => json!({}),
        2 => json!({"matchLabels": {"app": here(rng, world).label("app")}}),
        _ => plain(rng, "", world),
    };
    if clusterwide && one_in(rng, 4) {
        require(&mut selector, "k8s:io.kubernetes.pod.namespace", pick(rng, &NAMESPACES));
    }
    selector
}

/// Of the other side in a Cilium policy.
pub(super) fn peer(rng: &mut Rng, world: &World) -> Value {
    if one_in(rng, 16) {
        let name = pick(rng, &["host", "remote-node", "world", "health", "kube-apiserver"]);
        return json!({"matchLabels": {format!("reserved:{name}"): ""}});
    }
    let source = source(rng);
    if rng.bool() {
        return like_a_pod(rng, source, world);
    }
    let mut selector = plain(rng, source, world);
    match rng.u8(..8) {
        0 | 1 => require(&mut selector, "k8s:io.kubernetes.pod.namespace", pick(rng, &NAMESPACES)),
        2 => require(&mut selector, "io.kubernetes.pod.namespace", pick(rng, &NAMESPACES)),
        3 => require(&mut selector, "k8s:io.cilium.k8s.namespace.labels.team", pick(rng, &TEAMS)),
        4 => express(&mut selector, json!({"key": "io.kubernetes.pod.namespace", "operator": "Exists"})),
        _ => {}
    }
    match rng.u8(..8) {
        0 | 1 => require(&mut selector, "k8s:io.cilium.k8s.policy.cluster", pick(rng, &CLUSTERS)),
        2 => express(&mut selector, json!({"key": "io.cilium.k8s.policy.cluster", "operator": "Exists"})),
        3 => express(
            &mut selector,
            json!({"key": "k8s:io.cilium.k8s.policy.cluster", "operator": "NotIn", "values": [pick(rng, &CLUSTERS)]}),
        ),
        _ => {}
    }
    if one_in(rng, 12) {
        require(&mut selector, "io.cilium.k8s.policy.serviceaccount", "robot");
    }
    selector
}

fn source(rng: &mut Rng) -> &'static str {
    pick(rng, &["", "", "k8s:", "any:"])
}

/// What selects some pod, by a part of its labels.
fn like_a_pod(rng: &mut Rng, source: &str, world: &World) -> Value {
    let pod = pick(rng, &world.pods);
    let mut selector = json!({});
    let keys = [
        "app",
        "tier",
        "io.kubernetes.pod.namespace",
        "io.cilium.k8s.policy.cluster",
        "io.cilium.k8s.namespace.labels.team",
    ];
    for key in keys {
        if let Some(value) = pod.label(key)
            && !one_in(rng, 3)
        {
            require(&mut selector, &format!("{source}{key}"), value);
        }
    }
    selector
}

fn plain(rng: &mut Rng, source: &str, world: &World) -> Value {
    let mut selector = json!({});
    let key = |name: &str| format!("{source}{name}");
    match rng.u8(..10) {
        0 | 1 => {}
        8 | 9 => require(&mut selector, &key("app"), pick(rng, &world.pods).label("app").unwrap_or_default()),
        2 | 3 => require(&mut selector, &key("app"), pick(rng, &APPS)),
        4 => {
            require(&mut selector, &key("app"), pick(rng, &APPS));
            require(&mut selector, &key("tier"), pick(rng, &TIERS));
        }
        5 => {
            let values = [pick(rng, &APPS), pick(rng, &APPS)];
            express(
                &mut selector,
                json!({"key": key("app"), "operator": pick(rng, &["In", "NotIn"]), "values": values}),
            );
        }
        6 => express(
            &mut selector,
            json!({"key": key("tier"), "operator": pick(rng, &["Exists", "DoesNotExist"])}),
        ),
        _ => {
            express(
                &mut selector,
                json!({"key": key("tier"), "operator": "NotIn", "values": [pick(rng, &TIERS)]}),
            );
            express(
                &mut selector,
                json!({"key": key("app"), "operator": "In", "values": [pick(rng, &APPS), pick(rng, &APPS)]}),
            );
        }
    }
    selector
}

fn require(selector: &mut Value, key: &str, value: &str) {
    selector["matchLabels"][key] = value.into();
}

fn express(selector: &mut Value, expression: Value) {
    let expressions = selector.as_object_mut().map(|selector: &mut Map<String, Value>| {
        selector.entry("matchExpressions").or_insert_with(|| json!([]))
    });
    if let Some(Value::Array(expressions)) = expressions {
        expressions.push(expression);
    }
}
