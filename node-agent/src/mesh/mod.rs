//! The state of the mesh as this node knows it: a pure state machine. Events in, the names of what may have changed
//! out. It has no I/O and no clock; the cost of an event is the size of what it changes.
//!
//! The state is a function of the **set** of facts, not of their order: a fact that cannot count yet (its cluster has
//! not described itself) is kept and counts as soon as it can. The two exceptions are deliberate: of two clusters that
//! claim the same id, or ranges that overlap, the one that was there first keeps it.

mod cluster;
pub mod event;
pub mod fact;
mod intake;
mod named_ports;
mod prefix;
mod ranges;
mod refusal;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_policy::NamedPorts;

use self::cluster::{Cluster, ClusterIds};
pub use self::event::{MeshEvent, Resource};
use self::fact::{Backend, Fact, LocalService, Node, Provenance, RemoteService, RemoteSlice, ServiceName};
use self::named_ports::NamedPortTable;
use self::prefix::Prefixes;
pub use self::prefix::{Claim, Claimant, Kind};
use self::ranges::Ranges;
pub use self::refusal::Refusal;

/// Identities below this mean the same in every cluster.
const FIRST_CLUSTER_IDENTITY: u32 = 256;
const OWN: u16 = 0;

/// Reserved identities.
pub mod reserved {
    /// This very node.
    pub const HOST: u32 = 1;
    /// Outside of the mesh.
    pub const WORLD: u32 = 2;
    /// Health probes.
    pub const HEALTH: u32 = 4;
    /// Another node of the mesh.
    pub const REMOTE_NODE: u32 = 6;
    /// A node's ingress.
    pub const INGRESS: u32 = 8;
    /// Outside of the mesh, over IPv4.
    pub const WORLD_IPV4: u32 = 9;
    /// Outside of the mesh, over IPv6.
    pub const WORLD_IPV6: u32 = 10;
}

/// Who this agent is.
#[derive(Clone, Debug)]
pub struct Own {
    /// Name of its cluster.
    pub cluster: Arc<str>,
    /// Id of its cluster, 1..=511.
    pub id: u16,
    /// Name of its node.
    pub node: Arc<str>,
    /// Bits of an identity that belong to the cluster alone: 16, or 15 in meshes of up to 511 clusters.
    pub identity_shift: u32,
}

/// Everything known, by origin.
#[derive(Debug)]
pub struct Mesh {
    own: Own,
    clusters: Vec<Cluster>,
    numbers: HashMap<Arc<str>, u16>,
    ids: ClusterIds,
    services: HashMap<ServiceName, ServiceFacts>,
    prefixes: Prefixes,
    ranges: Ranges,
    /// Addresses of the own node.
    own_addresses: BTreeSet<IpAddr>,
    /// Ranges in which pods live, whether anything is known of them or not.
    strict_ranges: BTreeSet<IpNet>,
    named_ports: NamedPortTable,
    /// Nodes of a cluster by address; more than one while an address passes from node to node.
    hosts: HashMap<(u16, IpAddr), BTreeSet<Arc<str>>>,
}

/// What may have changed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Services whose frontends or backends may be others now.
    pub services: HashSet<ServiceName>,
    /// Prefixes about which something else may hold now.
    pub prefixes: HashSet<IpNet>,
    /// Identities whose labels or named ports may be others now.
    pub identities: HashSet<u32>,
    /// Nodes that may be others now.
    pub nodes: HashSet<NodeId>,
    /// A section has been read whole: what was kept for its sake can go.
    pub synced: bool,
}

impl Changes {
    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
            && self.prefixes.is_empty()
            && self.identities.is_empty()
            && self.nodes.is_empty()
            && !self.synced
    }
}

/// A node of any cluster.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId {
    /// Number of its cluster, as the mesh counts them: 0 is the own one.
    pub(crate) cluster: u16,
    /// Its name.
    pub name: Arc<str>,
}

