//! What a client asks of a store at most: calls per second, and calls in flight.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep_until},
};

/// The limits of one client (wire format, section A.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimits {
    /// Calls per second once everything has been synchronized once. At least 1.
    pub qps: u32,
    /// Calls per second until then. At least 1.
    pub bootstrap_qps: u32,
    /// Calls that may wait for their answer at the same time. At least 1. Watches are not counted.
    pub max_in_flight: usize,
}

impl Default for RateLimits {
    /// What Cilium's kvstoremesh uses.
    fn default() -> Self {
        Self { qps: 100, bootstrap_qps: 10_000, max_in_flight: 10 }
    }
}

/// Holds calls back to their [`RateLimits`].
#[derive(Debug)]
pub(crate) struct RateLimiter {
    limits: RateLimits,
    bootstrapped: AtomicBool,
    /// When the next call may start. Up to a second in the past: that much may be caught up in a burst.
    next: Mutex<Instant>,
    in_flight: Semaphore,
}

impl RateLimiter {
    pub(crate) fn new(limits: RateLimits) -> Self {
        Self {
            limits,
            bootstrapped: AtomicBool::new(false),
            next: Mutex::new(Instant::now()),
            in_flight: Semaphore::new(limits.max_in_flight.max(1)),
        }
    }

    /// From now on the ordinary rate holds.
    pub(crate) fn bootstrapped(&self) {
        self.bootstrapped.store(true, Ordering::Relaxed);
    }

    /// Waits until one more call may start; the call is over when the permit is dropped.
    pub(crate) async fn permit(&self) -> SemaphorePermit<'_> {
        let permit = self.in_flight.acquire().await.expect("the semaphore is never closed");
        self.turn().await;
        permit
    }

    /// Waits until one more call may start, which is not counted among those in flight.
    pub(crate) async fn turn(&self) {
        let qps = if self.bootstrapped.load(Ordering::Relaxed) {
            self.limits.qps
        } else {
            self.limits.bootstrap_qps
        };
        let turn = {
            let mut next = self.next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let now = Instant::now();
            let earliest = now.checked_sub(Duration::from_secs(1)).unwrap_or(now);
            let turn = (*next).max(earliest);
            *next = turn + Duration::from_secs(1) / qps.max(1);
            turn
        };
        sleep_until(turn).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn calls_beyond_the_rate_wait_their_turn() {
        let limiter = RateLimiter::new(RateLimits { qps: 10, bootstrap_qps: 1_000_000, max_in_flight: 1 });
        let start = Instant::now();
        for _ in 0..1_000 {
            drop(limiter.permit().await);
        }
        assert!(start.elapsed() < Duration::from_secs(1), "the first synchronization is not slowed down");
        limiter.bootstrapped();
        let start = Instant::now();
        for _ in 0..50 {
            drop(limiter.permit().await);
        }
        // A second's worth may come in a burst.
        assert!(start.elapsed() >= Duration::from_millis(3_900), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn no_more_calls_are_in_flight_than_allowed() {
        let limiter = RateLimiter::new(RateLimits { qps: 1_000, bootstrap_qps: 1_000, max_in_flight: 2 });
        let first = limiter.permit().await;
        let _second = limiter.permit().await;
        assert!(futures::FutureExt::now_or_never(limiter.permit()).is_none());
        drop(first);
        drop(limiter.permit().await);
    }
}
