//! A peer: where it is, the sessions with it, and the packets that wait for one.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use parking_lot::Mutex;

use super::Count;
use super::counters::Counters;
use super::identity::Identity;
use super::lane::{Due, HANDSHAKE_MAX, Lane, OVERHEAD, Sealed, padded_length};
use super::udp::{Endpoint, Pair, SendBatch};
use crate::config::{PresharedKey, PublicKey};

/// Bytes of packets that wait for a handshake with one peer, and with all of them.
const WAITING_MAX: usize = 256 << 10;
const WAITING_TOTAL_MAX: usize = 64 << 20;

/// Initiations of one peer that are answered: one in this time.
const INITIATION_INTERVAL: Duration = Duration::from_millis(20);

/// A peer.
pub(crate) struct Peer {
    pub(crate) key: PublicKey,
    /// Spreads the peers over the slots of the timer wheel.
    pub(crate) number: u32,
    /// Peers of one family are one node before and after a change of its key: what one owns the other may use.
    pub(crate) family: AtomicU64,
    pub(crate) rx_bytes: AtomicU64,
    pub(crate) tx_bytes: AtomicU64,
    /// The prefixes it owns. Only changed while the device is configured.
    pub(crate) prefixes: Mutex<HashSet<IpNet>>,
    pub(crate) state: Mutex<PeerState>,
}

/// What changes as packets come and go. Whoever sends to the peer does so while holding it, so that datagrams leave in
/// the order of their counters, also when several workers send.
pub(crate) struct PeerState {
    pub(crate) endpoint: Option<Endpoint>,
    pub(crate) preshared: Option<PresharedKey>,
    pub(crate) keepalive: Option<Duration>,
    pub(crate) last_handshake: Option<SystemTime>,
    pub(crate) successor_of: Option<PublicKey>,
    /// The peer this one takes over from, as long as it exists.
    pub(crate) predecessor: Option<Arc<Peer>>,
    /// The peer that takes over from this one.
    pub(crate) successor: Option<Weak<Peer>>,
    pub(crate) last_traffic: Instant,
    /// The handshake thread has been asked to look at it and has not yet, ...
    pub(crate) look_asked: bool,
    /// ... and to begin a handshake.
    pub(crate) handshake_asked: bool,
    /// It is in the timer wheel.
    pub(crate) in_wheel: bool,
    /// It is no peer any more, and some worker still knows it.
    pub(crate) removed: bool,
    lanes: Vec<Lane>,
    /// Index of the lane that data goes out on: the one whose session the peer confirmed last.
    sending: Option<u32>,
    last_initiation: Option<Instant>,
    waiting: Waiting,
}

/// What sending needs besides the peer.
pub(crate) struct Outlet<'a> {
    pub(crate) batch: &'a mut SendBatch,
    pub(crate) sockets: &'a Pair,
    pub(crate) counters: &'a Counters,
    pub(crate) mtu: usize,
}

impl Peer {
    pub(crate) fn new(key: PublicKey, number: u32, family: u64, waiting: Arc<AtomicUsize>) -> Self {
        let state = PeerState {
            endpoint: None,
            preshared: None,
            keepalive: None,
            last_handshake: None,
            successor_of: None,
            predecessor: None,
            successor: None,
            last_traffic: Instant::now(),
            look_asked: false,
            handshake_asked: false,
            in_wheel: false,
            removed: false,
            lanes: Vec::new(),
            sending: None,
            last_initiation: None,
            waiting: Waiting { packets: VecDeque::new(), bytes: 0, total: waiting },
        };
        Self {
            key,
            number,
            family: AtomicU64::new(family),
            rx_bytes: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            prefixes: Mutex::default(),
            state: Mutex::new(state),
        }
    }

    /// Whether what comes from this peer may have an address that `owner` owns.
    pub(crate) fn may_send_as(&self, owner: &Self) -> bool {
        self.family.load(Ordering::Relaxed) == owner.family.load(Ordering::Relaxed)
    }

    /// Sends what is gathered in the outlet.
    pub(crate) fn send(&self, state: &mut PeerState, outlet: &mut Outlet<'_>) {
        if outlet.batch.is_empty() {
            return;
        }
        let Some(endpoint) = &mut state.endpoint else {
            outlet.batch.clear();
            return;
        };
        let sent = outlet.batch.send(outlet.sockets, endpoint);
        outlet.counters.add(Count::SendFailed, sent.failed);
        self.tx_bytes.fetch_add(sent.bytes, Ordering::Relaxed);
        state.last_traffic = Instant::now();
    }

