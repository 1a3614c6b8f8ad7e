//! Who is who: peers by key, by the index in their datagrams, and by the addresses they own.
//!
//! Packets look through small caches of their worker, which are void as soon as anything here has changed; only a miss
//! takes the lock.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ipnet::IpNet;
use parking_lot::RwLock;
use rand_core::{OsRng, RngCore};

use super::peer::Peer;
use crate::config::PublicKey;
use crate::routing::PrefixTable;

/// All peers of a device.
#[derive(Default)]
pub(crate) struct Table {
    inner: RwLock<Inner>,
    generation: AtomicU64,
}

#[derive(Default)]
struct Inner {
    peers: HashMap<PublicKey, Arc<Peer>>,
    lanes: HashMap<u32, Arc<Peer>>,
    routes: PrefixTable<Arc<Peer>>,
}

impl Table {
    pub(crate) fn peer(&self, key: &PublicKey) -> Option<Arc<Peer>> {
        self.inner.read().peers.get(key).cloned()
    }

    pub(crate) fn peers(&self) -> Vec<Arc<Peer>> {
        self.inner.read().peers.values().cloned().collect()
    }

    pub(crate) fn peer_count(&self) -> usize {
        self.inner.read().peers.len()
    }

    pub(crate) fn prefix_count(&self) -> usize {
        self.inner.read().routes.len()
    }

    pub(crate) fn insert_peer(&self, peer: Arc<Peer>) {
        self.inner.write().peers.insert(peer.key, peer);
        self.changed();
    }

    pub(crate) fn remove_peer(&self, key: &PublicKey) -> Option<Arc<Peer>> {
        let removed = self.inner.write().peers.remove(key);
        self.changed();
        removed
    }

    /// Whether exactly this prefix is owned by someone.
    pub(crate) fn has_prefix(&self, prefix: IpNet) -> bool {
        self.inner.read().routes.exact(prefix).is_some()
    }

    /// Gives a prefix to a peer. Returns whom it was taken from.
    pub(crate) fn insert_prefix(&self, prefix: IpNet, peer: &Arc<Peer>) -> Option<Arc<Peer>> {
        let before = self.inner.write().routes.insert(prefix, Arc::clone(peer));
        self.changed();
        before
    }

    pub(crate) fn remove_prefix(&self, prefix: IpNet) {
        self.inner.write().routes.remove(prefix);
        self.changed();
    }

    /// A new index for a lane of this peer. Random, as it is seen on the wire.
    pub(crate) fn insert_lane(&self, peer: &Arc<Peer>) -> u32 {
        let mut inner = self.inner.write();
        loop {
            let index = OsRng.next_u32() >> 8;
            if let std::collections::hash_map::Entry::Vacant(free) = inner.lanes.entry(index) {
                free.insert(Arc::clone(peer));
                return index;
            }
        }
    }

    pub(crate) fn remove_lanes(&self, indices: &[u32]) {
        if !indices.is_empty() {
            let mut inner = self.inner.write();
            for index in indices {
                inner.lanes.remove(index);
            }
            drop(inner);
            self.changed();
        }
    }

    /// The peer that has the lane of this session index.
    pub(crate) fn peer_of_session(&self, session: u32) -> Option<Arc<Peer>> {
        self.inner.read().lanes.get(&(session >> 8)).cloned()
    }

    /// The peer that owns this address.
    pub(crate) fn owner(&self, address: IpAddr) -> Option<Arc<Peer>> {
        self.inner.read().routes.lookup(address).cloned()
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// What a worker remembers of a [`Table`]. An entry is overwritten by the next key that falls on its place.
pub(crate) struct TableCache {
    generation: u64,
    owners: Entries<IpAddr>,
    sessions: Entries<u32>,
}

type Entries<Key> = Box<[Option<(Key, Arc<Peer>)>]>;

impl TableCache {
    const OWNERS: usize = 1024;
    const SESSIONS: usize = 256;

    pub(crate) fn new() -> Self {
        Self {
            generation: 0,
            owners: (0..Self::OWNERS).map(|_| None).collect(),
            sessions: (0..Self::SESSIONS).map(|_| None).collect(),
        }
    }

    /// Forgets everything if the table has changed. To be called before each batch; what changes during one counts
    /// from the next.
    pub(crate) fn refresh(&mut self, table: &Table) {
        let generation = table.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.generation = generation;
            self.owners.fill(None);
            self.sessions.fill(None);
        }
    }

    /// As [`Table::owner`].
    pub(crate) fn owner(&mut self, table: &Table, address: IpAddr) -> Option<&Arc<Peer>> {
        let place = &mut self.owners[hash(address) % Self::OWNERS];
        if place.as_ref().is_none_or(|(known, _)| *known != address) {
            *place = Some((address, table.owner(address)?));
        }
        place.as_ref().map(|(_, peer)| peer)
    }

    /// As [`Table::peer_of_session`].
    pub(crate) fn peer_of_session(&mut self, table: &Table, session: u32) -> Option<&Arc<Peer>> {
        let lane = session >> 8;
        let place = &mut self.sessions[lane as usize % Self::SESSIONS];
        if place.as_ref().is_none_or(|(known, _)| *known != lane) {
            *place = Some((lane, table.peer_of_session(session)?));
        }
        place.as_ref().map(|(_, peer)| peer)
    }
}

fn hash(address: IpAddr) -> usize {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let bits = match address {
        IpAddr::V4(address) => u64::from(address.to_bits()),
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            (bits >> 64) as u64 ^ (bits as u64).rotate_left(17)
        }
    };
    (bits.wrapping_mul(ODD) >> 40) as usize
}
