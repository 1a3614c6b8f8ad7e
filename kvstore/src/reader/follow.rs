//! One section, over however many connections: wait for the canary, list, sweep, follow.

use std::{ops::ControlFlow, sync::Arc, time::Duration};

use bytes::Bytes;
use chrono::Utc;
use prometheus_client::metrics::histogram::Histogram;
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    time::{Instant, MissedTickBehavior, interval_at, sleep},
};

use super::{Section, SectionEvent, SectionPhase, SectionStatus, Shared, Usable, known::Known};
use crate::{
    backoff::Backoff,
    client::{Change, Pair, Session, SessionError, Span, WatchAnswer},
    metrics::{EventWaits, Scope},
};

/// Follows `section` until its consumer drops the receiver.
pub(super) async fn run(shared: Arc<Shared>, section: Section, events: mpsc::Sender<SectionEvent>) {
    let name = section.name();
    let mut follower = Follower {
        shared: &shared,
        section: &section,
        name: &name,
        events: &events,
        known: Known::default(),
        overflowed: false,
        waits: shared.config.metrics.event_waits(Scope::of(&section.directory())),
    };
    let mut usable = shared.usable.subscribe();
    let consumer_left = events.closed();
    tokio::pin!(consumer_left);
    loop {
        let current = usable.borrow_and_update().clone();
        let Some(current) = current else {
            follower.phase(SectionPhase::WaitingForConnection);
            tokio::select! {
                changed = usable.changed() => if changed.is_err() { break },
                () = &mut consumer_left => break,
            }
            continue;
        };
        tokio::select! {
            // Dropping this at any await loses nothing: see `Follower::tell`.
            flow = follower.over(&current) => if flow.is_break() { break },
            changed = usable.changed() => if changed.is_err() { break },
            () = &mut consumer_left => break,
        }
    }
    shared.status.send_modify(|status| {
        status.sections.remove(&name);
    });
}

struct Follower<'a> {
    shared: &'a Shared,
    section: &'a Section,
    name: &'a str,
    events: &'a mpsc::Sender<SectionEvent>,
    known: Known,
    /// Keys were left out for want of room since the last list began.
    overflowed: bool,
    waits: EventWaits,
}

/// Why following stopped.
enum Stop {
    Session(SessionError),
    ConsumerLeft,
}

impl From<SessionError> for Stop {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl Follower<'_> {
    /// Follows over one connection. Returns when the consumer has left; when the connection is of no use any more, it
    /// says so and waits to be dropped.
    async fn over(&mut self, usable: &Usable) -> ControlFlow<()> {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
        let mut announced = !usable.canaries;
        loop {
            let Err(stop) = self.once(&usable.session, &mut announced, &mut backoff).await;
            let error = match stop {
                Stop::ConsumerLeft => return ControlFlow::Break(()),
                Stop::Session(error) => error,
            };
            if error.is_fatal() {
                // A full channel means that another section has reported already.
                let _ = usable.broken.try_send(format!("{}: {error}", self.name));
                return std::future::pending().await;
            }
            tracing::debug!(section = self.name, %error, "the section is listed anew");
            self.status(|status| {
                status.phase = SectionPhase::BackingOff;
                if !matches!(error, SessionError::Compacted { .. }) {
                    status.last_error = Some(error.to_string());
                }
            });
            sleep(backoff.next_delay()).await;
        }
    }

    /// Canary, list, sweep, follow, until something fails.
    async fn once(
        &mut self,
        session: &Session,
        announced: &mut bool,
        backoff: &mut Backoff,
    ) -> Result<std::convert::Infallible, Stop> {
        if !*announced && let Some(canary) = &self.section.canary {
            self.phase(SectionPhase::WaitingForCanary);
            wait_for(session, canary).await?;
            // Its deletion later on means nothing.
            *announced = true;
        }
        self.status(|status| {
            status.phase = SectionPhase::Listing;
            status.last_error = None;
        });
        let revision = self.list(session).await?;
        let mut watch = session.watch(Span::Prefix(self.section.directory()), revision + 1).await?;
        self.status(|status| status.phase = SectionPhase::Following);
        let period = self.shared.config.progress_interval;
        let mut ask = interval_at(Instant::now() + period, period);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut probes = self.shared.probes.subscribe();
        loop {
            let answer = tokio::select! {
                answer = watch.next() => answer?,
                _ = ask.tick() => {
                    if self.overflowed && self.has_room() {
                        return Err(SessionError::Refused("there is room now for keys that were left out".into()).into());
                    }
                    watch.request_progress().await?;
                    continue;
                }
                Ok(()) = probes.changed() => {
                    watch.request_progress().await?;
                    continue;
                }
            };
            backoff.reset();
            let revision = match answer {
                WatchAnswer::Progress { revision } => revision,
                WatchAnswer::Changes { revision, changes, unknown } => {
                    self.skipped(unknown, "of an unknown kind or outside of the section");
                    for change in changes {
                        match change {
                            Change::Put(pair) => self.put(pair).await?,
                            Change::Delete { key, revision } => self.delete(key, revision).await?,
                        }
                    }
                    self.status(|status| status.last_event = Some(Utc::now()));
                    revision
                }
            };
            self.confirmed(revision, session);
        }
    }