/// A node that counts.
#[derive(Clone, Copy, Debug)]
pub struct NodeView<'a> {
    /// Name of its cluster.
    pub cluster: &'a Arc<str>,
    /// Id of its cluster.
    pub cluster_id: u16,
    /// Whether it is of the own cluster.
    pub own_cluster: bool,
    /// Whether it is this very node.
    pub own: bool,
    /// What it says of itself.
    pub node: &'a Node,
}

/// Whose a prefix is: the node that packets to it go to, and that may send from it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// What this node says of itself: one of its addresses or pod ranges.
    Node(NodeId, Kind),
    /// A pod behind an address of one of its cluster's nodes; that node, once it is known.
    Pod {
        /// The cluster by number, and the node's address.
        host: (u16, IpAddr),
        /// The node.
        node: Option<NodeId>,
    },
}

#[derive(Debug, Default)]
struct ServiceFacts {
    local: Option<Fact<LocalService>>,
    remote: BTreeMap<u16, RemoteFacts>,
}

#[derive(Debug, Default)]
struct RemoteFacts {
    service: Option<Fact<RemoteService>>,
    slices: BTreeMap<ServiceName, Fact<RemoteSlice>>,
}

/// A service of the own cluster with what of other clusters counts.
#[derive(Debug)]
pub struct ServiceView<'a> {
    /// The own cluster's service.
    pub local: &'a LocalService,
    /// Peers that share theirs, by ascending cluster id.
    pub remotes: Vec<RemoteView<'a>>,
}

/// A peer's part of a service.
#[derive(Debug)]
pub struct RemoteView<'a> {
    /// The peer's id.
    pub cluster_id: u16,
    /// It is being disconnected: its backends serve only while no others do.
    pub draining: bool,
    /// Its backends.
    pub backends: Vec<&'a Backend>,
}

/// What holds about a prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// Numeric identity.
    pub identity: u32,
    /// Node to reach it through; none when it is on this node, or is a node.
    pub host: Option<IpAddr>,
    /// Encryption key index.
    pub encryption_key: u8,
    /// Cluster id of the origin; 0 is the own cluster.
    pub cluster: u16,
}

/// What is known of a cluster, in numbers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterSummary {
    /// Its name.
    pub name: Arc<str>,
    /// The own cluster.
    pub own: bool,
    /// Its id, once known and held by it.
    pub id: Option<u16>,
    /// Nodes.
    pub nodes: usize,
    /// Addresses and prefixes with an identity.
    pub endpoints: usize,
    /// Identities.
    pub identities: usize,
    /// Services.
    pub services: usize,
    /// The newest revision of the gateway's store that carried something of it, and when that arrived.
    pub latest: Option<Provenance>,
    /// Kinds that have been read whole.
    pub synced: BTreeSet<Resource>,
    /// It is being disconnected.
    pub draining: bool,
}

impl Mesh {
    /// A mesh of which nothing is known but the own cluster's name and id.
    pub fn new(own: Own) -> Self {
        let ids = ClusterIds::new(&own.cluster, own.id);
        let numbers = HashMap::from([(own.cluster.clone(), OWN)]);
        let first = Cluster { id: Some(own.id), ..Cluster::default() };
        Self {
            own,
            clusters: vec![first],
            numbers,
            ids,
            services: HashMap::new(),
            prefixes: Prefixes::default(),
            ranges: Ranges::default(),
            own_addresses: BTreeSet::new(),
            strict_ranges: BTreeSet::new(),
            named_ports: NamedPortTable::default(),
            hosts: HashMap::new(),
        }
    }

