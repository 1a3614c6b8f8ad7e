use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Source address that a pod sees when a service sends it to itself, IPv4: the answer must come back to the
/// datapath instead of staying inside the pod. Link-local, so that no network routes it; the one Cilium uses.
pub const LOOPBACK_V4: Addr = Addr::from_v4(Ipv4Addr::new(169, 254, 42, 1));

/// The same for IPv6: inside the discard-only block 100::/64 (RFC 6666), which no network routes.
pub const LOOPBACK_V6: Addr = Addr::from_v6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0xa9fe, 0x2a01));

const V4_MAPPED_PREFIX: u32 = 0x0000_ffff_u32.to_be();

/// An IPv6 address, or an IPv4 address in v4-mapped form, in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr(
    /// The address as four words, each as it stands in memory.
    pub [u32; 4],
);

impl Addr {
    /// The v4-mapped form of an IPv4 address.
    #[inline(always)]
    pub const fn from_v4(addr: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(addr.octets()))
    }

    /// The v4-mapped form of an IPv4 address that is already a word in network byte order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, V4_MAPPED_PREFIX, word])
    }

    /// An IPv6 address.
    pub const fn from_v6(addr: Ipv6Addr) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = addr.octets();
        Self([
            u32::from_ne_bytes([a, b, c, d]),
            u32::from_ne_bytes([e, f, g, h]),
            u32::from_ne_bytes([i, j, k, l]),
            u32::from_ne_bytes([m, n, o, p]),
        ])
    }

    /// Whether this is an IPv4 address in v4-mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        (self.0[0] | self.0[1]) == 0 && self.0[2] == V4_MAPPED_PREFIX
    }

    /// The address as the standard library's type; v4-mapped becomes IPv4.
    pub const fn ip(&self) -> IpAddr {
        let [a, b, c, d] = self.0;
        if self.is_v4() {
            let [a, b, c, d] = d.to_ne_bytes();
            return IpAddr::V4(Ipv4Addr::new(a, b, c, d));
        }
        let (a, b, c, d) = (u32::from_be(a), u32::from_be(b), u32::from_be(c), u32::from_be(d));
        let bits = ((a as u128) << 96) | ((b as u128) << 64) | ((c as u128) << 32) | d as u128;
        IpAddr::V6(Ipv6Addr::from_bits(bits))
    }
}

impl From<IpAddr> for Addr {
    fn from(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(addr) => Self::from_v4(addr),
            IpAddr::V6(addr) => Self::from_v6(addr),
        }
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

/// The transport protocols that services are balanced for, with their IP protocol numbers. SCTP is left alone.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

impl Protocol {
    /// The protocol with this IP protocol number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_comes_back_as_ipv4() {
        let ip = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));
        assert!(Addr::from(ip).is_v4());
        assert_eq!(Addr::from(ip).ip(), ip);
    }

    #[test]
    fn an_ipv6_address_comes_back_as_ipv6() {
        let ip: IpAddr = "fd00:10:96::1:2".parse().expect("a valid address");
        assert!(!Addr::from(ip).is_v4());
        assert_eq!(Addr::from(ip).ip(), ip);
    }

    #[test]
    fn a_v4_mapped_ipv6_address_is_the_same_key_as_the_ipv4_address() {
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().expect("a valid address");
        assert_eq!(Addr::from(mapped), Addr::from_v4(Ipv4Addr::new(10, 1, 2, 3)));
    }
}
