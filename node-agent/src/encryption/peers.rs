//! Which WireGuard peers this node should have, as a function of the mesh's state: for every other node of the mesh its
//! key, its endpoint, and the prefixes that packets may come from and go to.
//!
//! A prefix has one owner, the one that [`Mesh::place`] finds. A pod that its node's pod range covers already is left
//! out, so that a peer has a handful of prefixes and a change costs what it touches.
//!
//! A public key names one node. Of several that claim it, one keeps it and the others are refused: nodes of the own
//! cluster before peers', lower cluster ids before higher, names in order. Once the mesh has been read, who was there
//! first comes first; and so does who had it before this agent was started.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_wireguard::config::PublicKey;

use crate::mesh::fact::WireguardKey;
use crate::mesh::{Changes, Kind, Mesh, NodeId, NodeView, Place};

/// The peers that this node should have.
#[derive(Debug, Default)]
pub struct Peers {
    nodes: HashMap<NodeId, Node>,
    /// Prefixes of each node, also of one that is no peer (yet).
    owned: HashMap<NodeId, BTreeSet<IpNet>>,
    prefixes: HashMap<IpNet, Owner>,
    /// Lengths of ranges in use per family.
    lengths: BTreeMap<(bool, u8), usize>,
    /// Prefixes of pods by the address of their node.
    by_host: HashMap<(u16, IpAddr), HashSet<IpNet>>,
    keys: HashMap<PublicKey, BTreeSet<Claim>>,
    own_keys: BTreeSet<PublicKey>,
    /// Keys, and where they were, before this agent was started.
    remembered: HashMap<PublicKey, IpAddr>,
    settled: bool,
    arrivals: u64,
    /// Whether this node has an internal IPv4 address; it is taken to have one until it is known.
    underlay_ipv6_only: bool,
    refused: BTreeSet<NodeId>,
    dirty: BTreeSet<NodeId>,
    news: Vec<RefusedKey>,
}

/// A peer as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer<'a> {
    /// Its key.
    pub key: PublicKey,
    /// Where it is reached.
    pub address: IpAddr,
    /// Its prefixes.
    pub allowed: &'a BTreeSet<IpNet>,
}

/// A key that is not used, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RefusedKey {
    /// The node that publishes it.
    pub node: Arc<str>,
    /// Its cluster.
    pub cluster: Arc<str>,
    /// The key, where it is one.
    pub key: Option<PublicKey>,
    /// Why.
    pub reason: KeyProblem,
}

/// Why a node's key is not used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyProblem {
    /// Text that is no key, or the key of nobody.
    #[error("what it publishes is no WireGuard public key")]
    Invalid,
    /// It is this node's own.
    #[error(
        "it is this node's own key; if the node's disk was copied, delete its wireguard.key and restart its agent"
    )]
    Own,
    /// Another node has it.
    #[error(
        "node {node} of cluster {cluster} has the same key; if a node's disk was copied, delete its wireguard.key and restart its agent"
    )]
    Duplicate {
        /// The node that keeps it.
        node: Arc<str>,
        /// Its cluster.
        cluster: Arc<str>,
    },
}

