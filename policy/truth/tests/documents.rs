//! The examples that the two documentations explain in words, so that the reference is held to something besides itself.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use isthmus_policy_truth::{
    Direction, Kind, Packet, Peer, Pod, Policy, Protocol, Reserved, World, decide, generate, report, shrink,
};
use serde_json::{Value, json};

const SERVER: usize = 0;
const CLIENT: usize = 1;
const STRANGER: usize = 2;
const ABROAD: usize = 3;
const OTHER_NAMESPACE: usize = 4;

fn pod(number: u8, namespace: &str, cluster: &str, app: &str) -> Pod {
    let labels = [
        ("k8s:app", app),
        ("k8s:io.kubernetes.pod.namespace", namespace),
        ("k8s:io.cilium.k8s.policy.cluster", cluster),
        ("k8s:io.cilium.k8s.namespace.labels.project", namespace),
    ];
    Pod {
        name: app.to_owned(),
        identity: 65536 + u32::from(number),
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        named_ports: BTreeMap::from([("http".to_owned(), (Protocol::Tcp, 8080))]),
        v4: Ipv4Addr::new(10, 1, 0, number),
        v6: Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, number.into()),
        here: number == 0,
    }
}

fn world(policies: &[(Kind, Value)]) -> World {
    World {
        cluster: "alpha".into(),
        default_local_cluster: true,
        namespaces: BTreeMap::new(),
        pods: vec![
            pod(0, "default", "alpha", "db"),
            pod(1, "default", "alpha", "frontend"),
            pod(2, "default", "alpha", "stranger"),
            pod(3, "default", "beta", "frontend"),
            pod(4, "myproject", "alpha", "other"),
        ],
        services: Vec::new(),
        policies: policies
            .iter()
            .enumerate()
            .map(|(number, (kind, spec))| Policy {
                kind: *kind,
                namespace: if *kind == Kind::CiliumClusterwideNetworkPolicy { "" } else { "default" }.into(),
                name: number.to_string(),
                specs: vec![spec.clone()],
            })
            .collect(),
    }
}

fn to_server(peer: Peer, protocol: Protocol, port: u16) -> Packet {
    Packet { pod: SERVER, direction: Direction::Ingress, peer, protocol, port, v6: false }
}

fn from_server(peer: Peer, protocol: Protocol, port: u16) -> Packet {
    Packet { direction: Direction::Egress, ..to_server(peer, protocol, port) }
}

fn allowed(world: &World, packet: Packet) -> bool {
    decide(world, &packet).allowed
}

fn outside(address: &str) -> Peer {
    Peer::Outside(address.parse().unwrap())
}

