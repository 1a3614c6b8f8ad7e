//! What is to be in etcd, what is there already, and which leases hold it. No I/O: `driver` carries it out.
//!
//! A key is in one of four phases. It waits in line at most once, whatever happens to it meanwhile, and is in at most
//! one transaction at a time, so that its writes reach etcd in their order:
//!
//! ```text
//!              set                    taken
//!   settled ─────────▶ waiting ─────────────────▶ in flight ──── done ───▶ settled
//!                         ▲                        │      │
//!                         └──── failed ────────────┘      │ set
//!                         └──── done or failed ──── in flight, outdated
//! ```

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::sync::{Notify, futures::Notified, watch};

use super::{
    WriterStatus,
    backlog::{Backlog, Backlogs},
};

/// Keys per lease: one lease on everything makes etcd collapse.
pub(crate) const KEYS_PER_LEASE: usize = 1_000;
/// Changes per transaction: etcd's own limit is 128.
const CHANGES_PER_BATCH: usize = 100;
/// Bytes per transaction, well below etcd's limit of 1.5 MiB for a request.
const BYTES_PER_BATCH: usize = 1 << 20;

/// The queue of one writer.
#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// There is something to do.
    wake: Notify,
    /// A lease may be gone.
    suspicion: Notify,
    /// All changes with a number below this one are in etcd.
    durable: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    keys: HashMap<Bytes, Entry>,
    line: VecDeque<Bytes>,
    leases: HashMap<i64, HashSet<Bytes>>,
    /// Leases that may take more keys.
    roomy: Vec<i64>,
    /// Leases that may be gone.
    suspects: HashSet<i64>,
    /// The numbers of the changes that are not in etcd yet.
    open: BTreeSet<u64>,
    backlogs: Backlogs,
    next_number: u64,
    rejected: usize,
    failures: u64,
    last_error: Option<String>,
}

#[derive(Debug)]
struct Entry {
    /// None: the key shall not exist.
    wanted: Option<Bytes>,
    phase: Phase,
    lease: Option<i64>,
    /// The revision of the last write that worked.
    revision: i64,
    /// It goes in a transaction of its own, since one that it was in was refused.
    alone: bool,
    rejected: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Settled,
    Waiting { number: u64 },
    InFlight { number: u64 },
    Outdated { number: u64, newer: u64 },
}

