//! What leaves a pod for a pod of another node goes into the encryption device. What must go there and cannot is dropped,
//! never sent in the clear.
//!
//! Decided by the addresses that stand in the packet at the very end, whatever became of it before: a translated packet, a
//! later fragment, an ICMP error and a protocol that nobody here can read go the same way. The device gets packets past
//! the host's stack, so no routes are needed, and no rule of the CNI's gives them another source.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_OK, TC_ACT_SHOT};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Addr, Counter, Encryption, encryption_flags, ipcache_flags, mark};

use crate::count::count;
use crate::ipcache;
use crate::maps::{ENCRYPTION, LOCAL_PODS};
use crate::packet::{self, ETH_LEN, Family, IPV6_LEN, Ipv4Header, Ipv6Header, TCP, UDP, at, load, read_addr};

/// The last step of a packet that a pod sends.
#[inline(always)]
pub fn to_wire(ctx: &TcContext) -> i32 {
    let Some(settings) = ENCRYPTION.get(0) else { return TC_ACT_OK };
    if settings.flags & encryption_flags::ON == 0 {
        return TC_ACT_OK;
    }
    send(ctx.skb.skb, settings)
}

/// A function of its own, for the sake of the stack.
#[inline(never)]
fn send(skb: *mut __sk_buff, settings: &Encryption) -> i32 {
    let ctx = &TcContext::new(skb);
    let way = match packet::family(ctx) {
        Some(Family::V4) => match ends_v4(ctx) {
            Some((source, destination)) => way::<true>(ctx, settings, &source, &destination),
            None => Way::Drop(Counter::EncryptError),
        },
        Some(Family::V6) => match ends_v6(ctx) {
            Some((source, destination)) => way::<false>(ctx, settings, &source, &destination),
            None => Way::Drop(Counter::EncryptError),
        },
        None => Way::Plain,
    };
    match way {
        Way::Plain => TC_ACT_OK,
        Way::Device => {
            count(Counter::Encrypted);
            // SAFETY: the helper takes numbers only.
            unsafe { bpf_redirect(settings.ifindex, 0) as i32 }
        }
        Way::Stack => {
            count(Counter::EncryptTooBig);
            set_mark(ctx, mark::ENCRYPT);
            TC_ACT_OK
        }
        Way::Drop(reason) => {
            count(reason);
            TC_ACT_SHOT
        }
    }
}

/// The last step of a packet that leaves the node by its network. A pod's packets come here in the clear while its own
/// programs are not attached yet: what must go into the device still does, or nowhere.
#[inline(always)]
pub fn to_network(ctx: &TcContext) -> i32 {
    let Some(settings) = ENCRYPTION.get(0) else { return TC_ACT_OK };
    if settings.flags & encryption_flags::ON == 0 {
        return TC_ACT_OK;
    }
    let way = match packet::family(ctx) {
        Some(Family::V4) => ends_v4(ctx).map(|(from, to)| late_way::<true>(ctx, settings, &from, &to)),
        Some(Family::V6) => ends_v6(ctx).map(|(from, to)| late_way::<false>(ctx, settings, &from, &to)),
        None => None,
    };
    match way {
        Some(Way::Device) => {
            count(Counter::Encrypted);
            // SAFETY: the helper takes numbers only.
            unsafe { bpf_redirect(settings.ifindex, 0) as i32 }
        }
        Some(Way::Drop(reason)) => {
            count(reason);
            TC_ACT_SHOT
        }
        _ => TC_ACT_OK,
    }
}

#[inline(always)]
fn late_way<const V4: bool>(
    ctx: &TcContext,
    settings: &Encryption,
    source: &Addr,
    destination: &Addr,
) -> Way {
    // Most of what comes here is encrypted already, and for a node.
    let Some(known) = ipcache::lookup::<V4>(destination) else { return Way::Plain };
    let elsewhere = ipcache::is_elsewhere(known);
    let has_key = elsewhere && known.key != 0;
    let strict = settings.flags & encryption_flags::STRICT != 0;
    let no_key = strict && (elsewhere || known.flags & ipcache_flags::STRICT_RANGE != 0);
    if !(has_key || no_key) || !is_own_pod::<V4>(source) {
        return Way::Plain;
    }
    if has_key && settings.ifindex != 0 && fits::<V4>(ctx, settings.mtu) {
        return Way::Device;
    }
    Way::Drop(Counter::EncryptWithheld)
}

/// Whether the address is that of a pod of this node, as far as is known: one that has just started is known by its range.
#[inline(always)]
fn is_own_pod<const V4: bool>(addr: &Addr) -> bool {
    const WORLD: u32 = 2;
    const FIRST_POD: u32 = 256;
    /// From here on identities stand for addresses outside, in policies.
    const FIRST_CIDR: u32 = 1 << 24;
    // SAFETY: the map is not preallocated, so an element that is found is not reused while the program runs.
    if unsafe { LOCAL_PODS.get(addr) }.is_some() {
        return true;
    }
    let Some(known) = ipcache::lookup::<V4>(addr) else { return false };
    let is_pod = known.identity == WORLD || (known.identity >= FIRST_POD && known.identity < FIRST_CIDR);
    is_pod && known.cluster == 0 && !ipcache::is_elsewhere(known)
}

