//! The parts put together: store, gateway, exporter, relay, and the local endpoints that tell how they are.
//!
//! ```text
//!   health, metrics, API ─▶ election, certificates ─▶ store ─▶ gateway ─▶ heartbeat, exporter, relay
//! ```
//!
//! In that order, so that what is waited for is told on `/readyz`. Ends in the opposite one: readers are let go
//! first, so that they keep what they have rather than see a cluster that is being taken apart.
//!
//! What runs beside them for as long as the program does are `tasks`: should one end by itself, so does the program, to be
//! started again, rather than go on without it.
//!
//! # Several replicas
//!
//! One of them leads (`election`). What that means depends on whose the store is:
//!
//! - **`memory`**: each has a store of its own, and fills it: every replica exports and mirrors, and any of them can go.
//!   Readers notice by the cluster id in every answer that another one is another store. Only the leader writes to
//!   Kubernetes: certificates, the cluster's information, what people read about peers and policies.
//! - **`etcd`**: they have one store together. Only the leader exports and mirrors; the others follow etcd, serve the same
//!   revisions under the same id, and are ready. Who loses the lead stops writing at once and stands by again; who gains it
//!   takes over what is in etcd, and removes what an earlier leader left.
//!
//! Without a namespace there is no Lease, and so no election: there must be one replica then, which does everything.

mod config;
mod kubernetes;
mod metrics;
mod parts;
mod store;
mod tls;
mod view;

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::routing::get;
use isthmus_crds::names::{DEFAULT_NAMESPACE, LEASE};
use isthmus_daemon::Endpoints;
use isthmus_kvstore::config::ClientConfig;
use isthmus_kvstore::gateway::{Gateway, GatewayOptions, Grants};
use isthmus_kvstore::metrics::ClientMetrics;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

pub use self::config::{DaemonConfig, DaemonError, Engine, Tls};
use self::parts::Parts;
use self::store::Store;
use self::tls::{GatewayTls, Identities};
use self::view::{Running, View};
use crate::certificates::{Certificates, CertificatesConfig};
use crate::cluster_info::Publisher;
use crate::election::{Election, Leadership};
use crate::exporter::ExporterMetrics;
use crate::relay::{self, SecretSource, Sources, SourcesConfig};
use crate::tasks::Tasks;
use crate::troubleshoot;

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
    let kubernetes = kubernetes::client(config.kubeconfig.as_ref()).await?;

    // Ends everything that was started, on whichever way out.
    let shutdown = shutdown.child_token();
    let _guard = shutdown.clone().drop_guard();
    let mut registry = Registry::default();
    let exporter_metrics = ExporterMetrics::new(&mut registry);
    let relay_metrics = Arc::new(relay::Metrics::default());
    relay_metrics.register(&mut registry);
    let etcd_metrics = ClientMetrics::default();
    etcd_metrics.register_calls(registry.sub_registry_with_prefix(metrics::APISERVER));
    let view = Arc::new(View::new(&config));
    registry.register_collector(Box::new(metrics::StateMetrics(Arc::clone(&view))));
    let endpoints = open_endpoints(&config, Arc::new(registry), &view, &shutdown).await?;

    let tasks = Tasks::until(shutdown.clone());
    let taken = Arc::clone(&view);
    tasks.spawn("the taking of times", async move { taken.take_times().await });
    let (election, leadership) = elect(&config, &kubernetes, &tasks);
    let identities = identities(&config, &kubernetes, &leadership, &tasks);
    view.stands(leadership.clone(), identities.certificates().cloned());
    let shared =
        Shared { kubernetes, tasks, leadership, identities, exporter_metrics, relay_metrics, etcd_metrics };
    let outcome = serve(&config, etcd, &shared, &view, &shutdown).await;
    shutdown.cancel();
    // Nothing writes any more: the next one may begin.
    if let Some(election) = election {
        election.release().await;
    }
    endpoints.finish().await;
    tracing::info!("stopped");
    outcome
}

/// What the parts have in common.
struct Shared {
    kubernetes: kube::Client,
    /// What runs beside what writes, whoever leads.
    tasks: Tasks,
    leadership: Leadership,
    identities: Identities,
    exporter_metrics: ExporterMetrics,
    relay_metrics: Arc<relay::Metrics>,
    /// What is asked of the own etcd.
    etcd_metrics: ClientMetrics,
}

