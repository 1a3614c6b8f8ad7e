//! From the network to the machine: datagrams are decrypted, their source checked, joined and given to the TUN device.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Count;
use super::checksum;
use super::gro::Coalescer;
use super::identity::Verdict;
use super::inbox::HandshakeMessage;
use super::lane::{HANDSHAKE_MAX, is_data, receiver_index};
use super::peer::{Outlet, Peer};
use super::shared::{Identities, Shared};
use super::table::TableCache;
use super::tun::Queues;
use super::udp::{Datagrams, Endpoint, Pair, SendBatch};

/// Bytes decrypted before they are given to the machine: a few large segments, which stay in the cache.
const ARENA: usize = 256 << 10;

/// Packets in a batch, about.
const PACKETS: usize = 256;

pub(crate) struct Inbound {
    arena: Box<[u8]>,
    filled: usize,
    coalescer: Coalescer,
    identities: Identities,
    identities_generation: u64,
    batch: SendBatch,
}

/// What receiving needs besides.
pub(crate) struct Inlet<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) cache: &'a mut TableCache,
    pub(crate) queues: &'a Queues,
    pub(crate) sockets: &'a Pair,
}

impl Inbound {
    pub(crate) fn new(shared: &Shared) -> Self {
        Self {
            arena: vec![0; ARENA].into(),
            filled: 0,
            coalescer: Coalescer::new(PACKETS, shared.tun.takes_udp_segments()),
            identities: Identities::default(),
            identities_generation: 0,
            // Cookies, and packets that waited for a session to be confirmed.
            batch: SendBatch::new(128 << 10),
        }
    }

    /// Takes in one message's datagrams.
    pub(crate) fn take(&mut self, inlet: &mut Inlet<'_>, datagrams: Datagrams<'_>) {
        let Datagrams { bytes, size, from, congested } = datagrams;
        let mut rest: &[u8] = bytes;
        while !rest.is_empty() {
            let first = &rest[..size.min(rest.len())];
            if !is_data(first) {
                self.handshake(inlet, first, from);
                rest = &rest[first.len()..];
                continue;
            }
            // Those that follow for the same session are done in one go.
            let session = &first[..8];
            let run = rest
                .chunks(size)
                .take_while(|datagram| is_data(datagram) && datagram.starts_with(session))
                .map(<[u8]>::len)
                .sum();
            let (run, behind) = rest.split_at(run);
            self.data(inlet, run, size, from, congested);
            rest = behind;
        }
    }

    /// Gives what was decrypted to the machine.
    pub(crate) fn flush(&mut self, queues: &Queues, shared: &Shared) {
        self.coalescer.flush(&mut self.arena, |flow, frame| {
            if queues.write(flow, frame).is_err() {
                shared.counters.count(Count::NotTaken);
            }
        });
        self.filled = 0;
    }

    fn data(&mut self, inlet: &mut Inlet<'_>, run: &[u8], size: usize, from: Endpoint, congested: bool) {
        let shared = inlet.shared;
        let counters = &shared.counters;
        let Some(session) = receiver_index(run) else { return };
        let Some(peer) = inlet.cache.peer_of_session(&shared.table, session) else {
            counters.add(Count::UnknownSession, run.len().div_ceil(size) as u64);
            return;
        };
        let peer = Arc::clone(peer);
        let mut state = peer.state.lock();
        let (mut packets, mut bytes, mut confirmed) = (0, 0, None);
        for datagram in run.chunks(size) {
            if self.arena.len() - self.filled < datagram.len() {
                self.flush(inlet.queues, shared);
            }
            let start = self.filled;
            let Some(lane) = state.lane_of_session(session) else {
                counters.count(Count::UnknownSession);
                continue;
            };
            let opened = match lane.open(datagram, &mut self.arena[start..]) {
                Ok(opened) => opened,
                Err(reason) => {
                    counters.count(reason);
                    continue;
                }
            };
            bytes += datagram.len() as u64;
            if opened.confirmed {
                confirmed = Some(lane.index());
            }
            if opened.length == 0 {
                continue;
            }
            let packet = &mut self.arena[start..start + opened.length];
            if !owns_source(inlet, &peer, packet) {
                counters.count(Count::ForgedSource);
                continue;
            }
            if congested {
                mark_congested(packet);
            }
            self.coalescer.push(&self.arena, start..start + opened.length);
            self.filled = (start + opened.length).next_multiple_of(64).min(self.arena.len());
            packets += 1;
        }
        counters.add(Count::ReceivedPackets, packets);
        if bytes == 0 {
            return;
        }
        peer.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
        state.last_traffic = Instant::now();
        // What is authentic tells where the peer is now.
        if state.endpoint != Some(from) {
            state.endpoint = Some(from);
        }
        if let Some(lane) = confirmed {
            state.confirm(lane, counters);
            let mut outlet =
                Outlet { batch: &mut self.batch, sockets: inlet.sockets, counters, mtu: shared.mtu };
            peer.send_waiting(&mut state, &mut outlet);
        }
    }

