//! The parts put together: store, gateway, exporter, relay, and the local endpoints that tell how they are.
//!
//! ```text
//!   health, metrics, API ─▶ store ─▶ gateway ─▶ heartbeat ─▶ exporter, relay
//! ```
//!
//! In that order, so that a store that is waited for is told on `/readyz`. Ends in the opposite one: readers are let go
//! first, so that they keep what they have rather than see a cluster that is being taken apart.

mod metrics;
mod view;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::routing::get;
use isthmus_daemon::{Endpoints, HttpError, LoopbackAddr};
use isthmus_kvstore::config::{ClientConfig, ConfigError};
use isthmus_kvstore::etcd::{EtcdConfig, EtcdEngine};
use isthmus_kvstore::gateway::{Gateway, GatewayError, GatewayOptions, Grants, TlsFiles};
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
use isthmus_kvstore::writer::Writer;
use isthmus_wire::{ClusterId, ClusterName, Key, MaxConnectedClusters};
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::view::{Running, View};
use crate::exporter::{Exporter, ExporterConfig, ExporterError, ExporterMetrics, Source};
use crate::relay::{self, OwnCluster, Relay, RelayConfig, Sources, SourcesConfig, Timing};
use crate::troubleshoot;

/// How long a shutdown waits for what was written to reach etcd.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// What the daemon is to do.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// Name of this cluster.
    pub cluster: ClusterName,
    /// Its id.
    pub cluster_id: ClusterId,
    /// What the mesh is set up for.
    pub max_connected_clusters: MaxConnectedClusters,
    /// Access to the Kubernetes API; none for that of the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Where pods, nodes and identities come from.
    pub source: Source,
    /// Whether namespaces take part in the mesh unless they say otherwise.
    pub namespaces_are_global: bool,
    /// The directory with the peers' configurations; none to mirror nothing.
    pub peers_dir: Option<PathBuf>,
    /// The relay's times.
    pub timing: Timing,
    /// Where the gateway listens.
    pub listen: SocketAddr,
    /// Its certificates.
    pub tls: TlsFiles,
    /// Where the state is kept.
    pub engine: Engine,
    /// Where health answers.
    pub health_address: LoopbackAddr,
    /// Where metrics answer.
    pub metrics_address: LoopbackAddr,
    /// The API socket, if there is to be one.
    pub api_socket: Option<PathBuf>,
}

/// Where the state is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// In this process.
    Memory,
    /// In the etcd that this client configuration names.
    Etcd(PathBuf),
}