impl KeyProblem {
    /// A word for a metric's label.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Own => "own",
            Self::Duplicate { .. } => "duplicate",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Node {
    cluster: Arc<str>,
    own: bool,
    key: WireguardKey,
    claim: Option<Claim>,
    addresses: BTreeSet<IpAddr>,
    internal: Vec<IpAddr>,
}

/// The order of precedence among those who claim a key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Claim {
    since: Since,
    of_peer: bool,
    cluster_id: u16,
    node: NodeId,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Since {
    Earlier,
    Start,
    Later(u64),
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Owner {
    node: Option<NodeId>,
    host: Option<(u16, IpAddr)>,
}

impl Peers {
    /// Notes, before the first update, that an earlier run had a peer with this key at this address.
    pub fn remember(&mut self, key: PublicKey, address: IpAddr) {
        self.remembered.insert(key, address);
    }

    /// Says that the mesh has been read for the first time: from now on a key stays with who had it first.
    pub fn settle(&mut self) {
        self.settled = true;
        self.remembered = HashMap::new();
    }

    /// Whether the mesh has been read for the first time.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// Tells the public keys of this node: nobody else may have them.
    pub fn set_own_keys(&mut self, keys: BTreeSet<PublicKey>) {
        let before = std::mem::replace(&mut self.own_keys, keys);
        let changed: Vec<_> = before.symmetric_difference(&self.own_keys).copied().collect();
        for key in changed {
            let claimants: Vec<_> =
                self.keys.get(&key).into_iter().flatten().map(|claim| claim.node.clone()).collect();
            claimants.iter().for_each(|node| self.judge(node));
        }
    }

    /// Takes in what may have changed.
    pub fn update(&mut self, mesh: &Mesh, changes: &Changes) {
        let mut again = Again::default();
        changes.prefixes.iter().for_each(|prefix| again.add(*prefix));
        for id in &changes.nodes {
            self.node_changed(mesh, id, &mut again);
        }
        for range in &again.ranges {
            if self.place(mesh, *range) {
                again.hosts.extend(mesh.prefixes_within(*range).filter(is_host));
            }
        }
        for host in &again.hosts {
            self.place(mesh, *host);
        }
    }

    /// Takes in everything. Grows with the world.
    pub fn update_all(&mut self, mesh: &Mesh) {
        let prefixes = mesh.prefixes().chain(self.prefixes.keys().copied()).collect();
        let nodes = mesh.nodes().chain(self.nodes.keys().cloned()).collect();
        self.update(mesh, &Changes { prefixes, nodes, ..Changes::default() });
    }

    /// The peer that a node should be, if it should be one.
    pub fn peer(&self, id: &NodeId) -> Option<Peer<'_>> {
        static NOTHING: BTreeSet<IpNet> = BTreeSet::new();
        let node = self.nodes.get(id).filter(|node| !node.own)?;
        let WireguardKey::Key(key) = node.key else { return None };
        if self.refused.contains(id) {
            return None;
        }
        let address = self.endpoint(node)?;
        Some(Peer { key, address, allowed: self.owned.get(id).unwrap_or(&NOTHING) })
    }

    /// All nodes that should be peers. Grows with the mesh's nodes.
    pub fn all(&self) -> impl Iterator<Item = (&NodeId, Peer<'_>)> {
        self.nodes.keys().filter_map(|id| Some((id, self.peer(id)?)))
    }

    /// The node that holds a key, with its cluster's name.
    pub fn holder(&self, key: &PublicKey) -> Option<(&NodeId, &Arc<str>)> {
        let holder = &self.keys.get(key)?.first()?.node;
        Some((holder, &self.nodes.get(holder)?.cluster))
    }

    /// Name of a node's cluster.
    pub fn cluster(&self, id: &NodeId) -> Option<&Arc<str>> {
        self.nodes.get(id).map(|node| &node.cluster)
    }

    /// Nodes about which something else should hold than when this was last asked.
    pub fn take_dirty(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.dirty)
    }

    /// The other nodes that publish no key, with their clusters' names. Grows with the mesh's nodes.
    pub fn keyless(&self) -> impl Iterator<Item = (&NodeId, &Arc<str>)> {
        let keyless = |node: &Node| !node.own && node.key == WireguardKey::None;
        self.nodes.iter().filter(move |(_, node)| keyless(node)).map(|(id, node)| (id, &node.cluster))
    }

    /// Keys that have been refused since this was last asked.
    pub fn take_news(&mut self) -> Vec<RefusedKey> {
        std::mem::take(&mut self.news)
    }

    /// All keys that are refused now.
    pub fn refused(&self) -> Vec<RefusedKey> {
        self.refused.iter().filter_map(|id| self.refusal(id)).collect()
    }

