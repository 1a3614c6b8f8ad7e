//! What the store holds and what watchers are told.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

/// The position of a change in the store's history. A new store is at revision 1, its first change makes 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub i64);

impl Revision {
    /// The revision of a store in which nothing has happened yet.
    pub const INITIAL: Self = Self(1);

    /// The revision after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The revision before this one.
    #[must_use]
    pub const fn previous(self) -> Self {
        Self(self.0 - 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one store for as long as it lives; `cluster_id` in the etcd API. Readers take a change of it as "another store,
/// read everything again", so a new store needs a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StoreId(pub u64);

impl StoreId {
    /// An id that no other store has, never zero (which clients take for "unknown").
    #[must_use]
    pub fn random() -> Self {
        // RandomState is seeded by the operating system; two of them give 64 bits without another dependency.
        use std::hash::{BuildHasher, RandomState};
        let now = std::time::SystemTime::now();
        Self(RandomState::new().hash_one(now) | 1)
    }
}

/// A key with its value at one revision.
///
/// A deletion is a `KeyValue` too (a tombstone): `version` 0, `create_revision` 0, no value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyValue {
    /// The key, never empty.
    pub key: Bytes,
    /// The value; empty on a tombstone.
    pub value: Bytes,
    /// The revision that made the key, after its last deletion if there was one.
    pub create_revision: Revision,
    /// The revision that last changed the key.
    pub mod_revision: Revision,
    /// How often the key was put since it was made, starting with 1; 0 on a tombstone.
    pub version: i64,
    /// The lease the writer attached, 0 for none. The store only passes it on.
    pub lease: i64,
}

impl KeyValue {
    /// Whether this records the key's deletion.
    #[must_use]
    pub const fn is_tombstone(&self) -> bool {
        self.version == 0
    }
}

/// One key's change. All events of one commit share their revision, which is `kv.mod_revision`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The key after the change; a tombstone if it was deleted.
    pub kv: Arc<KeyValue>,
    /// The key before the change, if it existed.
    pub prev: Option<Arc<KeyValue>>,
}

impl Event {
    /// The revision of the commit that this event belongs to.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.kv.mod_revision
    }

    /// Whether the key was deleted.
    #[must_use]
    pub fn is_delete(&self) -> bool {
        self.kv.is_tombstone()
    }

    /// Whether the key did not exist before.
    #[must_use]
    pub fn is_create(&self) -> bool {
        !self.is_delete() && self.kv.create_revision == self.kv.mod_revision
    }
}

/// A change to ask for. The store assigns the revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Set a key. Setting the value it already has is a change too (etcd's rule; writers dedupe).
    Put {
        /// The key, not empty.
        key: Bytes,
        /// The new value.
        value: Bytes,
        /// The lease to record with it, 0 for none.
        lease: i64,
    },
    /// Remove a key. Removing an absent one is no change.
    Delete {
        /// The key.
        key: Bytes,
    },
}

impl Mutation {
    /// A put without a lease.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: 0 }
    }

    /// A deletion.
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// The key it changes.
    #[must_use]
    pub const fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// A change as another store made it, to be repeated with the revisions it had there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mirrored {
    /// The key as the other store holds it. `mod_revision` is ignored in favour of the commit's revision.
    Put(KeyValue),
    /// The key is gone there.
    Delete {
        /// The key.
        key: Bytes,
    },
}

/// All events of one revision, in the order in which they were made.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) revision: Revision,
    pub(super) events: Box<[Event]>,
    /// Bytes that history holds because of this commit, see `Table::commit`.
    pub(super) cost: usize,
}
