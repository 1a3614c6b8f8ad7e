//! Pods whose policy could not be put in force, and whose policies those are.

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus_policy::PolicyName;

use super::{Policies, id};

/// A pod whose policy could not be put in force: it is allowed nothing in the directions that it is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// `namespace/name` of the pod.
    pub pod: Arc<str>,
    /// Its UID.
    pub uid: Arc<str>,
    /// Whether it does not fit, rather than that the kernel refused for a reason that may pass.
    pub is_too_large: bool,
    /// Why, and what to do.
    pub message: String,
    /// Entries that each policy would have in its map, in order of names.
    pub policies: BTreeMap<PolicyName, usize>,
}

impl Policies {
    /// Changes with each refusal that begins, ends or is repeated.
    pub fn refusals_version(&self) -> u64 {
        self.refusals
    }

    /// All refusals. Grows with the entries of the pods concerned.
    pub fn refusals(&self) -> Vec<Refusal> {
        let closed = self.endpoints.iter().filter_map(|(interface, endpoint)| {
            let fault = endpoint.fault.as_ref()?;
            let mut policies = BTreeMap::new();
            for decision in self.engine.resolved(id(*interface)).unwrap_or_default().entries.values() {
                if let Some(origin) = self.engine.origin(decision.rule) {
                    match policies.get_mut(&origin.policy) {
                        Some(entries) => *entries += 1,
                        None => drop(policies.insert(origin.policy.clone(), 1)),
                    }
                }
            }
            Some(Refusal {
                pod: endpoint.pod.pod.clone(),
                uid: endpoint.pod.uid.clone(),
                is_too_large: fault.is_lasting(),
                message: fault.to_string(),
                policies,
            })
        });
        closed.collect()
    }
}
