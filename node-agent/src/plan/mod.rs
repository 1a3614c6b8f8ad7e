//! From what the maps hold to what they should hold: the smallest list of map operations, in a safe order.
//!
//! The planner remembers what is in the maps; it learns it once from a dump and then from the results of what it
//! asked for. One endpoint more or less is a constant number of operations however large the service, for a service's
//! backends stand in dense slots: the last one moves into the gap. A backend that takes nothing new has a record without a
//! slot, for as long as it may serve what is open.

mod frontend;
mod ids;
pub mod model;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;

use isthmus_bpf_abi::{Backend, IpcacheEntry, IpcacheKey, Service, ServiceKey, Slot, SlotKey};

use self::frontend::Installed;
use self::ids::BackendIds;
use crate::datapath::{MapOp, OpError, Target};
use crate::desired::{Delta, Frontend};
use crate::mesh::Mesh;

/// Everything that the maps hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Dump {
    /// Frontends.
    pub services: Vec<(ServiceKey, Service)>,
    /// Slots.
    pub slots: Vec<(SlotKey, Slot)>,
    /// Backend records in use.
    pub backends: Vec<(u32, Backend)>,
    /// Addresses and prefixes.
    pub ipcache: Vec<(IpcacheKey, IpcacheEntry)>,
}

/// Of which clusters (0 is the own one) entries stay as they are although nothing is known that asks for them: those of
/// which not everything has been read yet since the agent started. Half of it may tell something else: a pod's address
/// without the node that it runs on looks like one of another node.
pub struct Retention<'a> {
    /// For frontends (the own cluster's) and backends.
    pub services: &'a dyn Fn(u16) -> bool,
    /// For addresses and prefixes.
    pub ipcache: &'a dyn Fn(&IpcacheEntry) -> bool,
}

impl Retention<'_> {
    /// Keep nothing.
    pub const NONE: Retention<'static> = Retention { services: &|_| false, ipcache: &|_| false };
}

/// What could not be made. The planner knows what was reached instead; asking again for the same leads on from there.
#[derive(Debug, Default)]
pub struct Failures {
    /// Frontends that are not as they should be.
    pub frontends: BTreeSet<ServiceKey>,
    /// Addresses and prefixes that are not as they should be.
    pub ipcache: BTreeSet<IpcacheKey>,
    /// What the kernel said, each reason once.
    pub reasons: Vec<OpError>,
}

impl Failures {
    /// Everything was made.
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.ipcache.is_empty()
    }
}

/// What is in the maps, and the ids that are free.
#[derive(Debug)]
pub struct Planner {
    frontends: HashMap<ServiceKey, Installed>,
    keys: HashMap<u32, ServiceKey>,
    ipcache: HashMap<IpcacheKey, IpcacheEntry>,
    ids: BackendIds,
    next_service: u32,
    orphans: Vec<MapOp>,
    short: BTreeMap<ServiceKey, usize>,
    taken: Vec<u32>,
}

impl Planner {
    /// Takes over what is in the maps. Ids of backends are given out below `capacity`.
    pub fn adopt(dump: &Dump, capacity: u32) -> Self {
        let mut highest = 0;
        let mut frontends: HashMap<ServiceKey, Installed> = HashMap::new();
        let mut keys = HashMap::new();
        let mut services = dump.services.clone();
        services.sort_by_key(|(key, _)| *key);
        let mut ambiguous = Vec::new();
        for (key, service) in services {
            highest = highest.max(service.id);
            if service.id == 0 || keys.contains_key(&service.id) {
                ambiguous.push((key, service));
                continue;
            }
            keys.insert(service.id, key);
            frontends.insert(key, Installed { service: Some(service), ..Installed::new(service.id) });
        }
        let mut orphans = Vec::new();
        let mut used = HashSet::new();
        for (id, backend) in &dump.backends {
            used.insert(*id);
            highest = highest.max(backend.service);
            let op = MapOp::PutBackend { id: *id, backend: *backend };
            match keys.get(&backend.service).and_then(|key| frontends.get_mut(key)) {
                Some(installed) => installed.made(&op),
                None => orphans.push(MapOp::DeleteBackend { id: *id, service: backend.service }),
            }
        }
        let mut slots = dump.slots.clone();
        slots.sort_by_key(|(key, _)| *key);
        for (key, slot) in slots {
            highest = highest.max(key.service);
            // A number that no list of ours reaches is no slot of ours, and would only make the list long.
            let owner = keys.get(&key.service).and_then(|key| frontends.get_mut(key));
            match owner.filter(|_| key.slot < capacity) {
                Some(installed) => installed.made(&MapOp::PutSlot { key, slot }),
                None => orphans.push(MapOp::DeleteSlot { key }),
            }
        }
        let mut next_service = highest.saturating_add(1);
        for (key, service) in ambiguous {
            keys.insert(next_service, key);
            frontends.insert(key, Installed { service: Some(service), ..Installed::new(next_service) });
            next_service += 1;
        }
        Self {
            frontends,
            keys,
            ipcache: dump.ipcache.iter().copied().collect(),
            ids: BackendIds::new(capacity, &used),
            next_service,
            orphans,
            short: BTreeMap::new(),
            taken: Vec::new(),
        }
    }

