//! What a reader must check before it believes a peer. Pure functions: a key, a value and what is known of the peer in, a
//! verdict out.
//!
//! A peer may lie about itself and about nothing else: nothing passes that names another cluster or uses its identities.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::key::ObjectKey;
use crate::value::{AddressKind, NodeAddress};
use crate::{
    ClusterConfig, ClusterEndpointSlice, ClusterId, ClusterName, ClusterService, IpIdentityPair, Key, Labels,
    MaxConnectedClusters, McsApiServiceSpec, Node, NumericIdentity, ValueError,
};

/// A peer as this cluster knows it: its configured name, and the id it advertised when it was admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteCluster {
    /// The configured name.
    pub name: ClusterName,
    /// The advertised id, found to be free.
    pub id: ClusterId,
    /// How many clusters the mesh is set up for, which decides which identities belong to the peer.
    pub max_connected_clusters: MaxConnectedClusters,
}

/// Why an entry of a peer is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// The value could not be read.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The key is none that a peer has to export.
    #[error("not a key that a cluster exports")]
    NotExported,
    /// The value is about another object than the key.
    #[error("field `{field}` is {found:?}, but the key says {key:?}")]
    KeyMismatch {
        /// The field.
        field: &'static str,
        /// What it holds.
        found: String,
        /// What it should hold.
        key: String,
    },
    /// The entry claims to be another cluster's.
    #[error("it belongs to cluster {found:?}, but comes from {expected:?}")]
    WrongCluster {
        /// The cluster it claims to be of.
        found: String,
        /// The cluster it comes from.
        expected: ClusterName,
    },
    /// The entry carries another cluster's id.
    #[error("its cluster id is {found}, but its cluster advertises {expected}")]
    WrongClusterId {
        /// The id in the entry.
        found: ClusterId,
        /// The id of the peer.
        expected: ClusterId,
    },
    /// An identity outside of what belongs to the peer.
    #[error("identity {id} is not one of cluster {cluster}'s, {first} to {last}")]
    ForeignIdentity {
        /// The identity.
        id: NumericIdentity,
        /// The peer.
        cluster: ClusterName,
        /// First identity of the peer.
        first: NumericIdentity,
        /// Last identity of the peer.
        last: NumericIdentity,
    },
    /// An address that belongs to no pod anywhere: it would lead clients to themselves, or to their host's surroundings.
    #[error(
        "{field}: {address} is unspecified, loopback, link-local or multicast, which no pod or node of another cluster has"
    )]
    SpecialAddress {
        /// Where it was found.
        field: &'static str,
        /// The address.
        address: IpAddr,
    },
    /// A prefix so short that it takes in what cannot be one cluster's.
    #[error(
        "{field}: {prefix} is too large to be one cluster's; /8 (IPv4) and /16 (IPv6) are the largest accepted"
    )]
    BroadPrefix {
        /// Where it was found.
        field: &'static str,
        /// The prefix.
        prefix: IpNet,
    },
    /// An identity without the label that tells its cluster.
    #[error("the label k8s:{label} must be {expected}, but is {found:?}", label = Labels::CLUSTER)]
    ClusterLabel {
        /// The value found, if any.
        found: Option<String>,
        /// The value demanded.
        expected: ClusterName,
    },
}

impl Rejection {
    /// A short, fixed word, fit for a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Value(error) => error.reason(),
            Self::NotExported => "not_exported",
            Self::KeyMismatch { .. } => "key_mismatch",
            Self::WrongCluster { .. } => "wrong_cluster",
            Self::WrongClusterId { .. } => "wrong_cluster_id",
            Self::ForeignIdentity { .. } => "foreign_identity",
            Self::SpecialAddress { .. } => "special_address",
            Self::BroadPrefix { .. } => "broad_prefix",
            Self::ClusterLabel { .. } => "cluster_label",
        }
    }
}

/// Why a cluster cannot be a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// It has this cluster's own id.
    #[error(
        "it has cluster id {0}, which is this cluster's own; ids must be unique in a mesh: change one of them"
    )]
    OwnId(ClusterId),
    /// Its id is beyond what the mesh is set up for.
    #[error(transparent)]
    Id(#[from] crate::InvalidClusterId),
    /// It is set up for another size of mesh, so that the two split identities differently.
    #[error(
        "it is set up for {theirs} connected clusters, this cluster for {ours}; set maxConnectedClusters alike everywhere"
    )]
    MeshSize {
        /// The peer's setting.
        theirs: MaxConnectedClusters,
        /// This cluster's setting.
        ours: MaxConnectedClusters,
    },
    /// The name `default` together with an id.
    #[error("a cluster with an id must not be named \"default\"; give it a name of its own")]
    DefaultName,
}