/// Why the daemon did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// A local endpoint cannot be opened.
    #[error(transparent)]
    Endpoint(#[from] HttpError),
    /// The gateway cannot be opened.
    #[error("gateway (--listen, --tls-cert, --tls-key, --tls-client-ca): {0}")]
    Gateway(#[from] GatewayError),
    /// The etcd client configuration cannot be used.
    #[error("--etcd-config {}: {source}", path.display())]
    EtcdConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The Kubernetes API's access file cannot be used.
    #[error("--kubeconfig {}: {problem}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no service account, or it cannot be used.
    #[error("no access to the Kubernetes API: {0}; outside of a pod, give --kubeconfig FILE")]
    InCluster(String),
    /// The exporter cannot run.
    #[error("exporter: {0}")]
    Exporter(#[from] ExporterError),
    /// A task that never should has ended.
    #[error("{0} has stopped unexpectedly; restart the program and report the fault")]
    Stopped(&'static str),
    /// Another etcd answers than the one that was followed.
    #[error(
        "etcd: {0}; the program ends so that its next start serves the new state to readers as a new store"
    )]
    EtcdExchanged(String),
}

/// Runs until `shutdown`.
///
/// # Errors
/// A [`DaemonError`] that says what to change. What can heal by itself (Kubernetes, etcd, peers out of reach) is waited
/// for instead, and told on `/readyz` and in the status.
pub async fn run(config: DaemonConfig, shutdown: CancellationToken) -> Result<(), DaemonError> {
    // Fails only where it was done before, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Whatever can be wrong with the command line is found before anything is opened.
    let etcd = match &config.engine {
        Engine::Memory => None,
        Engine::Etcd(path) => Some(
            ClientConfig::load(path)
                .map_err(|source| DaemonError::EtcdConfig { path: path.clone(), source })?,
        ),
    };
    let kubernetes = kubernetes(config.kubeconfig.as_ref()).await?;

    // Ends everything that was started, on whichever way out.
    let shutdown = shutdown.child_token();
    let _guard = shutdown.clone().drop_guard();
    let mut registry = Registry::default();
    let exporter_metrics = ExporterMetrics::new(&mut registry);
    let relay_metrics = Arc::new(relay::Metrics::default());
    relay_metrics.register(&mut registry);
    let view = Arc::new(View::new(&config));
    registry.register_collector(Box::new(metrics::StateMetrics(Arc::clone(&view))));
    let endpoints = open_endpoints(&config, Arc::new(registry), &view, &shutdown).await?;

    let parts = Parts { etcd, kubernetes, exporter_metrics, relay_metrics };
    let outcome = serve(&config, parts, &view, &shutdown).await;
    shutdown.cancel();
    endpoints.finish().await;
    tracing::info!("stopped");
    outcome
}

/// What [`serve`] is given beside the configuration: found to be usable, not in use yet.
struct Parts {
    etcd: Option<ClientConfig>,
    kubernetes: kube::Client,
    exporter_metrics: ExporterMetrics,
    relay_metrics: Arc<relay::Metrics>,
}

/// Runs the parts until `shutdown`, or until one of them ends.
async fn serve(
    config: &DaemonConfig,
    parts: Parts,
    view: &View,
    shutdown: &CancellationToken,
) -> Result<(), DaemonError> {
    let store = tokio::select! {
        store = Store::open(parts.etcd) => store,
        () = shutdown.cancelled() => return Ok(()),
    };
    let gateway = Gateway::serve_with(
        config.listen,
        config.tls.clone(),
        store.memory.clone(),
        Grants::cluster_mesh(config.cluster.as_str()),
        GatewayOptions { name: config.cluster.to_string(), ..GatewayOptions::default() },
    )
    .await?;
    let heartbeat = store.writer.keep_heartbeat();
    // Tells readers up to Cilium 1.16 to wait for the cluster configuration.
    store.writer.put(Key::HasClusterConfig.to_bytes(), "true");

    let (exporter, handle) = Exporter::new(
        parts.kubernetes,
        exporter_config(config),
        store.writer.clone(),
        parts.exporter_metrics,
    )?;
    let mut exporting = tokio::spawn(exporter.run(shutdown.clone()));
    let (relay, mut relaying) = start_relay(config, &store.writer, parts.relay_metrics, shutdown);
    view.started(Running {
        store: store.memory.clone(),
        writer: store.writer.clone(),
        etcd: store.engine.as_ref().map(EtcdEngine::status),
        gateway: gateway.local_addr(),
        exporter: handle,
        relay,
    });
    tracing::info!(cluster = %config.cluster, id = %config.cluster_id, gateway = %gateway.local_addr(), "started");

    let outcome = tokio::select! {
        // First, since it ends the others too.
        biased;
        () = shutdown.cancelled() => Ok(()),
        ended = &mut exporting => Err(match ended {
            Ok(Err(error)) => error.into(),
            Ok(Ok(())) | Err(_) => DaemonError::Stopped("the exporter"),
        }),
        _ = &mut relaying => Err(DaemonError::Stopped("the relay")),
        reason = store.exchanged() => Err(DaemonError::EtcdExchanged(reason)),
    };
    shutdown.cancel();
    gateway.shutdown().await;
    drop(heartbeat);
    if !exporting.is_finished() {
        let _ = exporting.await;
    }
    if !relaying.is_finished() {
        let _ = relaying.await;
    }
    if tokio::time::timeout(FLUSH_TIMEOUT, store.writer.flush()).await.is_err() {
        tracing::warn!("etcd did not take the last changes; its leases and the next start put that right");
    }
    outcome
}

/// The store, and what feeds it.
struct Store {
    memory: MemoryStore,
    writer: Writer,
    engine: Option<EtcdEngine>,
}

impl Store {
    /// Waits for etcd as long as that takes.
    async fn open(etcd: Option<ClientConfig>) -> Self {
        match etcd {
            None => {
                let memory = MemoryStore::new(StoreId::random(), Limits::default());
                Self { writer: Writer::memory(memory.clone()), memory, engine: None }
            }
            Some(client) => {
                let engine = EtcdEngine::start(EtcdConfig::new(client)).await;
                let (memory, writer) = (engine.store().clone(), engine.writer().clone());
                Self { memory, writer, engine: Some(engine) }
            }
        }
    }

    /// Completes when another etcd has taken the place of the one that is followed.
    async fn exchanged(&self) -> String {
        match &self.engine {
            Some(engine) => engine.exchanged().await,
            None => std::future::pending().await,
        }
    }
}

async fn kubernetes(kubeconfig: Option<&PathBuf>) -> Result<kube::Client, DaemonError> {
    let config = match kubeconfig {
        Some(path) => {
            let failed = |error: kube::config::KubeconfigError| DaemonError::Kubeconfig {
                path: path.clone(),
                problem: chain(&error),
            };
            let file = kube::config::Kubeconfig::read_from(path).map_err(failed)?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
                .await
                .map_err(failed)?
        }
        None => kube::Config::incluster().map_err(|error| DaemonError::InCluster(chain(&error)))?,
    };
    kube::Client::try_from(config).map_err(|error| match kubeconfig {
        Some(path) => DaemonError::Kubeconfig { path: path.clone(), problem: chain(&error) },
        None => DaemonError::InCluster(chain(&error)),
    })
}

/// An error and what is behind it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        // Some errors repeat their source in their own text.
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}

