//! Reads a store of Cluster Mesh, a real etcd or a gateway, and keeps reading it whatever happens to the connection.
//!
//! A [`Reader`] lives as long as its consumer wants the cluster; connections come and go beneath it:
//!
//! ```text
//!            ┌────────────── any failure: back off, then again ──────────────┐
//!            ▼                                                               │
//!       connecting ──▶ probing (list the heartbeat) ──▶ connected ──────────▶┤
//!                                                          │ cluster configuration found
//!                                                          ▼
//!  per section:   wait for the canary ──▶ list, sweep ──▶ follow ──▶ (compacted, fell behind) ──▶ list, sweep ...
//! ```
//!
//! A connection made with a client certificate that is replaced meanwhile is replaced too, by one that is there already: so
//! the store may cease to trust what the old certificate came from without anybody's losing the connection.
//!
//! What each section's consumer sees is a sequence of differences: a key is reported when its value is another than
//! reported last, and as deleted when a complete list, taken after the canary was seen in the very store that is
//! listed, no longer holds it. So neither a lost connection, nor a compaction, nor a store that was exchanged for an
//! empty one that its exporter is still filling shows as keys that go and come back.

mod cause;
mod connection;
mod follow;
mod known;
mod probe;
mod status;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use isthmus_wire::ClusterName;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};

pub use self::cause::FailureCause;
pub use self::probe::Probe;
pub use self::status::{ClusterConfigState, Connection, ReaderStatus, SectionPhase, SectionStatus};
use crate::client::{RateLimiter, Session};
pub use crate::client::{RateLimits, Resolver};
use crate::config::ClientConfig;
use crate::metrics::{ClientMetrics, Limiter};
pub use crate::section::Section;

/// How a store is read.
#[derive(Debug, Clone)]
pub struct ReaderConfig {
    /// Where the store is and whom to be towards it.
    pub client: ClientConfig,
    /// What knows the addresses of names. The system's, unless a test has another.
    pub resolver: Resolver,
    /// Whether `cilium/cluster-config/<name>` must be there before anything is read, as it must be at a peer. It then
    /// also says whether the peer writes canaries; without it every section that names a canary waits for it.
    pub cluster_config_required: bool,
    /// What is asked of the store at most.
    pub rate_limits: RateLimits,
    /// How long the heartbeat may be silent before the connection is torn down. 2 minutes.
    pub heartbeat_timeout: Duration,
    /// How often a quiet watch is asked how far it is, which is what the age of the data and the lag are known by.
    /// 30 s. The cost is one small message per section.
    pub progress_interval: Duration,
    /// A connection made with a [`LiveIdentity`](crate::config::LiveIdentity) that has another certificate now is made anew
    /// within this time, at a moment of its own: a minute at most brings all readers of a process over, one after the other.
    /// 30 s.
    pub renew_within: Duration,
    /// Events that a section's channel holds. When it is full, that section's watch waits for its consumer.
    pub channel_capacity: usize,
    /// What one section may hold.
    pub bounds: SectionBounds,
    /// Where it is counted how the store answers. Readers may share them.
    pub metrics: ClientMetrics,
}

impl ReaderConfig {
    /// The defaults of the wire format for the store that `client` names.
    pub fn new(client: ClientConfig) -> Self {
        Self {
            client,
            resolver: Resolver::system(),
            cluster_config_required: true,
            rate_limits: RateLimits::default(),
            heartbeat_timeout: Duration::from_secs(120),
            progress_interval: Duration::from_secs(30),
            renew_within: Duration::from_secs(30),
            channel_capacity: 1024,
            bounds: SectionBounds::default(),
            metrics: ClientMetrics::default(),
        }
    }
}

/// What a section may hold. Whatever exceeds it is left out and counted; the rest goes on. Keys that were left out for
/// want of room are taken in once there is room again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionBounds {
    /// The longest key, in bytes. 4 KiB.
    pub key_bytes: usize,
    /// The longest value, in bytes. 2 MiB, a third above etcd's own limit.
    pub value_bytes: usize,
    /// The most keys. 1,000,000.
    pub keys: usize,
    /// The most bytes of keys and values together. 1 GiB.
    pub total_bytes: usize,
}

