//! What to tell the WireGuard device: the difference between the peers that it has and those that it should have. Pure,
//! with the time passed in.
//!
//! Sessions are never ended needlessly: a peer that stays is never exchanged, and what an earlier run of the agent left
//! in the device stays until the mesh has been read.
//!
//! When a node publishes another key, its former peer and the new one stand side by side for a while (our device only;
//! the kernel's has no way to say it): the new one takes the prefixes over once a handshake with it has been made, the
//! former one goes when its last session has expired. No packet is lost meanwhile, in either direction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use isthmus_wireguard::config::{AllowedIp, DeviceState, PeerUpdate, PublicKey};

use super::peers::{Peer, Peers};
use super::rotation::Sessions;
use crate::mesh::NodeId;
use crate::mesh::fact::Moment;

/// How long a session may still be used by the other side (the protocol's Reject-After-Time), and so how long a former
/// peer stays, and how long a new one that never answers is waited for.
pub const REJECT_AFTER: Duration = Duration::from_secs(180);
/// How long a new peer is sent handshakes although there is nothing to send.
const GREETING: Duration = Duration::from_secs(10);
/// Seconds between two empty packets while a peer is greeted.
const GREETING_KEEPALIVE: u16 = 1;

/// What the device has, as far as the agent knows, and what it is about to become.
#[derive(Debug)]
pub struct Device {
    /// The kernel's device: no successors, and prefixes are only ever replaced as a whole.
    kernel: bool,
    port: u16,
    known: HashMap<PublicKey, Known>,
    owners: HashMap<IpNet, PublicKey>,
    nodes: HashMap<NodeId, Assigned>,
    users: HashMap<PublicKey, NodeId>,
    departing: BTreeMap<PublicKey, Moment>,
    greeted: BTreeMap<PublicKey, Greeting>,
    /// Everything has been compared since the mesh was read: nothing of an earlier run is left.
    settled: bool,
}

#[derive(Debug, Default)]
struct Known {
    told: Option<SocketAddr>,
    allowed: BTreeSet<IpNet>,
    successor_of: Option<PublicKey>,
}

/// A peer is sent handshakes although there is nothing to send.
#[derive(Clone, Copy, Debug)]
struct Greeting {
    until: Moment,
    /// Ends with a handshake later than this one.
    after: Option<SystemTime>,
}

/// Which peer a node is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Assigned {
    /// This one.
    One(PublicKey),
    /// The former one still has the prefixes; the new one has them once a handshake is made, or it is too late to wait.
    Succession { former: PublicKey, new: PublicKey, until: Moment },
}

/// How updates are made now.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    /// The time.
    pub now: Moment,
    /// Other nodes know this node's key: handshakes can succeed.
    pub published: bool,
}

impl Device {
    /// A device of which nothing is known; peers listen on `port`.
    pub fn new(kernel: bool, port: u16) -> Self {
        Self {
            kernel,
            port,
            known: HashMap::new(),
            owners: HashMap::new(),
            nodes: HashMap::new(),
            users: HashMap::new(),
            departing: BTreeMap::new(),
            greeted: BTreeMap::new(),
            settled: false,
        }
    }

    /// Learns what the device has, whoever made it so.
    pub fn adopt(&mut self, state: &DeviceState) {
        let mut before = std::mem::take(&mut self.known);
        self.owners.clear();
        for peer in &state.peers {
            // A peer may have shown itself elsewhere since it was told where to look; there it is left.
            let told = before.remove(&peer.public_key).and_then(|known| known.told);
            for prefix in &peer.allowed_ips {
                self.owners.insert(*prefix, peer.public_key);
            }
            let known = Known {
                told: told.filter(|_| peer.endpoint.is_some()).or(peer.endpoint),
                allowed: peer.allowed_ips.iter().copied().collect(),
                successor_of: peer.successor_of,
            };
            self.known.insert(peer.public_key, known);
        }
        let known = &self.known;
        self.departing.retain(|key, _| known.contains_key(key));
        self.greeted.retain(|key, _| known.contains_key(key));
        self.nodes.retain(|_, assigned| match assigned {
            Assigned::One(key) => known.contains_key(key),
            Assigned::Succession { former, .. } => known.contains_key(former),
        });
        self.users = self.nodes.iter().flat_map(|(id, of)| of.keys().map(|key| (key, id.clone()))).collect();
    }

