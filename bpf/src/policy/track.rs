//! Flows that were decided.
//!
//! A flow is decided in the direction in which it began, with its first packet, and again with the next packet of either
//! direction after the epoch has changed. An entry of a flow that was let through is never removed when it is cut: it
//! stays, undecided, so that the other side's packets cannot pass for the beginning of another flow.
//!
//! While an endpoint has no policy, only the packets that begin and end TCP connections are noted. That costs the others
//! nothing, and a policy that comes later finds out which side has begun.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::endpoint_flags::{EGRESS_ENFORCED, INGRESS_ENFORCED, WAITING};
use isthmus_bpf_abi::policy_ct_flags::{EGRESS, HOST, UNSEEN};
use isthmus_bpf_abi::{Counter, DropReason, Endpoint, PolicyCtEntry, reserved_identity};

use crate::config::{jiffies_per_second, now};
use crate::conntrack::{after_forward, from_reply, idle, is_expired, is_reused, is_stale};
use crate::count::count;
use crate::event;
use crate::maps::POLICY_CT;

use super::flow::{Flow, Kind};
use super::rules::{self, Decision};

/// Seconds for which the later fragments may follow: as long as a receiver waits for them (RFC 8200).
const FRAGMENT_SECONDS: u32 = 60;

/// Whether a packet of an endpoint with a policy may pass: non-zero.
#[inline(never)]
pub fn judge(skb: *mut __sk_buff, endpoint: &Endpoint, flow: &Flow, epoch: u32) -> u64 {
    let ctx = &TcContext::new(skb);
    let now = now();
    if flow.kind == Kind::LaterFragment {
        return judge_fragment(ctx, endpoint, flow, now) as u64;
    }
    let allowed = match known(flow, now) {
        Some(entry) => go_on(ctx, endpoint, flow, entry, epoch, now),
        None => begin(ctx, endpoint, flow, epoch, now),
    };
    if flow.fragments {
        note_first_fragment(flow, allowed);
    }
    allowed as u64
}

/// What is known of the packet's flow, if that lives and the packet does not begin another one.
#[inline(always)]
fn known<'a>(flow: &Flow, now: u32) -> Option<&'a mut PolicyCtEntry> {
    let entry = POLICY_CT.get_ptr_mut(&flow.key)?;
    // SAFETY: the kernel keeps map values readable while the program runs; racing writes are of single words.
    let entry = unsafe { &mut *entry };
    let flags = entry.flags;
    let forward = (flags & EGRESS != 0) == flow.egress;
    if is_over(entry, flow.key.protocol as u8, now) {
        return None;
    }
    // The port of a connection that has ended is used again; or the other side would begin one by the leave that this
    // side has for its own.
    let anew = flow.kind == Kind::Begins && flow.tcp_flags != 0 && (!forward || is_reused(flags, flow.tcp_flags));
    if anew { None } else { Some(entry) }
}

#[inline(always)]
fn is_over(entry: &PolicyCtEntry, protocol: u8, now: u32) -> bool {
    use isthmus_bpf_abi::ct_flags::{ESTABLISHED, FIN_FORWARD, FIN_REPLY, RESET};
    let flags = entry.flags;
    if flags & UNSEEN != 0 && flags & (RESET | FIN_FORWARD | FIN_REPLY) == 0 {
        return false;
    }
    let established = if flags & UNSEEN != 0 { ESTABLISHED } else { 0 };
    is_expired(idle(now, entry.last_seen), protocol, flags | established)
}

/// A packet of a known flow.
#[inline(always)]
fn go_on(
    ctx: &TcContext,
    endpoint: &Endpoint,
    flow: &Flow,
    entry: &mut PolicyCtEntry,
    epoch: u32,
    now: u32,
) -> bool {
    let flags = entry.flags;
    let begun_by_endpoint = flags & EGRESS != 0;
    let forward = begun_by_endpoint == flow.egress;
    let former = entry.epoch;
    if former != epoch && flags & HOST == 0 {
        // As of its first packet.
        let identity = rules::identity_of(&flow.key.remote);
        let (protocol, port_be) = (flow.key.protocol as u8, flow.first_port_be(begun_by_endpoint));
        let decision = rules::decide(endpoint, begun_by_endpoint, identity, protocol, port_be);
        if !decision.is_allowed() {
            entry.epoch = 0;
            entry.last_seen = now;
            drop_packet(ctx, endpoint, flow, begun_by_endpoint, identity, decision);
            return false;
        }
        entry.epoch = epoch;
        entry.identity = identity;
        if former == 0 {
            count(Counter::PolicyForwarded);
            event::forwarded(ctx, flow, endpoint, begun_by_endpoint, identity, decision.rule);
        }
    }
    if flow.kind == Kind::Related {
        return true;
    }
    let protocol = flow.key.protocol as u8;
    let noted = flags & !UNSEEN;
    let noted = if forward {
        after_forward(noted, protocol, flow.tcp_flags)
    } else {
        noted | from_reply(flow.tcp_flags)
    };
    if noted != flags {
        entry.flags = noted;
    }
    if noted != flags || is_stale(idle(now, entry.last_seen)) {
        entry.last_seen = now;
    }
    true
}

