//! One frontend as it stands in the maps, and the way from there to where it should be.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;

use isthmus_bpf_abi::{Backend, Service, ServiceKey, Slot, SlotKey};

use super::ids::BackendIds;
use crate::datapath::MapOp;
use crate::desired::{Frontend, service};

/// What the maps hold for one frontend. Any state can be described, torn ones too, and led to any other.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Installed {
    /// Its id, given once.
    pub(super) id: u32,
    /// The frontend's own entry.
    pub(super) service: Option<Service>,
    /// Slots by number.
    pub(super) slots: Vec<Option<Slot>>,
    /// Backend records that belong to it, by id.
    pub(super) backends: HashMap<u32, Backend>,
}

impl Installed {
    pub(super) fn new(id: u32) -> Self {
        Self { id, ..Self::default() }
    }

    /// Nothing of it is in the maps.
    pub(super) fn is_gone(&self) -> bool {
        self.service.is_none() && self.backends.is_empty() && self.slots.iter().all(Option::is_none)
    }

    /// The backends that a reader meets, with their cluster.
    pub(super) fn live(&self) -> impl Iterator<Item = (SocketAddr, u16)> + '_ {
        let count = self.service.map_or(0, |service| service.count as usize);
        self.slots
            .iter()
            .take(count)
            .filter_map(|slot| self.behind(slot.as_ref()?))
            .map(|(_, backend)| (endpoint(backend), backend.cluster))
    }

    /// The backends that serve only what is open, with their cluster.
    pub(super) fn open_only(&self) -> impl Iterator<Item = (SocketAddr, u16)> + '_ {
        let open_only = self.backends.values().filter(|backend| !backend.takes_new());
        open_only.map(|backend| (endpoint(backend), backend.cluster))
    }

    /// Their records.
    pub(super) fn open_only_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.backends.iter().filter(|(_, backend)| !backend.takes_new()).map(|(id, _)| *id)
    }

    /// Remembers that the operation was made.
    pub(super) fn made(&mut self, op: &MapOp) {
        match *op {
            MapOp::PutBackend { id, backend } => {
                self.backends.insert(id, backend);
            }
            MapOp::DeleteBackend { id, .. } => {
                self.backends.remove(&id);
            }
            MapOp::PutSlot { key, slot } => self.set_slot(key.slot, Some(slot)),
            MapOp::DeleteSlot { key } => self.set_slot(key.slot, None),
            MapOp::PutService { service, .. } => self.service = Some(service),
            MapOp::DeleteService { .. } => self.service = None,
            MapOp::PutIpcache { .. } | MapOp::DeleteIpcache { .. } => {}
        }
    }

    /// The operations that remove every trace of it.
    pub(super) fn removal(&self, key: ServiceKey, ops: &mut Vec<MapOp>) {
        if self.service.is_some() {
            ops.push(MapOp::DeleteService { key, service: self.id });
        }
        self.delete_slots_from(0, ops);
        ops.extend(self.backends.keys().map(|id| MapOp::DeleteBackend { id: *id, service: self.id }));
    }

    /// The operations that lead to `wanted`: as many as there are differences. Returns how many backends had to be left
    /// out since no id was free.
    ///
    /// A backend that takes nothing new loses its slot and keeps its record, since open flows know it by that. One that has
    /// none has no open flows either, and gets none.
    pub(super) fn change(
        &self,
        key: ServiceKey,
        wanted: &Frontend,
        ids: &mut BackendIds,
        ops: &mut Vec<MapOp>,
    ) -> usize {
        let mut missing: BTreeMap<SocketAddr, u16> = wanted.backends.clone();
        let mut kept: BTreeMap<u32, u32> = BTreeMap::new();
        for (number, slot) in (0_u32..).zip(&self.slots) {
            let Some((id, backend)) = slot.as_ref().and_then(|slot| self.behind(slot)) else { continue };
            let Some(cluster) = missing.remove(&endpoint(backend)) else { continue };
            kept.insert(number, id);
            let behind_a_slot = Backend { cluster, flags: 0, ..*backend };
            if *backend != behind_a_slot {
                ops.push(MapOp::PutBackend { id, backend: behind_a_slot });
            }
        }

        let spare = self.spare(&kept);
        let mut added = Vec::with_capacity(missing.len());
        let mut left_out = 0;
        for (addr, cluster) in missing {
            let backend = Backend::new(self.id, addr.ip(), addr.port(), service::protocol(&key), cluster);
            match spare.get(&addr).copied().or_else(|| ids.take()) {
                Some(id) => added.push((id, backend)),
                None => left_out += 1,
            }
        }

        let count = u32::try_from(kept.len() + added.len()).unwrap_or(u32::MAX);
        let moved: Vec<u32> = kept.range(count..).map(|(_, id)| *id).collect();
        let gaps = (0..count).filter(|number| !kept.contains_key(number));
        let fillers =
            moved.iter().filter_map(|id| Some((*id, *self.backends.get(id)?))).chain(added.iter().copied());
        for (number, (id, backend)) in gaps.zip(fillers) {
            let slot = backend.slot(id);
            if self.slots.get(number as usize) != Some(&Some(slot)) {
                ops.push(MapOp::PutSlot { key: SlotKey { service: self.id, slot: number }, slot });
            }
        }
        for (id, backend) in &added {
            if self.backends.get(id) != Some(backend) {
                ops.push(MapOp::PutBackend { id: *id, backend: *backend });
            }
        }
        let service = Service { id: self.id, count, affinity_seconds: wanted.affinity_seconds, flags: 0 };
        if self.service != Some(service) {
            ops.push(MapOp::PutService { key, service });
        }
        self.delete_slots_from(count as usize, ops);
        if self.backends.len() > kept.len() {
            let used: HashSet<u32> = kept.values().copied().chain(added.iter().map(|(id, _)| *id)).collect();
            let unused = self.backends.iter().filter(|(id, _)| !used.contains(id));
            ops.extend(unused.filter_map(|(id, backend)| self.without_slot(*id, backend, wanted)));
        }
        left_out
    }

    /// What is to be done with a record that no slot uses any more.
    fn without_slot(&self, id: u32, backend: &Backend, wanted: &Frontend) -> Option<MapOp> {
        let Some(cluster) = wanted.open_only.get(&endpoint(backend)) else {
            return Some(MapOp::DeleteBackend { id, service: self.id });
        };
        let open_only = Backend { cluster: *cluster, ..*backend }.open_only();
        (*backend != open_only).then_some(MapOp::PutBackend { id, backend: open_only })
    }

    /// Records that no slot uses, by address: they serve what is open, or an interrupted change has left them.
    fn spare(&self, kept: &BTreeMap<u32, u32>) -> HashMap<SocketAddr, u32> {
        if self.backends.len() == kept.len() {
            return HashMap::new();
        }
        let mut spare: HashMap<_, _> =
            self.backends.iter().map(|(id, backend)| (endpoint(backend), *id)).collect();
        for id in kept.values() {
            if let Some(backend) = self.backends.get(id) {
                spare.remove(&endpoint(backend));
            }
        }
        spare
    }

    /// The record that a slot points to, if it really does.
    fn behind(&self, slot: &Slot) -> Option<(u32, &Backend)> {
        let backend = self.backends.get(&slot.backend)?;
        (backend.fingerprint == slot.fingerprint).then_some((slot.backend, backend))
    }

    fn set_slot(&mut self, number: u32, slot: Option<Slot>) {
        let number = number as usize;
        if number >= self.slots.len() {
            self.slots.resize(number + 1, None);
        }
        self.slots[number] = slot;
        while self.slots.last() == Some(&None) {
            self.slots.pop();
        }
    }

    fn delete_slots_from(&self, first: usize, ops: &mut Vec<MapOp>) {
        let filled = (0_u32..).zip(&self.slots).skip(first).filter(|(_, slot)| slot.is_some());
        ops.extend(filled.map(|(slot, _)| MapOp::DeleteSlot { key: SlotKey { service: self.id, slot } }));
    }
}

fn endpoint(backend: &Backend) -> SocketAddr {
    SocketAddr::new(backend.addr.ip(), backend.port())
}
