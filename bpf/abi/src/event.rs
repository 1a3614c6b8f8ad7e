//! What the programs tell of their verdicts, through a ring buffer.

use core::fmt;

use crate::Addr;

/// What became of a packet.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum PolicyVerdict {
    /// It went on. Told of the first packet of a flow, and of the first after others of it were dropped.
    Forwarded = 0,
    /// It was dropped.
    Dropped = 1,
}

impl PolicyVerdict {
    /// The verdict with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Forwarded),
            1 => Some(Self::Dropped),
            _ => None,
        }
    }
}

/// Why a packet was dropped. Numbers are never reused.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum DropReason {
    /// It was not.
    None = 0,
    /// A policy selects the endpoint in this direction, and no rule allows the packet.
    NoRule = 1,
    /// A rule denies it.
    Denied = 2,
    /// The endpoint's rules are not known yet.
    Waiting = 3,
    /// A later fragment whose first was not let through, or has not come.
    Fragment = 4,
    /// What it is cannot be told: not IP, a tagged frame, or headers that cannot be followed.
    Unreadable = 5,
    /// The pod has sent it from an address that belongs to somebody else.
    ForgedSource = 6,
}

impl DropReason {
    /// All of them, in order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::None,
        Self::NoRule,
        Self::Denied,
        Self::Waiting,
        Self::Fragment,
        Self::Unreadable,
        Self::ForgedSource,
    ];

    /// The reason with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        let number = number as usize;
        if number < Self::ALL.len() { Some(Self::ALL[number]) } else { None }
    }

    /// In words, to follow "dropped: ".
    pub const fn words(self) -> &'static str {
        match self {
            Self::None => "not dropped",
            Self::NoRule => "no rule allows it",
            Self::Denied => "a rule denies it",
            Self::Waiting => "the endpoint's rules are not known yet",
            Self::Fragment => "a fragment whose first part was not let through",
            Self::Unreadable => "its headers cannot be read, so no rule can allow it",
            Self::ForgedSource => "its source address belongs to somebody else",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

/// Bits of [`PolicyEvent::flags`].
pub mod event_flags {
    /// The packet goes the other way than the one that began its flow.
    pub const REPLY: u8 = 1;
    /// An ICMP error; the other side and the ports are those of the flow that it is about.
    pub const RELATED: u8 = 2;
}

/// One verdict. What is not known is zero.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PolicyEvent {
    /// Nanoseconds of the kernel's monotonic clock.
    pub time: u64,
    /// Source of the packet.
    pub source: Addr,
    /// Destination of the packet, after a service's address was translated.
    pub destination: Addr,
    /// Numeric identity of the source.
    pub source_identity: u32,
    /// Numeric identity of the destination.
    pub destination_identity: u32,
    /// Interface of the endpoint whose policy has decided.
    pub ifindex: u32,
    /// [`PolicyEntry::rule`](crate::PolicyEntry) of the entry that has decided, or of [`reserved_rule`](crate::reserved_rule).
    pub rule: u32,
    /// Bytes of the packet, with its Ethernet header.
    pub len: u32,
    /// Network byte order; of ICMP echo the identifier.
    pub source_port_be: u16,
    /// Network byte order; of ICMP the type.
    pub destination_port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`Direction`](crate::Direction): which of the endpoint's policies was asked. Of a reply that is the direction in which
    /// its flow began.
    pub direction: u8,
    /// [`PolicyVerdict`].
    pub verdict: u8,
    /// [`DropReason`].
    pub reason: u8,
    /// Of TCP.
    pub tcp_flags: u8,
    /// [`event_flags`].
    pub flags: u8,
    /// Zero.
    pub pad: [u8; 2],
}

#[cfg(test)]
mod tests {
    use core::mem::size_of;

    use super::*;

    #[test]
    fn an_event_has_no_gaps_and_does_not_creep() {
        assert_eq!(size_of::<PolicyEvent>(), 8 + 2 * 16 + 5 * 4 + 2 * 2 + 6 + 2);
        assert_eq!(size_of::<PolicyEvent>(), 72);
    }

    #[test]
    fn reasons_are_in_order_of_their_numbers() {
        for (number, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
            assert_eq!(DropReason::from_number(number as u8), Some(reason));
        }
        assert_eq!(DropReason::from_number(DropReason::ALL.len() as u8), None);
    }
}
