//! The translation: facts about Kubernetes objects in, keys and values out.
//!
//! Pure: no I/O and no clock. What is exported is a function of the objects alone, whatever the order, repetition or loss
//! of events on the way. The one exception is deliberate: while a pod's new identity is being stored, its address keeps
//! the old one.
//!
//! Each change costs what it touches: facts are indexed by everything that refers to them, a change marks what depends on
//! it, and [`Translator::drain`] renders each marked key once, however many changes led to it.

mod endpoints;
mod identities;
mod nodes;
mod policies;
mod services;
mod table;
#[cfg(test)]
mod tests;
mod values;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::Bytes;
use isthmus_wire::local::PolicyKind;
use isthmus_wire::{ClusterId, ClusterName, Labels, MaxConnectedClusters, Prefix, Resource};

use self::endpoints::{Endpoints, Namespaces, Verdict};
use self::identities::{Identities, LabelSet};
use self::nodes::Nodes;
use self::policies::Policies;
use self::services::{Audience, Services};
use self::table::Table;
use super::facts::{
    EndpointFact, IdentityFact, Name, NamespaceFact, NodeFact, PolicyFact, ServiceFact, ServiceKind,
    SliceFact,
};
use super::problem::{Finding, Reason};

pub(crate) use identities::IdentityAction;
pub(crate) use table::Event;

/// Largest value that etcd takes by default, and so the largest that can be mirrored everywhere. Bytes.
const LARGEST_VALUE: usize = 1536 * 1024;

/// What the translation has to know beside the objects.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub cluster: ClusterName,
    pub cluster_id: ClusterId,
    pub max_connected_clusters: MaxConnectedClusters,
    /// Whether a namespace takes part in the mesh when it does not say.
    pub namespaces_are_global: bool,
    /// Whether identities that are missing are asked for.
    pub allocates: bool,
}

impl Settings {
    fn identities(&self) -> RangeInclusive<u32> {
        let range = self.max_connected_clusters.identities(self.cluster_id);
        range.start().0..=range.end().0
    }
}

/// An event of one kind of object.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    Namespace(Event<NamespaceFact>),
    Service(Event<ServiceFact>),
    Slice(Event<SliceFact>),
    Node(Event<NodeFact>),
    Endpoint(Event<EndpointFact>),
    Identity(Event<IdentityFact>),
    Policy(PolicyKind, Event<PolicyFact>),
    /// Kubernetes does not store the identity that was asked for.
    IdentityRefused {
        id: u32,
        why: String,
    },
}

/// A part of the key space with a canary of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Section {
    Nodes,
    Identities,
    Addresses,
    Services,
    LocalServices,
    LocalPolicies,
    LocalNamespaces,
}

impl Section {
    pub(crate) const ALL: [Self; 7] = [
        Self::Nodes,
        Self::Identities,
        Self::Addresses,
        Self::Services,
        Self::LocalServices,
        Self::LocalPolicies,
        Self::LocalNamespaces,
    ];

    /// In words that fit a metric's label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Identities => "identities",
            Self::Addresses => "ip",
            Self::Services => "services",
            Self::LocalServices => "local-services",
            Self::LocalPolicies => "local-policies",
            Self::LocalNamespaces => "local-namespaces",
        }
    }

    /// The prefix of its keys, and what its canary is named after.
    pub(crate) fn prefix(self) -> Prefix {
        match self {
            Self::Nodes => Prefix::State(Resource::Nodes),
            Self::Identities => Prefix::State(Resource::Identities),
            Self::Addresses => Prefix::State(Resource::Ip),
            Self::Services => Prefix::State(Resource::Services),
            Self::LocalServices => Prefix::LocalServices,
            Self::LocalPolicies => Prefix::LocalPolicies,
            Self::LocalNamespaces => Prefix::LocalNamespaces,
        }
    }
}

/// A key to set (`Some`) or to delete (`None`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Write {
    pub section: Section,
    pub key: Bytes,
    pub value: Option<Bytes>,
}

/// What has become necessary since the last time.
#[derive(Debug, Default)]
pub(crate) struct Output {
    /// At most one per key.
    pub writes: Vec<Write>,
    pub identities: Vec<IdentityAction>,
    /// Policies as they are now (`None`: gone), for their status.
    pub policies: Vec<(PolicyKind, Name, Option<PolicyFact>)>,
    /// Of them, those that select no pod at present.
    pub idle_policies: BTreeSet<(PolicyKind, Name)>,
    /// What could not be exported, by kind and name of the object.
    pub findings: Vec<(&'static str, Name, Finding)>,
    /// Sections of which everything there was at the start has now been written.
    pub completed: Vec<Section>,
}

/// How much is exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub nodes: usize,
    pub identities: usize,
    pub addresses: usize,
    pub services: usize,
    pub local_services: usize,
    pub pods_without_identity: usize,
    pub policies: usize,
    pub namespaces: usize,
}

