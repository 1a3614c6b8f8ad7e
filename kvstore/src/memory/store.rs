//! The store's handle: writing, compaction, mirroring. Reading is in `range`, following in `watch`.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::dispatch::Hub;
use super::event::{KeyValue, Mirrored, Mutation, Revision, StoreId};
use super::range::CountCache;
use super::table::Table;

/// How many compacted commits are forgotten under one hold of the lock.
const TRIM_BATCH: usize = 1024;
/// How many commits one write may push out of history: more than one, so that a shrunken bound is reached.
const EVICTED_PER_WRITE: usize = 64;

/// A store. Clones are handles to the same one; it lives as long as any handle or watcher.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    pub(super) shared: Arc<Shared>,
}

/// Bounds on what a store keeps beyond the present state.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of history (superseded values, tombstones and the log). Beyond it the oldest revisions are compacted; the
    /// newest commit always stays. Default 64 MiB.
    pub history_bytes: usize,
    /// How many pending commits are indexed per watched range. A watcher further behind searches the whole log for
    /// what concerns it, which is slower but loses nothing. Default 16,384, of 16 bytes each.
    pub feed_commits: usize,
    /// Bytes of events after which a watcher's batch ends. A commit is never split, so one larger than this makes a
    /// batch of its own. Default 256 KiB.
    pub batch_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { history_bytes: 64 << 20, feed_commits: 16 << 10, batch_bytes: 256 << 10 }
    }
}

/// What a store holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// The newest revision.
    pub revision: Revision,
    /// The oldest readable revision, 0 while everything is.
    pub compact_revision: Revision,
    /// Keys that exist.
    pub keys: usize,
    /// Bytes that they take, bookkeeping included.
    pub live_bytes: usize,
    /// Bytes of history, see [`Limits::history_bytes`].
    pub history_bytes: usize,
    /// Watchers that exist.
    pub watchers: usize,
}

