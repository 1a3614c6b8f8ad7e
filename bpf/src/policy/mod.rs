//! What a pod may send, and what it may get.
//!
//! How a packet is decided:
//! 1. No endpoint is known at all, or not at this interface: it passes, unless there was no room for one.
//! 2. Neighbour discovery passes, and whatever the node itself sends to its pod. What cannot be read is dropped where a
//!    policy is enforced.
//! 3. A flow that is known ([`track`]) goes on as it was decided, both ways, as long as nothing has changed since: one
//!    lookup.
//! 4. Otherwise the rules are asked ([`rules`]), in the direction in which the flow began. An answer that was let
//!    through is remembered.
//!
//! So what is revoked is cut in both directions with the next packet, and what is not goes on without a break.

mod flow;
mod rules;
mod track;

use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::endpoint_flags::{EGRESS_ENFORCED, ENFORCED, INGRESS_ENFORCED, WAITING};
use isthmus_bpf_abi::{Addr, Counter, Direction, DropReason, Endpoint, reserved_identity};

use crate::count::count;
use crate::event;
use crate::ipcache;
use crate::maps::{ENDPOINTS, POLICY_EPOCH};
use crate::packet::{self, ETH_LEN, Family, Packet, at};

pub use flow::{Flow, Kind};
pub use rules::{Decision, identity_of};

/// Written on packets that never leave their pod's interface: a pod that reaches itself through a service is not asked
/// about. Nobody but this program can have written it, see [`forget_vouching`].
const VOUCHED: u16 = 0x1571;

/// Whether the pod behind this interface may send the packet.
#[inline(always)]
pub fn lets_out(ctx: &TcContext) -> bool {
    match endpoint_of(ctx) {
        Some((endpoint, epoch)) => judge_egress(ctx.skb.skb, endpoint, epoch) != 0,
        None => true,
    }
}

/// Whether the pod behind this interface may get the packet.
#[inline(always)]
pub fn lets_in(ctx: &TcContext) -> bool {
    match endpoint_of(ctx) {
        Some((endpoint, epoch)) => {
            take_vouching(ctx) || judge_ingress(ctx.skb.skb, endpoint, epoch) != 0
        }
        None => true,
    }
}

/// The pod's own word for a packet counts for nothing: to be called first on whatever it sends.
#[inline(always)]
pub fn forget_vouching(ctx: &TcContext) {
    // SAFETY: the context is the kernel's, and programs of this type may write this field.
    unsafe {
        let skb = ctx.skb.skb;
        if (*skb).tc_index != 0 {
            (*skb).tc_index = 0;
        }
    }
}

/// Marks a packet that is sent back to the pod that it has come from.
#[inline(always)]
pub fn vouch_for(ctx: &TcContext) {
    // SAFETY: as above.
    unsafe { (*ctx.skb.skb).tc_index = VOUCHED as u32 };
}

#[inline(always)]
fn take_vouching(ctx: &TcContext) -> bool {
    // SAFETY: as above.
    unsafe {
        let skb = ctx.skb.skb;
        let vouched = (*skb).tc_index == VOUCHED as u32;
        if vouched {
            (*skb).tc_index = 0;
        }
        vouched
    }
}

/// The endpoint at this interface, and the epoch: read before anything that it is about.
#[inline(always)]
fn endpoint_of(ctx: &TcContext) -> Option<(&'static Endpoint, u32)> {
    let epoch = POLICY_EPOCH.get_ptr(0)?;
    // SAFETY: an array's element; volatile, so that it is read now.
    let epoch = unsafe { epoch.read_volatile() };
    if epoch == 0 {
        return None;
    }
    // SAFETY: the context is the kernel's.
    let mut key = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: the map is not preallocated, so an element that is found is not reused while the program runs.
    let endpoint = unsafe { ENDPOINTS.get(&key) };
    if let Some(endpoint) = endpoint {
        return Some((endpoint, epoch));
    }
    // Not a reference to the constant: the compiler would merge it with a setting that is 0 until user space says otherwise.
    key = Endpoint::OTHERS;
    // SAFETY: as above.
    let others = unsafe { ENDPOINTS.get(&key) }?;
    Some((others, epoch))
}

// Functions of their own: a program has 512 bytes of stack for a function and those that it calls.

#[inline(never)]
fn judge_egress(skb: *mut __sk_buff, endpoint: &Endpoint, epoch: u32) -> u64 {
    judge::<true>(&TcContext::new(skb), endpoint, epoch) as u64
}

#[inline(never)]
fn judge_ingress(skb: *mut __sk_buff, endpoint: &Endpoint, epoch: u32) -> u64 {
    judge::<false>(&TcContext::new(skb), endpoint, epoch) as u64
}

#[inline(always)]
fn judge<const EGRESS: bool>(ctx: &TcContext, endpoint: &Endpoint, epoch: u32) -> bool {
    let skb = ctx.skb.skb;
    // Not cleared: most packets of endpoints without a policy never need it.
    let mut flow = MaybeUninit::<Flow>::uninit();
    let found =
        if EGRESS { read_egress(skb, endpoint, &mut flow) } else { read_ingress(skb, endpoint, &mut flow) };
    if found as u8 == Found::Passes as u8 {
        return true;
    }
    // SAFETY: whatever else it is has been written with it.
    let flow = unsafe { flow.assume_init_ref() };
    match found {
        Found::Passes => true,
        Found::TurningPoint => {
            track::note_unenforced(flow);
            true
        }
        Found::Flow => track::judge(skb, endpoint, flow, epoch) != 0,
        Found::Forged => {
            count(Counter::PolicyForgedSource);
            event::dropped(ctx, flow, endpoint, DropReason::ForgedSource);
            false
        }
        Found::Unreadable => {
            count(Counter::PolicyUnreadable);
            event::dropped(ctx, flow, endpoint, DropReason::Unreadable);
            false
        }
    }
}

