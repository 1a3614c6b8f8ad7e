//! Reading keys: now, or as they were at an older revision.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::event::{KeyValue, Revision};
use super::key_range::KeyRange;
use super::store::{MemoryStore, StoreError};
use super::table::Table;

/// How many keys are visited under one hold of the lock, so that a long range does not hold up writers.
const KEYS_PER_HOLD: usize = 2048;
/// How many readers' positions in a paginated list are remembered.
const COUNTS_KEPT: usize = 256;

/// What to read. The answer to each combination of options is etcd's.
#[derive(Clone, Debug)]
pub struct RangeRequest {
    /// Which keys.
    pub range: KeyRange,
    /// As they were at this revision; now if `None`.
    pub revision: Option<Revision>,
    /// At most so many keys; all if 0.
    pub limit: usize,
    /// The count alone.
    pub count_only: bool,
    /// By what to sort.
    pub sort_target: SortTarget,
    /// In which order; `None` leaves them in the order of their keys (or ascending, for another target).
    pub sort_order: Option<SortOrder>,
    /// Only keys last changed within these.
    pub mod_revisions: RevisionBounds,
    /// Only keys made within these.
    pub create_revisions: RevisionBounds,
}

impl RangeRequest {
    /// All of `range`, now, in the order of the keys.
    #[must_use]
    pub fn new(range: KeyRange) -> Self {
        Self {
            range,
            revision: None,
            limit: 0,
            count_only: false,
            sort_target: SortTarget::Key,
            sort_order: None,
            mod_revisions: RevisionBounds::default(),
            create_revisions: RevisionBounds::default(),
        }
    }
}

/// What keys are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of KeyValue")]
pub enum SortTarget {
    Key,
    Version,
    CreateRevision,
    ModRevision,
    Value,
}

/// Lowest first or highest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum SortOrder {
    Ascending,
    Descending,
}

/// Inclusive bounds, each optional.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RevisionBounds {
    /// The lowest that passes.
    pub min: Option<Revision>,
    /// The highest that passes.
    pub max: Option<Revision>,
}

impl RevisionBounds {
    fn is_unbounded(self) -> bool {
        self == Self::default()
    }

    fn admit(self, revision: Revision) -> bool {
        self.min.is_none_or(|min| revision >= min) && self.max.is_none_or(|max| revision <= max)
    }
}

/// What was read.
#[derive(Clone, Debug)]
pub struct RangeResponse {
    /// The store's newest revision when it was read (not the one that was asked for).
    pub revision: Revision,
    /// The keys; shared, not copied.
    pub kvs: Vec<Arc<KeyValue>>,
    /// How many keys the range holds, whatever limit and bounds on revisions leave of them.
    pub count: usize,
    /// Whether the limit left keys out.
    pub more: bool,
}

impl MemoryStore {
    /// Reads keys. All of them as they were at one moment, however long it takes.
    ///
    /// # Errors
    /// [`StoreError::Compacted`], [`StoreError::Future`] if the revision cannot be read.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        let bounded = !(request.mod_revisions.is_unbounded() && request.create_revisions.is_unbounded());
        // Sorting and bounds need all keys first. A target without an order sorts just what the limit left: etcd's way.
        let fetch_all = request.limit == 0 || request.sort_order.is_some() || bounded;
        let fetch = match () {
            () if request.count_only => 0,
            () if fetch_all => usize::MAX,
            () => request.limit.saturating_add(1),
        };
        let Fetched { revision, mut kvs, count } = self.fetch(request, fetch)?;

        if bounded {
            kvs.retain(|kv| {
                request.mod_revisions.admit(kv.mod_revision)
                    && request.create_revisions.admit(kv.create_revision)
            });
        }
        sort(&mut kvs, request.sort_target, request.sort_order);
        let more = request.limit > 0 && kvs.len() > request.limit;
        if more {
            kvs.truncate(request.limit);
        }
        Ok(RangeResponse { revision, kvs, count, more })
    }

    fn fetch(&self, request: &RangeRequest, limit: usize) -> Result<Fetched, StoreError> {
        let (at, mut fetched) = {
            let table = self.shared.read();
            let at = readable(&table, request.revision)?;
            (at, Fetched { revision: table.revision(), kvs: Vec::new(), count: 0 })
        };
        if request.range.is_empty() {
            return Ok(fetched);
        }
        let remembered = self.shared.counts.take(&request.range, at);
        let mut scan = Scan { limit, count: remembered.is_none(), after: None };
        loop {
            let table = self.shared.read();
            if at < table.compacted() {
                drop(table);
                return match request.revision {
                    Some(_) => {
                        Err(StoreError::Compacted { compact_revision: self.shared.read().compacted() })
                    }
                    // History is so short that "now" was compacted meanwhile: read it in one go.
                    None => Ok(self.fetch_in_one_hold(&request.range, limit)),
                };
            }
            if !scan.step(&table, &request.range, at, KEYS_PER_HOLD, &mut fetched) {
                break;
            }
        }
        fetched.count = remembered.unwrap_or(fetched.count);
        if limit < fetched.count && limit > 1 {
            // The last key was fetched to see that there is more; the next page starts with it.
            let page = limit - 1;
            if let Some(last) = fetched.kvs.get(page - 1) {
                self.shared.counts.remember(&request.range, at, &last.key, fetched.count - page);
            }
        }
        Ok(fetched)
    }

    fn fetch_in_one_hold(&self, range: &KeyRange, limit: usize) -> Fetched {
        let table = self.shared.read();
        let mut fetched = Fetched { revision: table.revision(), kvs: Vec::new(), count: 0 };
        let mut scan = Scan { limit, count: true, after: None };
        scan.step(&table, range, table.revision(), usize::MAX, &mut fetched);
        fetched
    }
}