    /// Who this agent is.
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// The own cluster's service of that name with what peers add to it; none when the own cluster has no such service.
    pub fn service(&self, name: &ServiceName) -> Option<ServiceView<'_>> {
        let facts = self.services.get(name)?;
        let local = &facts.local.as_ref()?.value;
        let mut remotes: Vec<_> = if local.global {
            facts.remote.iter().filter_map(|(number, remote)| self.remote_view(*number, remote)).collect()
        } else {
            Vec::new()
        };
        remotes.sort_by_key(|remote| remote.cluster_id);
        Some(ServiceView { local, remotes })
    }

    /// The own cluster's service of that name, as it is.
    pub fn local_service(&self, name: &ServiceName) -> Option<&LocalService> {
        Some(&self.services.get(name)?.local.as_ref()?.value)
    }

    /// The labels of an identity, `source:key=value;` for each, as the cluster states them that holds its number. Reserved
    /// identities have none.
    pub fn identity(&self, id: u32) -> Option<&Arc<str>> {
        let number = self.holder_of(id)?;
        self.clusters[usize::from(number)].identities.get(&id)
    }

    /// The named ports of all pods of an identity, as the cluster states them that holds its number.
    pub fn named_ports(&self, id: u32) -> NamedPorts {
        self.holder_of(id).map(|number| self.named_ports.of(number, id)).unwrap_or_default()
    }

    /// The cluster, by number, that holds an identity's number.
    fn holder_of(&self, id: u32) -> Option<u16> {
        let cluster = u16::try_from(id >> self.own.identity_shift).ok()?;
        let number =
            if cluster == self.own.id { OWN } else { *self.numbers.get(self.ids.holder(cluster)?)? };
        (id >= FIRST_CLUSTER_IDENTITY && self.clusters[usize::from(number)].id == Some(cluster))
            .then_some(number)
    }

    /// Names of all services of the own cluster.
    pub fn local_services(&self) -> impl Iterator<Item = &ServiceName> {
        self.clusters[usize::from(OWN)].services.iter()
    }

    /// What holds about a prefix, or nothing.
    pub fn resolve(&self, prefix: IpNet) -> Option<Resolved> {
        self.winner(prefix).map(|(by, claim, id)| self.resolved(by, claim, id))
    }

    /// What holds about the smallest range around a prefix, other than itself.
    pub fn around(&self, prefix: IpNet) -> Option<Resolved> {
        std::iter::successors(prefix.supernet(), IpNet::supernet).find_map(|range| self.resolve(range))
    }

    /// Whose a prefix is, or nothing.
    pub fn place(&self, prefix: IpNet) -> Option<Place> {
        let (by, claim, _) = self.winner(prefix)?;
        if by.kind != Kind::Endpoint {
            let id = NodeId { cluster: by.cluster, name: by.node.clone() };
            return Some(Place::Node(id, by.kind));
        }
        let host = (by.cluster, claim.host?);
        let node = self.nodes_at(host).next();
        Some(Place::Pod { host, node })
    }

    /// The nodes of a cluster, by number, that have an address. The pods behind it are the first one's.
    pub(crate) fn nodes_at(&self, host: (u16, IpAddr)) -> impl Iterator<Item = NodeId> + '_ {
        let names = self.hosts.get(&host).into_iter().flatten();
        names
            .map(move |name| NodeId { cluster: host.0, name: name.clone() })
            .filter(|node| self.node(node).is_some())
    }

    /// A node, if it is known and counts.
    pub fn node(&self, id: &NodeId) -> Option<NodeView<'_>> {
        let cluster = self.clusters.get(usize::from(id.cluster))?;
        let node = &cluster.nodes.get(&id.name)?.value;
        let cluster_id = cluster.id.filter(|held| *held == node.cluster_id)?;
        let own_cluster = id.cluster == OWN;
        let name = if own_cluster { &self.own.cluster } else { self.ids.holder(cluster_id)? };
        Some(NodeView {
            cluster: name,
            cluster_id,
            own_cluster,
            own: own_cluster && id.name == self.own.node,
            node,
        })
    }

    /// This very node, once it is known.
    pub fn own_node(&self) -> Option<NodeView<'_>> {
        self.node(&NodeId { cluster: OWN, name: self.own.node.clone() })
    }

    /// All nodes, whether they count or not. Grows with the world.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.numbers.values().flat_map(|number| {
            let names = self.clusters[usize::from(*number)].nodes.keys();
            names.map(|name| NodeId { cluster: *number, name: name.clone() })
        })
    }

    /// Every prefix inside a range about which something is said.
    pub fn prefixes_within(&self, range: IpNet) -> impl Iterator<Item = IpNet> {
        self.prefixes.within(range)
    }

    /// Says in which ranges pods live, whether anything is known of them or not.
    pub fn set_strict_ranges(&mut self, ranges: &[IpNet]) {
        self.strict_ranges = ranges.iter().map(IpNet::trunc).collect();
    }

    /// Whether this very range is one in which pods live.
    pub fn is_strict_range(&self, range: IpNet) -> bool {
        self.strict_ranges.contains(&range)
    }

    /// Whether a prefix lies in one of them.
    pub fn is_in_strict_range(&self, prefix: IpNet) -> bool {
        // A handful at most: users give them on the command line.
        self.strict_ranges.iter().any(|range| range.contains(&prefix))
    }

    /// The ranges in which pods live.
    pub fn strict_ranges(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.strict_ranges.iter().copied()
    }

    /// Notes, before the first event, that an earlier run held a range for the cluster with this id.
    pub fn remember(&mut self, range: IpNet, cluster_id: u16) {
        self.ranges.remember(range, cluster_id);
    }

    /// Says that the mesh has been read for the first time: of peers whose ranges overlap, the one that was there first
    /// keeps them from now on.
    pub fn settle(&mut self) {
        self.ranges.settle();
    }

    /// All prefixes about which anything is said. Grows with the world.
    pub fn prefixes(&self) -> impl Iterator<Item = IpNet> {
        let mut last = None;
        self.prefixes
            .all()
            .map(|(prefix, ..)| prefix)
            .filter(move |prefix| last.replace(*prefix) != Some(*prefix))
    }

    /// Number of statements about prefixes.
    pub fn claims(&self) -> usize {
        self.prefixes.len()
    }

    /// Name of the cluster that holds this id (0 is the own).
    pub fn cluster_name(&self, id: u16) -> Option<&Arc<str>> {
        if id == 0 { Some(&self.own.cluster) } else { self.ids.holder(id) }
    }

    /// Whether everything that the own cluster had of that kind has been read once.
    pub fn own_synced(&self, resource: Resource) -> bool {
        self.clusters[usize::from(OWN)].synced.contains(&resource)
    }

    /// Whether everything that the cluster with this id had of that kind has been read once. An id that no cluster
    /// holds is not: the relay may only not have reached that peer yet.
    pub fn synced(&self, id: u16, resource: Resource) -> bool {
        if id == 0 || id == self.own.id {
            return self.own_synced(resource);
        }
        match self.ids.holder(id).and_then(|name| self.numbers.get(name)) {
            Some(number) => {
                let cluster = &self.clusters[usize::from(*number)];
                let resource = match resource {
                    Resource::Services if cluster.slices_only() => Resource::Slices,
                    other => other,
                };
                cluster.synced.contains(&resource)
            }
            None => false,
        }
    }

    /// Peers of which not everything of that kind has been read yet.
    pub fn unsynced_peers(&self, resource: Resource) -> Vec<Arc<str>> {
        let unsynced = |(_, number): &(&Arc<str>, &u16)| {
            **number != OWN
                && self.clusters[usize::from(**number)].id.is_some_and(|id| !self.synced(id, resource))
        };
        self.numbers.iter().filter(unsynced).map(|(name, _)| name.clone()).collect()
    }

    /// Every cluster in numbers, the own one first.
    pub fn clusters(&self) -> Vec<ClusterSummary> {
        let mut all: Vec<_> = self.numbers.iter().map(|(name, number)| self.summary(name, *number)).collect();
        all.sort_by(|a, b| b.own.cmp(&a.own).then_with(|| a.name.cmp(&b.name)));
        all
    }
}

