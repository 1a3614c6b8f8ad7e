//! An ordered MVCC store in memory, with etcd's semantics.
//!
//! Keys are ordered bytes. Every change makes a new revision, old revisions stay readable while the history that
//! leads to them fits in [`Limits::history_bytes`], and watchers follow the changes from any revision within that
//! history. What a key's `create_revision`, `mod_revision`, `version` and `lease` mean is what they mean in etcd.
//!
//! ```text
//! put/delete/apply ─▶ Table (BTreeMap + log of commits) ─▶ dispatcher thread ─▶ feed per watched range ─▶ Watcher
//!                          ▲                                                                               │
//!                          └────────────────────── a watcher that lags reads the log itself ◀──────────────┘
//! ```
//!
//! - A write costs the same however many watchers there are: it appends to the log and wakes one thread.
//! - Watchers own no events: they read a shared log by position. A slow one therefore costs nothing, and when the
//!   log no longer reaches back to its position it is cancelled with the compact revision, as in etcd.
//! - Keys and values are never copied for a reader: ranges and events hand out `Arc`s.

mod dispatch;
mod event;
mod key_range;
mod range;
mod store;
mod table;
mod watch;

pub use event::{Event, KeyValue, Mirrored, Mutation, Revision, StoreId};
pub use key_range::KeyRange;
pub use range::{RangeRequest, RangeResponse, RevisionBounds, SortOrder, SortTarget};
pub use store::{Limits, MemoryStore, Stats, StoreError};
pub use watch::{Canceled, Position, WatchBatch, WatchRequest, Watcher};
