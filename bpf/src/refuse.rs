//! A connection that cannot be made is refused at once, as a closed port would: TCP by a reset. A UDP datagram is
//! dropped, which is what a datagram's sender must expect anyway.

use aya_ebpf::helpers::generated::bpf_skb_change_tail;
use aya_ebpf::programs::TcContext;

use crate::Verdict;
use crate::packet::{
    ACK, ETH_LEN, FIN, Fragment, Ipv4Header, Ipv6Header, Packet, Ports, RST, SYN, TCP, at, write_addr,
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

/// Answers `packet` with a reset where TCP calls for one (RFC 9293, 3.10.7.1), and drops it otherwise.
#[inline(always)]
pub fn refuse<const V4: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    ports: Ports,
) -> Result<Verdict, HalfWritten> {
    let without_options = if V4 { 34 } else { 54 };
    if packet.protocol != TCP
        || ports.tcp_flags & RST != 0
        || packet.fragment != Fragment::No
        || packet.l4 != without_options
    {
        return Ok(Verdict::Drop);
    }
    if V4 { reset::<V4, 34>(ctx, packet, ports) } else { reset::<V4, 54>(ctx, packet, ports) }
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
