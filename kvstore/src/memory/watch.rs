//! Following changes from a revision on.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::dispatch::{Feed, Pending};
use super::event::{Commit, Event, Revision};
use super::key_range::KeyRange;
use super::store::{MemoryStore, Shared, StoreError};

/// How many commits a watcher that lags takes from the log under one hold of its lock.
const COMMITS_PER_HOLD: usize = 512;

/// What to follow.
#[derive(Clone, Debug)]
pub struct WatchRequest {
    /// Which keys.
    pub range: KeyRange,
    /// The first revision to report, which may be past or future; the next one if `None`.
    pub start_revision: Option<Revision>,
    /// Leave puts out.
    pub no_put: bool,
    /// Leave deletions out.
    pub no_delete: bool,
}

impl WatchRequest {
    /// Everything in `range` from now on.
    #[must_use]
    pub const fn new(range: KeyRange) -> Self {
        Self { range, start_revision: None, no_put: false, no_delete: false }
    }
}

/// Events of one or more commits, in order. A commit's events are never spread over batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchBatch {
    /// The watcher has now seen everything of its range up to this revision.
    pub revision: Revision,
    /// The events, never none.
    pub events: Vec<Event>,
}

/// The watcher fell so far behind that history no longer has what it must report next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the watcher fell behind: list again, or watch from revision {compact_revision} and miss what was before"
)]
pub struct Canceled {
    /// The oldest revision that a new watcher may start from.
    pub compact_revision: Revision,
}

/// Reports every event of a range exactly once, in order, commits whole.
///
/// It holds a position, not events, so one that is not polled costs nothing but may be [`Canceled`] later.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
    feed: Arc<Feed>,
    /// Everything up to here was reported. Written by the watcher alone.
    cursor: Arc<AtomicI64>,
    no_put: bool,
    no_delete: bool,
}

impl MemoryStore {
    /// Follows a range.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if history does not reach back to the start revision.
    pub fn watch(&self, request: WatchRequest) -> Result<Watcher, StoreError> {
        let WatchRequest { range, start_revision, no_put, no_delete } = request;
        // Joined before the position is chosen: no commit can slip through in between.
        let feed = self.shared.hub.join(&self.shared, range);
        let (revision, log_floor) = {
            let table = self.shared.read();
            (table.revision(), table.log_floor())
        };
        let cursor = start_revision.map_or(revision, Revision::previous);
        let position = Arc::new(AtomicI64::new(cursor.0));
        let watcher = Watcher { shared: self.shared.clone(), feed, cursor: position, no_put, no_delete };
        if cursor < log_floor {
            return Err(StoreError::Compacted { compact_revision: log_floor.next() });
        }
        Ok(watcher)
    }
}

impl Watcher {
    /// Waits for the next events. May be dropped and called again at any time without losing any.
    ///
    /// # Errors
    /// [`Canceled`] if the watcher fell behind; it will not recover.
    pub async fn next(&mut self) -> Result<WatchBatch, Canceled> {
        let feed = self.feed.clone();
        loop {
            let mut changed = std::pin::pin!(feed.changed.notified());
            changed.as_mut().enable();
            match self.poll_pending()? {
                Progress::Events(batch) => return Ok(batch),
                // Catching up through the log may take long; others want to run too.
                Progress::Searched => tokio::task::yield_now().await,
                Progress::Idle => changed.await,
            }
        }
    }

    /// The next events if there are any now.
    ///
    /// # Errors
    /// [`Canceled`] if the watcher fell behind.
    pub fn try_next(&mut self) -> Result<Option<WatchBatch>, Canceled> {
        loop {
            match self.poll_pending()? {
                Progress::Events(batch) => return Ok(Some(batch)),
                Progress::Searched => {}
                Progress::Idle => return Ok(None),
            }
        }
    }

    /// Everything of the range up to this revision was reported. It rises with events, and without them when the watcher
    /// looks for more and finds none.
    #[must_use]
    pub fn revision(&self) -> Revision {
        Revision(self.cursor.load(Ordering::Relaxed))
    }

    /// Where the watcher is, for those who want to know while another task waits in [`Watcher::next`].
    #[must_use]
    pub fn position(&self) -> Position {
        Position { shared: self.shared.clone(), feed: self.feed.clone(), cursor: self.cursor.clone() }
    }

    /// The range it follows.
    #[must_use]
    pub fn range(&self) -> &KeyRange {
        &self.feed.range
    }

