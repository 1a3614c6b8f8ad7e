//! How policies are in force, for people.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use isthmus_policy::{EndpointId, PolicyName};

use super::{Enforcement, Phase, Policies};
use crate::datapath::Enforcement as Directions;

/// Policies on this node, in numbers, and what is not well.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicySummary {
    /// Whether all that decides has been read since the agent started. Until then endpoints of an earlier run stay as they
    /// were.
    pub decided: bool,
    /// Policies of the cluster.
    pub policies: usize,
    /// Of them, those of which a part is not enforced as written: it grants nothing, or denies all that it could.
    pub policies_with_problems: Vec<String>,
    /// Pods' interfaces that policy applies to.
    pub endpoints: usize,
    /// Of them, those whose incoming traffic is restricted.
    pub ingress_enforced: usize,
    /// Of them, those whose outgoing traffic is restricted.
    pub egress_enforced: usize,
    /// Entries in all policy maps.
    pub entries: usize,
    /// Pods whose policy could not be put in force, which are allowed nothing, and why.
    pub closed: BTreeMap<String, String>,
    /// Pods that are held back until their policy is known.
    pub waiting: Vec<String>,
}

/// The policy of one pod's interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointPolicy {
    /// `namespace/name`.
    pub pod: String,
    /// The host's side of its interface.
    pub interface: u32,
    /// Its addresses.
    pub addresses: Vec<std::net::IpAddr>,
    /// How far its policy is.
    pub state: EndpointState,
    /// Whether what comes to it is restricted.
    pub ingress_enforced: bool,
    /// Whether what it sends is.
    pub egress_enforced: bool,
    /// Entries of its policy map.
    pub entries: usize,
    /// Why it is closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// How far an endpoint's policy is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointState {
    /// As an earlier run of the agent left it.
    AsPinned,
    /// Held back until its policy is known.
    Waiting,
    /// What holds is in force.
    #[default]
    InForce,
    /// It could not be put in force: nothing is allowed in the directions that it is about.
    Closed,
}

/// What stands between an endpoint's policy, as the engine knows it, and the packets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Nothing.
    InForce,
    /// An earlier run's rules decide.
    AsPinned,
    /// Nothing passes until its policy is known.
    Waiting,
    /// It could not be put in force.
    Closed {
        /// The directions in which nothing passes.
        directions: Directions,
        /// Why.
        reason: String,
    },
}

impl Policies {
    /// What stands between an endpoint's policy and its packets.
    pub fn standing(&self, id: EndpointId) -> Standing {
        let Some(endpoint) = u32::try_from(id.0).ok().and_then(|interface| self.endpoints.get(&interface))
        else {
            return Standing::Waiting;
        };
        match (&endpoint.fault, endpoint.phase) {
            (Some(fault), _) => Standing::Closed { directions: endpoint.closed, reason: fault.to_string() },
            (None, Phase::AsPinned) => Standing::AsPinned,
            // Nobody is held back then.
            (None, Phase::Waiting(_)) if self.settings.enforcement == Enforcement::Never => Standing::InForce,
            (None, Phase::Waiting(_)) => Standing::Waiting,
            (None, Phase::InForce) => Standing::InForce,
        }
    }

    /// Whether a part of a policy is not enforced as written.
    pub fn has_problems(&self, policy: &PolicyName) -> bool {
        self.known.get(policy).is_some_and(|problems| *problems > 0)
    }

    /// All endpoints. Grows with the pods of the node and their rules.
    pub fn endpoint_policies(&self) -> Vec<EndpointPolicy> {
        let one = |(interface, endpoint): (&u32, &super::Endpoint)| {
            let resolved = self.engine.resolved(super::id(*interface)).unwrap_or_default();
            EndpointPolicy {
                pod: endpoint.pod.pod.to_string(),
                interface: *interface,
                addresses: endpoint.pod.addresses.clone(),
                state: match endpoint.phase {
                    _ if endpoint.fault.is_some() => EndpointState::Closed,
                    Phase::AsPinned => EndpointState::AsPinned,
                    Phase::Waiting(_) => EndpointState::Waiting,
                    Phase::InForce => EndpointState::InForce,
                },
                ingress_enforced: resolved.ingress_enforced,
                egress_enforced: resolved.egress_enforced,
                entries: resolved.entries.len(),
                problem: endpoint.fault.as_ref().map(ToString::to_string),
            }
        };
        self.endpoints.iter().map(one).collect()
    }

    /// All of it in numbers.
    pub fn summary(&self) -> PolicySummary {
        let endpoints = self.endpoint_policies();
        let pods = |state| endpoints.iter().filter(move |endpoint| endpoint.state == state);
        PolicySummary {
            decided: self.is_decided(),
            policies: self.known.len(),
            policies_with_problems: self
                .known
                .iter()
                .filter(|(_, problems)| **problems > 0)
                .map(|(name, _)| name.to_string())
                .collect(),
            endpoints: endpoints.len(),
            ingress_enforced: endpoints.iter().filter(|endpoint| endpoint.ingress_enforced).count(),
            egress_enforced: endpoints.iter().filter(|endpoint| endpoint.egress_enforced).count(),
            entries: endpoints.iter().map(|endpoint| endpoint.entries).sum(),
            closed: pods(EndpointState::Closed)
                .map(|endpoint| (endpoint.pod.clone(), endpoint.problem.clone().unwrap_or_default()))
                .collect(),
            waiting: pods(EndpointState::Waiting).map(|endpoint| endpoint.pod.clone()).collect(),
        }
    }
}
