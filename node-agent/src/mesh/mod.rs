//! The state of the mesh as this node knows it: a pure state machine. Events in, the names of what may have changed
//! out. It has no I/O and no clock; the cost of an event is the size of what it changes.
//!
//! The state is a function of the **set** of facts, not of their order: a fact that cannot count yet (its cluster has
//! not described itself) is kept and counts as soon as it can. The one exception is deliberate: of two clusters that
//! claim the same id, the one that was there first keeps it.

mod cluster;
pub mod event;
pub mod fact;
mod own;
mod prefix;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use self::cluster::{Cluster, ClusterIds};
pub use self::event::{MeshEvent, Resource};
use self::fact::{
    Backend, ClusterConfig, Endpoint, Fact, LocalService, Node, Provenance, RemoteService, RemoteSlice,
    ServiceName,
};
use self::own::OwnRanges;
use self::prefix::Prefixes;
pub use self::prefix::{Claim, Claimant, Kind};

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
    own_ranges: OwnRanges,
}

/// What may have changed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Services whose frontends or backends may be others now.
    pub services: HashSet<ServiceName>,
    /// Prefixes about which something else may hold now.
    pub prefixes: HashSet<IpNet>,
    /// A section has been read whole: what was kept for its sake can go.
    pub synced: bool,
}

