//! `NetworkPolicy`, as Kubernetes describes it.

use serde_json::Value;

use super::{Opinion, Subject, in_block, list, selector};
use crate::world::{Direction, Packet, Pod, Protocol, World};

const CLUSTER: &str = "io.cilium.k8s.policy.cluster";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";

pub(super) fn opinion(world: &World, namespace: &str, spec: &Value, packet: &Packet) -> Opinion {
    let pod = &world.pods[packet.pod];
    if pod.namespace() != namespace || !selector::matches(&spec["podSelector"], |key| pod.label(key)) {
        return Opinion::default();
    }
    // Without policyTypes: Ingress always, Egress if there are egress rules.
    let types = list(spec, "policyTypes");
    let (name, rules, peers) = match packet.direction {
        Direction::Ingress => ("Ingress", list(spec, "ingress"), "from"),
        Direction::Egress => ("Egress", list(spec, "egress"), "to"),
    };
    let applies = match (types, packet.direction) {
        ([], Direction::Ingress) => true,
        ([], Direction::Egress) => !rules.is_empty(),
        (types, _) => types.iter().any(|known| known == name),
    };
    if !applies {
        return Opinion::default();
    }
    let allows = rules.iter().any(|rule| {
        // Empty or missing: every peer, every port.
        let (peers, ports) = (list(rule, peers), list(rule, "ports"));
        (peers.is_empty() || peers.iter().any(|peer| is_peer(world, namespace, peer, packet)))
            && (ports.is_empty() || ports.iter().any(|port| is_port(world, port, packet)))
    });
    Opinion { isolates: true, allows, denies: false }
}

fn is_peer(world: &World, namespace: &str, peer: &Value, packet: &Packet) -> bool {
    let (pods, namespaces, block) =
        (peer.get("podSelector"), peer.get("namespaceSelector"), peer.get("ipBlock"));
    match super::peer(world, packet) {
        // Blocks are for addresses outside the clusters.
        Subject::Outside(address) => {
            block.is_some_and(|block| in_block(&block["cidr"], block.get("except"), address))
        }
        Subject::Reserved(_) => false,
        Subject::Pod(pod) => {
            if pods.is_none() && namespaces.is_none() {
                return false;
            }
            // Pods of the own cluster only, unless the selector names another or the mesh is taken for one cluster.
            let names_cluster = pods.is_some_and(|pods| selector::keys(pods).contains(&CLUSTER));
            let in_cluster = !world.default_local_cluster || names_cluster || pod.cluster() == world.cluster;
            let in_namespace = match namespaces {
                Some(namespaces) => selector::matches(namespaces, |key| namespace_label(pod, key)),
                None => pod.namespace() == namespace,
            };
            in_cluster
                && in_namespace
                && pods.is_none_or(|pods| selector::matches(pods, |key| pod.label(key)))
        }
    }
}

fn namespace_label<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.label(&format!("{NAMESPACE_LABELS}{key}"))
}

/// The protocol is TCP if not given. Without a port it is every port; `endPort` makes a range of it; a name stands for
/// the port of that name and protocol of the pod that receives.
fn is_port(world: &World, port: &Value, packet: &Packet) -> bool {
    let protocol = match port.get("protocol").and_then(Value::as_str) {
        None | Some("TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(other) => panic!("no such protocol: {other}"),
    };
    if packet.protocol != protocol {
        return false;
    }
    match port.get("port") {
        None => true,
        Some(Value::Number(number)) => {
            let first = number.as_u64().unwrap_or_default();
            let last = port.get("endPort").and_then(Value::as_u64).unwrap_or(first);
            (first..=last).contains(&u64::from(packet.port))
        }
        Some(name) => {
            let named = super::receiver(world, packet)
                .and_then(|pod| pod.named_ports.get(name.as_str().unwrap_or_default()));
            named == Some(&(protocol, packet.port))
        }
    }
}
