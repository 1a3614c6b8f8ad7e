//! Policies of the three kinds.

use fastrand::Rng;
use serde_json::{Value, json};

use super::{BLOCKS, NAMESPACES, PORT_NAMES, PORTS, TIERS, one_in, pick, selectors};
use crate::world::{Kind, Policy, World};

pub(super) fn policy(rng: &mut Rng, world: &World, number: usize) -> Policy {
    let kind = match rng.u8(..5) {
        0 | 1 => Kind::NetworkPolicy,
        2 | 3 => Kind::CiliumNetworkPolicy,
        _ => Kind::CiliumClusterwideNetworkPolicy,
    };
    let clusterwide = kind == Kind::CiliumClusterwideNetworkPolicy;
    let specs = match kind {
        Kind::NetworkPolicy => vec![kubernetes(rng, world)],
        _ => (0..if one_in(rng, 6) { 2 } else { 1 }).map(|_| cilium(rng, world, clusterwide)).collect(),
    };
    let namespace = match () {
        () if clusterwide => "",
        () if one_in(rng, 6) => pick(rng, &NAMESPACES),
        () => selectors::here(rng, world).namespace(),
    };
    Policy { kind, namespace: namespace.to_owned(), name: format!("policy-{number}"), specs }
}

fn kubernetes(rng: &mut Rng, world: &World) -> Value {
    let mut spec = json!({"podSelector": selectors::subject(rng, world, false)});
    let (ingress, egress) = (rng.bool(), rng.bool());
    if ingress {
        spec["ingress"] = several(rng, 0, |rng| kubernetes_rule(rng, world, "from"));
    }
    if egress {
        spec["egress"] = several(rng, 0, |rng| kubernetes_rule(rng, world, "to"));
    }
    match rng.u8(..6) {
        0 => spec["policyTypes"] = json!(["Ingress"]),
        1 => spec["policyTypes"] = json!(["Egress"]),
        2 | 3 => spec["policyTypes"] = json!(["Ingress", "Egress"]),
        _ => {}
    }
    spec
}

fn kubernetes_rule(rng: &mut Rng, world: &World, peers: &str) -> Value {
    let mut rule = json!({});
    if !one_in(rng, 4) {
        let empty = usize::from(!one_in(rng, 8));
        rule[peers] = several(rng, empty, |rng| match rng.u8(..5) {
            0 | 1 => json!({"podSelector": selectors::pods(rng, world)}),
            2 => json!({"namespaceSelector": selectors::namespaces(rng)}),
            3 => {
                json!({"namespaceSelector": selectors::namespaces(rng), "podSelector": selectors::pods(rng, world)})
            }
            _ => json!({"ipBlock": block(rng)}),
        });
    }
    if !one_in(rng, 3) {
        let empty = usize::from(!one_in(rng, 8));
        rule["ports"] = several(rng, empty, |rng| {
            let mut port = json!({});
            if !one_in(rng, 3) {
                port["protocol"] = json!(pick(rng, &["TCP", "UDP", "SCTP"]));
            }
            match rng.u8(..5) {
                0 => {}
                1 => port["port"] = json!(pick(rng, &PORT_NAMES)),
                2 | 3 => port["port"] = json!(pick(rng, &PORTS)),
                _ => {
                    let (first, last) = range(rng);
                    port["port"] = json!(first);
                    port["endPort"] = json!(last);
                }
            }
            port
        });
    }
    rule
}

fn cilium(rng: &mut Rng, world: &World, clusterwide: bool) -> Value {
    let mut spec = json!({"endpointSelector": selectors::subject(rng, world, clusterwide)});
    let mut any = false;
    for (way, prefix) in [("ingress", "from"), ("egress", "to")] {
        if rng.bool() {
            let least = usize::from(!one_in(rng, 8));
            spec[way] = several(rng, least, |rng| cilium_rule(rng, world, prefix, false));
            any = true;
        }
        if one_in(rng, 3) {
            spec[format!("{way}Deny")] = several(rng, 1, |rng| cilium_rule(rng, world, prefix, true));
            any = true;
        }
        if one_in(rng, 4) {
            spec["enableDefaultDeny"][way] = json!(rng.bool());
        }
    }
    if !any {
        spec["ingress"] = json!([{}]);
    }
    spec
}

