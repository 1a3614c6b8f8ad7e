//! Writing addresses and ports, with every checksum that they are part of.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{bpf_l4_csum_replace, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::Addr;

use crate::checksum::Difference;
use crate::config::has_csum_ipv6;
use crate::packet::{ETH_LEN, Fragment, Ipv4Header, Ipv6Header, Packet, TCP, at, write_addr};

const BPF_F_IPV6: u64 = 1 << 7;
const IPV6_SOURCE: u32 = ETH_LEN as u32 + 8;
const IPV6_DESTINATION: u32 = ETH_LEN as u32 + 24;

/// One end of a flow.
#[derive(Clone, Copy)]
pub struct End<'a> {
    pub addr: &'a Addr,
    pub port_be: u16,
}

/// An error leaves the packet half written: drop it.
pub struct HalfWritten;

/// Gives `packet` another source, another destination, or both.
///
/// Plain stores do not show the kernel what they change, so the checksums are arranged to make up for it: in IPv4 the
/// header's own checksum does; in IPv6 the transport checksum does, where the kernel can be told so. The transport
/// checksum is left to the helper, which alone knows whether it is complete or left to the hardware.
#[inline(always)]
pub fn rewrite<const V4: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    source: Option<End<'_>>,
    destination: Option<End<'_>>,
) -> Result<(), HalfWritten> {
    let l4 = packet.l4_bounded().ok_or(HalfWritten)?;
    let later = packet.fragment == Fragment::Later;
    let mut ports = Difference::NONE;
    let mut ports_changed = false;
    if !later {
        let header: *mut [u16; 2] = at(ctx, l4).ok_or(HalfWritten)?;
        // SAFETY: `at` has checked the bounds; the machine has no alignment trap.
        let header = unsafe { &mut *header };
        if let Some(end) = source {
            ports_changed |= write_port(&mut header[0], end.port_be, &mut ports);
        }
        if let Some(end) = destination {
            ports_changed |= write_port(&mut header[1], end.port_be, &mut ports);
        }
    }
    let addresses = if V4 {
        write_ipv4(ctx, source, destination)?
    } else {
        write_ipv6(ctx, packet, source, destination)?
    };
    if later {
        // The transport checksum is in the first fragment and was made up for there.
        return Ok(());
    }
    let (offset, udp) =
        if packet.protocol == TCP { (l4 + 16, 0) } else { (l4 + 6, BPF_F_MARK_MANGLED_0 as u64) };
    let ipv6 = if !V4 && has_csum_ipv6() { BPF_F_IPV6 } else { 0 };
    replace(ctx, offset, addresses, BPF_F_PSEUDO_HDR as u64 | udp | ipv6)?;
    if ports_changed {
        replace(ctx, offset, ports, udp)?;
    }
    Ok(())
}

/// Turns a frame round: what came from a pod goes back to it.
#[inline(always)]
pub fn swap_macs(ctx: &TcContext) -> Result<(), HalfWritten> {
    let macs: *mut [[u16; 3]; 2] = at(ctx, 0).ok_or(HalfWritten)?;
    // SAFETY: `at` has checked the bounds; the machine has no alignment trap.
    let macs = unsafe { &mut *macs };
    let [destination, source] = *macs;
    *macs = [source, destination];
    Ok(())
}

#[inline(always)]
fn write_port(port: &mut u16, new: u16, difference: &mut Difference) -> bool {
    let old = *port;
    if old == new {
        return false;
    }
    *port = new;
    difference.word(old as u32, new as u32);
    true
}

#[inline(always)]
fn write_ipv4(
    ctx: &TcContext,
    source: Option<End<'_>>,
    destination: Option<End<'_>>,
) -> Result<Difference, HalfWritten> {
    // SAFETY: `at` has checked the bounds.
    let ip = unsafe { &mut *at::<Ipv4Header>(ctx, ETH_LEN).ok_or(HalfWritten)? };
    let mut difference = Difference::NONE;
    if let Some(end) = source {
        let new = end.addr.0[3];
        difference.word(ip.source, new);
        ip.source = new;
    }
    if let Some(end) = destination {
        let new = end.addr.0[3];
        difference.word(ip.destination, new);
        ip.destination = new;
    }
    ip.checksum = difference.apply(ip.checksum);
    Ok(difference)
}

#[inline(always)]
fn write_ipv6<const V4: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
    source: Option<End<'_>>,
    destination: Option<End<'_>>,
) -> Result<Difference, HalfWritten> {
    let mut difference = Difference::NONE;
    if let Some(end) = source {
        difference.words(&packet.source.0, &end.addr.0);
    }
    if let Some(end) = destination {
        difference.words(&packet.destination.0, &end.addr.0);
    }
    if has_csum_ipv6() && packet.fragment != Fragment::Later {
        // SAFETY: `at` has checked the bounds.
        let ip = unsafe { &mut *at::<Ipv6Header>(ctx, ETH_LEN).ok_or(HalfWritten)? };
        if let Some(end) = source {
            write_addr(&mut ip.source, end.addr);
        }
        if let Some(end) = destination {
            write_addr(&mut ip.destination, end.addr);
        }
        return Ok(difference);
    }
    if let Some(end) = source {
        store_addr(ctx, IPV6_SOURCE, end.addr)?;
    }
    if let Some(end) = destination {
        store_addr(ctx, IPV6_DESTINATION, end.addr)?;
    }
    Ok(difference)
}

#[inline(always)]
fn store_addr(ctx: &TcContext, offset: u32, addr: &Addr) -> Result<(), HalfWritten> {
    let from = (&raw const addr.0).cast();
    // SAFETY: 16 readable bytes.
    let result = unsafe { bpf_skb_store_bytes(ctx.skb.skb, offset, from, 16, BPF_F_RECOMPUTE_CSUM as u64) };
    if result == 0 { Ok(()) } else { Err(HalfWritten) }
}

#[inline(always)]
fn replace(ctx: &TcContext, offset: usize, difference: Difference, flags: u64) -> Result<(), HalfWritten> {
    // SAFETY: the helper checks the offset.
    let result =
        unsafe { bpf_l4_csum_replace(ctx.skb.skb, offset as u32, 0, difference.folded() as u64, flags) };
    if result == 0 { Ok(()) } else { Err(HalfWritten) }
}
