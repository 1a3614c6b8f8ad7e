//! How the daemon is: what `/readyz`, `/v1/status` and `/metrics` tell.

use std::net::SocketAddr;
use std::sync::OnceLock;

use chrono::{DateTime, Utc};
use isthmus_daemon::Readiness;
use isthmus_kvstore::etcd::EtcdStatus;
use isthmus_kvstore::memory::MemoryStore;
use isthmus_kvstore::writer::Writer;
use isthmus_wire::{ClusterId, ClusterName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{DaemonConfig, Engine};
use crate::exporter::ExporterHandle;
use crate::relay::Relay;
use crate::status::{ApiserverStatus, Counts, ExportStatus, PolicyStatus, StoreStatus};

/// The daemon as seen from outside. There from the first moment; the parts join when they have started.
#[derive(Debug)]
pub(super) struct View {
    pub(super) cluster: ClusterName,
    cluster_id: ClusterId,
    engine: &'static str,
    pub(super) begun: DateTime<Utc>,
    /// When it was ready for the first time.
    bootstrapped: OnceLock<DateTime<Utc>>,
    running: OnceLock<Running>,
}

/// The parts, once they run.
pub(super) struct Running {
    pub(super) store: MemoryStore,
    pub(super) writer: Writer,
    pub(super) etcd: Option<watch::Receiver<EtcdStatus>>,
    pub(super) gateway: SocketAddr,
    pub(super) exporter: ExporterHandle,
    pub(super) relay: Option<Relay>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("gateway", &self.gateway).finish_non_exhaustive()
    }
}

impl View {
    pub(super) fn new(config: &DaemonConfig) -> Self {
        Self {
            cluster: config.cluster.clone(),
            cluster_id: config.cluster_id,
            engine: match config.engine {
                Engine::Memory => "memory",
                Engine::Etcd(_) => "etcd",
            },
            begun: Utc::now(),
            bootstrapped: OnceLock::new(),
            running: OnceLock::new(),
        }
    }

    /// The parts have started. Once only.
    pub(super) fn started(&self, running: Running) {
        let _ = self.running.set(running);
    }

    pub(super) fn running(&self) -> Option<&Running> {
        self.running.get()
    }

    /// The relay, while this replica runs one.
    pub(super) fn relay(&self) -> Option<Relay> {
        self.running()?.relay.clone()
    }

    /// Seconds from the start until it was ready for the first time.
    pub(super) fn bootstrap_seconds(&self) -> Option<f64> {
        let ready = self.bootstrapped.get()?;
        Some((*ready - self.begun).num_milliseconds() as f64 / 1000.0)
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

    /// What readiness waits for: the store, then the first export, then the peers.
    fn waiting_for(&self) -> Option<String> {
        let Some(running) = self.running.get() else {
            return Some(format!("waiting for the {} store", self.engine));
        };
        let reason =
            running.waiting_for_exporter().or_else(|| running.relay.as_ref().and_then(Relay::waiting_for));
        if reason.is_none() {
            self.bootstrapped.get_or_init(Utc::now);
        }
        reason
    }

    pub(super) fn status(&self) -> ApiserverStatus {
        let waiting_for = self.waiting_for();
        let running = self.running.get();
        ApiserverStatus {
            cluster: self.cluster.to_string(),
            cluster_id: self.cluster_id.number(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: self.begun,
            ready: waiting_for.is_none(),
            waiting_for,
            store: self.store_status(),
            exporter: running.map(Running::export_status).unwrap_or_default(),
            peers: running.and_then(|running| running.relay.as_ref()).map(Relay::peers).unwrap_or_default(),
            refused_files: running
                .and_then(|running| running.relay.as_ref())
                .map(Relay::refused_files)
                .unwrap_or_default(),
            refused_secrets: running
                .and_then(|running| running.relay.as_ref())
                .map(Relay::refused_secrets)
                .unwrap_or_default(),
            secrets_unread: running
                .and_then(|running| running.relay.as_ref())
                .and_then(Relay::secrets_unread),
            leader: None,
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

impl Running {
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
