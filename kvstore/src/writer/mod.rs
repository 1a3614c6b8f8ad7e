//! Writes to a store of Cluster Mesh: says what a key shall be, never how it gets there.
//!
//! [`Writer::put`] and [`Writer::delete`] return at once. On the memory engine the change is made then; on the etcd
//! engine it joins a queue in which each key stands at most once, with its latest value, and which is worked off in
//! transactions (see `queue` and `driver`). A value that the key already has is not written again.

mod backlog;
mod driver;
mod keep;
mod queue;
mod section;

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;

pub use self::backlog::Backlog;
pub use self::driver::Exchanged;
pub(crate) use self::{
    driver::{DriverConfig, Mark, drive, keep_for_the_next, limiter},
    queue::Queue,
};
pub use self::{keep::Kept, section::SectionWriter};
use crate::{
    client::RateLimiter,
    memory::{KeyRange, MemoryStore, RangeRequest},
    metrics::Limiter,
    section::Section,
};

/// Writes keys to one store. Clones write to the same one.
///
/// One key has one writer: where two disagree about a key, the last one wins and the other does not notice.
#[derive(Clone, Debug)]
pub struct Writer {
    /// What is read back: the store itself, or what follows etcd.
    store: MemoryStore,
    engine: Engine,
}

#[derive(Clone, Debug)]
enum Engine {
    Memory,
    Etcd { queue: Arc<Queue>, limiter: Arc<RateLimiter> },
}

/// How a writer gets on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct WriterStatus {
    /// Changes that wait to be written or are being written. Always 0 on the memory engine.
    pub pending: usize,
    /// Keys that the store refuses for what they are, such as a value that is too large. Each stands as it was before.
    pub rejected: usize,
    /// The leases that are kept alive.
    pub leases: usize,
    /// Attempts that failed so far and were made again.
    pub failures: u64,
    /// The latest failure in words.
    pub last_error: Option<String>,
}

impl Writer {
    /// Writes to an in-process store.
    pub fn memory(store: MemoryStore) -> Self {
        Self { store, engine: Engine::Memory }
    }

    /// Writes to etcd through `queue`, within the limits of `limiter`; `store` follows etcd.
    pub(crate) fn etcd(store: MemoryStore, queue: Arc<Queue>, limiter: Arc<RateLimiter>) -> Self {
        Self { store, engine: Engine::Etcd { queue, limiter } }
    }

    /// The key shall have this value. Never waits.
    pub fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        let (key, value) = (key.into(), value.into());
        match &self.engine {
            Engine::Memory => {
                if self.store.get(&key).is_none_or(|kv| kv.value != value) {
                    self.store.put(key, value);
                }
            }
            Engine::Etcd { queue, .. } => queue.set(key, Some(value)),
        }
    }

    /// The key shall not exist. Never waits.
    pub fn delete(&self, key: impl Into<Bytes>) {
        match &self.engine {
            Engine::Memory => {
                self.store.delete(key);
            }
            Engine::Etcd { queue, .. } => queue.set(key.into(), None),
        }
    }

    /// Writes the key again if the store holds anything but what this writer wants it to hold.
    fn reassert(&self, key: &Bytes, value: &Bytes) {
        if let Engine::Etcd { queue, .. } = &self.engine {
            queue.set(key.clone(), Some(value.clone()));
            if self.store.get(key).is_none_or(|kv| kv.value != *value) {
                queue.again(key);
            }
        } else {
            self.put(key.clone(), value.clone());
        }
    }

    /// Waits until everything that was put and deleted before is in the store. Where the store cannot be reached it
    /// waits for that; what the store rejects is not waited for.
    pub async fn flush(&self) {
        match &self.engine {
            Engine::Memory => {}
            Engine::Etcd { queue, .. } => queue.flush().await,
        }
    }

    /// Begins a section: what is written through it until [`SectionWriter::finish_initial`] is what the section shall
    /// hold; what an earlier run left beyond that is removed then.
    pub fn section(&self, section: Section) -> SectionWriter {
        SectionWriter::new(self.clone(), section)
    }

    /// How the writer gets on.
    pub fn status(&self) -> WriterStatus {
        match &self.engine {
            Engine::Memory => WriterStatus::default(),
            Engine::Etcd { queue, .. } => queue.status(),
        }
    }

    /// What is to be written yet, by what it is about. Nothing on the memory engine.
    pub fn backlogs(&self) -> Vec<Backlog> {
        match &self.engine {
            Engine::Memory => Vec::new(),
            Engine::Etcd { queue, .. } => queue.backlogs(),
        }
    }

    /// What tells how the limits on what is asked of the store are used; none on the memory engine, which has no limits.
    pub fn limiter(&self) -> Option<Limiter> {
        match &self.engine {
            Engine::Memory => None,
            Engine::Etcd { limiter, .. } => Some(Limiter(Arc::clone(limiter))),
        }
    }

    /// What the store holds under `key`. On the etcd engine, as far as etcd has been followed.
    pub fn value(&self, key: &[u8]) -> Option<Bytes> {
        self.store.get(key).map(|kv| kv.value.clone())
    }

    /// The keys that the store holds below `prefix`, which includes its final slash: what an earlier run left too.
    pub fn keys_below(&self, prefix: &Bytes) -> Vec<Bytes> {
        let request = RangeRequest::new(KeyRange::prefix(prefix.clone()));
        let response = self.store.range(&request).expect("the present state is never compacted");
        response.kvs.iter().map(|kv| kv.key.clone()).collect()
    }
}
