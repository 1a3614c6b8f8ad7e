//! A candidate's view of the Lease. No I/O and no clock of its own.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::core::ObjectMeta;
use tokio::time::Instant;

use super::{Role, Timing};

/// The longest that a Lease is believed to last: whoever writes more into it does not stop the mesh for ever.
const LONGEST_LEASE: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(super) struct Candidate {
    name: String,
    timing: Timing,
    /// The Lease as it was last seen or written.
    known: Option<Known>,
    /// Set while this candidate holds the Lease: until when that is certain.
    until: Option<Instant>,
}

#[derive(Debug)]
struct Known {
    lease: Lease,
    /// When it was first seen like that.
    since: Instant,
}

impl Candidate {
    pub(super) fn new(name: String, timing: Timing) -> Self {
        Self { name, timing, known: None, until: None }
    }

    /// The Lease as the API has it, seen at `now`.
    pub(super) fn observe(&mut self, lease: Option<&Lease>, now: Instant) {
        let Some(lease) = lease else {
            self.known = None;
            return;
        };
        if holder(lease).is_none_or(|holder| holder != self.name) {
            self.until = None;
        }
        let same = self.known.as_ref().is_some_and(|known| known.lease.spec == lease.spec);
        match &mut self.known {
            // Somebody may have touched its metadata, which is no renewal.
            Some(known) if same => known.lease = lease.clone(),
            known => *known = Some(Known { lease: lease.clone(), since: now }),
        }
    }

    /// The Lease as it is to be written, if this candidate may have it: created if there was none.
    pub(super) fn wants(&self, lease_name: &str, now: Instant, time: Timestamp) -> Option<Lease> {
        let before = self.known.as_ref().map(|known| &known.lease);
        let previous = before.and_then(holder);
        let is_mine = previous == Some(self.name.as_str());
        if !is_mine && previous.is_some() && !self.is_expired(now) {
            return None;
        }
        let spec = before.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or_default();
        Some(Lease {
            metadata: match before {
                Some(lease) => lease.metadata.clone(),
                None => ObjectMeta { name: Some(lease_name.to_owned()), ..ObjectMeta::default() },
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.name.clone()),
                lease_duration_seconds: Some(seconds(self.timing.lease)),
                acquire_time: spec.acquire_time.filter(|_| is_mine).or(Some(MicroTime(time))),
                renew_time: Some(MicroTime(time)),
                lease_transitions: Some(match before {
                    Some(_) if !is_mine => transitions.saturating_add(1),
                    _ => transitions,
                }),
                ..spec
            }),
        })
    }

    /// The API took what this candidate wanted; it was asked at `asked`.
    pub(super) fn wrote(&mut self, lease: &Lease, asked: Instant, now: Instant) {
        self.known = Some(Known { lease: lease.clone(), since: now });
        self.until = Some(asked + self.timing.renew_deadline);
    }

    /// The Lease without a holder, if it is this candidate's, which it is no more.
    pub(super) fn release(&mut self, time: Timestamp) -> Option<Lease> {
        self.until.take()?;
        let mut lease = self.known.as_ref()?.lease.clone();
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            renew_time: Some(MicroTime(time)),
            ..lease.spec.unwrap_or_default()
        });
        Some(lease)
    }

    /// Until when it leads for sure; none if it does not.
    pub(super) fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| now < *until)
    }

    pub(super) fn role(&self, now: Instant) -> Role {
        match self.until(now) {
            Some(until) => Role::Leading(Some(until)),
            None => {
                let holder = self.known.as_ref().and_then(|known| holder(&known.lease));
                Role::Standby { leader: holder.filter(|holder| *holder != self.name).map(str::to_owned) }
            }
        }
    }

    fn is_expired(&self, now: Instant) -> bool {
        let Some(known) = &self.known else { return true };
        let seconds = known.lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
        let lasts = seconds.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
        now >= known.since + lasts.unwrap_or(self.timing.lease).min(LONGEST_LEASE)
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
}

