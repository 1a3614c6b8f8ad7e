//! Packets, to where the policies of a world have their edges.

use std::net::IpAddr;

use fastrand::Rng;
use ipnet::IpNet;
use serde_json::Value;

use super::{BLOCKS, PORTS, one_in, pick};
use crate::world::{Direction, Packet, Peer, Protocol, Reserved, World};

/// `count` packets of the pods that are here.
pub fn packets(rng: &mut Rng, world: &World, count: usize) -> Vec<Packet> {
    let here: Vec<usize> = (0..world.pods.len()).filter(|pod| world.pods[*pod].here).collect();
    let edges = edges(world);
    (0..count)
        .map(|_| {
            let pod = pick(rng, &here);
            packet(rng, world, pod, &edges)
        })
        .collect()
}

fn packet(rng: &mut Rng, world: &World, pod: usize, edges: &Edges) -> Packet {
    let direction = if rng.bool() { Direction::Ingress } else { Direction::Egress };
    let peer = match rng.u8(..8) {
        // What a pod sends to itself never leaves it.
        0..=3 if world.pods.len() > 1 => {
            Peer::Pod((pod + 1 + rng.usize(..world.pods.len() - 1)) % world.pods.len())
        }
        4 => Peer::Reserved(pick(rng, &Reserved::ALL)),
        _ => {
            Peer::Outside(if edges.addresses.is_empty() { outside(rng) } else { pick(rng, &edges.addresses) })
        }
    };
    let v6 = match peer {
        Peer::Outside(address) => address.is_ipv6(),
        Peer::Pod(_) | Peer::Reserved(_) => rng.bool(),
    };
    let protocol = match rng.u8(..10) {
        0..=4 => Protocol::Tcp,
        5 | 6 => Protocol::Udp,
        7 => Protocol::Sctp,
        _ if v6 => Protocol::Icmpv6,
        _ => Protocol::Icmp,
    };
    let port = match protocol {
        Protocol::Icmp => pick(rng, &[0, 3, 8, 11]),
        Protocol::Icmpv6 => pick(rng, &[1, 2, 128, 129]),
        _ if one_in(rng, 8) || edges.ports.is_empty() => rng.u16(1..),
        _ => pick(rng, &edges.ports),
    };
    Packet { pod, direction, peer, protocol, port, v6 }
}

struct Edges {
    ports: Vec<u16>,
    addresses: Vec<IpAddr>,
}

fn edges(world: &World) -> Edges {
    let mut numbers: Vec<u16> =
        world.pods.iter().flat_map(|pod| pod.named_ports.values()).map(|(_, port)| *port).collect();
    numbers.extend(PORTS);
    let mut addresses = Vec::new();
    let mut visit = |key: &str, value: &Value| match (key, value) {
        ("port" | "endPort", Value::Number(number)) => {
            numbers.extend(number.as_u64().and_then(|number| u16::try_from(number).ok()));
        }
        ("port", Value::String(text)) => numbers.extend(text.parse::<u16>()),
        (_, Value::String(text)) => addresses.extend(text.parse::<IpNet>().ok().iter().flat_map(around)),
        _ => {}
    };
    for spec in world.policies.iter().flat_map(|policy| &policy.specs) {
        walk("", spec, &mut visit);
    }
    let mut ports: Vec<u16> = numbers
        .into_iter()
        .flat_map(|port| [port.saturating_sub(1), port, port.saturating_add(1)])
        .filter(|port| *port > 0)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    addresses.retain(|address| is_outside(*address));
    Edges { ports, addresses }
}

fn walk<'a>(key: &'a str, value: &'a Value, visit: &mut impl FnMut(&str, &Value)) {
    match value {
        Value::Array(list) => list.iter().for_each(|value| walk(key, value, visit)),
        Value::Object(object) => object.iter().for_each(|(key, value)| walk(key, value, visit)),
        value => visit(key, value),
    }
}

/// First and last address of a block, and their neighbours.
fn around(block: &IpNet) -> Vec<IpAddr> {
    let step = |address: IpAddr, by: i8| match address {
        IpAddr::V4(v4) => {
            IpAddr::V4(v4.to_bits().checked_add_signed(by.into()).unwrap_or(v4.to_bits()).into())
        }
        IpAddr::V6(v6) => {
            IpAddr::V6(v6.to_bits().checked_add_signed(by.into()).unwrap_or(v6.to_bits()).into())
        }
    };
    let (first, last) = (block.network(), block.broadcast());
    vec![first, last, step(first, -1), step(last, 1)]
}

/// Not an address of a cluster, and one that a packet may have.
fn is_outside(address: IpAddr) -> bool {
    let odd = match address {
        IpAddr::V4(v4) => {
            v4.is_unspecified() || v4.is_broadcast() || v4.is_multicast() || v4.octets()[0] >= 240
        }
        IpAddr::V6(v6) => v6.is_unspecified() || v6.is_multicast() || v6.to_ipv4_mapped().is_some(),
    };
    let of_clusters = match address {
        IpAddr::V4(v4) => v4.octets()[0] == 10 || v4.octets()[..3] == [172, 18, 0],
        IpAddr::V6(v6) => v6.segments()[0] == 0xfd00,
    };
    !odd && !of_clusters
}

fn outside(rng: &mut Rng) -> IpAddr {
    loop {
        let Ok(block) = pick(rng, &BLOCKS).parse::<IpNet>() else { continue };
        let address = pick(rng, &around(&block));
        if is_outside(address) {
            return address;
        }
    }
}