    fn poll_pending(&mut self) -> Result<Progress, Canceled> {
        let hub = &self.shared.hub;
        match hub.pending(&self.feed, self.revision(), self.shared.limits.batch_bytes) {
            Pending::Commits(commits) => Ok(self.report(&commits)),
            Pending::UpTo(revision) => {
                self.advance(revision);
                Ok(Progress::Idle)
            }
            Pending::Lost => self.catch_up(),
        }
    }

    /// Reads the log itself, for what the feed does not have (any more).
    fn catch_up(&mut self) -> Result<Progress, Canceled> {
        let (commits, reached) = {
            let table = self.shared.read();
            if self.revision() < table.log_floor() {
                return Err(Canceled { compact_revision: table.log_floor().next() });
            }
            let mut commits = Vec::new();
            let (mut bytes, mut seen, mut reached) = (0, 0, None);
            for commit in table.commits_after(self.revision()) {
                if seen == COMMITS_PER_HOLD || bytes >= self.shared.limits.batch_bytes {
                    break;
                }
                seen += 1;
                reached = Some(commit.revision);
                if commit.events.iter().any(|event| self.feed.range.contains(&event.kv.key)) {
                    bytes += commit.cost;
                    commits.push(commit.clone());
                }
            }
            (commits, reached.unwrap_or_else(|| table.revision()))
        };
        let progress = self.report(&commits);
        self.advance(reached);
        Ok(progress)
    }

    fn advance(&mut self, revision: Revision) {
        self.cursor.fetch_max(revision.0, Ordering::Relaxed);
    }

    fn report(&mut self, commits: &[Arc<Commit>]) -> Progress {
        let mut events = Vec::with_capacity(commits.len());
        for commit in commits {
            let wanted = |event: &&Event| {
                self.feed.range.contains(&event.kv.key)
                    && !(if event.is_delete() { self.no_delete } else { self.no_put })
            };
            events.extend(commit.events.iter().filter(wanted).cloned());
            self.advance(commit.revision);
        }
        if events.is_empty() {
            return Progress::Searched;
        }
        Progress::Events(WatchBatch { revision: self.revision(), events })
    }
}

/// Where a watcher is. Holding it keeps neither the watcher nor its subscription.
#[derive(Clone, Debug)]
pub struct Position {
    shared: Arc<Shared>,
    feed: Arc<Feed>,
    cursor: Arc<AtomicI64>,
}

impl Position {
    /// Up to this revision there is nothing of the watcher's range that it has not reported.
    #[must_use]
    pub fn synced_to(&self) -> Revision {
        let reported = Revision(self.cursor.load(Ordering::Relaxed));
        match self.shared.hub.pending(&self.feed, reported, 1) {
            Pending::UpTo(revision) => reported.max(revision),
            Pending::Commits(_) | Pending::Lost => reported,
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.hub.leave(&self.feed);
    }
}

enum Progress {
    Events(WatchBatch),
    /// Nothing that concerns the watcher in this part of the log; there may be more.
    Searched,
    Idle,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::memory::{Limits, Mutation, StoreId};

    fn store(limits: Limits) -> MemoryStore {
        MemoryStore::new(StoreId(1), limits)
    }

    fn watch(store: &MemoryStore, prefix: &'static str, start: i64) -> Watcher {
        let start_revision = (start > 0).then_some(Revision(start));
        store.watch(WatchRequest { start_revision, ..WatchRequest::new(KeyRange::prefix(prefix)) }).unwrap()
    }

    async fn next(watcher: &mut Watcher) -> Result<Vec<(i64, String)>, Canceled> {
        let batch = tokio::time::timeout(Duration::from_secs(20), watcher.next()).await.expect("an event");
        Ok(batch?
            .events
            .iter()
            .map(|event| (event.revision().0, String::from_utf8_lossy(&event.kv.key).into_owned()))
            .collect())
    }

    #[tokio::test]
    async fn a_watcher_sees_past_present_and_future() {
        let store = store(Limits::default());
        store.put("a/1", "x"); // 2
        let mut past = watch(&store, "a/", 1);
        let mut present = watch(&store, "a/", 0);
        let mut future = watch(&store, "a/", 5);
        store.put("b/1", "x"); // 3
        store.put("a/2", "x"); // 4
        store.delete("a/1"); // 5
        let mut seen = Vec::new();
        while seen.len() < 3 {
            seen.extend(next(&mut past).await.unwrap());
        }
        assert_eq!(seen, [(2, "a/1".into()), (4, "a/2".into()), (5, "a/1".into())]);
        assert_eq!(next(&mut future).await.unwrap(), [(5, "a/1".into())]);
        assert_eq!(next(&mut present).await.unwrap()[0], (4, "a/2".into()));
    }

