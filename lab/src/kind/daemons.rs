//! The daemons on kind, by the names that the lab gives them.

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::{Kind, KindCluster, NAMESPACE, ROLL_OUT, config};
use crate::error::{Doing, LabError, Result};
use crate::programs;

const APISERVER: &str = "deployment/clustermesh-apiserver";
const AGENT: &str = "daemonset/isthmus-node-agent";

/// What the overlay installs.
pub(super) const WORKLOADS: [&str; 3] = [APISERVER, AGENT, "daemonset/isthmus-wireguard"];

impl Kind {
    /// Stops a daemon's container where it stands, or lets it go on. The kubelet ends one that stands still for as long as its
    /// liveness probe has patience.
    pub(crate) async fn freeze(&self, daemon: &str, stop: bool) -> Result<()> {
        let (_, _, pods) = self.pods(daemon).await?;
        for pod in pods {
            let node = pod.spec.and_then(|spec| spec.node_name).unwrap_or_default();
            for container in pod.status.and_then(|s| s.container_statuses).unwrap_or_default() {
                let id = container.container_id.unwrap_or_default();
                let id = id.strip_prefix("containerd://").unwrap_or(&id);
                let verb = if stop { "pause" } else { "resume" };
                self.docker(&["exec", &node, "ctr", "--namespace", "k8s.io", "tasks", verb, id]).await?;
            }
        }
        Ok(())
    }

    /// Deletes a daemon's pods, and waits until others are ready in their place.
    pub(crate) async fn restart(&self, daemon: &str) -> Result<()> {
        let (cluster, workload, pods) = self.pods(daemon).await?;
        for pod in pods {
            let name = pod.metadata.name.unwrap_or_default();
            cluster.kubectl.ask(&["delete", "pod", "--namespace", NAMESPACE, &name], None).await?;
        }
        cluster.kubectl.rolled_out(workload, NAMESPACE, ROLL_OUT).await
    }

    /// The pods of `CLUSTER/clustermesh-apiserver` or `CLUSTER/NODE/node-agent`.
    async fn pods(&self, daemon: &str) -> Result<(&KindCluster, &'static str, Vec<Pod>)> {
        let unknown = || LabError::invalid(format!("on kind {daemon} is no daemon"));
        let parts: Vec<&str> = daemon.split('/').collect();
        let (cluster, workload, node) = match parts.as_slice() {
            [cluster, programs::APISERVER] => (self.cluster(cluster)?, APISERVER, None),
            [cluster, node, programs::NODE_AGENT] => {
                let cluster = self.cluster(cluster)?;
                let position = cluster.spec.nodes.iter().position(|n| n == node).ok_or_else(unknown)?;
                let node = config::node(&cluster.kind, cluster.spec.nodes.len(), position);
                (cluster, AGENT, Some(node))
            }
            _ => return Err(unknown()),
        };
        let selector = format!("--selector={}", cluster.selector(workload).await?);
        let found = cluster.kubectl.list("pods", NAMESPACE, &selector).await?;
        let read: Result<Vec<Pod>, _> = found.into_iter().map(serde_json::from_value).collect();
        let mut pods =
            read.map_err(std::io::Error::from).doing(|| format!("reading the pods of {daemon}"))?;
        if let Some(node) = node {
            pods.retain(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_ref() == Some(&node)));
        }
        match pods.is_empty() {
            true => Err(LabError::invalid(format!("no pod of {daemon} runs"))),
            false => Ok((cluster, workload, pods)),
        }
    }
}

impl KindCluster {
    /// What picks the pods of a workload.
    pub(super) async fn selector(&self, workload: &str) -> Result<String> {
        let found = self.kubectl.get(workload, NAMESPACE).await?;
        let missing = || LabError::invalid(format!("there is no {workload} in {}", self.spec.name));
        let found = found.ok_or_else(missing)?;
        let labels =
            found.pointer("/spec/selector/matchLabels").and_then(Value::as_object).ok_or_else(missing)?;
        let pairs = labels.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()));
        Ok(pairs.collect::<Vec<_>>().join(","))
    }
}
