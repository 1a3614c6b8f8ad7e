//! The etcd engine: exporter and relay write to etcd, and the store that the gateway serves follows it by one watch,
//! at etcd's own revisions. Any number of processes on one etcd serve the same revisions under the same cluster id.
//!
//! All of them follow, and one of them writes: each key has one writer. Who that is may change while they run, so
//! writing is a [`Term`], which can be begun and ended while following goes on.

mod follow;

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use tokio::{sync::watch, task::JoinSet, time::sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use crate::writer::Exchanged;
use crate::{
    backoff::Backoff,
    client::{RateLimiter, RateLimits, Resolver, Rounds, Session, SessionError, connect},
    config::ClientConfig,
    memory::{Limits, MemoryStore, Revision, StoreId},
    metrics::{ClientMetrics, Limiter},
    writer::{DriverConfig, Mark, Queue, Writer, drive, keep_for_the_next, limiter},
};

/// How etcd is used.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// Where etcd is and whom to be towards it: a user that may read everything and write.
    pub client: ClientConfig,
    /// How long keys outlive their writer. 15 minutes; etcd makes it a few seconds at least.
    pub lease_ttl: Duration,
    /// How long it may take until a replica in whose place another writes has ended its [`Term`]: what a leader goes on for that
    /// cannot renew its Lease. A term that lasts longer is taken for the right one, and takes over from the other. 10 s.
    pub told_within: Duration,
    /// Bounds of the store that follows etcd.
    pub limits: Limits,
    /// Where it is counted how etcd answers.
    pub metrics: ClientMetrics,
}

impl EtcdConfig {
    /// The defaults of the wire format for the etcd that `client` names.
    pub fn new(client: ClientConfig) -> Self {
        Self {
            client,
            lease_ttl: Duration::from_secs(15 * 60),
            told_within: Duration::from_secs(10),
            limits: Limits::default(),
            metrics: ClientMetrics::default(),
        }
    }
}

/// A store in etcd, followed. Dropping it ends that; what is in etcd stays until its leases run out. While it lives, the
/// leases of what it has written are renewed until another writes in its place.
#[derive(Debug)]
pub struct EtcdEngine {
    store: MemoryStore,
    driver: DriverConfig,
    /// That of following.
    limiter: Arc<RateLimiter>,
    desk: Desk,
    report: watch::Sender<EtcdStatus>,
    status: watch::Receiver<EtcdStatus>,
    _tasks: JoinSet<()>,
    /// Cancelled when this is dropped.
    gone: CancellationToken,
    _gone: DropGuard,
}

/// The time in which this process writes to etcd. Dropping it ends that at once: what waits to be written is forgotten,
/// and what was written stays until the next writer takes it over, or until its leases run out after the engine is gone too.
#[derive(Debug)]
pub struct Term {
    writer: Writer,
    queue: Arc<Queue>,
    desk: Desk,
    _over: DropGuard,
}

impl Term {
    /// Writes to etcd for as long as the term lasts.
    pub fn writer(&self) -> &Writer {
        &self.writer
    }
}

impl Drop for Term {
    fn drop(&mut self) {
        self.desk.clear(&self.queue);
    }
}

/// The queue of the term under way, which has to know of keys that vanish.
#[derive(Debug, Clone, Default)]
struct Desk(Arc<Mutex<Option<Arc<Queue>>>>);

impl Desk {
    fn queue(&self) -> Option<Arc<Queue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, queue: &Arc<Queue>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(queue));
    }

    /// Takes this queue away, unless the next one is there already.
    fn clear(&self, queue: &Arc<Queue>) {
        let mut present = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if present.as_ref().is_some_and(|present| Arc::ptr_eq(present, queue)) {
            *present = None;
        }
    }
}

/// How following etcd gets on.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct EtcdStatus {
    /// Whether the watch is running.
    pub following: bool,
    /// How often it had to be made anew.
    pub failures: u64,
    /// The latest failure in words.
    pub last_error: Option<String>,
    /// Why this process cannot go on with etcd, once it cannot.
    pub end: Option<EtcdEnd>,
}

