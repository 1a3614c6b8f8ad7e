//! What an endpoint may do: one LPM trie per endpoint, and what is remembered of the flows that were decided.

use crate::Addr;

/// Bits of [`PolicyEntry::flags`].
pub mod policy_flags {
    /// The packet is dropped.
    pub const DENY: u8 = 1;
}

/// Numeric identities that are the same in every cluster, as far as the programs know them.
pub mod reserved_identity {
    /// The node that the pod runs on. It always reaches its own pods.
    pub const HOST: u32 = 1;
    /// Whatever has no other identity.
    pub const WORLD: u32 = 2;
    /// What a Cilium with both address families calls the IPv4 world.
    pub const WORLD_IPV4: u32 = 9;
    /// And the IPv6 world.
    pub const WORLD_IPV6: u32 = 10;
    /// From here on identities stand for ranges of addresses in policies of this node.
    pub const LOCAL: u32 = 1 << 24;
}

/// What [`PolicyEntry::rule`] is where no rule has decided.
pub mod reserved_rule {
    /// Nothing allows it.
    pub const NONE: u32 = 0;
    /// The direction is not enforced.
    pub const NOT_ENFORCED: u32 = 1;
    /// The node reaches its own pods.
    pub const HOST: u32 = 2;
}

/// Which way a packet goes, seen from the endpoint.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Direction {
    /// To the endpoint.
    Ingress = 0,
    /// From the endpoint.
    Egress = 1,
}

impl Direction {
    /// The direction with this number, as it stands in maps and events.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Ingress),
            1 => Some(Self::Egress),
            _ => None,
        }
    }
}

/// Whom and what a rule is about. Longest prefix wins; ranges of ports are prefixes.
///
/// A packet is looked up twice: with the identity of its other side, and with identity 0. It is dropped if either entry
/// that is found denies, else let through if either allows, else dropped.
///
/// The layout is that of Cilium's `cilium_policy_v2`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PolicyKey {
    /// Significant bits after this field: 40 with any protocol, 48 with any port, 64 with one port.
    pub prefix_len: u32,
    /// Identity of the other side; 0 for any.
    pub identity: u32,
    /// [`Direction`].
    pub direction: u8,
    /// IP protocol number; 0 for any, and then the prefix ends before it.
    pub protocol: u8,
    /// Destination port, network byte order; for ICMP and ICMPv6 the type, as if it were a port; zero for protocols
    /// without ports. Bits beyond the prefix are zero.
    pub port_be: u16,
}

impl PolicyKey {
    /// Bits of identity and direction: any protocol.
    pub const ANY_PROTOCOL: u32 = 40;
    /// Bits of identity, direction and protocol: any port.
    pub const ANY_PORT: u32 = 48;
    /// Bits of a key with one port.
    pub const ONE_PORT: u32 = 64;

    /// Everything of `identity` in `direction`.
    pub const fn any(identity: u32, direction: Direction) -> Self {
        Self { prefix_len: Self::ANY_PROTOCOL, identity, direction: direction as u8, protocol: 0, port_be: 0 }
    }

    /// The ports that begin with the `bits` first bits of `port` (host byte order): 16 bits are one port, 0 are all.
    pub const fn ports(identity: u32, direction: Direction, protocol: u8, port: u16, bits: u8) -> Self {
        let bits = if bits > 16 { 16 } else { bits };
        let kept = if bits == 0 { 0 } else { port & (u16::MAX << (16 - bits)) };
        Self {
            prefix_len: Self::ANY_PORT + bits as u32,
            identity,
            direction: direction as u8,
            protocol,
            port_be: kept.to_be(),
        }
    }
}

/// What is decided.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PolicyEntry {
    /// For tools: where the entry stands among those that were merged into this endpoint's. The programs do not read it.
    pub precedence: u32,
    /// Which rule this comes from, for events; 0 for none in particular.
    pub rule: u32,
    /// [`policy_flags`].
    pub flags: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// Bits of [`PolicyCtEntry::flags`]. Those below 16 are [`ct_flags`](crate::ct_flags), forward being the way of the packet
/// that began the flow.
pub mod policy_ct_flags {
    /// The endpoint began the flow; else its other side did.
    pub const EGRESS: u32 = 1 << 16;
    /// The node itself began it: no policy is asked.
    pub const HOST: u32 = 1 << 17;
    /// Seen only while nothing was enforced: nobody has noted its packets since.
    pub const UNSEEN: u32 = 1 << 18;
}

/// A flow of an endpoint; the same key for both ways.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PolicyCtKey {
    /// The endpoint's address.
    pub local: Addr,
    /// The other side's.
    pub remote: Addr,
    /// The endpoint's interface: what one may do is no leave for another that forges its address.
    pub ifindex: u32,
    /// The endpoint's port, network byte order; of ICMP echo the identifier; of fragments half of theirs.
    pub local_port_be: u16,
    /// The other side's port, network byte order; of ICMP echo 1 if the endpoint asks and 0 if it answers; of fragments the
    /// other half of their identification.
    pub remote_port_be: u16,
    /// IP protocol number; as wide as the gap that it would leave. Of later fragments with [`Self::FRAGMENT`].
    pub protocol: u32,
}

impl PolicyCtKey {
    /// Added to the protocol: the entry is about the later fragments of one datagram to the endpoint, not about a flow.
    pub const FRAGMENT: u32 = 1 << 8;
    /// Added with [`Self::FRAGMENT`]: the datagram is from the endpoint.
    pub const FRAGMENT_EGRESS: u32 = 1 << 9;
}

/// What was decided about it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PolicyCtEntry {
    /// The epoch under which it was allowed; 0 if it is to be decided with its next packet. Only the current epoch holds:
    /// with another the flow is looked up again, as its first packet was.
    pub epoch: u32,
    /// Jiffies of the last packet in either direction, up to a second late.
    pub last_seen: u32,
    /// [`policy_ct_flags`] and [`ct_flags`](crate::ct_flags).
    pub flags: u32,
    /// Identity that the other side had then; 0 if nobody has asked.
    pub identity: u32,
}

#[cfg(test)]
mod tests {
    use core::mem::size_of;

    use super::*;

    #[test]
    fn what_a_rule_costs_in_bytes_does_not_creep() {
        assert_eq!(size_of::<PolicyKey>() + size_of::<PolicyEntry>(), 12 + 12);
    }

    #[test]
    fn what_a_decided_flow_costs_in_bytes_does_not_creep() {
        assert_eq!(size_of::<PolicyCtKey>() + size_of::<PolicyCtEntry>(), 44 + 16);
    }

    #[test]
    fn a_range_of_ports_keeps_no_bits_beyond_its_prefix() {
        let key = PolicyKey::ports(7, Direction::Egress, 6, 0x1234, 12);
        assert_eq!((key.prefix_len, key.port_be), (60, 0x1230_u16.to_be()));
        assert_eq!(PolicyKey::ports(7, Direction::Egress, 6, 0x1234, 0).port_be, 0);
        assert_eq!(PolicyKey::ports(7, Direction::Egress, 6, 0x1234, 16).prefix_len, PolicyKey::ONE_PORT);
    }
}
