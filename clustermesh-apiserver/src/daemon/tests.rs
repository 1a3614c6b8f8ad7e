//! A task that ends by itself takes the daemon with it, in order, wherever the daemon is.

use std::path::Path;
use std::time::Duration;

use isthmus_daemon::LoopbackAddr;
use isthmus_kvstore::gateway::TlsFiles;
use isthmus_wire::MaxConnectedClusters;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::*;
use crate::exporter::Source;
use crate::pki::{Authority, DEFAULT_VALIDITY};

/// How long anything may take. Only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(30);

fn files(folder: &Path) -> TlsFiles {
    let authority = Authority::generate("Cilium CA", DEFAULT_VALIDITY).unwrap();
    let gateway = authority.gateway("isthmus-system", &[], DEFAULT_VALIDITY).unwrap();
    let gateway = gateway.write(folder, "gateway").unwrap();
    let client_ca = folder.join("ca.crt");
    std::fs::write(&client_ca, authority.certificate()).unwrap();
    TlsFiles { certificate: gateway.certificate, key: gateway.key, client_ca }
}

fn config(tls: TlsFiles) -> DaemonConfig {
    DaemonConfig {
        cluster: "alpha".parse().unwrap(),
        cluster_id: 1.try_into().unwrap(),
        max_connected_clusters: MaxConnectedClusters::C255,
        kubeconfig: None,
        namespace: None,
        replica: "one".to_owned(),
        election: None,
        source: Source::Kubernetes,
        namespaces_are_global: true,
        peers_dir: None,
        timing: relay::Timing::default(),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: Tls::Files(tls),
        engine: Engine::Memory,
        health_address: LoopbackAddr::ipv4(0),
        metrics_address: LoopbackAddr::ipv4(0),
        api_socket: None,
    }
}

/// What a daemon without a Kubernetes API has.
fn shared(tls: TlsFiles, shutdown: &CancellationToken) -> Shared {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let nowhere = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
    Shared {
        kubernetes: kube::Client::try_from(nowhere).unwrap(),
        tasks: Tasks::until(shutdown.clone()),
        leadership: Leadership::alone(),
        identities: Identities::Files(tls),
        exporter_metrics: ExporterMetrics::new(&mut Registry::default()),
        relay_metrics: Arc::default(),
        etcd_metrics: ClientMetrics::default(),
    }
}

#[tokio::test]
async fn a_task_that_panics_ends_a_daemon_that_serves_and_lets_go_of_everything() {
    let folder = tempfile::tempdir().unwrap();
    let tls = files(folder.path());
    let (config, shutdown) = (config(tls.clone()), CancellationToken::new());
    let (shared, view) = (shared(tls, &shutdown), View::new(&config));
    let (fail, failing) = oneshot::channel::<()>();
    shared.tasks.spawn("the keeping of certificates", async {
        let _ = failing.await;
        panic!("on purpose");
    });
    let fault = async {
        while view.relay().is_none() {
            tokio::task::yield_now().await;
        }
        fail.send(()).unwrap();
    };
    let serving = async { tokio::join!(serve(&config, None, &shared, &view, &shutdown), fault).0 };
    let outcome = timeout(DEADLINE, serving).await.expect("it ends in time");
    assert!(matches!(outcome, Err(DaemonError::Stopped("the keeping of certificates"))), "{outcome:?}");
    assert!(shutdown.is_cancelled(), "whatever else runs ends too");
}

#[tokio::test]
async fn a_task_that_panics_ends_a_daemon_that_still_waits_for_etcd() {
    let folder = tempfile::tempdir().unwrap();
    let tls = files(folder.path());
    let (config, shutdown) = (config(tls.clone()), CancellationToken::new());
    let (shared, view) = (shared(tls, &shutdown), View::new(&config));
    shared.tasks.spawn("the election", async { panic!("on purpose") });
    let etcd = ClientConfig::parse("endpoints:\n- http://127.0.0.1:1\n").unwrap();
    let serving = serve(&config, Some(etcd), &shared, &view, &shutdown);
    let outcome = timeout(DEADLINE, serving).await.expect("it ends in time");
    assert!(matches!(outcome, Err(DaemonError::Stopped("the election"))), "{outcome:?}");
}

#[tokio::test]
async fn a_shutdown_is_no_fault() {
    let folder = tempfile::tempdir().unwrap();
    let tls = files(folder.path());
    let (config, shutdown) = (config(tls.clone()), CancellationToken::new());
    let (shared, view) = (shared(tls, &shutdown), View::new(&config));
    shared.tasks.spawn("the keeping of certificates", std::future::pending());
    let end = async {
        while view.relay().is_none() {
            tokio::task::yield_now().await;
        }
        shutdown.cancel();
    };
    let serving = async { tokio::join!(serve(&config, None, &shared, &view, &shutdown), end).0 };
    timeout(DEADLINE, serving).await.expect("it ends in time").unwrap();
}
