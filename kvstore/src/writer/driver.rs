//! Carries out what a [`Queue`] wants: transactions of many puts, a few in flight, under leases that are kept alive.

use std::{collections::HashMap, sync::Arc, time::Duration};

use etcd_client::{Compare, CompareOp, Error, PutOptions, Txn, TxnOp};
use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, sleep};

use super::queue::{Queue, Work, Write};
use crate::{
    backoff::Backoff,
    client::{RateLimiter, RateLimits, Resolver, Rounds, Session, SessionError, connect},
    config::ClientConfig,
    memory::{MemoryStore, StoreId},
    metrics::{Action, ClientMetrics, Scope},
};

/// Transactions that wait for their answer at the same time.
const IN_FLIGHT: usize = 4;
/// Whose turn it is to write. A transaction counts only while that is the writer's own mark: one that was stopped where it
/// stood, and goes on when another writes in its place, changes nothing any more, however late it is told so.
const TURN: &str = "isthmus/.writer";
/// Waits between attempts at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(10));

/// Where and how to write.
#[derive(Debug, Clone)]
pub(crate) struct DriverConfig {
    pub(crate) client: ClientConfig,
    /// The etcd cluster to write to. Another one at the same address is not written to.
    pub(crate) cluster_id: u64,
    /// How long keys outlive their writer.
    pub(crate) lease_ttl: Duration,
    /// Time in which a writer in whose place another writes should have been told to end. One that goes on after that is
    /// the right one.
    pub(crate) told_within: Duration,
    pub(crate) metrics: ClientMetrics,
}

/// The limits that are kept towards etcd.
pub(crate) fn limiter() -> RateLimiter {
    RateLimiter::new(RateLimits { qps: 10_000, bootstrap_qps: 10_000, max_in_flight: 64 })
}

/// Works the queue off for as long as the etcd cluster is the right one; returns when it is another.
pub(crate) async fn drive(
    queue: &Queue,
    config: &DriverConfig,
    limiter: &Arc<RateLimiter>,
    mark: &Mark,
) -> Exchanged {
    let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
    let mut rounds = Rounds::default();
    let mut turn = Turn { mark, taken: false };
    loop {
        let error = match connect(&Resolver::system(), &config.client, &mut rounds).await {
            Err(error) => error.to_string(),
            Ok(connected) => {
                let session = Session::new(connected.client, Arc::clone(limiter), config.metrics.clone());
                let failure = tokio::select! {
                    failure = write(queue, &session, config, &mut turn, &mut backoff) => failure,
                    failure = keep_alive(queue, &session, config.lease_ttl) => failure,
                };
                match failure {
                    Failure::Exchanged(exchanged) => return exchanged,
                    Failure::Session(error) => error.to_string(),
                    superseded @ Failure::Superseded => {
                        tracing::warn!("{superseded}");
                        queue.trouble(superseded.to_string());
                        sleep(config.told_within).await;
                        // Whatever the other has written meanwhile is written over.
                        turn.taken = false;
                        queue.leases().into_iter().for_each(|lease| queue.lease_lost(lease));
                        continue;
                    }
                }
            }
        };
        tracing::warn!(%error, "cannot write to etcd; trying again");
        queue.trouble(error);
        sleep(backoff.next_delay()).await;
    }
}

/// Another etcd cluster answers than the one that this process has read its state from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "etcd was exchanged: {was:x} was followed, {is} answers. Restart the process, so that readers \
     see that revisions begin anew"
)]
pub struct Exchanged {
    /// The cluster id that was followed.
    pub was: u64,
    /// What answers now.
    pub is: String,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Exchanged(Exchanged),
    #[error("another replica writes to etcd; this one waits until it is told to end")]
    Superseded,
}

/// What a writer puts under [`TURN`]: no two are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark(String);

impl Mark {
    pub(crate) fn new() -> Self {
        Self(format!("{:016x}", StoreId::random().0))
    }

    /// Whether it is still this writer's turn, as far as `store` has followed etcd.
    fn is_in(&self, store: &MemoryStore) -> bool {
        store.get(TURN.as_bytes()).is_some_and(|kv| kv.value == self.0.as_bytes())
    }
}

/// See [`TURN`].
struct Turn<'a> {
    mark: &'a Mark,
    /// Taken once, and not again with another connection: it may have become another's meanwhile.
    taken: bool,
}

