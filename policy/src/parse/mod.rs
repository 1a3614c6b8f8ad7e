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

mod cidr;
mod cilium;
mod clause;
mod fields;
mod kubernetes;
mod ports;
mod problem;
mod report;
mod selector;
#[cfg(test)]
mod tests;

use serde_json::Value;

pub use cilium::cilium;
pub use kubernetes::network_policy;
pub use problem::{Consequence, Problem, ProblemKind};

use crate::model::{PolicyKind, PolicyName, Rule};

/// Most specs of a policy.
pub const MAX_SPECS: usize = 1000;
/// Most elements of `ingress`, `egress`, `ingressDeny`, `egressDeny`, `toPorts` and `icmps`.
pub const MAX_ELEMENTS: usize = 1000;
/// Most peers of one list.
pub const MAX_PEERS: usize = 5000;
/// Most ports, and ICMP types, of one list: as Cilium's definition has it.
pub const MAX_PORTS: usize = 40;

/// A policy, ready to be enforced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Its rules. What the problems are about is replaced by what fails closed.
    pub rules: Vec<Rule>,
    /// What is not enforced as written; empty for most policies.
    pub problems: Vec<Problem>,
}

/// Reads a policy of any kind. `specs` are its `spec` and the elements of its `specs`, in this order.
pub fn policy(name: &PolicyName, specs: &[Value]) -> Parsed {
    match name.kind {
        PolicyKind::NetworkPolicy => network_policy(name, specs),
        PolicyKind::CiliumNetworkPolicy | PolicyKind::CiliumClusterwideNetworkPolicy => cilium(name, specs),
    }
}

/// Where a spec stands in its object.
fn spec_path(specs: &[Value], index: usize) -> String {
    if specs.len() == 1 { "spec".to_owned() } else { format!("specs[{index}]") }
}
