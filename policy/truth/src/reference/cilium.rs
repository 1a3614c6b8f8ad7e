//! `CiliumNetworkPolicy` and `CiliumClusterwideNetworkPolicy`, as Cilium describes them.

use serde_json::Value;

use super::{Opinion, Subject, in_block, list, selector};
use crate::world::{Direction, Packet, Pod, Protocol, Reserved, World};

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
const CLUSTER: &str = "io.cilium.k8s.policy.cluster";

/// `namespace`: of the policy, or none if it is clusterwide.
pub(super) fn opinion(world: &World, namespace: Option<&str>, spec: &Value, packet: &Packet) -> Opinion {
    let pod = &world.pods[packet.pod];
    let Some(subject) = spec.get("endpointSelector") else { return Opinion::default() };
    // Applies to pods of its own namespace, whatever it says.
    let in_namespace = namespace.is_none_or(|namespace| pod.namespace() == namespace);
    if !in_namespace || !selector::matches(subject, |key| selector::cilium_label(&pod.labels, key)) {
        return Opinion::default();
    }
    let (way, allow, deny) = match packet.direction {
        Direction::Ingress => ("ingress", list(spec, "ingress"), list(spec, "ingressDeny")),
        Direction::Egress => ("egress", list(spec, "egress"), list(spec, "egressDeny")),
    };
    let has_rules = !allow.is_empty() || !deny.is_empty();
    let isolates = spec["enableDefaultDeny"].get(way).and_then(Value::as_bool).unwrap_or(has_rules);
    let holds = |rule: &Value| is_about(world, namespace, rule, packet);
    let grants = |rule: &Value| !is_beyond_us(rule) && holds(rule);
    // "The effects of any Requires field in any rule will apply to all other rules as well": without support for it, nobody
    // can be said to meet it.
    let unmet = ["fromRequires", "toRequires"];
    let shuts = |rule: &Value| unmet.iter().any(|field| rule.get(field).is_some());
    let denies = deny.iter().any(holds) || allow.iter().any(shuts);
    Opinion { isolates, allows: allow.iter().any(grants), denies }
}

/// Whether a rule asks for what is not supported: nothing is granted then.
fn is_beyond_us(rule: &Value) -> bool {
    let fields = ["authentication", "fromRequires", "toRequires", "toFQDNs"];
    fields.iter().any(|field| rule.get(field).is_some())
}

/// Whether there is something in a spec that is not supported.
pub fn asks_for_more(spec: &Value) -> bool {
    let rules = ["ingress", "egress"].into_iter().flat_map(|way| list(spec, way));
    let in_ports = |rule: &Value| list(rule, "toPorts").iter().any(|ports| ports.get("rules").is_some());
    rules.into_iter().any(|rule| is_beyond_us(rule) || in_ports(rule))
}

/// All parts that are there have to hold. A rule without any is about nothing; one whose list of peers is there and
/// empty selects nobody.
fn is_about(world: &World, namespace: Option<&str>, rule: &Value, packet: &Packet) -> bool {
    let prefix = match packet.direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let members = ["Endpoints", "Entities", "CIDR", "CIDRSet", "Services"];
    let peers: Vec<(&str, &Value)> =
        members.iter().filter_map(|member| Some((*member, rule.get(format!("{prefix}{member}"))?))).collect();
    let has_ports = !list(rule, "toPorts").is_empty() || !list(rule, "icmps").is_empty();
    if peers.is_empty() && !has_ports {
        return false;
    }
    let is_peer = peers.is_empty()
        || peers.iter().any(|(member, peers)| {
            let peers = peers.as_array().map_or(&[][..], Vec::as_slice);
            peers.iter().any(|peer| is_peer(world, namespace, member, peer, packet))
        });
    is_peer && (!has_ports || is_port(world, rule, packet))
}

