//! The data itself: keys with their versions, and the log of commits. No locks, no watchers.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::event::{Commit, Event, KeyValue, Mirrored, Mutation, Revision};

/// What every commit costs beside its events: the allocation, its two counters and its place in the log.
const COMMIT_BYTES: usize = size_of::<Commit>() + 3 * size_of::<usize>();
/// What every event costs beside key and value.
const EVENT_BYTES: usize = size_of::<Event>() + KEY_VALUE_BYTES;
/// A `KeyValue` behind its `Arc`.
const KEY_VALUE_BYTES: usize = size_of::<KeyValue>() + 2 * size_of::<usize>();

/// Keys in order, each with the versions that some readable revision needs.
#[derive(Debug)]
pub(super) struct Table {
    slots: BTreeMap<Bytes, Slot>,
    log: VecDeque<Arc<Commit>>,
    revision: Revision,
    /// The oldest readable revision.
    compacted: Revision,
    /// Every commit after this revision is in the log.
    log_floor: Revision,
    history_bytes: usize,
    live_keys: usize,
    live_bytes: usize,
}

/// One key. Most have no older version, so that costs them one word.
#[derive(Debug)]
struct Slot {
    head: Arc<KeyValue>,
    /// Superseded versions, oldest first.
    #[expect(clippy::box_collection, reason = "most keys have none: one word for them instead of four")]
    older: Option<Box<VecDeque<Arc<KeyValue>>>>,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            slots: BTreeMap::new(),
            log: VecDeque::new(),
            revision: Revision::INITIAL,
            compacted: Revision::default(),
            log_floor: Revision::default(),
            history_bytes: 0,
            live_keys: 0,
            live_bytes: 0,
        }
    }

    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    /// The oldest readable revision; 0 while nothing was ever compacted.
    pub(super) fn compacted(&self) -> Revision {
        self.compacted
    }

    /// Watchers can be served from the revision after this one.
    pub(super) fn log_floor(&self) -> Revision {
        self.log_floor
    }

    pub(super) fn history_bytes(&self) -> usize {
        self.history_bytes
    }

    pub(super) fn live_keys(&self) -> usize {
        self.live_keys
    }

    pub(super) fn live_bytes(&self) -> usize {
        self.live_bytes
    }

    /// Makes all changes at the next revision; none if nothing changes. Of several changes to one key the last counts.
    pub(super) fn apply(&mut self, mutations: Vec<Mutation>) -> Option<Revision> {
        let mutations = if mutations.len() > 1 { last_per_key(mutations, Mutation::key) } else { mutations };
        let revision = self.revision.next();
        let mut events = Vec::with_capacity(mutations.len());
        for mutation in mutations {
            events.extend(match mutation {
                Mutation::Put { key, value, lease } => Some(self.put(revision, key, value, lease, None)),
                Mutation::Delete { key } => self.delete(revision, &key),
            });
        }
        self.commit(revision, events)
    }

    /// Repeats another store's commit. `revision` must be above the current one (checked by the caller).
    pub(super) fn apply_at(&mut self, revision: Revision, changes: Vec<Mirrored>) -> Option<Revision> {
        let changes = last_per_key(changes, |change| match change {
            Mirrored::Put(kv) => &kv.key,
            Mirrored::Delete { key } => key,
        });
        let mut events = Vec::with_capacity(changes.len());
        for change in changes {
            events.extend(match change {
                Mirrored::Put(KeyValue { key, value, create_revision, version, lease, .. }) => {
                    Some(self.put(revision, key, value, lease, Some((create_revision, version.max(1)))))
                }
                Mirrored::Delete { key } => self.delete(revision, &key),
            });
        }
        let committed = self.commit(revision, events);
        self.revision = revision;
        committed
    }

    /// Raises the revision without a change.
    pub(super) fn advance(&mut self, revision: Revision) {
        self.revision = self.revision.max(revision);
    }

    /// Replaces everything by what another store held at `revision`. What led there is unknown, so the log is empty.
    pub(super) fn reset(&mut self, revision: Revision, kvs: Vec<KeyValue>) {
        self.slots.clear();
        self.log.clear();
        (self.history_bytes, self.live_keys, self.live_bytes) = (0, 0, 0);
        (self.revision, self.compacted, self.log_floor) = (revision, revision, revision);
        for kv in kvs {
            let key = kv.key.clone();
            self.live_keys += 1;
            self.live_bytes += live_cost(&kv);
            if let Some(twice) = self.slots.insert(key, Slot { head: Arc::new(kv), older: None }) {
                self.live_keys -= 1;
                self.live_bytes -= live_cost(&twice.head);
            }
        }
    }

    /// Declares everything before `revision` unreadable. The memory is given back by [`Table::trim`].
    pub(super) fn compact(&mut self, revision: Revision) {
        self.compacted = self.compacted.max(revision);
        self.log_floor = self.log_floor.max(revision.previous());
    }

    /// Compacts until the history fits, but keeps the newest commit; at most `budget` commits at a time.
    pub(super) fn compact_to_fit(&mut self, history_bytes: usize, budget: usize) {
        for _ in 0..budget {
            if self.history_bytes <= history_bytes || self.log.len() < 2 {
                return;
            }
            let next = self.log[1].revision;
            self.compact(next);
            self.trim(1);
        }
    }

    /// Forgets up to `budget` compacted commits; true if there may be more.
    pub(super) fn trim(&mut self, budget: usize) -> bool {
        for _ in 0..budget {
            if self.log.front().is_none_or(|commit| commit.revision > self.log_floor) {
                return false;
            }
            if let Some(commit) = self.log.pop_front() {
                self.history_bytes -= commit.cost;
                for event in &commit.events {
                    self.forget_versions_before(&event.kv);
                }
            }
        }
        true
    }

    /// The key as it was at `revision`, which must be readable.
    pub(super) fn key_at(&self, key: &[u8], revision: Revision) -> Option<&Arc<KeyValue>> {
        self.slots.get(key)?.at(revision)
    }

    /// The keys within `bounds` as they were at `revision`, which must be readable. Yields a key without a version
    /// for every slot that is invisible there, so that callers can bound the work.
    pub(super) fn scan<'a>(
        &'a self,
        bounds: (std::ops::Bound<&'a [u8]>, std::ops::Bound<&'a [u8]>),
        revision: Revision,
    ) -> impl Iterator<Item = (&'a Bytes, Option<&'a Arc<KeyValue>>)> {
        self.slots.range::<[u8], _>(bounds).map(move |(key, slot)| (key, slot.at(revision)))
    }

    /// The commits after `revision`, oldest first. Complete only from `log_floor` on.
    pub(super) fn commits_after(&self, revision: Revision) -> impl Iterator<Item = &Arc<Commit>> {
        let first = self.log.partition_point(|commit| commit.revision <= revision);
        self.log.range(first..)
    }

    fn put(
        &mut self,
        revision: Revision,
        key: Bytes,
        value: Bytes,
        lease: i64,
        mirrored: Option<(Revision, i64)>,
    ) -> Event {
        let Some(slot) = self.slots.get_mut(&key) else {
            let (create_revision, version) = mirrored.unwrap_or((revision, 1));
            let kv =
                KeyValue { key: key.clone(), value, create_revision, mod_revision: revision, version, lease };
            self.live_keys += 1;
            self.live_bytes += live_cost(&kv);
            let kv = Arc::new(kv);
            self.slots.insert(key, Slot { head: kv.clone(), older: None });
            return Event { kv, prev: None };
        };
        let old = &slot.head;
        let (create_revision, version) = mirrored.unwrap_or(if old.is_tombstone() {
            (revision, 1)
        } else {
            (old.create_revision, old.version + 1)
        });
        // The slot's own key, so that all versions of a key share its bytes.
        let kv =
            KeyValue { key: old.key.clone(), value, create_revision, mod_revision: revision, version, lease };
        if old.is_tombstone() {
            self.live_keys += 1;
        } else {
            self.live_bytes -= live_cost(old);
        }
        self.live_bytes += live_cost(&kv);
        slot.supersede(Arc::new(kv))
    }

    fn delete(&mut self, revision: Revision, key: &[u8]) -> Option<Event> {
        let slot = self.slots.get_mut(key).filter(|slot| !slot.head.is_tombstone())?;
        self.live_keys -= 1;
        self.live_bytes -= live_cost(&slot.head);
        let tombstone =
            KeyValue { key: slot.head.key.clone(), mod_revision: revision, ..KeyValue::default() };
        Some(slot.supersede(Arc::new(tombstone)))
    }

    /// What history costs is what would not be held without it: the log, the superseded values, the tombstones.
    fn commit(&mut self, revision: Revision, events: Vec<Event>) -> Option<Revision> {
        if events.is_empty() {
            return None;
        }
        let superseded = |event: &Event| event.prev.as_ref().map_or(0, |prev| prev.value.len());
        let cost = COMMIT_BYTES
            + events.iter().map(|event| EVENT_BYTES + event.kv.key.len() + superseded(event)).sum::<usize>();
        self.history_bytes += cost;
        self.revision = revision;
        self.log.push_back(Arc::new(Commit { revision, events: events.into(), cost }));
        Some(revision)
    }

    /// The commit that made `kv` is no longer in the log: no readable revision shows what it superseded.
    fn forget_versions_before(&mut self, kv: &KeyValue) {
        let Some(slot) = self.slots.get_mut(&kv.key) else { return };
        if let Some(older) = &mut slot.older {
            while older.front().is_some_and(|version| version.mod_revision < kv.mod_revision) {
                older.pop_front();
            }
            // A tombstone that nothing precedes shows the same as no version at all.
            if older
                .front()
                .is_some_and(|version| version.mod_revision == kv.mod_revision && version.is_tombstone())
            {
                older.pop_front();
            }
            if older.is_empty() {
                slot.older = None;
            }
        }
        if slot.older.is_none() && slot.head.is_tombstone() && slot.head.mod_revision <= kv.mod_revision {
            self.slots.remove(&kv.key);
        }
    }
}

