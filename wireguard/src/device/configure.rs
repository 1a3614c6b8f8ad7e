//! Configuring a device that is at work, and telling how it is configured.

use std::collections::HashSet;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::identity::{Identity, is_weak};
use super::peer::{Peer, PeerState};
use super::shared::{Identities, Shared};
use super::udp::{Endpoint, Sockets};
use super::{Count, Device};
use crate::config::{
    AllowedIp, ApplyError, Change, Configurable, Counter, DeviceState, DeviceUpdate, PeerState as PeerReport,
    PeerUpdate, PrivateKey, PublicKey,
};

/// How many peers and prefixes there can be: far above any mesh, and bounded in memory.
const PEERS_MAX: usize = 1 << 18;
const PREFIXES_MAX: usize = 1 << 20;

/// What only configuring needs.
#[derive(Default)]
pub(super) struct Configuration {
    peers_made: u32,
    families_made: u64,
}

impl Configurable for Device {
    fn apply(&self, update: DeviceUpdate) -> Result<(), ApplyError> {
        let mut configuration = self.configuration.lock();
        self.apply_keys(update.private_key, update.next_private_key);
        if let Some(mark) = update.fwmark {
            self.shared.sockets().set_mark(mark).map_err(|source| ApplyError::Mark { mark, source })?;
            *self.shared.mark.lock() = mark;
        }
        if let Some(port) = update.listen_port {
            self.listen(port)?;
        }
        if update.replace_peers {
            let named: HashSet<_> = update.peers.iter().map(|peer| peer.public_key).collect();
            for peer in self.shared.table.peers() {
                if !named.contains(&peer.key) {
                    remove_peer(&self.shared, &peer);
                }
            }
        }
        update.peers.into_iter().try_for_each(|peer| self.apply_peer(&mut configuration, peer))
    }

    fn state(&self) -> DeviceState {
        let _unchanged = self.configuration.lock();
        let identities = self.shared.identities();
        let key = |identity: Option<Arc<Identity>>| identity.map(|identity| identity.private().clone());
        DeviceState {
            private_key: key(identities.current),
            next_private_key: key(identities.next),
            listen_port: self.shared.sockets().port(),
            fwmark: *self.shared.mark.lock(),
            peers: self.shared.table.peers().iter().map(|peer| report(peer)).collect(),
        }
    }

    fn counters(&self) -> Vec<Counter> {
        Count::ALL.iter().map(|count| (count.name(), self.shared.counters.read(*count))).collect()
    }
}

impl Device {
    fn apply_keys(&self, private: Change<PrivateKey>, next: Change<PrivateKey>) {
        let before = self.shared.identities();
        let mut after = before.clone();
        match next {
            Change::Keep => {}
            Change::Clear => after.next = None,
            Change::Set(key) if has(after.next.as_ref(), &key) => {}
            Change::Set(key) => after.next = Some(Arc::new(Identity::new(key))),
        }
        let mut promoted = false;
        match private {
            Change::Keep => {}
            Change::Clear => after.current = None,
            Change::Set(key) if has(after.current.as_ref(), &key) => {}
            // The key that was announced as the next one: what was agreed under it stays. It may have been cleared in
            // this same update.
            Change::Set(key) if has(before.next.as_ref(), &key) => {
                after.current.clone_from(&before.next);
                after.next = after.next.filter(|next| !has(Some(next), &key));
                promoted = true;
            }
            Change::Set(key) => after.current = Some(Arc::new(Identity::new(key))),
        }
        if same(before.current.as_ref(), after.current.as_ref())
            && same(before.next.as_ref(), after.next.as_ref())
        {
            return;
        }
        self.shared.replace_identities(after.clone());
        for peer in self.shared.table.peers() {
            if after.current.iter().chain(&after.next).any(|identity| identity.public() == peer.key) {
                remove_peer(&self.shared, &peer);
                continue;
            }
            change_lanes(&self.shared, &peer, &before, &after, promoted);
        }
        self.wake_workers();
    }

    fn listen(&self, port: u16) -> Result<(), ApplyError> {
        let before = self.shared.sockets();
        if port != 0 && port == before.port() {
            return Ok(());
        }
        let (workers, mark) = (self.wakes.len(), *self.shared.mark.lock());
        let sockets =
            Sockets::open(port, workers, mark).map_err(|source| ApplyError::Listen { port, source })?;
        self.shared.replace_sockets(sockets);
        self.wake_workers();
        Ok(())
    }