/// What a packet turns out to be.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Found {
    /// Nothing that a policy could be about. Of everything else the flow is written.
    Passes = 0,
    /// To be noted, and passes.
    TurningPoint = 1,
    /// One of a flow.
    Flow = 2,
    Forged = 3,
    Unreadable = 4,
}

#[inline(never)]
fn read_egress(skb: *mut __sk_buff, endpoint: &Endpoint, flow: &mut MaybeUninit<Flow>) -> Found {
    read::<true>(&TcContext::new(skb), endpoint, flow)
}

#[inline(never)]
fn read_ingress(skb: *mut __sk_buff, endpoint: &Endpoint, flow: &mut MaybeUninit<Flow>) -> Found {
    read::<false>(&TcContext::new(skb), endpoint, flow)
}

#[inline(always)]
fn read<const EGRESS: bool>(ctx: &TcContext, endpoint: &Endpoint, flow: &mut MaybeUninit<Flow>) -> Found {
    let found = match packet::family(ctx) {
        Some(Family::V4) => Packet::parse_ipv4(ctx)
            .and_then(|packet| read_packet::<true, EGRESS>(ctx, &packet, endpoint, flow)),
        Some(Family::V6) => Packet::parse_ipv6(ctx)
            .and_then(|packet| read_packet::<false, EGRESS>(ctx, &packet, endpoint, flow)),
        None if is_arp(ctx) => Some(Found::Passes),
        None => None,
    };
    match found {
        Some(found) => found,
        None => unreadable::<EGRESS>(ctx, endpoint, flow),
    }
}

/// `None` if it cannot be read.
#[inline(always)]
fn read_packet<const V4: bool, const EGRESS: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    endpoint: &Endpoint,
    flow: &mut MaybeUninit<Flow>,
) -> Option<Found> {
    if EGRESS && is_forged::<V4>(endpoint, &packet.source) {
        flow.write(Flow::of_ip::<V4, EGRESS>(ctx, packet));
        return Some(Found::Forged);
    }
    // What the node sends is asked about only if its answers are: it need be known that the node has begun.
    let asked = if flow::is_from_host(ctx, EGRESS) { EGRESS_ENFORCED | WAITING } else { ENFORCED };
    let enforced = endpoint.flags & asked != 0;
    if !enforced && !flow::is_turning_point(ctx, packet) {
        return Some(Found::Passes);
    }
    if flow::is_link_housekeeping::<V4, EGRESS>(ctx, packet) {
        return Some(Found::Passes);
    }
    // An IPv6 packet must not pass for one of the IPv4 address that it names.
    if !V4 && (packet.source.is_v4() || packet.destination.is_v4()) {
        return None;
    }
    let flow = flow.write(Flow::of_ip::<V4, EGRESS>(ctx, packet));
    flow.read::<V4, EGRESS>(ctx, packet)?;
    Some(if enforced { Found::Flow } else { Found::TurningPoint })
}

/// No rule is about what nobody can read. The node's own bridge protocols and the like are not held up.
#[inline(always)]
fn unreadable<const EGRESS: bool>(
    ctx: &TcContext,
    endpoint: &Endpoint,
    flow: &mut MaybeUninit<Flow>,
) -> Found {
    let enforced = if EGRESS { EGRESS_ENFORCED } else { INGRESS_ENFORCED };
    if endpoint.flags & (enforced | WAITING) == 0 || flow::is_from_host(ctx, EGRESS) {
        return Found::Passes;
    }
    flow.write(Flow::unknown(ctx, EGRESS));
    Found::Unreadable
}

/// Whether the pod sends from an address that others take for somebody else's: their policies go by it.
#[inline(always)]
fn is_forged<const V4: bool>(endpoint: &Endpoint, source: &Addr) -> bool {
    let own = if V4 { &endpoint.ipv4 } else { &endpoint.ipv6 };
    // Who it is may not be known yet, but what its address is: another identity's is not its own in any case. Without
    // either, any address may be.
    if own == source || (endpoint.identity == 0 && own.0 == [0; 4]) {
        return false;
    }
    let Some(known) = ipcache::lookup::<V4>(source) else { return false };
    let identity = known.identity;
    identity != 0 && identity != endpoint.identity && !is_outside(identity)
}

/// Whether an identity is nobody's in particular.
#[inline(always)]
fn is_outside(identity: u32) -> bool {
    use reserved_identity::{LOCAL, WORLD, WORLD_IPV4, WORLD_IPV6};
    matches!(identity, WORLD | WORLD_IPV4 | WORLD_IPV6) || identity >= LOCAL
}

#[inline(always)]
fn is_arp(ctx: &TcContext) -> bool {
    const ETHERTYPE_ARP: u16 = 0x0806_u16.to_be();
    // SAFETY: the context is the kernel's.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return false;
    }
    // SAFETY: `at` has checked the bounds; the machine has no alignment trap.
    at::<u16>(ctx, ETH_LEN - 2).is_some_and(|ethertype| unsafe { *ethertype } == ETHERTYPE_ARP)
}

#[inline(always)]
const fn direction(egress: bool) -> Direction {
    if egress { Direction::Egress } else { Direction::Ingress }
}