fn cilium_rule(rng: &mut Rng, world: &World, prefix: &str, deny: bool) -> Value {
    let mut rule = json!({});
    let field = |name: &str| format!("{prefix}{name}");
    let least = usize::from(!one_in(rng, 12));
    let mut ports = true;
    match rng.u8(..10) {
        0 => {}
        1..=4 => rule[field("Endpoints")] = several(rng, least, |rng| selectors::peer(rng, world)),
        5 | 6 => rule[field("Entities")] = several(rng, least, entity),
        7 => rule[field("CIDR")] = several(rng, least, |rng| json!(pick(rng, &BLOCKS))),
        8 => rule[field("CIDRSet")] = several(rng, least, block),
        _ if prefix == "to" && !deny => {
            rule["toServices"] = several(rng, 1, service);
            // The two together are refused.
            ports = false;
        }
        _ => rule[field("Endpoints")] = json!([{}]),
    }
    match rng.u8(..5) {
        0..=2 if ports => rule["toPorts"] = several(rng, 1, |rng| json!({"ports": several(rng, 1, port)})),
        3 if ports => rule["icmps"] = several(rng, 1, |rng| json!({"fields": several(rng, 1, icmp)})),
        _ => {}
    }
    if !deny && one_in(rng, 16) {
        add_unsupported(rng, &mut rule, prefix);
    }
    rule
}

/// What is not supported grants nothing.
fn add_unsupported(rng: &mut Rng, rule: &mut Value, prefix: &str) {
    match rng.u8(..4) {
        0 => rule["authentication"] = json!({"mode": "required"}),
        1 => rule[format!("{prefix}Requires")] = json!([{"matchLabels": {"tier": "front"}}]),
        2 if prefix == "to" => *rule = json!({"toFQDNs": [{"matchName": "example.org"}]}),
        _ => {
            if let Some(Value::Array(ports)) = rule.get_mut("toPorts") {
                ports[0]["rules"] = json!({"http": [{"method": "GET"}]});
            }
        }
    }
}

fn entity(rng: &mut Rng) -> Value {
    let names = [
        "all",
        "world",
        "world",
        "cluster",
        "cluster",
        "host",
        "remote-node",
        "kube-apiserver",
        "health",
        "none",
        "init",
        "ingress",
        "unmanaged",
        "world-ipv4",
        "world-ipv6",
    ];
    json!(pick(rng, &names))
}

fn service(rng: &mut Rng) -> Value {
    let namespace = pick(rng, &NAMESPACES);
    if rng.bool() {
        json!({"k8sService": {"serviceName": pick(rng, &["front", "store"]), "namespace": namespace}})
    } else {
        json!({"k8sServiceSelector": {"selector": {"matchLabels": {"tier": pick(rng, &TIERS)}}, "namespace": namespace}})
    }
}

fn port(rng: &mut Rng) -> Value {
    let mut port = json!({});
    match rng.u8(..8) {
        0 => port["port"] = json!(pick(rng, &PORT_NAMES)),
        1 => port["port"] = json!("0"),
        2..=4 => port["port"] = json!(pick(rng, &PORTS).to_string()),
        _ => {
            let (first, last) = range(rng);
            port["port"] = json!(first.to_string());
            port["endPort"] = json!(last);
        }
    }
    if !one_in(rng, 4) {
        port["protocol"] = json!(pick(rng, &["TCP", "TCP", "UDP", "SCTP", "ANY"]));
    }
    port
}

fn icmp(rng: &mut Rng) -> Value {
    if rng.bool() {
        json!({"type": pick(rng, &[json!(8), json!(0), json!("EchoRequest"), json!("DestinationUnreachable")])})
    } else {
        json!({"family": "IPv6", "type": pick(rng, &[json!(128), json!(129), json!("EchoRequest"), json!("PacketTooBig")])})
    }
}

/// A block, mostly with exceptions inside it.
fn block(rng: &mut Rng) -> Value {
    let text = pick(rng, &BLOCKS);
    let Ok(outer) = text.parse::<ipnet::IpNet>() else { return json!({"cidr": text}) };
    let inside: Vec<&str> = BLOCKS
        .iter()
        .copied()
        .filter(|inner| {
            inner.parse::<ipnet::IpNet>().is_ok_and(|inner| inner != outer && outer.contains(&inner))
        })
        .collect();
    if inside.is_empty() || one_in(rng, 3) {
        return json!({"cidr": text});
    }
    json!({"cidr": text, "except": several(rng, 1, |rng| json!(pick(rng, &inside)))})
}

fn range(rng: &mut Rng) -> (u16, u16) {
    let (a, b) =
        if rng.bool() { (pick(rng, &PORTS), pick(rng, &PORTS)) } else { (rng.u16(1..), rng.u16(1..)) };
    (a.min(b), a.max(b))
}

fn several(rng: &mut Rng, least: usize, mut make: impl FnMut(&mut Rng) -> Value) -> Value {
    let count = if least == 0 && one_in(rng, 2) { 0 } else { 1 + rng.usize(..2) };
    Value::Array((0..count).map(|_| make(rng)).collect())
}