impl Changes {
    /// Nothing at all.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && self.prefixes.is_empty() && !self.synced
    }
}

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
    /// A peer speaks about an address of the own cluster.
    #[error(
        "cluster {cluster} makes a statement about {prefix}, which is inside a pod range of this cluster; it is left out"
    )]
    ForeignPrefix {
        /// The origin.
        cluster: Arc<str>,
        /// The prefix.
        prefix: IpNet,
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
            own_ranges: OwnRanges::default(),
        }
    }

    /// Who this agent is.
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// Takes in one event and adds to `changes` what it may have changed.
    ///
    /// # Errors
    /// Why the fact does not count. It is kept all the same, and counts once the reason is gone.
    pub fn apply(&mut self, event: MeshEvent, at: Provenance, changes: &mut Changes) -> Result<(), Refusal> {
        match event {
            MeshEvent::Cluster { cluster, config } => {
                if cluster == self.own.cluster {
                    return Ok(());
                }
                let number = self.number(&cluster, at);
                self.cluster_described(number, &cluster, Fact { value: config, provenance: at }, changes)
            }
            MeshEvent::ClusterRemoved { cluster } => {
                self.cluster_removed(&cluster, changes);
                Ok(())
            }
            MeshEvent::Node { cluster, name, node } => {
                let number = self.number(&cluster, at);
                self.node(number, &cluster, name, node, at, changes)
            }
            MeshEvent::Endpoint { cluster, prefix, endpoint } => {
                let number = self.number(&cluster, at);
                self.endpoint(number, &cluster, prefix.trunc(), endpoint, at, changes)
            }
            MeshEvent::Identity { cluster, id, labels } => {
                let number = self.number(&cluster, at);
                self.identity(number, cluster, id, labels)
            }
            MeshEvent::RemoteService { cluster, name, service } => {
                let number = self.number(&cluster, at);
                changes.services.insert(name.clone());
                let stated = service.as_ref().map(|service| service.cluster_id);
                let what = || format!("service {name}");
                let verdict = stated.map_or(Ok(()), |stated| self.check_id(number, &cluster, stated, what));
                let fact = service.map(|value| Fact { value, provenance: at });
                self.change_remote(number, name, |remote| remote.service = fact);
                verdict
            }
            MeshEvent::RemoteSlice { cluster, name, slice } => {
                let number = self.number(&cluster, at);
                let stated = slice.as_ref().map(|slice| slice.cluster_id);
                let what = || format!("endpoint slice {name}");
                let verdict = stated.map_or(Ok(()), |stated| self.check_id(number, &cluster, stated, what));
                self.slice(number, name, slice.map(|value| Fact { value, provenance: at }), changes);
                verdict
            }
            MeshEvent::LocalService { name, service } => {
                self.number(&self.own.cluster.clone(), at);
                changes.services.insert(name.clone());
                let fact = service.map(|value| Fact { value, provenance: at });
                if fact.is_some() {
                    self.clusters[usize::from(OWN)].services.insert(name.clone());
                } else {
                    self.clusters[usize::from(OWN)].services.remove(&name);
                }
                self.change_service(name, |facts| facts.local = fact);
                Ok(())
            }
            MeshEvent::Synced { cluster, resource } => {
                let number = self.number(&cluster, at);
                changes.synced |= self.clusters[usize::from(number)].synced.insert(resource);
                Ok(())
            }
        }
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

    /// Names of all services of the own cluster.
    pub fn local_services(&self) -> impl Iterator<Item = &ServiceName> {
        self.clusters[usize::from(OWN)].services.iter()
    }

    /// What holds about a prefix, or nothing.
    pub fn resolve(&self, prefix: IpNet) -> Option<Resolved> {
        let barred = self.own_ranges.covers(prefix);
        self.prefixes
            .about(prefix)
            .filter_map(|(by, claim)| Some((by, claim, self.effective_id(by, claim)?)))
            .filter(|(by, ..)| by.cluster == OWN || !barred)
            .min_by(|(a, _, a_id), (b, _, b_id)| {
                let rank = |by: &Claimant, id: u16| (by.cluster != OWN, id, by.kind);
                rank(a, *a_id).cmp(&rank(b, *b_id)).then_with(|| a.node.cmp(&b.node))
            })
            .map(|(by, claim, id)| self.resolved(by, claim, id))
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

/// Taking in events.
impl Mesh {
    fn number(&mut self, cluster: &Arc<str>, at: Provenance) -> u16 {
        let number = match self.numbers.get(cluster) {
            Some(number) => *number,
            None => {
                // Names of peers come from the own gateway, which knows at most 511 of them at a time; numbers of
                // removed ones are kept for when they come back.
                let number = u16::try_from(self.clusters.len()).unwrap_or(u16::MAX);
                self.clusters.push(Cluster::default());
                self.numbers.insert(cluster.clone(), number);
                number
            }
        };
        self.clusters[usize::from(number)].latest = Some(at);
        number
    }

    fn cluster_described(
        &mut self,
        number: u16,
        name: &Arc<str>,
        config: Fact<ClusterConfig>,
        changes: &mut Changes,
    ) -> Result<(), Refusal> {
        let cluster = &mut self.clusters[usize::from(number)];
        let id = config.value.id;
        let before = (cluster.id, cluster.slices_only());
        cluster.config = Some(config);
        if cluster.id != Some(id)
            && let Some(old) = cluster.id.take()
        {
            self.ids.release(old, name);
        }
        let held = self.ids.take(id, name);
        cluster.id = held.then_some(id);
        if before != (cluster.id, cluster.slices_only()) {
            self.everything_of(number, changes);
            // The id that was let go may be the one that another cluster waits for.
            self.settle_waiting(changes);
            changes.synced = true;
        }
        if held {
            return Ok(());
        }
        let holder = self.ids.holder(id).cloned().unwrap_or_else(|| Arc::from(""));
        Err(Refusal::IdTaken { cluster: name.clone(), id, holder })
    }

    /// Gives ids that have come free to the clusters that claim them, by name.
    fn settle_waiting(&mut self, changes: &mut Changes) {
        let mut waiting: Vec<_> = self
            .numbers
            .iter()
            .filter_map(|(name, number)| {
                let cluster = &self.clusters[usize::from(*number)];
                let id = cluster.config.as_ref()?.value.id;
                cluster.id.is_none().then(|| (name.clone(), *number, id))
            })
            .collect();
        waiting.sort();
        for (name, number, id) in waiting {
            if self.ids.take(id, &name) {
                self.clusters[usize::from(number)].id = Some(id);
                self.everything_of(number, changes);
            }
        }
    }

    fn cluster_removed(&mut self, name: &Arc<str>, changes: &mut Changes) {
        let Some(&number) = self.numbers.get(name) else { return };
        if number == OWN {
            return;
        }
        self.everything_of(number, changes);
        let cluster = std::mem::take(&mut self.clusters[usize::from(number)]);
        for service in cluster.services {
            self.change_service(service, |facts| {
                facts.remote.remove(&number);
            });
        }
        let gone: Vec<_> = self
            .prefixes
            .all()
            .filter(|(_, by, _)| by.cluster == number)
            .map(|(prefix, by, _)| (prefix, by.clone()))
            .collect();
        for (prefix, by) in gone {
            self.prefixes.remove(prefix, by);
        }
        if let Some(id) = cluster.id {
            self.ids.release(id, name);
            self.settle_waiting(changes);
        }
        changes.synced = true;
    }

    /// Marks everything that a cluster has said as changed. Looks through the world, but only when there is something.
    fn everything_of(&self, number: u16, changes: &mut Changes) {
        let cluster = &self.clusters[usize::from(number)];
        changes.services.extend(cluster.services.iter().cloned());
        if cluster.endpoints + cluster.nodes.len() > 0 {
            let of_cluster = self.prefixes.all().filter(|(_, by, _)| by.cluster == number);
            changes.prefixes.extend(of_cluster.map(|(prefix, ..)| prefix));
        }
    }

    fn node(
        &mut self,
        number: u16,
        cluster: &Arc<str>,
        name: Arc<str>,
        node: Option<Node>,
        at: Provenance,
        changes: &mut Changes,
    ) -> Result<(), Refusal> {
        let own_node = number == OWN && name == self.own.node;
        let verdict = node.as_ref().map_or(Ok(()), |node| {
            self.check_id(number, cluster, node.cluster_id, || format!("node {name}"))
        });
        let nodes = &mut self.clusters[usize::from(number)].nodes;
        let old = match &node {
            Some(node) => nodes.insert(name.clone(), Fact { value: node.clone(), provenance: at }),
            None => nodes.remove(&name),
        };
        let claimant = |kind| Claimant { cluster: number, kind, node: name.clone() };
        for (prefix, kind, _) in old.iter().flat_map(|old| node_claims(&old.value, old.provenance)) {
            changes.prefixes.insert(prefix);
            self.prefixes.remove(prefix, claimant(kind));
        }
        for (prefix, kind, claim) in node.iter().flat_map(|node| node_claims(node, at)) {
            changes.prefixes.insert(prefix);
            self.prefixes.put(prefix, claimant(kind), claim);
        }
        if number == OWN {
            let old = old.as_ref().map(|old| &old.value).filter(|old| old.cluster_id == self.own.id);
            let new = node.as_ref().filter(|new| new.cluster_id == self.own.id);
            let ranges = |node: Option<&Node>| node.map(|node| node.pod_cidrs.clone()).unwrap_or_default();
            for range in self.own_ranges.exchange(&ranges(old), &ranges(new)) {
                self.prefixes_within(range, changes);
            }
            let addresses = |node: Option<&Node>| {
                node.map(|node| node.addresses.iter().map(|address| address.ip).collect::<BTreeSet<_>>())
                    .unwrap_or_default()
            };
            if own_node && self.own_ranges.set_node_addresses(addresses(new)) {
                self.everything_of(OWN, changes);
            }
        }
        verdict
    }

    fn endpoint(
        &mut self,
        number: u16,
        cluster: &Arc<str>,
        prefix: IpNet,
        endpoint: Option<Endpoint>,
        at: Provenance,
        changes: &mut Changes,
    ) -> Result<(), Refusal> {
        changes.prefixes.insert(prefix);
        let by = Claimant { cluster: number, kind: Kind::Endpoint, node: Arc::from("") };
        let Some(endpoint) = endpoint else {
            if self.prefixes.remove(prefix, by).is_some() {
                self.clusters[usize::from(number)].endpoints -= 1;
            }
            return Ok(());
        };
        let claim = Claim {
            identity: endpoint.identity,
            host: endpoint.host,
            encryption_key: endpoint.encryption_key,
            cluster_id: 0,
            provenance: at,
        };
        if self.prefixes.put(prefix, by, claim).is_none() {
            self.clusters[usize::from(number)].endpoints += 1;
        }
        if number != OWN && self.own_ranges.covers(prefix) {
            return Err(Refusal::ForeignPrefix { cluster: cluster.clone(), prefix });
        }
        self.check_identity(number, cluster, endpoint.identity, || format!("address {prefix}"))
    }

    fn identity(
        &mut self,
        number: u16,
        cluster: Arc<str>,
        id: u32,
        labels: Option<Arc<str>>,
    ) -> Result<(), Refusal> {
        let identities = &mut self.clusters[usize::from(number)].identities;
        let Some(labels) = labels else {
            identities.remove(&id);
            return Ok(());
        };
        identities.insert(id, labels);
        self.check_identity(number, &cluster, id, || format!("identity {id}"))
    }

    fn slice(
        &mut self,
        number: u16,
        name: ServiceName,
        slice: Option<Fact<RemoteSlice>>,
        changes: &mut Changes,
    ) {
        let slices = &mut self.clusters[usize::from(number)].slices;
        let old = match &slice {
            Some(slice) => slices.insert(name.clone(), slice.value.service.clone()),
            None => slices.remove(&name),
        };
        if let Some(old) = old {
            changes.services.insert(old.clone());
            self.change_remote(number, old, |remote| {
                remote.slices.remove(&name);
            });
        }
        if let Some(slice) = slice {
            let service = slice.value.service.clone();
            changes.services.insert(service.clone());
            self.change_remote(number, service, |remote| {
                remote.slices.insert(name, slice);
            });
        }
    }

    fn change_remote(&mut self, number: u16, name: ServiceName, change: impl FnOnce(&mut RemoteFacts)) {
        let facts = self.services.entry(name.clone()).or_default();
        let remote = facts.remote.entry(number).or_default();
        change(remote);
        let empty = remote.service.is_none() && remote.slices.is_empty();
        if empty {
            facts.remote.remove(&number);
            self.clusters[usize::from(number)].services.remove(&name);
        } else {
            self.clusters[usize::from(number)].services.insert(name.clone());
        }
        if facts.local.is_none() && facts.remote.is_empty() {
            self.services.remove(&name);
        }
    }

    fn change_service(&mut self, name: ServiceName, change: impl FnOnce(&mut ServiceFacts)) {
        let facts = self.services.entry(name.clone()).or_default();
        change(facts);
        if facts.local.is_none() && facts.remote.is_empty() {
            self.services.remove(&name);
        }
    }

    fn prefixes_within(&self, range: IpNet, changes: &mut Changes) {
        let within = self.prefixes.within(range);
        changes.prefixes.extend(within);
    }

    fn check_id(
        &self,
        number: u16,
        cluster: &Arc<str>,
        stated: u16,
        what: impl FnOnce() -> String,
    ) -> Result<(), Refusal> {
        match self.clusters[usize::from(number)].id {
            Some(id) if id != stated => {
                Err(Refusal::WrongClusterId { cluster: cluster.clone(), what: what(), stated, id })
            }
            _ => Ok(()),
        }
    }

    fn check_identity(
        &self,
        number: u16,
        cluster: &Arc<str>,
        identity: u32,
        what: impl FnOnce() -> String,
    ) -> Result<(), Refusal> {
        match self.clusters[usize::from(number)].id {
            Some(id) if !self.owns_identity(id, identity) => {
                Err(Refusal::ForeignIdentity { cluster: cluster.clone(), what: what(), identity })
            }
            _ => Ok(()),
        }
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

    fn resolved(&self, by: &Claimant, claim: &Claim, id: u16) -> Resolved {
        let own = by.cluster == OWN;
        let own_node = own && by.node == self.own.node && by.kind != Kind::Endpoint;
        let identity = match claim.identity {
            reserved::REMOTE_NODE if own_node => reserved::HOST,
            // Only this node is the host here.
            reserved::HOST if !own => reserved::REMOTE_NODE,
            other => other,
        };
        let here = |host: &IpAddr| own_node || (own && self.own_ranges.is_node_address(*host));
        let host = claim.host.filter(|host| !here(host));
        Resolved { identity, host, encryption_key: claim.encryption_key, cluster: if own { 0 } else { id } }
    }

    fn remote_view<'a>(&'a self, number: u16, remote: &'a RemoteFacts) -> Option<RemoteView<'a>> {
        let cluster = &self.clusters[usize::from(number)];
        let cluster_id = cluster.id?;
        if cluster.slices_only() {
            let slices = || remote.slices.values().filter(|slice| slice.value.cluster_id == cluster_id);
            slices().next()?;
            let backends = slices().flat_map(|slice| &slice.value.backends).collect();
            return Some(RemoteView { cluster_id, backends });
        }
        let service = &remote.service.as_ref()?.value;
        let counts = service.cluster_id == cluster_id && service.shared && service.global;
        counts.then(|| RemoteView { cluster_id, backends: service.backends.iter().collect() })
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
        }
    }
}

/// What a node says about prefixes.
fn node_claims(node: &Node, at: Provenance) -> impl Iterator<Item = (IpNet, Kind, Claim)> + '_ {
    let claim = move |identity, host, encryption_key| Claim {
        identity,
        host,
        encryption_key,
        cluster_id: node.cluster_id,
        provenance: at,
    };
    let endpoint = |ip: IpAddr| node.tunnel_endpoint(ip.is_ipv4());
    let addresses = node.addresses.iter().map(move |address| {
        (IpNet::from(address.ip), Kind::NodeAddress, claim(reserved::REMOTE_NODE, None, 0))
    });
    let key = node.encryption_key;
    let health = node
        .health
        .iter()
        .map(move |ip| (IpNet::from(*ip), Kind::Health, claim(reserved::HEALTH, endpoint(*ip), key)));
    let ingress = node
        .ingress
        .iter()
        .map(move |ip| (IpNet::from(*ip), Kind::Ingress, claim(reserved::INGRESS, endpoint(*ip), key)));
    let ranges = node.pod_cidrs.iter().map(move |range| {
        (range.trunc(), Kind::PodCidr, claim(reserved::WORLD, endpoint(range.addr()), key))
    });
    addresses.chain(health).chain(ingress).chain(ranges)
}

#[cfg(test)]
mod tests;
