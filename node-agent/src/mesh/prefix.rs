//! Who says what about an address. Several may speak about the same one; the answer never depends on who came first.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;

use ipnet::IpNet;

use super::fact::Provenance;

/// Why a prefix is known. The order is the order of precedence within one cluster: what a node says about its own
/// addresses stands above what is said about pods, and a single address above the range it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// An address of a node.
    NodeAddress,
    /// The address where a node answers health probes.
    Health,
    /// The address of a node's ingress.
    Ingress,
    /// A pod, or a prefix with an identity of its own.
    Endpoint,
    /// The pod range of a node.
    PodCidr,
}

/// One statement about a prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    /// Numeric identity as stated.
    pub identity: u32,
    /// Node to reach it through.
    pub host: Option<IpAddr>,
    /// Encryption key index.
    pub encryption_key: u8,
    /// Cluster id that the statement depends on: it counts only while its cluster holds that id. 0 depends on none.
    pub cluster_id: u16,
    /// Since when and from which revision.
    pub provenance: Provenance,
}

/// Who makes a statement.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Claimant {
    /// Number of the cluster, as [`super::Mesh`] counts them.
    pub(super) cluster: u16,
    /// Why.
    pub kind: Kind,
    /// Node that makes it; empty for endpoints.
    pub node: Arc<str>,
}

/// All statements, by prefix.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    claims: BTreeMap<(IpNet, Claimant), Claim>,
}

impl Prefixes {
    pub(super) fn put(&mut self, prefix: IpNet, by: Claimant, claim: Claim) -> Option<Claim> {
        self.claims.insert((prefix, by), claim)
    }

    pub(super) fn remove(&mut self, prefix: IpNet, by: Claimant) -> Option<Claim> {
        self.claims.remove(&(prefix, by))
    }

    /// Everything said about exactly this prefix.
    pub(super) fn about(&self, prefix: IpNet) -> impl Iterator<Item = (&Claimant, &Claim)> {
        let first = Claimant { cluster: 0, kind: Kind::NodeAddress, node: Arc::from("") };
        self.claims
            .range((Bound::Included((prefix, first)), Bound::Unbounded))
            .take_while(move |((of, _), _)| *of == prefix)
            .map(|((_, by), claim)| (by, claim))
    }

    /// Every prefix inside a range about which something is said.
    pub(super) fn within(&self, range: IpNet) -> impl Iterator<Item = IpNet> {
        let first = Claimant { cluster: 0, kind: Kind::NodeAddress, node: Arc::from("") };
        let start = IpNet::new(range.network(), 0).unwrap_or(range);
        self.claims
            .range((Bound::Included((start, first)), Bound::Unbounded))
            .map(|((prefix, _), _)| *prefix)
            .take_while(move |prefix| prefix.addr() <= range.broadcast())
            .filter(move |prefix| range.contains(prefix))
    }

    /// Everything said, in order of address. Grows with the world: for rare events and for people.
    pub(super) fn all(&self) -> impl Iterator<Item = (IpNet, &Claimant, &Claim)> {
        self.claims.iter().map(|((prefix, by), claim)| (*prefix, by, claim))
    }

    pub(super) fn len(&self) -> usize {
        self.claims.len()
    }
}