    #[tokio::test]
    async fn a_commit_arrives_whole_even_beyond_the_batch_size() {
        let store = store(Limits { batch_bytes: 1, ..Limits::default() });
        let mut watcher = watch(&store, "a/", 1);
        let keys = (0..100).map(|key| Mutation::put(format!("a/{key:03}"), "x")).collect();
        store.apply(keys);
        store.put("a/next", "x");
        assert_eq!(next(&mut watcher).await.unwrap().len(), 100);
        assert_eq!(next(&mut watcher).await.unwrap(), [(3, "a/next".into())]);
    }

    #[tokio::test]
    async fn a_watcher_that_falls_behind_is_cancelled_and_an_idle_one_is_not() {
        let store = store(Limits { history_bytes: 16 << 10, feed_commits: 8, ..Limits::default() });
        let mut behind = watch(&store, "busy/", 0);
        let mut idle = watch(&store, "idle/", 0);
        let waiting = tokio::spawn(async move { next(&mut idle).await });
        for round in 0..1000 {
            let written = store.put(format!("busy/{}", round % 10), "x");
            while store.shared.hub.dispatched() < written {
                tokio::task::yield_now().await;
            }
        }
        let Canceled { compact_revision } = next(&mut behind).await.unwrap_err();
        assert_eq!(compact_revision, store.stats().compact_revision);
        // It has not been polled since; still nothing of its own was lost.
        store.put("idle/1", "x");
        assert_eq!(waiting.await.unwrap().unwrap(), [(1002, "idle/1".into())]);
        let compact_revision = store.stats().compact_revision;
        let from_compacted = WatchRequest {
            start_revision: Some(compact_revision.previous()),
            ..WatchRequest::new(KeyRange::all())
        };
        assert_eq!(store.watch(from_compacted).unwrap_err(), StoreError::Compacted { compact_revision });
        assert!(!next(&mut watch(&store, "", compact_revision.0)).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_watcher_beyond_its_feed_catches_up_from_the_log() {
        let store = store(Limits { feed_commits: 4, ..Limits::default() });
        let mut watcher = watch(&store, "a/", 0);
        for round in 0..5000 {
            store.put(if round % 2 == 0 { "a/x" } else { "b/x" }, "v");
        }
        let mut seen = 0;
        while seen < 2500 {
            for (revision, _) in next(&mut watcher).await.unwrap() {
                assert_eq!(revision, 2 + 2 * seen);
                seen += 1;
            }
        }
        assert_eq!(watcher.try_next().unwrap(), None);
    }

    #[tokio::test]
    async fn a_snapshot_cancels_those_who_have_not_seen_what_it_skips() {
        let store = store(Limits::default());
        let mut watcher = watch(&store, "", 0);
        store.load_snapshot(Revision(50), vec![]).unwrap();
        assert_eq!(next(&mut watcher).await.unwrap_err(), Canceled { compact_revision: Revision(51) });
        assert!(
            store
                .watch(WatchRequest {
                    start_revision: Some(Revision(50)),
                    ..WatchRequest::new(KeyRange::all())
                })
                .is_err()
        );
        let mut watcher = watch(&store, "", 51);
        store.load_snapshot(Revision(50), vec![]).unwrap();
        store.apply_at(Revision(53), vec![]).unwrap();
        store.put("k", "v");
        assert_eq!(next(&mut watcher).await.unwrap(), [(54, "k".into())]);
    }

    #[tokio::test]
    async fn feeds_are_shared_and_go_with_their_last_watcher() {
        let store = store(Limits::default());
        let watchers: Vec<_> = (0..10).map(|_| watch(&store, "a/", 0)).collect();
        assert!(watchers.iter().all(|watcher| Arc::ptr_eq(&watcher.feed, &watchers[0].feed)));
        assert_eq!(store.stats().watchers, 10);
        drop(watchers);
        assert_eq!(store.stats().watchers, 0);
        let mut again = watch(&store, "a/", 0);
        store.put("a/1", "x");
        assert_eq!(next(&mut again).await.unwrap().len(), 1);
    }
}