    fn apply_peer(&self, configuration: &mut Configuration, update: PeerUpdate) -> Result<(), ApplyError> {
        let known = self.shared.table.peer(&update.public_key);
        if update.remove {
            if let Some(peer) = known {
                remove_peer(&self.shared, &peer);
            }
            return Ok(());
        }
        let peer = match known {
            Some(peer) => peer,
            None if update.update_only => return Ok(()),
            None => self.make_peer(configuration, update.public_key)?,
        };
        self.apply_values(&peer, &mut peer.state.lock(), &update);
        if let Some(key) = update.successor_of {
            self.succeed(&peer, key);
        }
        self.apply_prefixes(&peer, &update)
    }

    fn make_peer(&self, configuration: &mut Configuration, key: PublicKey) -> Result<Arc<Peer>, ApplyError> {
        let bad = |reason| ApplyError::BadPeerKey { key, reason };
        if is_weak(&key.into()) {
            return Err(bad("no secret can be agreed with it (it is zero or a point of small order)"));
        }
        let identities = self.shared.identities();
        if identities.current.iter().chain(&identities.next).any(|identity| identity.public() == key) {
            return Err(bad("it is this device's own"));
        }
        if self.shared.table.peer_count() >= PEERS_MAX {
            return Err(ApplyError::TooManyPeers { limit: PEERS_MAX });
        }
        configuration.peers_made = configuration.peers_made.wrapping_add(1);
        configuration.families_made += 1;
        let waiting = Arc::clone(&self.shared.waiting);
        let peer = Arc::new(Peer::new(key, configuration.peers_made, configuration.families_made, waiting));
        self.shared.table.insert_peer(Arc::clone(&peer));
        Ok(peer)
    }

    fn apply_values(&self, peer: &Arc<Peer>, state: &mut PeerState, update: &PeerUpdate) {
        if update.preshared_key.is_change() {
            let before = state.preshared.clone();
            update.preshared_key.clone().apply_to(&mut state.preshared);
            if state.preshared != before {
                // Sessions stand; handshakes are agreed with the new one from now on.
                let had_session = state.can_send();
                state.lanes_mut().for_each(super::lane::Lane::retire);
                if had_session && state.endpoint.is_some() {
                    self.shared.want_handshake(peer, state);
                }
            }
        }
        if let Some(endpoint) = update.endpoint {
            let ip = endpoint.ip().to_canonical();
            let mut endpoint = endpoint;
            if ip.is_ipv4() != endpoint.is_ipv4() {
                endpoint.set_ip(ip);
            }
            if state.endpoint.is_none_or(|known| known.remote != endpoint) {
                state.endpoint = Some(Endpoint::new(endpoint));
            }
        }
        if let Some(seconds) = update.persistent_keepalive {
            let interval = Duration::from_secs(seconds.into());
            state.keepalive = (seconds != 0).then_some(interval);
            // The first is due at once, so that the peer learns where we are.
            state.last_traffic = Instant::now().checked_sub(interval).unwrap_or(state.last_traffic);
            self.shared.want_look(peer, state);
        }
    }

    /// Lets `peer` take over from the one with this key: they are one node under two keys.
    fn succeed(&self, peer: &Arc<Peer>, key: PublicKey) {
        let Some(before) = self.shared.table.peer(&key).filter(|before| !Arc::ptr_eq(before, peer)) else {
            return;
        };
        peer.family.store(before.family.load(Ordering::Relaxed), Ordering::Relaxed);
        before.state.lock().successor = Some(Arc::downgrade(peer));
        let mut state = peer.state.lock();
        state.successor_of = Some(key);
        state.predecessor = Some(before);
        if state.endpoint.is_some() && !state.can_send() {
            // Before the prefixes move, a session stands.
            self.shared.want_handshake(peer, &mut state);
        }
    }

