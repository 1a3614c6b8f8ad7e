//! How the daemon is: what `/readyz`, `/v1/status` and `/metrics` tell.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use isthmus_daemon::Readiness;
use isthmus_kvstore::etcd::EtcdStatus;
use isthmus_kvstore::memory::MemoryStore;
use isthmus_kvstore::metrics::Limiter;
use isthmus_kvstore::writer::Writer;
use isthmus_wire::{ClusterId, ClusterName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::store::missing_canaries;
use super::{DaemonConfig, Engine};
use crate::certificates::Certificates;
use crate::election::{Leadership, Role};
use crate::exporter::{ExporterHandle, canaries};
use crate::relay::Relay;
use crate::status::{ApiserverStatus, CertificateStatus, Counts, ExportStatus, PolicyStatus, StoreStatus};

/// How often it is looked whether the start is over: the times of the start are no more exact.
const LOOK: Duration = Duration::from_millis(250);

/// The daemon as seen from outside. There from the first moment; the parts join when they have started.
#[derive(Debug)]
pub(super) struct View {
    pub(super) cluster: ClusterName,
    cluster_id: ClusterId,
    pub(super) replica: String,
    engine: &'static str,
    begun: DateTime<Utc>,
    started: Instant,
    /// How long after the start everything there was had been exported, by this replica or by the one that leads.
    exported: OnceLock<Duration>,
    /// How long after the start every peer in reach had been mirrored by this replica.
    mirrored: OnceLock<Duration>,
    standing: OnceLock<Standing>,
    running: OnceLock<Running>,
    writing: Mutex<Option<Arc<Writing>>>,
}

/// What this replica is among the others, and which certificates it has.
#[derive(Debug)]
struct Standing {
    leadership: Leadership,
    certificates: Option<Certificates>,
}

/// The store and the gateway, once they run.
pub(super) struct Running {
    pub(super) store: MemoryStore,
    /// Whether replicas share it, so that only the leader writes to it.
    pub(super) shared: bool,
    pub(super) etcd: Option<watch::Receiver<EtcdStatus>>,
    /// That of following etcd.
    pub(super) limiter: Option<Limiter>,
    pub(super) gateway: SocketAddr,
}

/// Who writes to the store, while they run.
pub(super) struct Writing {
    pub(super) writer: Writer,
    pub(super) exporter: ExporterHandle,
    pub(super) relay: Relay,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("gateway", &self.gateway).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Writing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writing").field("writer", &self.writer).finish_non_exhaustive()
    }
}

impl View {
    pub(super) fn new(config: &DaemonConfig) -> Self {
        Self {
            cluster: config.cluster.clone(),
            cluster_id: config.cluster_id,
            replica: config.replica.clone(),
            engine: match config.engine {
                Engine::Memory => "memory",
                Engine::Etcd(_) => "etcd",
            },
            begun: Utc::now(),
            started: Instant::now(),
            exported: OnceLock::new(),
            mirrored: OnceLock::new(),
            standing: OnceLock::new(),
            running: OnceLock::new(),
            writing: Mutex::default(),
        }
    }

    /// The election and the certificates are under way. Once only.
    pub(super) fn stands(&self, leadership: Leadership, certificates: Option<Certificates>) {
        let _ = self.standing.set(Standing { leadership, certificates });
    }

    /// The store is served. Once only.
    pub(super) fn serves(&self, running: Running) {
        let _ = self.running.set(running);
    }

    /// These write to the store from now on; none to say that nobody here does.
    pub(super) fn writes(&self, writing: Option<Writing>) {
        *self.writing.lock().unwrap_or_else(PoisonError::into_inner) = writing.map(Arc::new);
    }

    pub(super) fn running(&self) -> Option<&Running> {
        self.running.get()
    }

    pub(super) fn writing(&self) -> Option<Arc<Writing>> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The relay, while this replica runs one.
    pub(super) fn relay(&self) -> Option<Relay> {
        self.writing().map(|writing| writing.relay.clone())
    }

    /// What this replica is among the others; none before that is under way.
    pub(super) fn role(&self) -> Option<Role> {
        self.standing.get().map(|standing| standing.leadership.role())
    }

    pub(super) fn certificates(&self) -> Vec<CertificateStatus> {
        let certificates = self.standing.get().and_then(|standing| standing.certificates.as_ref());
        certificates.map(Certificates::status).unwrap_or_default()
    }

    /// How long after the start everything there was had been exported; none before.
    pub(super) fn exported_after(&self) -> Option<Duration> {
        self.exported.get().copied()
    }

    /// How long after the start every peer in reach had been mirrored here; none before.
    pub(super) fn mirrored_after(&self) -> Option<Duration> {
        self.mirrored.get().copied()
    }

    /// Takes the times of the start, whether or not somebody asks if it is ready. Never ends.
    pub(super) async fn take_times(&self) {
        let mut look = tokio::time::interval(LOOK);
        loop {
            look.tick().await;
            if self.exported.get().is_none() && self.missing_export().is_none() {
                self.exported.get_or_init(|| self.started.elapsed());
            }
            if self.mirrored.get().is_none()
                && self.relay().is_some_and(|relay| relay.waiting_for().is_none())
            {
                self.mirrored.get_or_init(|| self.started.elapsed());
            }
            if self.exported.get().is_some() && self.mirrored.get().is_some() {
                return std::future::pending().await;
            }
        }
    }

