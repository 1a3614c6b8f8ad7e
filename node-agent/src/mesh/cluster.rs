//! One cluster of the mesh, and which cluster holds which id.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::event::Resource;
use super::fact::{ClusterConfig, Fact, Node, Provenance, ServiceName};

/// What is known of one cluster, apart from its prefixes and services, which are kept by address and by name.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    pub(super) config: Option<Fact<ClusterConfig>>,
    /// The id that this cluster holds. None while it is unknown, or held by another cluster.
    pub(super) id: Option<u16>,
    pub(super) nodes: HashMap<Arc<str>, Fact<Node>>,
    pub(super) identities: HashMap<u32, Arc<str>>,
    /// Number of prefixes with an endpoint of this cluster.
    pub(super) endpoints: usize,
    /// Services of which the cluster has exported something.
    pub(super) services: HashSet<ServiceName>,
    /// Slice to the service it belonged to last.
    pub(super) slices: HashMap<ServiceName, ServiceName>,
    pub(super) synced: BTreeSet<Resource>,
    /// The newest thing heard of the cluster.
    pub(super) latest: Option<Provenance>,
}

impl Cluster {
    pub(super) fn slices_only(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.value.slices_only)
    }

    pub(super) fn draining(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.value.draining)
    }
}

/// Cluster ids in use. Who holds an id keeps it: a peer that claims another's id gets nothing, and takes nothing away.
#[derive(Debug)]
pub(super) struct ClusterIds {
    holders: HashMap<u16, Arc<str>>,
}

impl ClusterIds {
    pub(super) fn new(own: &Arc<str>, own_id: u16) -> Self {
        Self { holders: HashMap::from([(own_id, own.clone())]) }
    }

    /// Takes the id for `cluster`; says whether it holds it now.
    pub(super) fn take(&mut self, id: u16, cluster: &Arc<str>) -> bool {
        id != 0 && self.holders.entry(id).or_insert_with(|| cluster.clone()) == cluster
    }

    pub(super) fn release(&mut self, id: u16, cluster: &Arc<str>) {
        if self.holders.get(&id) == Some(cluster) {
            self.holders.remove(&id);
        }
    }

    pub(super) fn holder(&self, id: u16) -> Option<&Arc<str>> {
        self.holders.get(&id)
    }
}
