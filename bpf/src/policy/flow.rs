//! Which flow a packet belongs to, and what its headers tell of it.

use aya_ebpf::programs::TcContext;
use isthmus_bpf_abi::{Addr, PolicyCtKey};

use crate::icmp;
use crate::packet::{
    ACK, ETH_LEN, FIN, Fragment, ICMP, ICMPV6, Packet, RST, SCTP, SYN, TCP, UDP, at, read,
};

/// Who began an exchange of ICMP echoes: both sides may ask with the same identifier.
const ASKS: u16 = 1;
const ANSWERS: u16 = 0;

/// A packet, as one of a flow of its endpoint.
///
/// In this order what is cleared at first are eight bytes in a row, and not a number for which the compiler calls a loop.
#[repr(C)]
pub struct Flow {
    pub key: PolicyCtKey,
    /// The other side of this packet, where it is not that of its flow: an ICMP error may come from any router.
    pub remote: Addr,
    pub fragment_id: u32,
    pub tcp_flags: u8,
    pub icmp_type: u8,
    /// First of some fragments, whose identification is known.
    pub fragments: bool,
    /// So that there is no gap, which the verifier would take for something unread.
    pub pad: u8,
    /// IP protocol number of this packet.
    pub protocol: u8,
    pub kind: Kind,
    /// The endpoint has sent this packet.
    pub egress: bool,
    pub from_host: bool,
}

/// What may become of a packet without a known flow.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// It begins one.
    Begins = 0,
    /// It belongs to one that was lost, and begins it again.
    Continues = 1,
    /// It begins none; it is decided for itself.
    Alone = 2,
    /// An ICMP error. The key is that of the flow that it is about.
    Related = 3,
    /// Follows the first fragment, or is dropped.
    LaterFragment = 4,
}

impl Flow {
    /// Nothing but the interface and the direction.
    #[inline(always)]
    pub fn unknown(ctx: &TcContext, egress: bool) -> Self {
        const NONE: Addr = Addr([0; 4]);
        Self::between(ctx, &NONE, &NONE, 0, egress)
    }

    /// Addresses and protocol.
    #[inline(always)]
    pub fn of_ip<const V4: bool, const EGRESS: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Self {
        let (local, remote) = if EGRESS {
            (&packet.source, &packet.destination)
        } else {
            (&packet.destination, &packet.source)
        };
        Self::between(ctx, local, remote, packet.protocol, EGRESS)
    }

    #[inline(always)]
    fn between(ctx: &TcContext, local: &Addr, remote: &Addr, protocol: u8, egress: bool) -> Self {
        // SAFETY: the context is the kernel's.
        let ifindex = unsafe { (*ctx.skb.skb).ifindex };
        Self {
            key: PolicyCtKey {
                local: *local,
                remote: *remote,
                ifindex,
                local_port_be: 0,
                remote_port_be: 0,
                protocol: protocol as u32,
            },
            remote: *remote,
            fragment_id: 0,
            tcp_flags: 0,
            icmp_type: 0,
            fragments: false,
            pad: 0,
            protocol,
            kind: Kind::Begins,
            egress,
            from_host: is_from_host(ctx, egress),
        }
    }

    /// All the rest. `None` if the headers cannot be read.
    #[inline(always)]
    pub fn read<const V4: bool, const EGRESS: bool>(
        &mut self,
        ctx: &TcContext,
        packet: &Packet<V4>,
    ) -> Option<()> {
        match packet.fragment {
            Fragment::Later => {
                self.key = fragment_key(packet.fragment_id, &self.key, EGRESS, V4);
                self.kind = Kind::LaterFragment;
                return Some(());
            }
            Fragment::First => {
                self.fragments = true;
                self.fragment_id = packet.fragment_id;
            }
            Fragment::No => {}
        }
        match packet.protocol {
            TCP | UDP | SCTP => {
                let (source, destination) = ports(ctx, packet)?;
                let (local, remote) = if EGRESS { (source, destination) } else { (destination, source) };
                self.key.local_port_be = local;
                self.key.remote_port_be = remote;
                if packet.protocol == TCP {
                    self.tcp_flags = tcp_flags(ctx, packet)?;
                    self.kind = kind_of_tcp(self.tcp_flags);
                }
            }
            ICMP if V4 => self.read_icmp(ctx, packet)?,
            ICMPV6 if !V4 => self.read_icmp(ctx, packet)?,
            _ => {}
        }
        Some(())
    }

    /// What the rules about this packet for itself name: a port, or an ICMP type.
    #[inline(always)]
    pub fn own_port_be(&self) -> u16 {
        match self.protocol {
            ICMP | ICMPV6 => (self.icmp_type as u16).to_be(),
            _ if self.egress => self.key.remote_port_be,
            _ => self.key.local_port_be,
        }
    }

    /// What the rules about the packet name that began the flow.
    #[inline(always)]
    pub fn first_port_be(&self, begun_by_endpoint: bool) -> u16 {
        match self.key.protocol as u8 {
            ICMP => 8_u16.to_be(),
            ICMPV6 => 128_u16.to_be(),
            _ if begun_by_endpoint => self.key.remote_port_be,
            _ => self.key.local_port_be,
        }
    }

    /// The key of the later fragments, of a first one.
    #[inline(always)]
    pub fn fragments_key(&self) -> PolicyCtKey {
        fragment_key(self.fragment_id, &self.key, self.egress, self.key.local.is_v4())
    }

