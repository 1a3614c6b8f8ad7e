//! What the engine says.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_wire::NumericIdentity;
use serde::Serialize;

use super::EndpointId;
use crate::model::{Direction, Effect};

/// What has changed since the last call.
///
/// To be carried out in this order, so that no packet is let through that neither the old nor the new state lets through:
/// policy maps first, then `cidrs`. A prefix that went away may be taken out of the ipcache in either order: its identity is
/// not given to another prefix while this set of changes is carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Ordered by endpoint; at most one each.
    pub endpoints: Vec<(EndpointId, EndpointChange)>,
    /// Prefixes to put into the ipcache with an identity of this node's own, or (none) to take out.
    ///
    /// They are for addresses of which nothing else is known: an entry for a pod or a node under the same prefix wins,
    /// except as [`CidrIdentity::kube_apiserver`] says.
    pub cidrs: Vec<(IpNet, Option<CidrIdentity>)>,
}

impl Changes {
    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty() && self.cidrs.is_empty()
    }
}

/// The identity of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CidrIdentity {
    /// Known to this node alone, `1 << 24` and up; or reserved: world-ipv4 and world-ipv6 for the two prefixes that cover
    /// everything.
    pub identity: NumericIdentity,
    /// The Kubernetes API is served here. If the address is also that of a node, its identity is to be
    /// [`NumericIdentity::KUBE_APISERVER`] rather than [`NumericIdentity::REMOTE_NODE`].
    pub kube_apiserver: bool,
}

/// What has changed for an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointChange {
    /// Its rules: the whole map, to be put in place of the old one at once. Endpoints whose pods are alike share it.
    Replace(Arc<Resolved>),
    /// The identities that its rules are about: single entries, in place.
    Update {
        /// Entries to write, new or changed.
        put: Vec<(PolicyKey, Decision)>,
        /// Entries to delete.
        delete: Vec<PolicyKey>,
    },
    /// The endpoint is gone from the engine, as it was told.
    Remove,
}

/// What an endpoint may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// What comes to it and is not allowed by an entry is dropped. Otherwise nothing is, and there are no entries.
    pub ingress_enforced: bool,
    /// The same for what it sends.
    pub egress_enforced: bool,
    /// See [`crate::lookup`] for how they are read.
    pub entries: BTreeMap<PolicyKey, Decision>,
}

impl Resolved {
    /// Whether that direction is looked up at all.
    pub fn is_enforced(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.ingress_enforced,
            Direction::Egress => self.egress_enforced,
        }
    }
}

/// Whom and what a decision is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyKey {
    /// Identity of the other side; 0 for any.
    pub identity: NumericIdentity,
    /// Seen from the endpoint.
    pub direction: Direction,
    /// Protocol and destination ports.
    pub l4: L4Prefix,
}

impl PolicyKey {
    /// Significant bits of the key in the kernel's trie: identity and direction (40), protocol (8), port (16).
    pub fn prefix_len(&self) -> u32 {
        40 + u32::from(self.l4.bits())
    }
}

/// Any protocol; or a protocol with a range of destination ports that is a prefix (for ICMP, of types).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct L4Prefix {
    protocol: u8,
    port: u16,
    bits: u8,
}

impl L4Prefix {
    /// Every protocol.
    pub const ANY: Self = Self { protocol: 0, port: 0, bits: 0 };

    /// All ports of an IP protocol.
    pub const fn protocol_only(protocol: u8) -> Self {
        Self { protocol, port: 0, bits: 8 }
    }

    /// The ports that begin with the first `port_bits` (0..=16, more is 16) bits of `port`.
    pub const fn ports(protocol: u8, port: u16, port_bits: u8) -> Self {
        let port_bits = if port_bits > 16 { 16 } else { port_bits };
        let mask = if port_bits == 0 { 0 } else { u16::MAX << (16 - port_bits) };
        Self { protocol, port: port & mask, bits: 8 + port_bits }
    }

    /// One port, or ICMP type.
    pub const fn port(protocol: u8, port: u16) -> Self {
        Self::ports(protocol, port, 16)
    }

    /// The IP protocol number; none for any.
    pub fn protocol(&self) -> Option<u8> {
        (self.bits > 0).then_some(self.protocol)
    }

    /// First port of the range.
    pub fn first_port(&self) -> u16 {
        self.port
    }

    /// Last port of the range.
    pub fn last_port(&self) -> u16 {
        match self.port_bits() {
            0 => u16::MAX,
            bits => self.port | !(u16::MAX << (16 - bits)),
        }
    }

    /// Significant bits of the port: 0 for all of them, 16 for one.
    pub fn port_bits(&self) -> u8 {
        self.bits.saturating_sub(8)
    }

    /// Significant bits of protocol and port together: 0, or 8 to 24.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether everything that `other` covers is covered, too.
    pub fn covers(&self, other: &Self) -> bool {
        self.bits <= other.bits
            && (self.bits == 0
                || (self.protocol == other.protocol
                    && self.port == Self::ports(0, other.port, self.port_bits()).port))
    }
}

impl fmt::Display for L4Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol() {
            None => return f.write_str("ANY"),
            Some(1) => "ICMP".to_owned(),
            Some(6) => "TCP".to_owned(),
            Some(17) => "UDP".to_owned(),
            Some(58) => "ICMPv6".to_owned(),
            Some(132) => "SCTP".to_owned(),
            Some(other) => other.to_string(),
        };
        match self.port_bits() {
            0 => write!(f, "{protocol}"),
            16 => write!(f, "{}/{protocol}", self.port),
            _ => write!(f, "{}-{}/{protocol}", self.first_port(), self.last_port()),
        }
    }
}

impl fmt::Debug for L4Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is decided about a key, and by which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Allow or deny.
    pub effect: Effect,
    /// The rule; of several that say the same, the first in the order of policies' names.
    pub rule: RuleId,
}

impl Decision {
    /// Whether it forbids.
    pub fn is_deny(&self) -> bool {
        self.effect == Effect::Deny
    }

    /// Of two decisions about a packet (one for its identity, one for any) the higher one holds: 2 for deny, 1 for allow.
    pub fn precedence(&self) -> u32 {
        match self.effect {
            Effect::Allow => 1,
            Effect::Deny => 2,
        }
    }
}

/// Stands for a rule in maps and events. [`super::Engine::origin`] says which rule; a number is never given to another one
/// while the engine lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No rule: nothing allows it, so it is denied.
    pub const DEFAULT_DENY: Self = Self(0);
    /// No rule: the direction is not restricted by default (`enableDefaultDeny: false`), so it is allowed.
    pub const NOT_RESTRICTED: Self = Self(1);
    /// No rule: a node always reaches its own pods.
    pub const HOST: Self = Self(2);
    /// The first number of a rule.
    pub const FIRST: Self = Self(16);
}