    /// Takes over a newer dump, but goes on counting services where it is.
    pub fn readopt(&mut self, dump: &Dump, capacity: u32) {
        let next_service = self.next_service;
        *self = Self::adopt(dump, capacity);
        self.next_service = self.next_service.max(next_service);
    }

    /// The operations that lead from what is there to what `delta` asks for.
    pub fn plan(&mut self, delta: &Delta, retention: &Retention<'_>) -> Vec<MapOp> {
        let mut ops = std::mem::take(&mut self.orphans);
        for (key, wanted) in &delta.ipcache {
            let there = self.ipcache.get(key);
            if there == wanted.as_ref() || there.is_some_and(|there| (retention.ipcache)(there)) {
                continue;
            }
            ops.push(match wanted {
                Some(entry) => MapOp::PutIpcache { key: *key, entry: *entry },
                None => MapOp::DeleteIpcache { key: *key },
            });
        }
        let mut left_out = 0;
        for (key, wanted) in &delta.frontends {
            left_out += self.plan_frontend(*key, wanted.as_ref(), retention, &mut ops);
        }
        if left_out > 0 {
            self.make_room(left_out, &mut ops);
        }
        ops
    }

    /// Everything in the maps that `delta`, which is to state everything that should be there, does not mention is added
    /// to it as to be removed.
    pub fn complete(&self, delta: &mut Delta) {
        for key in self.frontends.keys() {
            delta.frontends.entry(*key).or_default();
        }
        for key in self.ipcache.keys() {
            delta.ipcache.entry(*key).or_default();
        }
    }

    /// Takes in what became of the operations of the last plan.
    pub fn confirm(&mut self, ops: &[MapOp], results: &[Result<(), OpError>]) -> Failures {
        let mut failures = Failures::default();
        let mut owners = BTreeSet::new();
        for (op, result) in ops.iter().zip(results) {
            let owner = op.service().and_then(|id| self.keys.get(&id)).copied();
            match result {
                Ok(()) => self.made(op, owner),
                Err(reason) => {
                    self.failed(op, owner, &mut failures);
                    if !matches!(reason, OpError::Withheld { .. }) && !failures.reasons.contains(reason) {
                        failures.reasons.push(reason.clone());
                    }
                }
            }
            owners.extend(owner);
        }
        for key in owners {
            if self.frontends.get(&key).is_some_and(Installed::is_gone)
                && let Some(gone) = self.frontends.remove(&key)
            {
                self.keys.remove(&gone.id);
            }
        }
        self.taken.clear();
        failures
    }

    /// Frontends that lack backends since no backend id was free, and how many they lack.
    pub fn short(&self) -> &BTreeMap<ServiceKey, usize> {
        &self.short
    }

    /// Whether something in the maps belongs to a cluster id that nobody in the mesh holds (yet).
    pub fn knows_of_other_clusters(&self, mesh: &Mesh) -> bool {
        let unknown = |cluster: u16| mesh.cluster_name(cluster).is_none();
        self.ipcache.values().any(|entry| unknown(entry.cluster))
            || self.frontends.values().any(|installed| {
                installed.live().chain(installed.open_only()).any(|(_, cluster)| unknown(cluster))
            })
    }

    /// Number of entries: frontends, backends, addresses.
    pub fn filled(&self) -> (usize, usize, usize) {
        (self.frontends.len(), self.ids.in_use(), self.ipcache.len())
    }

