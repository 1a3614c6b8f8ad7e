//! Pods and the addresses that are theirs.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use isthmus_wire::ClusterName;
use isthmus_wire::pod_labels::identity_labels;

use super::super::facts::{Assigned, EndpointFact, Host, Name, NamespaceFact, NodeFact};
use super::identities::{Identities, LabelSet};
use super::nodes::Nodes;
use super::table::{Change, Event, Table};

/// What is known of a namespace as far as the mesh is concerned. `None` if it takes no part, or is not known yet.
pub(crate) trait Namespaces {
    fn global(&self, namespace: &str) -> Option<&NamespaceFact>;
}

#[derive(Debug)]
pub(crate) struct Endpoints {
    cluster: ClusterName,
    table: Table<EndpointFact>,
    /// Every pod that claims an address. There is more than one while an address passes from pod to pod.
    by_address: HashMap<IpAddr, BTreeSet<Name>>,
    by_node: HashMap<Arc<str>, BTreeSet<Name>>,
    by_labels: HashMap<LabelSet, BTreeSet<Name>>,
    /// The label sets that pods hold.
    labels: HashMap<Name, LabelSet>,
    /// The pod under whose name an address is exported.
    exported: HashMap<IpAddr, Name>,
    dirty: BTreeSet<IpAddr>,
    /// Label sets that the first pod has taken (`true`) or the last one has let go of since they were asked for.
    label_sets: Vec<(LabelSet, bool)>,
}

/// What is to become of an address.
#[derive(Debug, PartialEq)]
pub(crate) enum Verdict<'a> {
    /// It stands for this pod, with this identity.
    Export { pod: &'a EndpointFact, identity: u32, host: Option<IpAddr>, encryption_key: u8 },
    /// It stays as it is: the pod is still the same, and its new identity is on its way.
    Keep,
    /// It stands for nothing.
    Retract,
}

impl Endpoints {
    pub(crate) fn new(cluster: ClusterName) -> Self {
        Self {
            cluster,
            table: Table::default(),
            by_address: HashMap::new(),
            by_node: HashMap::new(),
            by_labels: HashMap::new(),
            labels: HashMap::new(),
            exported: HashMap::new(),
            dirty: BTreeSet::new(),
            label_sets: Vec::new(),
        }
    }

    /// Label sets that pods have now and had not, or the other way round, in order.
    pub(crate) fn take_label_sets(&mut self) -> Vec<(LabelSet, bool)> {
        std::mem::take(&mut self.label_sets)
    }

    /// The label sets that pods have.
    pub(crate) fn label_sets(&self) -> impl Iterator<Item = &LabelSet> {
        self.by_labels.keys()
    }

    pub(crate) fn apply(
        &mut self,
        event: Event<EndpointFact>,
        namespaces: &impl Namespaces,
        identities: &mut Identities,
    ) {
        for Change { name, old } in self.table.apply(event) {
            if let Some(old) = old {
                self.unindex(&name, &old);
            }
            if let Some(new) = self.table.get(&name) {
                for address in &new.addresses {
                    self.by_address.entry(*address).or_default().insert(name.clone());
                    self.dirty.insert(*address);
                }
                if let Host::Node { name: node, .. } = &new.host {
                    self.by_node.entry(Arc::clone(node)).or_default().insert(name.clone());
                }
            }
            self.assign(&name, namespaces, identities);
        }
    }

    /// Looks at all pods of a namespace again, whose labels or part in the mesh have changed.
    pub(crate) fn namespace_changed(
        &mut self,
        namespace: &Arc<str>,
        namespaces: &impl Namespaces,
        identities: &mut Identities,
    ) {
        let names: Vec<Name> = self.table.in_namespace(namespace).cloned().collect();
        for name in names {
            self.mark(&name);
            self.assign(&name, namespaces, identities);
        }
    }

    /// Looks at all pods of a node again, whose addresses or key have changed.
    pub(crate) fn node_changed(&mut self, node: &str) {
        let Some(pods) = self.by_node.get(node) else { return };
        let addresses = pods.iter().filter_map(|name| self.table.get(name)).flat_map(|pod| &pod.addresses);
        self.dirty.extend(addresses);
    }

    /// Looks at all pods with a label set again, whose number has changed.
    pub(crate) fn identity_changed(&mut self, labels: &LabelSet) {
        let Some(pods) = self.by_labels.get(labels) else { return };
        let addresses = pods.iter().filter_map(|name| self.table.get(name)).flat_map(|pod| &pod.addresses);
        self.dirty.extend(addresses);
    }