/// One change to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) key: Bytes,
    /// The value and the lease that holds it; none to delete the key.
    pub(crate) value: Option<(Bytes, i64)>,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Make these changes in one transaction.
    Batch(Vec<Write>),
    /// Grant a lease and [`Queue::add_lease`] it.
    Lease,
    /// Nothing now.
    Nothing,
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::default(),
            wake: Notify::new(),
            suspicion: Notify::new(),
            durable: watch::Sender::new(0),
        }
    }

    /// The key shall have this value, or not exist.
    pub(crate) fn set(&self, key: Bytes, wanted: Option<Bytes>) {
        let mut state = self.state();
        let state = &mut *state;
        if let Some(entry) = state.keys.get_mut(&key) {
            if entry.wanted == wanted {
                return;
            }
            entry.wanted = wanted;
            if std::mem::take(&mut entry.rejected) {
                state.rejected -= 1;
            }
        } else {
            state.backlogs.known(&key);
            state.keys.insert(
                key.clone(),
                Entry {
                    wanted,
                    phase: Phase::Settled,
                    lease: None,
                    revision: 0,
                    alone: false,
                    rejected: false,
                },
            );
        }
        state.outdate(&key);
        self.wake.notify_one();
    }

    /// Writes the key again although its value has not changed.
    pub(crate) fn again(&self, key: &Bytes) {
        self.state().outdate(key);
        self.wake.notify_one();
    }

    /// The key was seen deleted in etcd at `revision`. If it should be there it is written again, and the lease that
    /// should have held it is suspected to be gone.
    pub(crate) fn vanished(&self, key: &Bytes, revision: i64) {
        let mut state = self.state();
        let Some(entry) = state.keys.get(key) else { return };
        // An older deletion is one that this writer made, or has made up for already.
        if entry.wanted.is_none()
            || entry.phase != Phase::Settled
            || entry.revision >= revision
            || entry.rejected
        {
            return;
        }
        if let Some(lease) = entry.lease {
            state.suspects.insert(lease);
            self.suspicion.notify_one();
        }
        state.outdate(key);
        self.wake.notify_one();
    }

    /// etcd was listed anew at `revision`: what this writer put before and is not there has vanished unseen.
    pub(crate) fn reconcile(&self, revision: i64, is_there: impl Fn(&Bytes) -> bool) {
        let settled: Vec<Bytes> = {
            let state = self.state();
            let settled = state.keys.iter().filter(|(_, entry)| entry.phase == Phase::Settled);
            settled.map(|(key, _)| key.clone()).collect()
        };
        for key in settled.iter().filter(|key| !is_there(key)) {
            self.vanished(key, revision);
        }
    }

    /// The leases that may be gone, once there are any.
    pub(crate) async fn suspects(&self) -> Vec<i64> {
        loop {
            let suspects: Vec<i64> = self.state().suspects.drain().collect();
            if !suspects.is_empty() {
                return suspects;
            }
            self.suspicion.notified().await;
        }
    }

    /// Waits until everything set before is in etcd.
    pub(crate) async fn flush(&self) {
        let target = self.state().next_number;
        // The sender lives as long as `self`.
        let _ = self.durable.subscribe().wait_for(|durable| *durable >= target).await;
    }

    /// Completes when there may be something to do.
    pub(crate) fn woken(&self) -> Notified<'_> {
        self.wake.notified()
    }

    /// The next thing to do. The keys of a batch are in flight until [`Queue::done`] or [`Queue::failed`].
    pub(crate) fn take(&self) -> Work {
        let mut state = self.state();
        let state = &mut *state;
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(key) = state.line.front() {
            let entry = state.keys.get_mut(key).expect("what stands in line is known");
            let size = key.len() + entry.wanted.as_ref().map_or(0, Bytes::len);
            if !batch.is_empty() && (entry.alone || bytes + size > BYTES_PER_BATCH) {
                break;
            }
            let value = match &entry.wanted {
                None => None,
                Some(value) => {
                    let lease = match entry.lease {
                        Some(lease) => lease,
                        None => match state.roomy.last() {
                            None if batch.is_empty() => return Work::Lease,
                            None => break,
                            Some(lease) => {
                                let lease = *lease;
                                let held = state.leases.get_mut(&lease).expect("a roomy lease is a lease");
                                held.insert(key.clone());
                                if held.len() >= KEYS_PER_LEASE {
                                    state.roomy.pop();
                                }
                                entry.lease = Some(lease);
                                lease
                            }
                        },
                    };
                    Some((value.clone(), lease))
                }
            };
            let Phase::Waiting { number } = entry.phase else { unreachable!("what stands in line waits") };
            entry.phase = Phase::InFlight { number };
            let alone = entry.alone;
            bytes += size;
            batch.push(Write { key: key.clone(), value });
            state.line.pop_front();
            if alone || batch.len() == CHANGES_PER_BATCH {
                break;
            }
        }
        if batch.is_empty() { Work::Nothing } else { Work::Batch(batch) }
    }

    /// The batch is in etcd, at this revision.
    pub(crate) fn done(&self, batch: &[Write], revision: i64) {
        let mut state = self.state();
        for write in batch {
            let Some(entry) = state.keys.get_mut(&write.key) else { continue };
            entry.revision = revision;
            entry.alone = false;
            let outdated = match entry.phase {
                Phase::InFlight { number } => {
                    entry.phase = Phase::Settled;
                    state.close(&write.key, number);
                    false
                }
                Phase::Outdated { number, newer } => {
                    entry.phase = Phase::Waiting { number: newer };
                    state.close(&write.key, number);
                    true
                }
                Phase::Settled | Phase::Waiting { .. } => continue,
            };
            if outdated {
                state.line.push_back(write.key.clone());
            } else if write.value.is_none() {
                state.free_lease(&write.key);
                state.keys.remove(&write.key);
                state.backlogs.forgotten(&write.key);
            }
        }
        self.settle(state);
    }

    /// The batch failed as a whole and shall be tried again; one by one if it may be a single change that is refused.
    pub(crate) fn failed(&self, batch: &[Write], one_by_one: bool, error: String) {
        let mut state = self.state();
        state.failures += 1;
        state.last_error = Some(error);
        // In front of what came later, in its old order.
        for write in batch.iter().rev() {
            let Some(entry) = state.keys.get_mut(&write.key) else { continue };
            entry.alone |= one_by_one;
            let alone = entry.alone;
            match entry.phase {
                Phase::InFlight { number } => entry.phase = Phase::Waiting { number },
                Phase::Outdated { number, newer } => {
                    entry.phase = Phase::Waiting { number };
                    state.close(&write.key, newer);
                }
                Phase::Settled | Phase::Waiting { .. } => continue,
            }
            state.backlogs.failed(&write.key);
            // What may be refused for ever does not stand in everybody's way.
            if alone {
                state.line.push_back(write.key.clone());
            } else {
                state.line.push_front(write.key.clone());
            }
        }
        self.settle(state);
    }

    /// The store refuses this change for what it is. The key stays as it was until another value is set.
    pub(crate) fn reject(&self, write: &Write, error: String) {
        let mut state = self.state();
        state.failures += 1;
        state.last_error = Some(error);
        let Some(entry) = state.keys.get_mut(&write.key) else { return };
        entry.alone = false;
        match entry.phase {
            Phase::InFlight { number } => {
                entry.phase = Phase::Settled;
                entry.rejected = true;
                state.rejected += 1;
                state.close(&write.key, number);
            }
            Phase::Outdated { number, newer } => {
                entry.phase = Phase::Waiting { number: newer };
                state.close(&write.key, number);
                state.line.push_back(write.key.clone());
            }
            Phase::Settled | Phase::Waiting { .. } => {}
        }
        state.backlogs.failed(&write.key);
        self.settle(state);
    }

    /// A new lease may be used.
    pub(crate) fn add_lease(&self, lease: i64) {
        let mut state = self.state();
        state.leases.insert(lease, HashSet::new());
        state.roomy.push(lease);
        self.wake.notify_one();
    }

    /// The lease is gone, and with it the keys that it held: they are written again with another one.
    pub(crate) fn lease_lost(&self, lease: i64) {
        let mut state = self.state();
        state.roomy.retain(|roomy| *roomy != lease);
        for key in state.leases.remove(&lease).unwrap_or_default() {
            if let Some(entry) = state.keys.get_mut(&key) {
                entry.lease = None;
                if entry.wanted.is_some() && !entry.rejected {
                    state.outdate(&key);
                }
            }
        }
        self.wake.notify_one();
    }

    /// The leases that there are.
    pub(crate) fn leases(&self) -> Vec<i64> {
        self.state().leases.keys().copied().collect()
    }

    pub(crate) fn status(&self) -> WriterStatus {
        let state = self.state();
        WriterStatus {
            pending: state.open.len(),
            rejected: state.rejected,
            leases: state.leases.len(),
            failures: state.failures,
            last_error: state.last_error.clone(),
        }
    }

    /// What there is to do, by what it is about.
    pub(crate) fn backlogs(&self) -> Vec<Backlog> {
        self.state().backlogs.all()
    }

    /// Something failed that concerns no batch.
    pub(crate) fn trouble(&self, error: String) {
        let mut state = self.state();
        state.failures += 1;
        state.last_error = Some(error);
    }

    fn settle(&self, state: MutexGuard<'_, State>) {
        let durable = state.open.first().copied().unwrap_or(state.next_number);
        drop(state);
        self.durable.send_if_modified(|known| std::mem::replace(known, durable) != durable);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What is wanted for the key is not what etcd has.
    fn outdate(&mut self, key: &Bytes) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        match entry.phase {
            Phase::Waiting { .. } | Phase::Outdated { .. } => {}
            Phase::Settled => {
                entry.phase = Phase::Waiting { number: self.next_number };
                self.open(key);
                self.line.push_back(key.clone());
            }
            Phase::InFlight { number } => {
                entry.phase = Phase::Outdated { number, newer: self.next_number };
                self.open(key);
            }
        }
    }

    /// The next number is given to a change of this key.
    fn open(&mut self, key: &Bytes) {
        self.open.insert(self.next_number);
        self.next_number += 1;
        self.backlogs.opened(key);
    }

    /// The change with this number, of this key, is in etcd or will not be made.
    fn close(&mut self, key: &Bytes, number: u64) {
        if self.open.remove(&number) {
            self.backlogs.closed(key);
        }
    }

    fn free_lease(&mut self, key: &Bytes) {
        let Some(lease) = self.keys.get_mut(key).and_then(|entry| entry.lease.take()) else { return };
        if let Some(held) = self.leases.get_mut(&lease) {
            let was_full = held.len() >= KEYS_PER_LEASE;
            held.remove(key);
            if was_full {
                self.roomy.push(lease);
            }
        }
    }
}

#[cfg(test)]
mod tests;