fn is_peer(world: &World, namespace: Option<&str>, member: &str, peer: &Value, packet: &Packet) -> bool {
    let subject = super::peer(world, packet);
    match (member, subject) {
        ("Endpoints", Subject::Pod(pod)) => is_endpoint(world, namespace, peer, pod),
        // Nodes and their like have no namespace and no cluster: only a selector of reserved labels is about them.
        ("Endpoints", Subject::Reserved(reserved)) => {
            is_reserved(peer) && selector::matches(peer, |key| reserved_label(&reserved_names(reserved), key))
        }
        ("Endpoints", Subject::Outside(_)) => {
            is_reserved(peer) && selector::matches(peer, |key| reserved_label(&["world"], key))
        }
        ("Entities", subject) => is_entity(world, peer.as_str().unwrap_or_default(), &subject),
        // Blocks are for what has no identity of its own.
        ("CIDR", Subject::Outside(address)) => in_block(peer, None, address),
        ("CIDRSet", Subject::Outside(address)) => in_block(&peer["cidr"], peer.get("except"), address),
        ("Services", Subject::Pod(pod)) => is_behind(world, namespace, peer, pod),
        _ => false,
    }
}

/// Unless the selector names a namespace, it is about the policy's own (a clusterwide one: any); unless it names a
/// cluster, about the own one, if that is how the mesh is set up.
fn is_endpoint(world: &World, namespace: Option<&str>, wanted: &Value, pod: &Pod) -> bool {
    let matches = selector::matches(wanted, |key| selector::cilium_label(&pod.labels, key));
    if is_reserved(wanted) {
        return matches;
    }
    let keys: Vec<_> = selector::keys(wanted).into_iter().map(selector::split).collect();
    let names =
        |name: &str| keys.iter().any(|(source, key)| matches!(source, None | Some("k8s")) && key == &name);
    let names_namespace_labels = keys
        .iter()
        .any(|(source, key)| matches!(source, None | Some("k8s")) && key.starts_with(NAMESPACE_LABELS));
    let in_namespace = match namespace {
        _ if names(NAMESPACE) => true,
        Some(_) if names_namespace_labels => true,
        Some(namespace) => pod.namespace() == namespace,
        None => !pod.namespace().is_empty(),
    };
    let in_cluster = !world.default_local_cluster || names(CLUSTER) || pod.cluster() == world.cluster;
    matches && in_namespace && in_cluster
}

fn is_reserved(selector: &Value) -> bool {
    selector::keys(selector).iter().any(|key| selector::split(key).0 == Some("reserved"))
}

fn is_entity(world: &World, entity: &str, subject: &Subject<'_>) -> bool {
    match (entity, subject) {
        ("all", _) => true,
        ("world", Subject::Outside(_)) => true,
        ("world-ipv4", Subject::Outside(address)) => address.is_ipv4(),
        ("world-ipv6", Subject::Outside(address)) => address.is_ipv6(),
        // The own cluster's pods, and whatever has a fixed identity, other clusters' nodes among them.
        ("cluster", Subject::Pod(pod)) => pod.cluster() == world.cluster,
        ("cluster", Subject::Reserved(_)) => true,
        (name, Subject::Reserved(reserved)) => reserved_names(*reserved).contains(&name),
        _ => false,
    }
}

/// The reserved labels of a fixed identity. A node with the Kubernetes API is a node all the same.
fn reserved_names(reserved: Reserved) -> Vec<&'static str> {
    match reserved {
        Reserved::Host => vec!["host"],
        Reserved::Unmanaged => vec!["unmanaged"],
        Reserved::Health => vec!["health"],
        Reserved::Init => vec!["init"],
        Reserved::RemoteNode => vec!["remote-node"],
        Reserved::KubeApiserver => vec!["kube-apiserver", "remote-node"],
        Reserved::Ingress => vec!["ingress"],
    }
}

fn reserved_label(names: &[&str], key: &str) -> Option<&'static str> {
    let (source, key) = selector::split(key);
    (matches!(source, None | Some("reserved")) && names.contains(&key)).then_some("")
}