/// Why a store did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The revision is no longer readable.
    #[error("the revision is compacted: read the present state, or ask for {compact_revision} or newer")]
    Compacted {
        /// The oldest revision that can be had.
        compact_revision: Revision,
    },
    /// The revision does not exist yet.
    #[error("the revision does not exist yet: the newest is {current}")]
    Future {
        /// The newest revision.
        current: Revision,
    },
    /// A mirrored commit that is not newer than what the store has.
    #[error("the store is at revision {current} already: load a snapshot to start over")]
    NotNewer {
        /// The newest revision.
        current: Revision,
    },
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: StoreId,
    pub(super) limits: Limits,
    table: RwLock<Table>,
    pub(super) hub: Arc<Hub>,
    pub(super) counts: CountCache,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new(id: StoreId, limits: Limits) -> Self {
        let table = RwLock::new(Table::new());
        Self {
            shared: Arc::new(Shared {
                id,
                limits,
                table,
                hub: Arc::default(),
                counts: CountCache::default(),
            }),
        }
    }

    /// The store's name, the same for all of its life.
    #[must_use]
    pub fn id(&self) -> StoreId {
        self.shared.id
    }

    /// The newest revision.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.shared.read().revision()
    }

    /// The key as it is now.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<Arc<KeyValue>> {
        let table = self.shared.read();
        table.key_at(key, table.revision()).cloned()
    }

    /// Sets a key, without a lease. A value that is already there makes a revision too.
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Revision {
        self.apply(vec![Mutation::put(key, value)])
    }

    /// Removes a key. `None` if there was none, which makes no revision.
    pub fn delete(&self, key: impl Into<Bytes>) -> Option<Revision> {
        self.write(|table| table.apply(vec![Mutation::delete(key)]))
    }

    /// Makes all changes at once, at one revision; watchers get them together. Of several changes to one key the last
    /// counts. Returns the store's revision afterwards, which is the old one if nothing changed.
    pub fn apply(&self, mutations: Vec<Mutation>) -> Revision {
        self.write(|table| {
            table.apply(mutations);
            table.revision()
        })
    }

    /// Repeats a commit of the store that this one mirrors, with the revisions that it has there.
    ///
    /// # Errors
    /// [`StoreError::NotNewer`] if the store is at `revision` or beyond; nothing is changed then.
    pub fn apply_at(&self, revision: Revision, changes: Vec<Mirrored>) -> Result<(), StoreError> {
        self.write(|table| {
            newer(table, revision)?;
            table.apply_at(revision, changes);
            Ok(())
        })
    }

    /// Records that the mirrored store has come to `revision` without a change to the keys mirrored here. An older
    /// revision is ignored.
    pub fn advance_to(&self, revision: Revision) {
        self.write(|table| table.advance(revision));
    }

    /// Replaces the content by what the mirrored store held at `revision`. Watchers that have not seen everything up
    /// to that revision are cancelled as compacted, since what happened in between is unknown.
    ///
    /// # Errors
    /// [`StoreError::NotNewer`] if the store is beyond `revision`: revisions never go back. (A mirrored store that lost
    /// revisions is another store and wants a new `MemoryStore` with its id.)
    pub fn load_snapshot(&self, revision: Revision, kvs: Vec<KeyValue>) -> Result<(), StoreError> {
        self.write(|table| {
            newer(table, revision.next())?;
            table.reset(revision, kvs);
            Ok(())
        })
    }

    /// Makes everything before `revision` unreadable and frees what only that needed.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if that is done already, [`StoreError::Future`] if the revision does not exist.
    pub fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        self.write(|table| {
            if revision <= table.compacted() {
                return Err(StoreError::Compacted { compact_revision: table.compacted() });
            }
            if revision > table.revision() {
                return Err(StoreError::Future { current: table.revision() });
            }
            table.compact(revision);
            Ok(())
        })?;
        // In steps, so that readers and writers get their turn.
        while self.shared.write().trim(TRIM_BATCH) {}
        Ok(())
    }

    /// What the store holds.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let watchers = self.shared.hub.watchers();
        let table = self.shared.read();
        Stats {
            revision: table.revision(),
            compact_revision: table.compacted(),
            keys: table.live_keys(),
            live_bytes: table.live_bytes(),
            history_bytes: table.history_bytes(),
            watchers,
        }
    }

    fn write<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let result = {
            let mut table = self.shared.write();
            let result = change(&mut table);
            table.compact_to_fit(self.shared.limits.history_bytes, EVICTED_PER_WRITE);
            result
        };
        self.shared.hub.notify();
        result
    }
}

impl Shared {
    // A panic while the lock is held would be a defect of this module. The table stays usable, so readers go on.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.hub.stop();
    }
}