/// Whether a cluster with this configuration can be a peer of the cluster with id `own`. Ids of other peers are the
/// caller's to compare.
///
/// # Errors
/// As Cilium decides: a mesh of 511 wants the same of every peer, a mesh of 255 only that ids fit.
pub fn cluster_config(
    name: &ClusterName,
    config: &ClusterConfig,
    own: ClusterId,
    ours: MaxConnectedClusters,
) -> Result<RemoteCluster, Incompatible> {
    let theirs = config.capabilities.mesh_size();
    if name.is_default() {
        return Err(Incompatible::DefaultName);
    }
    if ours == MaxConnectedClusters::C511 && theirs != ours {
        return Err(Incompatible::MeshSize { theirs, ours });
    }
    ours.admit(config.id)?;
    if config.id == own {
        return Err(Incompatible::OwnId(own));
    }
    Ok(RemoteCluster { name: name.clone(), id: config.id, max_connected_clusters: ours })
}

/// Decodes what is stored under `key` and checks it.
///
/// # Errors
/// The first thing found wrong.
pub fn entry(key: &Key, value: &[u8], remote: &RemoteCluster) -> Result<(), Rejection> {
    match key {
        Key::Node { .. } => node(key, &Node::decode(value)?, remote),
        Key::Identity { .. } => identity(key, &Labels::decode(value)?, remote),
        Key::Ip { .. } => ip(key, &IpIdentityPair::decode(value)?, remote),
        Key::Service(_) => service(key, &ClusterService::decode(value)?, remote),
        Key::EndpointSlice(_) => endpoint_slice(key, &ClusterEndpointSlice::decode(value)?, remote),
        Key::ServiceExport(_) => service_export(key, &McsApiServiceSpec::decode(value)?, remote),
        _ => Err(Rejection::NotExported),
    }
}

/// Checks a node against its key and its cluster.
///
/// # Errors
/// Another name or cluster than the key's, another cluster id than the advertised, addresses that no node or pod has.
pub fn node(key: &Key, node: &Node, remote: &RemoteCluster) -> Result<(), Rejection> {
    let Key::Node { cluster: key_cluster, name, .. } = key else {
        return Err(Rejection::NotExported);
    };
    cluster(key_cluster, remote)?;
    cluster(&node.cluster, remote)?;
    cluster_id(node.cluster_id, remote)?;
    same("Name", node.name.as_str(), name.as_str())?;
    let routed = |address: &&NodeAddress| {
        matches!(
            address.kind,
            AddressKind::InternalIp | AddressKind::ExternalIp | AddressKind::CiliumInternalIp
        )
    };
    ordinary("IPAddresses", node.addresses.iter().filter(routed).filter_map(NodeAddress::ip))?;
    node.pod_cidrs().try_for_each(|cidr| one_clusters("AllocCIDR", cidr))
}

/// Checks an identity's number and labels.
///
/// # Errors
/// A number that is not the peer's, or labels that do not say that it is the peer's.
pub fn identity(key: &Key, labels: &Labels, remote: &RemoteCluster) -> Result<(), Rejection> {
    let Key::Identity { mirror_of, id } = key else {
        return Err(Rejection::NotExported);
    };
    mirror(mirror_of.as_ref(), remote)?;
    own_identity(*id, remote)?;
    if labels.k8s(Labels::CLUSTER) == Some(remote.name.as_str()) {
        return Ok(());
    }
    let found = labels.get(Labels::CLUSTER).map(|label| format!("{}:{}", label.source, label.value));
    Err(Rejection::ClusterLabel { found: found.map(crate::error::bounded), expected: remote.name.clone() })
}

/// Checks an address and the identity it claims. Reserved identities are every cluster's; use [`effective_identity`]
/// afterwards.
///
/// # Errors
/// Another address than the key's, one that no pod has, or an identity that is neither reserved nor the peer's.
pub fn ip(key: &Key, pair: &IpIdentityPair, remote: &RemoteCluster) -> Result<(), Rejection> {
    let Key::Ip { mirror_of, entry } = key else {
        return Err(Rejection::NotExported);
    };
    mirror(mirror_of.as_ref(), remote)?;
    if pair.entry != *entry {
        same("IP", &pair.entry.to_string(), &entry.to_string())?;
    }
    one_clusters("IP", pair.entry.net())?;
    if pair.id.is_reserved() { Ok(()) } else { own_identity(pair.id, remote) }
}

