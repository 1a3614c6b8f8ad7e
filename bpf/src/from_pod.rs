//! Packets that a pod sends, seen as they come out of its veth on the host's side.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{
    Addr, Counter, CtEntry, CtKey, LOOPBACK_V4, LOOPBACK_V6, ReplyEntry, ReplyKey, Service, ServiceKey,
    reply_flags,
};

use crate::Verdict;
use crate::config::now;
use crate::conntrack::{after_forward, from_reply, idle, is_closed, is_expired, is_reused, is_stale};
use crate::count::{count, count_flow};
use crate::encrypt;
use crate::fragment;
use crate::maps::{CT, CT_REPLY, SERVICES};
use crate::policy;
use crate::packet::{self, ACK, Family, Fragment, Packet, Ports, SYN};
use crate::refuse;
use crate::rewrite::{End, HalfWritten, rewrite, swap_macs};
use crate::service::{self, Choice};

#[inline(always)]
pub fn from_pod(ctx: &TcContext) -> i32 {
    if packet::strip_priority_tag(ctx).is_none() {
        count(Counter::TcError);
        return TC_ACT_SHOT;
    }
    policy::forget_vouching(ctx);
    match translated(ctx.skb.skb) {
        PASS if policy::lets_out(ctx) => encrypt::to_wire(ctx),
        TURN_BACK => Verdict::TurnBack.action(ctx),
        REFUSE => refuse::refuse(ctx.skb.skb).action(ctx),
        _ => TC_ACT_SHOT,
    }
}

const PASS: u64 = Verdict::Pass as u64;
const DROP: u64 = Verdict::Drop as u64;
const TURN_BACK: u64 = Verdict::TurnBack as u64;
const REFUSE: u64 = Verdict::Refuse as u64;

/// A function of its own, since a program's functions share 512 bytes of stack with those that they call, and this one
/// needs most of them.
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
    let Some(ports) = packet.ports(ctx) else { return Ok(Verdict::Pass) };
    let key = ServiceKey {
        addr: packet.destination,
        port_be: ports.destination_be,
        protocol: packet.protocol,
        pad: 0,
    };
    // SAFETY: the map is not preallocated, so an element that is found is not reused while the program runs.
    match unsafe { SERVICES.get(&key) } {
        Some(service) => to_service(ctx, packet, ports, &key, service),
        None if packet.destination == *loopback::<V4>() => hairpin_reply(ctx, packet, ports),
        None => {
            fragment::forget(packet);
            forget_former(packet, ports);
            Ok(Verdict::Pass)
        }
    }
}

/// Forgets how answers were turned back to a service, when the pod now dials that backend itself from the same port: or
/// the answers to this connection would be. A flow that lives stays, for it was there first.
#[inline(always)]
fn forget_former<const V4: bool>(packet: &Packet<V4>, ports: Ports) {
    if ports.tcp_flags & (SYN | ACK) != SYN {
        return;
    }
    let key = ReplyKey {
        backend: packet.destination,
        client: packet.source,
        backend_port_be: ports.destination_be,
        client_port_be: ports.source_be,
        protocol: packet.protocol as u32,
    };
    // SAFETY: an entry is reused only after it was the least recently used of a full map.
    if let Some(former) = unsafe { CT_REPLY.get(&key) } {
        if !lives(&key, former, now()) {
            // Another CPU may have been faster.
            let _ = CT_REPLY.remove(&key);
        }
    }
}

