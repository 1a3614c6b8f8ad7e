//! What of a queue's changes is about which cluster and which part of the key space: sums that are kept with each change, so
//! that asking for them costs no look at the keys.

use std::collections::HashMap;

use bytes::Bytes;

use crate::metrics::{Scope, cluster_of};

/// The changes of one part of the key space that are about one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backlog {
    /// The part.
    pub scope: Scope,
    /// The cluster that the keys name; none for what the own cluster says of itself.
    pub cluster: Option<String>,
    /// Changes that wait to be written or are being written.
    pub pending: usize,
    /// How often a key was not written in an attempt, and had to be tried again or was refused.
    pub failures: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Backlogs(HashMap<Share, Tally>);

/// Shares the bytes of the key that it was made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Share {
    scope: Scope,
    cluster: Option<Bytes>,
}

impl Share {
    fn of(key: &Bytes) -> Self {
        Self { scope: Scope::of(key), cluster: cluster_of(key).map(|cluster| key.slice_ref(cluster)) }
    }
}

#[derive(Debug, Default)]
struct Tally {
    keys: usize,
    pending: usize,
    failures: u64,
}

impl Backlogs {
    /// The queue knows a new key.
    pub(super) fn known(&mut self, key: &Bytes) {
        self.0.entry(Share::of(key)).or_default().keys += 1;
    }

    /// The queue knows a key no more. Of a cluster of which none is known nothing is left.
    pub(super) fn forgotten(&mut self, key: &Bytes) {
        let share = Share::of(key);
        let Some(tally) = self.0.get_mut(&share) else { return };
        tally.keys -= 1;
        if tally.keys == 0 && share.cluster.is_some() {
            self.0.remove(&share);
        }
    }

    /// One more change of a key that is known is to be made.
    pub(super) fn opened(&mut self, key: &Bytes) {
        self.0.entry(Share::of(key)).or_default().pending += 1;
    }

    /// One change less.
    pub(super) fn closed(&mut self, key: &Bytes) {
        self.0.entry(Share::of(key)).or_default().pending -= 1;
    }

    /// An attempt to change a key that is known was in vain.
    pub(super) fn failed(&mut self, key: &Bytes) {
        self.0.entry(Share::of(key)).or_default().failures += 1;
    }

    pub(super) fn all(&self) -> Vec<Backlog> {
        let backlog = |(share, tally): (&Share, &Tally)| Backlog {
            scope: share.scope,
            cluster: share.cluster.as_ref().map(|name| String::from_utf8_lossy(name).into_owned()),
            pending: tally.pending,
            failures: tally.failures,
        };
        self.0.iter().map(backlog).collect()
    }
}
