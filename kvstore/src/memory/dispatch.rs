//! How watchers learn of commits without the writers' doing.
//!
//! Watchers of the same range share a [`Feed`]: where in the log the commits are that concern it. One thread per store,
//! started with the first watcher, reads the log after each write and appends to the feeds. Most ranges are prefixes or
//! single keys, so the feeds that a key belongs to are found by hashing its prefixes, not by trying every feed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, Thread};

use bytes::Bytes;
use tokio::sync::Notify;

use super::event::{Commit, Revision};
use super::key_range::KeyRange;
use super::store::Shared;

/// How many commits are read from the log under one hold of its lock.
const COMMITS_PER_HOLD: usize = 512;

/// All feeds of a store.
#[derive(Debug, Default)]
pub(super) struct Hub {
    registry: Mutex<Registry>,
    watchers: AtomicUsize,
    /// Every feed has all that concerns it up to this revision.
    dispatched: AtomicI64,
    /// Set by a write, cleared by the dispatcher before it looks.
    dirty: AtomicBool,
    stopped: AtomicBool,
    dispatcher: OnceLock<Thread>,
}

/// What happens in one range.
#[derive(Debug)]
pub(super) struct Feed {
    pub(super) range: KeyRange,
    pub(super) changed: Notify,
    entries: Mutex<Entries>,
    watchers: AtomicUsize,
}

#[derive(Debug)]
struct Entries {
    /// Everything that concerns the range after this revision (up to `Hub::dispatched`) is here.
    floor: Revision,
    /// The log owns the commits: a feed that nobody reads holds no history.
    commits: VecDeque<(Revision, Weak<Commit>)>,
}

/// What a feed has for a watcher.
pub(super) enum Pending {
    /// These commits concern it, and there may be more.
    Commits(Vec<Arc<Commit>>),
    /// Nothing up to this revision.
    UpTo(Revision),
    /// The feed does not reach back that far. The log may.
    Lost,
}

impl Hub {
    pub(super) fn watchers(&self) -> usize {
        self.watchers.load(Ordering::Relaxed)
    }

    /// Called after every write. Constant cost: at most one thread is woken.
    pub(super) fn notify(&self) {
        if self.dispatcher.get().is_some() && !self.dirty.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// The feed of a range, which the caller must [`Hub::leave`] again.
    pub(super) fn join(self: &Arc<Self>, shared: &Arc<Shared>, range: KeyRange) -> Arc<Feed> {
        self.dispatcher.get_or_init(|| self.start(shared));
        // For what was written while there was no thread to wake yet.
        self.notify();
        let mut registry = self.registry();
        // The dispatcher works under the same lock, so everything after `dispatched` will reach a new feed.
        let floor = self.dispatched();
        let feed = registry.feed(range, floor);
        feed.watchers.fetch_add(1, Ordering::Relaxed);
        self.watchers.fetch_add(1, Ordering::Relaxed);
        feed
    }

    pub(super) fn leave(&self, feed: &Arc<Feed>) {
        let mut registry = self.registry();
        self.watchers.fetch_sub(1, Ordering::Relaxed);
        if feed.watchers.fetch_sub(1, Ordering::Relaxed) == 1 {
            registry.remove(&feed.range);
        }
    }

    pub(super) fn dispatched(&self) -> Revision {
        Revision(self.dispatched.load(Ordering::SeqCst))
    }

    /// What `feed` has after `cursor`, about `budget` bytes of it.
    pub(super) fn pending(&self, feed: &Feed, cursor: Revision, budget: usize) -> Pending {
        // Read first: what is dispatched later may or may not be seen below.
        let up_to = self.dispatched();
        let entries = feed.entries();
        if cursor < entries.floor {
            return Pending::Lost;
        }
        let first = entries.commits.partition_point(|(revision, _)| *revision <= cursor);
        let (mut commits, mut bytes) = (Vec::new(), 0);
        for (_, commit) in entries.commits.range(first..) {
            let Some(commit) = commit.upgrade() else { return Pending::Lost };
            bytes += commit.cost;
            commits.push(commit);
            if bytes >= budget {
                break;
            }
        }
        if commits.is_empty() { Pending::UpTo(up_to) } else { Pending::Commits(commits) }
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Some(dispatcher) = self.dispatcher.get() {
            dispatcher.unpark();
        }
    }

    fn start(self: &Arc<Self>, shared: &Arc<Shared>) -> Thread {
        self.dispatched.store(shared.read().revision().0, Ordering::SeqCst);
        let (hub, store) = (self.clone(), Arc::downgrade(shared));
        let spawned = thread::Builder::new().name("kvstore-watch".into()).spawn(move || hub.run(&store));
        match spawned {
            Ok(handle) => handle.thread().clone(),
            // Without it no watcher would ever hear of anything, which is worse than stopping.
            Err(error) => panic!("cannot start the thread that serves watchers: {error}"),
        }
    }

    fn run(&self, store: &Weak<Shared>) {
        while !self.stopped.load(Ordering::SeqCst) {
            self.dirty.store(false, Ordering::SeqCst);
            let more = match store.upgrade() {
                Some(shared) => self.dispatch(&shared),
                None => return,
            };
            if !more && !self.dirty.load(Ordering::SeqCst) {
                thread::park();
            }
        }
    }

    /// Brings the feeds up to date, a part of the log at a time; true if there is more.
    fn dispatch(&self, shared: &Shared) -> bool {
        let registry = self.registry();
        let from = self.dispatched();
        let (commits, revision, gap) = {
            let table = shared.read();
            let commits: Vec<_> = table.commits_after(from).take(COMMITS_PER_HOLD).cloned().collect();
            (commits, table.revision(), (from < table.log_floor()).then(|| table.log_floor()))
        };
        if let Some(floor) = gap {
            registry.all().for_each(|feed| feed.restart(floor));
        }
        let mut changed = HashMap::new();
        for commit in &commits {
            for feed in registry.concerned_by(commit) {
                feed.append(commit, shared.limits.feed_commits);
                changed.insert(Arc::as_ptr(&feed), feed);
            }
        }
        let more = commits.len() == COMMITS_PER_HOLD;
        let reached = if more { commits.last().map_or(revision, |commit| commit.revision) } else { revision };
        self.dispatched.store(reached.0, Ordering::SeqCst);
        if gap.is_some() {
            registry.all().for_each(|feed| feed.changed.notify_waiters());
        } else {
            changed.values().for_each(|feed| feed.changed.notify_waiters());
        }
        more
    }
}

impl Feed {
    fn new(range: KeyRange, floor: Revision) -> Arc<Self> {
        Arc::new(Self {
            range,
            changed: Notify::new(),
            entries: Mutex::new(Entries { floor, commits: VecDeque::new() }),
            watchers: AtomicUsize::new(0),
        })
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, commit: &Arc<Commit>, capacity: usize) {
        let mut entries = self.entries();
        // What history no longer has is of no use to a watcher either.
        while entries.commits.len() >= capacity.max(1)
            || entries.commits.front().is_some_and(|(_, oldest)| oldest.strong_count() == 0)
        {
            let Some((revision, _)) = entries.commits.pop_front() else { break };
            entries.floor = revision;
        }
        entries.commits.push_back((commit.revision, Arc::downgrade(commit)));
    }

