//! The same with the real clustermesh-apiserver, in this process.

use std::net::SocketAddr;
use std::path::Path;

use clap::Parser;
use clustermesh_apiserver::daemon;
use clustermesh_apiserver::flags::Flags;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, DEADLINE, NAMESPACE, Setup};
use crate::{ALPHA, BETA, World};

/// A cluster's clustermesh-apiserver. Ends when dropped.
struct Apiserver {
    gateway: SocketAddr,
    shutdown: CancellationToken,
}

impl Drop for Apiserver {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn free_port() -> SocketAddr {
    isthmus_kube_api::ports::reserve().unwrap()
}

async fn run(cluster: &Cluster, setup: &Setup, folder: &Path) -> Apiserver {
    cluster.make_namespace().await;
    cluster.define(isthmus_crds::definitions()).await;
    let kubeconfig = folder.join(setup.name);
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": cluster.server}}],
        "users": [{"name": "c", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    });
    std::fs::write(&kubeconfig, config.to_string()).unwrap();
    let gateway = free_port();
    let flags = [
        ("--cluster-name", setup.name.to_owned()),
        ("--cluster-id", setup.id.to_string()),
        ("--kubeconfig", kubeconfig.display().to_string()),
        ("--namespace", NAMESPACE.to_owned()),
        ("--replica-name", format!("{}-0", setup.name)),
        ("--listen", gateway.to_string()),
        ("--health-address", free_port().to_string()),
        ("--metrics-address", free_port().to_string()),
        ("--ca-rotation-settle", "1s".to_owned()),
        ("--peer-drain-grace", "1s".to_owned()),
    ];
    let flags = flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
    let flags =
        Flags::try_parse_from(std::iter::once("clustermesh-apiserver".to_owned()).chain(flags)).unwrap();
    let shutdown = CancellationToken::new();
    let (config, until) = (flags.config().unwrap(), shutdown.clone());
    // As in its own process: on a runtime of its own, blocked upon.
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(daemon::run(config, until)).expect("it ends when it is told to");
    });
    let published = kube::runtime::wait::await_condition(
        cluster.namespaced::<ConfigMap>(),
        isthmus_crds::names::CLUSTER_INFO,
        |map: Option<&ConfigMap>| map.is_some_and(|map| map.data.is_some()),
    );
    tokio::time::timeout(DEADLINE, published).await.expect("it publishes who it is").unwrap();
    Apiserver { gateway, shutdown }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_apiservers_are_connected_get_another_ca_and_are_taken_apart() {
    let world = World::of(Cluster::without_isthmus(&ALPHA).await, Cluster::without_isthmus(&BETA).await);
    let alpha = run(&world.alpha, &ALPHA, world.folder.path()).await;
    let beta = run(&world.beta, &BETA, world.folder.path()).await;
    let both = "--context kind-alpha --destination-context kind-beta";
    let (at_alpha, at_beta) = (alpha.gateway, beta.gateway);
    let connect = format!("connect {both} --source-endpoint {at_alpha} --destination-endpoint {at_beta}");

    let connected = world.isthmus(&connect).await;
    assert_eq!(connected.code, 0, "{connected}");
    let status = world.isthmus("status --context kind-alpha,kind-beta -o json").await;
    assert_eq!(status.code, 0, "{status}");
    assert_eq!(status.json()["clusters"][0]["leader"]["holder"], "alpha-0");
    assert_eq!(status.json()["problems"], json!([]), "{status}");
    let status = status.json();
    let certificates = status["clusters"][0]["certificates"].as_array().unwrap();
    let told: Vec<_> = certificates.iter().map(|one| (&one["role"], &one["subject"], &one["left"])).collect();
    let expected = [
        ("authority", "Isthmus CA alpha", "3650d"),
        ("gateway", "clustermesh-apiserver.cilium.io", "90d"),
        ("relay", "remote-alpha", "90d"),
        ("node-agents", "agent-alpha", "90d"),
        ("cilium-agents", "local-alpha", "90d"),
        ("administrator", "admin-alpha", "90d"),
        ("peer-authority", "Isthmus CA beta", "3650d"),
    ];
    assert_eq!(
        told,
        expected.map(|(a, b, c)| (json!(a), json!(b), json!(c))).each_ref().map(|(a, b, c)| (a, b, c))
    );

    let rotated = world.isthmus(&format!("rotate-ca {both}")).await;
    assert_eq!(rotated.code, 0, "{rotated}");
    // What was connected with a certificate of the old CA has been ended, and is connected anew.
    let status = world.isthmus("status --context kind-alpha,kind-beta --wait --wait-duration 30s").await;
    assert_eq!(status.code, 0, "connected as before: {status}");

    let apart = world.isthmus(&format!("disconnect {both} --delete")).await;
    assert_eq!(apart.code, 0, "{apart}");
    let peers = world.isthmus("peers --context kind-alpha,kind-beta -o json").await;
    assert_eq!(peers.json()["peers"], json!([]), "{peers}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_apiserver_reads_from_one_that_lets_it_in_and_goes_on_with_another_ca() {
    let world = World::of(Cluster::without_isthmus(&ALPHA).await, Cluster::without_isthmus(&BETA).await);
    let _alpha = run(&world.alpha, &ALPHA, world.folder.path()).await;
    let beta = run(&world.beta, &BETA, world.folder.path()).await;
    let both = "--context kind-alpha --destination-context kind-beta";
    let one_way = "--connection-mode unicast";

    // Where alpha's gateway is, nobody has to know.
    let connect = format!("connect {both} {one_way} --destination-endpoint {}", beta.gateway);
    let connected = world.isthmus(&connect).await;
    assert_eq!(connected.code, 0, "{connected}");
    let status = world.isthmus("status --context kind-alpha,kind-beta -o json").await;
    assert_eq!(status.code, 0, "{status}");
    let status = status.json();
    let peer = |cluster: usize| status["clusters"][cluster]["peers"][0].clone();
    assert_eq!((&peer(0)["relation"], &peer(0)["ready"]), (&json!("Connected"), &json!(true)), "{status}");
    assert_eq!((&peer(1)["relation"], &peer(1)["ready"]), (&json!("Admitted"), &json!(null)), "{status}");

    // Of either cluster: the reader's is trusted in time where it is let in, the other's where it is read from.
    for rotating in [both, "--context kind-beta --destination-context kind-alpha"] {
        let rotated = world.isthmus(&format!("rotate-ca {rotating}")).await;
        assert_eq!(rotated.code, 0, "{rotated}");
        let status = world.isthmus("status --context kind-alpha,kind-beta --wait --wait-duration 30s").await;
        assert_eq!(status.code, 0, "connected as before: {status}");
    }

    let apart = world.isthmus(&format!("disconnect {both} {one_way}")).await;
    assert_eq!(apart.code, 0, "{apart}");
    let peers = world.isthmus("peers --context kind-alpha,kind-beta -o json").await;
    assert_eq!(peers.json()["peers"], json!([]), "{peers}");
}
