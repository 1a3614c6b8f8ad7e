//! Packets that a pod gets, seen as they go into its veth on the host's side.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Counter, ReplyKey, ct_flags};

use crate::Verdict;
use crate::config::now;
use crate::conntrack::{idle, is_expired};
use crate::count::count;
use crate::encrypt;
use crate::fragment;
use crate::from_pod::note_reply;
use crate::icmp;
use crate::maps::CT_REPLY;
use crate::policy;
use crate::packet::{self, Family, Fragment, ICMP, ICMPV6, Packet};
use crate::rewrite::{End, HalfWritten, rewrite};

#[inline(always)]
pub fn to_pod(ctx: &TcContext) -> i32 {
    if encrypt::is_refused(ctx) || !policy::lets_in(ctx) {
        return TC_ACT_SHOT;
    }
    // Answers to the pod are never turned back, but for later fragments of what was.
    match translated(ctx.skb.skb) {
        PASS => TC_ACT_OK,
        TURN_BACK => Verdict::TurnBack.action(ctx),
        _ => TC_ACT_SHOT,
    }
}

const PASS: u64 = Verdict::Pass as u64;
const DROP: u64 = Verdict::Drop as u64;
const TURN_BACK: u64 = Verdict::TurnBack as u64;

/// A function of its own for the same reason as in [`crate::from_pod`].
#[inline(never)]
fn translated(skb: *mut __sk_buff) -> u64 {
    match translate(&TcContext::new(skb)) {
        Ok(verdict) => verdict as u64,
        Err(HalfWritten) => {
            count(Counter::TcError);
            DROP
        }
    }
}

#[inline(always)]
fn translate(ctx: &TcContext) -> Result<Verdict, HalfWritten> {
    match packet::family(ctx) {
        Some(Family::V4) => match Packet::parse_ipv4(ctx) {
            Some(packet) => translate_ip(ctx, &packet),
            None => Ok(Verdict::Pass),
        },
        Some(Family::V6) => match Packet::parse_ipv6(ctx) {
            Some(packet) => translate_ip(ctx, &packet),
            None => Ok(Verdict::Pass),
        },
        None => Ok(Verdict::Pass),
    }
}

#[inline(always)]
fn translate_ip<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Result<Verdict, HalfWritten> {
    if packet.fragment == Fragment::Later {
        return fragment::follow(ctx, packet);
    }
    if packet.protocol == if V4 { ICMP } else { ICMPV6 } {
        return icmp::error_to_pod(ctx, packet);
    }
    let Some(ports) = packet.ports(ctx) else { return Ok(Verdict::Pass) };
    let key = ReplyKey {
        backend: packet.source,
        client: packet.destination,
        backend_port_be: ports.source_be,
        client_port_be: ports.destination_be,
        protocol: packet.protocol as u32,
    };
    let Some(reply) = CT_REPLY.get_ptr_mut(&key) else {
        fragment::forget(packet);
        return Ok(Verdict::Pass);
    };
    // SAFETY: the kernel keeps map values readable while the program runs; racing writes are of single words.
    let reply = unsafe { &mut *reply };
    let now = now();
    // Only the client's side knows the state. Until a flow is surely over its answers are turned back.
    if is_expired(idle(now, reply.last_seen), packet.protocol, ct_flags::ESTABLISHED) {
        return Ok(Verdict::Pass);
    }
    note_reply(reply, &packet.destination, ports.destination_be, ports.tcp_flags, now);
    let source = End { addr: &reply.addr, port_be: reply.port_be };
    fragment::remember(packet, source.addr, &packet.destination, false);
    rewrite(ctx, packet, Some(source), None)?;
    count(Counter::TcReply);
    Ok(Verdict::Pass)
}