    #[inline(always)]
    fn read_icmp<const V4: bool>(&mut self, ctx: &TcContext, packet: &Packet<V4>) -> Option<()> {
        let (request, reply) = if V4 { (8, 0) } else { (128, 129) };
        let [kind, _, _, _, id_high, id_low, ..] = read::<8>(ctx, packet.l4)?;
        self.icmp_type = kind;
        self.kind = Kind::Alone;
        if kind == request || kind == reply {
            self.key.local_port_be = u16::from_ne_bytes([id_high, id_low]);
            self.key.remote_port_be = if self.egress == (kind == request) { ASKS } else { ANSWERS };
            if kind == request {
                self.kind = Kind::Begins;
            }
            return Some(());
        }
        if let Some(about) = icmp::about(ctx, packet) {
            self.relate(&about, if V4 { ICMP } else { ICMPV6 }, request, reply);
        }
        Some(())
    }

    /// Makes this the flow that an error is about, if the endpoint is one of its ends. An error about a packet that the
    /// endpoint has sent comes to it, and the other way round.
    #[inline(always)]
    fn relate(&mut self, about: &icmp::About, icmp: u8, request: u8, reply: u8) {
        let (local, remote) =
            if self.egress { (about.destination, about.source) } else { (about.source, about.destination) };
        if local != self.key.local {
            return;
        }
        let [a, b, c, d, e, f, ..] = about.transport;
        let (mut local_port, mut remote_port) = match about.protocol {
            TCP | UDP | SCTP => {
                let (source, destination) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
                if self.egress { (destination, source) } else { (source, destination) }
            }
            _ => (0, 0),
        };
        if about.protocol == icmp && (a == request || a == reply) {
            local_port = u16::from_ne_bytes([e, f]);
            remote_port = if self.egress != (a == request) { ASKS } else { ANSWERS };
        }
        self.kind = Kind::Related;
        self.key.remote = remote;
        self.key.protocol = about.protocol as u32;
        self.key.local_port_be = local_port;
        self.key.remote_port_be = remote_port;
    }
}

/// Whether this is a TCP packet that begins or ends a connection: what has to be known of it when a policy comes later.
/// Nothing else is looked at while none is enforced.
#[inline(always)]
pub fn is_turning_point<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> bool {
    packet.protocol == TCP
        && packet.fragment != Fragment::Later
        && tcp_flags(ctx, packet)
            .is_some_and(|flags| flags & (SYN | ACK) == SYN || flags & (FIN | RST) != 0)
}

/// Source and destination port. A header behind options may lie beyond what is directly readable.
#[inline(always)]
fn ports<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Option<(u16, u16)> {
    if let Some(header) = at::<[u16; 2]>(ctx, packet.l4_bounded()?) {
        // SAFETY: `at` has checked the bounds; the machine has no alignment trap.
        let [source, destination] = unsafe { *header };
        return Some((source, destination));
    }
    let [a, b, c, d] = read(ctx, packet.l4)?;
    Some((u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])))
}

#[inline(always)]
fn tcp_flags<const V4: bool>(ctx: &TcContext, packet: &Packet<V4>) -> Option<u8> {
    if let Some(header) = at::<[u8; 14]>(ctx, packet.l4_bounded()?) {
        // SAFETY: `at` has checked the bounds.
        return Some(unsafe { (*header)[13] });
    }
    let [flags] = read(ctx, packet.l4 + 13)?;
    Some(flags)
}

/// Whether the node itself has sent this to its pod: nothing has brought it here.
#[inline(always)]
pub fn is_from_host(ctx: &TcContext, egress: bool) -> bool {
    // SAFETY: the context is the kernel's.
    !egress && unsafe { (*ctx.skb.skb).ingress_ifindex } == 0
}

#[inline(always)]
fn kind_of_tcp(tcp_flags: u8) -> Kind {
    match tcp_flags & (SYN | ACK | RST) {
        SYN => Kind::Begins,
        flags if flags & (SYN | RST) != 0 => Kind::Alone,
        _ => Kind::Continues,
    }
}

#[inline(always)]
fn fragment_key(id: u32, flow: &PolicyCtKey, egress: bool, v4: bool) -> PolicyCtKey {
    // Only IPv4 shows the same protocol in all fragments, and counts identifications by it.
    let protocol = if v4 { flow.protocol & 0xff } else { 0 };
    let direction = if egress { PolicyCtKey::FRAGMENT_EGRESS } else { 0 };
    PolicyCtKey {
        local: flow.local,
        remote: flow.remote,
        ifindex: flow.ifindex,
        local_port_be: (id >> 16) as u16,
        remote_port_be: id as u16,
        protocol: protocol | PolicyCtKey::FRAGMENT | direction,
    }
}

/// Neighbour discovery (RFC 4861) and multicast listener discovery (RFC 3810): without them there is no IPv6 at all. Both
/// are known from packets of other links by their hop limit. Routers' messages pass to a pod, and not from one.
#[inline(always)]
pub fn is_link_housekeeping<const V4: bool, const EGRESS: bool>(
    ctx: &TcContext,
    packet: &Packet<V4>,
) -> bool {
    if V4 || packet.protocol != ICMPV6 || packet.fragment != Fragment::No {
        return false;
    }
    let Some([kind]) = read(ctx, packet.l4) else { return false };
    let Some([hop_limit]) = read(ctx, ETH_LEN as u32 + 7) else { return false };
    match (hop_limit, EGRESS) {
        (255, true) => matches!(kind, 133 | 135 | 136),
        (255, false) => matches!(kind, 134..=137),
        (1, true) => matches!(kind, 131 | 132 | 143),
        (1, false) => kind == 130,
        _ => false,
    }
}
