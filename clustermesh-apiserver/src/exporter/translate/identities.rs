//! One number per label set.
//!
//! The numbers are persisted as objects of the Kubernetes API, and those objects are the only truth: a label set has the
//! lowest number that an object gives it. A set without one asks for an object, under a number that follows from the
//! labels alone (their hash, then the next free one). Two replicas that meet the same set at the same time therefore ask
//! for the same object; one of them is told that it exists, reads it, and both have the same number. Where they still end
//! up with two, both take the lower, and the other is collected once it has been unused for long enough.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use isthmus_wire::Labels;
use sha2::{Digest, Sha256};

use super::super::facts::{IdentityFact, Name};
use super::super::problem::{Finding, Reason};
use super::table::{Change, Event, Table};

/// A label set, shared by everything that has it.
pub(crate) type LabelSet = Arc<Labels>;

/// What is to be done about identity objects.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum IdentityAction {
    /// Store an object that gives this number to this set.
    Create { id: u32, labels: LabelSet },
    /// Delete this very object, unless it has changed.
    Delete { id: u32, uid: String, resource_version: String },
}

/// A label set that got no number, and why.
#[derive(Debug, PartialEq)]
pub(crate) struct Unassigned {
    pub labels: LabelSet,
    pub finding: Finding,
}

#[derive(Debug)]
pub(crate) struct Identities {
    /// The numbers that may be given.
    range: RangeInclusive<u32>,
    /// Whether missing numbers are asked for; not where Cilium gives them.
    allocates: bool,
    table: Table<IdentityFact>,
    sets: HashMap<LabelSet, SetState>,
    /// Numbers in the range that an object has, or that have been asked for.
    taken: HashMap<u32, Taken>,
    /// Sets that got no number because none was free.
    starved: HashSet<LabelSet>,
    /// Sets that pods have and that have no number.
    missing: HashSet<LabelSet>,
    /// Since when our own objects have been unused.
    unused: HashMap<Name, Duration>,
    /// Objects whose key is to be looked at again.
    dirty: BTreeSet<Name>,
    /// Sets whose number may have changed.
    changed: Vec<LabelSet>,
    actions: Vec<IdentityAction>,
    unassigned: Vec<Unassigned>,
}

#[derive(Debug, Default)]
struct SetState {
    /// Numbers that objects give this set. The lowest counts.
    ids: BTreeSet<u32>,
    /// Pods that have this set.
    users: usize,
    progress: Progress,
}

#[derive(Debug, Default, PartialEq)]
enum Progress {
    #[default]
    Idle,
    /// An object has been asked for.
    Requested,
    /// No number was free.
    Starved,
    /// Kubernetes does not take an object with these labels.
    Refused,
}

#[derive(Debug, Default)]
struct Taken {
    /// Objects of this number: one, unless somebody writes numbers with leading zeros.
    objects: usize,
    /// The set for which it has been asked for.
    requested_for: Option<LabelSet>,
}

impl Identities {
    pub(crate) fn new(range: RangeInclusive<u32>, allocates: bool) -> Self {
        Self {
            range,
            allocates,
            table: Table::default(),
            sets: HashMap::new(),
            taken: HashMap::new(),
            starved: HashSet::new(),
            missing: HashSet::new(),
            unused: HashMap::new(),
            dirty: BTreeSet::new(),
            changed: Vec::new(),
            actions: Vec::new(),
            unassigned: Vec::new(),
        }
    }

    pub(crate) fn apply(&mut self, event: Event<IdentityFact>) {
        let answered = match &event {
            Event::Listed(fact) | Event::Applied(fact) => fact.id,
            _ => None,
        };
        let was_synced = self.table.is_synced();
        for Change { name, old } in self.table.apply(event) {
            if let Some(old) = old {
                self.forget(&old);
            }
            if let Some(new) = self.table.get(&name).cloned() {
                self.learn(&new);
            }
            self.dirty.insert(name);
        }
        if let Some(id) = answered {
            self.settle(id);
        }
        if self.table.is_synced() && !was_synced {
            self.request_all_missing();
        }
    }

    /// The number of a set, once it has one.
    pub(crate) fn number(&self, labels: &LabelSet) -> Option<u32> {
        self.sets.get(labels)?.ids.first().copied()
    }

    /// One more pod has this set. Returns the shared copy of it.
    pub(crate) fn acquire(&mut self, labels: Labels) -> LabelSet {
        let labels = match self.sets.get_key_value(&labels) {
            Some((known, _)) => Arc::clone(known),
            None => Arc::new(labels),
        };
        self.sets.entry(Arc::clone(&labels)).or_default().users += 1;
        self.note_missing(&labels);
        self.request_if_missing(&labels);
        labels
    }

