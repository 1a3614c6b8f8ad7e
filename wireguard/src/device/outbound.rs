//! From the machine to the network: frames from the TUN device are cut into packets, encrypted and sent.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use super::Count;
use super::gso::Segments;
use super::peer::{Outlet, Peer};
use super::shared::Shared;
use super::table::TableCache;
use super::tun::{FRAME_MAX, Queue};
use super::udp::{Pair, SendBatch};
use super::vnet::{VNET_HEADER, VnetHeader};

/// Bytes read before anything is sent: what stays in the second-level cache, with its encrypted copy.
const ARENA: usize = 4 * FRAME_MAX;

/// Frames read before anything is sent.
const FRAMES: usize = 128;

/// Bytes behind each frame that padding may use.
const BEHIND: usize = 16;

/// Bytes gathered before they are sent: what `ARENA` becomes at most, roughly.
const BATCH: usize = 5 * FRAME_MAX;

pub(crate) struct Outbound {
    arena: Box<[u8]>,
    frames: Vec<Frame>,
    pub(crate) batch: SendBatch,
}

struct Frame {
    start: usize,
    end: usize,
    header: VnetHeader,
    peer: Arc<Peer>,
}

impl Outbound {
    pub(crate) fn new() -> Self {
        Self {
            arena: vec![0; ARENA].into(),
            frames: Vec::with_capacity(FRAMES),
            batch: SendBatch::new(BATCH),
        }
    }

    /// Takes the frames that are there, at most a batch, and sends them.
    ///
    /// # Errors
    /// When the interface is gone.
    pub(crate) fn round(
        &mut self,
        queue: &Queue,
        shared: &Shared,
        cache: &mut TableCache,
        sockets: &Pair,
    ) -> io::Result<()> {
        let read = self.read(queue, shared, cache);
        let mut outlet =
            Outlet { batch: &mut self.batch, sockets, counters: &shared.counters, mtu: shared.mtu };
        let mut rest = &self.frames[..];
        while let Some(first) = rest.first() {
            let same = rest.iter().take_while(|frame| Arc::ptr_eq(&frame.peer, &first.peer)).count();
            let (frames, behind) = rest.split_at(same);
            send_to_peer(frames, &mut self.arena, shared, &mut outlet);
            rest = behind;
        }
        self.frames.clear();
        read
    }

    fn read(&mut self, queue: &Queue, shared: &Shared, cache: &mut TableCache) -> io::Result<()> {
        let mut at = 0;
        // Those that go nowhere count, too: a flood of them does not keep the worker from the network.
        for _ in 0..FRAMES {
            if self.arena.len() - at < FRAME_MAX {
                break;
            }
            let Some(length) = queue.read(&mut self.arena[at..at + FRAME_MAX - BEHIND])? else { break };
            let (start, end) = (at + VNET_HEADER, at + length);
            let Some(header) = self.arena[at..end].first_chunk().and_then(VnetHeader::parse) else {
                shared.counters.count(Count::BadFrame);
                continue;
            };
            let Some(destination) = destination(&self.arena[start..end]) else {
                shared.counters.count(Count::BadFrame);
                continue;
            };
            let Some(peer) = cache.owner(&shared.table, destination) else {
                shared.counters.count(Count::NoPeer);
                continue;
            };
            self.frames.push(Frame { start, end, header, peer: Arc::clone(peer) });
            at = (end + BEHIND).next_multiple_of(64);
        }
        Ok(())
    }
}

/// Sends frames that one peer owns the destinations of.
fn send_to_peer(frames: &[Frame], arena: &mut [u8], shared: &Shared, outlet: &mut Outlet<'_>) {
    let Some(owner) = frames.first().map(|frame| &frame.peer) else { return };
    let peer = with_session(owner, shared);
    let mut state = peer.state.lock();
    if state.endpoint.is_none() || state.removed {
        outlet.counters.add(Count::NoEndpoint, frames.len() as u64);
        return;
    }
    let (mut packets, mut session_due) = (0, false);
    for frame in frames {
        // The frame, and behind it what padding may use.
        let bytes = &mut arena[frame.start..(frame.end + BEHIND)];
        let length = frame.end - frame.start;
        let Ok(mut segments) = Segments::new(&mut bytes[..length], &frame.header) else {
            outlet.counters.count(Count::BadFrame);
            continue;
        };
        while let Some(packet) = segments.next(&mut bytes[..length]) {
            session_due |= peer.seal(&mut state, outlet, bytes, packet);
            packets += 1;
        }
    }
    if session_due {
        shared.want_handshake(&peer, &mut state);
        if state.has_waiting() {
            // They are counted when they go.
            packets = 0;
        }
    }
    peer.send(&mut state, outlet);
    outlet.counters.add(Count::SentPackets, packets);
}

/// The owner, or as long as there is no session under its key the peer that it takes over from, if that one has one.
fn with_session(owner: &Arc<Peer>, shared: &Shared) -> Arc<Peer> {
    let mut state = owner.state.lock();
    if !state.can_send()
        && let Some(before) = state.predecessor.clone()
    {
        shared.want_handshake(owner, &mut state);
        drop(state);
        if before.state.lock().can_send() {
            return before;
        }
    }
    Arc::clone(owner)
}

/// Where an IP packet goes.
fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 if packet.len() >= 20 => Some(IpAddr::from(*packet[16..].first_chunk::<4>()?)),
        6 if packet.len() >= 40 => Some(IpAddr::from(*packet[24..].first_chunk::<16>()?)),
        _ => None,
    }
}
