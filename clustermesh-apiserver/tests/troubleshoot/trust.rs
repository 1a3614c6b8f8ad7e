//! TLS: whose certificate is wrong, and how.

use clustermesh_apiserver::troubleshoot::{Outcome, Step};

use crate::fixture::{Ca, FUTURE, GATEWAY, NOW, PAST, World, ends, found};

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_certificate_has_expired() {
    let world = World::new();
    let beta = world.beta_with(&world.ca.server(GATEWAY, PAST)).await;
    let problem = ends(&world.probe(beta.address).await, Step::Tls, "server-certificate-expired");
    assert!(problem.contains("the clock here says"), "both clocks: {problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_certificate_is_not_valid_yet() {
    let world = World::new();
    let beta = world.beta_with(&world.ca.server(GATEWAY, FUTURE)).await;
    let problem = ends(&world.probe(beta.address).await, Step::Tls, "server-certificate-not-yet-valid");
    assert!(problem.contains("the clock here says"), "both clocks: {problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_of_another_authority_of_the_same_name() {
    let world = World::new();
    let beta = world.beta_with(&Ca::new().server(GATEWAY, NOW)).await;
    let problem = ends(&world.probe(beta.address).await, Step::Tls, "wrong-authority");
    assert!(problem.contains("Cilium CA"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_certificate_is_for_another_name() {
    let world = World::new();
    let beta = world.beta_with(&world.ca.server("gamma.mesh.cilium.io", NOW)).await;
    let problem = ends(&world.probe(beta.address).await, Step::Tls, "wrong-name");
    assert!(problem.contains(GATEWAY) && problem.contains("gamma.mesh.cilium.io"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_certificate_refused_by_the_other_side() {
    let world = World::new();
    let beta = world.beta().await;
    Ca::new().client("remote-alpha", NOW).write(world.folder.path(), "remote");
    let problem = ends(&world.probe(beta.address).await, Step::Tls, "our-certificate-refused");
    assert!(problem.contains("remote-alpha"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_certificate_expired() {
    let world = World::new();
    let beta = world.beta().await;
    world.ca.client("remote-alpha", PAST).write(world.folder.path(), "remote");
    let problem = ends(&world.probe(beta.address).await, Step::Configuration, "own-certificate-expired");
    assert!(problem.contains("remote-alpha") && problem.contains("the clock here says"), "{problem}");
    world.ca.client("remote-alpha", FUTURE).write(world.folder.path(), "remote");
    ends(&world.probe(beta.address).await, Step::Configuration, "own-certificate-not-yet-valid");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_certificate_with_the_key_of_another() {
    let world = World::new();
    let beta = world.beta().await;
    std::fs::write(world.path("remote.key"), world.ca.client("remote-alpha", NOW).key).unwrap();
    ends(&world.probe(beta.address).await, Step::Configuration, "key-mismatch");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_certificate_of_ours_where_one_is_wanted() {
    let world = World::new();
    let beta = world.beta().await;
    let mut target = world.at(beta.address);
    if let Ok(client) = &mut target.client {
        client.identity = None;
    }
    let report = crate::fixture::probe(target, isthmus_kvstore::client::steps::Resolver::system()).await;
    assert_eq!(report.step(Step::Configuration).unwrap().outcome, Outcome::Warning);
    let problem = found(&report, Step::Tls, "our-certificate-refused");
    assert!(problem.contains("none is configured"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_file_that_holds_something_else() {
    let world = World::new();
    let beta = world.beta().await;
    let target = world.at(beta.address);
    std::fs::write(world.path("ca.crt"), "nothing of the kind").unwrap();
    let report = crate::fixture::probe(target, isthmus_kvstore::client::steps::Resolver::system()).await;
    let problem = ends(&report, Step::Configuration, "certificate-unreadable");
    assert!(problem.contains("ca.crt"), "{problem}");
}
