//! The engine: policies, identities and endpoints in; a policy map per endpoint out.

mod explain;
mod input;
mod output;

use std::collections::BTreeMap;
use std::sync::Arc;

use isthmus_wire::{Labels, NumericIdentity};

pub use explain::{Explanation, Question};
pub use input::{EndpointId, Enforcement, NamedPort, NamedPorts, Service, ServiceName, Settings, Subject};
pub use output::{Changes, CidrIdentity, Decision, EndpointChange, L4Prefix, PolicyKey, Resolved, RuleId};

use crate::model::{PolicyName, RuleOrigin};
use crate::parse::Parsed;

/// Turns what policies say into what endpoints may do, and keeps it up to date.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    policies: BTreeMap<PolicyName, Parsed>,
    identities: BTreeMap<NumericIdentity, Arc<Labels>>,
    named_ports: BTreeMap<NumericIdentity, NamedPorts>,
    namespaces: BTreeMap<Arc<str>, BTreeMap<String, String>>,
    services: BTreeMap<ServiceName, Service>,
    endpoints: BTreeMap<EndpointId, Subject>,
}

impl Engine {
    /// An engine that knows nothing but the reserved identities.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            policies: BTreeMap::new(),
            identities: BTreeMap::new(),
            named_ports: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            services: BTreeMap::new(),
            endpoints: BTreeMap::new(),
        }
    }

    /// How policies are understood.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A policy is new or has changed, or (none) is gone.
    pub fn set_policy(&mut self, name: PolicyName, policy: Option<Parsed>) {
        set(&mut self.policies, name, policy);
    }

    /// An identity of any cluster is new or has changed, or (none) is gone. Reserved ones are known from the start.
    pub fn set_identity(&mut self, id: NumericIdentity, labels: Option<Arc<Labels>>) {
        set(&mut self.identities, id, labels);
    }

    /// The named ports of all pods of an identity, for egress rules; empty for none.
    pub fn set_named_ports(&mut self, id: NumericIdentity, ports: NamedPorts) {
        set(&mut self.named_ports, id, (!ports.is_empty()).then_some(ports));
    }

    /// The labels of a namespace of the own cluster, or (none) that it is gone.
    pub fn set_namespace(&mut self, name: &str, labels: Option<BTreeMap<String, String>>) {
        set(&mut self.namespaces, name.into(), labels);
    }

    /// A service of the own cluster is new or has changed, or (none) is gone.
    pub fn set_service(&mut self, name: ServiceName, service: Option<Service>) {
        set(&mut self.services, name, service);
    }

    /// An endpoint of this node is new or has changed, or (none) is gone. A new one is answered with a
    /// [`EndpointChange::Replace`].
    pub fn set_endpoint(&mut self, id: EndpointId, subject: Option<Subject>) {
        set(&mut self.endpoints, id, subject);
    }

    /// What has changed since the last call. Cheap if nothing has.
    pub fn take_changes(&mut self) -> Changes {
        Changes::default()
    }

    /// What an endpoint may do, whole.
    pub fn resolved(&self, endpoint: EndpointId) -> Option<Resolved> {
        self.endpoints.get(&endpoint).map(|_| Resolved::default())
    }

    /// The rule behind a number that a map or an event has; none if its policy is gone, or if no rule is behind it.
    pub fn origin(&self, _rule: RuleId) -> Option<&RuleOrigin> {
        None
    }

    /// How many endpoints of this node a policy selects.
    pub fn selected_by(&self, _policy: &PolicyName) -> usize {
        0
    }

    /// Why a packet would pass or not, as of the last [`Engine::take_changes`]. None if there is no such endpoint.
    pub fn explain(&self, _question: &Question) -> Option<Explanation> {
        None
    }
}

fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
    match value {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    };
}
