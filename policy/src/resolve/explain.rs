//! Why a packet would be let through or not, without sending one.

use isthmus_wire::NumericIdentity;
use serde::{Serialize, Serializer};

use super::{EndpointId, RuleId};
use crate::model::{Direction, Effect, PolicyName, RuleOrigin};

/// A packet to ask about, as it looks at the endpoint: after service translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Seen from the endpoint.
    pub direction: Direction,
    /// Identity of the other side.
    pub peer: NumericIdentity,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; for ICMP the type; 0 for other protocols.
    pub port: u16,
}

/// What is decided, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Whether it passes.
    pub effect: Effect,
    /// What the endpoint's map says, as events do.
    pub rule: RuleId,
    /// The rule that decides; none if no rule does.
    pub origin: Option<RuleOrigin>,
    /// In words, why, if no rule decides.
    pub reason: &'static str,
    /// Whether the direction is restricted at all.
    pub enforced: bool,
    /// Every rule that is about this packet, denies first, in the order of their names.
    pub matching: Vec<RuleOrigin>,
    /// Policies that restrict this endpoint in this direction by default.
    #[serde(serialize_with = "as_texts")]
    pub default_deny_by: Vec<PolicyName>,
}

fn as_texts<S: Serializer>(names: &[PolicyName], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(names.iter().map(ToString::to_string))
}