    /// One pod less has this set.
    pub(crate) fn release(&mut self, labels: &LabelSet) {
        let Some(state) = self.sets.get_mut(labels) else { return };
        state.users = state.users.saturating_sub(1);
        if state.users == 0 {
            self.starved.remove(labels);
            if matches!(state.progress, Progress::Starved | Progress::Refused) {
                state.progress = Progress::Idle;
            }
            self.note_missing(labels);
            self.drop_if_empty(labels);
        }
    }

    /// Kubernetes will not store an object that gives this number to the set it was asked for, and says why.
    pub(crate) fn refused(&mut self, id: u32, why: &str) {
        let Some(labels) = self.taken.get_mut(&id).and_then(|taken| taken.requested_for.take()) else {
            return;
        };
        self.free_if_unused(id);
        if let Some(state) = self.sets.get_mut(&labels) {
            state.progress = Progress::Refused;
        }
        self.unassigned.push(Unassigned {
            finding: Finding::new(
                Reason::IdentityRefused,
                format!("Kubernetes refuses to store an identity for the pod's labels ({why}); the pod is not exported"),
            ),
            labels,
        });
    }

    /// Asks for the deletion of our own objects that no pod has needed for `delay`. `now` is on any steady clock.
    ///
    /// Only to be called while all pods are known.
    pub(crate) fn collect_garbage(&mut self, now: Duration, delay: Duration) {
        for fact in self.table.values() {
            let Some(id) = fact.id.filter(|id| fact.ours && self.range.contains(id)) else { continue };
            let state = fact.labels.as_ref().and_then(|labels| self.sets.get(labels));
            if state.is_some_and(|state| state.users > 0 && state.ids.first() == Some(&id)) {
                self.unused.remove(&fact.name);
                continue;
            }
            let since = self.unused.entry(fact.name.clone()).or_insert(now);
            if now.saturating_sub(*since) >= delay {
                // Should the deletion fail, it is tried again after another delay.
                *since = now;
                self.actions.push(IdentityAction::Delete {
                    id,
                    uid: fact.uid.clone(),
                    resource_version: fact.resource_version.clone(),
                });
            }
        }
    }

    /// Identities to export or retract since the last call: name, and the object if it is still there.
    pub(crate) fn take_dirty(&mut self) -> BTreeSet<Name> {
        std::mem::take(&mut self.dirty)
    }

    /// Looks at the identities of a namespace again, whose part in the mesh has changed.
    ///
    /// Rare enough to look at all of them rather than to index them by namespace.
    pub(crate) fn namespace_changed(&mut self, namespace: &str) {
        let of_namespace = |fact: &&IdentityFact| {
            fact.labels.as_ref().is_some_and(|labels| labels.k8s(Labels::NAMESPACE) == Some(namespace))
        };
        self.dirty.extend(self.table.values().filter(of_namespace).map(|fact| fact.name.clone()));
    }

    pub(crate) fn take_changed(&mut self) -> Vec<LabelSet> {
        std::mem::take(&mut self.changed)
    }

    pub(crate) fn take_actions(&mut self) -> Vec<IdentityAction> {
        std::mem::take(&mut self.actions)
    }

    pub(crate) fn take_unassigned(&mut self) -> Vec<Unassigned> {
        std::mem::take(&mut self.unassigned)
    }

    pub(crate) fn get(&self, name: &Name) -> Option<&IdentityFact> {
        self.table.get(name)
    }

    pub(crate) fn in_range(&self, id: u32) -> bool {
        self.range.contains(&id)
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.table.is_synced()
    }

    /// Sets that wait for an object that has been asked for.
    pub(crate) fn requested(&self) -> HashSet<LabelSet> {
        self.taken.values().filter_map(|taken| taken.requested_for.clone()).collect()
    }

    /// Whether a set still waits for an object that has been asked for.
    pub(crate) fn is_requested(&self, labels: &LabelSet) -> bool {
        self.sets
            .get(labels)
            .is_some_and(|state| state.progress == Progress::Requested && state.ids.is_empty())
    }

    /// Pods whose label set has no number.
    pub(crate) fn pods_without(&self) -> usize {
        self.missing.iter().filter_map(|labels| self.sets.get(labels)).map(|state| state.users).sum()
    }

    fn note_missing(&mut self, labels: &LabelSet) {
        if self.sets.get(labels).is_some_and(|state| state.users > 0 && state.ids.is_empty()) {
            self.missing.insert(Arc::clone(labels));
        } else {
            self.missing.remove(labels);
        }
    }

