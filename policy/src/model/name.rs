//! Names of policies and of the rules in them.

use std::fmt;

pub use isthmus_wire::local::{PolicyKey as PolicyName, PolicyKind};
use serde::{Serialize, Serializer};

use super::{Direction, Effect};

/// Where a decision comes from. Displays as `ciliumnetworkpolicy/app/allow-web ingress[0]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct RuleOrigin {
    /// The policy.
    #[serde(serialize_with = "as_text")]
    pub policy: PolicyName,
    /// Which of its rules: `spec` is 0; of `specs` the position, after `spec` if both are there.
    pub rule: u16,
    /// Which list.
    pub direction: Direction,
    /// Which list, too.
    pub effect: Effect,
    /// Position in that list.
    pub index: u16,
}

impl fmt::Display for RuleOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.policy)?;
        if self.rule > 0 {
            write!(f, "rule {} ", self.rule)?;
        }
        let deny = if self.effect == Effect::Deny { "Deny" } else { "" };
        write!(f, "{}{deny}[{}]", self.direction, self.index)
    }
}

fn as_text<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
