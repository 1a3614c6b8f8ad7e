//! Tells user space of verdicts. How many per second is limited per CPU, apart for packets that were dropped and for those
//! that were not, so that a flood of the one leaves room for the other.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Addr, Counter, DropReason, Endpoint, PolicyEvent, PolicyVerdict, event_flags};

use crate::config::{events_per_second, jiffies_per_second, now};
use crate::conntrack::idle;
use crate::count::count;
use crate::maps::{EVENT_BUDGET, EVENTS};
use crate::packet::{ICMP, ICMPV6, write_addr};
use crate::policy::{Decision, Flow, Kind, identity_of};

/// What there is to tell besides the flow.
struct Told {
    own_identity: u32,
    other_identity: u32,
    rule: u32,
    verdict: PolicyVerdict,
    reason: DropReason,
    /// The endpoint's egress policy was asked.
    egress: bool,
}

/// The first packet of a flow went on.
#[inline(always)]
pub fn forwarded(
    ctx: &TcContext,
    flow: &Flow,
    endpoint: &Endpoint,
    asked_egress: bool,
    identity: u32,
    rule: u32,
) {
    let told = Told {
        own_identity: endpoint.identity,
        other_identity: identity,
        rule,
        verdict: PolicyVerdict::Forwarded,
        reason: DropReason::None,
        egress: asked_egress,
    };
    tell(ctx.skb.skb, flow, &told);
}

/// A packet was dropped by the rules.
#[inline(always)]
pub fn refused(
    ctx: &TcContext,
    flow: &Flow,
    endpoint: &Endpoint,
    asked_egress: bool,
    identity: u32,
    decision: Decision,
) {
    let told = Told {
        own_identity: endpoint.identity,
        other_identity: identity,
        rule: decision.rule,
        verdict: PolicyVerdict::Dropped,
        reason: decision.reason,
        egress: asked_egress,
    };
    tell(ctx.skb.skb, flow, &told);
}

/// A packet was dropped before any rule was asked.
#[inline(always)]
pub fn dropped(ctx: &TcContext, flow: &Flow, endpoint: &Endpoint, reason: DropReason) {
    let told = Told {
        own_identity: endpoint.identity,
        other_identity: 0,
        rule: 0,
        verdict: PolicyVerdict::Dropped,
        reason,
        egress: flow.egress,
    };
    tell(ctx.skb.skb, flow, &told);
}

#[inline(never)]
fn tell(skb: *mut __sk_buff, flow: &Flow, told: &Told) -> u64 {
    if !within_budget(told.verdict) {
        count(Counter::EventLimited);
        return 0;
    }
    let Some(mut entry) = EVENTS.reserve::<PolicyEvent>(0) else {
        count(Counter::EventLost);
        return 0;
    };
    let key = &flow.key;
    let other_identity = match told.other_identity {
        0 if key.remote != Addr([0; 4]) => identity_of(&key.remote),
        identity => identity,
    };
    let (source, destination) = if flow.egress { (&key.local, &key.remote) } else { (&key.remote, &key.local) };
    let (source_identity, destination_identity) = if flow.egress {
        (told.own_identity, other_identity)
    } else {
        (other_identity, told.own_identity)
    };
    let protocol = key.protocol as u8;
    let (source_port_be, destination_port_be) = match protocol {
        _ if flow.kind == Kind::LaterFragment => (0, 0),
        ICMP | ICMPV6 => (key.local_port_be, (flow.icmp_type as u16).to_be()),
        _ if flow.egress => (key.local_port_be, key.remote_port_be),
        _ => (key.remote_port_be, key.local_port_be),
    };
    let reply = if told.egress != flow.egress { event_flags::REPLY } else { 0 };
    let related = if flow.kind == Kind::Related { event_flags::RELATED } else { 0 };
    let event = entry.as_mut_ptr();
    // SAFETY: the reserved place has room for the event, which is written whole; the context is the kernel's. Field by
    // field, so that it takes no room on the stack.
    unsafe {
        (*event).time = bpf_ktime_get_ns();
        write_addr(&raw mut (*event).source.0, source);
        write_addr(&raw mut (*event).destination.0, destination);
        (*event).source_identity = source_identity;
        (*event).destination_identity = destination_identity;
        (*event).ifindex = (*skb).ifindex;
        (*event).rule = told.rule;
        (*event).len = (*skb).len;
        (*event).source_port_be = source_port_be;
        (*event).destination_port_be = destination_port_be;
        (*event).protocol = protocol;
        (*event).direction = told.egress as u8;
        (*event).verdict = told.verdict as u8;
        (*event).reason = told.reason as u8;
        (*event).tcp_flags = flow.tcp_flags;
        (*event).flags = reply | related;
        (*event).pad = [0; 2];
    }
    entry.submit(0);
    count(Counter::EventSent);
    0
}

/// Takes one event off this CPU's budget, which is full again each second.
#[inline(always)]
fn within_budget(verdict: PolicyVerdict) -> bool {
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: a value of this CPU's own copy of the map; programs are not migrated while they run.
    let budget = unsafe { &mut *budget };
    let now = now();
    if idle(now, budget.filled) >= jiffies_per_second() {
        budget.filled = now;
        budget.forwarded = events_per_second();
        budget.dropped = events_per_second();
    }
    let left = match verdict {
        PolicyVerdict::Forwarded => &mut budget.forwarded,
        PolicyVerdict::Dropped => &mut budget.dropped,
    };
    if *left == 0 {
        return false;
    }
    *left -= 1;
    true
}
