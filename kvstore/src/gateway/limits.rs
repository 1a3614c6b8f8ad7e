//! What clients may take: every resource that a request can tie up has a bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

use super::reply;

/// Bounds on what the clients of a gateway may take. The defaults serve ten thousand agents.
#[derive(Clone, Copy, Debug)]
pub struct GatewayLimits {
    /// Connections at a time, those still in the TLS handshake included. Default 16,384.
    pub connections: usize,
    /// A TLS handshake that takes longer is given up. Default 10 s.
    pub handshake_timeout: Duration,
    /// How often an idle connection is asked for a sign of life. Default 10 s.
    pub keepalive_interval: Duration,
    /// How long that sign may take before the connection is closed. Default 20 s.
    pub keepalive_timeout: Duration,
    /// Requests at a time on one connection, watch streams included. Default 2,048.
    pub streams_per_connection: u32,
    /// A request other than a watch must have come in, been answered, and the answer taken, within this. Default 60 s.
    pub request_timeout: Duration,
    /// Bytes of answers that may be on their way to clients. A larger one waits until nothing else is. Default 256 MiB.
    pub answer_bytes: usize,
    /// Bytes that the watches of one connection may take: 256 KiB a stream and 1 KiB a watch. Default 512 MiB.
    pub watch_bytes_per_connection: usize,
    /// Bytes that all watches may take. Default 8 GiB (which only clients that stop reading can make them take).
    pub watch_bytes: usize,
    /// How often a watch that wants progress notifications gets one while nothing happens. Default 10 min, as etcd.
    pub progress_interval: Duration,
}

impl Default for GatewayLimits {
    fn default() -> Self {
        Self {
            connections: 16 << 10,
            handshake_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(20),
            streams_per_connection: 2048,
            request_timeout: Duration::from_secs(60),
            answer_bytes: 256 << 20,
            watch_bytes_per_connection: 512 << 20,
            watch_bytes: 8 << 30,
            progress_interval: Duration::from_secs(600),
        }
    }
}

/// Answers below this are not counted: the bound on requests per connection is theirs.
pub(super) const SMALL_ANSWER: usize = 64 << 10;

/// Bytes that can be waited for.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    kibibytes: Arc<Semaphore>,
    all: u32,
}

/// A part of a [`Budget`], given back when the last clone is dropped.
#[derive(Clone, Debug)]
pub(super) struct Reserved(Option<Arc<OwnedSemaphorePermit>>);

impl Reserved {
    /// Whether it holds any room at all.
    pub(super) fn is_counted(&self) -> bool {
        self.0.is_some()
    }
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Self {
        let all = u32::try_from(bytes >> 10).unwrap_or(u32::MAX).max(1);
        Self { kibibytes: Arc::new(Semaphore::new(all as usize)), all }
    }

    /// Waits for room. More than there is at all waits for all there is; what is small needs none.
    pub(super) async fn reserve(&self, bytes: usize) -> Result<Reserved, Status> {
        let wanted = u32::try_from(bytes >> 10).unwrap_or(u32::MAX).min(self.all);
        if bytes < SMALL_ANSWER {
            return Ok(Reserved(None));
        }
        let permit = self.kibibytes.clone().acquire_many_owned(wanted).await;
        permit.map(|permit| Reserved(Some(Arc::new(permit)))).map_err(|_| reply::stopped())
    }
}

/// Bytes that are refused when there are no more.
#[derive(Debug)]
pub(super) struct Quota {
    used: AtomicUsize,
    limit: usize,
    parent: Option<Arc<Quota>>,
}

/// A part of a [`Quota`], given back on drop.
#[derive(Debug)]
pub(super) struct Charge {
    quota: Arc<Quota>,
    bytes: usize,
}

impl Quota {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit, parent: None })
    }

    /// A quota whose charges count against this one too.
    pub(super) fn child(self: &Arc<Self>, limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit, parent: Some(self.clone()) })
    }

    pub(super) fn charge(self: &Arc<Self>, bytes: usize) -> Option<Charge> {
        self.take(bytes).then(|| Charge { quota: self.clone(), bytes })
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        if self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
            return false;
        }
        if self.parent.as_ref().is_some_and(|parent| !parent.take(bytes)) {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
            return false;
        }
        true
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.give_back(bytes);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.quota.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_holds_for_one_connection_and_for_all() {
        let all = Quota::new(100);
        let (one, other) = (all.child(80), all.child(80));
        let first = one.charge(80).unwrap();
        assert!(one.charge(1).is_none());
        assert!(other.charge(30).is_none());
        let second = other.charge(20).unwrap();
        drop(first);
        assert!(other.charge(60).is_some());
        drop(second);
        assert_eq!(all.used.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn an_answer_larger_than_the_budget_waits_until_it_is_alone() {
        let budget = Budget::new(1 << 20);
        let some = budget.reserve(100 << 10).await.unwrap();
        let large = budget.reserve(100 << 20);
        tokio::pin!(large);
        assert!(futures::poll!(&mut large).is_pending());
        drop(some);
        assert!(large.await.is_ok());
    }
}