    /// Lists the section, tells the differences and, at the end, the deletions. The revision that the list shows.
    async fn list(&mut self, session: &Session) -> Result<i64, Stop> {
        self.known.begin_list();
        self.overflowed = false;
        let mut listing = session.list(Span::Prefix(self.section.directory()));
        loop {
            match listing.next_page().await {
                Ok(None) => break,
                Ok(Some(pairs)) => {
                    for pair in pairs {
                        self.put(pair).await?;
                    }
                }
                Err(SessionError::TooLarge) => {
                    if let Some(key) = listing.skip().await? {
                        self.skipped(1, "too large to be taken in");
                        tracing::warn!(key = %String::from_utf8_lossy(&key), "a value is too large and left out");
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        let revision = listing.revision();
        for key in self.known.stale() {
            self.delete(key, revision).await?;
        }
        self.tell(SectionEvent::Synced { revision }).await?;
        self.status(|status| {
            status.synced = true;
        });
        self.confirmed(revision, session);
        if self.shared.status.borrow().synced() {
            self.shared.limiter.bootstrapped();
        }
        Ok(revision)
    }

    async fn put(&mut self, pair: Pair) -> Result<(), Stop> {
        let Pair { key, value, mod_revision, .. } = pair;
        let bounds = &self.shared.config.bounds;
        if key.len() > bounds.key_bytes || value.len() > bounds.value_bytes {
            self.skipped(1, "too large");
            tracing::warn!(
                key = %String::from_utf8_lossy(&key[..key.len().min(256)]), bytes = value.len(),
                "a key or its value is too large and left out; no value of Cluster Mesh is larger than etcd takes"
            );
            // What is left out counts as absent, so that a restart comes to the same state.
            return self.delete(key, mod_revision).await;
        }
        if !self.known.differs(&key, &value) {
            return Ok(());
        }
        let held = self.known.bytes_of(&key);
        let bytes = self.known.bytes() - held.unwrap_or_default() + key.len() + value.len();
        if bytes > bounds.total_bytes || held.is_none() && self.known.len() >= bounds.keys {
            self.overflowed = true;
            self.skipped(1, "beyond what one section may hold");
            return self.delete(key, mod_revision).await;
        }
        // Room first, then the record and the message together: nothing can come in between.
        let waits = if held.is_some() { &self.waits.modify } else { &self.waits.create };
        let room = room(self.events, waits).await?;
        self.known.told(key.clone(), &value);
        room.send(SectionEvent::Put { key, value, revision: mod_revision });
        Ok(())
    }

    /// Whether a tenth of the bounds is free, so that a list is worth its while.
    fn has_room(&self) -> bool {
        let bounds = &self.shared.config.bounds;
        self.known.len() < bounds.keys - bounds.keys / 10
            && self.known.bytes() < bounds.total_bytes - bounds.total_bytes / 10
    }

    async fn delete(&mut self, key: Bytes, revision: i64) -> Result<(), Stop> {
        if !self.known.contains(&key) {
            return Ok(());
        }
        let room = room(self.events, &self.waits.delete).await?;
        self.known.forgotten(&key);
        room.send(SectionEvent::Delete { key, revision });
        Ok(())
    }

    /// Sends what needs no record.
    async fn tell(&self, event: SectionEvent) -> Result<(), Stop> {
        self.events.send(event).await.map_err(|_| Stop::ConsumerLeft)
    }

    /// The section is complete up to `revision`.
    fn confirmed(&self, revision: i64, session: &Session) {
        let keys = self.known.len();
        self.shared.status.send_modify(|status| {
            status.store_revision = session.store_revision();
            if let Some(section) = status.sections.get_mut(self.name) {
                section.revision = revision;
                section.confirmed = Some(Utc::now());
                section.keys = keys;
            }
        });
    }

    fn skipped(&self, count: usize, why: &str) {
        if count > 0 {
            self.status(|status| {
                status.skipped += count as u64;
                status.last_error =
                    Some(format!("{} keys were left out so far, the last one {why}", status.skipped));
            });
        }
    }

    fn phase(&self, phase: SectionPhase) {
        self.status(|status| status.phase = phase);
    }

    fn status(&self, change: impl FnOnce(&mut SectionStatus)) {
        self.shared.status.send_modify(|status| {
            change(status.sections.entry(self.name.to_owned()).or_insert_with(SectionStatus::new));
        });
    }
}

/// Waits until the consumer has room for one more event, and notes how long that took: mostly not even long enough to look at
/// a clock.
async fn room<'a>(
    events: &'a mpsc::Sender<SectionEvent>,
    waits: &Histogram,
) -> Result<mpsc::Permit<'a, SectionEvent>, Stop> {
    match events.try_reserve() {
        Ok(room) => {
            waits.observe(0.0);
            Ok(room)
        }
        Err(TrySendError::Closed(())) => Err(Stop::ConsumerLeft),
        Err(TrySendError::Full(())) => {
            let begun = Instant::now();
            let room = events.reserve().await.map_err(|_| Stop::ConsumerLeft)?;
            waits.observe(begun.elapsed().as_secs_f64());
            Ok(room)
        }
    }
}

/// Waits until the canary exists.
async fn wait_for(session: &Session, canary: &Bytes) -> Result<(), SessionError> {
    let (value, revision) = session.get(canary).await?;
    if value.is_some() {
        return Ok(());
    }
    let mut watch = session.watch(Span::Key(canary.clone()), revision + 1).await?;
    loop {
        if let WatchAnswer::Changes { changes, .. } = watch.next().await?
            && changes.iter().any(|change| matches!(change, Change::Put(_)))
        {
            return Ok(());
        }
    }
}
