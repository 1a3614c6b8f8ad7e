//! What kind and kustomize are told about a cluster.

use std::path::{Component, Path, PathBuf};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::needs::OVERLAY;
use crate::error::{Doing, Result};
use crate::names::{ClusterPlan, Families};
use crate::scenario::Scenario;
use crate::spec::{ClusterSpec, Encryption};

/// How many apiservers the component for several has.
pub(super) const HIGHLY_AVAILABLE: usize = 3;

/// A kind cluster: as many nodes for pods as the scenario says, and ranges that no other of its clusters has.
pub(super) fn cluster(spec: &ClusterSpec, plan: &ClusterPlan) -> Value {
    let families = match plan.families() {
        Families::V4 => "ipv4",
        Families::V6 => "ipv6",
        Families::Dual => "dual",
    };
    // A control plane beside other nodes takes no pods.
    let workers = if spec.nodes.len() == 1 { 0 } else { spec.nodes.len() };
    let roles = std::iter::once("control-plane").chain(std::iter::repeat_n("worker", workers));
    json!({
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": {
            "ipFamily": families,
            "podSubnet": list(plan.cluster_pods()),
            "serviceSubnet": list(plan.service_ranges()),
        },
        "nodes": roles.map(|role| json!({"role": role})).collect::<Vec<_>>(),
    })
}

/// What kind calls the `position`th node that takes pods.
pub(super) fn node(kind: &str, of: usize, position: usize) -> String {
    match (of, position) {
        (1, _) => format!("{kind}-control-plane"),
        (_, 0) => format!("{kind}-worker"),
        (_, n) => format!("{kind}-worker{}", n + 1),
    }
}

/// The overlay for kind, with the cluster's name and id.
///
/// # Errors
/// When the folder is not there.
pub(super) fn kustomization(
    dir: &Path,
    repository: &Path,
    spec: &ClusterSpec,
    scenario: &Scenario,
) -> Result<Value> {
    let base = relative(dir, &repository.join(OVERLAY))?;
    let mut patches = vec![json!({"patch": json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "isthmus-config", "namespace": super::NAMESPACE},
        "data": {
            "cluster-name": spec.name,
            "cluster-id": spec.id.to_string(),
            "max-connected-clusters": scenario.max_connected_clusters.to_string(),
        },
    }).to_string()})];
    if let Some(grace) = scenario.drain_grace {
        let flag = format!("--peer-drain-grace={}ms", grace.as_millis());
        patches.push(json!({
            "target": {"kind": "Deployment", "name": "clustermesh-apiserver"},
            "patch": json!([{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": flag}]).to_string(),
        }));
    }
    let mut components = Vec::new();
    if spec.replicas == HIGHLY_AVAILABLE {
        components.push("high-availability");
    }
    match scenario.encryption {
        Encryption::On => {}
        Encryption::Strict => components.push("encryption-strict"),
        Encryption::Off => patches.push(json!({
            "target": {"kind": "DaemonSet", "name": "isthmus-node-agent"},
            "patch": json!([{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--encryption=off"}]).to_string(),
        })),
    }
    let components: Result<Vec<PathBuf>> = components
        .into_iter()
        .map(|component| relative(dir, &repository.join("kustomize/components").join(component)))
        .collect();
    Ok(json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [base],
        "components": components?,
        "patches": patches,
    }))
}

/// Every two clusters of which either names the other as its peer, once.
pub(super) fn pairs(clusters: &[ClusterSpec]) -> Vec<(&str, &str)> {
    let mut pairs = Vec::new();
    for (i, a) in clusters.iter().enumerate() {
        for b in &clusters[i + 1..] {
            if a.peers.contains(&b.name) || b.peers.contains(&a.name) {
                pairs.push((a.name.as_str(), b.name.as_str()));
            }
        }
    }
    pairs
}

fn list(ranges: Vec<IpNet>) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// kustomize takes no absolute paths.
fn relative(from: &Path, to: &Path) -> Result<PathBuf> {
    let whole = |path: &Path| path.canonicalize().doing(|| format!("looking for {}", path.display()));
    let (from, to) = (whole(from)?, whole(to)?);
    let same = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(same).map(|_| Component::ParentDir);
    Ok(up.chain(to.components().skip(same)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, nodes: usize, peers: &[&str]) -> ClusterSpec {
        ClusterSpec {
            name: name.into(),
            id: 1,
            replicas: 1,
            nodes: (0..nodes).map(|n| n.to_string()).collect(),
            peers: peers.iter().map(|p| (*p).to_owned()).collect(),
        }
    }

    #[test]
    fn a_scenario_s_nodes_are_those_that_take_pods() {
        let one = cluster(&spec("alpha", 1, &[]), &ClusterPlan::new(0, Families::Dual));
        assert_eq!(one["nodes"], json!([{"role": "control-plane"}]));
        assert_eq!(one["networking"]["podSubnet"], "10.1.0.0/16,fd00:10:1::/48");
        assert_eq!(node("k", 1, 0), "k-control-plane");
        let two = cluster(&spec("alpha", 2, &[]), &ClusterPlan::new(0, Families::V4));
        assert_eq!(two["nodes"].as_array().unwrap().len(), 3);
        assert_eq!((node("k", 2, 0), node("k", 2, 1)), ("k-worker".into(), "k-worker2".into()));
    }

    #[test]
    fn clusters_are_joined_in_pairs() {
        let mesh = [spec("a", 1, &["b", "c"]), spec("b", 1, &["a"]), spec("c", 1, &[])];
        assert_eq!(pairs(&mesh), [("a", "b"), ("a", "c")]);
    }
}
