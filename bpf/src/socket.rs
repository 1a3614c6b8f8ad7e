//! Load balancing at the socket: `connect()` and `sendmsg()` are pointed at a backend, and `getpeername()` and
//! `recvmsg()` show the service's address again, so that the application sees only what it dialled.
//!
//! A connected socket has chosen once. An unconnected UDP socket keeps its choice per service until that backend
//! leaves, so that protocols with a state of their own (QUIC, DTLS) meet the same backend with every datagram.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use isthmus_bpf_abi::{Addr, Counter, Protocol, Service, ServiceKey, SocketEntry, SocketKey, SocketKeyKind};

use crate::config::has_set_retval;
use crate::count::{count, count_flow};
use crate::maps::{SERVICES, SOCKETS};
use crate::packet::{read_addr, write_addr};
use crate::service::{self, Choice};

const ALLOW: i32 = 1;
/// Without `bpf_set_retval` the application gets EPERM.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const IPPROTO_MPTCP: u32 = 262;

#[inline(always)]
pub fn connect4(ctx: *mut bpf_sock_addr) -> i32 {
    let outcome = connect(ctx, addr4(ctx));
    finish4(ctx, outcome)
}

#[inline(always)]
pub fn connect6(ctx: *mut bpf_sock_addr) -> i32 {
    let outcome = connect(ctx, addr6(ctx));
    finish6(ctx, outcome)
}

#[inline(always)]
pub fn sendmsg4(ctx: *mut bpf_sock_addr) -> i32 {
    let outcome = sendmsg(ctx, addr4(ctx));
    finish4(ctx, outcome)
}

#[inline(always)]
pub fn sendmsg6(ctx: *mut bpf_sock_addr) -> i32 {
    let outcome = sendmsg(ctx, addr6(ctx));
    finish6(ctx, outcome)
}

/// `recvmsg()` and `getpeername()`.
#[inline(always)]
pub fn peer4(ctx: *mut bpf_sock_addr) -> i32 {
    if let Some(entry) = peer(ctx, addr4(ctx)) {
        set4(ctx, &entry.addr, entry.port_be);
    }
    ALLOW
}

/// `recvmsg()` and `getpeername()`.
#[inline(always)]
pub fn peer6(ctx: *mut bpf_sock_addr) -> i32 {
    if let Some(entry) = peer(ctx, addr6(ctx)) {
        set6(ctx, &entry.addr, entry.port_be);
    }
    ALLOW
}

enum Outcome<'a> {
    /// Not addressed to a service.
    Untouched,
    To(Choice<'a>),
    NoBackend,
}

#[inline(always)]
fn connect<'a>(ctx: *mut bpf_sock_addr, addr: Addr) -> Outcome<'a> {
    let Some((key, service)) = lookup(ctx, addr) else { return Outcome::Untouched };
    let Some(choice) = choose(ctx, &key, service) else { return no_backend(service) };
    remember_peer(ctx, &key, choice);
    count(Counter::SocketTranslated);
    count_flow(choice.backend.cluster);
    Outcome::To(choice)
}

#[inline(always)]
fn sendmsg<'a>(ctx: *mut bpf_sock_addr, addr: Addr) -> Outcome<'a> {
    let Some((key, service)) = lookup(ctx, addr) else { return Outcome::Untouched };
    let choice_key = socket_key(ctx, &key.addr, key.port_be, key.protocol, SocketKeyKind::Choice);
    // SAFETY: an entry that is being reused shows another fingerprint, and is passed over.
    if let Some(entry) = unsafe { SOCKETS.get(&choice_key) } {
        if let Some(choice) = service::alive(entry.backend, entry.fingerprint) {
            // Another service may share the backend, and the last one that was sent to is the one that answers.
            let peer_key = socket_key(
                ctx,
                &choice.backend.addr,
                choice.backend.port_be,
                key.protocol,
                SocketKeyKind::Peer,
            );
            // SAFETY: as above; a wrong match is corrected with the next datagram.
            match unsafe { SOCKETS.get(&peer_key) } {
                Some(peer) if peer.addr == key.addr && peer.port_be == key.port_be => {}
                _ => remember_peer(ctx, &key, choice),
            }
            count(Counter::SocketTranslated);
            return Outcome::To(choice);
        }
    }
    let Some(choice) = choose(ctx, &key, service) else { return no_backend(service) };
    let entry = SocketEntry {
        addr: key.addr,
        port_be: key.port_be,
        pad: 0,
        backend: choice.id,
        fingerprint: choice.backend.fingerprint,
    };
    if SOCKETS.insert(&choice_key, &entry, 0).is_err() {
        count(Counter::SocketError);
    }
    remember_peer(ctx, &key, choice);
    count(Counter::SocketTranslated);
    count_flow(choice.backend.cluster);
    Outcome::To(choice)
}

#[inline(always)]
fn lookup<'a>(ctx: *mut bpf_sock_addr, addr: Addr) -> Option<(ServiceKey, &'a Service)> {
    let key = ServiceKey { addr, port_be: port(ctx), protocol: protocol(ctx)? as u8, pad: 0 };
    // SAFETY: the map is not preallocated, so an element that is found is not reused while the program runs.
    let service = unsafe { SERVICES.get(&key) }?;
    Some((key, service))
}

