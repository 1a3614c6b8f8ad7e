//! Protocols and destination ports.

use std::sync::Arc;

/// What a clause is about in terms of protocols and ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Every protocol.
    All,
    /// What one of these matches; nothing if there is none.
    OneOf(Vec<PortMatch>),
}

/// A protocol with ports, or an ICMP type.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortMatch {
    /// Ports of a transport protocol.
    Transport {
        /// Which one; none stands for TCP, UDP and SCTP.
        protocol: Option<Transport>,
        /// Its destination ports.
        ports: PortSet,
    },
    /// A type of ICMP message.
    Icmp {
        /// Of which ICMP.
        family: IcmpFamily,
        /// The type's number.
        kind: u8,
    },
}

/// Ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortSet {
    /// All of them.
    All,
    /// From the first to the last, both included, neither 0.
    Range(u16, u16),
    /// Whichever the receiving pod calls by this name.
    Named(Arc<str>),
}

/// Transport protocols with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// As policies spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// Which ICMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IcmpFamily {
    /// ICMP of IPv4.
    V4,
    /// ICMPv6.
    V6,
}

impl IcmpFamily {
    /// IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::V4 => 1,
            Self::V6 => 58,
        }
    }
}