    /// Updates for the nodes that have changed.
    pub fn changed(&mut self, nodes: &BTreeSet<NodeId>, peers: &Peers, at: Circumstances) -> Vec<PeerUpdate> {
        let mut updates = Vec::new();
        // Who goes goes first: its key or its prefixes may be another's now.
        for id in nodes.iter().filter(|id| peers.peer(id).is_none()) {
            self.gone(id, peers, &mut updates);
        }
        for (id, peer) in nodes.iter().filter_map(|id| Some((id, peers.peer(id)?))) {
            self.there(id, &peer, peers, at, &mut updates);
        }
        updates
    }

    /// Updates that bring the whole device to what it should have. Grows with the mesh's nodes.
    pub fn all(&mut self, peers: &Peers, at: Circumstances) -> Vec<PeerUpdate> {
        let mut nodes: BTreeSet<NodeId> = peers.all().map(|(id, _)| id.clone()).collect();
        nodes.extend(self.nodes.keys().cloned());
        let mut updates = self.changed(&nodes, peers, at);
        self.settled = peers.is_settled();
        if self.settled {
            let unused =
                |key: &&PublicKey| !self.users.contains_key(key) && !self.departing.contains_key(key);
            let unused: Vec<_> = self.known.keys().filter(unused).copied().collect();
            unused.into_iter().for_each(|key| self.remove(key, &mut updates));
        }
        updates
    }

