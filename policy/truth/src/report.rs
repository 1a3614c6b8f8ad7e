//! A case as a person reads it.

use std::fmt::Write;

use serde_json::json;

use crate::reference::decide;
use crate::world::{Direction, Packet, Peer, World};

/// The packet in a sentence, what should become of it, and the world as YAML: policies as one would apply them, then the
/// pods and services that they are about.
pub fn report(world: &World, packet: &Packet) -> String {
    let pod = &world.pods[packet.pod];
    let peer = match packet.peer {
        Peer::Pod(index) => format!("{} (identity {})", world.pods[index].name, world.pods[index].identity),
        Peer::Reserved(reserved) => format!("{reserved:?} (identity {})", reserved.identity()),
        Peer::Outside(_) => "the world".to_owned(),
    };
    let (verb, address) = match packet.direction {
        Direction::Ingress => ("receives from", packet.peer_address(world)),
        Direction::Egress => ("sends to", packet.peer_address(world)),
    };
    let decision = decide(world, packet);
    let verdict = if decision.allowed { "allowed" } else { "denied" };
    let because = match (decision.policies.as_slice(), decision.default_deny) {
        ([], true) => "no policy allows it, and default deny holds".to_owned(),
        ([], false) => "no policy is about it".to_owned(),
        (policies, _) => policies.join(", "),
    };
    let mut text = format!(
        "# {} {verb} {peer} at {address}: {} {}\n# by the documentation: {verdict} ({because})\n# cluster {}, policy-default-local-cluster {}\n",
        pod.name, packet.protocol, packet.port, world.cluster, world.default_local_cluster
    );
    for policy in &world.policies {
        let mut object = json!({
            "apiVersion": policy.kind.api_version(),
            "kind": policy.kind,
            "metadata": {"name": policy.name, "namespace": policy.namespace},
        });
        match policy.specs.as_slice() {
            [spec] => object["spec"] = spec.clone(),
            specs => object["specs"] = specs.into(),
        }
        if policy.namespace.is_empty() {
            object["metadata"] = json!({"name": policy.name});
        }
        let _ = write!(text, "---\n{}", serde_norway::to_string(&object).unwrap_or_default());
    }
    let around = json!({"pods": world.pods, "services": world.services, "namespaces": world.namespaces});
    let _ = write!(text, "---\n{}", serde_norway::to_string(&around).unwrap_or_default());
    text
}
