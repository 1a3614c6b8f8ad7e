//! The etcd engine: exporter and relay write to etcd, and the store that the gateway serves follows it by one watch,
//! at etcd's own revisions. Any number of processes on one etcd serve the same revisions under the same cluster id.

mod follow;

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinSet, time::sleep};

pub use crate::writer::Exchanged;
use crate::{
    backoff::Backoff,
    client::{RateLimiter, RateLimits, Resolver, Rounds, Session, SessionError, connect},
    config::ClientConfig,
    memory::{Limits, MemoryStore, Revision, StoreId},
    writer::{DriverConfig, Queue, Writer, drive},
};

/// How etcd is used.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// Where etcd is and whom to be towards it: a user that may read everything and write.
    pub client: ClientConfig,
    /// How long keys outlive their writer. 15 minutes; etcd makes it a few seconds at least.
    pub lease_ttl: Duration,
    /// Bounds of the store that follows etcd.
    pub limits: Limits,
}

impl EtcdConfig {
    /// The defaults of the wire format for the etcd that `client` names.
    pub fn new(client: ClientConfig) -> Self {
        Self { client, lease_ttl: Duration::from_secs(15 * 60), limits: Limits::default() }
    }
}

/// A store in etcd. Dropping it ends following and writing; what is in etcd stays until its leases run out.
#[derive(Debug)]
pub struct EtcdEngine {
    store: MemoryStore,
    writer: Writer,
    status: watch::Receiver<EtcdStatus>,
    _tasks: JoinSet<()>,
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
    /// Set when another etcd cluster answers. Nothing is followed or written any more then.
    pub exchanged: Option<String>,
}

impl EtcdEngine {
    /// Connects, takes in everything that etcd holds, and begins to follow. Waits for etcd as long as that takes,
    /// saying in the log what is missing. Must be called within a tokio runtime.
    pub async fn start(config: EtcdConfig) -> Self {
        let limiter =
            Arc::new(RateLimiter::new(RateLimits { qps: 1_000, bootstrap_qps: 10_000, max_in_flight: 10 }));
        let (session, store) = loop_until_loaded(&config, &limiter).await;
        let queue = Arc::new(Queue::new());
        let (status, status_seen) = watch::channel(EtcdStatus { following: true, ..EtcdStatus::default() });
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let driver = DriverConfig {
                client: config.client.clone(),
                cluster_id: store.id().0,
                lease_ttl: config.lease_ttl,
            };
            let (queue, status) = (Arc::clone(&queue), status.clone());
            async move {
                let exchanged = drive(&queue, &driver).await;
                status.send_modify(|status| status.exchanged = Some(exchanged.to_string()));
            }
        });
        tasks.spawn(follow::run(follow::Follower {
            client: config.client,
            limiter,
            store: store.clone(),
            queue: Arc::clone(&queue),
            status,
            session: Some(session),
        }));
        let writer = Writer::etcd(store.clone(), queue);
        Self { store, writer, status: status_seen, _tasks: tasks }
    }

    /// The store that follows etcd, for the gateway to serve. Written to through [`EtcdEngine::writer`] alone.
    pub fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// Writes to etcd.
    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    /// How following etcd gets on.
    pub fn status(&self) -> watch::Receiver<EtcdStatus> {
        self.status.clone()
    }

    /// Completes when another etcd cluster answers, or the same one with revisions lost. Revisions begin anew then, so
    /// that the process has to serve a new store: it should end and be started again.
    pub async fn exchanged(&self) -> String {
        let mut status = self.status.clone();
        match status.wait_for(|status| status.exchanged.is_some()).await {
            Ok(status) => status.exchanged.clone().unwrap_or_default(),
            // The tasks end only with the engine.
            Err(_) => std::future::pending().await,
        }
    }
}

async fn loop_until_loaded(config: &EtcdConfig, limiter: &Arc<RateLimiter>) -> (Session, MemoryStore) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut rounds = Rounds::default();
    loop {
        let error = match connect(&Resolver::system(), &config.client, &mut rounds).await {
            Err(error) => error.to_string(),
            Ok(connected) => {
                let session = Session::new(connected.client, Arc::clone(limiter));
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
