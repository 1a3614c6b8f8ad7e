//! The reconciler at work: takes events as they come, makes the differences in batches, tries again what failed, and
//! now and then compares the kernel's maps with what they should hold.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::core::{Reconciler, Started};
use crate::datapath::{Datapath, DatapathError, MapOp, OpError};
use crate::mesh::fact::{Moment, Provenance};
use crate::metrics::Metrics;
use crate::plan::{Dump, Failures};
use crate::policy::{Fault, PolicyOp};
use crate::sources::mesh::Arrival;
use crate::status::Applied;

/// Most events that are taken together: enough that a first list costs few system calls, few enough that a change
/// behind it does not wait long.
const BATCH: usize = 4096;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Reasons that are logged of one batch.
const LOGGED_REASONS: usize = 3;

/// The kernel's maps, or what stands for them in a test.
pub trait Maps: Send + 'static {
    /// Makes changes; one result per operation.
    fn apply(&mut self, ops: &[MapOp]) -> Vec<Result<(), OpError>>;

    /// Reads everything.
    ///
    /// # Errors
    /// The kernel does not let it.
    fn dump(&mut self) -> Result<Dump, DatapathError>;

    /// Makes changes of endpoints and of their policies, in order; one result per operation.
    fn enforce(&mut self, ops: &[PolicyOp]) -> Vec<Result<(), Fault>>;
}

impl Maps for Arc<Datapath> {
    fn apply(&mut self, ops: &[MapOp]) -> Vec<Result<(), OpError>> {
        Datapath::apply(self, ops)
    }

    fn dump(&mut self) -> Result<Dump, DatapathError> {
        Ok(Dump {
            services: self.services()?,
            slots: self.slots()?,
            backends: self.backends()?,
            ipcache: self.ipcache()?,
        })
    }

    fn enforce(&mut self, ops: &[PolicyOp]) -> Vec<Result<(), Fault>> {
        ops.iter().map(|op| op.make(self)).collect()
    }
}

/// A look at the reconciler's state, from its own task.
pub type Look = Box<dyn FnOnce(&Reconciler, &Progress) + Send>;

/// What has reached the maps.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Newest revision per section.
    pub applied: BTreeMap<Arc<str>, u64>,
    /// The latest reasons why operations failed; empty after everything was made.
    pub failing: Vec<String>,
    /// How the start went, once it is over.
    pub started: Option<Started>,
    /// When this was looked at.
    pub now: Moment,
}

/// Asks the reconciler's task.
#[derive(Clone, Debug)]
pub struct Looks(mpsc::Sender<Look>);

impl Looks {
    /// What `look` sees; nothing after the task has ended.
    pub async fn at<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Reconciler, &Progress) -> T + Send + 'static,
    ) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        let look: Look = Box::new(move |reconciler, progress| {
            // Who has asked may have gone; that is their affair.
            let _ = answer.send(look(reconciler, progress));
        });
        self.0.send(look).await.ok()?;
        answered.await.ok()
    }
}

/// A reconciler and everything it works with.
pub struct Task<M> {
    reconciler: Reconciler,
    maps: M,
    events: mpsc::Receiver<Arrival>,
    looks: mpsc::Receiver<Look>,
    applied: broadcast::Sender<Applied>,
    metrics: Arc<Metrics>,
    compare_every: Duration,
    progress: Progress,
    retry: Duration,
    retry_at: Option<tokio::time::Instant>,
    start: Instant,
}

impl<M: Maps> Task<M> {
    /// A task over `reconciler`, which has adopted what is in `maps`. `applied` hears of every batch.
    pub fn new(
        reconciler: Reconciler,
        maps: M,
        events: mpsc::Receiver<Arrival>,
        applied: broadcast::Sender<Applied>,
        metrics: Arc<Metrics>,
        compare_every: Duration,
    ) -> (Self, Looks) {
        let (ask, looks) = mpsc::channel(16);
        let task = Self {
            reconciler,
            maps,
            events,
            looks,
            applied,
            metrics,
            compare_every,
            progress: Progress::default(),
            retry: FIRST_RETRY,
            retry_at: None,
            start: Instant::now(),
        };
        (task, Looks(ask))
    }