impl Default for SectionBounds {
    fn default() -> Self {
        Self { key_bytes: 4 << 10, value_bytes: 2 << 20, keys: 1_000_000, total_bytes: 1 << 30 }
    }
}

/// What a section's consumer is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SectionEvent {
    /// The key is new or its value has changed.
    Put {
        /// The whole key.
        key: Bytes,
        /// Its value.
        value: Bytes,
        /// The revision of the change. Comparable only within one store.
        revision: i64,
    },
    /// The key is gone.
    Delete {
        /// The whole key.
        key: Bytes,
        /// The revision at which it was found to be gone.
        revision: i64,
    },
    /// What has been told so far is all that the section held at this revision. Comes after each list: once in the
    /// beginning, and again after every gap.
    Synced {
        /// The revision of the list.
        revision: i64,
    },
}

/// Reads one cluster's store until it is dropped.
#[derive(Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    status: watch::Receiver<ReaderStatus>,
    cluster_config: watch::Receiver<Option<Bytes>>,
    /// The tasks end when the reader is dropped.
    tasks: Mutex<JoinSet<()>>,
}

/// What the tasks of one reader have in common.
#[derive(Debug)]
struct Shared {
    name: ClusterName,
    config: ReaderConfig,
    status: watch::Sender<ReaderStatus>,
    cluster_config: watch::Sender<Option<Bytes>>,
    /// The connection that sections may use: connected, and the cluster configuration known.
    usable: watch::Sender<Option<Usable>>,
    /// Counts the times that somebody wanted to know how far the store is.
    probes: watch::Sender<u64>,
    limiter: Arc<RateLimiter>,
}

/// A connection that sections may use.
#[derive(Clone)]
struct Usable {
    session: Session,
    /// Whether sections wait for their canaries.
    canaries: bool,
    /// Where a section reports that the connection is of no more use.
    broken: mpsc::Sender<String>,
}

impl std::fmt::Debug for Usable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Usable").field("canaries", &self.canaries).finish_non_exhaustive()
    }
}

impl Reader {
    /// Begins to read the store of cluster `name`. Must be called within a tokio runtime.
    pub fn spawn(name: ClusterName, config: ReaderConfig) -> Self {
        let (status, status_seen) =
            watch::channel(ReaderStatus::new(name.clone(), config.cluster_config_required));
        let (cluster_config, cluster_config_seen) = watch::channel(None);
        let limiter = Arc::new(RateLimiter::new(config.rate_limits));
        let shared = Arc::new(Shared {
            name,
            config,
            status,
            cluster_config,
            usable: watch::Sender::new(None),
            probes: watch::Sender::new(0),
            limiter,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(connection::run(Arc::clone(&shared)));
        Self { shared, status: status_seen, cluster_config: cluster_config_seen, tasks: Mutex::new(tasks) }
    }

    /// Follows a section until the receiver is dropped. It may be called at any time, connected or not.
    ///
    /// The channel is bounded: a consumer that does not keep up holds back its own section and nothing else. Should
    /// the store give up on it meanwhile, the section is listed again.
    pub fn follow(&self, section: Section) -> mpsc::Receiver<SectionEvent> {
        let (events, receiver) = mpsc::channel(self.shared.config.channel_capacity.max(1));
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        self.shared.status.send_modify(|status| {
            status.sections.insert(section.name(), SectionStatus::new());
        });
        tasks.spawn(follow::run(Arc::clone(&self.shared), section, events));
        receiver
    }

    /// The value of `cilium/cluster-config/<name>`, none before it was found and after it was deleted. It stays over a
    /// lost connection. Where [`ReaderConfig::cluster_config_required`] is false it is never looked for.
    pub fn cluster_config(&self) -> watch::Receiver<Option<Bytes>> {
        self.cluster_config.clone()
    }

    /// What asks the store how far it is.
    pub fn probe(&self) -> Probe {
        Probe(Arc::clone(&self.shared))
    }

    /// What tells how the limits on what is asked of the store are used.
    pub fn limiter(&self) -> Limiter {
        Limiter(Arc::clone(&self.shared.limiter))
    }

    /// The present state, and every change of it.
    pub fn status(&self) -> watch::Receiver<ReaderStatus> {
        self.status.clone()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        connection::moved(&self.shared, Connection::Stopped);
    }
}