#[derive(Debug)]
pub(crate) struct Translator {
    settings: Settings,
    namespaces: KnownNamespaces,
    services: Services,
    nodes: Nodes,
    endpoints: Endpoints,
    identities: Identities,
    policies: Policies,
    exported_identities: HashSet<Name>,
    startup: Startup,
}

/// How far the way to the first complete export is.
#[derive(Debug, Default)]
struct Startup {
    completed: BTreeSet<Section>,
    /// Once all objects are known: the label sets whose identity was still being stored then.
    awaited: Option<HashSet<LabelSet>>,
    /// All pods have been known once.
    knew_all_pods: bool,
}

#[derive(Debug)]
struct KnownNamespaces {
    table: Table<NamespaceFact>,
    /// Those whose key may say something else now.
    dirty: BTreeSet<Name>,
    exported: HashSet<Name>,
    global_by_default: bool,
}

impl Namespaces for KnownNamespaces {
    fn global(&self, namespace: &str) -> Option<&NamespaceFact> {
        self.table.get(&Name::new("", namespace)).filter(|fact| fact.global.unwrap_or(self.global_by_default))
    }
}

impl Translator {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            namespaces: KnownNamespaces {
                table: Table::default(),
                dirty: BTreeSet::new(),
                exported: HashSet::new(),
                global_by_default: settings.namespaces_are_global,
            },
            services: Services::default(),
            nodes: Nodes::default(),
            endpoints: Endpoints::new(settings.cluster.clone()),
            identities: Identities::new(settings.identities(), settings.allocates),
            policies: Policies::default(),
            exported_identities: HashSet::new(),
            startup: Startup::default(),
            settings,
        }
    }

    /// Takes an event in. What follows from it comes out of [`Translator::drain`].
    pub(crate) fn apply(&mut self, input: Input) {
        match input {
            Input::Namespace(event) => self.apply_namespace(event),
            Input::Service(event) => self.services.apply_service(event),
            Input::Slice(event) => self.services.apply_slice(event),
            Input::Node(event) => {
                for name in self.nodes.apply(event) {
                    self.endpoints.node_changed(&name.name);
                }
            }
            Input::Endpoint(event) => self.endpoints.apply(event, &self.namespaces, &mut self.identities),
            Input::Identity(event) => self.identities.apply(event),
            Input::Policy(kind, event) => self.policies.apply(kind, event),
            Input::IdentityRefused { id, why } => self.identities.refused(id, &why),
        }
    }

    /// Asks for the deletion of identities that nothing has needed for `delay`. `now` is on any steady clock.
    pub(crate) fn collect_garbage(&mut self, now: Duration, delay: Duration) {
        if self.knows_all_pods() && self.settings.allocates {
            self.identities.collect_garbage(now, delay);
        }
    }

    /// Everything that has become necessary since the last call.
    pub(crate) fn drain(&mut self) -> Output {
        let mut output = Output::default();
        for labels in self.identities.take_changed() {
            self.endpoints.identity_changed(&labels);
        }
        self.drain_nodes(&mut output);
        // Identities before the addresses that refer to them.
        self.drain_identities(&mut output);
        self.drain_addresses(&mut output);
        self.drain_services(&mut output);
        self.drain_namespaces(&mut output);
        self.drain_policies(&mut output);
        for unassigned in self.identities.take_unassigned() {
            if let Some(pod) = self.endpoints.example_of(&unassigned.labels) {
                output.findings.push(("Pod", pod.clone(), unassigned.finding));
            }
        }
        output.identities = self.identities.take_actions();
        self.complete_sections(&mut output);
        output
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            nodes: self.nodes.exported(),
            identities: self.exported_identities.len(),
            addresses: self.endpoints.exported(),
            services: self.services.exported(Audience::Mesh),
            local_services: self.services.exported(Audience::Local),
            pods_without_identity: self.identities.pods_without(),
            policies: self.policies.exported(),
            namespaces: self.namespaces.exported.len(),
        }
    }

    fn apply_namespace(&mut self, event: Event<NamespaceFact>) {
        for change in self.namespaces.table.apply(event) {
            self.namespaces.dirty.insert(change.name.clone());
            let namespace = change.name.name;
            self.endpoints.namespace_changed(&namespace, &self.namespaces, &mut self.identities);
            let global = |fact: &NamespaceFact| fact.global.unwrap_or(self.settings.namespaces_are_global);
            let was = change.old.as_ref().map(global);
            let is = self.namespaces.table.get(&Name::new("", &namespace)).map(global);
            if was != is {
                self.services.namespace_changed(&namespace);
            }
            let default = self.settings.namespaces_are_global;
            if was.unwrap_or(default) != is.unwrap_or(default) {
                self.identities.namespace_changed(&namespace);
            }
        }
    }

    fn drain_nodes(&mut self, output: &mut Output) {
        for name in self.nodes.take_dirty() {
            let value = self.nodes.get(&name).and_then(|node| values::node(&self.settings, node));
            let was = self.nodes.note(&name, value.is_some());
            output.write(
                Section::Nodes,
                "Node",
                &name,
                was,
                || values::node_key(&self.settings, &name),
                value,
            );
        }
    }

    fn drain_identities(&mut self, output: &mut Output) {
        for name in self.identities.take_dirty() {
            let fact = self.identities.get(&name);
            if let Some(id) = fact.and_then(|fact| fact.id)
                && !self.identities.in_range(id)
            {
                output.findings.push(("CiliumIdentity", name.clone(), out_of_range(id, &self.settings)));
            }
            let value = fact.and_then(|fact| self.exportable(fact)).map(Labels::encode);
            let was = if value.is_some() {
                !self.exported_identities.insert(name.clone())
            } else {
                self.exported_identities.remove(&name)
            };
            output.write(
                Section::Identities,
                "CiliumIdentity",
                &name,
                was,
                || values::identity_key(&name),
                value,
            );
        }
    }

    /// The labels of an identity that other clusters are to know.
    fn exportable<'a>(&self, fact: &'a IdentityFact) -> Option<&'a Labels> {
        let labels = fact.labels.as_deref()?;
        let in_range = fact.id.is_some_and(|id| self.identities.in_range(id));
        let of_this_cluster =
            labels.k8s(Labels::CLUSTER).is_none_or(|name| name == self.settings.cluster.as_str());
        // An identity outlives the namespace; one that is not known is as good as one that does not say.
        let global = labels.k8s(Labels::NAMESPACE).is_none_or(|namespace| {
            let said = self.namespaces.table.get(&Name::new("", namespace)).and_then(|fact| fact.global);
            said.unwrap_or(self.settings.namespaces_are_global)
        });
        (in_range && of_this_cluster && global).then_some(labels)
    }

    fn drain_addresses(&mut self, output: &mut Output) {
        for address in self.endpoints.take_dirty() {
            let verdict = self.endpoints.verdict(address, &self.namespaces, &self.identities, &self.nodes);
            let exported = match verdict {
                Verdict::Keep => continue,
                Verdict::Retract => None,
                Verdict::Export { pod, identity, host, encryption_key } => {
                    Some((pod.name.clone(), values::address(address, pod, identity, host, encryption_key)))
                }
            };
            let (pod, value) = exported.unzip();
            let name = pod.clone().unwrap_or_else(|| Name::new("", ""));
            let was = self.endpoints.note(address, pod);
            output.write(Section::Addresses, "Pod", &name, was, || Some(values::address_key(address)), value);
        }
    }

    fn drain_services(&mut self, output: &mut Output) {
        for name in self.services.take_dirty() {
            let service =
                self.services.get(&name).filter(|service| service.kind != ServiceKind::ExternalName);
            let global_namespace = self.namespaces.global(&name.namespace).is_some();
            let for_mesh = service.filter(|service| service.global && service.shared && global_namespace);
            let for_agents = service.filter(|service| service.kind == ServiceKind::ClusterIp);
            let backends = if for_mesh.or(for_agents).is_some() {
                self.services.backends(&name)
            } else {
                BTreeMap::new()
            };
            let mesh_value = for_mesh.and_then(|service| values::service(&self.settings, service, &backends));
            let local_value =
                for_agents.and_then(|service| values::local_service(service, &backends, global_namespace));
            let was = self.services.note(Audience::Mesh, &name, mesh_value.is_some());
            output.write(
                Section::Services,
                "Service",
                &name,
                was,
                || values::service_key(&self.settings, &name),
                mesh_value,
            );
            let was = self.services.note(Audience::Local, &name, local_value.is_some());
            output.write(
                Section::LocalServices,
                "Service",
                &name,
                was,
                || values::local_service_key(&name),
                local_value,
            );
        }
    }

    fn drain_namespaces(&mut self, output: &mut Output) {
        for name in std::mem::take(&mut self.namespaces.dirty) {
            let value = self.namespaces.table.get(&name).map(values::local_namespace);
            let exported = &mut self.namespaces.exported;
            let was = if value.is_some() { !exported.insert(name.clone()) } else { exported.remove(&name) };
            output.write(
                Section::LocalNamespaces,
                "Namespace",
                &name,
                was,
                || values::local_namespace_key(&name),
                value,
            );
        }
    }

    fn drain_policies(&mut self, output: &mut Output) {
        for (kind, name) in self.policies.take_dirty() {
            let value = self.policies.get(kind, &name).map(|policy| policy.says.encode());
            let was = self.policies.note(kind, &name, value.is_some());
            let key = || values::local_policy_key(kind, &name);
            output.write(Section::LocalPolicies, kind.kind(), &name, was, key, value);
        }
        let changed = self.endpoints.take_label_sets();
        let endpoints = &self.endpoints;
        self.policies.count(&changed, || Box::new(endpoints.label_sets()));
        let knows_all = self.settings.allocates && self.knows_all_pods();
        if knows_all && !std::mem::replace(&mut self.startup.knew_all_pods, true) {
            self.policies.judge_all();
        }
        for (kind, name) in self.policies.take_judged() {
            let policy = self.policies.get(kind, &name).cloned();
            // Of pods in a namespace that takes no part in the mesh nothing is known here.
            let in_mesh = !kind.is_namespaced() || self.namespaces.global(&name.namespace).is_some();
            if knows_all && in_mesh && policy.is_some() && !self.policies.selects_any(kind, &name) {
                output.idle_policies.insert((kind, name.clone()));
            }
            output.policies.push((kind, name, policy));
        }
    }

    fn knows_all_pods(&self) -> bool {
        self.namespaces.table.is_synced()
            && self.endpoints.is_synced()
            && self.nodes.is_synced()
            && self.identities.is_synced()
    }

    fn complete_sections(&mut self, output: &mut Output) {
        if self.startup.completed.len() == Section::ALL.len() {
            return;
        }
        if self.knows_all_pods() {
            let identities = &self.identities;
            let awaited = self.startup.awaited.get_or_insert_with(|| identities.requested());
            awaited.retain(|labels| identities.is_requested(labels));
        }
        let identities_stored = self.startup.awaited.as_ref().is_some_and(HashSet::is_empty);
        let services = self.namespaces.table.is_synced() && self.services.is_synced();
        for section in Section::ALL {
            let complete = match section {
                Section::Nodes => self.nodes.is_synced(),
                Section::Identities | Section::Addresses => identities_stored,
                Section::Services | Section::LocalServices => services,
                Section::LocalPolicies => self.policies.is_synced(),
                Section::LocalNamespaces => self.namespaces.table.is_synced(),
            };
            if complete && self.startup.completed.insert(section) {
                output.completed.push(section);
            }
        }
    }
}

impl Output {
    fn write(
        &mut self,
        section: Section,
        kind: &'static str,
        name: &Name,
        was_exported: bool,
        key: impl FnOnce() -> Option<Bytes>,
        value: Option<Bytes>,
    ) {
        if value.is_none() && !was_exported {
            return;
        }
        let Some(key) = key() else { return };
        if value.as_ref().is_some_and(|value| value.len() > LARGEST_VALUE) {
            // Without the exact size, so that it is told once and not on every change.
            let message = format!(
                "its value is larger than the {LARGEST_VALUE} bytes that etcd takes by default, so clusters that keep it in \
                 etcd may not see it: split the service"
            );
            self.findings.push((kind, name.clone(), Finding::new(Reason::TooLarge, message)));
        }
        self.writes.push(Write { section, key, value });
    }
}

fn out_of_range(id: u32, settings: &Settings) -> Finding {
    let range = settings.identities();
    Finding::new(
        Reason::InvalidIdentity,
        format!(
            "number {id} is outside of this cluster's range {} to {} (cluster id {}), so it is not exported: delete it, \
             or check the cluster's id",
            range.start(),
            range.end(),
            settings.cluster_id
        ),
    )
}
