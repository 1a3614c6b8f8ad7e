//! Every failure that `isthmus troubleshoot` knows is made, and has to be named right.

#![allow(clippy::unwrap_used)]

mod fixture;
mod names;
mod reach;
mod store;
mod trust;

use std::sync::Arc;

use clustermesh_apiserver::troubleshoot::{self, Outcome, Report, Signs, Step};
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
