//! What all threads of a device share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio_util::sync::CancellationToken;

use super::counters::Counters;
use super::identity::Identity;
use super::inbox::Inbox;
use super::lane::{Lane, MessageBounds};
use super::peer::{Peer, PeerState};
use super::table::Table;
use super::tun::Tun;
use super::udp::Sockets;

/// The keys of the device.
#[derive(Clone, Default)]
pub(crate) struct Identities {
    pub(crate) current: Option<Arc<Identity>>,
    pub(crate) next: Option<Arc<Identity>>,
}

pub(crate) struct Shared {
    pub(crate) tun: Tun,
    pub(crate) mtu: usize,
    pub(crate) table: Table,
    pub(crate) identities: RwLock<Identities>,
    identities_generation: AtomicU64,
    sockets: RwLock<Arc<Sockets>>,
    sockets_generation: AtomicU64,
    pub(crate) mark: Mutex<u32>,
    pub(crate) inbox: Inbox,
    pub(crate) counters: Counters,
    pub(crate) bounds: MessageBounds,
    /// Bytes of packets that wait for handshakes.
    pub(crate) waiting: Arc<AtomicUsize>,
    pub(crate) stop: AtomicBool,
    /// Cancelled when a worker had to end.
    pub(crate) broken: CancellationToken,
}

impl Shared {
    pub(crate) fn new(tun: Tun, mtu: usize, sockets: Sockets, bounds: MessageBounds) -> Self {
        Self {
            tun,
            mtu,
            table: Table::default(),
            identities: RwLock::default(),
            identities_generation: AtomicU64::new(1),
            sockets: RwLock::new(Arc::new(sockets)),
            sockets_generation: AtomicU64::new(1),
            mark: Mutex::new(0),
            inbox: Inbox::default(),
            counters: Counters::default(),
            bounds,
            waiting: Arc::default(),
            stop: AtomicBool::new(false),
            broken: CancellationToken::new(),
        }
    }

    pub(crate) fn sockets(&self) -> Arc<Sockets> {
        Arc::clone(&self.sockets.read())
    }

    pub(crate) fn sockets_generation(&self) -> u64 {
        self.sockets_generation.load(Ordering::Acquire)
    }

    pub(crate) fn replace_sockets(&self, sockets: Sockets) {
        *self.sockets.write() = Arc::new(sockets);
        self.sockets_generation.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn identities_generation(&self) -> u64 {
        self.identities_generation.load(Ordering::Acquire)
    }

    pub(crate) fn identities(&self) -> Identities {
        self.identities.read().clone()
    }

    pub(crate) fn replace_identities(&self, identities: Identities) {
        *self.identities.write() = identities;
        self.identities_generation.fetch_add(1, Ordering::Release);
    }

    /// The lane of a peer under this identity, which is made if there is none.
    pub(crate) fn lane<'a>(
        &self,
        peer: &Arc<Peer>,
        state: &'a mut PeerState,
        identity: &Arc<Identity>,
    ) -> Option<&'a mut Lane> {
        if state.lane_of(identity).is_none() {
            let index = self.table.insert_lane(peer);
            let preshared = state.preshared.as_ref();
            let lane = Lane::new(Arc::clone(identity), peer.key, preshared, index, self.bounds);
            state.add_lane(lane);
        }
        state.lane_of(identity)
    }

    /// Asks the handshake thread for a handshake with this peer, once.
    pub(crate) fn want_handshake(&self, peer: &Arc<Peer>, state: &mut PeerState) {
        state.handshake_asked = true;
        self.want_look(peer, state);
    }

    /// Has the handshake thread look at a peer whose timers may have begun to matter.
    pub(crate) fn want_look(&self, peer: &Arc<Peer>, state: &mut PeerState) {
        if !state.look_asked {
            state.look_asked = true;
            self.inbox.want(Arc::clone(peer));
        }
    }
}