    fn learn(&mut self, fact: &IdentityFact) {
        let Some(id) = fact.id.filter(|id| self.range.contains(id)) else { return };
        self.taken.entry(id).or_default().objects += 1;
        if let Some(labels) = &fact.labels {
            self.sets.entry(Arc::clone(labels)).or_default().ids.insert(id);
            self.note_missing(labels);
            self.changed.push(Arc::clone(labels));
        }
    }

    fn forget(&mut self, fact: &IdentityFact) {
        self.unused.remove(&fact.name);
        let Some(id) = fact.id.filter(|id| self.range.contains(id)) else { return };
        if let Some(taken) = self.taken.get_mut(&id) {
            taken.objects = taken.objects.saturating_sub(1);
        }
        self.free_if_unused(id);
        if let Some(labels) = &fact.labels {
            if let Some(state) = self.sets.get_mut(labels) {
                state.ids.remove(&id);
            }
            self.note_missing(labels);
            self.changed.push(Arc::clone(labels));
            self.request_if_missing(labels);
            self.drop_if_empty(labels);
        }
        self.feed_the_starved();
    }

    /// An object of this number is known: whoever has asked for it has an answer, if not the wanted one.
    fn settle(&mut self, id: u32) {
        let Some(labels) = self.taken.get_mut(&id).and_then(|taken| taken.requested_for.take()) else {
            return;
        };
        if let Some(state) = self.sets.get_mut(&labels) {
            state.progress = Progress::Idle;
        }
        self.request_if_missing(&labels);
        self.drop_if_empty(&labels);
    }

    fn request_if_missing(&mut self, labels: &LabelSet) {
        let Some(state) = self.sets.get(labels) else { return };
        let missing = state.users > 0 && state.ids.is_empty() && state.progress == Progress::Idle;
        // Before the first list is complete the set may well have its number already.
        if !missing || !self.allocates || !self.table.is_synced() {
            return;
        }
        let id = self.free_number(labels);
        let Some(state) = self.sets.get_mut(labels) else { return };
        match id {
            Some(id) => {
                state.progress = Progress::Requested;
                self.taken.entry(id).or_default().requested_for = Some(Arc::clone(labels));
                self.actions.push(IdentityAction::Create { id, labels: Arc::clone(labels) });
            }
            None => {
                state.progress = Progress::Starved;
                self.starved.insert(Arc::clone(labels));
                self.unassigned.push(Unassigned {
                    labels: Arc::clone(labels),
                    finding: Finding::new(
                        Reason::IdentitiesExhausted,
                        format!(
                            "all {} identities of this cluster are in use, so the pod is not exported: \
                             give pods fewer distinct label sets",
                            self.capacity()
                        ),
                    ),
                });
            }
        }
    }

    /// Asks for whatever is missing, once the first list is complete.
    fn request_all_missing(&mut self) {
        let missing: Vec<LabelSet> = self
            .sets
            .iter()
            .filter(|(_, state)| state.ids.is_empty())
            .map(|(labels, _)| Arc::clone(labels))
            .collect();
        for labels in missing {
            self.request_if_missing(&labels);
        }
    }

    /// The number the labels' hash says, or the next free one.
    fn free_number(&self, labels: &Labels) -> Option<u32> {
        let capacity = self.capacity();
        if self.taken.len() >= capacity as usize {
            return None;
        }
        let digest = Sha256::digest(labels.to_string());
        let hash = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
        let first = hash % capacity;
        (0..capacity)
            .map(|step| self.range.start() + (first + step) % capacity)
            .find(|id| !self.taken.contains_key(id))
    }

    fn capacity(&self) -> u32 {
        self.range.end() - self.range.start() + 1
    }

    fn free_if_unused(&mut self, id: u32) {
        if self.taken.get(&id).is_some_and(|taken| taken.objects == 0 && taken.requested_for.is_none()) {
            self.taken.remove(&id);
        }
    }

    fn feed_the_starved(&mut self) {
        if self.starved.is_empty() || self.taken.len() >= self.capacity() as usize {
            return;
        }
        for labels in std::mem::take(&mut self.starved) {
            if let Some(state) = self.sets.get_mut(&labels) {
                state.progress = Progress::Idle;
            }
            self.request_if_missing(&labels);
        }
    }

    fn drop_if_empty(&mut self, labels: &LabelSet) {
        let is_empty = |state: &SetState| {
            state.users == 0 && state.ids.is_empty() && state.progress != Progress::Requested
        };
        if self.sets.get(labels).is_some_and(is_empty) {
            self.sets.remove(labels);
        }
    }
}