/// Whole seconds, one at least, as the API wants them.
fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis().div_ceil(1000)).unwrap_or(i32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The API, as far as a Lease goes: last writer wins, since every test writes what it has just seen.
    struct Api {
        lease: Option<Lease>,
        now: Instant,
    }

    impl Api {
        fn round(&mut self, candidate: &mut Candidate) -> Role {
            candidate.observe(self.lease.as_ref(), self.now);
            if let Some(wanted) = candidate.wants("l", self.now, Timestamp::UNIX_EPOCH + self.elapsed()) {
                self.lease = Some(wanted.clone());
                candidate.wrote(&wanted, self.now, self.now);
            }
            candidate.role(self.now)
        }

        fn elapsed(&self) -> Duration {
            // Renewals differ in their time, as they do in life.
            Duration::from_nanos(self.lease.as_ref().map_or(1, |lease| {
                let renewed = lease.spec.as_ref().and_then(|spec| spec.renew_time.clone()).expect("a time");
                u64::try_from(renewed.0.as_nanosecond()).expect("after 1970") + 1_000
            }))
        }
    }

    fn candidates() -> (Api, Candidate, Candidate) {
        let [a, b] = ["a", "b"].map(|name| Candidate::new(name.to_owned(), Timing::default()));
        (Api { lease: None, now: Instant::now() }, a, b)
    }

    fn stands_by_to(leader: &str) -> Role {
        Role::Standby { leader: Some(leader.to_owned()) }
    }

    #[test]
    fn one_leads_and_the_other_waits_for_as_long_as_it_renews() {
        let (mut api, mut a, mut b) = candidates();
        for _ in 0..50 {
            assert!(matches!(api.round(&mut a), Role::Leading(_)));
            assert_eq!(api.round(&mut b), stands_by_to("a"));
            api.now += 2 * SECOND;
        }
        let spec = api.lease.unwrap().spec.unwrap();
        assert_eq!((spec.lease_transitions, spec.lease_duration_seconds), (Some(0), Some(15)));
    }

    #[test]
    fn a_leader_that_cannot_renew_has_ended_before_another_begins() {
        let (mut api, mut a, mut b) = candidates();
        api.round(&mut a);
        api.round(&mut b);
        let begun = api.now;
        let (mut ended, mut succeeded) = (None, None);
        while succeeded.is_none() {
            api.now += SECOND / 10;
            if !matches!(a.role(api.now), Role::Leading(_)) {
                ended.get_or_insert(api.now - begun);
            }
            if matches!(api.round(&mut b), Role::Leading(_)) {
                succeeded = Some(api.now - begun);
            }
        }
        assert_eq!(ended, Some(10 * SECOND));
        assert_eq!(a.until(api.now), None, "what is over is no deadline for the next attempt");
        assert_eq!(succeeded, Some(15 * SECOND));
        // It comes back and finds itself replaced.
        assert_eq!(api.round(&mut a), stands_by_to("b"));
        assert_eq!(api.lease.unwrap().spec.unwrap().lease_transitions, Some(1));
    }

    #[test]
    fn expiry_counts_from_what_was_seen_whatever_the_times_in_the_lease_say() {
        let (mut api, mut a, mut b) = candidates();
        api.round(&mut a);
        // Renewed decades ago by its own words; seen now.
        api.now += 3600 * SECOND;
        assert_eq!(api.round(&mut b), stands_by_to("a"));
        api.now += 14 * SECOND;
        assert_eq!(api.round(&mut b), stands_by_to("a"));
        api.now += SECOND;
        assert!(matches!(api.round(&mut b), Role::Leading(_)));
    }

    #[test]
    fn a_touched_label_is_no_renewal() {
        let (mut api, mut a, mut b) = candidates();
        api.round(&mut a);
        api.round(&mut b);
        api.now += 14 * SECOND;
        api.lease.as_mut().unwrap().metadata.resource_version = Some("2".to_owned());
        api.round(&mut b);
        api.now += SECOND;
        assert!(matches!(api.round(&mut b), Role::Leading(_)));
    }

    #[test]
    fn a_released_lease_is_free_at_once_and_what_is_released_is_led_no_more() {
        let (mut api, mut a, mut b) = candidates();
        api.round(&mut a);
        assert_eq!(api.round(&mut b), stands_by_to("a"));
        api.lease = a.release(Timestamp::UNIX_EPOCH);
        assert!(!matches!(a.role(api.now), Role::Leading(_)));
        assert!(matches!(api.round(&mut b), Role::Leading(_)));
        assert!(a.release(Timestamp::UNIX_EPOCH).is_none());
    }

    #[test]
    fn one_that_was_replaced_by_hand_ends_when_it_sees_that() {
        let (mut api, mut a, mut b) = candidates();
        api.round(&mut a);
        api.lease = None;
        assert!(matches!(api.round(&mut b), Role::Leading(_)));
        api.now += SECOND;
        assert_eq!(api.round(&mut a), stands_by_to("b"));
    }

    #[test]
    fn the_same_replica_takes_up_its_own_lease_after_a_restart() {
        let (mut api, mut a, _) = candidates();
        api.round(&mut a);
        let mut again = Candidate::new("a".to_owned(), Timing::default());
        assert!(matches!(api.round(&mut again), Role::Leading(_)));
        assert_eq!(api.lease.unwrap().spec.unwrap().lease_transitions, Some(0));
    }

    #[test]
    fn a_lease_that_would_last_for_years_does_not() {
        let (mut api, mut a, mut b) = candidates();
        api.round(&mut a);
        api.lease.as_mut().unwrap().spec.as_mut().unwrap().lease_duration_seconds = Some(i32::MAX);
        api.round(&mut b);
        api.now += LONGEST_LEASE;
        assert!(matches!(api.round(&mut b), Role::Leading(_)));
    }
}
