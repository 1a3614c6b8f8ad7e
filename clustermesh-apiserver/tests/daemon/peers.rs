//! Clusters with an authority of their own each, joined by Secrets, by the real program.

use std::collections::BTreeMap;

use clustermesh_apiserver::pki::{Authority, Client, DEFAULT_VALIDITY};
use clustermesh_apiserver::status::{PeerCause, PeerState};
use isthmus_crds::names::{ADMIN_CERT_SECRET, CA_SECRET, CLUSTER_INFO};
use isthmus_crds::peer::{ADMIT_ANNOTATION, CONNECT_ANNOTATION, PeerSecret, Relation};
use isthmus_crds::{CaBundle, ClusterInfo};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;

use crate::fixture::{Cluster, Daemon, Mesh, Mounted, until};

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_is_believed_about_its_own_cluster_alone_and_no_longer_than_it_is_connected() {
    let mesh = Mesh::new();
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    beta.global_service("app", "echo", &["10.2.0.7"]).await;
    let alpha_daemon = Daemon::replica(&mesh, &alpha, "a0", &["--peer-drain-grace", "1s"]).await;
    let beta_daemon = Daemon::replica(&mesh, &beta, "b0", &[]).await;
    alpha_daemon.ready_within_deadline().await;
    beta_daemon.ready_within_deadline().await;
    tell(&alpha, &beta, Some(&beta_daemon)).await;
    tell(&beta, &alpha, Some(&alpha_daemon)).await;

    let admin = admin_of(&alpha, &mesh, &alpha_daemon).await;
    let mirrored = "cilium/cache/services/v1/beta/app/echo";
    until("beta's service is mirrored in alpha", async || match alpha_daemon.read(&admin, mirrored) {
        Ok(value) if value.contains("10.2.0.7") => Ok(()),
        other => Err(format!("{other:?}\n{}\n--\n{}", alpha_daemon.log(), beta_daemon.log())),
    })
    .await;

    // Whatever beta's authority signs, alpha's gateway takes it for beta or for nobody.
    let (certificate, key) =
        (beta.entry(CA_SECRET, "tls.crt").await.unwrap(), beta.entry(CA_SECRET, "tls.key").await.unwrap());
    let authority = Authority::from_pem(&certificate, &key).unwrap();
    let minted = |client: Client<'_>| {
        let identity = authority.client(client, DEFAULT_VALIDITY).unwrap();
        let identity = identity.write(mesh.path(), &format!("minted-{}", client.common_name())).unwrap();
        Mounted { identity, ca: admin.ca.clone() }
    };
    let heartbeat = "cilium/.heartbeat";
    for client in [Client::Remote("beta"), Client::AnyRemote] {
        alpha_daemon.read(&minted(client), heartbeat).unwrap_or_else(|error| panic!("{client:?}: {error}"));
    }
    for client in [
        Client::Agent("alpha"),
        Client::Local("alpha"),
        Client::Admin("alpha"),
        Client::Remote("gamma"),
        Client::Admin("beta"),
    ] {
        let refused = alpha_daemon.read(&minted(client), heartbeat);
        assert!(refused.is_err(), "{client:?} reads {refused:?}");
    }

    let of_beta = r#"cilium_kvstoremesh_kvstore_initial_sync_completed{scope="services/v1",source_cluster="beta",action="write"} 1"#;
    until("its numbers are told", async || match alpha_daemon.metrics().await {
        metrics if metrics.contains(of_beta) => Ok(()),
        metrics => Err(metrics),
    })
    .await;

    // Disconnected, it is not believed about itself either, and what it shared goes.
    let change = Patch::Merge(json!({ "metadata": { "annotations": { CONNECT_ANNOTATION: "false" } } }));
    alpha.own::<Secret>().patch("peer-beta", &PatchParams::default(), &change).await.unwrap();
    until("beta is let in no more", async || {
        match alpha_daemon.read(&minted(Client::Remote("beta")), heartbeat) {
            Err(_) => Ok(()),
            Ok(_) => Err(alpha_daemon.log()),
        }
    })
    .await;
    until("what it shared is gone", async || match alpha_daemon.read(&admin, mirrored) {
        Ok(value) if value.is_empty() => Ok(()),
        other => Err(format!("{other:?}\n{}", alpha_daemon.log())),
    })
    .await;
    until("its numbers go too", async || {
        let metrics = alpha_daemon.metrics().await;
        let of_beta = |line: &&str| line.contains("beta") && !line.contains("rejected_entries");
        metrics.lines().find(of_beta).map_or(Ok(()), |line| Err(line.to_owned()))
    })
    .await;
    alpha_daemon.terminate().await;
    beta_daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_reads_from_one_that_only_lets_it_in_and_is_believed_about_itself_alone() {
    let mesh = Mesh::new();
    let (alpha, beta) = tokio::join!(Cluster::start("alpha", 1), Cluster::start("beta", 2));
    alpha.global_service("app", "echo", &["10.1.0.7"]).await;
    beta.global_service("app", "echo", &["10.2.0.7"]).await;
    let alpha_daemon = Daemon::replica(&mesh, &alpha, "a0", &[]).await;
    let beta_daemon = Daemon::replica(&mesh, &beta, "b0", &[]).await;
    alpha_daemon.ready_within_deadline().await;
    beta_daemon.ready_within_deadline().await;

    // Who is not let in is told so.
    tell(&alpha, &beta, Some(&beta_daemon)).await;
    let stands = async |state: PeerState, cause: PeerCause| {
        until(&format!("beta is {state} in alpha"), async || {
            let status = alpha_daemon.status().await;
            match status.peers.first() {
                Some(peer) if (peer.state, peer.cause) == (state, cause) => Ok(()),
                other => Err(format!("{other:#?}\n{}\n--\n{}", alpha_daemon.log(), beta_daemon.log())),
            }
        })
        .await;
    };
    stands(PeerState::Connecting, PeerCause::CertificateRefused).await;
    tell(&beta, &alpha, None).await;
    stands(PeerState::Ready, PeerCause::Mirrored).await;

    let (in_alpha, in_beta) =
        (admin_of(&alpha, &mesh, &alpha_daemon).await, admin_of(&beta, &mesh, &beta_daemon).await);
    let mirrored = alpha_daemon.read(&in_alpha, "cilium/cache/services/v1/beta/app/echo").unwrap();
    assert!(mirrored.contains("10.2.0.7"), "{mirrored}");
    let status = beta_daemon.status().await;
    assert!(status.peers.is_empty() && status.problems().is_empty(), "{status:#?}");
    let names: Vec<_> = status.admitted.iter().map(|peer| peer.name.as_str()).collect();
    assert_eq!(names, ["alpha"]);
    for key in ["cilium/cluster-config/alpha", "cilium/cache/services/v1/alpha/app/echo"] {
        assert_eq!(beta_daemon.read(&in_beta, key).unwrap(), "", "nothing is read from alpha");
    }

    // Whatever alpha's authority signs, beta's gateway takes it for alpha or for nobody.
    let (certificate, key) =
        (alpha.entry(CA_SECRET, "tls.crt").await.unwrap(), alpha.entry(CA_SECRET, "tls.key").await.unwrap());
    let authority = Authority::from_pem(&certificate, &key).unwrap();
    let minted = |client: Client<'_>| {
        let identity = authority.client(client, DEFAULT_VALIDITY).unwrap();
        let identity = identity.write(mesh.path(), &format!("minted-{}", client.common_name())).unwrap();
        Mounted { identity, ca: in_beta.ca.clone() }
    };
    let heartbeat = "cilium/.heartbeat";
    for client in [Client::Remote("alpha"), Client::AnyRemote] {
        beta_daemon.read(&minted(client), heartbeat).unwrap_or_else(|error| panic!("{client:?}: {error}"));
    }
    for client in [
        Client::Remote("gamma"),
        Client::Remote("beta"),
        Client::Agent("beta"),
        Client::Local("beta"),
        Client::Admin("beta"),
        Client::Admin("alpha"),
    ] {
        let refused = beta_daemon.read(&minted(client), heartbeat);
        assert!(refused.is_err(), "{client:?} reads {refused:?}");
    }

    // Let in no more, it is disconnected at once.
    let change = Patch::Merge(json!({ "metadata": { "annotations": { ADMIT_ANNOTATION: "false" } } }));
    beta.own::<Secret>().patch("peer-alpha", &PatchParams::default(), &change).await.unwrap();
    stands(PeerState::Connecting, PeerCause::CertificateRefused).await;
    assert!(beta_daemon.read(&minted(Client::Remote("alpha")), heartbeat).is_err());
    assert!(beta_daemon.status().await.admitted.is_empty());
    alpha_daemon.terminate().await;
    beta_daemon.terminate().await;
}