#[inline(always)]
fn to_service<const V4: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    ports: Ports,
    dialled: &ServiceKey,
    service: &Service,
) -> Result<Verdict, HalfWritten> {
    let now = now();
    let key = CtKey { client: packet.source, service: service.id, client_port_be: ports.source_be, pad: 0 };
    let mut choice = known(&key, packet, ports, dialled, now);
    if choice.is_none() {
        choice = match new_flow(&key, packet, ports, dialled, service, now) {
            Ok(choice) => Some(choice),
            Err(reason) => {
                count(reason);
                return Ok(Verdict::Refuse);
            }
        };
    }
    let Some(choice) = choice else { return Ok(Verdict::Drop) };
    let backend = choice.backend;
    let destination = End { addr: &backend.addr, port_be: backend.port_be };
    if backend.addr == packet.source {
        let source = End { addr: loopback::<V4>(), port_be: ports.source_be };
        fragment::remember(packet, source.addr, destination.addr, true);
        rewrite(ctx, packet, Some(source), Some(destination))?;
        return turn_back(ctx);
    }
    fragment::remember(packet, &packet.source, destination.addr, false);
    rewrite(ctx, packet, None, Some(destination))?;
    count(Counter::TcForward);
    Ok(Verdict::Pass)
}

/// The backend of a flow that is already known and lives.
#[inline(always)]
fn known<'a, const V4: bool>(
    key: &CtKey,
    packet: &Packet<V4>,
    ports: Ports,
    dialled: &ServiceKey,
    now: u32,
) -> Option<Choice<'a>> {
    let entry = CT.get_ptr_mut(key)?;
    // SAFETY: the kernel keeps map values readable while the program runs; racing writes are of single words.
    let entry = unsafe { &mut *entry };
    let idle = idle(now, entry.last_seen);
    let flags = entry.flags;
    if is_expired(idle, packet.protocol, flags) || is_reused(flags, ports.tcp_flags) {
        return None;
    }
    let choice = service::alive(entry.backend, entry.fingerprint)?;
    let new_flags = after_forward(flags, packet.protocol, ports.tcp_flags);
    if new_flags != flags {
        entry.flags = new_flags;
    }
    if is_stale(idle) {
        entry.last_seen = now;
        let (reply_key, reply) = reply_of(packet, ports, dialled, key.service, choice, now);
        // Also brings it back where it has given way to others. Failing that, the next second will.
        let _ = CT_REPLY.insert(&reply_key, &reply, 0);
    }
    Some(choice)
}

#[inline(always)]
fn new_flow<'a, const V4: bool>(
    key: &CtKey,
    packet: &Packet<V4>,
    ports: Ports,
    dialled: &ServiceKey,
    service: &Service,
    now: u32,
) -> Result<Choice<'a>, Counter> {
    if service.count == 0 {
        return Err(Counter::TcNoBackend);
    }
    let mut choice = service::choose(service, &packet.source).ok_or(Counter::TcError)?;
    let (mut reply_key, mut reply) = reply_of(packet, ports, dialled, key.service, choice, now);
    if clashes(&reply_key, &reply, now) {
        choice = service::random(service.id, service.count).ok_or(Counter::TcError)?;
        (reply_key, reply) = reply_of(packet, ports, dialled, key.service, choice, now);
        if clashes(&reply_key, &reply, now) {
            return Err(Counter::TcClash);
        }
    }
    let entry = CtEntry {
        backend: choice.id,
        fingerprint: choice.backend.fingerprint,
        last_seen: now,
        flags: after_forward(0, packet.protocol, ports.tcp_flags),
    };
    if choice.backend.addr.is_v4() != V4 {
        // Only a mistake of user space leads here.
        return Err(Counter::TcError);
    }
    // The answers' entry first: an answer never finds only half.
    if CT_REPLY.insert(&reply_key, &reply, 0).is_err() || CT.insert(key, &entry, 0).is_err() {
        return Err(Counter::TcError);
    }
    count(Counter::TcNewFlow);
    count_flow(choice.backend.cluster);
    Ok(choice)
}

/// Whether answers from this backend to this client port belong to another service's living flow.
#[inline(always)]
fn clashes(key: &ReplyKey, reply: &ReplyEntry, now: u32) -> bool {
    // SAFETY: an entry is reused only after it was the least recently used of a full map.
    let Some(other) = (unsafe { CT_REPLY.get(key) }) else { return false };
    other.service != reply.service && lives(key, other, now)
}