    fn apply_prefixes(&self, peer: &Arc<Peer>, update: &PeerUpdate) -> Result<(), ApplyError> {
        let shared = &self.shared;
        let mut result = Ok(());
        if update.replace_allowed_ips {
            let kept: HashSet<_> = update
                .allowed_ips
                .iter()
                .filter_map(|change| match change {
                    AllowedIp::Add(prefix) => Some(prefix.trunc()),
                    AllowedIp::Remove(_) => None,
                })
                .collect();
            peer.prefixes.lock().retain(|prefix| {
                let stays = kept.contains(prefix);
                if !stays {
                    shared.table.remove_prefix(*prefix);
                }
                stays
            });
        }
        for change in &update.allowed_ips {
            match change {
                AllowedIp::Add(prefix) => {
                    let prefix = prefix.trunc();
                    if shared.table.prefix_count() >= PREFIXES_MAX && !shared.table.has_prefix(prefix) {
                        result = Err(ApplyError::TooManyPrefixes { limit: PREFIXES_MAX });
                        continue;
                    }
                    if let Some(before) = shared.table.insert_prefix(prefix, peer)
                        && !Arc::ptr_eq(&before, peer)
                    {
                        before.prefixes.lock().remove(&prefix);
                    }
                    peer.prefixes.lock().insert(prefix);
                }
                AllowedIp::Remove(prefix) => {
                    let prefix = prefix.trunc();
                    if peer.prefixes.lock().remove(&prefix) {
                        shared.table.remove_prefix(prefix);
                    }
                }
            }
        }
        self.wake_workers();
        result
    }

    /// Drops all sessions and keys of peers.
    pub(super) fn forget_peers(&self) {
        for peer in self.shared.table.peers() {
            remove_peer(&self.shared, &peer);
        }
    }
}

fn has(identity: Option<&Arc<Identity>>, key: &PrivateKey) -> bool {
    identity.is_some_and(|identity| identity.private() == key)
}

fn same(one: Option<&Arc<Identity>>, other: Option<&Arc<Identity>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

/// Makes a peer's lanes fit the keys of the device.
fn change_lanes(shared: &Shared, peer: &Peer, before: &Identities, after: &Identities, promoted: bool) {
    let mut state = peer.state.lock();
    let is = |lane: &super::lane::Lane, identity: &Option<Arc<Identity>>| {
        identity.as_ref().is_some_and(|identity| Arc::ptr_eq(lane.identity(), identity))
    };
    if promoted {
        // What was agreed under the key before goes on receiving until it is over.
        state.lanes_mut().filter(|lane| is(lane, &before.current)).for_each(super::lane::Lane::retire);
    }
    // A key that was replaced at once, and not by one that had been announced, is not to be used any more.
    let replaced = !promoted && !same(before.current.as_ref(), after.current.as_ref());
    let gone = state.remove_lanes(|lane| {
        let stays = is(lane, &after.current) || is(lane, &after.next);
        !stays && (replaced || !lane.is_retired())
    });
    shared.table.remove_lanes(&gone);
}

fn remove_peer(shared: &Shared, peer: &Arc<Peer>) {
    shared.table.remove_peer(&peer.key);
    for prefix in peer.prefixes.lock().drain() {
        shared.table.remove_prefix(prefix);
    }
    let mut state = peer.state.lock();
    state.removed = true;
    state.predecessor = None;
    state.drop_waiting(&shared.counters);
    let successor = state.successor.take();
    let lanes = state.remove_lanes(|_| true);
    drop(state);
    shared.table.remove_lanes(&lanes);
    // The one that takes over goes on alone, and holds it no more.
    if let Some(successor) = successor.and_then(|successor| successor.upgrade()) {
        let mut state = successor.state.lock();
        state.predecessor = None;
        state.successor_of = None;
    }
}

fn report(peer: &Peer) -> PeerReport {
    let state = peer.state.lock();
    let seconds = state.keepalive.and_then(|keepalive| u16::try_from(keepalive.as_secs()).ok());
    PeerReport {
        preshared_key: state.preshared.clone(),
        endpoint: state.endpoint.map(|endpoint| endpoint.remote),
        last_handshake: state.last_handshake,
        rx_bytes: peer.rx_bytes.load(Ordering::Relaxed),
        tx_bytes: peer.tx_bytes.load(Ordering::Relaxed),
        persistent_keepalive: seconds.and_then(NonZeroU16::new),
        allowed_ips: peer.prefixes.lock().iter().copied().collect(),
        successor_of: state.successor_of,
        session_key: state.session_key(),
        ..PeerReport::new(peer.key)
    }
}
