//! What a policy says, whatever kind of object said it.
//!
//! A model is always enforceable as it stands: what could not be parsed is already replaced by what fails closed (an allow
//! that grants less, a deny that denies more), so nothing behind it needs to know of it.

mod name;
mod peer;
mod ports;

pub use name::{PolicyKind, PolicyName, RuleOrigin};
pub use peer::{CidrSelector, Entity, Peer, Peers, ServiceRef};
pub use ports::{IcmpFamily, PortMatch, PortSet, Ports, Transport};

use serde::{Deserialize, Serialize};

use crate::labels::Selector;

/// Which way a packet goes, seen from the endpoint that a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the endpoint.
    Ingress,
    /// From the endpoint.
    Egress,
}

impl Direction {
    /// Both of them.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    /// As it stands in policies and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a clause does to what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// Grants it.
    Allow,
    /// Forbids it, whatever grants it.
    Deny,
}

/// One `spec` of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The endpoints it is about, its namespace included where it has one.
    pub subject: Selector,
    /// What comes to these endpoints is denied unless something grants it.
    pub ingress_default_deny: bool,
    /// What these endpoints send is denied unless something grants it.
    pub egress_default_deny: bool,
    /// What it grants and forbids. An effect is decided by the union of all clauses that match, denies first.
    pub clauses: Vec<Clause>,
}

impl Rule {
    /// Denies by default whatever these endpoints send and receive, and allows nothing.
    pub fn lockdown(subject: Selector) -> Self {
        Self { subject, ingress_default_deny: true, egress_default_deny: true, clauses: Vec::new() }
    }
}

/// An element of one of the lists `ingress`, `egress`, `ingressDeny` and `egressDeny`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clause {
    /// Which way.
    pub direction: Direction,
    /// Allow or deny.
    pub effect: Effect,
    /// Position in its list, from 0.
    pub index: u16,
    /// The other side.
    pub peers: Peers,
    /// Protocols and destination ports.
    pub ports: Ports,
}