    /// Everything that is not data: looked at here as far as is cheap, and left to the handshake thread.
    fn handshake(&mut self, inlet: &Inlet<'_>, message: &[u8], from: Endpoint) {
        let shared = inlet.shared;
        let counters = &shared.counters;
        if message.len() > HANDSHAKE_MAX {
            counters.count(Count::Malformed);
            return;
        }
        let generation = shared.identities_generation();
        if generation != self.identities_generation {
            self.identities_generation = generation;
            self.identities = shared.identities();
        }
        let mut refused = Count::BadMac;
        for identity in self.identities.current.iter().chain(&self.identities.next) {
            let under_load = match identity.admit(from.remote.ip(), message, self.batch.space()) {
                Verdict::NotForUs => continue,
                Verdict::Refused(reason) => {
                    refused = reason;
                    break;
                }
                Verdict::Cookie(length) => {
                    self.batch.add(length, 0);
                    let sent = self.batch.send(inlet.sockets, &mut from.clone());
                    counters.add(Count::CookiesSent, sent.datagrams);
                    refused = Count::NoCookie;
                    break;
                }
                Verdict::Welcome => false,
                Verdict::UnderLoad => true,
            };
            if let Some(session) = receiver_index(message)
                && shared.table.peer_of_session(session).is_none()
            {
                refused = Count::UnknownSession;
                break;
            }
            let mut bytes = [0; HANDSHAKE_MAX];
            bytes[..message.len()].copy_from_slice(message);
            let length = message.len();
            let identity = Arc::clone(identity);
            if !shared.inbox.put(HandshakeMessage { bytes, length, from, identity, under_load }) {
                counters.count(Count::HandshakeQueueFull);
            }
            return;
        }
        counters.count(refused);
    }
}

/// Whether the peer may send from the source address of this packet: cryptokey routing.
fn owns_source(inlet: &mut Inlet<'_>, peer: &Arc<Peer>, packet: &[u8]) -> bool {
    let source = match packet[0] >> 4 {
        4 => packet
            .get(12..16)
            .and_then(|octets| octets.first_chunk::<4>())
            .map(|octets| IpAddr::from(*octets)),
        _ => packet
            .get(8..24)
            .and_then(|octets| octets.first_chunk::<16>())
            .map(|octets| IpAddr::from(*octets)),
    };
    let owner = source.and_then(|source| inlet.cache.owner(&inlet.shared.table, source));
    owner.is_some_and(|owner| Arc::ptr_eq(owner, peer) || peer.may_send_as(owner))
}

/// Carries the mark of congestion over from the datagram to the packet, if it is one that may be marked (RFC 6040).
fn mark_congested(packet: &mut [u8]) {
    const CE: u8 = 3;
    if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 15) * 4;
        if packet[1] & CE != 0 && (20..=packet.len()).contains(&header) {
            packet[1] |= CE;
            packet[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(&packet[..header], 0));
            packet[10..12].copy_from_slice(&sum.to_ne_bytes());
        }
    } else if (packet[1] >> 4) & CE != 0 {
        packet[1] |= CE << 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::testing::{Family, TestPacket, packet_is_sound};

    #[test]
    fn the_mark_of_congestion_is_carried_over_to_packets_that_may_be_marked_and_to_no_others() {
        let mut v4 = TestPacket::tcp(Family::V4, 1, vec![1; 10]).build();
        let mut v6 = TestPacket::tcp(Family::V6, 1, vec![1; 10]).build();
        for packet in [&mut v4, &mut v6] {
            let before = packet.clone();
            mark_congested(packet);
            assert_eq!(*packet, before, "its sender does not know congestion marks");
        }
        v4[1] |= 2;
        v6[1] |= 2 << 4;
        for packet in [&mut v4, &mut v6] {
            mark_congested(packet);
            assert!(packet_is_sound(packet));
        }
        assert_eq!((v4[1], v6[1]), (3, 3 << 4));
    }
}