#[inline(always)]
fn choose<'a>(ctx: *mut bpf_sock_addr, dialled: &ServiceKey, service: &Service) -> Option<Choice<'a>> {
    let choice = if service.affinity_seconds == 0 {
        service::random(service.id, service.count)?
    } else {
        // SAFETY: the context is the kernel's.
        let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
        let client = Addr([u32::MAX, u32::MAX, (cookie >> 32) as u32, cookie as u32]);
        service::choose(service, &client)?
    };
    // Only a mistake of user space makes the families differ.
    (choice.backend.addr.is_v4() == dialled.addr.is_v4()).then_some(choice)
}

#[inline(always)]
fn no_backend<'a>(service: &Service) -> Outcome<'a> {
    count(if service.count == 0 { Counter::SocketNoBackend } else { Counter::SocketError });
    Outcome::NoBackend
}

#[inline(always)]
fn peer<'a>(ctx: *mut bpf_sock_addr, addr: Addr) -> Option<&'a SocketEntry> {
    let key = socket_key(ctx, &addr, port(ctx), protocol(ctx)? as u8, SocketKeyKind::Peer);
    // SAFETY: an entry is reused only after it was the least recently used of a full map.
    unsafe { SOCKETS.get(&key) }
}

/// Without room the application sees the backend's address, and goes on.
#[inline(always)]
fn remember_peer(ctx: *mut bpf_sock_addr, dialled: &ServiceKey, choice: Choice<'_>) {
    let backend = choice.backend;
    let key = socket_key(ctx, &backend.addr, backend.port_be, dialled.protocol, SocketKeyKind::Peer);
    let entry = SocketEntry {
        addr: dialled.addr,
        port_be: dialled.port_be,
        pad: 0,
        backend: choice.id,
        fingerprint: backend.fingerprint,
    };
    if SOCKETS.insert(&key, &entry, 0).is_err() {
        count(Counter::SocketError);
    }
}

#[inline(always)]
fn socket_key(
    ctx: *mut bpf_sock_addr,
    addr: &Addr,
    port_be: u16,
    protocol: u8,
    kind: SocketKeyKind,
) -> SocketKey {
    // SAFETY: the context is the kernel's.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.cast()) };
    SocketKey { cookie, addr: *addr, port_be, protocol, kind: kind as u8, pad: 0 }
}

#[inline(always)]
fn finish4(ctx: *mut bpf_sock_addr, outcome: Outcome<'_>) -> i32 {
    match outcome {
        Outcome::Untouched => ALLOW,
        Outcome::To(choice) => {
            set4(ctx, &choice.backend.addr, choice.backend.port_be);
            ALLOW
        }
        Outcome::NoBackend => refuse(),
    }
}

#[inline(always)]
fn finish6(ctx: *mut bpf_sock_addr, outcome: Outcome<'_>) -> i32 {
    match outcome {
        Outcome::Untouched => ALLOW,
        Outcome::To(choice) => {
            set6(ctx, &choice.backend.addr, choice.backend.port_be);
            ALLOW
        }
        Outcome::NoBackend => refuse(),
    }
}

#[inline(always)]
fn refuse() -> i32 {
    if has_set_retval() {
        // SAFETY: takes a number.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}

#[inline(always)]
fn protocol(ctx: *mut bpf_sock_addr) -> Option<Protocol> {
    // SAFETY: the context is the kernel's.
    match unsafe { (*ctx).protocol } {
        // MPTCP falls back to TCP where the other end does not speak it.
        6 | IPPROTO_MPTCP => Some(Protocol::Tcp),
        17 => Some(Protocol::Udp),
        _ => None,
    }
}

#[inline(always)]
fn addr4(ctx: *mut bpf_sock_addr) -> Addr {
    // SAFETY: the context is the kernel's.
    Addr::from_v4_word(unsafe { (*ctx).user_ip4 })
}

#[inline(always)]
fn addr6(ctx: *mut bpf_sock_addr) -> Addr {
    // SAFETY: the context is the kernel's.
    read_addr(unsafe { &raw const (*ctx).user_ip6 })
}

#[inline(always)]
fn port(ctx: *mut bpf_sock_addr) -> u16 {
    // SAFETY: the context is the kernel's. The field is 4 bytes wide and holds the 2 bytes of a `sin_port`.
    unsafe { (*ctx).user_port as u16 }
}

#[inline(always)]
fn set4(ctx: *mut bpf_sock_addr, addr: &Addr, port_be: u16) {
    // SAFETY: the context is the kernel's, and these fields are writable in these hooks.
    unsafe {
        (*ctx).user_ip4 = addr.0[3];
        (*ctx).user_port = port_be as u32;
    }
}

#[inline(always)]
fn set6(ctx: *mut bpf_sock_addr, addr: &Addr, port_be: u16) {
    // SAFETY: as above.
    unsafe {
        write_addr(&raw mut (*ctx).user_ip6, addr);
        (*ctx).user_port = port_be as u32;
    }
}