    /// Encrypts `frame[packet]`, and sends first what is gathered if there is no room for more. Bytes behind the
    /// packet are zero while it is padded with them, and then what they were. Returns whether a session is due.
    pub(crate) fn seal(
        &self,
        state: &mut PeerState,
        outlet: &mut Outlet<'_>,
        frame: &mut [u8],
        packet: std::ops::Range<usize>,
    ) -> bool {
        let length = packet.len();
        let padded = padded_length(length, outlet.mtu);
        if !outlet.batch.has_room(padded + OVERHEAD + HANDSHAKE_MAX) {
            self.send(state, outlet);
        }
        let ecn = ecn_bits(&frame[packet.clone()]);
        let Some(lane) = state.sending_lane() else {
            state.waiting.push(&frame[packet], outlet.counters);
            return true;
        };
        let mut behind = [0; 16];
        let padding = packet.end..packet.end + padded - length;
        behind[..padding.len()].copy_from_slice(&frame[padding.clone()]);
        frame[padding.clone()].fill(0);
        let sealed = lane.seal(&frame[packet.start..padding.end], outlet.batch.space());
        frame[padding.clone()].copy_from_slice(&behind[..padding.len()]);
        match sealed {
            Sealed::Datagram(length) => outlet.batch.add(length, ecn),
            Sealed::RekeyDue(length) => {
                outlet.batch.add(length, ecn);
                return true;
            }
            Sealed::Spent => {
                outlet.counters.count(Count::SessionSpent);
                return true;
            }
            Sealed::NoSession => {
                state.waiting.push(&frame[packet], outlet.counters);
                return true;
            }
        }
        false
    }

    /// Encrypts and sends the packets that waited.
    pub(crate) fn send_waiting(&self, state: &mut PeerState, outlet: &mut Outlet<'_>) {
        let mut waiting = std::mem::take(&mut state.waiting.packets);
        for mut packet in waiting.drain(..) {
            let length = packet.len();
            state.waiting.release(length);
            packet.resize(length + 16, 0);
            self.seal(state, outlet, &mut packet, 0..length);
            outlet.counters.count(Count::SentPackets);
        }
        self.send(state, outlet);
    }

    /// An empty packet, to show that we are here.
    pub(crate) fn send_keepalive(&self, state: &mut PeerState, outlet: &mut Outlet<'_>) -> bool {
        let Some(lane) = state.sending_lane() else { return false };
        if let Sealed::Datagram(length) | Sealed::RekeyDue(length) = lane.seal(&[], outlet.batch.space()) {
            outlet.batch.add(length, 0);
        }
        self.send(state, outlet);
        true
    }
}

impl PeerState {
    /// The lane that data goes out on.
    pub(crate) fn sending_lane(&mut self) -> Option<&mut Lane> {
        let position = self.sending_position()?;
        self.lanes.get_mut(position)
    }

    /// Whether data can go out now.
    pub(crate) fn can_send(&self) -> bool {
        self.sending_position().is_some()
    }

    /// Our key that the session for data was agreed under.
    pub(crate) fn session_key(&self) -> Option<PublicKey> {
        self.sending_position().map(|position| self.lanes[position].identity().public())
    }

    fn sending_position(&self) -> Option<usize> {
        let sending = |lane: &Lane| lane.is_established() && Some(lane.index() >> 8) == self.sending;
        let any = |lane: &Lane| lane.is_established();
        self.lanes.iter().position(sending).or_else(|| self.lanes.iter().rposition(any))
    }

