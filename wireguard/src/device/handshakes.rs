//! The thread for what is slow or needs a clock: handshakes and timers. A packet worker never waits for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn};
use boringtun::x25519;

use super::Count;
use super::identity::is_weak;
use super::inbox::{Contents, HandshakeMessage};
use super::lane::{Answer, Due, receiver_index};
use super::limiter::AddressLimiter;
use super::peer::{Outlet, Peer, PeerState};
use super::shared::Shared;
use super::udp::{SendBatch, Sockets};
use crate::config::PublicKey;

/// Each peer that is awake is looked at once in this time, ...
const ROUND: Duration = Duration::from_millis(256);

/// ... a part of them in each of these steps.
const SLOTS: usize = 8;

/// Initiations answered before timers and answers are looked at again.
const INITIATIONS: usize = 16;

/// Room for the packets that waited for a handshake.
const BATCH: usize = 128 << 10;

pub(crate) struct HandshakeThread {
    shared: Arc<Shared>,
    sockets: Arc<Sockets>,
    sockets_generation: u64,
    batch: SendBatch,
    limiter: AddressLimiter,
    wheel: [Vec<Arc<Peer>>; SLOTS],
    slot: usize,
    next_slot_at: Instant,
    next_second_at: Instant,
}

impl HandshakeThread {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let now = Instant::now();
        Self {
            sockets: shared.sockets(),
            sockets_generation: shared.sockets_generation(),
            shared,
            batch: SendBatch::new(BATCH),
            limiter: AddressLimiter::new(now),
            wheel: Default::default(),
            slot: 0,
            next_slot_at: now,
            next_second_at: now,
        }
    }

    /// Until the inbox says to stop.
    pub(crate) fn run(mut self) {
        let mut contents = Contents::default();
        loop {
            self.shared.inbox.take(self.next_slot_at, INITIATIONS, &mut contents);
            if contents.stop {
                return;
            }
            self.refresh_sockets();
            for message in contents.answers.drain(..) {
                self.answer(&message);
            }
            for peer in contents.wanted.drain(..) {
                self.begin(&peer);
            }
            self.let_time_pass();
            for message in contents.initiations.drain(..) {
                self.initiation(&message);
            }
        }
    }

    fn refresh_sockets(&mut self) {
        let generation = self.shared.sockets_generation();
        if generation != self.sockets_generation {
            self.sockets_generation = generation;
            self.sockets = self.shared.sockets();
        }
    }

    /// A peer begins a handshake.
    fn initiation(&mut self, message: &HandshakeMessage) {
        let counters = &self.shared.counters;
        let now = Instant::now();
        if message.under_load && !self.limiter.admit(message.from.remote.ip(), now) {
            counters.count(Count::RateLimited);
            return;
        }
        let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(message.bytes()) else {
            counters.count(Count::Malformed);
            return;
        };
        let identity = &message.identity;
        let public = x25519::PublicKey::from(identity.public());
        let Ok(half) = parse_handshake_anon(identity.private().secret(), &public, &initiation) else {
            counters.count(Count::BadHandshake);
            return;
        };
        let key = PublicKey::new(half.peer_static_public);
        let Some(peer) = self.shared.table.peer(&key) else {
            counters.count(Count::UnknownKey);
            return;
        };
        if is_weak(&ephemeral_key(message.bytes(), 8)) {
            counters.count(Count::WeakKey);
            return;
        }
        let mut state = peer.state.lock();
        if state.removed {
            return;
        }
        if state.initiation_is_too_soon(now) {
            counters.count(Count::RateLimited);
            return;
        }
        let Some(lane) = self.shared.lane(&peer, &mut state, identity) else { return };
        match lane.handshake(message.bytes(), self.batch.space()) {
            Answer::Reply(length) => {
                self.batch.add(length, 0);
                state.endpoint = Some(message.from);
                state.initiation_answered(now);
                self.received(&peer, message);
                let shared = Arc::clone(&self.shared);
                let sockets = Arc::clone(&self.sockets);
                peer.send(&mut state, &mut outlet(&mut self.batch, &sockets, &shared));
                self.wake(&peer, &mut state);
            }
            _ => counters.count(Count::BadHandshake),
        }
    }

    /// A peer answers a handshake that we began, or sends a cookie for it.
    fn answer(&mut self, message: &HandshakeMessage) {
        let shared = Arc::clone(&self.shared);
        let sockets = Arc::clone(&self.sockets);
        let Some(session) = receiver_index(message.bytes()) else { return };
        let Some(peer) = shared.table.peer_of_session(session) else {
            shared.counters.count(Count::UnknownSession);
            return;
        };
        if message.bytes[0] == 2 && is_weak(&ephemeral_key(message.bytes(), 12)) {
            shared.counters.count(Count::WeakKey);
            return;
        }
        let mut state = peer.state.lock();
        let Some(lane) = state.lane_of_session(session) else { return };
        let index = lane.index();
        match lane.handshake(message.bytes(), self.batch.space()) {
            Answer::Established(length) => {
                self.batch.add(length, 0);
                state.endpoint = Some(message.from);
                state.confirm(index, &shared.counters);
                self.received(&peer, message);
                let mut outlet = outlet(&mut self.batch, &sockets, &shared);
                peer.send(&mut state, &mut outlet);
                peer.send_waiting(&mut state, &mut outlet);
                self.wake(&peer, &mut state);
            }
            Answer::Noted => self.received(&peer, message),
            _ => shared.counters.count(Count::BadHandshake),
        }
    }

    fn received(&self, peer: &Peer, message: &HandshakeMessage) {
        peer.rx_bytes.fetch_add(message.length as u64, Ordering::Relaxed);
    }

    /// Packets wait for this peer, or it was configured.
    fn begin(&mut self, peer: &Arc<Peer>) {
        let mut state = peer.state.lock();
        state.look_asked = false;
        let handshake = std::mem::take(&mut state.handshake_asked);
        if state.removed {
            return;
        }
        if handshake {
            self.initiate(peer, &mut state);
        }
        self.wake(peer, &mut state);
    }

    fn initiate(&mut self, peer: &Arc<Peer>, state: &mut PeerState) {
        let shared = Arc::clone(&self.shared);
        let identities = shared.identities();
        let identity = state.initiating_identity(identities.current.as_ref(), identities.next.as_ref());
        let (Some(identity), Some(_)) = (identity, state.endpoint) else {
            state.drop_waiting(&shared.counters);
            return;
        };
        let Some(lane) = shared.lane(peer, state, &identity) else { return };
        if let Some(length) = lane.initiate(self.batch.space()) {
            self.batch.add(length, 0);
            shared.counters.count(Count::InitiationsSent);
            let sockets = Arc::clone(&self.sockets);
            peer.send(state, &mut outlet(&mut self.batch, &sockets, &shared));
        }
    }

    /// Puts a peer into the timer wheel if time matters to it.
    fn wake(&mut self, peer: &Arc<Peer>, state: &mut PeerState) {
        if !state.in_wheel && state.is_awake(Instant::now()) {
            state.in_wheel = true;
            self.wheel[peer.number as usize % SLOTS].push(Arc::clone(peer));
        }
    }

    fn let_time_pass(&mut self) {
        let now = Instant::now();
        if now >= self.next_second_at {
            self.next_second_at = now + Duration::from_secs(1);
            let identities = self.shared.identities();
            identities.current.iter().chain(&identities.next).for_each(|identity| identity.second_passed());
        }
        if now < self.next_slot_at {
            return;
        }
        // After a pause of the whole machine it does not catch up on the rounds it missed.
        self.next_slot_at = (self.next_slot_at + ROUND / SLOTS as u32).max(now);
        self.slot = (self.slot + 1) % SLOTS;
        let mut peers = std::mem::take(&mut self.wheel[self.slot]);
        peers.retain(|peer| self.tick(peer, now));
        // What was woken meanwhile comes behind.
        peers.append(&mut self.wheel[self.slot]);
        self.wheel[self.slot] = peers;
    }

    /// Whether the peer is to be looked at again.
    fn tick(&mut self, peer: &Arc<Peer>, now: Instant) -> bool {
        let shared = Arc::clone(&self.shared);
        let sockets = Arc::clone(&self.sockets);
        let mut state = peer.state.lock();
        if state.removed {
            return false;
        }
        let identities = shared.identities();
        let begins = state.initiating_identity(identities.current.as_ref(), identities.next.as_ref());
        let mut position = 0;
        while let Some((index, due)) = state.tick_lane(position, self.batch.space()) {
            position += 1;
            let lane_begins = begins
                .as_ref()
                .is_some_and(|begins| state.lane_of(begins).is_some_and(|lane| lane.index() == index));
            match due {
                Due::Initiation(length) if lane_begins => {
                    self.batch.add(length, 0);
                    shared.counters.count(Count::InitiationsSent);
                }
                Due::Keepalive(length) => self.batch.add(length, 0),
                Due::GaveUp if lane_begins => state.drop_waiting(&shared.counters),
                Due::Initiation(_) | Due::GaveUp | Due::Nothing => {}
            }
            peer.send(&mut state, &mut outlet(&mut self.batch, &sockets, &shared));
        }
        let over = state.remove_lanes(|lane| lane.is_retired() && !lane.is_awake(now));
        shared.table.remove_lanes(&over);
        if state
            .keepalive
            .is_some_and(|keepalive| now.saturating_duration_since(state.last_traffic) >= keepalive)
            && !peer.send_keepalive(&mut state, &mut outlet(&mut self.batch, &sockets, &shared))
        {
            self.initiate(peer, &mut state);
        }
        state.in_wheel = state.is_awake(now);
        state.in_wheel
    }
}

fn outlet<'a>(batch: &'a mut SendBatch, sockets: &'a Sockets, shared: &'a Shared) -> Outlet<'a> {
    Outlet { batch, sockets: sockets.pair(0), counters: &shared.counters, mtu: shared.mtu }
}

/// The sender's key for this handshake, at this place of a message whose length was checked.
fn ephemeral_key(message: &[u8], at: usize) -> x25519::PublicKey {
    let mut key = [0; 32];
    key.copy_from_slice(&message[at..at + 32]);
    key.into()
}