fn newer(table: &Table, revision: Revision) -> Result<(), StoreError> {
    if revision > table.revision() { Ok(()) } else { Err(StoreError::NotNewer { current: table.revision() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{KeyRange, RangeRequest};

    fn store() -> MemoryStore {
        MemoryStore::new(StoreId(7), Limits::default())
    }

    #[test]
    fn a_key_remembers_when_it_was_made_and_how_often_it_was_put() {
        let store = store();
        let created = store.put("k", "1");
        assert_eq!(created, Revision(2));
        let changed = store.put("k", "2");
        let kv = store.get(b"k").unwrap();
        assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (created, changed, 2));

        let deleted = store.delete("k").unwrap();
        assert_eq!(deleted, Revision(4));
        assert_eq!(store.delete("k"), None, "deleting what is absent is no change");
        assert_eq!(store.revision(), deleted);

        store.put("k", "3");
        let kv = store.get(b"k").unwrap();
        assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (Revision(5), Revision(5), 1));
    }

    #[test]
    fn the_last_change_to_a_key_in_a_batch_counts() {
        let store = store();
        store.put("gone", "x");
        let revision = store.apply(vec![
            Mutation::put("a", "1"),
            Mutation::delete("gone"),
            Mutation::put("a", "2"),
            Mutation::put("gone", "y"),
        ]);
        assert_eq!(revision, Revision(3));
        assert_eq!(store.get(b"a").unwrap().value, "2");
        assert_eq!(store.get(b"a").unwrap().version, 1);
        assert_eq!(store.get(b"gone").unwrap().version, 2);
    }

    #[test]
    fn old_revisions_stay_readable_until_they_are_compacted() {
        let store = store();
        let first = store.put("k", "1");
        let second = store.put("k", "2");
        store.delete("k");
        let at = |revision| {
            let request = RangeRequest { revision: Some(revision), ..RangeRequest::new(KeyRange::key("k")) };
            store.range(&request).map(|response| response.kvs.first().map(|kv| kv.value.clone()))
        };
        assert_eq!(at(first).unwrap().unwrap(), "1");
        assert_eq!(at(second).unwrap().unwrap(), "2");
        assert_eq!(at(Revision(4)).unwrap(), None);
        assert_eq!(at(Revision(5)), Err(StoreError::Future { current: Revision(4) }));

        store.compact(second).unwrap();
        assert_eq!(at(first), Err(StoreError::Compacted { compact_revision: second }));
        assert_eq!(at(second).unwrap().unwrap(), "2");
        assert_eq!(store.compact(second), Err(StoreError::Compacted { compact_revision: second }));
        assert_eq!(store.compact(Revision(9)), Err(StoreError::Future { current: Revision(4) }));
    }

    #[test]
    fn history_stays_within_its_bound_and_frees_what_it_forgets() {
        let limits = Limits { history_bytes: 64 << 10, ..Limits::default() };
        let store = MemoryStore::new(StoreId(7), limits);
        for round in 0..10_000 {
            store.put("hot", format!("{round:0>100}"));
            store.put(format!("short-lived/{round}"), "x");
            store.delete(format!("short-lived/{round}"));
        }
        let stats = store.stats();
        assert!(stats.history_bytes <= 64 << 10, "{stats:?}");
        assert!(stats.compact_revision > Revision(20_000), "{stats:?}");
        assert_eq!(stats.keys, 1);
        store.compact(store.revision()).unwrap();
        store.put("hot", "last");
        let slots = store
            .shared
            .read()
            .scan((std::ops::Bound::Unbounded, std::ops::Bound::Unbounded), Revision(1))
            .count();
        assert!(slots <= 2, "tombstones of compacted revisions are gone, {slots} slots remain");
    }

    #[test]
    fn bookkeeping_per_key_stays_small() {
        let store = store();
        for key in 0..1000 {
            store.put(format!("{key:04}"), "value");
        }
        let per_key = store.stats().live_bytes / 1000 - "0000value".len();
        assert!(per_key <= 176, "{per_key} bytes per key beside key and value");
    }

    #[test]
    fn a_mirror_shows_the_other_stores_revisions() {
        let store = store();
        let kv = |key: &'static str, create, modified, version| KeyValue {
            key: key.into(),
            value: "v".into(),
            create_revision: Revision(create),
            mod_revision: Revision(modified),
            version,
            lease: 9,
        };
        store.load_snapshot(Revision(100), vec![kv("a", 10, 40, 3), kv("b", 50, 50, 1)]).unwrap();
        assert_eq!(*store.get(b"a").unwrap(), kv("a", 10, 40, 3));
        assert_eq!(
            store.apply_at(Revision(100), vec![]),
            Err(StoreError::NotNewer { current: Revision(100) })
        );
        let changes = vec![Mirrored::Put(kv("a", 10, 105, 4)), Mirrored::Delete { key: "b".into() }];
        store.apply_at(Revision(105), changes).unwrap();
        assert_eq!(*store.get(b"a").unwrap(), kv("a", 10, 105, 4));
        assert_eq!(store.get(b"b"), None);
        store.advance_to(Revision(110));
        assert_eq!(store.revision(), Revision(110));
        assert!(store.load_snapshot(Revision(109), vec![]).is_err());
    }
}