/// The identity that a remote address counts as: a remote host is a remote node.
pub fn effective_identity(id: NumericIdentity) -> NumericIdentity {
    if id == NumericIdentity::HOST { NumericIdentity::REMOTE_NODE } else { id }
}

/// Checks a service against its key and its cluster.
///
/// # Errors
/// Another namespace, name or cluster than the key's, another cluster id than the advertised, backends that are no pods.
pub fn service(key: &Key, service: &ClusterService, remote: &RemoteCluster) -> Result<(), Rejection> {
    let Key::Service(key) = key else {
        return Err(Rejection::NotExported);
    };
    cluster(&service.cluster, remote)?;
    cluster_id(service.cluster_id, remote)?;
    ordinary("backends", service.backends.keys().copied())?;
    object(key, service.namespace.as_str(), service.name.as_str(), remote)
}

/// Checks an endpoint slice against its key and its cluster.
///
/// # Errors
/// Another namespace, name or cluster than the key's, another cluster id than the advertised, backends that are no pods.
pub fn endpoint_slice(
    key: &Key,
    slice: &ClusterEndpointSlice,
    remote: &RemoteCluster,
) -> Result<(), Rejection> {
    let Key::EndpointSlice(key) = key else {
        return Err(Rejection::NotExported);
    };
    cluster(&slice.cluster, remote)?;
    cluster_id(slice.cluster_id, remote)?;
    ordinary("endpoints", slice.endpoints.iter().flat_map(|endpoint| endpoint.addresses.iter().copied()))?;
    object(key, slice.namespace.as_str(), slice.name.as_str(), remote)
}

/// Checks a service export against its key and its cluster.
///
/// # Errors
/// Another namespace, name or cluster than the key's.
pub fn service_export(
    key: &Key,
    export: &McsApiServiceSpec,
    remote: &RemoteCluster,
) -> Result<(), Rejection> {
    let Key::ServiceExport(key) = key else {
        return Err(Rejection::NotExported);
    };
    cluster(&export.cluster, remote)?;
    object(key, export.namespace.as_str(), export.name.as_str(), remote)
}

fn object(key: &ObjectKey, namespace: &str, name: &str, remote: &RemoteCluster) -> Result<(), Rejection> {
    cluster(&key.cluster, remote)?;
    same("namespace", namespace, key.namespace.as_str())?;
    same("name", name, key.name.as_str())
}

fn mirror(mirror_of: Option<&ClusterName>, remote: &RemoteCluster) -> Result<(), Rejection> {
    mirror_of.map_or(Ok(()), |name| cluster(name, remote))
}

fn cluster(found: &ClusterName, remote: &RemoteCluster) -> Result<(), Rejection> {
    if *found == remote.name {
        return Ok(());
    }
    Err(Rejection::WrongCluster { found: found.to_string(), expected: remote.name.clone() })
}

fn cluster_id(found: ClusterId, remote: &RemoteCluster) -> Result<(), Rejection> {
    if found == remote.id {
        return Ok(());
    }
    Err(Rejection::WrongClusterId { found, expected: remote.id })
}

fn own_identity(id: NumericIdentity, remote: &RemoteCluster) -> Result<(), Rejection> {
    let range = remote.max_connected_clusters.identities(remote.id);
    if range.contains(&id) {
        return Ok(());
    }
    let (first, last) = range.into_inner();
    Err(Rejection::ForeignIdentity { id, cluster: remote.name.clone(), first, last })
}

/// Kubernetes refuses the same addresses as endpoints, so that no honest cluster exports them.
fn ordinary(field: &'static str, mut addresses: impl Iterator<Item = IpAddr>) -> Result<(), Rejection> {
    match addresses.find(|address| is_special(*address)) {
        Some(address) => Err(Rejection::SpecialAddress { field, address }),
        None => Ok(()),
    }
}

fn is_special(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(ip) => {
            ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_multicast()
                || ip.is_broadcast()
        }
        IpAddr::V6(ip) => {
            ip.is_unspecified() || ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast()
        }
    }
}

fn one_clusters(field: &'static str, prefix: IpNet) -> Result<(), Rejection> {
    let shortest = if prefix.addr().is_ipv4() { 8 } else { 16 };
    if prefix.prefix_len() < shortest {
        return Err(Rejection::BroadPrefix { field, prefix });
    }
    ordinary(field, std::iter::once(prefix.addr()))
}

fn same(field: &'static str, found: &str, key: &str) -> Result<(), Rejection> {
    if found == key {
        return Ok(());
    }
    Err(Rejection::KeyMismatch {
        field,
        found: crate::error::bounded(found),
        key: crate::error::bounded(key),
    })
}

#[cfg(test)]
mod tests;
