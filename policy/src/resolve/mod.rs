//! The engine: policies, identities and endpoints in; a policy map per endpoint out.
//!
//! What costs what:
//! - Descriptions of peers are kept once ([`peers`]), however many policies have them, each with the identities it fits; each
//!   stands under one label that it requires. A new identity is compared with those alone that stand under one of its labels,
//!   and touches only the endpoints whose rules mention a description that fits it.
//! - Endpoints that are alike share everything ([`class`]); identities that the same descriptions fit share what is said of
//!   them ([`layer`]).
//! - A changed policy is worked out anew for the endpoints that it selects or selected, and for no others.

mod cidrs;
mod class;
mod explain;
mod identities;
mod input;
mod l4;
mod layer;
mod output;
mod peers;
mod policies;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_wire::pod_labels::identity_labels;
use isthmus_wire::{Labels, NumericIdentity};

pub use explain::{Explanation, Question};
pub use input::{EndpointId, Enforcement, NamedPort, NamedPorts, Service, ServiceName, Settings, Subject};
pub use output::{Changes, CidrIdentity, Decision, EndpointChange, L4Prefix, PolicyKey, Resolved, RuleId};

use self::cidrs::Cidrs;
use self::class::{Class, ClassId, Ingredients, Likeness, Table};
use self::identities::{Identities, Identity};
use self::l4::Prefixes;
use self::peers::{PeerId, PeerTable, of_own_cluster};
use self::policies::{CompiledClause, CompiledRule, Policy, RuleNumbers};
use crate::model::{Peer, Peers, PolicyName, Rule, RuleOrigin};
use crate::parse::Parsed;

/// Turns what policies say into what endpoints may do, and keeps it up to date.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    policies: BTreeMap<PolicyName, Policy>,
    rules: RuleNumbers,
    identities: Identities,
    named_ports: HashMap<NumericIdentity, NamedPorts>,
    /// The known identities that have some.
    with_names: BTreeSet<NumericIdentity>,
    peers: PeerTable,
    cidrs: Cidrs,
    services: BTreeMap<ServiceName, Service>,
    namespaces: HashMap<Arc<str>, BTreeMap<String, String>>,
    endpoints: BTreeMap<EndpointId, (Subject, ClassId)>,
    classes: BTreeMap<ClassId, Class>,
    class_of: HashMap<Arc<Likeness>, ClassId>,
    next_class: u32,
    /// Classes of which something is to be worked out anew.
    stale: BTreeSet<ClassId>,
    gone: BTreeSet<EndpointId>,
}

/// The fixed identities and their labels. Kubernetes' API on another node is a node all the same.
const RESERVED: [(NumericIdentity, &[&str]); 8] = [
    (NumericIdentity::HOST, &["host"]),
    (NumericIdentity::WORLD, &["world"]),
    (NumericIdentity::UNMANAGED, &["unmanaged"]),
    (NumericIdentity::HEALTH, &["health"]),
    (NumericIdentity::INIT, &["init"]),
    (NumericIdentity::REMOTE_NODE, &["remote-node"]),
    (NumericIdentity::KUBE_APISERVER, &["kube-apiserver", "remote-node"]),
    (NumericIdentity::INGRESS, &["ingress"]),
];
/// The last of them: world over IPv6.
const LAST_FIXED: u32 = 10;

impl Engine {
    /// An engine that knows nothing but the fixed identities.
    pub fn new(settings: Settings) -> Self {
        let mut engine = Self {
            settings,
            policies: BTreeMap::new(),
            rules: RuleNumbers::new(),
            identities: Identities::default(),
            named_ports: HashMap::new(),
            with_names: BTreeSet::new(),
            peers: PeerTable::default(),
            cidrs: Cidrs::new(),
            services: BTreeMap::new(),
            namespaces: HashMap::new(),
            endpoints: BTreeMap::new(),
            classes: BTreeMap::new(),
            class_of: HashMap::new(),
            next_class: 0,
            stale: BTreeSet::new(),
            gone: BTreeSet::new(),
        };
        for (id, names) in RESERVED {
            let mut labels = Labels::new();
            for name in names {
                // None of them holds a character that the text form could not carry.
                drop(labels.insert("reserved", name, ""));
            }
            engine.put_identity(id, Identity::new(Arc::new(labels), None));
        }
        for (ipv4, id) in [(true, cidrs::WORLD_IPV4), (false, cidrs::WORLD_IPV6)] {
            if let Some(identity) = engine.cidrs.identity(cidrs::everything(ipv4)) {
                engine.put_identity(id, identity);
            }
        }
        engine
    }