/// Serves the store, and writes to it whenever this replica may, until `shutdown` or until a part ends.
async fn serve(
    config: &DaemonConfig,
    etcd: Option<ClientConfig>,
    shared: &Shared,
    view: &View,
    shutdown: &CancellationToken,
) -> Result<(), DaemonError> {
    let store = Store::open(etcd, config.election, shared.etcd_metrics.clone());
    let opened = async { tokio::join!(store, shared.identities.open()) };
    let (store, tls) = tokio::select! {
        biased;
        () = shutdown.cancelled() => return Ok(()),
        what = shared.tasks.ended() => return Err(DaemonError::Stopped(what)),
        opened = opened => opened,
    };
    let tls = tls?;
    // Whoever leads: every replica's gateway lets in the relays of the peers.
    let sources = Sources::follow(sources(config, shared, &tls), &shared.tasks);
    let gateway = Gateway::serve_with(
        config.listen,
        tls.serve(sources.authorities(), &shared.tasks),
        store.served().clone(),
        Grants::cluster_mesh(config.cluster.as_str()),
        GatewayOptions { name: config.cluster.to_string(), ..GatewayOptions::default() },
    )
    .await?;
    view.serves(Running {
        store: store.served().clone(),
        shared: store.is_shared() && config.election.is_some(),
        etcd: store.etcd(),
        limiter: store.limiter(),
        gateway: gateway.local_addr(),
    });
    tracing::info!(cluster = %config.cluster, id = %config.cluster_id, gateway = %gateway.local_addr(), "started");

    let (outcome, parts) = write(config, shared, &sources, &store, view, shutdown).await;
    shutdown.cancel();
    gateway.shutdown().await;
    if let Some(parts) = parts {
        parts.finish().await;
    }
    outcome
}

/// Runs what writes to the store: always to an own one, and while this replica leads to one that replicas share. Ends with
/// the parts that are still to be finished.
async fn write(
    config: &DaemonConfig,
    shared: &Shared,
    sources: &Sources,
    store: &Store,
    view: &View,
    shutdown: &CancellationToken,
) -> (Result<(), DaemonError>, Option<Parts>) {
    let mut leadership = shared.leadership.clone();
    loop {
        if store.is_shared() {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return (Ok(()), None),
                what = shared.tasks.ended() => return (Err(DaemonError::Stopped(what)), None),
                () = leadership.gained() => {}
                error = store.ended() => return (Err(error), None),
            }
        }
        let (mut parts, writing) = match Parts::start(config, shared, sources, store.pen(), shutdown) {
            Ok(started) => started,
            Err(error) => return (Err(error), None),
        };
        view.writes(Some(writing));
        tokio::select! {
            // First, since it ends the others too.
            biased;
            () = shutdown.cancelled() => return (Ok(()), Some(parts)),
            what = shared.tasks.ended() => return (Err(DaemonError::Stopped(what)), Some(parts)),
            () = leadership.lost(), if store.is_shared() => {}
            error = parts.ended() => return (Err(error), Some(parts)),
            error = store.ended() => return (Err(error), Some(parts)),
        }
        parts.drop_everything().await;
        shared.relay_metrics.stand_by();
        view.writes(None);
    }
}

/// Where peers are looked for: the directory, if there is one, and Secrets, if there are certificates in Secrets to be shown
/// to them.
fn sources(config: &DaemonConfig, shared: &Shared, tls: &GatewayTls) -> SourcesConfig {
    let secrets = match (&config.namespace, tls.remote()) {
        (Some(namespace), Some(remote)) => Some(SecretSource {
            client: shared.kubernetes.clone(),
            namespace: namespace.clone(),
            identity: remote.clone(),
        }),
        _ => None,
    };
    if secrets.is_none() && config.peers_dir.is_none() {
        tracing::info!(
            "no --peers-dir, and no --namespace with certificates in Secrets: nothing is mirrored"
        );
    }
    SourcesConfig { own: config.cluster.clone(), directory: config.peers_dir.clone(), secrets }
}

fn elect(config: &DaemonConfig, kubernetes: &kube::Client, tasks: &Tasks) -> (Option<Election>, Leadership) {
    match (&config.namespace, config.election) {
        (Some(namespace), Some(timing)) => {
            let (election, leadership) =
                Election::start(kubernetes.clone(), namespace, LEASE, &config.replica, timing, tasks);
            (Some(election), leadership)
        }
        _ => (None, Leadership::alone()),
    }
}

/// The certificates, and what follows from them for other clusters.
fn identities(
    config: &DaemonConfig,
    kubernetes: &kube::Client,
    leadership: &Leadership,
    tasks: &Tasks,
) -> Identities {
    let (namespace, issuer, validity, gateway_names, timing) = match &config.tls {
        Tls::Files(files) => return Identities::Files(files.clone()),
        Tls::Secrets { namespace, issuer, validity, gateway_names, timing } => {
            (namespace.clone(), *issuer, *validity, gateway_names.clone(), *timing)
        }
    };
    let (publisher, published) = Publisher::new(
        kubernetes.clone(),
        &namespace,
        config.cluster.clone(),
        config.cluster_id,
        config.max_connected_clusters,
    );
    let keep = CertificatesConfig {
        cluster: config.cluster.to_string(),
        namespace,
        issuer,
        validity,
        gateway_names,
        timing,
    };
    let certificates = Certificates::start(kubernetes, keep, &config.replica, leadership, published, tasks);
    let publishing = publisher.run(certificates.bundles(), leadership.clone());
    tasks.spawn("the publishing of the cluster's information", publishing);
    Identities::Secrets(certificates)
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
    let namespace = config.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    let (seen, peers_dir) = (Arc::clone(view), config.peers_dir.clone());
    let status =
        status.merge(troubleshoot::of_daemon(config.own(), namespace, peers_dir, move || seen.relay()));
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

#[cfg(test)]
mod tests;