    fn node_changed(&mut self, mesh: &Mesh, id: &NodeId, again: &mut Again) {
        let view = mesh.node(id);
        let old = self.nodes.remove(id);
        let new = view.as_ref().map(|view| self.read(id, view, old.as_ref()));
        if old == new {
            if let Some(old) = old {
                self.nodes.insert(id.clone(), old);
            }
            return;
        }
        self.dirty.insert(id.clone());
        let addresses =
            |node: &Option<Node>| node.as_ref().map(|node| node.addresses.clone()).unwrap_or_default();
        let (before, now) = (addresses(&old), addresses(&new));
        if before != now {
            let mut concerned = BTreeSet::from([id.clone()]);
            for address in before.union(&now).map(|address| (id.cluster, *address)) {
                let pods = self.by_host.get(&address);
                pods.into_iter().flatten().for_each(|prefix| again.add(*prefix));
                // While an address passes from node to node, the pods behind it pass between the first two.
                concerned.extend(mesh.nodes_at(address).filter(|other| other != id).take(2));
            }
            let owned = concerned.iter().filter_map(|node| self.owned.get(node)).flatten();
            for range in owned.filter(|prefix| !is_host(prefix)) {
                again.hosts.extend(mesh.prefixes_within(*range).filter(is_host));
            }
        }
        let claimed = |node: &Option<Node>| match node.as_ref()?.key {
            WireguardKey::Key(key) => Some((key, node.as_ref()?.claim.clone()?)),
            _ => None,
        };
        let (released, taken) = (claimed(&old), claimed(&new));
        let own = new.as_ref().is_some_and(|node| node.own);
        if let Some(new) = new {
            self.nodes.insert(id.clone(), new);
        }
        if released != taken {
            let mut affected = BTreeSet::new();
            if let Some((key, claim)) = released {
                affected.extend(self.change_claims(key, |claims| claims.remove(&claim)));
            }
            if let Some((key, claim)) = taken {
                affected.extend(self.change_claims(key, |claims| claims.insert(claim)));
            }
            affected.iter().for_each(|node| self.judge(node));
        }
        self.judge(id);
        if own {
            self.underlay_changed(id);
        }
    }

    fn read(&mut self, id: &NodeId, view: &NodeView<'_>, old: Option<&Node>) -> Node {
        let addresses: BTreeSet<IpAddr> = view.node.ips().collect();
        let key = view.node.wireguard_key;
        let kept = old.filter(|old| old.key == key).and_then(|old| old.claim.clone());
        let claim = match (key, kept) {
            _ if view.own => None,
            (WireguardKey::Key(_), Some(kept)) if kept.cluster_id == view.cluster_id => Some(kept),
            (WireguardKey::Key(key), _) => {
                self.arrivals += 1;
                let since = match self.remembered.get(&key) {
                    Some(at) if addresses.contains(at) => Since::Earlier,
                    _ if self.settled => Since::Later(self.arrivals),
                    _ => Since::Start,
                };
                let of_peer = !view.own_cluster;
                Some(Claim { since, of_peer, cluster_id: view.cluster_id, node: id.clone() })
            }
            _ => None,
        };
        let internal = view.node.addresses.iter().filter(|address| address.internal);
        Node {
            cluster: view.cluster.clone(),
            own: view.own,
            key,
            claim,
            addresses,
            internal: internal.map(|address| address.ip).collect(),
        }
    }

    /// Changes who claims a key; returns who gains or loses it thereby.
    fn change_claims(
        &mut self,
        key: PublicKey,
        change: impl FnOnce(&mut BTreeSet<Claim>) -> bool,
    ) -> Vec<NodeId> {
        let claims = self.keys.entry(key).or_default();
        let before = claims.first().map(|claim| claim.node.clone());
        let _ = change(claims);
        let now = claims.first().map(|claim| claim.node.clone());
        if claims.is_empty() {
            self.keys.remove(&key);
        }
        if before == now { Vec::new() } else { before.into_iter().chain(now).collect() }
    }

    /// Decides whether a node's key is used.
    fn judge(&mut self, id: &NodeId) {
        let Some(refusal) = self.refusal(id) else {
            if self.refused.remove(id) {
                self.dirty.insert(id.clone());
            }
            return;
        };
        if self.refused.insert(id.clone()) {
            self.dirty.insert(id.clone());
            self.news.push(refusal);
        }
    }

    fn refusal(&self, id: &NodeId) -> Option<RefusedKey> {
        let node = self.nodes.get(id).filter(|node| !node.own)?;
        let refused = |key, reason| {
            Some(RefusedKey { node: id.name.clone(), cluster: node.cluster.clone(), key, reason })
        };
        match node.key {
            WireguardKey::None => None,
            WireguardKey::Invalid => refused(None, KeyProblem::Invalid),
            WireguardKey::Key(key) if self.own_keys.contains(&key) => refused(Some(key), KeyProblem::Own),
            WireguardKey::Key(key) => {
                let (holder, cluster) = self.holder(&key).filter(|(holder, _)| *holder != id)?;
                let (node, cluster) = (holder.name.clone(), cluster.clone());
                refused(Some(key), KeyProblem::Duplicate { node, cluster })
            }
        }
    }

