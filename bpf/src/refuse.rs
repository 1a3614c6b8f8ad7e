//! What cannot be delivered is refused at once, as a closed port would: TCP by a reset, UDP by an ICMP error.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::{bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::Counter;

use crate::Verdict;
use crate::count::count;
use crate::packet::{
    self, Family, ACK, ETH_LEN, FIN, Fragment, ICMP, ICMPV6, Ipv4Header, Ipv6Header, Packet, Ports, RST, SYN, TCP, at,
    write_addr,
};
use crate::rewrite::{HalfWritten, swap_macs};

const TCP_LEN: usize = 20;

#[repr(C)]
struct TcpHeader {
    source_be: u16,
    destination_be: u16,
    sequence_be: u32,
    acknowledged_be: u32,
    data_offset: u8,
    flags: u8,
    window_be: u16,
    checksum: u16,
    urgent: u16,
}

/// Turns the packet into its refusal, or drops it.
///
/// A function of its own, since it needs much of the stack.
#[inline(never)]
pub fn refuse(skb: *mut __sk_buff) -> Verdict {
    let ctx = &TcContext::new(skb);
    let refused = match packet::family(ctx) {
        Some(Family::V4) => Packet::parse_ipv4(ctx)
            .and_then(|packet| Some(refuse_packet(ctx, &packet, packet.ports(ctx)?))),
        Some(Family::V6) => Packet::parse_ipv6(ctx)
            .and_then(|packet| Some(refuse_packet(ctx, &packet, packet.ports(ctx)?))),
        None => None,
    };
    match refused {
        Some(Ok(verdict)) => verdict,
        Some(Err(HalfWritten)) => {
            count(Counter::TcError);
            Verdict::Drop
        }
        None => Verdict::Drop,
    }
}

/// Turns `packet` into its refusal: a reset where TCP calls for one (RFC 9293, 3.10.7.1), "port unreachable" for UDP.
/// Packets with IP options and fragments are dropped.
#[inline(always)]
fn refuse_packet<const V4: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    ports: Ports,
) -> Result<Verdict, HalfWritten> {
    let without_options = if V4 { 34 } else { 54 };
    if ports.tcp_flags & RST != 0 || packet.fragment != Fragment::No || packet.l4 != without_options {
        return Ok(Verdict::Drop);
    }
    match (packet.protocol == TCP, V4) {
        (true, true) => reset::<V4, 34>(ctx, packet, ports),
        (true, false) => reset::<V4, 54>(ctx, packet, ports),
        (false, true) => unreachable_v4(ctx, packet),
        (false, false) => unreachable_v6(ctx, packet),
    }
}

/// The error quotes what it is about: the IP header and the UDP header.
#[inline(always)]
fn unreachable_v4<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Result<Verdict, HalfWritten> {
    const LEN: u16 = 20 + 8 + 28;
    let [a, b, c, d, e, f, g] = quoted::<7>(ctx)?;
    let (source, destination) = (packet.destination.0[3], packet.source.0[3]);
    // Destination unreachable, port unreachable.
    let kind = u32::from_ne_bytes([3, 3, 0, 0]);
    let sum = Sum(kind as u64 + a as u64 + b as u64 + c as u64 + d as u64 + e as u64 + f as u64 + g as u64);
    let kind = with_low_half(kind, sum.checksum());
    let [high, low] = LEN.to_be_bytes();
    let first = u32::from_ne_bytes([0x45, 0, high, low]);
    let second = u32::from_ne_bytes([0, 0, 0x40, 0]);
    let third = u32::from_ne_bytes([64, ICMP, 0, 0]);
    let sum = Sum(first as u64 + second as u64 + third as u64 + source as u64 + destination as u64);
    let third = with_low_half(third, sum.checksum());
    answer(ctx, &[first, second, third, source, destination, kind, 0, a, b, c, d, e, f, g])
}

#[inline(always)]
fn unreachable_v6<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Result<Verdict, HalfWritten> {
    const LEN: u16 = 8 + 48;
    let quoted = quoted::<12>(ctx)?;
    let [a, b, c, d, e, f, g, h, i, j, k, l] = quoted;
    let [s0, s1, s2, s3] = packet.destination.0;
    let [d0, d1, d2, d3] = packet.source.0;
    // Destination unreachable, port unreachable.
    let kind = u32::from_ne_bytes([1, 4, 0, 0]);
    let mut sum = Sum(kind as u64 + LEN.to_be() as u64 + (ICMPV6 as u16).to_be() as u64);
    sum.words(&packet.source.0);
    sum.words(&packet.destination.0);
    sum.words(&[a, b, c, d]);
    sum.words(&[e, f, g, h]);
    sum.words(&[i, j, k, l]);
    let kind = with_low_half(kind, sum.checksum());
    let first = u32::from_ne_bytes([0x60, 0, 0, 0]);
    let [high, low] = LEN.to_be_bytes();
    let second = u32::from_ne_bytes([high, low, ICMPV6, 64]);
    let header = [first, second, s0, s1, s2, s3, d0, d1, d2, d3, kind, 0];
    let [p, q, r, s, t, u, v, w, x, y, z, zero] = header;
    answer(ctx, &[p, q, r, s, t, u, v, w, x, y, z, zero, a, b, c, d, e, f, g, h, i, j, k, l])
}

