//! Peers come and go, restart, change their id; and so does the relay.

use std::time::Duration;

use clustermesh_apiserver::relay::Timing;
use clustermesh_apiserver::status::{PeerCause, PeerState};

use crate::fixture::{Alpha, Mesh, Peer, quick, until};

async fn honest(mesh: &Mesh) -> Peer {
    let beta = mesh.peer("beta").await;
    tell(&beta, 2);
    beta
}

fn tell(beta: &Peer, id: u32) {
    beta.introduce(id);
    beta.put_node("n1", id);
    beta.put_service("echo", id);
    beta.complete();
}

async fn gone(alpha: &Alpha, name: &str) {
    until(&format!("nothing of {name} is left"), || match alpha.keys_of(name) {
        keys if keys.is_empty() => Ok(()),
        keys => Err(format!("{keys:#?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_peer_loses_its_configuration_at_once_and_its_data_after_the_grace_period() {
    let mesh = Mesh::new();
    let timing = Timing { drain_grace: Duration::from_secs(2), ..Timing::default() };
    let store = Alpha::start(&mesh).store;
    let alpha = Alpha::start_with(&mesh, store, timing);
    let beta = honest(&mesh).await;
    alpha.connect("beta", beta.address);
    alpha.ready("beta").await;

    alpha.disconnect("beta");
    until("the configuration is gone", || match alpha.value("cilium/cluster-config/beta") {
        None => Ok(()),
        Some(_) => Err("it is there".to_owned()),
    })
    .await;
    let peer = alpha.peer("beta").expect("still known while it drains");
    assert_eq!(peer.state, PeerState::Draining);
    assert!(alpha.value("cilium/cache/nodes/v1/beta/n1").is_some(), "agents have not let go of it yet");

    // Configured again meanwhile: waits for the end of the draining, then begins anew.
    alpha.connect("beta", beta.address);
    let before = alpha.store.revision();
    alpha.ready("beta").await;
    assert!(alpha.value("cilium/cluster-config/beta").is_some());
    assert!(alpha.value("cilium/cache/nodes/v1/beta/n1").is_some());
    assert!(alpha.store.revision() > before, "it was drained in between");

    alpha.disconnect("beta");
    gone(&alpha, "beta").await;
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_another_id_is_drained_first_and_mirrored_anew() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    beta.put("cilium/state/identities/v1/id/131073", "k8s:io.cilium.k8s.policy.cluster=beta;");
    alpha.connect("beta", beta.address);
    alpha.ready("beta").await;
    until("the identity", || {
        alpha.value("cilium/cache/identities/v1/beta/id/131073").ok_or_else(String::new)
    })
    .await;

    tell(&beta, 5);
    until("mirrored with its new id", || {
        let peer = alpha.peer("beta");
        let seen = format!("{peer:#?}");
        peer.filter(|peer| peer.cluster_id == Some(5) && peer.state == PeerState::Ready).map(drop).ok_or(seen)
    })
    .await;
    assert_eq!(alpha.value("cilium/cache/identities/v1/beta/id/131073"), None, "an identity of the old id");
    let node = String::from_utf8(alpha.value("cilium/cache/nodes/v1/beta/n1").unwrap()).unwrap();
    assert!(node.contains(r#""ClusterID":5"#), "{node}");
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_peer_is_recognised_by_its_new_store_and_nothing_flaps() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    let address = beta.address;
    alpha.connect("beta", address);
    alpha.ready("beta").await;
    let mirrored = alpha.store.get(b"cilium/cache/services/v1/beta/app/echo").unwrap();

    beta.stop().await;
    until("the loss is noticed", || {
        let peer = alpha.peer("beta").expect("configured");
        if peer.connected { Err(format!("{peer:#?}")) } else { Ok(()) }
    })
    .await;
    assert!(alpha.value("cilium/cache/services/v1/beta/app/echo").is_some(), "the last known state stays");

    // Back with an empty store: its exporter has not told everything yet.
    let beta = mesh.peer_at("beta", address).await;
    beta.introduce(2);
    beta.put_service("echo", 2);
    until("connected again", || {
        let peer = alpha.peer("beta").expect("configured");
        if peer.connected { Ok(()) } else { Err(format!("{peer:#?}")) }
    })
    .await;
    assert!(
        alpha.value("cilium/cache/nodes/v1/beta/n1").is_some(),
        "the peer has not said yet that n1 is gone"
    );
    beta.complete();
    until("what is not there any more is gone", || match alpha.value("cilium/cache/nodes/v1/beta/n1") {
        None => Ok(()),
        Some(_) => Err("n1 is there".to_owned()),
    })
    .await;
    let now = alpha.store.get(b"cilium/cache/services/v1/beta/app/echo").unwrap();
    assert_eq!(now.mod_revision, mirrored.mod_revision, "what stayed the same was not written again");
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_of_a_peer_out_of_reach_are_withdrawn_after_the_ttl_and_come_back_with_it() {
    let mesh = Mesh::new();
    let store = Alpha::start(&mesh).store;
    let timing = Timing { cache_ttl: Some(Duration::from_millis(200)), ..quick() };
    let alpha = Alpha::start_with(&mesh, store, timing);
    let beta = honest(&mesh).await;
    let address = beta.address;
    alpha.connect("beta", address);
    alpha.ready("beta").await;

    beta.stop().await;
    until("the services are withdrawn", || match alpha.value("cilium/cache/services/v1/beta/app/echo") {
        None => Ok(()),
        Some(_) => Err(format!("{:#?}", alpha.peer("beta"))),
    })
    .await;
    assert!(alpha.value("cilium/cache/nodes/v1/beta/n1").is_some(), "nodes stay");
    assert!(alpha.value("cilium/cluster-config/beta").is_some(), "the configuration stays");

    let beta = mesh.peer_at("beta", address).await;
    tell(&beta, 2);
    until("the services are back", || {
        alpha
            .value("cilium/cache/services/v1/beta/app/echo")
            .ok_or_else(|| format!("{:#?}", alpha.peer("beta")))
    })
    .await;
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_refuses_this_cluster_is_as_good_as_disconnected_until_it_takes_it_again() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    let address = beta.address;
    alpha.connect("beta", address);
    alpha.ready("beta").await;

    // One that is only out of reach stays described.
    beta.stop().await;
    until("the loss is noticed", || {
        let peer = alpha.peer("beta").expect("configured");
        if peer.connected { Err(format!("{peer:#?}")) } else { Ok(()) }
    })
    .await;
    assert!(alpha.value("cilium/cluster-config/beta").is_some());

    let beta = mesh.peer_that_refuses("beta", address).await;
    until("the description is withheld", || match alpha.value("cilium/cluster-config/beta") {
        None => Ok(()),
        Some(_) => Err(format!("{:#?}", alpha.peer("beta"))),
    })
    .await;
    assert!(alpha.value("cilium/cache/services/v1/beta/app/echo").is_some(), "for whoever has no other");
    assert!(alpha.value("cilium/cache/nodes/v1/beta/n1").is_some(), "for what is open");
    let status = alpha.peer("beta").expect("configured");
    assert_eq!(status.cause, PeerCause::CertificateRefused, "{status:#?}");
    assert!(status.reason.is_some_and(|reason| reason.contains("only where no other cluster has them")));

    beta.stop().await;
    let beta = mesh.peer_at("beta", address).await;
    tell(&beta, 2);
    alpha.ready("beta").await;
    assert!(alpha.value("cilium/cluster-config/beta").is_some(), "readers are told again");
    assert_eq!(alpha.value(REFUSING), None);
    alpha.stop().await;
}

/// What agents are told of a peer that refuses this cluster, whatever else the store has of it.
const REFUSING: &str = "isthmus/refusing/v1/beta";

async fn is_said_to_refuse(alpha: &Alpha) {
    until("it is said that beta refuses", || match alpha.value(REFUSING).as_deref() {
        Some(b"true") => Ok(()),
        value => Err(format!("{value:?} {:#?}", alpha.peer("beta"))),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_with_a_new_store_tells_a_peer_that_refuses_from_one_that_is_out_of_reach() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    let address = beta.address;
    beta.stop().await;
    alpha.connect("beta", address);
    until("a connection has failed", || {
        alpha
            .peer("beta")
            .filter(|peer| peer.failures > 1)
            .ok_or_else(|| format!("{:#?}", alpha.peer("beta")))
    })
    .await;
    assert_eq!(alpha.keys_of("beta"), [""; 0], "there is nothing to say of it");

    let beta = mesh.peer_that_refuses("beta", address).await;
    is_said_to_refuse(&alpha).await;
    assert_eq!(alpha.keys_of("beta"), [REFUSING], "and nothing else is made up");
    let status = alpha.peer("beta").expect("configured");
    assert!(status.reason.is_some_and(|reason| reason.contains("only where no other cluster has them")));

    // Out of reach again: it has not taken back what it said.
    beta.stop().await;
    let failures = alpha.peer("beta").expect("configured").failures;
    until("the loss is noticed", || {
        let peer = alpha.peer("beta").filter(|peer| peer.failures > failures + 1);
        peer.map(drop).ok_or_else(|| format!("{:#?}", alpha.peer("beta")))
    })
    .await;
    assert_eq!(alpha.keys_of("beta"), [REFUSING]);

    let beta = mesh.peer_at("beta", address).await;
    tell(&beta, 2);
    alpha.ready("beta").await;
    assert!(alpha.value("cilium/cluster-config/beta").is_some());
    assert_eq!(alpha.value(REFUSING), None, "it takes this cluster again");
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn that_a_peer_refuses_outlives_the_relay_and_goes_with_the_peer() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    let address = beta.address;
    alpha.connect("beta", address);
    alpha.ready("beta").await;
    beta.stop().await;
    let beta = mesh.peer_that_refuses("beta", address).await;
    is_said_to_refuse(&alpha).await;
    let store = alpha.store.clone();
    alpha.stop().await;

    // Over the same store, as one in etcd is. The description went with the other relay, and the peer has another id now.
    beta.stop().await;
    let alpha = Alpha::start_with(&mesh, store, quick());
    let beta = mesh.peer_at("beta", address).await;
    tell(&beta, 5);
    alpha.ready("beta").await;
    assert_eq!(alpha.value(REFUSING), None, "this relay takes back what the other one said");
    let config = String::from_utf8(alpha.value("cilium/cluster-config/beta").unwrap()).unwrap();
    assert!(config.contains(r#""id":5"#), "{config}");

    beta.stop().await;
    let beta = mesh.peer_that_refuses("beta", address).await;
    is_said_to_refuse(&alpha).await;
    alpha.disconnect("beta");
    gone(&alpha, "beta").await;
    beta.stop().await;
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_itself_a_mirror_is_read_from_its_cache() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    // Its gateway must let a remote read the cache, as the etcd that mocks many clusters does.
    let beta = mesh.mirror("beta").await;
    beta.put(
        "cilium/cluster-config/beta",
        r#"{"id":2,"capabilities":{"syncedCanaries":true,"cached":true,"maxConnectedClusters":255,"serviceExportsEnabled":false}}"#,
    );
    beta.put("cilium/cache/nodes/v1/beta/n1", r#"{"Name":"n1","Cluster":"beta","ClusterID":2}"#);
    beta.put("cilium/state/nodes/v1/beta/other", r#"{"Name":"other","Cluster":"beta","ClusterID":2}"#);
    beta.put("cilium/cache/identities/v1/beta/id/131073", "k8s:io.cilium.k8s.policy.cluster=beta;");
    beta.put("cilium/cache/ip/v1/beta/10.2.0.1", r#"{"IP":"10.2.0.1","ID":131073}"#);
    for resource in isthmus_wire::Resource::ALL {
        beta.put(&format!("cilium/synced/beta/cilium/cache/{resource}/v1"), "2026-11-20T12:38:19Z");
    }
    alpha.connect("beta", beta.address);
    alpha.ready("beta").await;
    assert!(alpha.value("cilium/cache/nodes/v1/beta/n1").is_some());
    assert!(alpha.value("cilium/cache/nodes/v1/beta/other").is_none());
    assert!(alpha.value("cilium/cache/identities/v1/beta/id/131073").is_some());
    assert!(alpha.value("cilium/cache/ip/v1/beta/10.2.0.1").is_some());
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_stops_exporting_altogether_goes() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    beta.put(
        "cilium/cluster-config/beta",
        r#"{"id":2,"capabilities":{"syncedCanaries":true,"serviceExportsEnabled":true}}"#,
    );
    beta.put(
        "cilium/state/serviceexports/v1/beta/app/echo",
        r#"{"cluster":"beta","name":"echo","namespace":"app","exportCreationTimestamp":"2026-11-20T12:38:19Z","ports":[],"type":"ClusterSetIP"}"#,
    );
    alpha.connect("beta", beta.address);
    let mirrored = "cilium/cache/serviceexports/v1/beta/app/echo";
    until("the export is mirrored", || alpha.value(mirrored).ok_or_else(String::new)).await;

    // Its configuration no longer mentions exports, and it need not delete what nobody is to read.
    beta.introduce(2);
    until("the export is gone", || match alpha.value(mirrored) {
        None => Ok(()),
        Some(_) => Err(format!("{:#?}", alpha.peer("beta"))),
    })
    .await;
    assert!(alpha.value("cilium/cache/services/v1/beta/app/echo").is_some(), "the rest stays");
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_makes_no_sense_for_a_while_is_not_held_against_a_peer() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    alpha.connect("beta", beta.address);
    alpha.ready("beta").await;
    beta.introduce(0);
    until("it is told", || match alpha.peer("beta").expect("configured") {
        peer if peer.state == PeerState::Refused => Ok(()),
        peer => Err(format!("{peer:#?}")),
    })
    .await;
    assert!(alpha.value("cilium/cache/services/v1/beta/app/echo").is_some(), "what is mirrored stays");
    beta.introduce(2);
    alpha.ready("beta").await;
    alpha.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_relay_clears_what_went_away_while_it_was_down() {
    let mesh = Mesh::new();
    let alpha = Alpha::start(&mesh);
    let beta = honest(&mesh).await;
    let gamma = mesh.peer("gamma").await;
    gamma.introduce(3);
    gamma.put_node("g1", 3);
    gamma.complete();
    alpha.connect("beta", beta.address);
    alpha.connect("gamma", gamma.address);
    alpha.ready("beta").await;
    alpha.ready("gamma").await;
    let store = alpha.store.clone();
    alpha.stop().await;

    // While nobody looks: a node leaves beta, and gamma is no peer any more.
    beta.delete("cilium/state/nodes/v1/beta/n1");
    std::fs::remove_file(mesh.path().join("peers/gamma")).unwrap();
    let alpha = Alpha::start_with(&mesh, store, quick());
    alpha.ready("beta").await;
    until("n1 is gone", || match alpha.value("cilium/cache/nodes/v1/beta/n1") {
        None => Ok(()),
        Some(_) => Err("it is there".to_owned()),
    })
    .await;
    assert!(alpha.value("cilium/cache/services/v1/beta/app/echo").is_some());
    gone(&alpha, "gamma").await;
    alpha.stop().await;
}