/// A Service by name or by its labels stands for the pods that it selects: its selector is one of endpoints in its
/// namespace.
fn is_behind(world: &World, namespace: Option<&str>, peer: &Value, pod: &Pod) -> bool {
    let (by_name, by_label) = (peer.get("k8sService"), peer.get("k8sServiceSelector"));
    world.services.iter().any(|service| {
        let of = |reference: &Value| match reference.get("namespace").and_then(Value::as_str) {
            Some(wanted) if !wanted.is_empty() => wanted == service.namespace,
            // Of a reference by name without a namespace: the policy's own.
            _ => namespace.is_none_or(|namespace| namespace == service.namespace),
        };
        let named =
            by_name.is_some_and(|reference| of(reference) && reference["serviceName"] == *service.name);
        let labelled = by_label.is_some_and(|reference| {
            of(reference)
                && selector::matches(&reference["selector"], |key| {
                    let (source, key) = selector::split(key);
                    service
                        .labels
                        .get(key)
                        .filter(|_| matches!(source, None | Some("k8s")))
                        .map(String::as_str)
                })
        });
        (named || labelled)
            && (!world.default_local_cluster || pod.cluster() == world.cluster)
            && pod.namespace() == service.namespace
            && !service.selector.is_empty()
            && service.selector.iter().all(|(key, value)| pod.label(key) == Some(value))
    })
}

fn is_port(world: &World, rule: &Value, packet: &Packet) -> bool {
    // Ports with conditions on what is said through them are not supported, and not granted.
    let plain = list(rule, "toPorts").iter().filter(|ports| ports.get("rules").is_none());
    let ports = plain.flat_map(|ports| list(ports, "ports"));
    let icmps = list(rule, "icmps").iter().flat_map(|icmp| list(icmp, "fields"));
    ports.into_iter().any(|port| is_one_port(world, port, packet))
        || icmps.into_iter().any(|field| is_icmp(field, packet))
}

/// No protocol, or `ANY`: TCP, UDP and SCTP alike. Port 0: every port. `endPort` makes a range, of numbers only. A name
/// stands for the port of that name, and of the protocol if one is given, of the pod that receives.
fn is_one_port(world: &World, port: &Value, packet: &Packet) -> bool {
    let wanted = match port.get("protocol").and_then(Value::as_str) {
        None | Some("" | "ANY") => None,
        Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => panic!("no such protocol: {other}"),
    };
    let text = port["port"].as_str().unwrap_or_default();
    // "If any layer 4 policy is specified, then ICMP will be blocked."
    if wanted.is_some_and(|wanted| wanted != packet.protocol) || !packet.protocol.has_ports() {
        return false;
    }
    match text.parse::<u16>() {
        Ok(0) => true,
        Ok(first) => {
            let last = port.get("endPort").and_then(Value::as_u64).filter(|last| *last > 0);
            (u64::from(first)..=last.unwrap_or(first.into())).contains(&u64::from(packet.port))
        }
        Err(_) => {
            let named =
                super::receiver(world, packet).and_then(|pod| pod.named_ports.get(&text.to_lowercase()));
            named == Some(&(packet.protocol, packet.port))
        }
    }
}

/// The family is IPv4 if not given; the type is a number or its name.
fn is_icmp(field: &Value, packet: &Packet) -> bool {
    let v6 = field.get("family").and_then(Value::as_str) == Some("IPv6");
    let protocol = if v6 { Protocol::Icmpv6 } else { Protocol::Icmp };
    let number = match &field["type"] {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => match (text.as_str(), v6) {
            ("EchoReply", false) => Some(0),
            ("DestinationUnreachable", false) => Some(3),
            ("Echo" | "EchoRequest", false) => Some(8),
            ("TimeExceeded", false) => Some(11),
            ("DestinationUnreachable", true) => Some(1),
            ("PacketTooBig", true) => Some(2),
            ("EchoRequest", true) => Some(128),
            ("EchoReply", true) => Some(129),
            (number, _) => number.parse().ok(),
        },
        _ => None,
    };
    packet.protocol == protocol && number == Some(packet.port.into())
}
