//! Reading packets. What cannot be read, or needs no translation, is `None`, and passes untouched:
//! - anything but IPv4 and IPv6 over Ethernet, and frames with a VLAN tag (another network, whose addresses may be
//!   the same as those of services);
//! - IPv6 with a routing header that has segments left: its destination is not the last one;
//! - transport headers behind more than [`MAX_EXTENSIONS`] extension headers or beyond [`MAX_L4`];
//! - truncated headers: the kernel drops them itself.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::{bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_vlan_pop};
use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Addr, FragmentKey};

pub const ETH_LEN: usize = 14;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
pub const SCTP: u8 = 132;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

pub const IPV4_LEN: usize = 20;
pub const IPV6_LEN: usize = 40;
const MAX_EXTENSIONS: u32 = 6;
/// Farthest place for a transport header, counted from the start of the frame.
const MAX_L4: u32 = 510;
pub const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
pub const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();

#[repr(C)]
pub struct Ipv4Header {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_len_be: u16,
    pub id_be: u16,
    pub fragment_be: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

#[repr(C)]
pub struct Ipv6Header {
    pub version_class_flow: u32,
    pub payload_len_be: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

/// The programs are compiled once per family: `V4` decides which headers are meant.
#[derive(Clone, Copy)]
pub struct Packet<const V4: bool> {
    pub source: Addr,
    pub destination: Addr,
    pub protocol: u8,
    /// Where the transport header begins, from the start of the frame.
    pub l4: u32,
    pub fragment: Fragment,
    /// Identification field; meaningful in fragments.
    pub fragment_id: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    No,
    /// Has the ports.
    First,
    Later,
}

#[derive(Clone, Copy)]
pub struct Ports {
    pub source_be: u16,
    pub destination_be: u16,
    /// Zero for UDP.
    pub tcp_flags: u8,
}

/// The family of a frame that can be read further.
#[derive(Clone, Copy)]
pub enum Family {
    V4,
    V6,
}

#[inline(always)]
pub fn family(ctx: &TcContext) -> Option<Family> {
    make_linear(ctx, ETH_LEN + IPV6_LEN + 20);
    // SAFETY: the context is the kernel's.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return None;
    }
    let ethertype: *mut u16 = at(ctx, ETH_LEN - 2)?;
    // SAFETY: `at` has checked the bounds; the machine has no alignment trap.
    match unsafe { *ethertype } {
        ETHERTYPE_IPV4 => Some(Family::V4),
        ETHERTYPE_IPV6 => Some(Family::V6),
        _ => None,
    }
}

/// Takes off a tag that names no network (802.1p, VLAN 0): the kernel takes such a frame for one without it, so it must
/// not lead around what is done here. Fails where another tag is behind it.
#[inline(always)]
pub fn strip_priority_tag(ctx: &TcContext) -> Option<()> {
    const VLAN: u32 = 0xfff;
    let skb = ctx.skb.skb;
    // SAFETY: the context is the kernel's.
    unsafe {
        if (*skb).vlan_present == 0 || (*skb).vlan_tci & VLAN != 0 {
            return Some(());
        }
        if bpf_skb_vlan_pop(skb) == 0 && (*skb).vlan_present == 0 { Some(()) } else { None }
    }
}

impl Packet<true> {
    #[inline(always)]
    pub fn parse_ipv4(ctx: &TcContext) -> Option<Self> {
        // SAFETY: `at` has checked the bounds.
        let ip = unsafe { &*at::<Ipv4Header>(ctx, ETH_LEN)? };
        let version_ihl = ip.version_ihl;
        let header_len = (version_ihl & 0xf) as u32 * 4;
        if version_ihl >> 4 != 4 || header_len < IPV4_LEN as u32 {
            return None;
        }
        let fragment_be = ip.fragment_be;
        let fragment = if fragment_be & 0x3fff_u16.to_be() == 0 {
            Fragment::No
        } else if fragment_be & 0x1fff_u16.to_be() == 0 {
            Fragment::First
        } else {
            Fragment::Later
        };
        Some(Self {
            source: Addr::from_v4_word(ip.source),
            destination: Addr::from_v4_word(ip.destination),
            protocol: ip.protocol,
            l4: ETH_LEN as u32 + header_len,
            fragment,
            fragment_id: ip.id_be as u32,
        })
    }
}

impl Packet<false> {
    #[inline(always)]
    pub fn parse_ipv6(ctx: &TcContext) -> Option<Self> {
        // SAFETY: `at` has checked the bounds.
        let ip = unsafe { &*at::<Ipv6Header>(ctx, ETH_LEN)? };
        let mut packet = Self {
            source: read_addr(&ip.source),
            destination: read_addr(&ip.destination),
            protocol: ip.next_header,
            l4: (ETH_LEN + IPV6_LEN) as u32,
            fragment: Fragment::No,
            fragment_id: 0,
        };
        if !matches!(packet.protocol, TCP | UDP | ICMPV6) && is_extension(packet.protocol) {
            packet.skip_extensions(ctx)?;
        }
        Some(packet)
    }

