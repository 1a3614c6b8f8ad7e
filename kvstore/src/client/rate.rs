//! What a client asks of a store at most: calls per second, and calls in flight.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep_until},
};

use crate::metrics::LimiterStatus;

/// Calls that means are made of: as many as Cilium's.
const MEAN_OF: usize = 10;

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
    tally: Mutex<Tally>,
}

/// What became of the calls.
#[derive(Debug, Default)]
struct Tally {
    waits: Recent,
    answers: Recent,
    succeeded: u64,
    failed: u64,
}

/// The latest of many durations.
#[derive(Debug, Default)]
struct Recent {
    latest: [Duration; MEAN_OF],
    count: usize,
}

impl Recent {
    fn add(&mut self, duration: Duration) {
        self.latest[self.count % MEAN_OF] = duration;
        self.count = self.count.wrapping_add(1);
    }

    /// Zero before the first.
    fn mean(&self) -> Duration {
        let known = &self.latest[..self.count.min(MEAN_OF)];
        known.iter().sum::<Duration>() / u32::try_from(known.len().max(1)).unwrap_or(1)
    }
}

/// A call that has begun.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    limiter: &'a RateLimiter,
    begun: Instant,
    _in_flight: SemaphorePermit<'a>,
}

impl Permit<'_> {
    /// The call has ended; how long it took. One that is dropped before is not counted.
    pub(crate) fn over(self, succeeded: bool) -> Duration {
        let took = self.begun.elapsed();
        let mut tally = self.limiter.tally();
        tally.answers.add(took);
        *(if succeeded { &mut tally.succeeded } else { &mut tally.failed }) += 1;
        took
    }
}

impl RateLimiter {
    pub(crate) fn new(limits: RateLimits) -> Self {
        Self {
            limits,
            bootstrapped: AtomicBool::new(false),
            next: Mutex::new(Instant::now()),
            in_flight: Semaphore::new(limits.max_in_flight.max(1)),
            tally: Mutex::default(),
        }
    }

    /// How the limits are used.
    pub(crate) fn status(&self) -> LimiterStatus {
        let max_in_flight = self.limits.max_in_flight.max(1);
        let qps = self.qps();
        let tally = self.tally();
        LimiterStatus {
            limit: qps,
            // A second's worth.
            burst: qps,
            in_flight: max_in_flight.saturating_sub(self.in_flight.available_permits()),
            max_in_flight,
            mean_wait: tally.waits.mean(),
            mean_processing: tally.answers.mean(),
            succeeded: tally.succeeded,
            failed: tally.failed,
        }
    }

    /// From now on the ordinary rate holds.
    pub(crate) fn bootstrapped(&self) {
        self.bootstrapped.store(true, Ordering::Relaxed);
    }

    /// Waits until one more call may start; the call is over when the permit is, or is dropped.
    pub(crate) async fn permit(&self) -> Permit<'_> {
        let asked = Instant::now();
        let in_flight = self.in_flight.acquire().await.expect("the semaphore is never closed");
        self.turn().await;
        let begun = Instant::now();
        self.tally().waits.add(begun - asked);
        Permit { limiter: self, begun, _in_flight: in_flight }
    }

    /// Waits until one more call may start, which is not counted among those in flight.
    pub(crate) async fn turn(&self) {
        let turn = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let earliest = now.checked_sub(Duration::from_secs(1)).unwrap_or(now);
            let turn = (*next).max(earliest);
            *next = turn + Duration::from_secs(1) / self.qps();
            turn
        };
        sleep_until(turn).await;
    }

    fn qps(&self) -> u32 {
        let bootstrapped = self.bootstrapped.load(Ordering::Relaxed);
        (if bootstrapped { self.limits.qps } else { self.limits.bootstrap_qps }).max(1)
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
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

    #[tokio::test(start_paused = true)]
    async fn the_status_tells_what_the_latest_calls_met_with() {
        let limiter = RateLimiter::new(RateLimits { qps: 10, bootstrap_qps: 1_000, max_in_flight: 2 });
        assert_eq!(limiter.status().mean_processing, Duration::ZERO);
        for seconds in 0..20 {
            let permit = limiter.permit().await;
            assert_eq!(limiter.status().in_flight, 1);
            tokio::time::advance(Duration::from_secs(seconds)).await;
            permit.over(seconds != 7);
        }
        drop(limiter.permit().await);
        limiter.bootstrapped();
        let status = limiter.status();
        assert_eq!((status.succeeded, status.failed), (19, 1), "{status:?}");
        assert_eq!(status.mean_processing, Duration::from_millis(14_500), "of 10 to 19 seconds");
        assert_eq!((status.limit, status.burst), (10, 10));
        assert_eq!((status.in_flight, status.max_in_flight), (0, 2));
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