struct Fetched {
    revision: Revision,
    kvs: Vec<Arc<KeyValue>>,
    count: usize,
}

/// A walk over a range that can be interrupted.
struct Scan {
    limit: usize,
    /// Whether to go on to the end for the sake of the count.
    count: bool,
    after: Option<Bytes>,
}

impl Scan {
    /// Visits up to `budget` keys; false when the walk is over.
    fn step(
        &mut self,
        table: &Table,
        range: &KeyRange,
        at: Revision,
        budget: usize,
        into: &mut Fetched,
    ) -> bool {
        let mut last: Option<&Bytes> = None;
        let after = self.after.clone();
        for (visited, (key, version)) in table.scan(range.bounds_after(after.as_deref()), at).enumerate() {
            if visited == budget {
                self.after = last.cloned();
                return true;
            }
            last = Some(key);
            let Some(kv) = version else { continue };
            into.count += 1;
            if into.kvs.len() < self.limit {
                into.kvs.push(kv.clone());
            } else if !self.count {
                return false;
            }
        }
        false
    }
}

fn readable(table: &Table, revision: Option<Revision>) -> Result<Revision, StoreError> {
    let Some(revision) = revision else { return Ok(table.revision()) };
    if revision > table.revision() {
        Err(StoreError::Future { current: table.revision() })
    } else if revision < table.compacted() {
        Err(StoreError::Compacted { compact_revision: table.compacted() })
    } else {
        Ok(revision)
    }
}

fn sort(kvs: &mut [Arc<KeyValue>], target: SortTarget, order: Option<SortOrder>) {
    let compare = |a: &Arc<KeyValue>, b: &Arc<KeyValue>| match target {
        SortTarget::Key => a.key.cmp(&b.key),
        SortTarget::Version => a.version.cmp(&b.version),
        SortTarget::CreateRevision => a.create_revision.cmp(&b.create_revision),
        SortTarget::ModRevision => a.mod_revision.cmp(&b.mod_revision),
        SortTarget::Value => a.value.cmp(&b.value),
    };
    match order {
        Some(SortOrder::Descending) => kvs.sort_by(|a, b| compare(b, a)),
        _ if target == SortTarget::Key => {} // as they come
        _ => kvs.sort_by(compare),
    }
}

/// Where paginated lists go on, and how many keys remain there: a page then costs what it returns, while counting the
/// rest of the range for each would make a list quadratic.
#[derive(Debug, Default)]
pub(super) struct CountCache(Mutex<VecDeque<Remaining>>);

#[derive(Debug)]
struct Remaining {
    range: KeyRange,
    at: Revision,
    count: usize,
}

impl CountCache {
    fn take(&self, range: &KeyRange, at: Revision) -> Option<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().position(|remaining| remaining.at == at && remaining.range == *range)?;
        kept.remove(found).map(|remaining| remaining.count)
    }

    fn remember(&self, range: &KeyRange, at: Revision, last: &[u8], count: usize) {
        let next = [last, &[0]].concat();
        let remaining = Remaining { range: range.with_start(next.into()), at, count };
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == COUNTS_KEPT {
            kept.pop_front();
        }
        kept.push_back(remaining);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Limits, StoreId};

    #[test]
    fn a_paginated_list_shows_one_moment_and_counts_what_remains() {
        let store = MemoryStore::new(StoreId(1), Limits::default());
        for key in 0..10_000 {
            store.put(format!("k/{key:05}"), "v");
        }
        let pinned = store.revision();
        store.put("k/00000-later", "x");
        store.delete("k/09999");

        let mut request =
            RangeRequest { revision: Some(pinned), limit: 256, ..RangeRequest::new(KeyRange::prefix("k/")) };
        let mut seen = 0;
        loop {
            let page = store.range(&request).unwrap();
            assert_eq!(page.count, 10_000 - seen);
            seen += page.kvs.len();
            if !page.more {
                break;
            }
            let next = [&page.kvs.last().unwrap().key[..], &[0]].concat();
            request.range = request.range.with_start(next.into());
        }
        assert_eq!(seen, 10_000);
    }
}