fn exporter_config(config: &DaemonConfig) -> ExporterConfig {
    ExporterConfig {
        max_connected_clusters: config.max_connected_clusters,
        source: config.source,
        namespaces_are_global: config.namespaces_are_global,
        ..ExporterConfig::new(config.cluster.clone(), config.cluster_id)
    }
}

fn own_cluster(config: &DaemonConfig) -> OwnCluster {
    OwnCluster { name: config.cluster.clone(), id: config.cluster_id, mesh: config.max_connected_clusters }
}

fn start_relay(
    config: &DaemonConfig,
    writer: &Writer,
    metrics: Arc<relay::Metrics>,
    shutdown: &CancellationToken,
) -> (Option<Relay>, JoinHandle<()>) {
    let Some(peers_dir) = config.peers_dir.clone() else {
        tracing::info!("no --peers-dir: nothing is mirrored");
        let shutdown = shutdown.clone();
        return (None, tokio::spawn(shutdown.cancelled_owned()));
    };
    let own = own_cluster(config);
    let sources = SourcesConfig { own: own.name.clone(), directory: Some(peers_dir), secrets: None };
    let sources = Sources::follow(sources, shutdown);
    let relay = RelayConfig { own, sources, timing: config.timing };
    let (relay, task) = Relay::spawn(relay, writer.clone(), metrics, shutdown.clone());
    (Some(relay), task)
}

async fn open_endpoints(
    config: &DaemonConfig,
    registry: Arc<Registry>,
    view: &Arc<View>,
    shutdown: &CancellationToken,
) -> Result<Endpoints, DaemonError> {
    // Outlives the rest: health is told until everything else has ended.
    let mut endpoints = Endpoints::new(shutdown.clone());
    let status = {
        let view = Arc::clone(view);
        Router::new().route("/v1/status", get(move || std::future::ready(Json(view.status()))))
    };
    let probed = Arc::clone(view);
    let status = status.merge(troubleshoot::of_daemon(
        own_cluster(config),
        isthmus_crds::names::DEFAULT_NAMESPACE,
        config.peers_dir.clone(),
        move || probed.relay(),
    ));
    let readiness = {
        let (view, shutdown) = (Arc::clone(view), shutdown.clone());
        move || view.readiness(&shutdown)
    };
    endpoints.health(config.health_address, readiness, status.clone()).await?;
    endpoints.metrics(config.metrics_address, registry).await?;
    if let Some(path) = &config.api_socket {
        endpoints.api(path, status)?;
    }
    Ok(endpoints)
}
