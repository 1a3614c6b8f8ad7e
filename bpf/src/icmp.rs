//! ICMP errors about translated packets. A router, or the backend's own kernel, quotes the packet as it was on the
//! way to the backend; the pod knows only the one that it sent to the service. Without this no path MTU would be found.
//!
//! The quoted packet gets the service's address and port again. The error's own source stays: it tells who speaks.

use aya_ebpf::helpers::generated::{bpf_l4_csum_replace, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Addr, Counter, ReplyKey};

use crate::Verdict;
use crate::checksum::Difference;
use crate::count::count;
use crate::maps::CT_REPLY;
use crate::packet::{Packet, TCP, UDP, load, read, read_addr};
use crate::rewrite::HalfWritten;

const ICMP_LEN: u32 = 8;
const ICMP_CHECKSUM: u32 = 2;

/// The packet that an error quotes.
struct Quoted {
    /// From the start of the frame.
    l3: u32,
    l4: u32,
    protocol: u8,
    source: Addr,
    destination: Addr,
}

#[inline(always)]
pub fn error_to_pod<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Result<Verdict, HalfWritten> {
    let Some((key, quoted)) = quoted_flow(ctx, packet) else { return Ok(Verdict::Pass) };
    // SAFETY: an entry is reused only after it was the least recently used of a full map.
    let Some(reply) = (unsafe { CT_REPLY.get(&key) }) else { return Ok(Verdict::Pass) };
    let (addr, port_be) = (read_addr(&reply.addr.0), reply.port_be);
    let mut difference = Difference::NONE;
    difference.word(key.backend_port_be as u32, port_be as u32);
    store(ctx, quoted.l4 + 2, &port_be.to_ne_bytes())?;
    if V4 {
        let mut address = Difference::NONE;
        address.word(quoted.destination.0[3], addr.0[3]);
        let mut checksum = [0u8; 2];
        load(ctx, quoted.l3 + 10, &mut checksum).ok_or(HalfWritten)?;
        let checksum = address.apply(u16::from_ne_bytes(checksum));
        store(ctx, quoted.l3 + 16, &addr.0[3].to_ne_bytes())?;
        // The quoted header's checksum makes up for its address: the error's own checksum sees neither.
        store(ctx, quoted.l3 + 10, &checksum.to_ne_bytes())?;
    } else {
        difference.words(&quoted.destination.0, &addr.0);
        store_addr(ctx, quoted.l3 + 24, &addr)?;
    }
    let offset = packet.l4 + ICMP_CHECKSUM;
    // SAFETY: the helper checks the offset.
    let result = unsafe { bpf_l4_csum_replace(ctx.skb.skb, offset, 0, difference.folded() as u64, 0) };
    if result != 0 {
        return Err(HalfWritten);
    }
    count(Counter::TcIcmp);
    Ok(Verdict::Pass)
}

/// The key under which answers to the quoted packet are known, if this is an error about TCP or UDP.
#[inline(always)]
fn quoted_flow<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Option<(ReplyKey, Quoted)> {
    let quoted = quoted(ctx, packet)?;
    if !matches!(quoted.protocol, TCP | UDP) {
        return None;
    }
    let mut ports = [0u8; 4];
    load(ctx, quoted.l4, &mut ports)?;
    let [a, b, c, d] = ports;
    let key = ReplyKey {
        backend: quoted.destination,
        client: quoted.source,
        backend_port_be: u16::from_ne_bytes([c, d]),
        client_port_be: u16::from_ne_bytes([a, b]),
        protocol: quoted.protocol as u32,
    };
    Some((key, quoted))
}

/// The packet that an error is about: its ends, and what stands where most protocols have their ports.
pub struct About {
    pub protocol: u8,
    pub source: Addr,
    pub destination: Addr,
    /// The first 8 bytes behind the IP header; RFC 792 has no error quote less.
    pub transport: [u8; 8],
}

/// What this error is about, if it is one that may come to any sender.
#[inline(always)]
pub fn about<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Option<About> {
    let quoted = quoted(ctx, packet)?;
    let transport = read(ctx, quoted.l4)?;
    let Quoted { protocol, source, destination, .. } = quoted;
    Some(About { protocol, source, destination, transport })
}

#[inline(always)]
fn quoted<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Option<Quoted> {
    let kind: [u8; 1] = read(ctx, packet.l4)?;
    if V4 {
        // Unreachable (with "fragmentation needed"), time exceeded, parameter problem.
        if !matches!(kind[0], 3 | 11 | 12) {
            return None;
        }
        quoted_ipv4(ctx, packet.l4 + ICMP_LEN)
    } else {
        // Unreachable, packet too big, time exceeded, parameter problem; 128 and above are no errors.
        if !matches!(kind[0], 1..=4) {
            return None;
        }
        quoted_ipv6(ctx, packet.l4 + ICMP_LEN)
    }
}

#[inline(always)]
fn quoted_ipv4(ctx: &TcContext, l3: u32) -> Option<Quoted> {
    let mut head = [0u32; 5];
    load_words(ctx, l3, &mut head)?;
    let [version_ihl, ..] = head[0].to_ne_bytes();
    let [_, _, fragment_high, fragment_low] = head[1].to_ne_bytes();
    let header_len = (version_ihl & 0xf) as u32 * 4;
    let later_fragment = u16::from_be_bytes([fragment_high, fragment_low]) & 0x1fff != 0;
    if version_ihl >> 4 != 4 || header_len < 20 || later_fragment {
        return None;
    }
    let [_, protocol, ..] = head[2].to_ne_bytes();
    Some(Quoted {
        l3,
        l4: l3 + header_len,
        protocol,
        source: Addr::from_v4_word(head[3]),
        destination: Addr::from_v4_word(head[4]),
    })
}

/// Without extension headers, which the packets of services hardly have.
#[inline(always)]
fn quoted_ipv6(ctx: &TcContext, l3: u32) -> Option<Quoted> {
    let mut head = [0u32; 10];
    load_words(ctx, l3, &mut head)?;
    let [version, ..] = head[0].to_ne_bytes();
    let [_, _, protocol, _] = head[1].to_ne_bytes();
    if version >> 4 != 6 {
        return None;
    }
    Some(Quoted {
        l3,
        l4: l3 + 40,
        protocol,
        source: Addr([head[2], head[3], head[4], head[5]]),
        destination: Addr([head[6], head[7], head[8], head[9]]),
    })
}

#[inline(always)]
fn load_words<const N: usize>(ctx: &TcContext, offset: u32, to: &mut [u32; N]) -> Option<()> {
    use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
    // SAFETY: the helper writes 4 * N bytes or fails.
    let result =
        unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), offset, to.as_mut_ptr().cast(), 4 * N as u32) };
    if result == 0 { Some(()) } else { None }
}

#[inline(always)]
fn store<const N: usize>(ctx: &TcContext, offset: u32, from: &[u8; N]) -> Result<(), HalfWritten> {
    // SAFETY: N readable bytes.
    let result = unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset, from.as_ptr().cast(), N as u32, 0) };
    if result == 0 { Ok(()) } else { Err(HalfWritten) }
}

#[inline(always)]
fn store_addr(ctx: &TcContext, offset: u32, addr: &Addr) -> Result<(), HalfWritten> {
    // SAFETY: 16 readable bytes.
    let result = unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset, (&raw const addr.0).cast(), 16, 0) };
    if result == 0 { Ok(()) } else { Err(HalfWritten) }
}