    /// Updates that time and handshakes have made necessary.
    pub fn progress(&mut self, state: &DeviceState, peers: &Peers, at: Circumstances) -> Vec<PeerUpdate> {
        let mut updates = Vec::new();
        // While nobody is greeted or succeeded there is nothing to look for.
        if self.is_calm() {
            return updates;
        }
        let handshakes: HashMap<PublicKey, SystemTime> =
            state.peers.iter().filter_map(|peer| Some((peer.public_key, peer.last_handshake?))).collect();
        let ready: Vec<NodeId> = self
            .nodes
            .iter()
            .filter(|(_, assigned)| match assigned {
                Assigned::Succession { new, until, .. } => handshakes.contains_key(new) || at.now >= *until,
                Assigned::One(_) => false,
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in ready {
            let Some(Assigned::Succession { former, new, .. }) = self.nodes.get(&id).copied() else {
                continue;
            };
            self.nodes.insert(id.clone(), Assigned::One(new));
            self.users.remove(&former);
            self.departing.insert(former, Moment(at.now.0 + REJECT_AFTER));
            if let Some(peer) = peers.peer(&id) {
                self.there(&id, &peer, peers, at, &mut updates);
            }
        }
        let over = |key: &PublicKey, greeting: &Greeting| {
            handshakes.get(key).copied() > greeting.after || at.now >= greeting.until
        };
        let greeted: Vec<_> =
            self.greeted.iter().filter(|(key, greeting)| over(key, greeting)).map(|(key, _)| *key).collect();
        for key in greeted {
            self.greeted.remove(&key);
            updates.push(PeerUpdate {
                persistent_keepalive: Some(0),
                update_only: true,
                ..PeerUpdate::new(key)
            });
        }
        let expired: Vec<_> =
            self.departing.iter().filter(|(_, until)| at.now >= **until).map(|(key, _)| *key).collect();
        for key in expired {
            self.departing.remove(&key);
            if !self.users.contains_key(&key) {
                self.remove(key, &mut updates);
            }
        }
        updates
    }

    /// Updates that make the device begin a handshake with these peers, who were last heard of at that time, until they
    /// answer or it is `until`.
    pub fn greet(
        &mut self,
        peers: impl IntoIterator<Item = (PublicKey, Option<SystemTime>)>,
        until: Moment,
    ) -> Vec<PeerUpdate> {
        let mut updates = Vec::new();
        for (key, after) in peers {
            self.greeted.insert(key, Greeting { until, after });
            updates.push(PeerUpdate {
                persistent_keepalive: Some(GREETING_KEEPALIVE),
                update_only: true,
                ..PeerUpdate::new(key)
            });
        }
        updates
    }

    /// Whether only changes of the mesh can make updates necessary.
    pub fn is_calm(&self) -> bool {
        let succession = |assigned: &Assigned| matches!(assigned, Assigned::Succession { .. });
        self.greeted.is_empty() && self.departing.is_empty() && !self.nodes.values().any(succession)
    }

    /// The nodes with which the device has sessions, and the own public keys under which. Former peers do not count.
    pub fn sessions(&self, state: &DeviceState) -> Sessions {
        let mut sessions = Sessions::new();
        for peer in &state.peers {
            if let (Some(node), Some(key)) = (self.users.get(&peer.public_key), peer.session_key) {
                sessions.entry(node.clone()).or_default().insert(key);
            }
        }
        sessions
    }

    /// Whether what an earlier run left in the device has been removed.
    pub fn has_settled(&self) -> bool {
        self.settled
    }

    /// Peers of the device.
    pub fn peers(&self) -> usize {
        self.known.len()
    }

    /// The node that a peer of the device is, former peers included.
    pub fn node(&self, key: &PublicKey) -> Option<&NodeId> {
        self.users.get(key)
    }

    fn gone(&mut self, id: &NodeId, peers: &Peers, updates: &mut Vec<PeerUpdate>) {
        let Some(assigned) = self.nodes.get(id).copied() else { return };
        if !peers.is_settled() {
            // It may only not have been read yet.
            return;
        }
        self.nodes.remove(id);
        // A key that has become another node's meanwhile stays.
        for key in assigned.keys().filter(|key| self.users.get(key) == Some(id)).collect::<Vec<_>>() {
            self.users.remove(&key);
            self.remove(key, updates);
        }
    }

    fn there(
        &mut self,
        id: &NodeId,
        peer: &Peer<'_>,
        peers: &Peers,
        at: Circumstances,
        updates: &mut Vec<PeerUpdate>,
    ) {
        let before = self.nodes.get(id).copied();
        let former = match before {
            Some(Assigned::One(key)) => Some(key),
            Some(Assigned::Succession { former, .. }) => Some(former),
            None => self.predecessor(peer, peers),
        };
        let former = former.filter(|former| *former != peer.key && self.known.contains_key(former));
        let assigned = match (former, before) {
            (None, _) => Assigned::One(peer.key),
            (Some(_), _) if self.kernel => Assigned::One(peer.key),
            (Some(_), Some(succession @ Assigned::Succession { new, .. })) if new == peer.key => succession,
            (Some(former), _) => {
                Assigned::Succession { former, new: peer.key, until: Moment(at.now.0 + REJECT_AFTER) }
            }
        };
        self.assign(id, before, assigned, updates);
        let successor_of = match assigned {
            Assigned::Succession { former, .. } => Some(former),
            Assigned::One(_) => None,
        };
        self.introduce(peer.key, SocketAddr::new(peer.address, self.port), successor_of, at, updates);
        let holder = successor_of.unwrap_or(peer.key);
        self.allow(holder, peer.allowed, peers.is_settled(), updates);
    }

    /// Notes which peers a node is; those that it no longer is go.
    fn assign(
        &mut self,
        id: &NodeId,
        before: Option<Assigned>,
        now: Assigned,
        updates: &mut Vec<PeerUpdate>,
    ) {
        self.nodes.insert(id.clone(), now);
        for key in before.into_iter().flat_map(Assigned::keys) {
            if now.keys().all(|kept| kept != key) && self.users.get(&key) == Some(id) {
                self.users.remove(&key);
                self.remove(key, updates);
            }
        }
        for key in now.keys() {
            self.departing.remove(&key);
            self.users.insert(key, id.clone());
        }
    }

    /// The peer that an earlier run of the agent made of a node that has published another key since then.
    fn predecessor(&self, peer: &Peer<'_>, peers: &Peers) -> Option<PublicKey> {
        let of_nobody = |key: &&PublicKey| {
            **key != peer.key && !self.users.contains_key(key) && peers.holder(key).is_none()
        };
        peer.allowed.iter().filter_map(|prefix| self.owners.get(prefix)).find(of_nobody).copied()
    }

    /// Makes the peer, or tells where it is now.
    fn introduce(
        &mut self,
        key: PublicKey,
        endpoint: SocketAddr,
        successor_of: Option<PublicKey>,
        at: Circumstances,
        updates: &mut Vec<PeerUpdate>,
    ) {
        let is_new = !self.known.contains_key(&key);
        let known = self.known.entry(key).or_default();
        let succeeds = successor_of.filter(|former| known.successor_of != Some(*former));
        if known.told == Some(endpoint) && succeeds.is_none() {
            return;
        }
        known.told = Some(endpoint);
        known.successor_of = successor_of.or(known.successor_of);
        // Packets that the other side is about to send find a session instead of waiting for one.
        let greet = at.published && (is_new || succeeds.is_some());
        if greet {
            self.greeted.insert(key, Greeting { until: Moment(at.now.0 + GREETING), after: None });
        }
        updates.push(PeerUpdate {
            endpoint: Some(endpoint),
            successor_of: succeeds,
            persistent_keepalive: greet.then_some(GREETING_KEEPALIVE),
            ..PeerUpdate::new(key)
        });
    }

    /// Gives the peer its prefixes. What it should not have is taken away, unless it may only not have been read yet.
    fn allow(
        &mut self,
        key: PublicKey,
        wanted: &BTreeSet<IpNet>,
        settled: bool,
        updates: &mut Vec<PeerUpdate>,
    ) {
        let has = self.known.get(&key).map(|known| known.allowed.clone()).unwrap_or_default();
        let gained: Vec<IpNet> = wanted.difference(&has).copied().collect();
        let lost: Vec<IpNet> = if settled { has.difference(wanted).copied().collect() } else { Vec::new() };
        if gained.is_empty() && lost.is_empty() {
            return;
        }
        for prefix in &gained {
            let former = self.owners.insert(*prefix, key);
            if let Some(former) = former.and_then(|former| self.known.get_mut(&former)) {
                former.allowed.remove(prefix);
            }
        }
        for prefix in &lost {
            self.owners.remove(prefix);
        }
        let known = self.known.entry(key).or_default();
        known.allowed.extend(gained.iter().copied());
        known.allowed.retain(|prefix| !lost.contains(prefix));
        // Kernels before 6.16 cannot take single prefixes away.
        let replace = self.kernel && !lost.is_empty();
        let allowed_ips = if replace {
            known.allowed.iter().copied().map(AllowedIp::Add).collect()
        } else {
            let lost = lost.into_iter().map(AllowedIp::Remove);
            lost.chain(gained.into_iter().map(AllowedIp::Add)).collect()
        };
        updates.push(PeerUpdate { replace_allowed_ips: replace, allowed_ips, ..PeerUpdate::new(key) });
    }

    fn remove(&mut self, key: PublicKey, updates: &mut Vec<PeerUpdate>) {
        self.departing.remove(&key);
        self.greeted.remove(&key);
        let Some(known) = self.known.remove(&key) else { return };
        for prefix in known.allowed {
            if self.owners.get(&prefix) == Some(&key) {
                self.owners.remove(&prefix);
            }
        }
        updates.push(PeerUpdate::removal(key));
    }
}

impl Assigned {
    fn keys(self) -> impl Iterator<Item = PublicKey> {
        let (first, second) = match self {
            Self::One(key) => (key, None),
            Self::Succession { former, new, .. } => (former, Some(new)),
        };
        std::iter::once(first).chain(second)
    }
}

/// The address of a peer without its port, for what remembers who was where.
pub fn address_of(endpoint: SocketAddr) -> IpAddr {
    endpoint.ip().to_canonical()
}

#[cfg(test)]
mod tests;