/// A packet of no known flow.
#[inline(always)]
fn begin(ctx: &TcContext, endpoint: &Endpoint, flow: &Flow, epoch: u32, now: u32) -> bool {
    let (identity, decision) = if flow.from_host {
        (reserved_identity::HOST, Decision::HOST)
    } else {
        let identity = rules::identity_of(&flow.remote);
        (identity, rules::decide(endpoint, flow.egress, identity, flow.protocol, flow.own_port_be()))
    };
    if !decision.is_allowed() {
        drop_packet(ctx, endpoint, flow, flow.egress, identity, decision);
        return false;
    }
    if !matches!(flow.kind, Kind::Begins | Kind::Continues) {
        return true;
    }
    let by_host = identity == reserved_identity::HOST && !flow.egress;
    let entry = PolicyCtEntry {
        epoch,
        last_seen: now,
        flags: after_forward(0, flow.key.protocol as u8, flow.tcp_flags)
            | if flow.egress { EGRESS } else { 0 }
            | if by_host { HOST } else { 0 },
        identity,
    };
    if POLICY_CT.insert(&flow.key, &entry, 0).is_err() {
        count(Counter::PolicyError);
    }
    count(Counter::PolicyForwarded);
    event::forwarded(ctx, flow, endpoint, flow.egress, identity, decision.rule);
    true
}

#[inline(always)]
fn drop_packet(
    ctx: &TcContext,
    endpoint: &Endpoint,
    flow: &Flow,
    asked_egress: bool,
    identity: u32,
    decision: Decision,
) {
    count(match decision.reason {
        DropReason::Denied => Counter::PolicyDenied,
        DropReason::Waiting => Counter::PolicyWaiting,
        _ => Counter::PolicyNoRule,
    });
    event::refused(ctx, flow, endpoint, asked_egress, identity, decision);
}

#[inline(always)]
fn judge_fragment(ctx: &TcContext, endpoint: &Endpoint, flow: &Flow, now: u32) -> bool {
    let enforced = if flow.egress { EGRESS_ENFORCED } else { INGRESS_ENFORCED };
    if flow.from_host || endpoint.flags & (enforced | WAITING) == 0 {
        return true;
    }
    if let Some(first) = POLICY_CT.get_ptr(&flow.key) {
        // SAFETY: an entry is reused only after it was the least recently used of a full map.
        let idle = idle(now, unsafe { (*first).last_seen });
        if idle <= FRAGMENT_SECONDS * jiffies_per_second() {
            return true;
        }
    }
    count(Counter::PolicyFragment);
    event::dropped(ctx, flow, endpoint, DropReason::Fragment);
    false
}

/// The later fragments follow this one. An identification that is used again does not follow its last use.
#[inline(never)]
fn note_first_fragment(flow: &Flow, allowed: bool) -> u64 {
    let key = flow.fragments_key();
    if allowed {
        let entry = PolicyCtEntry { epoch: 0, last_seen: now(), flags: 0, identity: 0 };
        if POLICY_CT.insert(&key, &entry, 0).is_err() {
            count(Counter::PolicyError);
        }
    } else {
        // There hardly ever is one.
        let _ = POLICY_CT.remove(&key);
    }
    0
}

/// A packet that begins or ends a connection of an endpoint without a policy.
#[inline(never)]
pub fn note_unenforced(flow: &Flow) -> u64 {
    let now = now();
    if flow.kind == Kind::Begins {
        let flags = UNSEEN | if flow.egress { EGRESS } else { 0 } | if flow.from_host { HOST } else { 0 };
        let entry = PolicyCtEntry { epoch: 0, last_seen: now, flags, identity: 0 };
        if POLICY_CT.insert(&flow.key, &entry, 0).is_err() {
            count(Counter::PolicyError);
        }
        return 0;
    }
    if let Some(entry) = POLICY_CT.get_ptr_mut(&flow.key) {
        // SAFETY: the kernel keeps map values readable while the program runs; racing writes are of single words.
        let entry = unsafe { &mut *entry };
        let forward = (entry.flags & EGRESS != 0) == flow.egress;
        entry.flags |=
            if forward { after_forward(0, flow.key.protocol as u8, flow.tcp_flags) } else { from_reply(flow.tcp_flags) };
        entry.last_seen = now;
    }
    0
}