    #[inline(always)]
    fn skip_extensions(&mut self, ctx: &TcContext) -> Option<()> {
        let mut seen = 0;
        while seen < MAX_EXTENSIONS {
            if !is_extension(self.protocol) {
                break;
            }
            let head: [u8; 8] = read(ctx, self.l4)?;
            let len = match self.protocol {
                HOP_BY_HOP | DESTINATION_OPTIONS => (head[1] as u32 + 1) * 8,
                ROUTING if head[3] == 0 => (head[1] as u32 + 1) * 8,
                AUTHENTICATION => (head[1] as u32 + 2) * 4,
                FRAGMENT => {
                    let offset = u16::from_be_bytes([head[2], head[3]]) & 0xfff8;
                    let more = head[3] & 1 != 0;
                    self.fragment_id = u32::from_ne_bytes([head[4], head[5], head[6], head[7]]);
                    self.fragment = match (offset, more) {
                        (0, false) => Fragment::No,
                        (0, true) => Fragment::First,
                        _ => Fragment::Later,
                    };
                    8
                }
                _ => return None,
            };
            self.protocol = head[0];
            self.l4 += len;
            if self.fragment == Fragment::Later {
                // What follows is the middle of a datagram.
                return Some(());
            }
            if self.l4 > MAX_L4 {
                return None;
            }
            seen += 1;
        }
        if is_extension(self.protocol) {
            return None;
        }
        self.l4 = forget_bounds(ctx, self.l4);
        make_linear(ctx, self.l4 as usize + 20);
        Some(())
    }
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Whether another header follows, and what it is about is said there.
#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS)
}

impl<const V4: bool> Packet<V4> {
    /// The ports of a TCP or UDP packet that is no later fragment.
    #[inline(always)]
    pub fn ports(&self, ctx: &TcContext) -> Option<Ports> {
        let l4 = self.l4_bounded()?;
        let tcp_flags = match self.protocol {
            TCP => {
                let header: *const [u8; 20] = at(ctx, l4)?;
                // SAFETY: `at` has checked the bounds.
                unsafe { (*header)[13] }
            }
            UDP => 0,
            _ => return None,
        };
        let header: *const [u16; 4] = at(ctx, l4)?;
        // SAFETY: `at` has checked the bounds; the machine has no alignment trap.
        let [source_be, destination_be, ..] = unsafe { *header };
        Some(Ports { source_be, destination_be, tcp_flags })
    }

    /// [`Packet::l4`], with its bounds made visible to the verifier.
    #[inline(always)]
    pub fn l4_bounded(&self) -> Option<usize> {
        let l4 = self.l4 as usize & 0x1ff;
        if l4 == self.l4 as usize { Some(l4) } else { None }
    }

    #[inline(always)]
    pub fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            source: self.source,
            destination: self.destination,
            id: self.fragment_id,
            // IPv6 shows the protocol in every fragment too, but names what follows the fragment header there.
            protocol: self.protocol as u32,
        }
    }
}

/// The same number, of which the verifier knows nothing any more: it would follow the rest of the program once for every
/// number of extension headers, and come near its limit. The control block is any program's to write on.
#[inline(always)]
fn forget_bounds(ctx: &TcContext, number: u32) -> u32 {
    // SAFETY: the context is the kernel's.
    unsafe {
        let cb = &raw mut (*ctx.skb.skb).cb;
        (*cb)[0] = number;
        cb.cast::<u32>().read_volatile()
    }
}

/// Word by word: a copy of the whole may become a call, which may not be given a pointer into a packet.
#[inline(always)]
pub fn read_addr(from: *const [u32; 4]) -> Addr {
    let from: *const u32 = from.cast();
    // SAFETY: callers point to 16 readable bytes.
    unsafe {
        Addr([
            from.read_volatile(),
            from.add(1).read_volatile(),
            from.add(2).read_volatile(),
            from.add(3).read_volatile(),
        ])
    }
}

/// The counterpart of [`read_addr`].
#[inline(always)]
pub fn write_addr(to: *mut [u32; 4], addr: &Addr) {
    let to: *mut u32 = to.cast();
    let [a, b, c, d] = addr.0;
    // SAFETY: callers point to 16 writable bytes.
    unsafe {
        to.write_volatile(a);
        to.add(1).write_volatile(b);
        to.add(2).write_volatile(c);
        to.add(3).write_volatile(d);
    }
}

/// A pointer to a `T` at `offset` of the frame, if that is in its linear part.
///
/// It is good until the next helper that changes the packet; the verifier refuses a later use.
#[inline(always)]
pub fn at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() { None } else { Some(start as *mut T) }
}

/// Copies from anywhere in the frame, linear or not.
#[inline(always)]
pub fn load<const N: usize>(ctx: &TcContext, offset: u32, to: &mut [u8; N]) -> Option<()> {
    // SAFETY: the helper writes N bytes or fails.
    let result = unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), offset, to.as_mut_ptr().cast(), N as u32) };
    if result == 0 { Some(()) } else { None }
}

/// The same into a place of its own, which need not be cleared first.
#[inline(always)]
pub fn read<const N: usize>(ctx: &TcContext, offset: u32) -> Option<[u8; N]> {
    let mut bytes = MaybeUninit::<[u8; N]>::uninit();
    // SAFETY: the helper writes N bytes or fails.
    let result =
        unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
    // SAFETY: it has not failed.
    if result == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
}

/// Makes the first `len` bytes of the frame, or all of a shorter one, directly readable. Most frames are already.
#[inline(always)]
pub fn make_linear(ctx: &TcContext, len: usize) {
    let linear = ctx.data_end() - ctx.data();
    if linear < len && linear < ctx.len() as usize {
        let len = (len as u32).min(ctx.len());
        // SAFETY: the context is the kernel's. A failure shows as a bounds check that fails.
        unsafe { bpf_skb_pull_data(ctx.skb.skb, len) };
    }
}
