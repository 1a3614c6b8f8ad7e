//! Follows etcd by one watch into a store.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::sleep};

use super::{Desk, EtcdStatus};
use crate::{
    backoff::Backoff,
    client::{
        Change, Pair, RateLimiter, Resolver, Rounds, Session, SessionError, Span, WatchAnswer, connect,
    },
    config::ClientConfig,
    memory::{KeyValue, MemoryStore, Mirrored, Revision},
    metrics::ClientMetrics,
    writer::Exchanged,
};

pub(super) struct Follower {
    pub(super) client: ClientConfig,
    pub(super) limiter: Arc<RateLimiter>,
    pub(super) metrics: ClientMetrics,
    pub(super) store: MemoryStore,
    /// Whoever writes is told of keys that vanish, which may be its own.
    pub(super) desk: Desk,
    pub(super) status: watch::Sender<EtcdStatus>,
    /// The connection over which the store was filled.
    pub(super) session: Option<Session>,
}

/// Follows until another etcd cluster answers.
pub(super) async fn run(mut follower: Follower) -> Exchanged {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    let mut rounds = Rounds::default();
    loop {
        let error = match follower.once(&mut rounds, &mut backoff).await {
            Stop::Failed(error) => error,
            Stop::Exchanged(exchanged) => {
                tracing::error!(error = %exchanged, "following ends");
                follower.status.send_modify(|status| status.following = false);
                return exchanged;
            }
        };
        tracing::warn!(%error, "etcd is not followed; trying again");
        follower.status.send_modify(|status| {
            status.following = false;
            status.failures += 1;
            status.last_error = Some(error);
        });
        sleep(backoff.next_delay()).await;
    }
}

enum Stop {
    Failed(String),
    Exchanged(Exchanged),
}

impl From<SessionError> for Stop {
    fn from(error: SessionError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl Follower {
    async fn once(&mut self, rounds: &mut Rounds, backoff: &mut Backoff) -> Stop {
        let session = match self.session.take() {
            Some(session) => session,
            None => match connect(&Resolver::system(), &self.client, rounds).await {
                Ok(connected) => {
                    Session::new(connected.client, Arc::clone(&self.limiter), self.metrics.clone())
                }
                Err(error) => return Stop::Failed(error.to_string()),
            },
        };
        match self.over(&session, backoff).await {
            Ok(never) => match never {},
            Err(stop) => stop,
        }
    }

    async fn over(&self, session: &Session, backoff: &mut Backoff) -> Result<std::convert::Infallible, Stop> {
        let (_, revision) = session.get(&"cilium/.heartbeat".into()).await?;
        self.same_history(session, revision)?;
        loop {
            // What happened while there was no connection is in etcd's history still, unless it was compacted.
            let error = match self.follow(session, backoff).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            match error {
                SessionError::Compacted { .. } => {
                    let (kvs, revision) = snapshot(session).await?;
                    self.same_history(session, revision)?;
                    self.replace(Revision(revision), kvs);
                }
                other => return Err(other.into()),
            }
        }
    }

    /// etcd must be the same cluster, and its revisions must not have gone back as they do when it is restored.
    fn same_history(&self, session: &Session, revision: i64) -> Result<(), Stop> {
        let (was, is) = (self.store.id().0, session.cluster_id().unwrap_or_default());
        let known = self.store.revision();
        if was != is {
            Err(Stop::Exchanged(Exchanged { was, is: format!("{is:x}") }))
        } else if Revision(revision) < known {
            let is = format!("the same cluster at revision {revision}, before the {} seen already,", known.0);
            Err(Stop::Exchanged(Exchanged { was, is }))
        } else {
            Ok(())
        }
    }

    async fn follow(
        &self,
        session: &Session,
        backoff: &mut Backoff,
    ) -> Result<std::convert::Infallible, SessionError> {
        let mut watch = session.watch(Span::Everything, self.store.revision().next().0).await?;
        self.status.send_modify(|status| status.following = true);
        loop {
            let changes = match watch.next().await? {
                WatchAnswer::Progress { .. } => continue,
                WatchAnswer::Changes { changes, unknown: 0, .. } => changes,
                WatchAnswer::Changes { .. } => {
                    return Err(SessionError::Malformed("an event of an unknown kind"));
                }
            };
            backoff.reset();
            self.apply(changes)?;
        }
    }

    /// Repeats etcd's commits one by one.
    fn apply(&self, changes: Vec<Change>) -> Result<(), SessionError> {
        let mut changes = changes.into_iter().peekable();
        let mut vanished = Vec::new();
        while let Some(first) = changes.next() {
            let revision = first.revision();
            let mut commit = vec![self.mirrored(first, &mut vanished)];
            while let Some(change) = changes.next_if(|change| change.revision() == revision) {
                commit.push(self.mirrored(change, &mut vanished));
            }
            self.store
                .apply_at(Revision(revision), commit)
                .map_err(|_| SessionError::Malformed("etcd's watch went back in revisions"))?;
        }
        if let Some(queue) = self.desk.queue() {
            for (key, revision) in vanished {
                queue.vanished(&key, revision);
            }
        }
        Ok(())
    }

    fn mirrored(&self, change: Change, vanished: &mut Vec<(bytes::Bytes, i64)>) -> Mirrored {
        match change {
            Change::Put(pair) => Mirrored::Put(key_value(pair)),
            Change::Delete { key, revision } => {
                vanished.push((key.clone(), revision));
                Mirrored::Delete { key }
            }
        }
    }

    /// History is lost up to `revision`; the store cancels the watchers that would have to see it.
    fn replace(&self, revision: Revision, kvs: Vec<KeyValue>) {
        let there: std::collections::HashSet<bytes::Bytes> = kvs.iter().map(|kv| kv.key.clone()).collect();
        if let Err(error) = self.store.load_snapshot(revision, kvs) {
            // Checked by `same_history` before.
            tracing::error!(%error, "a snapshot of etcd cannot be loaded");
            return;
        }
        if let Some(queue) = self.desk.queue() {
            queue.reconcile(revision.0, |key| there.contains(key));
        }
    }
}

/// Everything that etcd holds, at one revision.
pub(super) async fn snapshot(session: &Session) -> Result<(Vec<KeyValue>, i64), SessionError> {
    loop {
        let mut listing = session.list(Span::Everything);
        let mut kvs = Vec::new();
        let result = loop {
            match listing.next_page().await {
                Ok(Some(pairs)) => kvs.extend(pairs.into_iter().map(key_value)),
                Ok(None) => break Ok((kvs, listing.revision())),
                Err(error) => break Err(error),
            }
        };
        match result {
            // It took longer than etcd keeps history: begin again.
            Err(SessionError::Compacted { .. }) => {}
            other => return other,
        }
    }
}

fn key_value(pair: Pair) -> KeyValue {
    KeyValue {
        key: pair.key,
        value: pair.value,
        create_revision: Revision(pair.create_revision),
        mod_revision: Revision(pair.mod_revision),
        version: pair.version,
        lease: pair.lease,
    }
}
