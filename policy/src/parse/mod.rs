//! From the objects users write to the model.
//!
//! Nothing is ever silently ignored. A field that is not supported, not known or not valid becomes a [`Problem`], and what
//! depends on it fails closed:
//!
//! | where | what happens |
//! |---|---|
//! | in an element of `ingress` or `egress` | what depends on the field is not granted |
//! | in an element of `ingressDeny` or `egressDeny` | everything it could be about is denied |
//! | in a selector of endpoints | every endpoint that could be meant is denied by default, and nothing is granted to it |
//! | of the whole `spec` | the same |

mod problem;

pub use problem::{Consequence, Problem, ProblemKind};

use serde_json::Value;

use crate::model::{PolicyKind, PolicyName, Rule};

/// A policy, ready to be enforced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Its rules. What the problems are about is replaced by what fails closed.
    pub rules: Vec<Rule>,
    /// What is not enforced as written; empty for most policies.
    pub problems: Vec<Problem>,
}

/// Most specs a policy may have.
pub const MAX_SPECS: usize = 1000;

/// Reads a policy of any kind: `specs` are its `spec` and the elements of its `specs`, in this order.
pub fn policy(name: &PolicyName, specs: &[Value]) -> Parsed {
    match name.kind {
        PolicyKind::NetworkPolicy => network_policy(name, specs),
        PolicyKind::CiliumNetworkPolicy | PolicyKind::CiliumClusterwideNetworkPolicy => cilium(name, specs),
    }
}

/// Reads a Kubernetes NetworkPolicy.
pub fn network_policy(_name: &PolicyName, _specs: &[Value]) -> Parsed {
    Parsed::default()
}

/// Reads a CiliumNetworkPolicy or a CiliumClusterwideNetworkPolicy.
pub fn cilium(_name: &PolicyName, _specs: &[Value]) -> Parsed {
    Parsed::default()
}