    pub(crate) fn take_dirty(&mut self) -> BTreeSet<IpAddr> {
        std::mem::take(&mut self.dirty)
    }

    pub(crate) fn verdict(
        &self,
        address: IpAddr,
        namespaces: &impl Namespaces,
        identities: &Identities,
        nodes: &Nodes,
    ) -> Verdict<'_> {
        let claimants =
            self.by_address.get(&address).into_iter().flatten().filter_map(|name| self.table.get(name));
        // The younger pod has the address; the names only make the answer the same everywhere.
        let Some(pod) = claimants.max_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name))) else {
            return Verdict::Retract;
        };
        if namespaces.global(&pod.name.namespace).is_none() {
            return Verdict::Retract;
        }
        let identity = match &pod.identity {
            Assigned::Nothing => return Verdict::Retract,
            Assigned::Numeric(id) => Some(*id),
            Assigned::ByLabels(_) => self.labels.get(&pod.name).and_then(|labels| identities.number(labels)),
        };
        match identity {
            Some(identity) => {
                let (host, encryption_key) = host(pod, address, nodes);
                Verdict::Export { pod, identity, host, encryption_key }
            }
            None if self.exported.get(&address) == Some(&pod.name) => Verdict::Keep,
            None => Verdict::Retract,
        }
    }

    /// Notes what became of an address. Returns whether it was exported before.
    pub(crate) fn note(&mut self, address: IpAddr, pod: Option<Name>) -> bool {
        match pod {
            Some(pod) => self.exported.insert(address, pod).is_some(),
            None => self.exported.remove(&address).is_some(),
        }
    }

    pub(crate) fn exported(&self) -> usize {
        self.exported.len()
    }

    /// One pod that has this label set, to name in a message.
    pub(crate) fn example_of(&self, labels: &LabelSet) -> Option<&Name> {
        self.by_labels.get(labels)?.first()
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.table.is_synced()
    }

    /// Gives the pod the label set that it now has, and takes the one it had.
    fn assign(&mut self, name: &Name, namespaces: &impl Namespaces, identities: &mut Identities) {
        let wanted = self.table.get(name).and_then(|pod| {
            let Assigned::ByLabels(labels) = &pod.identity else { return None };
            let namespace = namespaces.global(&name.namespace)?;
            Some(identity_labels(
                &self.cluster,
                &namespace.name.name,
                &namespace.labels,
                labels,
                &pod.service_account,
            ))
        });
        if self.labels.get(name).map(|labels| &**labels) == wanted.as_ref() {
            return;
        }
        if let Some(old) = self.labels.remove(name) {
            if let Some(pods) = self.by_labels.get_mut(&old) {
                pods.remove(name);
                if pods.is_empty() {
                    self.by_labels.remove(&old);
                    self.label_sets.push((old.clone(), false));
                }
            }
            identities.release(&old);
        }
        if let Some(wanted) = wanted {
            let labels = identities.acquire(wanted);
            let pods = self.by_labels.entry(Arc::clone(&labels)).or_default();
            if pods.is_empty() {
                self.label_sets.push((Arc::clone(&labels), true));
            }
            pods.insert(name.clone());
            self.labels.insert(name.clone(), labels);
        }
        self.mark(name);
    }

    fn mark(&mut self, name: &Name) {
        self.dirty.extend(self.table.get(name).into_iter().flat_map(|pod| &pod.addresses));
    }

    fn unindex(&mut self, name: &Name, old: &EndpointFact) {
        for address in &old.addresses {
            if let Some(claimants) = self.by_address.get_mut(address) {
                claimants.remove(name);
                if claimants.is_empty() {
                    self.by_address.remove(address);
                }
            }
            self.dirty.insert(*address);
        }
        if let Host::Node { name: node, .. } = &old.host
            && let Some(pods) = self.by_node.get_mut(node)
        {
            pods.remove(name);
            if pods.is_empty() {
                self.by_node.remove(node);
            }
        }
    }
}

/// The address of the pod's node, and the index of the key that encrypts traffic to it.
fn host(pod: &EndpointFact, address: IpAddr, nodes: &Nodes) -> (Option<IpAddr>, u8) {
    match &pod.host {
        Host::Address { address, encryption_key } => (*address, *encryption_key),
        Host::Node { name, addresses } => {
            let node: Option<&NodeFact> = nodes.named(name);
            let of_status = || {
                addresses
                    .iter()
                    .find(|host| host.is_ipv4() == address.is_ipv4())
                    .or(addresses.first())
                    .copied()
            };
            (
                node.and_then(|node| node.host_address(address)).or_else(of_status),
                node.map_or(0, |node| node.encryption_key),
            )
        }
    }
}