/// Why a process cannot go on with etcd. It should end and be started again.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EtcdEnd {
    /// Another etcd cluster answers, or the same one with revisions lost: revisions begin anew, so that a new store has to
    /// be served. In words that say so.
    Exchanged(String),
    /// A task of ours has failed, which never should: what it is called. The log says why.
    Stopped(&'static str),
}

impl EtcdEngine {
    /// Connects, takes in everything that etcd holds, and begins to follow; writes nothing. Waits for etcd as long as that takes,
    /// saying in the log what is missing. Must be called within a tokio runtime.
    pub async fn start(config: EtcdConfig) -> Self {
        let limiter =
            Arc::new(RateLimiter::new(RateLimits { qps: 1_000, bootstrap_qps: 10_000, max_in_flight: 10 }));
        let (session, store) = loop_until_loaded(&config, &limiter).await;
        let driver = DriverConfig {
            client: config.client.clone(),
            cluster_id: store.id().0,
            lease_ttl: config.lease_ttl,
            told_within: config.told_within,
            metrics: config.metrics.clone(),
        };
        let desk = Desk::default();
        let (report, status) = watch::channel(EtcdStatus { following: true, ..EtcdStatus::default() });
        let mut tasks = JoinSet::new();
        let following = follow::run(follow::Follower {
            client: config.client,
            limiter: Arc::clone(&limiter),
            metrics: config.metrics,
            store: store.clone(),
            desk: desk.clone(),
            status: report.clone(),
            session: Some(session),
        });
        tasks.spawn(until_the_end(report.clone(), "the following of etcd", following));
        let gone = CancellationToken::new();
        let _gone = gone.clone().drop_guard();
        Self { store, driver, limiter, desk, report, status, _tasks: tasks, gone, _gone }
    }

    /// Begins to write to etcd. Keys that are put are taken over from whoever wrote them before; what an earlier writer
    /// left beyond them is for [sections](crate::writer::SectionWriter) to remove. There should be one term at a time.
    /// Must be called within a tokio runtime.
    pub fn begin_term(&self) -> Term {
        let queue = Arc::new(Queue::new());
        let limiter = Arc::new(limiter());
        self.desk.put(&queue);
        let over = CancellationToken::new();
        tokio::spawn({
            let (queue, driver, limiter) = (Arc::clone(&queue), self.driver.clone(), Arc::clone(&limiter));
            let (store, over, report) = (self.store.clone(), over.clone(), self.report.clone());
            let life = async move {
                let mark = Mark::new();
                // Apart, for both are large, and there is one at a time.
                let driving = Box::pin(drive(&queue, &driver, &limiter, &mark));
                let driving = until_the_end(report, "the writing to etcd", driving);
                if over.run_until_cancelled(driving).await.is_none() {
                    Box::pin(keep_for_the_next(&queue, &driver, &limiter, &mark, &store)).await;
                }
            };
            self.gone.clone().run_until_cancelled_owned(life)
        });
        Term {
            writer: Writer::etcd(self.store.clone(), Arc::clone(&queue), limiter),
            queue,
            desk: self.desk.clone(),
            _over: over.drop_guard(),
        }
    }

    /// The store that follows etcd, for the gateway to serve. Written to in a [`Term`] alone.
    pub fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// How following etcd gets on.
    pub fn status(&self) -> watch::Receiver<EtcdStatus> {
        self.status.clone()
    }

    /// What tells how the limits on following etcd are used. Those on writing are the [`Writer`]'s.
    pub fn limiter(&self) -> Limiter {
        Limiter(Arc::clone(&self.limiter))
    }

    /// Completes when this process cannot go on with etcd.
    pub async fn ended(&self) -> EtcdEnd {
        let mut status = self.status.clone();
        // A sender is in `self`, so that the channel is never closed.
        let ended = status.wait_for(|status| status.end.is_some()).await;
        match ended.ok().and_then(|status| status.end.clone()) {
            Some(end) => end,
            None => std::future::pending().await,
        }
    }
}