    /// How policies are understood.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A policy is new or has changed, or (none) is gone.
    pub fn set_policy(&mut self, name: PolicyName, policy: Option<Parsed>) {
        let rules = policy.map(|policy| policy.rules);
        match (self.policies.get(&name), rules) {
            (Some(old), Some(rules)) if old.source == rules => {}
            (_, Some(rules)) => {
                let new = self.compile(&name, rules);
                let old = self.policies.insert(name.clone(), new);
                self.settle_policy(&name, old);
            }
            (Some(_), None) => {
                let old = self.policies.remove(&name);
                self.settle_policy(&name, old);
            }
            (None, None) => {}
        }
    }

    /// An identity of any cluster is new or has changed, or (none) is gone. The fixed ones, 1 to 10, are known from the start,
    /// and what is said of them, or of numbers beyond the mesh's 24 bits, has no effect.
    pub fn set_identity(&mut self, id: NumericIdentity, labels: Option<Arc<Labels>>) {
        if id.0 <= LAST_FIXED || id.0 >= 1 << 24 {
            return;
        }
        match labels {
            Some(labels) if self.identities.get(id).is_some_and(|known| known.labels == labels) => {}
            Some(labels) => self.put_identity(id, Identity::new(labels, None)),
            None => self.drop_identity(id),
        }
    }

    /// The named ports of all pods of an identity, for egress rules; empty for none. They may be told before the identity is.
    pub fn set_named_ports(&mut self, id: NumericIdentity, ports: NamedPorts) {
        let old = match ports.is_empty() {
            true => self.named_ports.remove(&id),
            false => self.named_ports.insert(id, ports.clone()),
        };
        if old.unwrap_or_default() != ports {
            self.settle_named_ports(id, ports);
        }
    }

    /// The labels of a namespace of the own cluster, or (none) that it is gone.
    pub fn set_namespace(&mut self, name: &str, labels: Option<BTreeMap<String, String>>) {
        if self.namespaces.get(name) == labels.as_ref() {
            return;
        }
        match labels {
            Some(labels) => self.namespaces.insert(name.into(), labels),
            None => self.namespaces.remove(name),
        };
        let concerned: Vec<EndpointId> = self
            .endpoints
            .iter()
            .filter(|(_, (subject, _))| *subject.namespace == *name)
            .map(|(id, _)| *id)
            .collect();
        for id in concerned {
            if let Some((subject, class)) = self.endpoints.remove(&id) {
                self.place(id, subject, Some(class));
            }
        }
    }

    /// A service of the own cluster is new or has changed, or (none) is gone.
    pub fn set_service(&mut self, name: ServiceName, service: Option<Service>) {
        let old = self.services.get(&name);
        if old == service.as_ref() {
            return;
        }
        let sides: Vec<&Service> = old.into_iter().chain(&service).collect();
        let concerned: Vec<PolicyName> = self
            .policies
            .iter()
            .filter(|(_, policy)| {
                policy.services.iter().any(|reference| {
                    sides.iter().any(|side| reference.matches(&name.namespace, &name.name, &side.labels))
                })
            })
            .map(|(name, _)| name.clone())
            .collect();
        if *name.namespace == *"default" && *name.name == *"kubernetes" {
            self.settle_kube_apiserver(&name, service.as_ref());
        }
        match service {
            Some(service) => self.services.insert(name, service),
            None => self.services.remove(&name),
        };
        for name in concerned {
            if let Some(policy) = self.policies.get(&name) {
                let rules = policy.source.clone();
                let new = self.compile(&name, rules);
                let old = self.policies.insert(name.clone(), new);
                self.settle_policy(&name, old);
            }
        }
    }

    /// An endpoint of this node is new or has changed, or (none) is gone. A new one is answered with a
    /// [`EndpointChange::Replace`].
    pub fn set_endpoint(&mut self, id: EndpointId, subject: Option<Subject>) {
        let old = self.endpoints.remove(&id);
        match (old, subject) {
            (Some((old, class)), Some(new)) if old == new => {
                self.endpoints.insert(id, (old, class));
            }
            (old, Some(new)) => {
                self.gone.remove(&id);
                self.place(id, new, old.map(|(_, class)| class));
            }
            (Some((_, class)), None) => {
                self.leave(id, class);
                self.gone.insert(id);
            }
            (None, None) => {}
        }
    }