impl Turn<'_> {
    async fn take(&mut self, session: &Session) -> Result<(), SessionError> {
        if !self.taken {
            let take = Txn::new().and_then([TxnOp::put(TURN, self.mark.0.as_str(), None)]);
            transaction(session, take).await.0?;
            self.taken = true;
        }
        Ok(())
    }

    fn own(&self) -> Compare {
        Compare::value(TURN, CompareOp::Equal, self.mark.0.as_str())
    }
}

/// Writes until the connection fails.
async fn write(
    queue: &Queue,
    session: &Session,
    config: &DriverConfig,
    turn: &mut Turn<'_>,
    backoff: &mut Backoff,
) -> Failure {
    if let Err(failure) = is_the_right_one(session, config).await {
        return failure;
    }
    if let Err(error) = turn.take(session).await {
        return error.into();
    }
    let mut flying = FuturesUnordered::new();
    let mut batches = Batches { queue, flying: HashMap::new() };
    let mut next = 0u64;
    let error = 'session: loop {
        while flying.len() < IN_FLIGHT {
            match queue.take() {
                Work::Nothing => break,
                Work::Lease => {
                    if let Err(error) = grant(queue, session, config.lease_ttl).await {
                        if error.is_fatal() {
                            break 'session error;
                        }
                        queue.trouble(format!("etcd grants no lease: {error}"));
                        sleep(backoff.next_delay()).await;
                    }
                }
                Work::Batch(batch) => {
                    let (txn, kinds) = (txn(&batch, turn.own()), kinds(&batch));
                    batches.flying.insert(next, batch);
                    flying.push(async move {
                        let (result, took) = transaction(session, txn).await;
                        // Each key took as long as the transaction that it was in.
                        for ((scope, action), keys) in kinds {
                            let written = matches!(result, Ok(Some(_)));
                            config.metrics.operation(scope, action, keys, took, written);
                        }
                        (next, result)
                    });
                    next += 1;
                }
            }
        }
        let (number, result) = tokio::select! {
            Some(landed) = flying.next() => landed,
            () = queue.woken() => continue,
        };
        let result = match result {
            Err(error) if error.is_fatal() => break error,
            other => other,
        };
        let batch = batches.flying.remove(&number).expect("what lands has been flying");
        match result {
            Ok(Some(revision)) => {
                queue.done(&batch, revision);
                backoff.reset();
            }
            Ok(None) => {
                queue.failed(&batch, false, "another replica writes to etcd".into());
                return Failure::Superseded;
            }
            Err(error) => {
                refused(queue, session, &batch, &error.to_string()).await;
                sleep(backoff.next_delay()).await;
            }
        }
    };
    error.into()
}

/// Which cluster is it? Nothing is written to a wrong one.
async fn is_the_right_one(session: &Session, config: &DriverConfig) -> Result<(), Failure> {
    session.get(&"cilium/.heartbeat".into()).await?;
    match session.cluster_id() {
        Some(id) if id == config.cluster_id => Ok(()),
        other => Err(Failure::Exchanged(Exchanged {
            was: config.cluster_id,
            is: format!("{:x}", other.unwrap_or_default()),
        })),
    }
}

/// The batches in flight. Whatever ends the connection, and whoever notices first, they go back to the queue: whether
/// they arrived is unknown, and writing them twice does no harm.
struct Batches<'a> {
    queue: &'a Queue,
    flying: HashMap<u64, Vec<Write>>,
}

impl Drop for Batches<'_> {
    fn drop(&mut self) {
        for batch in self.flying.values() {
            self.queue.failed(batch, false, "the connection was lost".into());
        }
    }
}

/// etcd does not take a batch. The words are etcd's and gRPC's.
async fn refused(queue: &Queue, session: &Session, batch: &[Write], error: &str) {
    let too_large = error.contains("too large") || error.contains("larger than max");
    if error.contains("lease not found") {
        queue.failed(batch, false, error.into());
        let mut leases: Vec<i64> = batch.iter().filter_map(|write| Some(write.value.as_ref()?.1)).collect();
        leases.sort_unstable();
        leases.dedup();
        for lease in leases {
            // What fails here comes back with the next attempt.
            let _ = renew(queue, session, lease).await;
        }
    } else if let ([write], true) = (batch, too_large) {
        let key = String::from_utf8_lossy(&write.key);
        tracing::error!(%key, error, "etcd refuses this value; the key keeps its old one");
        queue.reject(write, format!("{key}: {error}"));
    } else {
        let full = error.contains("database space exceeded");
        if full {
            tracing::error!(error, "etcd is full; compact and defragment it, or raise its quota");
        }
        queue.failed(batch, batch.len() > 1 && !full, error.into());
    }
}

