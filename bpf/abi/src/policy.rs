//! What an endpoint may do: one LPM trie per endpoint.

/// Bits of [`PolicyEntry::flags`].
pub mod policy_flags {
    /// The packet is dropped.
    pub const DENY: u8 = 1;
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

/// Whom and what a rule is about. Longest prefix wins; ranges of ports are prefixes.
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
    /// Destination port, network byte order; for ICMP the type. Bits beyond the prefix are zero.
    pub port_be: u16,
}

impl PolicyKey {
    /// Bits of identity and direction: any protocol.
    pub const ANY_PROTOCOL: u32 = 40;
    /// Bits of identity, direction and protocol: any port.
    pub const ANY_PORT: u32 = 48;
    /// Bits of a key with one port.
    pub const ONE_PORT: u32 = 64;
}

/// What is decided.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PolicyEntry {
    /// Of two entries that hold (one for the identity, one for any) the higher one decides.
    pub precedence: u32,
    /// Which rule this comes from, for events.
    pub rule: u32,
    /// [`policy_flags`].
    pub flags: u8,
    /// Zero.
    pub pad: [u8; 3],
}

#[cfg(test)]
mod tests {
    use core::mem::size_of;

    use super::*;

    #[test]
    fn what_a_rule_costs_in_bytes_does_not_creep() {
        assert_eq!(size_of::<PolicyKey>() + size_of::<PolicyEntry>(), 12 + 12);
    }
}