    /// What has changed since the last call. Cheap if nothing has.
    pub fn take_changes(&mut self) -> Changes {
        let mut endpoints: BTreeMap<EndpointId, EndpointChange> =
            std::mem::take(&mut self.gone).into_iter().map(|id| (id, EndpointChange::Remove)).collect();
        for id in std::mem::take(&mut self.stale) {
            self.refresh(id, &mut endpoints);
        }
        Changes { endpoints: endpoints.into_iter().collect(), cidrs: self.cidrs.take_changes() }
    }

    /// What an endpoint may do, whole, as of the last [`Engine::take_changes`].
    pub fn resolved(&self, endpoint: EndpointId) -> Option<Resolved> {
        Some(self.class(endpoint)?.table.resolved())
    }

    /// The rule behind a number that a map or an event has; none if its policy is gone, or if no rule is behind it.
    pub fn origin(&self, rule: RuleId) -> Option<&RuleOrigin> {
        self.rules.origin(rule)
    }

    /// The labels of an identity: of any cluster, reserved, or this node's own for a prefix.
    pub fn labels(&self, id: NumericIdentity) -> Option<&Arc<Labels>> {
        self.identities.get(id).map(|identity| &identity.labels)
    }

    /// All identities with their labels, in no order. Grows with the mesh.
    pub fn identities(&self) -> impl Iterator<Item = (NumericIdentity, &Arc<Labels>)> {
        self.identities.iter().map(|(id, identity)| (id, &identity.labels))
    }

    /// How many endpoints of this node a policy selects.
    pub fn selected_by(&self, policy: &PolicyName) -> usize {
        let selects = |class: &&Class| class.rules.iter().any(|(name, _)| name == policy);
        self.classes.values().filter(selects).map(|class| class.endpoints.len()).sum()
    }

    /// How much there is: identities, and descriptions of peers.
    pub fn sizes(&self) -> (usize, usize) {
        (self.identities.len(), self.peers.len())
    }

    fn class(&self, endpoint: EndpointId) -> Option<&Class> {
        self.classes.get(&self.endpoints.get(&endpoint)?.1)
    }
}

/// Policies.
impl Engine {
    fn compile(&mut self, name: &PolicyName, source: Vec<Rule>) -> Policy {
        let mut policy = Policy {
            rules: Vec::new(),
            peers: Vec::new(),
            nets: Vec::new(),
            services: Vec::new(),
            source: Vec::new(),
        };
        for (index, rule) in source.iter().enumerate() {
            let clauses = rule.clauses.iter().map(|clause| {
                if let Peers::OneOf(peers) = &clause.peers {
                    policy.services.extend(peers.iter().filter_map(|peer| match peer {
                        Peer::Service(reference) => Some(reference.clone()),
                        _ => None,
                    }));
                }
                let cluster = &self.settings.cluster;
                let local = self.settings.policy_default_local_cluster;
                let expanded = policies::expand(&clause.peers, &self.services, |selector| {
                    if local { of_own_cluster(selector, cluster) } else { Arc::clone(selector) }
                });
                let peers = expanded.map(|peers| {
                    let mut ids: Vec<PeerId> = peers
                        .into_iter()
                        .map(|peer| {
                            for net in policies::nets(&peer) {
                                policy.nets.push(net);
                                if let Some(id) = self.cidrs.acquire(net) {
                                    self.put_prefix(id, net);
                                }
                            }
                            let (id, _) =
                                self.peers.acquire(peer, &self.settings.cluster, &mut self.identities);
                            policy.peers.push(id);
                            id
                        })
                        .collect();
                    ids.sort_unstable();
                    ids.dedup();
                    ids
                });
                let origin = RuleOrigin {
                    policy: name.clone(),
                    // Bounded by MAX_SPECS.
                    rule: u16::try_from(index).unwrap_or(u16::MAX),
                    direction: clause.direction,
                    effect: clause.effect,
                    index: clause.index,
                };
                CompiledClause {
                    direction: clause.direction,
                    effect: clause.effect,
                    rule: self.rules.of(origin),
                    peers,
                    ports: Prefixes::of(&clause.ports),
                }
            });
            let clauses = clauses.collect();
            policy.rules.push(CompiledRule {
                subject: rule.subject.clone(),
                ingress_default_deny: rule.ingress_default_deny,
                egress_default_deny: rule.egress_default_deny,
                clauses,
            });
        }
        policy.source = source;
        policy
    }