    /// The lane of this session index.
    pub(crate) fn lane_of_session(&mut self, session: u32) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| lane.index() == session >> 8)
    }

    /// The lane under this key that is not retired.
    pub(crate) fn lane_of(&mut self, identity: &Arc<Identity>) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| !lane.is_retired() && Arc::ptr_eq(lane.identity(), identity))
    }

    pub(crate) fn lanes_mut(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.lanes.iter_mut()
    }

    pub(crate) fn add_lane(&mut self, lane: Lane) {
        self.lanes.push(lane);
    }

    /// Takes lanes away and returns their indices, which are free then.
    pub(crate) fn remove_lanes(&mut self, mut which: impl FnMut(&Lane) -> bool) -> Vec<u32> {
        let mut indices = Vec::new();
        self.lanes.retain(|lane| {
            let goes = which(lane);
            if goes {
                indices.push(lane.index());
            }
            !goes
        });
        indices
    }

    /// The key that this device begins handshakes with this peer under: the next one once the peer has shown that it
    /// knows it, otherwise the current one.
    pub(crate) fn initiating_identity(
        &self,
        current: Option<&Arc<Identity>>,
        next: Option<&Arc<Identity>>,
    ) -> Option<Arc<Identity>> {
        let sending = self.sending_position().map(|position| self.lanes[position].identity());
        match (sending, next) {
            (Some(sending), Some(next)) if Arc::ptr_eq(sending, next) => Some(Arc::clone(next)),
            _ => current.cloned(),
        }
    }

    /// The peer has shown that it has the session of this lane: data goes out on it from now on.
    pub(crate) fn confirm(&mut self, lane: u32, counters: &Counters) {
        self.sending = Some(lane);
        self.last_handshake = Some(SystemTime::now());
        counters.count(Count::Handshakes);
    }

    /// Whether the peer's latest initiation that was answered is too recent for another.
    pub(crate) fn initiation_is_too_soon(&self, now: Instant) -> bool {
        self.last_initiation.is_some_and(|last| now < last + INITIATION_INTERVAL)
    }

    /// Notes that an initiation was authentic and is answered. Anybody can make one that only seems to be the peer's:
    /// such must not keep the peer's own from being answered.
    pub(crate) fn initiation_answered(&mut self, now: Instant) {
        self.last_initiation = Some(now);
    }

    /// Whether time matters to it.
    pub(crate) fn is_awake(&self, now: Instant) -> bool {
        !self.removed && (self.keepalive.is_some() || self.lanes.iter().any(|lane| lane.is_awake(now)))
    }

    /// Whether packets wait for a session.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.packets.is_empty()
    }

    /// Drops the packets that wait.
    pub(crate) fn drop_waiting(&mut self, counters: &Counters) {
        counters.add(Count::NoSession, self.waiting.packets.len() as u64);
        self.waiting.clear();
    }

    /// Lets each lane do what is due, and says what is to be sent on which: see [`Due`].
    pub(crate) fn tick_lane(&mut self, position: usize, out: &mut [u8]) -> Option<(u32, Due)> {
        let lane = self.lanes.get_mut(position)?;
        Some((lane.index(), lane.tick(out)))
    }
}

/// Packets that wait for a handshake, the oldest first. Bounded in bytes, for each peer and in all.
struct Waiting {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
    total: Arc<AtomicUsize>,
}

impl Waiting {
    /// Lets a packet wait. The oldest goes if there is no room.
    fn push(&mut self, packet: &[u8], counters: &Counters) {
        while self.bytes + packet.len() > WAITING_MAX {
            let Some(oldest) = self.packets.pop_front() else { break };
            self.release(oldest.len());
            counters.count(Count::NoSession);
        }
        if self.total.load(Ordering::Relaxed) + packet.len() > WAITING_TOTAL_MAX {
            counters.count(Count::NoSession);
            return;
        }
        self.total.fetch_add(packet.len(), Ordering::Relaxed);
        self.bytes += packet.len();
        self.packets.push_back(packet.to_vec());
    }

    fn release(&mut self, bytes: usize) {
        self.bytes -= bytes;
        self.total.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn clear(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
        self.packets = VecDeque::new();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The ECN field of an IP packet, which the datagram around it carries, too (RFC 6040).
fn ecn_bits(packet: &[u8]) -> u8 {
    match packet {
        [first, class, ..] if first >> 4 == 4 => class & 3,
        [first, class, ..] if first >> 4 == 6 => (class >> 4) & 3,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ecn_field_is_read_from_both_families_and_the_class_beside_it_is_not() {
        assert_eq!(ecn_bits(&[0x45, 0b1011_1010]), 2);
        assert_eq!(ecn_bits(&[0x6b, 0b1001_1111]), 1);
        assert_eq!(ecn_bits(&[]), 0);
    }

    #[test]
    fn what_waits_is_bounded_for_one_peer_and_for_all_and_the_oldest_goes_first() {
        let (counters, total) = (Counters::default(), Arc::new(AtomicUsize::new(0)));
        let waiting = || Waiting { packets: VecDeque::new(), bytes: 0, total: Arc::clone(&total) };
        let mut one = waiting();
        for number in 0..300u16 {
            let mut packet = vec![0; 1024];
            packet[..2].copy_from_slice(&number.to_be_bytes());
            one.push(&packet, &counters);
        }
        assert_eq!(one.bytes, WAITING_MAX);
        assert_eq!(one.packets[0][..2], (300 - 256u16).to_be_bytes());
        let others: Vec<_> = (0..400)
            .map(|_| {
                let mut other = waiting();
                (0..256).for_each(|_| other.push(&[0; 1024], &counters));
                other
            })
            .collect();
        assert_eq!(total.load(Ordering::Relaxed), WAITING_TOTAL_MAX);
        drop((one, others));
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }
}