fn txn(batch: &[Write], own_turn: Compare) -> Txn {
    let ops: Vec<TxnOp> = batch
        .iter()
        .map(|write| match &write.value {
            Some((value, lease)) => {
                TxnOp::put(write.key.as_ref(), value.as_ref(), Some(PutOptions::new().with_lease(*lease)))
            }
            None => TxnOp::delete(write.key.as_ref(), None),
        })
        .collect();
    Txn::new().when([own_turn]).and_then(ops)
}

/// How many keys of which kind a batch changes.
fn kinds(batch: &[Write]) -> HashMap<(Scope, Action), usize> {
    let mut kinds = HashMap::new();
    for write in batch {
        let action = if write.value.is_some() { Action::Update } else { Action::Delete };
        *kinds.entry((Scope::of(&write.key), action)).or_default() += 1;
    }
    kinds
}

/// The revision that it made, none if what it depends on does not hold; and how long the answer took.
async fn transaction(session: &Session, txn: Txn) -> (Result<Option<i64>, SessionError>, Duration) {
    let mut kv = session.client().kv_client();
    let (response, took) = session.call(kv.txn(txn)).await;
    let revision = response.and_then(|response| {
        let revision = session.check(response.header())?;
        Ok(response.succeeded().then_some(revision))
    });
    (revision, took)
}

async fn grant(queue: &Queue, session: &Session, ttl: Duration) -> Result<(), SessionError> {
    let mut leases = session.client().lease_client();
    let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
    let lease = session.call(leases.grant(seconds, None)).await.0?;
    session.check(lease.header())?;
    queue.add_lease(lease.id());
    Ok(())
}

/// Goes on renewing the leases of a writer that writes no more, until another one writes in its place, as far as `store` has
/// followed etcd. Nobody may lead for longer than leases last, as while the Kubernetes API is away, and what was written
/// is no less true for that: without its leases all of it would be gone.
pub(crate) async fn keep_for_the_next(
    queue: &Queue,
    config: &DriverConfig,
    limiter: &Arc<RateLimiter>,
    mark: &Mark,
    store: &MemoryStore,
) {
    let mut rounds = Rounds::default();
    // The writer has renewed them within a third of their life, and etcd has been followed that far by then.
    let period = config.lease_ttl / 6;
    let mut due = interval_at(Instant::now() + period, period);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !queue.leases().is_empty() {
        due.tick().await;
        if !mark.is_in(store) {
            return;
        }
        let renewed = async {
            let connected = connect(&Resolver::system(), &config.client, &mut rounds).await;
            let connected = connected.map_err(|error| error.to_string())?;
            let session = Session::new(connected.client, Arc::clone(limiter), config.metrics.clone());
            is_the_right_one(&session, config).await.map_err(|failure| failure.to_string())?;
            for lease in queue.leases() {
                renew(queue, &session, lease).await.map_err(|error| error.to_string())?;
            }
            Ok(())
        };
        let renewed: Result<(), String> = renewed.await;
        if let Err(error) = renewed {
            tracing::warn!(%error, "the leases of what was written cannot be renewed; trying again");
        }
    }
}

/// Renews every lease in time, and those under suspicion at once. Returns when the connection fails.
async fn keep_alive(queue: &Queue, session: &Session, ttl: Duration) -> Failure {
    let mut due = interval(ttl / 3);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // The first tick is now: leases may have run out while there was no connection.
        let leases = tokio::select! {
            _ = due.tick() => queue.leases(),
            suspects = queue.suspects() => suspects,
        };
        let mut renewals = futures::stream::iter(leases)
            .map(|lease| renew(queue, session, lease))
            .buffer_unordered(IN_FLIGHT);
        while let Some(renewal) = renewals.next().await {
            match renewal {
                Ok(()) => {}
                Err(error) if error.is_fatal() => return error.into(),
                Err(error) => queue.trouble(format!("a lease cannot be renewed: {error}")),
            }
        }
    }
}

/// Renews one lease, or finds that it is gone.
async fn renew(queue: &Queue, session: &Session, lease: i64) -> Result<(), SessionError> {
    let mut leases = session.client().lease_client();
    let renewal = async {
        match leases.keep_alive(lease).await {
            Ok(_) => Ok(true),
            Err(Error::LeaseKeepAliveError(_)) => Ok(false),
            Err(error) => Err(error),
        }
    };
    if !session.call(renewal).await.0? {
        tracing::warn!(lease = format!("{lease:x}"), "a lease is gone; its keys are written again");
        queue.lease_lost(lease);
    }
    Ok(())
}
