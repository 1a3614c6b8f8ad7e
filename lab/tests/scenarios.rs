//! The scenarios of the repository, with the real daemons and real eBPF. As root; the workspace's programs must have
//! been built (`cargo build --workspace --bins`).

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use isthmus_lab::cleanup::{self, Remains};
use isthmus_lab::names::LabName;
use isthmus_lab::report::Report;
use isthmus_lab::scenario::Scenario;
use isthmus_lab::spec::{LabSpec, Peering, Store};
use isthmus_lab::{Lab, Silent};

/// Each raises several daemons: one after the other they disturb each other's timing least.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn run(scenario: &str, lab: &str, store: Store) -> Report {
    run_with(scenario, lab, |spec| spec.store = store).await
}

async fn run_with(scenario: &str, lab: &str, change: impl FnOnce(&mut LabSpec)) -> Report {
    let _turn = ONE_AT_A_TIME.lock().await;
    let name: LabName = lab.parse().unwrap();
    cleanup::down(&name).await.unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind-scenarios").join(scenario);
    let scenario = Scenario::load(&dir).unwrap();
    let mut spec = scenario.lab(name.clone(), None);
    change(&mut spec);
    let lab = Lab::up(spec, &mut |_| {}).await.unwrap();
    let report = isthmus_lab::run(&lab, &scenario, Duration::ZERO, &mut Silent).await;
    lab.down().await.unwrap();
    assert!(Remains::of(&name).none(), "{:?}", Remains::of(&name));
    assert!(report.passed, "{}", serde_json::to_string_pretty(&report).unwrap());
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_share_a_global_service() {
    let report = run("global-service", "s-memory", Store::Memory).await;
    assert_eq!(
        report.steps.iter().filter(|s| s.shown_after_ms.is_some()).count(),
        3,
        "three changes are measured"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn they_do_with_a_real_etcd_behind_each_apiserver() {
    run("global-service", "s-etcd", Store::Etcd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_global_service_answers_over_both_families() {
    run("dual-stack", "s-dual", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_global_service_answers_where_there_is_ipv6_alone() {
    run("ipv6", "s-ipv6", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_three_clusters_answers_each() {
    run("three-clusters", "s-three", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_answers_follows_global_shared_and_affinity() {
    run("affinity", "s-affinity", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_known_of_a_peer_stays_while_it_cannot_be_reached() {
    run("peer-outage", "s-outage", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_reach_each_other_as_policies_of_both_clusters_allow() {
    run("policy", "s-policy", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_restart_under_traffic_and_no_request_fails() {
    run("restarts", "s-restarts", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clusters_are_connected_and_taken_apart_by_annotations_and_no_request_fails() {
    let report = run("connect-disconnect", "s-connect", Store::Memory).await;
    let measured = report.steps.iter().filter(|s| s.shown_after_ms.is_some()).count();
    assert_eq!(measured, 4, "connected and taken apart, twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_cluster_reads_from_another_that_only_lets_it_in() {
    run("one-way", "s-one-way", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_apiservers_is_killed_and_one_hangs_and_nothing_is_lost() {
    run("high-availability", "s-ha", Store::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_with_a_real_etcd_behind_them() {
    run("high-availability", "s-ha-etcd", Store::Etcd).await;
}

/// As Cilium's own installation has it: one authority for all clusters, and a file for each peer.
#[tokio::test(flavor = "multi_thread")]
async fn clusters_are_joined_by_files_as_well() {
    run_with("global-service", "s-files", |spec| spec.peering = Peering::Files).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_on_the_wire_can_read_what_pods_say() {
    let report = run("encryption", "s-encryption", Store::Memory).await;
    let captured: Vec<_> = report.steps.iter().filter_map(|step| step.captured.as_ref()).collect();
    assert_eq!(captured.len(), 5, "each capture is reported");
    assert!(captured.iter().take(4).all(|seen| seen.plain == 0 && seen.encrypted > 0), "{captured:?}");
    assert!(captured[4].requests > 0 && captured[4].answers > 0, "{captured:?}");
}
