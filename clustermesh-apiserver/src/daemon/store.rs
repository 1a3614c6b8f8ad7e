//! The store that the gateway serves, and who writes to it.

use std::collections::BTreeSet;

use isthmus_kvstore::config::ClientConfig;
use isthmus_kvstore::etcd::{EtcdConfig, EtcdEngine, EtcdStatus, Term};
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
use isthmus_kvstore::metrics::{ClientMetrics, Limiter};
use isthmus_kvstore::writer::Writer;
use tokio::sync::watch;

use super::DaemonError;
use crate::election;

/// The store, and what feeds it.
pub(super) enum Store {
    /// This replica's own. Each replica fills its own, whoever leads.
    Memory(MemoryStore),
    /// One of several that follow the same etcd, which the leader fills.
    Etcd(Box<EtcdEngine>),
}

/// The right to write.
pub(super) enum Pen {
    /// To the own store.
    Memory(Writer),
    /// To etcd, until it is dropped.
    Etcd(Term),
}

impl Store {
    /// Waits for etcd as long as that takes.
    pub(super) async fn open(
        etcd: Option<ClientConfig>,
        election: Option<election::Timing>,
        metrics: ClientMetrics,
    ) -> Self {
        match etcd {
            None => Self::Memory(MemoryStore::new(StoreId::random(), Limits::default())),
            Some(client) => {
                let config = EtcdConfig { metrics, ..etcd_config(client, election) };
                Self::Etcd(Box::new(EtcdEngine::start(config).await))
            }
        }
    }

    /// What the gateway serves.
    pub(super) fn served(&self) -> &MemoryStore {
        match self {
            Self::Memory(store) => store,
            Self::Etcd(engine) => engine.store(),
        }
    }

    /// Whether one replica alone may write, since all have the same keys.
    pub(super) fn is_shared(&self) -> bool {
        matches!(self, Self::Etcd(_))
    }

    pub(super) fn pen(&self) -> Pen {
        match self {
            Self::Memory(store) => Pen::Memory(Writer::memory(store.clone())),
            Self::Etcd(engine) => Pen::Etcd(engine.begin_term()),
        }
    }

    /// How etcd is followed.
    pub(super) fn etcd(&self) -> Option<watch::Receiver<EtcdStatus>> {
        match self {
            Self::Memory(_) => None,
            Self::Etcd(engine) => Some(engine.status()),
        }
    }

    /// What tells how the limits on following etcd are used.
    pub(super) fn limiter(&self) -> Option<Limiter> {
        match self {
            Self::Memory(_) => None,
            Self::Etcd(engine) => Some(engine.limiter()),
        }
    }

    /// Completes when it cannot be gone on with: another etcd has taken the place of the one that is followed, or a part of
    /// the engine has failed.
    pub(super) async fn ended(&self) -> DaemonError {
        match self {
            Self::Memory(_) => std::future::pending().await,
            Self::Etcd(engine) => engine.ended().await.into(),
        }
    }
}

/// A leader that the Kubernetes API does not reach goes on for the renew deadline; until then two may write.
fn etcd_config(client: ClientConfig, election: Option<election::Timing>) -> EtcdConfig {
    let told_within = election.unwrap_or_default().renew_deadline;
    EtcdConfig { told_within, ..EtcdConfig::new(client) }
}

impl Pen {
    pub(super) fn writer(&self) -> &Writer {
        match self {
            Self::Memory(writer) => writer,
            Self::Etcd(term) => term.writer(),
        }
    }
}

/// The sections of the own cluster whose canary is not in the store: what a reader would wait for.
pub(super) fn missing_canaries(store: &MemoryStore, canaries: &[bytes::Bytes]) -> BTreeSet<String> {
    let missing = canaries.iter().filter(|canary| store.get(canary).is_none());
    missing.map(|canary| String::from_utf8_lossy(canary).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_writer_stands_aside_for_as_long_as_a_leader_may_not_know_that_it_leads_no_more() {
        let client = ClientConfig::parse("endpoints:\n- http://127.0.0.1:1\n").unwrap();
        let told_within = |election| etcd_config(client.clone(), election).told_within;
        let usual = told_within(Some(election::Timing::default()));
        assert_eq!(usual, EtcdConfig::new(client.clone()).told_within);
        assert_eq!(told_within(None), usual);
        let slow = election::Timing::of_lease(Duration::from_secs(60));
        assert_eq!(told_within(Some(slow)), Duration::from_secs(40));
    }
}
