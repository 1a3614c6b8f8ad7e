//! Several replicas of the real program: one leads, all serve, and the next takes over.

use isthmus_crds::names::{ADMIN_CERT_SECRET, LEASE, SERVER_CERT_SECRET};
use k8s_openapi::api::coordination::v1::Lease;

use crate::fixture::{Cluster, Daemon, Etcd, Mesh, Mounted, until};
use crate::peers::{admin_of, tell};

/// A lease that a leader does not lose to a machine that has no time for it, and that others need not wait for long.
pub(crate) const LEASE_FLAGS: [&str; 2] = ["--leader-elect-lease-duration", "8s"];
const SERVICE: &str = "cilium/state/services/v1/alpha/app/";

#[tokio::test(flavor = "multi_thread")]
async fn each_replica_serves_a_store_of_its_own_and_one_leads_until_it_dies_or_stands_still() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    alpha.global_service("app", "echo", &["10.1.0.7"]).await;
    let mut replicas = start(&mesh, &alpha, &[]).await;
    let leader = leader_of(&replicas).await;
    assert_eq!(holder(&alpha).await, replicas[leader].name());
    let admin = alpha.mounted(&mesh, ADMIN_CERT_SECRET).await;
    let mut stores = Vec::new();
    for replica in &replicas {
        assert!(!read(replica, &admin, "echo").is_empty(), "{} serves", replica.name());
        stores.push(replica.status().await.store.store_id);
    }
    stores.dedup();
    assert_eq!(stores.len(), 3, "three stores, told apart by their ids");

    // One that stands still finds itself replaced, and does not disturb who leads now.
    let paused = replicas.swap_remove(leader);
    paused.pause(true);
    let next = leader_of(&replicas).await;
    let name = replicas[next].name();
    paused.pause(false);
    until("it knows who leads", async || {
        let status = paused.status().await;
        match (status.leading, status.leader.as_deref()) {
            (false, Some(leader)) if leader == name => Ok(()),
            other => Err(format!("{other:?}\n{}", paused.log())),
        }
    })
    .await;
    assert_eq!(holder(&alpha).await, name);
    paused.ready_within_deadline().await;

    // One that ends in order hands over without a wait.
    let dies = replicas.swap_remove(next);
    replicas.push(paused);
    dies.kill().await;
    let next = leader_of(&replicas).await;
    let last = replicas.swap_remove(1 - next);
    hands_over(&alpha, replicas.pop().unwrap()).await;
    leader_of(std::slice::from_ref(&last)).await;
    assert!(!read(&last, &admin, "echo").is_empty());
    last.terminate().await;
    assert_eq!(holder(&alpha).await, "", "released");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_one_etcd_the_next_leader_exports_what_came_and_removes_what_went_meanwhile() {
    let mesh = Mesh::new();
    let etcd = Etcd::start().await;
    let alpha = Cluster::start("alpha", 1).await;
    alpha.global_service("app", "old", &["10.1.0.7"]).await;
    let config = etcd.client_config(&mesh);
    let mut replicas = start(&mesh, &alpha, &["--store", "etcd", "--etcd-config", &config]).await;
    let leader = leader_of(&replicas).await;
    let admin = alpha.mounted(&mesh, ADMIN_CERT_SECRET).await;
    let store = replicas[0].status().await.store.store_id;
    for replica in &replicas {
        until("everybody serves what the leader exports", async || match read(replica, &admin, "old") {
            value if value.is_empty() => Err(replica.log()),
            _ => Ok(()),
        })
        .await;
        assert_eq!(replica.status().await.store.store_id, store, "the same store to its readers");
    }

    let metrics = replicas[leader].metrics().await;
    for line in [
        r#"cilium_clustermesh_apiserver_kvstore_sync_queue_size{scope="services/v1",source_cluster="alpha"} "#,
        r#"cilium_clustermesh_apiserver_kvstore_operations_duration_seconds_count{scope="services/v1",kind="set",action="Update",outcome="success"} "#,
        r#"cilium_clustermesh_apiserver_kvstore_quorum_errors_total{error="timeout"} 0"#,
        r#"cilium_clustermesh_apiserver_api_limiter_processed_requests_total{api_call="etcd",outcome="success",return_code="200"} "#,
        r#"cilium_clustermesh_apiserver_api_limiter_rate_limit{api_call="etcd-follow",value="limit"} "#,
        "isthmus_etcd_following 1",
        "isthmus_etcd_failures_total 0",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }

    replicas.swap_remove(leader).kill().await;
    alpha.delete_service("app", "old").await;
    alpha.global_service("app", "new", &["10.1.0.9"]).await;
    // Nobody leads for a moment: what there was is served all the same, until the next one leads.
    for replica in &replicas {
        let old = read(replica, &admin, "old");
        assert!(!old.is_empty() || any_leads(&replicas).await, "{}", replica.log());
        assert_eq!(replica.http(replica.health, "/readyz").await.0, 200);
    }
    let next = leader_of(&replicas).await;
    for replica in &replicas {
        until("the change is exported by who leads now", async || {
            let (old, new) = (read(replica, &admin, "old"), read(replica, &admin, "new"));
            if old.is_empty() && !new.is_empty() {
                Ok(())
            } else {
                Err(format!("{old} {new}\n{}", replica.log()))
            }
        })
        .await;
    }

    // One that loses the lead while it lives stands by: it follows, and writes nothing any more.
    let paused = replicas.swap_remove(next);
    paused.pause(true);
    leader_of(&replicas).await;
    paused.pause(false);
    alpha.global_service("app", "newer", &["10.1.0.11"]).await;
    until("it stands by, serves what the other exports, and is ready", async || {
        let (status, newer) = (paused.status().await, read(&paused, &admin, "newer"));
        if !status.leading && status.ready && !newer.is_empty() {
            return Ok(());
        }
        Err(format!("leading {}, ready {}\n{}", status.leading, status.ready, paused.log()))
    })
    .await;
    let metrics = paused.metrics().await;
    for line in [
        r#"cilium_clustermesh_apiserver_leader_election_master_status{name="isthmus-clustermesh-apiserver"} 0"#,
        r#"cilium_kvstoremesh_leader_election_master_status{name="kvstoremesh"} 0"#,
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    assert!(alpha.entry(SERVER_CERT_SECRET, "tls.crt").await.is_some());

    // A rollout: who ends in order hands over, and the next one writes as well.
    hands_over(&alpha, replicas.pop().unwrap()).await;
    leader_of(std::slice::from_ref(&paused)).await;
    alpha.global_service("app", "newest", &["10.1.0.13"]).await;
    until("the last one exports", async || match read(&paused, &admin, "newest") {
        value if value.is_empty() => Err(paused.log()),
        _ => Ok(()),
    })
    .await;
    hands_over(&alpha, paused).await;
}

/// Ends the leader in order. The Lease is free then, or the next one's already, though its time has not run out.
async fn hands_over(cluster: &Cluster, leader: Daemon) {
    let name = leader.name();
    assert_eq!(holder(cluster).await, name);
    leader.terminate().await;
    assert_ne!(holder(cluster).await, name, "it was not released");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_one_etcd_the_next_leader_stands_behind_what_was_mirrored_of_a_peer_that_is_out_of_reach() {
    let mesh = Mesh::new();
    let etcd = Etcd::start().await;
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    beta.global_service("app", "echo", &["10.2.0.7"]).await;
    let config = etcd.client_config(&mesh);
    let flags = [&LEASE_FLAGS[..], &["--store", "etcd", "--etcd-config", &config]].concat();
    let first = Daemon::replica(&mesh, &alpha, "r0", &flags).await;
    let beta_daemon = Daemon::replica(&mesh, &beta, "b0", &[]).await;
    first.ready_within_deadline().await;
    beta_daemon.ready_within_deadline().await;
    tell(&alpha, &beta, Some(&beta_daemon)).await;
    tell(&beta, &alpha, None).await;
    let mirrored = [
        "cilium/cache/services/v1/beta/app/echo",
        "cilium/cluster-config/beta",
        "cilium/synced/beta/cilium/cache/services/v1",
    ];
    let mut before = Vec::new();
    for key in mirrored {
        before.push(
            until("beta is mirrored", async || etcd.lease_of(key).await.ok_or_else(|| first.log())).await,
        );
    }

    beta_daemon.kill().await;
    first.kill().await;
    let next = Daemon::replica(&mesh, &alpha, "r1", &flags).await;
    next.ready_within_deadline().await;
    for (key, before) in mirrored.into_iter().zip(before) {
        until("it is held by who leads now", async || match etcd.lease_of(key).await {
            Some(now) if now != before => Ok(()),
            other => Err(format!("{key}: {other:x?}, before {before:x}\n{}", next.log())),
        })
        .await;
    }
    let admin = admin_of(&alpha, &mesh, &next).await;
    assert!(next.read(&admin, mirrored[0]).unwrap().contains("10.2.0.7"));
    next.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_ends_although_its_etcd_takes_nothing_of_the_peer_that_it_is_reading() {
    let mesh = Mesh::new();
    let etcd = Etcd::start().await;
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    beta.global_service("app", "echo", &["10.2.0.7"]).await;
    let config = etcd.client_config(&mesh);
    let alpha_daemon =
        Daemon::replica(&mesh, &alpha, "r0", &["--store", "etcd", "--etcd-config", &config]).await;
    let beta_daemon = Daemon::replica(&mesh, &beta, "b0", &[]).await;
    alpha_daemon.ready_within_deadline().await;
    beta_daemon.ready_within_deadline().await;
    etcd.stop();
    tell(&beta, &alpha, None).await;
    tell(&alpha, &beta, Some(&beta_daemon)).await;
    until("beta is being read", async || {
        let status = alpha_daemon.status().await;
        match status.peers.first() {
            Some(peer) if peer.connected && peer.cluster_id.is_some() => Ok(()),
            other => Err(format!("{other:#?}\n{}", alpha_daemon.log())),
        }
    })
    .await;
    alpha_daemon.terminate().await;
    beta_daemon.terminate().await;
}

async fn start(mesh: &Mesh, cluster: &Cluster, more: &[&str]) -> Vec<Daemon> {
    let flags = [&LEASE_FLAGS, more].concat();
    let mut replicas = Vec::new();
    for name in ["r0", "r1", "r2"] {
        replicas.push(Daemon::replica(mesh, cluster, name, &flags).await);
    }
    for replica in &replicas {
        replica.ready_within_deadline().await;
    }
    replicas
}

/// Waits until one of them leads, and no other.
async fn leader_of(replicas: &[Daemon]) -> usize {
    until("one leads", async || {
        let mut leaders = Vec::new();
        for (number, replica) in replicas.iter().enumerate() {
            if leads(replica).await {
                leaders.push(number);
            }
        }
        match leaders[..] {
            [leader] => Ok(leader),
            _ => Err(replicas.iter().map(Daemon::log).collect::<Vec<_>>().join("\n--\n")),
        }
    })
    .await
}

async fn any_leads(replicas: &[Daemon]) -> bool {
    for replica in replicas {
        if leads(replica).await {
            return true;
        }
    }
    false
}

async fn leads(replica: &Daemon) -> bool {
    replica.status().await.leading
}

async fn holder(cluster: &Cluster) -> String {
    let lease = cluster.own::<Lease>().get(LEASE).await.unwrap();
    lease.spec.and_then(|spec| spec.holder_identity).unwrap_or_default()
}

fn read(replica: &Daemon, admin: &Mounted, service: &str) -> String {
    replica.read(admin, &format!("{SERVICE}{service}")).unwrap()
}
