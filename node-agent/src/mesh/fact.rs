//! What the agent knows, as types that can hold nothing else. The wire format ends where these begin.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use isthmus_bpf_abi::Protocol;
use isthmus_policy::NamedPorts;
use isthmus_wireguard::config::PublicKey;

/// A point in time: how long after the agent's start. The state machine has no clock; it is told.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Moment(pub Duration);

/// Where a fact comes from in time: with its cluster (which is part of where it is kept) its origin.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Provenance {
    /// Revision of the gateway's store that carried it.
    pub revision: u64,
    /// When it arrived at this agent.
    pub arrived: Moment,
}

/// A value with its provenance.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fact<T> {
    /// What is known.
    pub value: T,
    /// Since when and from which revision.
    pub provenance: Provenance,
}

/// Namespace and name of a Kubernetes Service. The same pair names the same service in every cluster.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ServiceName {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Name within it.
    pub name: Arc<str>,
}

impl ServiceName {
    /// The service `namespace`/`name`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A named or unnamed port with its protocol: a service's port, or the target port of a backend.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Port {
    /// Empty when the port has no name.
    pub name: Arc<str>,
    /// TCP or UDP; SCTP is dropped at the edge.
    pub protocol: Protocol,
    /// 1..=65535.
    pub number: u16,
}

impl Port {
    /// A port; `name` is empty when it has none.
    pub fn new(name: &str, protocol: Protocol, number: u16) -> Self {
        Self { name: name.into(), protocol, number }
    }

    /// Whether a backend's port serves this port of a service: equal protocol and equal name, where a side
    /// without a name matches any.
    pub fn is_served_by(&self, backend: &Port) -> bool {
        self.protocol == backend.protocol
            && (self.name.is_empty() || backend.name.is_empty() || self.name == backend.name)
    }
}

/// What its cluster says about a backend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Condition {
    /// Takes new connections.
    Active,
    /// Terminating but still serving: takes new connections only when no active one is left.
    Terminating,
}

/// One address behind a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Address of the pod.
    pub addr: IpAddr,
    /// Its target ports, shared by all backends of a value that have the same.
    pub ports: Arc<[Port]>,
    /// Ready, or on its way out.
    pub condition: Condition,
    /// Node that it runs on, where known.
    pub node: Option<Arc<str>>,
}

/// Which clusters' backends a global service prefers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Affinity {
    /// All alike.
    #[default]
    None,
    /// The own cluster's, others only when it has no active one.
    Local,
    /// The other clusters', own ones only when they have no active one.
    Remote,
}

/// A ClusterIP Service of the own cluster, global or not.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LocalService {
    /// One per address family at most; empty for a headless service.
    pub cluster_ips: Vec<IpAddr>,
    /// What clients dial.
    pub ports: Vec<Port>,
    /// The own cluster's backends.
    pub backends: Vec<Backend>,
    /// Joined with the services of the same name in other clusters.
    pub global: bool,
    /// Only for global services.
    pub affinity: Affinity,
    /// `sessionAffinity: ClientIP` and its timeout in seconds, 1..=86400.
    pub session_affinity_seconds: Option<u32>,
    /// `internalTrafficPolicy: Local`: backends of this node only.
    pub node_local: bool,
    /// Its own labels.
    pub labels: BTreeMap<String, String>,
    /// The labels of the pods behind it; empty for a service whose backends somebody else states.
    pub selector: BTreeMap<String, String>,
}

/// A peer's service as the peer exported it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteService {
    /// Cluster id that the value states; it counts only while it is the peer's.
    pub cluster_id: u16,
    /// The peer shares its backends. `false` is as good as a deletion.
    pub shared: bool,
    /// The peer holds it for global.
    pub global: bool,
    /// The peer's ready-or-serving backends.
    pub backends: Vec<Backend>,
}

/// A part of a peer's service, from peers that export endpoint slices (1.20 and later).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteSlice {
    /// Cluster id that the value states; it counts only while it is the peer's.
    pub cluster_id: u16,
    /// Service that the slice belongs to.
    pub service: ServiceName,
    /// Its endpoints that are ready or serving.
    pub backends: Vec<Backend>,
}

/// A node of any cluster.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// Cluster id that the value states; it counts only while it is the cluster's.
    pub cluster_id: u16,
    /// Addresses of the node itself. The first internal one of a family is the tunnel's endpoint.
    pub addresses: Vec<NodeAddress>,
    /// Pod ranges of the node.
    pub pod_cidrs: Vec<IpNet>,
    /// Address that answers health probes, per family.
    pub health: Vec<IpAddr>,
    /// Address of the node's ingress, per family.
    pub ingress: Vec<IpAddr>,
    /// Encryption key index: 0 plain, 255 WireGuard.
    pub encryption_key: u8,
    /// Its WireGuard key.
    pub wireguard_key: WireguardKey,
}

/// What a node publishes as its WireGuard public key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WireguardKey {
    /// Nothing.
    #[default]
    None,
    /// Something that is no key.
    Invalid,
    /// A key, not all zero.
    Key(PublicKey),
}

impl Node {
    /// All its addresses.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.addresses.iter().map(|address| address.ip)
    }

    /// Where packets to the node's pods of that family are sent: an internal address, of the pods' family if there
    /// is one.
    pub fn tunnel_endpoint(&self, ipv4: bool) -> Option<IpAddr> {
        let internal = || self.addresses.iter().filter(|address| address.internal).map(|address| address.ip);
        internal().find(|ip| ip.is_ipv4() == ipv4).or_else(|| internal().next())
    }
}

/// An address of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeAddress {
    /// The address.
    pub ip: IpAddr,
    /// Reachable inside the cluster's network (Kubernetes' `InternalIP`).
    pub internal: bool,
}

/// A pod's address, or a prefix, with its identity.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Endpoint {
    /// Numeric identity as its cluster states it.
    pub identity: u32,
    /// Node that it runs on.
    pub host: Option<IpAddr>,
    /// Encryption key index: 0 plain, 255 WireGuard.
    pub encryption_key: u8,
    /// The pod's ports that have names; none if it has none.
    pub named_ports: Option<Arc<NamedPorts>>,
}

/// What a cluster says about itself, and whether the own cluster is about to let it go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClusterConfig {
    /// 1..=511.
    pub id: u16,
    /// Its services come as endpoint slices alone.
    pub slices_only: bool,
    /// It is being disconnected: no new connection goes to its backends, and what it has said stays for those that are
    /// open.
    pub draining: bool,
}
