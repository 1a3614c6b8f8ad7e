//! The store that the gateway serves, and who writes to it.

use std::collections::BTreeSet;

use isthmus_kvstore::config::ClientConfig;
use isthmus_kvstore::etcd::{EtcdConfig, EtcdEngine, EtcdStatus, Term};
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
use isthmus_kvstore::writer::Writer;
use tokio::sync::watch;

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
    pub(super) async fn open(etcd: Option<ClientConfig>) -> Self {
        match etcd {
            None => Self::Memory(MemoryStore::new(StoreId::random(), Limits::default())),
            Some(client) => Self::Etcd(Box::new(EtcdEngine::start(EtcdConfig::new(client)).await)),
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

    /// Completes when another etcd has taken the place of the one that is followed.
    pub(super) async fn exchanged(&self) -> String {
        match self {
            Self::Memory(_) => std::future::pending().await,
            Self::Etcd(engine) => engine.exchanged().await,
        }
    }
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