/// Runs a task that ends only when etcd was exchanged, and reports its end, also when it panics: a task that is merely spawned
/// would end in silence then. One that is aborted reports nothing.
async fn until_the_end(
    report: watch::Sender<EtcdStatus>,
    what: &'static str,
    task: impl Future<Output = Exchanged>,
) {
    // What it has left half done is not used any more: the process ends.
    let end = match AssertUnwindSafe(task).catch_unwind().await {
        Ok(exchanged) => EtcdEnd::Exchanged(exchanged.to_string()),
        Err(_) => EtcdEnd::Stopped(what),
    };
    report.send_modify(|status| {
        // Those that depend on it may end, too: the first one is what matters.
        status.end.get_or_insert(end);
    });
}

async fn loop_until_loaded(config: &EtcdConfig, limiter: &Arc<RateLimiter>) -> (Session, MemoryStore) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut rounds = Rounds::default();
    loop {
        let error = match connect(&Resolver::system(), &config.client, &mut rounds).await {
            Err(error) => error.to_string(),
            Ok(connected) => {
                let session = Session::new(connected.client, Arc::clone(limiter), config.metrics.clone());
                match load(&session, config.limits).await {
                    Ok(store) => return (session, store),
                    Err(error) => error.to_string(),
                }
            }
        };
        tracing::warn!(%error, "etcd cannot be read; trying again");
        sleep(backoff.next_delay()).await;
    }
}

async fn load(session: &Session, limits: Limits) -> Result<MemoryStore, SessionError> {
    let (kvs, revision) = follow::snapshot(session).await?;
    let id = session.cluster_id().ok_or(SessionError::NoHeader)?;
    let store = MemoryStore::new(StoreId(id), limits);
    // A new etcd is at revision 1, as a new store is.
    if Revision(revision) > store.revision() || !kvs.is_empty() {
        store
            .load_snapshot(Revision(revision), kvs)
            .map_err(|_| SessionError::Malformed("revisions went back"))?;
    }
    Ok(store)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that nobody follows yet, with a task in the place of following.
    fn engine(following: impl Future<Output = Exchanged> + Send + 'static) -> EtcdEngine {
        let config = EtcdConfig::new(ClientConfig::parse("endpoints:\n- http://127.0.0.1:1\n").unwrap());
        let (report, status) = watch::channel(EtcdStatus::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(until_the_end(report.clone(), "the following of etcd", following));
        EtcdEngine {
            store: MemoryStore::new(StoreId(1), Limits::default()),
            driver: DriverConfig {
                client: config.client,
                cluster_id: 1,
                lease_ttl: config.lease_ttl,
                told_within: config.told_within,
                metrics: config.metrics,
            },
            limiter: Arc::new(limiter()),
            desk: Desk::default(),
            report,
            status,
            _tasks: tasks,
            gone: CancellationToken::new(),
            _gone: CancellationToken::new().drop_guard(),
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_end_like_an_exchange_and_the_first_one_counts() {
        let panics = engine(async { panic!("on purpose") });
        assert_eq!(panics.ended().await, EtcdEnd::Stopped("the following of etcd"));
        let exchanged = Exchanged { was: 1, is: "2".into() };
        until_the_end(panics.report.clone(), "the writing to etcd", async { exchanged.clone() }).await;
        assert_eq!(panics.ended().await, EtcdEnd::Stopped("the following of etcd"));

        let told = exchanged.to_string();
        assert_eq!(engine(async { exchanged }).ended().await, EtcdEnd::Exchanged(told));
    }

    #[tokio::test]
    async fn a_term_that_ends_in_order_is_no_end() {
        let engine = engine(std::future::pending());
        drop(engine.begin_term());
        tokio::task::yield_now().await;
        assert_eq!(engine.ended().now_or_never(), None);
    }
}