    /// Works until `shutdown`. What is in the maps stays there.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut compare =
            tokio::time::interval_at(tokio::time::Instant::now() + self.compare_every, self.compare_every);
        compare.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut arrivals = Vec::with_capacity(BATCH);
        loop {
            let wake = self.wake();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(look) = self.looks.recv() => {
                    self.progress.now = self.now();
                    look(&self.reconciler, &self.progress);
                }
                count = self.events.recv_many(&mut arrivals, BATCH) => {
                    if count == 0 {
                        return;
                    }
                    self.work(&mut arrivals);
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(tokio::time::Instant::now)), if wake.is_some() => {
                    self.work(&mut arrivals);
                }
                _ = compare.tick() => self.compare(),
            }
        }
    }

    /// When there is something to do even if nothing happens.
    fn wake(&self) -> Option<tokio::time::Instant> {
        let deadline = self.reconciler.deadline().map(|moment| (self.start + moment.0).into());
        [deadline, self.retry_at].into_iter().flatten().min()
    }

    fn now(&self) -> Moment {
        Moment(self.start.elapsed())
    }

    fn work(&mut self, arrivals: &mut Vec<Arrival>) {
        let taken = Instant::now();
        let first = arrivals.first().map(|arrival| arrival.received);
        let mut sections = BTreeMap::new();
        for arrival in arrivals.drain(..) {
            self.metrics.stage("queue", taken.saturating_duration_since(arrival.received));
            // What the agent concludes by itself carries no revision.
            if arrival.revision > 0 {
                sections.insert(arrival.section, arrival.revision);
            }
            let at = Provenance { revision: arrival.revision, arrived: self.now() };
            if let Err(refusal) = self.reconciler.event(arrival.event, at) {
                self.metrics.rejected("mesh", "refused");
                tracing::warn!(error = %refusal, "entry does not count");
            }
        }
        let retry = self.retry_at.is_some_and(|at| at <= tokio::time::Instant::now());
        self.enforce(retry);
        let (ops, started) = self.reconciler.plan(self.now(), retry);
        let planned = Instant::now();
        let (failures, failed) = self.make(&ops);
        let applied = Instant::now();

        self.metrics.stage("plan", planned - taken);
        self.metrics.stage("apply", applied - planned);
        if let Some(first) = first {
            self.metrics.stage("total", applied.saturating_duration_since(first));
        }
        self.settle(&failures);
        if let Some(started) = started {
            announce(&started);
            self.progress.started = Some(started);
        }
        self.report(sections, ops.len() - failed, failed, first);
    }

    /// Policies come first: an address gets a new identity only once they know it.
    fn enforce(&mut self, retry: bool) {
        let begun = Instant::now();
        let ops = self.reconciler.plan_policies(self.now(), retry);
        if ops.is_empty() {
            return;
        }
        self.metrics.stage("resolve", begun.elapsed());
        let results = self.maps.enforce(&ops);
        for (op, fault) in
            ops.iter().zip(&results).filter_map(|(op, result)| Some((op, result.as_ref().err()?)))
        {
            tracing::warn!(interface = op.interface(), error = %fault, "a pod's policy is not as it should be");
        }
        let made = results.iter().filter(|result| result.is_ok()).count();
        self.metrics.operations(made, results.len() - made);
        self.reconciler.confirm_policies(&ops, results);
        self.metrics.stage("enforce", begun.elapsed());
    }

    fn make(&mut self, ops: &[MapOp]) -> (Failures, usize) {
        let results = if ops.is_empty() { Vec::new() } else { self.maps.apply(ops) };
        let failed = results.iter().filter(|result| result.is_err()).count();
        self.metrics.operations(ops.len() - failed, failed);
        (self.reconciler.confirm(ops, &results), failed)
    }

    /// Decides when to try again.
    fn settle(&mut self, failures: &Failures) {
        for reason in failures.reasons.iter().take(LOGGED_REASONS) {
            tracing::warn!(error = %reason, frontends = failures.frontends.len(), addresses = failures.ipcache.len(), "maps are not as they should be; trying again");
        }
        if !self.reconciler.has_to_retry() {
            self.progress.failing.clear();
            (self.retry, self.retry_at) = (FIRST_RETRY, None);
            return;
        }
        if !failures.is_empty() {
            self.progress.failing = failures.reasons.iter().map(ToString::to_string).collect();
        }
        let now = tokio::time::Instant::now();
        if self.retry_at.is_none_or(|at| at <= now) {
            self.retry_at = Some(now + self.retry);
            self.retry = (self.retry * 2).min(LONGEST_RETRY);
        }
    }

    fn report(
        &mut self,
        sections: BTreeMap<Arc<str>, u64>,
        made: usize,
        failed: usize,
        first: Option<Instant>,
    ) {
        if let Some(first) = first
            && self.applied.receiver_count() > 0
        {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let report = Applied {
                sections: sections.iter().map(|(name, revision)| (name.to_string(), *revision)).collect(),
                operations: made,
                failed,
                received_unix_nanos: nanos(now.saturating_sub(first.elapsed())),
                applied_unix_nanos: nanos(now),
            };
            // Without anybody listening there is nobody to miss it.
            let _ = self.applied.send(report);
        }
        self.progress.applied.extend(sections);
    }

    fn compare(&mut self) {
        let dump = match self.maps.dump() {
            Ok(dump) => dump,
            Err(error) => {
                tracing::warn!(%error, "cannot compare the maps with what they should hold");
                return;
            }
        };
        let ops = self.reconciler.compare(&dump);
        if ops.is_empty() {
            return;
        }
        let (failures, failed) = self.make(&ops);
        self.metrics.healed(ops.len());
        tracing::warn!(
            operations = ops.len(),
            failed,
            "the maps were not as the agent had left them; put right"
        );
        self.settle(&failures);
    }
}

fn announce(started: &Started) {
    match started {
        Started::Synced => {
            tracing::info!("all clusters have been read; the maps hold what the mesh asks for")
        }
        Started::TimedOut(peers) => tracing::warn!(
            peers = ?peers,
            "not all peers have been read in time; what an earlier run knew of them is no longer used"
        ),
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