    /// After a policy was exchanged for what is known now: lets go of what the old one held, and finds out whom both are about.
    fn settle_policy(&mut self, name: &PolicyName, old: Option<Policy>) {
        let new = self.policies.get(name);
        for (id, class) in &mut self.classes {
            let of_policy = (name.clone(), 0)..=(name.clone(), usize::MAX);
            let before: Vec<_> = class.rules.range(of_policy).cloned().collect();
            for rule in &before {
                class.rules.remove(rule);
            }
            let rules = new.map(|policy| &policy.rules[..]).unwrap_or_default();
            let selecting =
                rules.iter().enumerate().filter(|(_, rule)| rule.subject.matches(&class.likeness.labels));
            let mut selected = !before.is_empty();
            for (index, _) in selecting {
                class.rules.insert((name.clone(), index));
                selected = true;
            }
            if selected {
                class.stale = true;
                self.stale.insert(*id);
            }
        }
        let Some(old) = old else { return };
        let numbers = |policy: &Policy| -> Vec<RuleId> {
            policy.rules.iter().flat_map(|rule| rule.clauses.iter().map(|clause| clause.rule)).collect()
        };
        let kept = new.map(numbers).unwrap_or_default();
        self.rules.forget(name, &numbers(&old), &kept);
        for peer in &old.peers {
            self.peers.release(*peer, &mut self.identities);
        }
        for net in old.nets {
            self.release_prefix(net);
        }
    }

    /// The addresses of the Kubernetes API are those behind its own service.
    fn settle_kube_apiserver(&mut self, name: &ServiceName, service: Option<&Service>) {
        let nets = |service: Option<&Service>| -> BTreeSet<IpNet> {
            service
                .into_iter()
                .flat_map(|service| service.backends.iter().copied().map(IpNet::from))
                .collect()
        };
        let (before, now) = (nets(self.services.get(name)), nets(service));
        for net in now.difference(&before) {
            let new = self.cidrs.acquire(*net);
            let known = self.cidrs.set_kube_apiserver(*net, true);
            if let Some(id) = new.or(known) {
                self.put_prefix(id, *net);
            }
        }
        for net in before.difference(&now) {
            if let Some(id) = self.cidrs.set_kube_apiserver(*net, false) {
                self.put_prefix(id, *net);
            }
            self.release_prefix(*net);
        }
    }
}

/// Identities.
impl Engine {
    fn put_prefix(&mut self, id: NumericIdentity, net: IpNet) {
        if let Some(identity) = self.cidrs.identity(net) {
            self.put_identity(id, identity);
        }
    }

    fn release_prefix(&mut self, net: IpNet) {
        if let Some(id) = self.cidrs.release(net) {
            self.drop_identity(id);
        }
    }

    fn put_identity(&mut self, id: NumericIdentity, identity: Identity) {
        let fitting = self.peers.fitting(id, &identity, &self.settings.cluster);
        self.identities.insert(id, identity);
        self.refit(id, fitting);
        if let Some(ports) = self.named_ports.get(&id).cloned() {
            self.settle_named_ports(id, ports);
        }
    }

    fn drop_identity(&mut self, id: NumericIdentity) {
        if self.identities.get(id).is_none() {
            return;
        }
        self.settle_named_ports(id, NamedPorts::new());
        self.refit(id, Vec::new());
        self.identities.remove(id);
    }

    fn settle_named_ports(&mut self, id: NumericIdentity, ports: NamedPorts) {
        let Some(identity) = self.identities.get_mut(id).filter(|identity| identity.named_ports != ports)
        else {
            return;
        };
        if ports.is_empty() {
            self.with_names.remove(&id)
        } else {
            self.with_names.insert(id)
        };
        identity.named_ports = ports;
        self.touch_peers_of(id);
    }

    /// Other descriptions fit an identity now: tells them, and the endpoints that are concerned.
    fn refit(&mut self, id: NumericIdentity, fitting: Vec<PeerId>) {
        let Some(identity) = self.identities.get_mut(id) else { return };
        let before = std::mem::replace(&mut identity.peers, fitting.clone());
        for peer in before.iter().filter(|peer| fitting.binary_search(peer).is_err()) {
            self.peers.set_member(*peer, id, false);
            self.touch(*peer, id);
        }
        for peer in fitting.iter().filter(|peer| before.binary_search(peer).is_err()) {
            self.peers.set_member(*peer, id, true);
            self.touch(*peer, id);
        }
    }

    /// What is said of an identity in the rules that mention a description is to be worked out anew.
    fn touch(&mut self, peer: PeerId, id: NumericIdentity) {
        for class in self.peers.classes(peer) {
            if let Some(state) = self.classes.get_mut(&class) {
                state.stale_ids.insert(id);
                self.stale.insert(class);
            }
        }
    }

