//! Services and the backends their EndpointSlices give them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use isthmus_wire::value::{PortName, ServicePort};

use super::super::facts::{Backend, BackendState, Name, ServiceFact, SliceFact};
use super::table::{Change, Event, Table};

#[derive(Debug, Default)]
pub(crate) struct Services {
    services: Table<ServiceFact>,
    slices: Table<SliceFact>,
    slices_of: HashMap<Name, BTreeSet<Name>>,
    dirty: BTreeSet<Name>,
    exported: HashSet<Name>,
    exported_locally: HashSet<Name>,
}

/// A backend as all slices of its service together describe it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Merged<'a> {
    pub backend: &'a Backend,
    pub state: BackendState,
    /// Target ports by the name of the service's port.
    pub ports: BTreeMap<PortName, ServicePort>,
}

/// Which of a service's two keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Other clusters.
    Mesh,
    /// The cluster's own agents.
    Local,
}

impl Services {
    pub(crate) fn apply_service(&mut self, event: Event<ServiceFact>) {
        let changes = self.services.apply(event);
        self.dirty.extend(changes.into_iter().map(|change| change.name));
    }

    pub(crate) fn apply_slice(&mut self, event: Event<SliceFact>) {
        for Change { name, old } in self.slices.apply(event) {
            if let Some(service) = old.and_then(|old| old.service) {
                if let Some(slices) = self.slices_of.get_mut(&service) {
                    slices.remove(&name);
                    if slices.is_empty() {
                        self.slices_of.remove(&service);
                    }
                }
                self.dirty.insert(service);
            }
            if let Some(service) = self.slices.get(&name).and_then(|slice| slice.service.clone()) {
                self.slices_of.entry(service.clone()).or_default().insert(name);
                self.dirty.insert(service);
            }
        }
    }

    /// Looks at all services of a namespace again, whose part in the mesh has changed.
    pub(crate) fn namespace_changed(&mut self, namespace: &Arc<str>) {
        self.dirty.extend(self.services.in_namespace(namespace).cloned());
    }

    pub(crate) fn take_dirty(&mut self) -> BTreeSet<Name> {
        std::mem::take(&mut self.dirty)
    }

    pub(crate) fn get(&self, name: &Name) -> Option<&ServiceFact> {
        self.services.get(name)
    }

    /// The backends of a service, each once. While one moves from slice to slice it may be in two, and the better
    /// state holds.
    pub(crate) fn backends(&self, service: &Name) -> BTreeMap<IpAddr, Merged<'_>> {
        let mut merged: BTreeMap<IpAddr, Merged<'_>> = BTreeMap::new();
        let slices =
            self.slices_of.get(service).into_iter().flatten().filter_map(|name| self.slices.get(name));
        for slice in slices {
            for backend in &slice.backends {
                let entry = merged.entry(backend.address).or_insert_with(|| Merged {
                    backend,
                    state: backend.state,
                    ports: BTreeMap::new(),
                });
                if backend.state < entry.state {
                    entry.state = backend.state;
                    entry.backend = backend;
                }
                for (name, port) in &slice.ports {
                    entry.ports.entry(name.clone()).or_insert(*port);
                }
            }
        }
        merged
    }

    /// Notes what became of a service's key. Returns whether it was exported before.
    pub(crate) fn note(&mut self, audience: Audience, name: &Name, exported: bool) -> bool {
        let set = match audience {
            Audience::Mesh => &mut self.exported,
            Audience::Local => &mut self.exported_locally,
        };
        if exported { !set.insert(name.clone()) } else { set.remove(name) }
    }

    pub(crate) fn exported(&self, audience: Audience) -> usize {
        match audience {
            Audience::Mesh => self.exported.len(),
            Audience::Local => self.exported_locally.len(),
        }
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.services.is_synced() && self.slices.is_synced()
    }
}