/// The first step of a packet to a pod: in strict mode what another node's pod has sent in the clear is dropped. Its source
/// may be anybody's.
#[inline(always)]
pub fn is_refused(ctx: &TcContext) -> bool {
    let Some(settings) = ENCRYPTION.get(0) else { return false };
    const STRICT: u32 = encryption_flags::ON | encryption_flags::STRICT;
    // SAFETY: the context is the kernel's.
    let mark = unsafe { (*ctx.skb.skb).mark };
    if settings.flags & STRICT != STRICT || mark & mark::MASK == mark::DECRYPTED {
        return false;
    }
    let known = match packet::family(ctx) {
        Some(Family::V4) => ends_v4(ctx).and_then(|(source, _)| ipcache::lookup::<true>(&source)),
        Some(Family::V6) => ends_v6(ctx).and_then(|(source, _)| ipcache::lookup::<false>(&source)),
        None => None,
    };
    let refused = known.is_some_and(|source| {
        ipcache::is_elsewhere(source) || source.flags & ipcache_flags::STRICT_RANGE != 0
    });
    if refused {
        count(Counter::PlainRefused);
    }
    refused
}

/// Writes our part of the packet's mark.
#[inline(always)]
pub fn set_mark(ctx: &TcContext, value: u32) {
    // SAFETY: the context is the kernel's, and programs of this type may write the mark.
    unsafe {
        let skb = ctx.skb.skb;
        (*skb).mark = ((*skb).mark & !mark::MASK) | value;
    }
}

/// Where a packet goes.
enum Way {
    /// On, as it would without encryption.
    Plain,
    /// Into the device.
    Device,
    /// To the device through the stack, which fragments it or tells the pod the path's MTU.
    Stack,
    Drop(Counter),
}

#[inline(always)]
fn way<const V4: bool>(ctx: &TcContext, settings: &Encryption, source: &Addr, destination: &Addr) -> Way {
    let Some(known) = ipcache::lookup::<V4>(destination) else { return Way::Plain };
    let elsewhere = ipcache::is_elsewhere(known);
    if known.key == 0 || !elsewhere {
        let strict = settings.flags & encryption_flags::STRICT != 0;
        let no_key = elsewhere || known.flags & ipcache_flags::STRICT_RANGE != 0;
        return if strict && no_key { Way::Drop(Counter::EncryptNoKey) } else { Way::Plain };
    }
    // The other node takes this one's word for its pods' addresses. So a pod may use none but its own.
    // SAFETY: the map is not preallocated, so an element that is found is not reused while the program runs.
    let own = unsafe { LOCAL_PODS.get(source) };
    // SAFETY: the context is the kernel's.
    if !own.is_some_and(|own| own.ifindex == unsafe { (*ctx.skb.skb).ifindex }) {
        return Way::Drop(Counter::EncryptForged);
    }
    if settings.ifindex == 0 {
        return Way::Drop(Counter::EncryptNoDevice);
    }
    if fits::<V4>(ctx, settings.mtu) { Way::Device } else { Way::Stack }
}

/// Whether the packet, or each segment that it will be cut into, is small enough for the device. When in doubt it is not,
/// and the stack looks closer.
#[inline(always)]
fn fits<const V4: bool>(ctx: &TcContext, mtu: u32) -> bool {
    // SAFETY: the context is the kernel's.
    let payload = unsafe { (*ctx.skb.skb).gso_size };
    if payload == 0 {
        return ctx.len() <= ETH_LEN as u32 + mtu;
    }
    match headers_len::<V4>(ctx) {
        Some(headers) => headers + payload <= mtu,
        None => false,
    }
}

/// Length of the IP and transport headers that every segment gets.
#[inline(always)]
fn headers_len<const V4: bool>(ctx: &TcContext) -> Option<u32> {
    let (l3, protocol) = if V4 {
        // SAFETY: `at` has checked the bounds.
        let ip = unsafe { &*at::<Ipv4Header>(ctx, ETH_LEN)? };
        ((ip.version_ihl & 0xf) as u32 * 4, ip.protocol)
    } else {
        // SAFETY: `at` has checked the bounds.
        (IPV6_LEN as u32, unsafe { &*at::<Ipv6Header>(ctx, ETH_LEN)? }.next_header)
    };
    match protocol {
        TCP => {
            let mut data_offset = [0u8; 1];
            load(ctx, ETH_LEN as u32 + l3 + 12, &mut data_offset)?;
            Some(l3 + (data_offset[0] >> 4) as u32 * 4)
        }
        UDP => Some(l3 + 8),
        _ => None,
    }
}

#[inline(always)]
fn ends_v4(ctx: &TcContext) -> Option<(Addr, Addr)> {
    // SAFETY: `at` has checked the bounds.
    let ip = unsafe { &*at::<Ipv4Header>(ctx, ETH_LEN)? };
    Some((Addr::from_v4_word(ip.source), Addr::from_v4_word(ip.destination)))
}

#[inline(always)]
fn ends_v6(ctx: &TcContext) -> Option<(Addr, Addr)> {
    // SAFETY: `at` has checked the bounds.
    let ip = unsafe { &*at::<Ipv6Header>(ctx, ETH_LEN)? };
    Some((read_addr(&ip.source), read_addr(&ip.destination)))
}
