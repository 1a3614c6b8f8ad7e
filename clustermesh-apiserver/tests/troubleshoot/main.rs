//! Every failure that `isthmus troubleshoot` knows is made, and has to be named right.

#![allow(clippy::unwrap_used)]

mod fixture;
mod names;
mod reach;
mod secrets;
mod store;
mod trust;

use std::sync::Arc;

use clustermesh_apiserver::troubleshoot::{self, Flags, Outcome, Report, Signs, Step};
use isthmus_kvstore::client::steps::Resolver;

use crate::fixture::{World, found, troubleshooter};

#[tokio::test(flavor = "multi_thread")]
async fn of_a_peer_that_is_well_every_step_passes_and_says_what_it_saw() {
    let world = World::new();
    let beta = world.beta().await;
    let report = troubleshooter(world.at(beta.address), Resolver::system()).report(&[]).await.unwrap();
    let told = serde_json::to_string_pretty(&report).unwrap();
    assert_eq!(report.outcome(), Outcome::Skipped, "no relay was asked, the rest is well: {told}");
    let steps: Vec<_> = report.peers[0].steps.iter().map(|step| step.step).collect();
    assert_eq!(steps, Step::OF_APISERVER, "in order, each once");
    let seen = |step| report.peers[0].step(step).unwrap().seen.join("\n");
    assert!(seen(Step::Configuration).contains(r#"we are "remote-alpha", issued by "Cilium CA""#), "{told}");
    assert!(seen(Step::Tls).contains("clustermesh-apiserver.cilium.io"), "{told}");
    assert!(seen(Step::Gateway).contains("version 3.5"), "{told}");
    assert!(seen(Step::Permissions).contains("9 of 9"), "{told}");
    assert!(seen(Step::ClusterConfig).contains("id 2"), "{told}");
    assert!(seen(Step::Canaries).contains("cilium/state/nodes/v1: complete"), "{told}");
    let text = troubleshoot::text(&report, Signs::Unicode);
    assert_eq!(text.matches('✓').count(), 10, "{text}");
    assert!(text.contains("All is well."), "{text}");
    let again: Report = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
    assert_eq!(again, report, "what the command line reads is what was said");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_no_peer_is_said_to_be_none_and_the_own_one_is_left_out() {
    let world = World::new();
    let beta = world.beta().await;
    let troubleshooter = troubleshooter(world.at(beta.address), Resolver::system());
    let report = troubleshooter.report(&["betta".to_owned()]).await.unwrap();
    let problem = report.peers[0].findings().next().unwrap().problem.clone();
    assert!(problem.contains("betta is not configured") && problem.contains("beta"), "{problem}");
    let own = troubleshooter.report(&["alpha".to_owned()]).await.unwrap();
    assert!(own.peers.is_empty(), "{own:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_of_two_that_refuses_is_to_be_looked_at_and_no_more() {
    let world = World::new();
    let beta = world.beta().await;
    let dead = reach::unused();
    let target = world.target(&[format!("https://{dead}"), format!("https://{}", beta.address)]);
    let report = fixture::probe(target, Resolver::system()).await;
    found(&report, Step::Tcp, "connection-refused");
    assert_eq!(report.outcome(), Outcome::Warning, "{report:?}");
    assert_eq!(report.step(Step::Heartbeat).unwrap().outcome, Outcome::Passed, "the other one was used");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_is_probed_once_at_a_time() {
    let world = World::new();
    // Takes connections and says nothing.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = world.at(listener.local_addr().unwrap());
    let troubleshooter = Arc::new(troubleshooter(target, Resolver::system()));
    let first = tokio::spawn({
        let troubleshooter = troubleshooter.clone();
        async move { troubleshooter.report(&[]).await }
    });
    let _held = listener.accept().await.unwrap();
    let busy = troubleshooter.report(&["beta".to_owned()]).await.unwrap_err();
    assert!(busy.to_string().contains("beta is being probed already"), "{busy}");
    // Who asked leaves: the next one gets his turn.
    first.abort();
    let _ = first.await;
    troubleshooter.report(&["beta".to_owned()]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_files_is_enough_without_an_apiserver() {
    let world = World::new();
    let beta = world.beta().await;
    world.at(beta.address);
    let peers = world.folder.path().join("peers");
    std::fs::create_dir(&peers).unwrap();
    std::fs::copy(world.path("beta"), peers.join("beta")).unwrap();
    let mut flags = Flags {
        peers: Vec::new(),
        peers_dir: Some(peers),
        config: None,
        cluster_name: Some("alpha".parse().unwrap()),
        cluster_id: Some(1.try_into().unwrap()),
        max_connected_clusters: Default::default(),
        ascii: false,
        json: false,
    };
    let report = troubleshoot::from_files(&flags).await.unwrap();
    assert!(report.peers[0].findings().next().is_none(), "{report:?}");
    assert!(report.peers[0].source.ends_with("peers/beta"), "{report:?}");
    flags.cluster_id = Some(2.try_into().unwrap());
    let report = troubleshoot::from_files(&flags).await.unwrap();
    found(&report.peers[0], Step::ClusterConfig, "id-conflict");

    flags.config = Some(world.path("beta").into());
    flags.peers = vec!["gamma".parse().unwrap()];
    let report = troubleshoot::from_files(&flags).await.unwrap();
    assert_eq!(report.peers[0].name, "gamma", "as it was named, whatever the file is called");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_answers_about_the_peers_of_its_relay_and_has_nothing_to_say_without_one() {
    let world = World::new();
    let beta = world.beta().await;
    let relay = store::Following::start(&world);
    relay.connect(&world, "beta", beta.address);
    relay.ready("beta").await;
    let directory = Some(world.folder.path().join("peers"));
    let mirrors = relay.relay.clone();
    let routes =
        troubleshoot::of_daemon(fixture::own(), "isthmus-system", directory, move || Some(mirrors.clone()));
    let (status, body) = get(routes, "/v1/troubleshoot?peer=beta").await;
    assert_eq!(status, 200, "{body}");
    let report: Report = serde_json::from_str(&body).unwrap();
    assert_eq!(report.outcome(), Outcome::Passed, "{body}");
    assert_eq!(report.peers[0].source, format!("file {}", world.path("peers/beta")));

    let standby = troubleshoot::of_daemon(fixture::own(), "isthmus-system", None, || None);
    let (status, body) = get(standby, "/v1/troubleshoot").await;
    assert_eq!(status, 503);
    assert!(body.contains("ask the one that leads"), "{body}");
}

async fn get(routes: axum::Router, path: &str) -> (u16, String) {
    let request = http::Request::get(path).body(axum::body::Body::empty()).unwrap();
    let response = tower::ServiceExt::oneshot(routes, request).await.unwrap();
    let status = response.status().as_u16();
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}
