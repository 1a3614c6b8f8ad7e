//! The maps without a kernel: makes operations one by one, in the order in which the datapath makes them, and sees to
//! it that no reader could ever meet a dead slot. Tests compare the planner with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use isthmus_bpf_abi::{Backend, IpcacheEntry, IpcacheKey, Service, ServiceKey, Slot, SlotKey};

use super::Dump;
use crate::datapath::{MapOp, OpError};

/// Contents of the maps.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapModel {
    services: BTreeMap<ServiceKey, Service>,
    slots: BTreeMap<SlotKey, Slot>,
    backends: BTreeMap<u32, Backend>,
    ipcache: BTreeMap<IpcacheKey, IpcacheEntry>,
}

/// What clients of the maps can see: ids and the order of slots apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Visible {
    /// Backends (with their cluster) and affinity of each frontend, as new connections meet them.
    pub frontends: BTreeMap<ServiceKey, (BTreeMap<SocketAddr, u16>, u32)>,
    /// What is known of addresses.
    pub ipcache: BTreeMap<IpcacheKey, IpcacheEntry>,
}

impl MapModel {
    /// Makes the operations in their phases. `fails` decides which of them the kernel refuses; what follows of the same
    /// service is withheld then.
    ///
    /// # Panics
    /// If after any single operation a reader could meet a slot that leads nowhere or to a backend that takes nothing new,
    /// or if the list breaks a rule that the planner owes (two operations on one entry, a record moved between services,
    /// an id used twice, a new record for a backend that takes nothing new).
    pub fn apply(
        &mut self,
        ops: &[MapOp],
        mut fails: impl FnMut(&MapOp) -> Option<OpError>,
    ) -> Vec<Result<(), OpError>> {
        check_list(ops);
        let mut order: Vec<usize> = (0..ops.len()).collect();
        order.sort_by_key(|index| ops[*index].phase());
        let mut results = vec![Ok(()); ops.len()];
        let mut held = BTreeMap::new();
        for index in order {
            let op = &ops[index];
            if let Some(cause) = op.service().and_then(|service| held.get(&service)) {
                results[index] = Err(OpError::Withheld { cause: *cause });
                continue;
            }
            if let Some(error) = fails(op) {
                if let Some(service) = op.service() {
                    held.insert(service, op.target());
                }
                results[index] = Err(error);
                continue;
            }
            self.make(op);
            self.check_readers(op);
        }
        results
    }

    /// Everything in it.
    pub fn dump(&self) -> Dump {
        Dump {
            services: self.services.iter().map(|(key, value)| (*key, *value)).collect(),
            slots: self.slots.iter().map(|(key, value)| (*key, *value)).collect(),
            backends: self.backends.iter().map(|(key, value)| (*key, *value)).collect(),
            ipcache: self.ipcache.iter().map(|(key, value)| (*key, *value)).collect(),
        }
    }

    /// What clients see.
    ///
    /// # Panics
    /// If a slot below a frontend's count is dead, or something is in the maps that nobody can see: neither new connections
    /// nor open ones.
    pub fn visible(&self) -> Visible {
        let mut visible = Visible { ipcache: self.ipcache.clone(), ..Visible::default() };
        let (mut slots, mut backends) = (0, 0);
        let open_only = self.open_only();
        for (key, service) in &self.services {
            let behind: BTreeMap<_, _> = (0..service.count)
                .map(|slot| {
                    let (_, backend) = self.behind(service.id, slot);
                    (SocketAddr::new(backend.addr.ip(), backend.port()), backend.cluster)
                })
                .collect();
            assert_eq!(behind.len(), service.count as usize, "{key:?} has a backend twice");
            if let Some(both) =
                open_only.get(key).and_then(|all| all.keys().find(|addr| behind.contains_key(addr)))
            {
                panic!("{key:?} has {both} twice");
            }
            slots += service.count as usize;
            backends += behind.len();
            visible.frontends.insert(*key, (behind, service.affinity_seconds));
        }
        assert_eq!(self.slots.len(), slots, "there are slots that nobody reads");
        let open_only: usize = open_only.values().map(BTreeMap::len).sum();
        assert_eq!(self.backends.len(), backends + open_only, "there are backends that nobody reads");
        visible
    }

    /// The backends (with their cluster) of each frontend that serve only what is open. They depend on what was before:
    /// who never was chosen has nothing open.
    ///
    /// # Panics
    /// If a frontend has such a backend twice.
    pub fn open_only(&self) -> BTreeMap<ServiceKey, BTreeMap<SocketAddr, u16>> {
        let mut all: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for (key, service) in &self.services {
            for backend in self.backends.values().filter(|backend| backend.service == service.id) {
                if !backend.takes_new() {
                    let addr = SocketAddr::new(backend.addr.ip(), backend.port());
                    let twice = all.entry(*key).or_default().insert(addr, backend.cluster);
                    assert_eq!(twice, None, "{key:?} has {addr} twice");
                }
            }
        }
        all
    }

    fn make(&mut self, op: &MapOp) {
        match *op {
            MapOp::PutBackend { id, backend } => match self.backends.insert(id, backend) {
                Some(old) => assert_eq!(old.service, backend.service, "record {id} moved between services"),
                None => assert!(backend.takes_new(), "record {id} is new, and has nothing open to serve"),
            },
            MapOp::DeleteBackend { id, .. } => {
                self.backends.remove(&id);
            }
            MapOp::PutSlot { key, slot } => {
                self.slots.insert(key, slot);
            }
            MapOp::DeleteSlot { key } => {
                self.slots.remove(&key);
            }
            MapOp::PutService { key, service } => {
                self.services.insert(key, service);
            }
            MapOp::DeleteService { key, .. } => {
                self.services.remove(&key);
            }
            MapOp::PutIpcache { key, entry } => {
                self.ipcache.insert(key, entry);
            }
            MapOp::DeleteIpcache { key } => {
                self.ipcache.remove(&key);
            }
        }
    }

    fn check_readers(&self, op: &MapOp) {
        let Some(of) = op.service() else { return };
        for service in self.services.values().filter(|service| service.id == of) {
            for slot in 0..service.count {
                self.behind(service.id, slot);
            }
        }
    }

    fn behind(&self, service: u32, slot: u32) -> (u32, &Backend) {
        let there = self.slots.get(&SlotKey { service, slot });
        let there = there.unwrap_or_else(|| panic!("slot {slot} of service {service} is empty"));
        let backend = self.backends.get(&there.backend);
        let backend = backend.unwrap_or_else(|| panic!("slot {slot} of service {service} leads nowhere"));
        assert_eq!(backend.fingerprint, there.fingerprint, "slot {slot} of service {service} is dead");
        assert_eq!(backend.service, service, "slot {slot} of service {service} leads to another service");
        assert!(
            backend.takes_new(),
            "slot {slot} of service {service} leads to a backend that takes nothing new"
        );
        (there.backend, backend)
    }
}

fn check_list(ops: &[MapOp]) {
    let mut targets = BTreeSet::new();
    for op in ops {
        assert!(targets.insert(op.target()), "two operations on {:?} in one list", op.target());
    }
}