impl Slot {
    fn supersede(&mut self, head: Arc<KeyValue>) -> Event {
        let old = std::mem::replace(&mut self.head, head);
        let prev = (!old.is_tombstone()).then(|| old.clone());
        self.older.get_or_insert_default().push_back(old);
        Event { kv: self.head.clone(), prev }
    }

    fn at(&self, revision: Revision) -> Option<&Arc<KeyValue>> {
        let version = if self.head.mod_revision <= revision {
            &self.head
        } else {
            let older = self.older.as_deref()?;
            let after = older.partition_point(|version| version.mod_revision <= revision);
            older.get(after.checked_sub(1)?)?
        };
        (!version.is_tombstone()).then_some(version)
    }
}

fn live_cost(kv: &KeyValue) -> usize {
    size_of::<Slot>() + size_of::<Bytes>() + KEY_VALUE_BYTES + kv.key.len() + kv.value.len()
}

/// A commit changes a key once: later changes replace earlier ones.
fn last_per_key<T>(mut changes: Vec<T>, key: impl Fn(&T) -> &Bytes) -> Vec<T> {
    let mut seen = HashSet::with_capacity(changes.len());
    let keep: Vec<bool> = changes.iter().rev().map(|change| seen.insert(key(change).clone())).collect();
    if seen.len() < changes.len() {
        let mut keep = keep.into_iter().rev();
        changes.retain(|_| keep.next().unwrap_or(true));
    }
    changes
}
