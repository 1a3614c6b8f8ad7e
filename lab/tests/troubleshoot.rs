//! What only a network can break: clusters cut off from each other, WireGuard's port blocked, a key that is missing. As
//! root.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use clustermesh_apiserver::troubleshoot::{Outcome, PeerReport, Step};
use isthmus_lab::cleanup::{self, Remains};
use isthmus_lab::names::LabName;
use isthmus_lab::scenario::Scenario;
use isthmus_lab::{Lab, status};
use isthmus_node_agent::encryption::reach::{NodeReach, Reach};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use support::eventually;

/// Two meshed clusters with encryption.
async fn raise(name: &str) -> Lab {
    let name: LabName = name.parse().unwrap();
    cleanup::down(&name).await.unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind-scenarios/encryption");
    let scenario = Scenario::load(&dir).unwrap();
    Lab::up(scenario.lab(name, None), &mut |_| {}).await.unwrap()
}

async fn down(lab: Lab) {
    let name = lab.name().clone();
    lab.down().await.unwrap();
    assert!(Remains::of(&name).none(), "{:?}", Remains::of(&name));
}

/// What alpha's apiserver finds out about beta.
async fn probe(lab: &Lab) -> Result<PeerReport, String> {
    let socket = lab.cluster("alpha").unwrap().apiserver_socket(0);
    let report = status::troubleshoot(&socket, "beta").await.map_err(|error| error.to_string())?;
    report.peers.into_iter().next().ok_or_else(|| "nothing about beta".to_owned())
}

/// What the first of alpha's nodes knows about beta's.
async fn reach(lab: &Lab) -> Result<NodeReach, String> {
    let alpha = lab.cluster("alpha").unwrap();
    let report =
        status::reach(&alpha.agent_socket(&alpha.nodes()[0])).await.map_err(|error| error.to_string())?;
    let told = format!("{report:?}");
    report.nodes.into_iter().find(|node| node.cluster == "beta").ok_or(told)
}

async fn reached(lab: &Lab, wanted: &[Reach]) -> NodeReach {
    eventually(&format!("{wanted:?}"), async || {
        let node = reach(lab).await?;
        if wanted.contains(&node.reach) { Ok(node) } else { Err(format!("{node:?}")) }
    })
    .await
}

/// Forgets every session of alpha's devices: another process keeps none.
async fn forget_sessions(lab: &Lab) {
    for node in lab.cluster("alpha").unwrap().nodes() {
        lab.restart(&format!("alpha/{node}/isthmus-wireguard")).await.unwrap();
    }
}

/// Drops WireGuard's datagrams between the clusters, whichever way they go; or lets them through again.
fn wireguard(lab: &Lab, change: &str) {
    for family in ["-4", "-6"] {
        let rule = ["rule", change, "pref", "90", "ipproto", "udp", "dport", "51871", "blackhole"];
        let done = Command::new("ip").args(["-n", lab.wan().name(), family]).args(rule).status().unwrap();
        assert!(done.success(), "ip rule {change}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_a_blocked_port_and_a_missing_key_are_named_by_what_they_are() {
    let lab = raise("t-trouble").await;
    let well = eventually("every step passes", async || {
        let report = probe(&lab).await?;
        let told = serde_json::to_string_pretty(&report).unwrap();
        if report.outcome() == Outcome::Passed { Ok(report) } else { Err(told) }
    })
    .await;
    assert_eq!(well.step(Step::Relay).unwrap().outcome, Outcome::Passed);
    reached(&lab, &[Reach::Session, Reach::Answered]).await;

    // The way there is cut: nothing comes back, not even a refusal.
    lab.cut("alpha", "beta").await.unwrap();
    let cut = probe(&lab).await.unwrap();
    let kinds: Vec<_> = cut.findings().map(|finding| finding.kind.as_str()).collect();
    assert_eq!(kinds[0], "packets-dropped", "{cut:#?}");
    assert_eq!(cut.step(Step::Tls).unwrap().outcome, Outcome::Skipped);
    lab.heal().await.unwrap();

    // Blocked is the port of the devices alone: the connection between the clusters does not tell.
    wireguard(&lab, "add");
    forget_sessions(&lab).await;
    let silent = reached(&lab, &[Reach::Silent]).await;
    assert!(silent.endpoint.unwrap().ends_with(":51871"));
    eventually("the connection itself is well", async || {
        let report = probe(&lab).await?;
        if report.outcome() == Outcome::Passed { Ok(()) } else { Err(format!("{report:#?}")) }
    })
    .await;
    wireguard(&lab, "del");
    reached(&lab, &[Reach::Session, Reach::Answered]).await;

    // A node whose agent has withdrawn its key.
    let beta = lab.cluster("beta").unwrap();
    let node = beta.nodes()[0].clone();
    lab.daemon(&format!("beta/{node}/node-agent")).unwrap().stop(Duration::from_secs(5)).await;
    let nodes: Api<Node> = Api::all(beta.client());
    let without = json!({"metadata": {"annotations": {"network.cilium.io/wg-pub-key": null}}});
    nodes.patch(&node, &PatchParams::default(), &Patch::Merge(without)).await.unwrap();
    assert_eq!(reached(&lab, &[Reach::KeyMissing]).await.node, node);
    down(lab).await;
}
