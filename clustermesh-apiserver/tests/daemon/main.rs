//! The real program, as a user starts it: against a Kubernetes API, beside a peer, read with stock `etcdctl`.
#![allow(clippy::unwrap_used, reason = "in a test, and in what only tests call, a panic is the report")]

mod certificates;
mod fixture;
mod peers;
mod replicas;

use clustermesh_apiserver::pki::Client;
use serde_json::json;

use crate::fixture::{Cluster, Daemon, Etcd, Mesh, until};

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_see_each_other_s_global_service_and_follow_every_change() {
    let mesh = Mesh::new();
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    for (cluster, backend) in [(&alpha, "10.1.0.7"), (&beta, "10.2.0.7")] {
        cluster.global_service("app", "echo", &[backend]).await;
    }
    let alpha_daemon = Daemon::start(&mesh, &alpha, &[]).await;
    let beta_daemon = Daemon::start(&mesh, &beta, &[]).await;
    alpha_daemon.ready_within_deadline().await;
    beta_daemon.ready_within_deadline().await;
    // Each learns of the other while it runs.
    alpha_daemon.connect(&mesh, &beta_daemon);
    beta_daemon.connect(&mesh, &alpha_daemon);

    let agent = mesh.client(Client::Agent("alpha"));
    let mirrored = "cilium/cache/services/v1/beta/app/echo";
    let value = until("beta's service is mirrored in alpha", async || {
        alpha_daemon.get(&agent, mirrored).ok_or_else(|| alpha_daemon.log())
    })
    .await;
    let service: serde_json::Value = serde_json::from_str(&value).unwrap();
    assert_eq!(service["cluster"], "beta");
    assert_eq!(service["clusterID"], 2);
    assert_eq!(service["includeExternal"], true);
    assert_eq!(service["shared"], true);
    assert_eq!(service["backends"], json!({"10.2.0.7": {"http": {"Protocol": "TCP", "Port": 8080}}}));
    // Byte for byte what beta exports, as a remote of beta reads it.
    let remote = mesh.client(Client::Remote("alpha"));
    assert_eq!(beta_daemon.get(&remote, "cilium/state/services/v1/beta/app/echo"), Some(value));
    let config = alpha_daemon.get(&agent, "cilium/cluster-config/beta").unwrap();
    assert_eq!(
        config,
        r#"{"id":2,"capabilities":{"syncedCanaries":true,"cached":true,"maxConnectedClusters":255}}"#
    );

    beta.backends("app", "echo", &["10.2.0.7", "10.2.0.8"]).await;
    until("the second backend has come", async || match alpha_daemon.get(&agent, mirrored) {
        Some(value) if value.contains("10.2.0.8") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    beta.annotate("app", "echo", &[("io.cilium/shared-service", "false")]).await;
    until("beta has taken it back", async || match alpha_daemon.get(&agent, mirrored) {
        None => Ok(()),
        Some(value) => Err(value),
    })
    .await;

    let status = until("all is well", async || {
        let status = alpha_daemon.status().await;
        if status.problems().is_empty() && status.peers.len() == 1 {
            Ok(status)
        } else {
            Err(format!("{status:#?}"))
        }
    })
    .await;
    assert_eq!(status.cluster, "alpha");
    assert_eq!(status.peers[0].cluster_id, Some(2));
    assert!(status.peers[0].data_age_seconds.is_some());
    assert_eq!(status.exporter.counts.services, 1);

    let metrics = alpha_daemon.metrics().await;
    for line in [
        "cilium_kvstoremesh_remote_clusters 1",
        r#"cilium_kvstoremesh_remote_cluster_readiness_status{target_cluster="beta"} 1"#,
        r#"cilium_clustermesh_apiserver_kvstore_initial_sync_completed{scope="services/v1",source_cluster="alpha",action="write"} 1"#,
        r#"cilium_clustermesh_apiserver_kvstore_sync_queue_size{scope="nodes/v1",source_cluster="alpha"} 0"#,
        r#"cilium_clustermesh_apiserver_kvstore_sync_errors_total{scope="isthmus/services/v1",source_cluster="alpha"} 0"#,
        "cilium_clustermesh_apiserver_bootstrap_seconds ",
        r#"cilium_kvstoremesh_kvstore_initial_sync_completed{scope="services/v1",source_cluster="beta",action="read"} 1"#,
        r#"cilium_kvstoremesh_kvstore_initial_sync_completed{scope="services/v1",source_cluster="beta",action="write"} 1"#,
        r#"cilium_kvstoremesh_kvstore_initial_sync_completed{scope="serviceexports/v1",source_cluster="beta",action="write"} 1"#,
        r#"cilium_kvstoremesh_kvstore_sync_queue_size{scope="ip/v1",source_cluster="beta"} 0"#,
        r#"cilium_kvstoremesh_kvstore_sync_errors_total{scope="ip/v1",source_cluster="beta"} 0"#,
        r#"cilium_kvstoremesh_kvstore_operations_duration_seconds_count{scope="services/v1",kind="read",action="ListPrefix",outcome="success"} "#,
        r#"cilium_kvstoremesh_kvstore_events_queue_seconds_count{scope="services/v1",action="delete"} 1"#,
        r#"cilium_kvstoremesh_kvstore_quorum_errors_total{error="no event received"} 0"#,
        r#"cilium_kvstoremesh_api_limiter_requests_in_flight{api_call="etcd-beta",value="limit"} 10"#,
        r#"cilium_kvstoremesh_api_limiter_processed_requests_total{api_call="etcd-beta",outcome="success",return_code="200"} "#,
        r#"cilium_kvstoremesh_leader_election_master_status{name="kvstoremesh"} 1"#,
        "cilium_kvstoremesh_bootstrap_seconds ",
        "cilium_kvstoremesh_version{",
        "isthmus_store_revision",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    alpha_daemon.terminate().await;
    beta_daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_reads_what_its_certificate_grants_and_nobody_writes() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let daemon = Daemon::start(&mesh, &alpha, &[]).await;
    daemon.ready_within_deadline().await;
    let remote = mesh.client(Client::Remote("beta"));
    let admin = mesh.client(Client::Admin("alpha"));
    assert!(daemon.get(&remote, "cilium/.heartbeat").is_some());
    assert!(daemon.get(&remote, "cilium/cluster-config/alpha").is_some());
    let denied = daemon.etcdctl(&remote, &["get", "--prefix", "isthmus/"]).unwrap_err();
    assert!(denied.contains("permission denied"), "{denied}");
    let denied = daemon.etcdctl(&admin, &["put", "cilium/.heartbeat", "x"]).unwrap_err();
    assert!(denied.contains("permission denied"), "{denied}");
    let everything = daemon.etcdctl(&admin, &["get", "--prefix", "", "--keys-only"]).unwrap();
    assert!(everything.contains("cilium/synced/alpha/isthmus/services/v1"), "{everything}");
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_etcd_behind_it_a_killed_apiserver_comes_back_to_the_same_store() {
    let mesh = Mesh::new();
    let etcd = Etcd::start().await;
    let alpha = Cluster::start("alpha", 1).await;
    alpha.global_service("app", "echo", &["10.1.0.7"]).await;
    let config = etcd.client_config(&mesh);
    let flags = ["--store", "etcd", "--etcd-config", config.as_str()];
    let daemon = Daemon::start(&mesh, &alpha, &flags).await;
    daemon.ready_within_deadline().await;
    let remote = mesh.client(Client::Remote("beta"));
    let key = "cilium/state/services/v1/alpha/app/echo";
    let before = daemon.get(&remote, key).expect("exported");
    let store = daemon.status().await.store;
    assert_eq!(store.engine, "etcd");
    daemon.kill().await;

    // While it is dead the service goes; and the next one does not begin with an empty store.
    alpha.global_service("app", "other", &["10.1.0.9"]).await;
    alpha.delete_service("app", "echo").await;
    let daemon = Daemon::start(&mesh, &alpha, &flags).await;
    daemon.ready_within_deadline().await;
    assert_eq!(daemon.status().await.store.store_id, store.store_id, "the same store to its readers");
    assert!(daemon.get(&remote, "cilium/state/services/v1/alpha/app/other").is_some());
    until("what went away meanwhile is removed", async || match daemon.get(&remote, key) {
        None => Ok(()),
        Some(value) => Err(format!("{value}, before {before}")),
    })
    .await;
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_waits_for_the_kubernetes_api_and_says_so() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let api = alpha.address();
    alpha.stop().await;
    let daemon = Daemon::start(&mesh, &alpha, &[]).await;
    let reason = until("it tells what it waits for", async || {
        let (code, text) = daemon.http(daemon.health, "/readyz").await;
        if code == 503 && text.contains("Connect") || text.contains("connect") { Ok(text) } else { Err(text) }
    })
    .await;
    assert!(reason.contains("list"), "{reason}");
    assert_eq!(daemon.http(daemon.health, "/healthz").await.0, 200);
    let problems = daemon.status().await.problems();
    assert!(problems.iter().any(|problem| problem.contains("not ready")), "{problems:?}");
    alpha.start_again(api).await;
    daemon.ready_within_deadline().await;
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_cannot_work_ends_with_one_line_that_names_what_to_change() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let in_use = taken.local_addr().unwrap().to_string();
    let empty = mesh.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let empty = empty.display().to_string();
    for (flag, value, says) in [
        ("--tls-cert", "/nowhere/tls.crt", "/nowhere/tls.crt"),
        ("--tls-client-ca", empty.as_str(), "no PEM certificate"),
        ("--kubeconfig", "/nowhere/kubeconfig", "--kubeconfig /nowhere/kubeconfig"),
        ("--kubeconfig", empty.as_str(), "--kubeconfig"),
        ("--health-address", "0.0.0.0:9880", "loopback"),
        ("--health-address", in_use.as_str(), "--health-address"),
        ("--listen", in_use.as_str(), "--listen"),
        ("--cluster-id", "256", "--max-connected-clusters"),
        ("--log-level", "loud=very", "--log-level"),
        ("--etcd-config", empty.as_str(), "--store etcd"),
        ("--api-socket", empty.as_str(), "--api-socket"),
    ] {
        let (code, text) = Daemon::fails(&mesh, &alpha, &[flag, value]).await;
        assert_ne!(code, 0, "{flag} {value}");
        let lines: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("clustermesh-apiserver: ") || line.starts_with("error: "))
            .collect();
        assert_eq!(lines.len(), 1, "{flag} {value}: {text}");
        assert!(text.contains(says), "{flag} {value}: {text}");
        assert!(!text.contains("panicked"), "{text}");
    }
    alpha.stop().await;
}