#[test]
fn the_example_of_kubernetes_does_what_its_three_sentences_say() {
    let world = world(&[(
        Kind::NetworkPolicy,
        json!({
            "podSelector": {"matchLabels": {"app": "db"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{
                "from": [
                    {"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}},
                    {"namespaceSelector": {"matchLabels": {"project": "myproject"}}},
                    {"podSelector": {"matchLabels": {"app": "frontend"}}},
                ],
                "ports": [{"protocol": "TCP", "port": 6379}],
            }],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.9.0.0/24"}}], "ports": [{"protocol": "TCP", "port": 5978}]}],
        }),
    )]);
    let comes = |peer, port| allowed(&world, to_server(peer, Protocol::Tcp, port));
    assert!(comes(Peer::Pod(CLIENT), 6379));
    assert!(comes(Peer::Pod(OTHER_NAMESPACE), 6379));
    assert!(comes(outside("172.17.0.9"), 6379) && comes(outside("172.17.2.0"), 6379));
    assert!(!comes(outside("172.17.1.255"), 6379));
    assert!(!comes(Peer::Pod(CLIENT), 6380) && !comes(Peer::Pod(STRANGER), 6379));
    assert!(!comes(Peer::Pod(ABROAD), 6379), "the own cluster, unless it says otherwise");
    assert!(comes(Peer::Reserved(Reserved::Host), 1), "the node's own traffic is always allowed");
    assert!(allowed(&world, from_server(outside("10.9.0.255"), Protocol::Tcp, 5978)));
    assert!(!allowed(&world, from_server(outside("10.9.1.0"), Protocol::Tcp, 5978)));
    assert!(!allowed(&world, from_server(Peer::Pod(CLIENT), Protocol::Tcp, 5978)));
}

#[test]
fn a_namespace_selector_beside_a_pod_selector_is_one_peer_and_not_two() {
    let peers = |from: Value| {
        world(&[(Kind::NetworkPolicy, json!({"podSelector": {}, "ingress": [{"from": from}]}))])
    };
    let (namespaces, pods) =
        (json!({"matchLabels": {"project": "myproject"}}), json!({"matchLabels": {"app": "frontend"}}));
    let both = peers(json!([{"namespaceSelector": namespaces, "podSelector": pods}]));
    let either = peers(json!([{"namespaceSelector": namespaces}, {"podSelector": pods}]));
    for peer in [CLIENT, OTHER_NAMESPACE] {
        assert!(!allowed(&both, to_server(Peer::Pod(peer), Protocol::Tcp, 80)));
        assert!(allowed(&either, to_server(Peer::Pod(peer), Protocol::Tcp, 80)));
    }
}

#[test]
fn deny_goes_before_allow_as_in_the_table_of_deny_policies() {
    let (everything, port_80) = (json!({}), json!([{"ports": [{"port": "80", "protocol": "TCP"}]}]));
    let client = json!([{"matchLabels": {"app": "frontend"}}]);
    let allow_80 = json!({"endpointSelector": everything, "ingress": [{"toPorts": port_80}]});
    let allow_81 = json!({"endpointSelector": everything,
        "ingress": [{"toPorts": [{"ports": [{"port": "81", "protocol": "TCP"}]}]}]});
    let allow_client = json!({"endpointSelector": everything, "ingress": [{"fromEndpoints": client}]});
    let deny_80 = json!({"endpointSelector": everything, "ingressDeny": [{"toPorts": port_80}]});
    let deny_client = json!({"endpointSelector": everything, "ingressDeny": [{"fromEndpoints": client}]});
    let allows = [&allow_80, &allow_81, &allow_client];
    // The table's columns: policies, and what becomes of port 81, port 80 and a ping.
    let columns: [(Vec<&Value>, [bool; 3]); 5] = [
        (allows.to_vec(), [true, true, true]),
        ([&allows[..], &[&deny_80]].concat(), [true, false, true]),
        ([&allows[..], &[&deny_client]].concat(), [false, false, false]),
        ([&allows[..], &[&deny_80, &deny_client]].concat(), [false, false, false]),
        (vec![&deny_80], [false, false, false]),
    ];
    for (policies, expected) in columns {
        let policies: Vec<_> =
            policies.into_iter().map(|spec| (Kind::CiliumNetworkPolicy, spec.clone())).collect();
        let world = world(&policies);
        let packets = [(Protocol::Tcp, 81), (Protocol::Tcp, 80), (Protocol::Icmp, 8)];
        let verdicts =
            packets.map(|(protocol, port)| allowed(&world, to_server(Peer::Pod(CLIENT), protocol, port)));
        assert_eq!(verdicts, expected, "{policies:?}");
    }
}

#[test]
fn a_cilium_rule_is_about_its_own_namespace_and_cluster_until_it_names_others() {
    let from = |selector: Value| {
        world(&[(
            Kind::CiliumNetworkPolicy,
            json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [selector]}]}),
        )])
    };
    let comes = |world: &World, peer| allowed(world, to_server(Peer::Pod(peer), Protocol::Udp, 53));
    let plain = from(json!({}));
    assert!(comes(&plain, CLIENT) && !comes(&plain, OTHER_NAMESPACE) && !comes(&plain, ABROAD));
    let namespace = from(json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "myproject"}}));
    assert!(comes(&namespace, OTHER_NAMESPACE) && !comes(&namespace, CLIENT));
    let abroad = from(json!({"matchLabels": {"app": "frontend", "io.cilium.k8s.policy.cluster": "beta"}}));
    assert!(comes(&abroad, ABROAD) && !comes(&abroad, CLIENT));
    let anywhere =
        from(json!({"matchExpressions": [{"key": "io.cilium.k8s.policy.cluster", "operator": "Exists"}]}));
    assert!(comes(&anywhere, ABROAD) && comes(&anywhere, CLIENT) && !comes(&anywhere, OTHER_NAMESPACE));
    let mut one_cluster = plain.clone();
    one_cluster.default_local_cluster = false;
    assert!(comes(&one_cluster, ABROAD));
}

