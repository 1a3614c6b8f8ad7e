//! Fragments. Only the first has ports: it is translated like any packet, and where it went is remembered for the
//! later ones. A later one that overtakes its first is passed as it is, and the datagram is lost, as on any network that
//! loses one.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Addr, Counter, FragmentEntry};

use crate::Verdict;
use crate::count::count;
use crate::maps::FRAGMENTS;
use crate::packet::{Fragment, Packet};
use crate::rewrite::{End, HalfWritten, rewrite, swap_macs};

/// Notes where the fragments after `packet` go, if it is the first of some.
#[inline(always)]
pub fn remember<const V4: bool>(packet: &Packet<V4>, source: &Addr, destination: &Addr, hairpin: bool) {
    if packet.fragment == Fragment::First {
        let entry = FragmentEntry { source: *source, destination: *destination, hairpin: hairpin as u32 };
        if FRAGMENTS.insert(&packet.fragment_key(), &entry, 0).is_err() {
            count(Counter::TcError);
        }
    }
}

/// Forgets an earlier datagram with the same identification, when the first fragment of this one is not translated: or
/// its later ones would be.
#[inline(always)]
pub fn forget<const V4: bool>(packet: &Packet<V4>) {
    if packet.fragment == Fragment::First {
        // There hardly ever is one.
        let _ = FRAGMENTS.remove(&packet.fragment_key());
    }
}

/// Sends a later fragment after its first.
#[inline(always)]
pub fn follow<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Result<Verdict, HalfWritten> {
    // SAFETY: an entry is reused only after it was the least recently used of a full map.
    let Some(entry) = (unsafe { FRAGMENTS.get(&packet.fragment_key()) }) else { return Ok(Verdict::Pass) };
    let source = End { addr: &entry.source, port_be: 0 };
    let destination = End { addr: &entry.destination, port_be: 0 };
    let hairpin = entry.hairpin != 0;
    rewrite(ctx, packet, Some(source), Some(destination))?;
    count(Counter::TcFragment);
    if !hairpin {
        return Ok(Verdict::Pass);
    }
    swap_macs(ctx)?;
    Ok(Verdict::TurnBack)
}
