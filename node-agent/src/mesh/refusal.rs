use std::sync::Arc;

/// Why a fact does not count (for now). It has been kept nevertheless; the rest goes on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Two clusters claim one id.
    #[error(
        "cluster {cluster} claims cluster id {id}, which cluster {holder} holds; give each cluster of the mesh an id of its own"
    )]
    IdTaken {
        /// Who claims.
        cluster: Arc<str>,
        /// What.
        id: u16,
        /// Whose it is.
        holder: Arc<str>,
    },
    /// The value states another cluster id than its cluster does.
    #[error(
        "{what} of cluster {cluster} states cluster id {stated}, but the cluster's id is {id}; it is left out"
    )]
    WrongClusterId {
        /// The origin.
        cluster: Arc<str>,
        /// Object.
        what: String,
        /// In the value.
        stated: u16,
        /// In the cluster's configuration.
        id: u16,
    },
    /// The identity belongs to another cluster.
    #[error(
        "{what} of cluster {cluster} has identity {identity}, which is outside of that cluster's range; it is left out"
    )]
    ForeignIdentity {
        /// The origin.
        cluster: Arc<str>,
        /// Object.
        what: String,
        /// The identity.
        identity: u32,
    },
    /// A peer speaks about an address of another cluster.
    #[error(
        "{what} of cluster {cluster} is inside a pod range or a node address of cluster {holder}; it is left out. Give every cluster of the mesh ranges of its own"
    )]
    ForeignPrefix {
        /// The origin.
        cluster: Arc<str>,
        /// Object.
        what: String,
        /// Whose it is.
        holder: Arc<str>,
    },
}