#[test]
fn an_empty_rule_denies_by_default_and_allows_nothing() {
    let lock = |extra: Value| {
        let mut spec = json!({"endpointSelector": {}, "egress": [{}]});
        spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        world(&[(Kind::CiliumNetworkPolicy, spec)])
    };
    let goes = |world: &World| allowed(world, from_server(outside("192.0.2.1"), Protocol::Tcp, 443));
    assert!(!goes(&lock(json!({}))));
    assert!(
        allowed(&lock(json!({})), to_server(Peer::Pod(CLIENT), Protocol::Tcp, 80)),
        "ingress is another matter"
    );
    assert!(goes(&lock(json!({"enableDefaultDeny": {"egress": false}}))));
    assert!(!goes(&lock(json!({"egress": [{"toEntities": []}]}))));
    assert!(goes(&lock(json!({"egress": [{"toEntities": ["world"]}]}))));
    assert!(goes(&lock(json!({"egress": [{"toCIDR": ["192.0.2.1/32"]}]}))));
}

#[test]
fn blocks_are_not_about_pods_and_the_cluster_ends_at_its_border() {
    let only = |rule: Value| {
        world(&[(Kind::CiliumClusterwideNetworkPolicy, json!({"endpointSelector": {}, "egress": [rule]}))])
    };
    let goes = |world: &World, peer| allowed(world, from_server(peer, Protocol::Tcp, 443));
    let block = only(json!({"toCIDR": ["10.0.0.0/8"]}));
    assert!(!goes(&block, Peer::Pod(CLIENT)) && goes(&block, outside("10.200.0.1")));
    let cluster = only(json!({"toEntities": ["cluster"]}));
    assert!(goes(&cluster, Peer::Pod(CLIENT)) && goes(&cluster, Peer::Reserved(Reserved::RemoteNode)));
    assert!(!goes(&cluster, Peer::Pod(ABROAD)) && !goes(&cluster, outside("192.0.2.1")));
}

#[test]
fn names_of_ports_are_those_of_the_pod_that_receives() {
    let world = world(&[(
        Kind::NetworkPolicy,
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"ports": [{"port": "http"}]}], "egress": [{"ports": [{"port": "http"}]}]}),
    )]);
    assert!(allowed(&world, to_server(outside("192.0.2.1"), Protocol::Tcp, 8080)));
    assert!(allowed(&world, from_server(Peer::Pod(CLIENT), Protocol::Tcp, 8080)));
    assert!(
        !allowed(&world, from_server(outside("192.0.2.1"), Protocol::Tcp, 8080)),
        "nothing known has that name"
    );
    assert!(!allowed(&world, to_server(Peer::Pod(CLIENT), Protocol::Tcp, 80)));
}

#[test]
fn a_failing_case_becomes_small_enough_to_read() {
    let mut rng = fastrand::Rng::with_seed(7);
    let (world, packet) = (0..)
        .find_map(|_| {
            let world = generate::world(&mut rng);
            let packets = generate::packets(&mut rng, &world, 64);
            let found = packets.into_iter().find(|packet| !decide(&world, packet).policies.is_empty())?;
            (world.policies.len() > 2).then_some((world, found))
        })
        .unwrap();
    let expected = decide(&world, &packet).allowed;
    let fails = |world: &World, packet: &Packet| {
        let decision = decide(world, packet);
        decision.allowed == expected && !decision.policies.is_empty()
    };
    let (small, packet) = shrink(&world, &packet, fails);
    assert!(fails(&small, &packet));
    assert_eq!((small.policies.len(), small.policies[0].specs.len()), (1, 1));
    assert!(small.pods.len() <= 2 && small.services.len() <= 1);
    let text = report(&small, &packet);
    for document in text.split("---\n").skip(1) {
        serde_norway::from_str::<serde_norway::Value>(document).unwrap();
    }
}

#[test]
fn the_same_seed_makes_the_same_world_and_verdicts_of_both_sorts() {
    let make = |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let world = generate::world(&mut rng);
        let packets = generate::packets(&mut rng, &world, 32);
        (serde_json::to_string(&world).unwrap(), packets)
    };
    assert_eq!(make(3), make(3));
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut allowed, mut denied, mut by_rule) = (0, 0, 0);
    for _ in 0..200 {
        let world = generate::world(&mut rng);
        for packet in generate::packets(&mut rng, &world, 16) {
            let decision = decide(&world, &packet);
            *(if decision.allowed { &mut allowed } else { &mut denied }) += 1;
            by_rule += u32::from(!decision.policies.is_empty());
        }
    }
    assert!(
        allowed > 400 && denied > 400 && by_rule > 400,
        "{allowed} allowed, {denied} denied, {by_rule} by a rule"
    );
}