/// Looking at what counts.
impl Mesh {
    fn owns_identity(&self, id: u16, identity: u32) -> bool {
        (1..FIRST_CLUSTER_IDENTITY).contains(&identity)
            || identity >> self.own.identity_shift == u32::from(id)
    }

    /// The id under which a statement counts, if it does.
    fn effective_id(&self, by: &Claimant, claim: &Claim) -> Option<u16> {
        let id = self.clusters[usize::from(by.cluster)].id?;
        let counts = match by.kind {
            Kind::Endpoint => self.owns_identity(id, claim.identity),
            _ => claim.cluster_id == id,
        };
        counts.then_some(id)
    }

    /// Of everything said about a prefix, what counts.
    fn winner(&self, prefix: IpNet) -> Option<(&Claimant, &Claim, u16)> {
        let holder = self.holder(prefix);
        self.prefixes
            .about(prefix)
            .filter_map(|(by, claim)| Some((by, claim, self.effective_id(by, claim)?)))
            .filter(|(by, ..)| by.cluster == OWN || holder.is_none_or(|holder| holder == by.cluster))
            .min_by(|(a, _, a_id), (b, _, b_id)| {
                let rank = |by: &Claimant, id: u16| (by.cluster != OWN, id, by.kind);
                rank(a, *a_id).cmp(&rank(b, *b_id)).then_with(|| a.node.cmp(&b.node))
            })
    }

