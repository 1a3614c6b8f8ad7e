//! Makes worlds, and packets in them.
//!
//! The vocabulary is small, so that policies overlap; packets are sent where policies have their edges.

mod packets;
mod policies;
mod selectors;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use fastrand::Rng;

use crate::world::{Pod, Policy, Protocol, Service, World};

pub use packets::packets;

const CLUSTERS: [&str; 3] = ["alpha", "beta", "gamma"];
const NAMESPACES: [&str; 3] = ["default", "prod", "dev"];
const APPS: [&str; 4] = ["web", "db", "api", "cache"];
const TIERS: [&str; 2] = ["front", "back"];
const TEAMS: [&str; 2] = ["red", "blue"];
const PORT_NAMES: [&str; 4] = ["http", "metrics", "dns", "grpc-8"];
const PORTS: [u16; 12] = [1, 53, 80, 443, 1023, 1024, 8000, 8080, 8100, 9090, 32768, 65535];
/// Blocks within blocks, some of which hold addresses of pods and nodes.
const BLOCKS: [&str; 16] = [
    "192.0.2.0/24",
    "192.0.2.0/25",
    "192.0.2.64/26",
    "192.0.2.77/32",
    "198.51.100.0/24",
    "198.51.0.0/16",
    "203.0.113.128/25",
    "0.0.0.0/0",
    "10.0.0.0/8",
    "172.18.0.0/16",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "2001:db8:1::5/128",
    "2001:db8:1:8000::/49",
    "fd00::/8",
    "::/0",
];

/// A world with policies.
pub fn world(rng: &mut Rng) -> World {
    let mut world = bare(rng);
    for number in 0..1 + rng.usize(..7) {
        let policy = policies::policy(rng, &world, number);
        world.policies.push(policy);
    }
    world
}

/// The policy with this number for a world, made anew.
pub fn policy(rng: &mut Rng, world: &World, number: usize) -> Policy {
    policies::policy(rng, world, number)
}

/// Another pod of a world, with the identity `identity`.
pub fn pod(rng: &mut Rng, world: &World, identity: u16, here: bool) -> Pod {
    let cluster = if here { 0 } else { rng.usize(..CLUSTERS.len()) };
    let namespace = pick(rng, &NAMESPACES);
    let mut labels = BTreeMap::new();
    let mut k8s = |key: &str, value: &str| labels.insert(format!("k8s:{key}"), value.to_owned());
    k8s("io.kubernetes.pod.namespace", namespace);
    k8s("io.cilium.k8s.policy.cluster", CLUSTERS[cluster]);
    k8s("io.cilium.k8s.policy.serviceaccount", pick(rng, &["default", "robot"]));
    k8s("app", pick(rng, &APPS));
    if rng.bool() {
        k8s("tier", pick(rng, &TIERS));
    }
    // A pod of another cluster has the labels of its own cluster's namespace.
    let team = pick(rng, &TEAMS);
    let own = world.namespaces.get(namespace).filter(|_| cluster == 0);
    let named = BTreeMap::from([
        ("kubernetes.io/metadata.name".to_owned(), namespace.to_owned()),
        ("team".to_owned(), team.to_owned()),
    ]);
    for (key, value) in own.unwrap_or(&named) {
        k8s(&format!("io.cilium.k8s.namespace.labels.{key}"), value);
    }
    let mut named_ports = BTreeMap::new();
    for name in PORT_NAMES {
        if rng.bool() {
            let protocol = pick(rng, &[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
            named_ports.insert(name.to_owned(), (protocol, pick(rng, &PORTS)));
        }
    }
    let [high, low] = identity.to_be_bytes();
    Pod {
        name: format!("{}-{identity}", CLUSTERS[cluster]),
        identity: ((cluster as u32 + 1) << 16) | u32::from(identity),
        labels,
        named_ports,
        v4: Ipv4Addr::new(10, cluster as u8 + 1, high, low),
        v6: Ipv6Addr::new(0xfd00, cluster as u16 + 1, 0, 0, 0, 0, 0, identity),
        here,
    }
}

fn bare(rng: &mut Rng) -> World {
    let mut world = World {
        cluster: CLUSTERS[0].to_owned(),
        default_local_cluster: rng.u8(..4) > 0,
        namespaces: BTreeMap::new(),
        pods: Vec::new(),
        services: Vec::new(),
        policies: Vec::new(),
    };
    for name in NAMESPACES {
        let labels = BTreeMap::from([
            ("kubernetes.io/metadata.name".to_owned(), name.to_owned()),
            ("team".to_owned(), pick(rng, &TEAMS).to_owned()),
        ]);
        world.namespaces.insert(name.to_owned(), labels);
    }
    for number in 0..2 + rng.u16(..8) {
        // Their labels are an identity each: two alike would be one.
        let made = pod(rng, &world, 256 + number, number < 2);
        if world.pods.iter().all(|known| known.labels != made.labels) {
            world.pods.push(made);
        }
    }
    for name in ["front", "store"] {
        let mut selector = BTreeMap::from([("app".to_owned(), pick(rng, &APPS).to_owned())]);
        if rng.u8(..4) == 0 {
            selector.clear();
        }
        world.services.push(Service {
            namespace: pick(rng, &NAMESPACES).to_owned(),
            name: name.to_owned(),
            labels: BTreeMap::from([("tier".to_owned(), pick(rng, &TIERS).to_owned())]),
            selector,
        });
    }
    world
}

fn pick<T: Clone>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.usize(..from.len())].clone()
}

/// One time in `n`.
fn one_in(rng: &mut Rng, n: u32) -> bool {
    rng.u32(..n) == 0
}
