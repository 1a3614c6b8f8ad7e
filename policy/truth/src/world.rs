//! A world: pods of several clusters, the policies of one of them, and packets to or from a pod of its node.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;
use serde_json::Value;

/// All that a verdict depends on.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct World {
    /// The cluster whose policies these are, and whose pods they select.
    pub cluster: String,
    /// `--policy-default-local-cluster`.
    pub default_local_cluster: bool,
    /// Labels of the own cluster's namespaces.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Pods of all clusters.
    pub pods: Vec<Pod>,
    /// Services of the own cluster.
    pub services: Vec<Service>,
    /// Policies of the own cluster.
    pub policies: Vec<Policy>,
}

/// A pod, and the only one with its identity.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Its name, unique in the world.
    pub name: String,
    /// The numeric identity of its labels.
    pub identity: u32,
    /// Its security labels: `source:key` and value.
    pub labels: BTreeMap<String, String>,
    /// Ports with a name.
    pub named_ports: BTreeMap<String, (Protocol, u16)>,
    /// One of its addresses.
    pub v4: Ipv4Addr,
    /// The other.
    pub v6: Ipv6Addr,
    /// On the node whose endpoints are looked at; only then is it in the own cluster for sure.
    pub here: bool,
}

/// A Service with a selector, or without.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its own labels.
    pub labels: BTreeMap<String, String>,
    /// Labels of the pods behind it.
    pub selector: BTreeMap<String, String>,
}

/// A policy object.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// What it is.
    pub kind: Kind,
    /// Its namespace; empty for a clusterwide one.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `spec`, or each of `specs`.
    pub specs: Vec<Value>,
}

/// The three kinds of policies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Kind {
    /// `networking.k8s.io/v1`
    NetworkPolicy,
    /// `cilium.io/v2`, namespaced
    CiliumNetworkPolicy,
    /// `cilium.io/v2`, of the whole cluster
    CiliumClusterwideNetworkPolicy,
}

/// Seen from the pod that the packet is judged for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

/// What a packet carries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub enum Protocol {
    /// 6
    Tcp,
    /// 17
    Udp,
    /// 132
    Sctp,
    /// 1; the port is the message's type.
    Icmp,
    /// 58; the port is the message's type.
    Icmpv6,
}

/// Who is on the other side of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Peer {
    /// A pod, by its place in [`World::pods`].
    Pod(usize),
    /// Something with a fixed identity.
    Reserved(Reserved),
    /// An address that no cluster knows.
    Outside(IpAddr),
}

/// Fixed identities other than the world's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Reserved {
    /// This node.
    Host = 1,
    /// A pod of a node that is not managed.
    Unmanaged = 3,
    /// The health endpoint of a node.
    Health = 4,
    /// A pod whose identity is not known yet.
    Init = 5,
    /// Another node.
    RemoteNode = 6,
    /// A node that runs the Kubernetes API.
    KubeApiserver = 7,
    /// The ingress of a node.
    Ingress = 8,
}

/// The first packet of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Packet {
    /// The pod that it is judged for, by its place in [`World::pods`].
    pub pod: usize,
    /// Whether that pod receives or sends it.
    pub direction: Direction,
    /// Who sends or receives it.
    pub peer: Peer,
    /// What it carries.
    pub protocol: Protocol,
    /// Destination port, or type of the ICMP message.
    pub port: u16,
    /// Its family.
    pub v6: bool,
}

impl World {
    /// Addresses and identities that the mesh would tell a node of.
    pub fn addresses(&self) -> Vec<(IpAddr, u32)> {
        let pods =
            self.pods.iter().flat_map(|pod| [(pod.v4.into(), pod.identity), (pod.v6.into(), pod.identity)]);
        let reserved =
            Reserved::ALL.iter().flat_map(|r| [false, true].map(|v6| (r.address(v6), r.identity())));
        pods.chain(reserved).collect()
    }
}

impl Pod {
    /// The value of its label `k8s:<key>`.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.get(&format!("k8s:{key}")).map(String::as_str)
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.label("io.kubernetes.pod.namespace").unwrap_or_default()
    }

    /// Its cluster.
    pub fn cluster(&self) -> &str {
        self.label("io.cilium.k8s.policy.cluster").unwrap_or_default()
    }
}

impl Packet {
    /// The peer's address.
    pub fn peer_address(&self, world: &World) -> IpAddr {
        match self.peer {
            Peer::Pod(index) if self.v6 => world.pods[index].v6.into(),
            Peer::Pod(index) => world.pods[index].v4.into(),
            Peer::Reserved(reserved) => reserved.address(self.v6),
            Peer::Outside(address) => address,
        }
    }

    /// The pod's own address.
    pub fn pod_address(&self, world: &World) -> IpAddr {
        let pod = &world.pods[self.pod];
        if self.v6 { pod.v6.into() } else { pod.v4.into() }
    }
}

impl Reserved {
    /// Each of them.
    pub const ALL: [Self; 7] = [
        Self::Host,
        Self::Unmanaged,
        Self::Health,
        Self::Init,
        Self::RemoteNode,
        Self::KubeApiserver,
        Self::Ingress,
    ];

    /// Its number.
    pub fn identity(self) -> u32 {
        self as u32
    }

    /// An address with this identity.
    pub fn address(self, v6: bool) -> IpAddr {
        let number = self as u8;
        if v6 {
            Ipv6Addr::new(0xfd00, 0xaaaa, 0, 0, 0, 0, 0, number.into()).into()
        } else {
            Ipv4Addr::new(172, 18, 0, number).into()
        }
    }
}

impl Protocol {
    /// As in an IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Icmp => 1,
            Self::Icmpv6 => 58,
        }
    }

    /// Whether it has ports.
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Sctp)
    }
}

impl Kind {
    /// As in `apiVersion`.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::CiliumNetworkPolicy | Self::CiliumClusterwideNetworkPolicy => "cilium.io/v2",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
            Self::Icmp => "ICMP",
            Self::Icmpv6 => "ICMPv6",
        })
    }
}