/// Whether the flow whose answers are known as `key` is not over.
#[inline(always)]
fn lives(key: &ReplyKey, reply: &ReplyEntry, now: u32) -> bool {
    let idle = idle(now, reply.last_seen);
    let flow =
        CtKey { client: key.client, service: reply.service, client_port_be: key.client_port_be, pad: 0 };
    // SAFETY: an entry is reused only after it was the least recently used of a full map.
    let flags = match unsafe { CT.get(&flow) } {
        Some(entry) => entry.flags,
        None => return false,
    };
    !is_closed(flags) && !is_expired(idle, key.protocol as u8, flags)
}

#[inline(always)]
fn reply_of<const V4: bool>(
    packet: &Packet<V4>,
    ports: Ports,
    dialled: &ServiceKey,
    service: u32,
    choice: Choice<'_>,
    now: u32,
) -> (ReplyKey, ReplyEntry) {
    let backend = choice.backend;
    let hairpin = backend.addr == packet.source;
    let key = ReplyKey {
        backend: backend.addr,
        client: if hairpin { *loopback::<V4>() } else { packet.source },
        backend_port_be: backend.port_be,
        client_port_be: ports.source_be,
        protocol: packet.protocol as u32,
    };
    let entry = ReplyEntry {
        addr: dialled.addr,
        port_be: dialled.port_be,
        flags: if hairpin { reply_flags::HAIRPIN } else { 0 },
        service,
        last_seen: now,
    };
    (key, entry)
}

/// A pod answers itself: what it has got from the loopback address.
#[inline(always)]
fn hairpin_reply<const V4: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    ports: Ports,
) -> Result<Verdict, HalfWritten> {
    let key = ReplyKey {
        backend: packet.source,
        client: packet.destination,
        backend_port_be: ports.source_be,
        client_port_be: ports.destination_be,
        protocol: packet.protocol as u32,
    };
    let Some(reply) = CT_REPLY.get_ptr_mut(&key) else { return Ok(Verdict::Pass) };
    // SAFETY: the kernel keeps map values readable while the program runs; racing writes are of single words.
    let reply = unsafe { &mut *reply };
    if reply.flags & reply_flags::HAIRPIN == 0 {
        return Ok(Verdict::Pass);
    }
    note_reply(reply, &packet.source, ports.destination_be, ports.tcp_flags, now());
    let source = End { addr: &reply.addr, port_be: reply.port_be };
    let destination = End { addr: &packet.source, port_be: ports.destination_be };
    fragment::remember(packet, source.addr, destination.addr, true);
    rewrite(ctx, packet, Some(source), Some(destination))?;
    turn_back(ctx)
}

/// What an answer to `client` tells of its flow.
#[inline(always)]
pub fn note_reply(reply: &mut ReplyEntry, client: &Addr, client_port_be: u16, tcp_flags: u8, now: u32) {
    let stale = is_stale(idle(now, reply.last_seen));
    let flags = from_reply(tcp_flags);
    if !stale && flags == 0 {
        return;
    }
    reply.last_seen = now;
    let key = CtKey { client: *client, service: reply.service, client_port_be, pad: 0 };
    if let Some(entry) = CT.get_ptr_mut(&key) {
        // SAFETY: the kernel keeps map values readable while the program runs; racing writes are of single words.
        let entry = unsafe { &mut *entry };
        entry.flags |= flags;
        entry.last_seen = now;
    }
}

/// By the veth itself and not through the host's stack, which would take the source address for a forged one.
#[inline(always)]
fn turn_back(ctx: &TcContext) -> Result<Verdict, HalfWritten> {
    swap_macs(ctx)?;
    count(Counter::TcHairpin);
    Ok(Verdict::TurnBack)
}

#[inline(always)]
fn loopback<const V4: bool>() -> &'static Addr {
    if V4 { &LOOPBACK_V4 } else { &LOOPBACK_V6 }
}
