//! Operations on endpoints and their policy maps, in the kernel's terms.

use isthmus_bpf_abi::{self as abi, PolicyEntry, policy_flags};
use isthmus_policy::model::Direction;
use isthmus_policy::{Decision, PolicyKey, Resolved};

use crate::datapath::{AtFirst, Datapath, EndpointSettings, Enforcement, PolicyError};

/// One change, to be made as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PolicyOp {
    /// There is no pod at the interface any more.
    Forget {
        /// The interface.
        interface: u32,
    },
    /// Says who the pod at the interface is; its policy stays as it is.
    State {
        /// The interface.
        interface: u32,
        /// The pod.
        settings: EndpointSettings,
        /// What happens to its packets, if it was not known before, until its policy comes.
        at_first: AtFirst,
    },
    /// Its whole policy.
    Replace {
        /// The interface.
        interface: u32,
        /// In which directions.
        enforcement: Enforcement,
        /// What it allows and denies.
        entries: Vec<(abi::PolicyKey, PolicyEntry)>,
    },
    /// Some entries of its policy.
    Update {
        /// The interface.
        interface: u32,
        /// New or changed.
        put: Vec<(abi::PolicyKey, PolicyEntry)>,
        /// To delete.
        delete: Vec<abi::PolicyKey>,
    },
}

/// Why an operation was not made. The endpoint is closed if it was about its policy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// The same would fail again.
    #[error("{0}")]
    Lasting(String),
    /// It is tried again.
    #[error("{0}")]
    Passing(String),
}

impl Fault {
    /// Whether trying the same again is of no use.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Lasting(_))
    }
}

impl PolicyOp {
    /// The interface that it is about.
    pub fn interface(&self) -> u32 {
        match self {
            Self::Forget { interface }
            | Self::State { interface, .. }
            | Self::Replace { interface, .. }
            | Self::Update { interface, .. } => *interface,
        }
    }
}

impl PolicyOp {
    /// Makes the change.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn make(&self, datapath: &Datapath) -> Result<(), Fault> {
        match self {
            Self::Forget { interface } => datapath.remove_endpoint(*interface),
            Self::State { interface, settings, at_first } => {
                datapath.put_endpoint(*interface, settings, *at_first)
            }
            Self::Replace { interface, enforcement, entries } => {
                datapath.replace_policy(*interface, *enforcement, entries)
            }
            Self::Update { interface, put, delete } => datapath.update_policy(*interface, put, delete),
        }
        .map_err(Fault::from)
    }
}

impl From<PolicyError> for Fault {
    fn from(error: PolicyError) -> Self {
        match error {
            PolicyError::TooManyEntries { .. } => Self::Lasting(error.to_string()),
            error => Self::Passing(error.to_string()),
        }
    }
}

pub(super) fn replace(interface: u32, resolved: &Resolved) -> PolicyOp {
    PolicyOp::Replace {
        interface,
        enforcement: Enforcement { ingress: resolved.ingress_enforced, egress: resolved.egress_enforced },
        entries: resolved.entries.iter().map(|(key, decision)| (self::key(key), entry(decision))).collect(),
    }
}

pub(super) fn update(interface: u32, put: &[(PolicyKey, Decision)], delete: &[PolicyKey]) -> PolicyOp {
    PolicyOp::Update {
        interface,
        put: put.iter().map(|(key, decision)| (self::key(key), entry(decision))).collect(),
        delete: delete.iter().map(key).collect(),
    }
}

fn key(key: &PolicyKey) -> abi::PolicyKey {
    abi::PolicyKey {
        prefix_len: key.prefix_len(),
        identity: key.identity.0,
        direction: match key.direction {
            Direction::Ingress => abi::Direction::Ingress as u8,
            Direction::Egress => abi::Direction::Egress as u8,
        },
        protocol: key.l4.protocol().unwrap_or(0),
        port_be: key.l4.first_port().to_be(),
    }
}

fn entry(decision: &Decision) -> PolicyEntry {
    PolicyEntry {
        precedence: decision.precedence(),
        rule: decision.rule.0,
        flags: if decision.is_deny() { policy_flags::DENY } else { 0 },
        pad: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use isthmus_policy::model::Effect;
    use isthmus_policy::{L4Prefix, RuleId};
    use isthmus_wire::NumericIdentity;

    use super::*;

    #[test]
    fn a_range_of_ports_is_a_prefix_in_network_order() {
        let range = PolicyKey {
            identity: NumericIdentity(65_536 + 7),
            direction: Direction::Egress,
            l4: L4Prefix::ports(6, 8080, 12),
        };
        let found = key(&range);
        assert_eq!((found.prefix_len, found.identity, found.direction), (60, 65_543, 1));
        assert_eq!((found.protocol, found.port_be), (6, 8080_u16.to_be()));
        let everything = PolicyKey { l4: L4Prefix::ANY, ..range };
        assert_eq!(key(&everything).prefix_len, abi::PolicyKey::ANY_PROTOCOL);
        let deny = entry(&Decision { effect: Effect::Deny, rule: RuleId(16) });
        assert_eq!((deny.flags, deny.rule), (policy_flags::DENY, 16));
    }
}