    /// Returns how many backends have to be left out since no id is free.
    fn plan_frontend(
        &mut self,
        key: ServiceKey,
        wanted: Option<&Frontend>,
        retention: &Retention<'_>,
        ops: &mut Vec<MapOp>,
    ) -> usize {
        self.short.remove(&key);
        let Some(wanted) = wanted else {
            if let Some(installed) = self.frontends.get(&key)
                && !(retention.services)(0)
            {
                installed.removal(key, ops);
            }
            return 0;
        };
        let next = &mut self.next_service;
        let installed = self.frontends.entry(key).or_insert_with(|| {
            let id = *next;
            *next += 1;
            self.keys.insert(id, key);
            Installed::new(id)
        });
        let before = ops.len();
        let left_out = match keeping(installed, wanted, retention) {
            Some(kept) => installed.change(key, &kept, &mut self.ids, ops),
            None => installed.change(key, wanted, &mut self.ids, ops),
        };
        if left_out > 0 {
            self.short.insert(key, left_out);
        }
        for op in &ops[before..] {
            if let MapOp::PutBackend { id, .. } = op
                && !installed.backends.contains_key(id)
            {
                self.taken.push(*id);
            }
        }
        left_out
    }

    /// Sees to it that so many ids are free by the next plan. Where this one frees too few, records that serve only what is
    /// open give way: somebody who is waiting to be reached at all needs one more. Those that this plan changes come later.
    fn make_room(&self, ids: usize, ops: &mut Vec<MapOp>) {
        let freed = ops.iter().filter(|op| matches!(op, MapOp::DeleteBackend { .. })).count();
        let touched: HashSet<Target> = ops.iter().map(MapOp::target).collect();
        let open_only = self.frontends.values().flat_map(|installed| {
            installed.open_only_ids().map(|id| MapOp::DeleteBackend { id, service: installed.id })
        });
        let giving_way = open_only.filter(|op| !touched.contains(&op.target()));
        ops.extend(giving_way.take(ids.saturating_sub(freed)));
    }

    fn made(&mut self, op: &MapOp, owner: Option<ServiceKey>) {
        match op {
            MapOp::PutIpcache { key, entry } => {
                self.ipcache.insert(*key, *entry);
            }
            MapOp::DeleteIpcache { key } => {
                self.ipcache.remove(key);
            }
            _ => {}
        }
        if let Some(installed) = owner.and_then(|key| self.frontends.get_mut(&key)) {
            installed.made(op);
        }
        if let MapOp::DeleteBackend { id, .. } = op {
            self.ids.free(*id);
        }
    }

    fn failed(&mut self, op: &MapOp, owner: Option<ServiceKey>, failures: &mut Failures) {
        match op.target() {
            Target::Ipcache(key) => {
                failures.ipcache.insert(key);
            }
            Target::Backend(id) if matches!(op, MapOp::PutBackend { .. }) && self.taken.contains(&id) => {
                self.ids.free(id);
            }
            _ => {}
        }
        match owner {
            Some(key) => {
                failures.frontends.insert(key);
            }
            // Tried again with the next plan.
            None if op.service().is_some() => self.orphans.push(*op),
            None => {}
        }
    }
}

/// `wanted` with what must stay for now, if there is any: who has a slot keeps it, and who has only a record keeps that. A
/// fallback waits: what the service prefers may only not have been read yet.
fn keeping(installed: &Installed, wanted: &Frontend, retention: &Retention<'_>) -> Option<Frontend> {
    let stays = |(addr, cluster): &(SocketAddr, u16)| {
        !wanted.backends.contains_key(addr) && (retention.services)(*cluster)
    };
    let chosen: Vec<_> = installed.live().filter(stays).collect();
    let open_only: Vec<_> = installed.open_only().filter(stays).collect();
    if chosen.is_empty() && open_only.is_empty() {
        return None;
    }
    let mut kept = wanted.clone();
    if wanted.fallback && !chosen.is_empty() {
        let live: HashMap<_, _> = installed.live().collect();
        let waiting = kept.backends.extract_if(.., |addr, _| !live.contains_key(addr));
        // For what may be open there.
        kept.open_only.extend(waiting);
    }
    kept.open_only.extend(open_only);
    for (addr, cluster) in chosen {
        kept.open_only.remove(&addr);
        kept.backends.insert(addr, cluster);
    }
    Some(kept)
}

#[cfg(test)]
mod tests;