    /// The number of the cluster inside of whose ranges a prefix is.
    fn holder(&self, prefix: IpNet) -> Option<u16> {
        self.ranges.holder(prefix, |cluster, id| self.clusters[usize::from(cluster)].id == Some(id))
    }

    fn resolved(&self, by: &Claimant, claim: &Claim, id: u16) -> Resolved {
        let own = by.cluster == OWN;
        let own_node = own && by.node == self.own.node && by.kind != Kind::Endpoint;
        let identity = match claim.identity {
            reserved::REMOTE_NODE if own_node => reserved::HOST,
            // Only this node is the host here.
            reserved::HOST if !own => reserved::REMOTE_NODE,
            other => other,
        };
        let here = |host: &IpAddr| own_node || (own && self.own_addresses.contains(host));
        let host = claim.host.filter(|host| !here(host));
        Resolved { identity, host, encryption_key: claim.encryption_key, cluster: if own { 0 } else { id } }
    }

    fn remote_view<'a>(&'a self, number: u16, remote: &'a RemoteFacts) -> Option<RemoteView<'a>> {
        let cluster = &self.clusters[usize::from(number)];
        let cluster_id = cluster.id?;
        let draining = cluster.draining();
        if cluster.slices_only() {
            let slices = || remote.slices.values().filter(|slice| slice.value.cluster_id == cluster_id);
            slices().next()?;
            let backends = slices().flat_map(|slice| &slice.value.backends).collect();
            return Some(RemoteView { cluster_id, draining, backends });
        }
        let service = &remote.service.as_ref()?.value;
        let counts = service.cluster_id == cluster_id && service.shared && service.global;
        counts.then(|| RemoteView { cluster_id, draining, backends: service.backends.iter().collect() })
    }

    fn summary(&self, name: &Arc<str>, number: u16) -> ClusterSummary {
        let cluster = &self.clusters[usize::from(number)];
        ClusterSummary {
            name: name.clone(),
            own: number == OWN,
            id: cluster.id,
            nodes: cluster.nodes.len(),
            endpoints: cluster.endpoints,
            identities: cluster.identities.len(),
            services: cluster.services.len(),
            latest: cluster.latest,
            synced: cluster.synced.clone(),
            draining: cluster.draining(),
        }
    }
}

#[cfg(test)]
mod tests;