pub(crate) async fn admin_of(cluster: &Cluster, mesh: &Mesh, daemon: &Daemon) -> Mounted {
    until("a person's certificate is there", async || {
        match cluster.entry(ADMIN_CERT_SECRET, "ca.crt").await {
            Some(_) => Ok(cluster.mounted(mesh, ADMIN_CERT_SECRET).await),
            None => Err(daemon.log()),
        }
    })
    .await
}

/// Makes `peer` known to `cluster`: its authorities as it publishes them, and where its gateway is. Without one it is only
/// let in.
pub(crate) async fn tell(cluster: &Cluster, peer: &Cluster, gateway: Option<&Daemon>) {
    let info = until("the peer publishes what others must know", async || {
        let map = peer.own::<ConfigMap>().get_opt(CLUSTER_INFO).await.unwrap().ok_or("absent")?;
        ClusterInfo::parse(&map).map_err(|error| error.to_string())
    })
    .await;
    let endpoint = |daemon: &Daemon| format!("https://{}", daemon.gateway).parse().unwrap();
    let secret = PeerSecret {
        cluster: info.cluster,
        endpoints: gateway.map(endpoint).into_iter().collect(),
        ca: CaBundle::parse(info.ca.as_str()).unwrap(),
        server_name: Some(info.server_name),
        addresses: BTreeMap::new(),
        identity: None,
        relation: if gateway.is_some() { Relation::Connected } else { Relation::Admitted },
    };
    let secret = secret.to_secret(crate::fixture::NAMESPACE);
    cluster.own::<Secret>().create(&PostParams::default(), &secret).await.unwrap();
}