/// The first words behind the Ethernet header.
#[inline(always)]
fn quoted<const N: usize>(ctx: &TcContext) -> Result<[u32; N], HalfWritten> {
    let mut words = MaybeUninit::<[u32; N]>::uninit();
    let to = words.as_mut_ptr().cast();
    // SAFETY: the helper writes 4 * N bytes or fails.
    let result = unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), ETH_LEN as u32, to, 4 * N as u32) };
    // SAFETY: it has not failed.
    if result == 0 { Ok(unsafe { words.assume_init() }) } else { Err(HalfWritten) }
}

/// Puts a whole packet in place of the one that was sent, and sends it back.
#[inline(always)]
fn answer<const N: usize>(ctx: &TcContext, words: &[u32; N]) -> Result<Verdict, HalfWritten> {
    let len = 4 * N as u32;
    // SAFETY: the context is the kernel's, and `words` are 4 * N readable bytes.
    let result = unsafe {
        match bpf_skb_change_tail(ctx.skb.skb, ETH_LEN as u32 + len, 0) {
            0 => bpf_skb_store_bytes(ctx.skb.skb, ETH_LEN as u32, words.as_ptr().cast(), len, 0),
            error => error,
        }
    };
    if result != 0 {
        return Err(HalfWritten);
    }
    swap_macs(ctx)?;
    Ok(Verdict::TurnBack)
}

/// The last two bytes in memory, where both headers have their checksum.
#[inline(always)]
fn with_low_half(word: u32, checksum: u16) -> u32 {
    let [a, b, _, _] = word.to_ne_bytes();
    let [c, d] = checksum.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
fn reset<const V4: bool, const L4: usize>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    ports: Ports,
) -> Result<Verdict, HalfWritten> {
    let (sequence_be, acknowledged_be, header_len) = {
        // SAFETY: `at` has checked the bounds.
        let tcp = unsafe { &*at::<TcpHeader>(ctx, L4).ok_or(HalfWritten)? };
        (tcp.sequence_be, tcp.acknowledged_be, (tcp.data_offset >> 4) as u32 * 4)
    };
    // The packet's length is taken from the frame's: with segmentation offload the header's may be too short.
    let payload = ctx.len().wrapping_sub(L4 as u32 + header_len);
    let consumed = payload + (ports.tcp_flags & SYN != 0) as u32 + (ports.tcp_flags & FIN != 0) as u32;
    let (sequence_be, acknowledged_be, flags) = if ports.tcp_flags & ACK != 0 {
        (acknowledged_be, 0, RST)
    } else {
        (0, u32::from_be(sequence_be).wrapping_add(consumed).to_be(), RST | ACK)
    };
    // SAFETY: the context is the kernel's.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, (L4 + TCP_LEN) as u32, 0) } != 0 {
        return Ok(Verdict::Drop);
    }
    {
        // SAFETY: `at` has checked the bounds.
        let tcp = unsafe { &mut *at::<TcpHeader>(ctx, L4).ok_or(HalfWritten)? };
        *tcp = TcpHeader {
            source_be: ports.destination_be,
            destination_be: ports.source_be,
            sequence_be,
            acknowledged_be,
            data_offset: 5 << 4,
            flags,
            window_be: 0,
            checksum: 0,
            urgent: 0,
        };
        let mut sum = Sum(0);
        sum.words(&packet.source.0);
        sum.words(&packet.destination.0);
        if V4 {
            // The v4-mapped prefixes are not part of the pseudo-header.
            sum = Sum(packet.source.0[3] as u64 + packet.destination.0[3] as u64);
        }
        sum.0 += (TCP as u16).to_be() as u64 + (TCP_LEN as u16).to_be() as u64;
        sum.0 += ports.destination_be as u64 + ports.source_be as u64;
        sum.0 += sequence_be as u64 + acknowledged_be as u64;
        sum.0 += u16::from_ne_bytes([5 << 4, flags]) as u64;
        tcp.checksum = sum.checksum();
    }
    if V4 {
        // SAFETY: `at` has checked the bounds.
        let ip = unsafe { &mut *at::<Ipv4Header>(ctx, ETH_LEN).ok_or(HalfWritten)? };
        let (source, destination) = (packet.destination.0[3], packet.source.0[3]);
        let total_len_be = (20 + TCP_LEN as u16).to_be();
        let fragment_be = 0x4000_u16.to_be();
        *ip = Ipv4Header {
            version_ihl: 0x45,
            tos: 0,
            total_len_be,
            id_be: 0,
            fragment_be,
            ttl: 64,
            protocol: TCP,
            checksum: 0,
            source,
            destination,
        };
        let mut sum = Sum(source as u64 + destination as u64);
        sum.0 += u16::from_ne_bytes([0x45, 0]) as u64 + total_len_be as u64 + fragment_be as u64;
        sum.0 += u16::from_ne_bytes([64, TCP]) as u64;
        ip.checksum = sum.checksum();
    } else {
        // SAFETY: `at` has checked the bounds.
        let ip = unsafe { &mut *at::<Ipv6Header>(ctx, ETH_LEN).ok_or(HalfWritten)? };
        ip.payload_len_be = (TCP_LEN as u16).to_be();
        ip.hop_limit = 64;
        write_addr(&mut ip.source, &packet.destination);
        write_addr(&mut ip.destination, &packet.source);
    }
    swap_macs(ctx)?;
    Ok(Verdict::TurnBack)
}

struct Sum(u64);

impl Sum {
    #[inline(always)]
    fn words(&mut self, words: &[u32; 4]) {
        self.0 += words[0] as u64 + words[1] as u64 + words[2] as u64 + words[3] as u64;
    }

    #[inline(always)]
    fn checksum(self) -> u16 {
        let mut sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        !(sum as u16)
    }
}