    /// The same for all descriptions that fit it, and for rules about ports of a name.
    fn touch_peers_of(&mut self, id: NumericIdentity) {
        let fitting = self.identities.get(id).map(|identity| identity.peers.clone()).unwrap_or_default();
        for peer in fitting {
            self.touch(peer, id);
        }
        for (class, state) in &mut self.classes {
            if state.table.depends_on_names() {
                state.stale_ids.insert(id);
                self.stale.insert(*class);
            }
        }
    }
}

/// Endpoints.
impl Engine {
    /// Puts an endpoint among those that are like it.
    fn place(&mut self, id: EndpointId, subject: Subject, from: Option<ClassId>) {
        let nothing = BTreeMap::new();
        let namespace_labels = self.namespaces.get(&*subject.namespace).unwrap_or(&nothing);
        let likeness = Likeness {
            labels: identity_labels(
                &self.settings.cluster,
                &subject.namespace,
                namespace_labels,
                &subject.labels,
                &subject.service_account,
            ),
            named_ports: subject.named_ports.clone(),
        };
        let class = match self.class_of.get(&likeness) {
            Some(class) => *class,
            None => self.add_class(likeness),
        };
        self.endpoints.insert(id, (subject, class));
        if from == Some(class) {
            return;
        }
        if let Some(from) = from {
            self.leave(id, from);
        }
        if let Some(state) = self.classes.get_mut(&class) {
            state.endpoints.insert(id);
            state.fresh.insert(id);
            self.stale.insert(class);
        }
    }

    fn add_class(&mut self, likeness: Likeness) -> ClassId {
        let id = ClassId(self.next_class);
        self.next_class += 1;
        let likeness = Arc::new(likeness);
        let mut class = Class::new(Arc::clone(&likeness));
        for (name, policy) in &self.policies {
            for (index, rule) in policy.rules.iter().enumerate() {
                if rule.subject.matches(&likeness.labels) {
                    class.rules.insert((name.clone(), index));
                }
            }
        }
        self.classes.insert(id, class);
        self.class_of.insert(likeness, id);
        id
    }

    fn leave(&mut self, id: EndpointId, class: ClassId) {
        let Some(state) = self.classes.get_mut(&class) else { return };
        state.endpoints.remove(&id);
        state.fresh.remove(&id);
        if !state.endpoints.is_empty() {
            return;
        }
        if let Some(state) = self.classes.remove(&class) {
            self.class_of.remove(&state.likeness);
            self.stale.remove(&class);
            for peer in state.table.peers() {
                self.peers.remove_class(peer, class);
            }
        }
    }

    /// Works out anew what has changed for a class, and tells its endpoints.
    fn refresh(&mut self, id: ClassId, endpoints: &mut BTreeMap<EndpointId, EndpointChange>) {
        let Some(class) = self.classes.get_mut(&id) else { return };
        let with = Ingredients {
            enforcement: self.settings.enforcement,
            likeness: &class.likeness,
            identities: &self.identities,
            peers: &self.peers,
            with_names: &self.with_names,
        };
        let fresh = std::mem::take(&mut class.fresh);
        let stale_ids = std::mem::take(&mut class.stale_ids);
        let mut replace: BTreeSet<EndpointId> = fresh;
        if std::mem::take(&mut class.stale) {
            let rules =
                class.rules.iter().filter_map(|(name, index)| self.policies.get(name)?.rules.get(*index));
            let table = Table::build(rules, &with);
            if !table.equals(&class.table) {
                replace.extend(&class.endpoints);
            }
            let old = std::mem::replace(&mut class.table, table);
            let (before, now) = (old.peers(), class.table.peers());
            for peer in before.difference(&now) {
                self.peers.remove_class(*peer, id);
            }
            for peer in now.difference(&before) {
                self.peers.add_class(*peer, id);
            }
        } else {
            let (mut put, mut delete) = (Vec::new(), Vec::new());
            for identity in stale_ids {
                class.table.update(identity, &with, &mut put, &mut delete);
            }
            if !put.is_empty() || !delete.is_empty() {
                for endpoint in class.endpoints.difference(&replace) {
                    let change = EndpointChange::Update { put: put.clone(), delete: delete.clone() };
                    endpoints.insert(*endpoint, change);
                }
            }
        }
        if !replace.is_empty() {
            let resolved = Arc::new(class.table.resolved());
            endpoints.extend(
                replace
                    .into_iter()
                    .map(|endpoint| (endpoint, EndpointChange::Replace(Arc::clone(&resolved)))),
            );
        }
    }
}
