//! What can happen. Every event states one fact whole, so that events may come in any order and any number of times.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_policy::{Parsed, PolicyName};

use crate::policy::LocalEndpoint;

use super::fact::{ClusterConfig, Endpoint, LocalService, Node, RemoteService, RemoteSlice, ServiceName};

/// One change. `None` is a deletion.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MeshEvent {
    /// A peer describes itself, or is about to be let go. A vanished description alone changes nothing: what is known of
    /// the peer stays.
    Cluster {
        /// The peer.
        cluster: Arc<str>,
        /// What it says.
        config: ClusterConfig,
    },
    /// A peer has left the mesh; everything known of it goes.
    ClusterRemoved {
        /// The peer.
        cluster: Arc<str>,
    },
    /// A node, of the own cluster too.
    Node {
        /// Its cluster.
        cluster: Arc<str>,
        /// Its name.
        name: Arc<str>,
        /// Its state.
        node: Option<Node>,
    },
    /// An address or prefix with an identity, of the own cluster too.
    Endpoint {
        /// Its cluster.
        cluster: Arc<str>,
        /// The address or prefix.
        prefix: IpNet,
        /// Its identity and place.
        endpoint: Option<Endpoint>,
    },
    /// The labels of an identity, of the own cluster too.
    Identity {
        /// Its cluster.
        cluster: Arc<str>,
        /// Its number.
        id: u32,
        /// `source:key=value;` for each label, in order.
        labels: Option<Arc<str>>,
    },
    /// A service of a peer.
    RemoteService {
        /// The peer.
        cluster: Arc<str>,
        /// The service.
        name: ServiceName,
        /// Its state.
        service: Option<RemoteService>,
    },
    /// An endpoint slice of a peer.
    RemoteSlice {
        /// The peer.
        cluster: Arc<str>,
        /// Namespace and name of the slice (not of the service).
        name: ServiceName,
        /// Its state.
        slice: Option<RemoteSlice>,
    },
    /// A service of the own cluster.
    LocalService {
        /// The service.
        name: ServiceName,
        /// Its state.
        service: Option<LocalService>,
    },
    /// A network policy of the own cluster.
    Policy {
        /// The policy.
        name: PolicyName,
        /// What it says, understood.
        policy: Option<Parsed>,
    },
    /// A namespace of the own cluster.
    Namespace {
        /// Its name.
        name: Arc<str>,
        /// Its labels.
        labels: Option<BTreeMap<String, String>>,
    },
    /// All addresses of this very node.
    HostAddresses {
        /// Those of its interfaces that mean something beyond it.
        addresses: BTreeSet<IpAddr>,
    },
    /// The pod at an interface of this node.
    LocalEndpoint {
        /// Index of the host's side of the pod's interface.
        interface: u32,
        /// The pod.
        pod: Option<LocalEndpoint>,
    },
    /// Everything that a cluster had of a kind has been reported once.
    Synced {
        /// The cluster.
        cluster: Arc<str>,
        /// The kind.
        resource: Resource,
    },
}

/// The kinds of facts, as the store groups them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Resource {
    /// Which peers exist and what they say of themselves.
    ClusterConfigs,
    /// Nodes.
    Nodes,
    /// Addresses and their identities.
    Endpoints,
    /// Identities and their labels.
    Identities,
    /// Services.
    Services,
    /// Endpoint slices.
    Slices,
    /// Network policies; of the own cluster only.
    Policies,
    /// Namespaces; of the own cluster only.
    Namespaces,
}

impl Resource {
    /// Lower-case name for logs, metrics and status.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterConfigs => "cluster-configs",
            Self::Nodes => "nodes",
            Self::Endpoints => "endpoints",
            Self::Identities => "identities",
            Self::Services => "services",
            Self::Slices => "endpointslices",
            Self::Policies => "policies",
            Self::Namespaces => "namespaces",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