    pub(super) fn readiness(&self, shutdown: &CancellationToken) -> Readiness {
        if shutdown.is_cancelled() {
            return Readiness::Waiting("shutting down".to_owned());
        }
        match self.waiting_for() {
            None => Readiness::Ready,
            Some(reason) => Readiness::Waiting(reason),
        }
    }

    /// What readiness waits for: certificates and the store, then the first export, then the peers.
    fn waiting_for(&self) -> Option<String> {
        // A change of leaders takes nobody out of service: what is in a shared store is served, whoever mirrors.
        let own = || self.running.get().is_some_and(|running| !running.shared);
        let peers = || self.relay().filter(|_| own()).and_then(|relay| relay.waiting_for());
        self.missing_export().or_else(peers)
    }

    /// What the export of the own cluster waits for.
    fn missing_export(&self) -> Option<String> {
        let Some(running) = self.running.get() else {
            let certificates = self.standing.get().and_then(|standing| standing.certificates.as_ref());
            return certificates
                .and_then(Certificates::waiting_for)
                .or_else(|| Some(format!("waiting for the {} store", self.engine)));
        };
        let writing = self.writing();
        if running.shared {
            let missing = missing_canaries(&running.store, &canaries(&self.cluster));
            if missing.is_empty() {
                return None;
            }
            let by_leader = match self.role() {
                Some(Role::Standby { leader: Some(leader) }) => format!("replica {leader}, which leads,"),
                _ => "a replica that leads".to_owned(),
            };
            let waits =
                || format!("waiting for {by_leader} to export what this cluster has for the first time");
            return Some(writing.and_then(|writing| writing.waiting_for_exporter()).unwrap_or_else(waits));
        }
        let Some(writing) = writing else { return Some(format!("waiting for the {} store", self.engine)) };
        writing.waiting_for_exporter()
    }

    pub(super) fn status(&self) -> ApiserverStatus {
        let waiting_for = self.waiting_for();
        let writing = self.writing();
        let relay = writing.as_ref().map(|writing| &writing.relay);
        let (leading, leader) = match self.role() {
            Some(Role::Leading(None)) => (true, None),
            Some(Role::Leading(Some(_))) => (true, Some(self.replica.clone())),
            Some(Role::Standby { leader }) => (false, leader),
            None => (false, None),
        };
        ApiserverStatus {
            cluster: self.cluster.to_string(),
            cluster_id: self.cluster_id.number(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: self.begun,
            ready: waiting_for.is_none(),
            waiting_for,
            leading,
            leader,
            certificates: self.certificates(),
            store: self.store_status(),
            exporter: writing.as_ref().map(|writing| writing.export_status()).unwrap_or_default(),
            peers: relay.map(Relay::peers).unwrap_or_default(),
            admitted: relay.map(Relay::admitted).unwrap_or_default(),
            refused_files: relay.map(Relay::refused_files).unwrap_or_default(),
            refused_secrets: relay.map(Relay::refused_secrets).unwrap_or_default(),
            secrets_unread: relay.and_then(Relay::secrets_unread),
        }
    }

    fn store_status(&self) -> StoreStatus {
        let engine = self.engine.to_owned();
        match self.running.get() {
            None => StoreStatus { engine, store_id: 0, revision: 0, keys: 0 },
            Some(running) => {
                let stats = running.store.stats();
                StoreStatus {
                    engine,
                    store_id: running.store.id().0,
                    revision: stats.revision.0,
                    keys: stats.keys,
                }
            }
        }
    }
}

impl Writing {
    /// The Kubernetes API's answer is what mostly is missing: told as it is known.
    fn waiting_for_exporter(&self) -> Option<String> {
        if *self.exporter.ready.borrow() {
            return None;
        }
        let status = self.exporter.status.borrow();
        let failing = status.watches.iter().find_map(|(kind, watch)| Some((kind, watch.error.as_ref()?)));
        if let Some((kind, error)) = failing {
            return Some(format!("waiting for the first list of {kind} objects: {error}"));
        }
        let missing: Vec<&str> =
            status.watches.iter().filter(|(_, watch)| !watch.synced).map(|(kind, _)| kind.as_str()).collect();
        if missing.is_empty() {
            return Some("waiting for the first export to be written".to_owned());
        }
        Some(format!("waiting for the first list of {} objects", missing.join(", ")))
    }

    fn export_status(&self) -> ExportStatus {
        let status = self.exporter.status.borrow();
        let count = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        ExportStatus {
            synced: *self.exporter.ready.borrow(),
            counts: Counts {
                nodes: count(status.exported.nodes),
                identities: count(status.exported.identities),
                endpoints: count(status.exported.endpoints),
                services: count(status.exported.global_services),
                endpoint_slices: 0,
                service_exports: 0,
            },
            policies: PolicyStatus {
                total: count(status.exported.policies),
                with_problems: status.policies_with_problems.clone(),
            },
            refused: status.problems.clone(),
        }
    }
}
