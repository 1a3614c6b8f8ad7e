//! Policies, compiled: peers by number, ports as prefixes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_wire::Labels;

use super::l4::Prefixes;
use super::peers::PeerId;
use super::{RuleId, Service, ServiceName};
use crate::labels::{Requirement, Selector, Source};
use crate::model::{
    CidrSelector, Direction, Effect, Entity, Peer, Peers, PolicyName, Rule, RuleOrigin, ServiceRef,
};

/// A policy.
#[derive(Debug)]
pub(super) struct Policy {
    pub(super) source: Vec<Rule>,
    pub(super) rules: Vec<CompiledRule>,
    /// Mentions of descriptions, one for each time.
    pub(super) peers: Vec<PeerId>,
    /// Mentions of prefixes, one for each time.
    pub(super) nets: Vec<IpNet>,
    /// The services it is about.
    pub(super) services: Vec<ServiceRef>,
}

/// One `spec`.
#[derive(Debug)]
pub(super) struct CompiledRule {
    pub(super) subject: Selector,
    pub(super) ingress_default_deny: bool,
    pub(super) egress_default_deny: bool,
    pub(super) clauses: Vec<CompiledClause>,
}

impl CompiledRule {
    pub(super) fn denies_by_default(&self, direction: Direction) -> bool {
        match direction {
            Direction::Ingress => self.ingress_default_deny,
            Direction::Egress => self.egress_default_deny,
        }
    }
}

/// One element of one of the four lists.
#[derive(Debug)]
pub(super) struct CompiledClause {
    pub(super) direction: Direction,
    pub(super) effect: Effect,
    pub(super) rule: RuleId,
    /// None for everybody.
    pub(super) peers: Option<Vec<PeerId>>,
    pub(super) ports: Prefixes,
}

/// Peers as they are once services are replaced by what is behind them; none for everybody.
pub(super) fn expand(
    peers: &Peers,
    services: &BTreeMap<ServiceName, Service>,
    own_cluster: impl Fn(&Arc<Selector>) -> Arc<Selector>,
) -> Option<Vec<Peer>> {
    let Peers::OneOf(peers) = peers else { return None };
    let mut found = Vec::with_capacity(peers.len());
    for peer in peers {
        match peer {
            Peer::Entity(Entity::All) => return None,
            Peer::Labels(selector) => found.push(Peer::Labels(own_cluster(selector))),
            Peer::Service(reference) => {
                for (name, service) in services {
                    if reference.matches(&name.namespace, &name.name, &service.labels) {
                        behind(name, service, &own_cluster, &mut found);
                    }
                }
            }
            Peer::Cidr(_) | Peer::Entity(_) => found.push(peer.clone()),
        }
    }
    Some(found)
}

/// "This feature uses the discovered services' label selector as an endpoint selector within the policy. Services without
/// selectors are handled differently. The IPs in the service's EndpointSlices are converted to CIDR selectors. CIDR
/// selectors cannot select pods, and that limitation applies here as well."
/// (<https://docs.cilium.io/en/stable/security/policy/language/#services-based>)
fn behind(
    name: &ServiceName,
    service: &Service,
    own_cluster: impl Fn(&Arc<Selector>) -> Arc<Selector>,
    found: &mut Vec<Peer>,
) {
    if service.selector.is_empty() {
        let address = |ip| Peer::Cidr(CidrSelector { net: IpNet::from(ip), except: Vec::new() });
        found.extend(service.backends.iter().copied().map(address));
        return;
    }
    let equals = |(key, value): (&String, &String)| Requirement::equals(Source::k8s(), key, value);
    let mut requirements: Vec<Requirement> = service.selector.iter().map(equals).collect();
    requirements.push(Requirement::equals(Source::k8s(), Labels::NAMESPACE, &name.namespace));
    found.push(Peer::Labels(own_cluster(&Arc::new(Selector::new(requirements)))));
}

/// The prefixes a description needs identities for.
pub(super) fn nets(peer: &Peer) -> impl Iterator<Item = IpNet> + '_ {
    let cidr = match peer {
        Peer::Cidr(cidr) => Some(cidr),
        _ => None,
    };
    cidr.into_iter().flat_map(|cidr| std::iter::once(cidr.net).chain(cidr.except.iter().copied()))
}

/// Numbers of rules, which stand for them in maps and events.
#[derive(Debug)]
pub(super) struct RuleNumbers {
    by_origin: HashMap<RuleOrigin, RuleId>,
    by_number: HashMap<RuleId, RuleOrigin>,
    next: RuleId,
}

impl RuleNumbers {
    pub(super) fn new() -> Self {
        Self { by_origin: HashMap::new(), by_number: HashMap::new(), next: RuleId::FIRST }
    }

    /// The number of a rule, the same as long as its policy is there.
    pub(super) fn of(&mut self, origin: RuleOrigin) -> RuleId {
        if let Some(id) = self.by_origin.get(&origin) {
            return *id;
        }
        let id = self.next;
        self.next = RuleId(id.0 + 1);
        self.by_number.insert(id, origin.clone());
        self.by_origin.insert(origin, id);
        id
    }

    pub(super) fn origin(&self, id: RuleId) -> Option<&RuleOrigin> {
        self.by_number.get(&id)
    }

    /// Forgets the rules of a policy but those that are kept.
    pub(super) fn forget(&mut self, policy: &PolicyName, rules: &[RuleId], kept: &[RuleId]) {
        for id in rules.iter().filter(|id| !kept.contains(id)) {
            if self.by_number.get(id).is_some_and(|origin| origin.policy == *policy)
                && let Some(origin) = self.by_number.remove(id)
            {
                self.by_origin.remove(&origin);
            }
        }
    }
}