    fn restart(&self, floor: Revision) {
        let mut entries = self.entries();
        entries.commits.clear();
        entries.floor = floor;
    }
}

/// The feeds, by what kind of range they have.
#[derive(Debug, Default)]
struct Registry {
    keys: HashMap<Bytes, Arc<Feed>>,
    prefixes: HashMap<Bytes, Arc<Feed>>,
    /// How many prefixes of each length there are.
    lengths: BTreeMap<usize, usize>,
    others: HashMap<KeyRange, Arc<Feed>>,
}

impl Registry {
    fn feed(&mut self, range: KeyRange, floor: Revision) -> Arc<Feed> {
        let new = || Feed::new(range.clone(), floor);
        if let Some(key) = range.as_key() {
            return self.keys.entry(key.clone()).or_insert_with(new).clone();
        }
        let Some(prefix) = range.as_prefix() else {
            return self.others.entry(range.clone()).or_insert_with(new).clone();
        };
        let lengths = &mut self.lengths;
        let counted = || {
            *lengths.entry(prefix.len()).or_default() += 1;
            new()
        };
        self.prefixes.entry(prefix.clone()).or_insert_with(counted).clone()
    }

    fn remove(&mut self, range: &KeyRange) {
        if let Some(key) = range.as_key() {
            self.keys.remove(key);
        } else if let Some(prefix) = range.as_prefix() {
            if self.prefixes.remove(prefix).is_some()
                && let Some(count) = self.lengths.get_mut(&prefix.len())
            {
                *count -= 1;
                if *count == 0 {
                    self.lengths.remove(&prefix.len());
                }
            }
        } else {
            self.others.remove(range);
        }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Feed>> {
        self.keys.values().chain(self.prefixes.values()).chain(self.others.values())
    }

    /// Each feed that has a key of the commit, once.
    fn concerned_by(&self, commit: &Commit) -> Vec<Arc<Feed>> {
        let mut concerned: Vec<Arc<Feed>> = Vec::new();
        for event in &commit.events {
            let key = &event.kv.key[..];
            let prefixes = self
                .lengths
                .keys()
                .take_while(|length| **length <= key.len())
                .filter_map(|length| self.prefixes.get(&key[..*length]));
            let others = self.others.values().filter(|feed| feed.range.contains(key));
            concerned.extend(self.keys.get(key).into_iter().chain(prefixes).chain(others).cloned());
        }
        if commit.events.len() > 1 {
            concerned.sort_unstable_by_key(Arc::as_ptr);
            concerned.dedup_by(|a, b| Arc::ptr_eq(a, b));
        }
        concerned
    }
}