    /// The own node's addresses may be of other families now.
    fn underlay_changed(&mut self, own: &NodeId) {
        let internal = self.nodes.get(own).map(|node| node.internal.as_slice()).unwrap_or_default();
        let ipv6_only = !internal.is_empty() && internal.iter().all(IpAddr::is_ipv6);
        if self.underlay_ipv6_only != ipv6_only {
            self.underlay_ipv6_only = ipv6_only;
            self.dirty.extend(self.nodes.keys().cloned());
        }
    }

    /// Of the family that this node's own network has, IPv4 before IPv6.
    fn endpoint(&self, node: &Node) -> Option<IpAddr> {
        let of = |ipv4: bool| node.internal.iter().find(|ip| ip.is_ipv4() == ipv4).copied();
        if self.underlay_ipv6_only { of(false) } else { of(true).or_else(|| of(false)) }
    }

    /// Decides whose a prefix is; says whether that is another node than before.
    fn place(&mut self, mesh: &Mesh, prefix: IpNet) -> bool {
        let place = mesh.place(prefix);
        let is_address = matches!(place, Some(Place::Node(_, Kind::NodeAddress)));
        let now = place.map(|place| match place {
            Place::Node(node, _) => Owner { node: Some(node), host: None },
            Place::Pod { host, node } => Owner { node, host: Some(host) },
        });
        let now = now.filter(|owner| {
            let covered = || owner.node.as_ref() == self.covering(prefix);
            !(is_host(&prefix) && !is_address && owner.node.is_some() && covered())
        });
        let before = match &now {
            Some(owner) => self.prefixes.insert(prefix, owner.clone()),
            None => self.prefixes.remove(&prefix),
        };
        if before == now {
            return false;
        }
        self.index_host(prefix, before.as_ref(), now.as_ref());
        let node = |owner: Option<Owner>| owner.and_then(|owner| owner.node);
        let (before, now) = (node(before), node(now));
        if before == now {
            return false;
        }
        if before.is_some() != now.is_some() && !is_host(&prefix) {
            self.count_length(prefix, now.is_some());
        }
        if let Some(before) = before {
            if let Some(owned) = self.owned.get_mut(&before) {
                owned.remove(&prefix);
                if owned.is_empty() {
                    self.owned.remove(&before);
                }
            }
            self.dirty.insert(before);
        }
        if let Some(now) = now {
            self.owned.entry(now.clone()).or_default().insert(prefix);
            self.dirty.insert(now);
        }
        true
    }

    fn index_host(&mut self, prefix: IpNet, before: Option<&Owner>, now: Option<&Owner>) {
        let host = |owner: Option<&Owner>| owner.and_then(|owner| owner.host);
        if let Some(host) = host(before)
            && let Some(pods) = self.by_host.get_mut(&host)
        {
            pods.remove(&prefix);
            if pods.is_empty() {
                self.by_host.remove(&host);
            }
        }
        if let Some(host) = host(now) {
            self.by_host.entry(host).or_default().insert(prefix);
        }
    }

    fn count_length(&mut self, range: IpNet, more: bool) {
        let key = (range.addr().is_ipv4(), range.prefix_len());
        let users = self.lengths.entry(key).or_default();
        *users = if more { *users + 1 } else { *users - 1 };
        if *users == 0 {
            self.lengths.remove(&key);
        }
    }

    /// The owner of the longest range around an address.
    fn covering(&self, prefix: IpNet) -> Option<&NodeId> {
        let ipv4 = prefix.addr().is_ipv4();
        let lengths = self.lengths.range((ipv4, 0)..(ipv4, prefix.prefix_len())).rev();
        lengths
            .filter_map(|((_, length), _)| IpNet::new(prefix.addr(), *length).ok())
            .find_map(|range| self.prefixes.get(&range.trunc())?.node.as_ref())
    }
}

/// Prefixes to look at again.
#[derive(Default)]
struct Again {
    ranges: BTreeSet<IpNet>,
    hosts: HashSet<IpNet>,
}

impl Again {
    fn add(&mut self, prefix: IpNet) {
        if is_host(&prefix) {
            self.hosts.insert(prefix);
        } else {
            self.ranges.insert(prefix);
        }
    }
}

fn is_host(prefix: &IpNet) -> bool {
    prefix.prefix_len() == prefix.max_prefix_len()
}

#[cfg(test)]
mod tests;
