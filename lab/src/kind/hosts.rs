//! Nodes of kind as this machine sees them. They are containers of its Docker, and so their network namespaces are its own to
//! enter, those of their pods too, and what crosses between them crosses a bridge of it.
//!
//! That takes root, and the very machine on which Docker runs: [`needs`](super::needs) asks for both before anything is made,
//! where a scenario has steps that want them.

use std::path::{Path, PathBuf};

use ipnet::IpNet;
use isthmus_node_agent::status::AgentStatus;
use k8s_openapi::api::core::v1::{Node, Pod};
use serde::Deserialize;

use super::{Kind, NAMESPACE, daemons};
use crate::capture::Capture;
use crate::error::{Doing, LabError, Result};
use crate::kubectl::Kubectl;
use crate::netns::NetNs;
use crate::scenario::{NodeRef, PodRef};

/// Names another network than kind's own, for kind and for us.
const NETWORK_ENV: &str = "KIND_EXPERIMENTAL_DOCKER_NETWORK";
/// Where the agent answers, on its node.
const AGENT_SOCKET: &str = "/run/isthmus/agent.sock";
/// How long the agent may take, in seconds.
const AGENT_DEADLINE: &str = "5";

impl Kind {
    /// What Kubernetes calls a node of the scenario, and Docker its container.
    pub(crate) fn node(&self, node: &NodeRef) -> Result<String> {
        let cluster = self.cluster(&node.cluster)?;
        let position = cluster.spec.nodes.iter().position(|name| *name == node.name);
        let position = position.ok_or_else(|| {
            LabError::invalid(format!(
                "cluster {} has no node {}, only {}",
                node.cluster,
                node.name,
                cluster.spec.nodes.join(", ")
            ))
        })?;
        Ok(cluster.node(super::daemon::Node(position)))
    }

    /// The ranges that the pods of a node (by its Kubernetes name) have their addresses from.
    pub(crate) async fn pod_ranges(&self, cluster: &str, node: &str) -> Result<Vec<IpNet>> {
        let what = format!("node/{node}");
        let found: Node = get(self.kubectl(cluster)?, &what, NAMESPACE).await?;
        let ranges = found.spec.and_then(|spec| spec.pod_cidrs).unwrap_or_default();
        Ok(ranges.iter().filter_map(|range| range.parse().ok()).collect())
    }

    /// What the agent of a node (by its Kubernetes name) says of itself, asked from within the node: the socket is there.
    pub(crate) async fn agent_status(&self, node: &str) -> Result<AgentStatus> {
        let curl = ["curl", "--silent", "--show-error", "--fail", "--max-time", AGENT_DEADLINE];
        let place = ["--unix-socket", AGENT_SOCKET, "http://localhost/v1/status"];
        let said = self.on_node(node, &[&curl[..], &place].concat()).await?;
        serde_json::from_str(&said)
            .map_err(std::io::Error::from)
            .doing(|| format!("reading the status of the agent of {node}"))
    }

    /// The network namespace of a node, by its Kubernetes name.
    pub(crate) async fn node_netns(&self, node: &str) -> Result<NetNs> {
        NetNs::at(&self.process(node).await?.join("ns/net"), node)
    }

    /// The network namespace of a pod.
    pub(crate) async fn pod_netns(&self, pod: &PodRef) -> Result<NetNs> {
        let found: Pod =
            get(self.kubectl(&pod.cluster)?, &format!("pod/{}", pod.name), &pod.namespace).await?;
        let container = daemons::containers(&found).into_iter().next();
        let container = container.ok_or_else(|| LabError::invalid(format!("pod {pod} has no container")))?;
        let said = self.on_node(&container.node, &["crictl", "inspect", &container.id]).await?;
        let inspected: Inspected = serde_json::from_str(&said)
            .map_err(std::io::Error::from)
            .doing(|| format!("reading what crictl says of pod {pod}"))?;
        // Numbered as the node numbers its processes, so it is looked for in the node's procfs.
        let processes = self.process(&container.node).await?.join("root/proc");
        NetNs::at(&processes.join(inspected.info.pid.to_string()).join("ns/net"), &pod.to_string())
    }

    /// Captures what crosses between nodes, by the bridge that they are all at.
    pub(crate) async fn tap(&self) -> Result<Capture> {
        NetNs::own()?.capture_bridge(&self.bridge().await?).await
    }

    /// The bridge that all nodes are at.
    ///
    /// # Errors
    /// When it is not on this machine.
    pub(super) async fn bridge(&self) -> Result<String> {
        let name = std::env::var(NETWORK_ENV).unwrap_or_else(|_| "kind".into());
        let said = self.docker(&["network", "inspect", &name]).await?;
        let networks: Vec<Network> = serde_json::from_str(&said)
            .map_err(std::io::Error::from)
            .doing(|| format!("reading what docker says of its network {name}"))?;
        let bridge = networks.into_iter().next().map(Network::bridge);
        let bridge = bridge.ok_or_else(|| LabError::invalid(format!("docker has no network {name}")))?;
        match NetNs::own()?.netlink()?.index(&bridge).await {
            Ok(_) => Ok(bridge),
            Err(_) => Err(LabError::invalid(format!(
                "{bridge}, the bridge of Docker's network {name}, is not on this machine, so what crosses between nodes \
                 cannot be captured here: run this on the machine where Docker runs, outside of a container, or with \
                 --on lab"
            ))),
        }
    }

    /// Runs a command in a node's container, and returns what it printed.
    pub(super) async fn on_node(&self, node: &str, command: &[impl AsRef<str>]) -> Result<String> {
        let command = command.iter().map(AsRef::as_ref);
        self.docker(&["exec", node].into_iter().chain(command).collect::<Vec<_>>()).await
    }

    /// The folder of a node's first process in this machine's procfs.
    async fn process(&self, node: &str) -> Result<PathBuf> {
        let said = self.docker(&["inspect", "--format", "{{.State.Pid}}", node]).await?;
        match said.trim().parse::<u32>() {
            Ok(pid) if pid > 0 => Ok(Path::new("/proc").join(pid.to_string())),
            _ => Err(LabError::invalid(format!("docker says that {node} runs as process {:?}", said.trim()))),
        }
    }
}

async fn get<T: serde::de::DeserializeOwned>(kubectl: &Kubectl, object: &str, namespace: &str) -> Result<T> {
    let found = kubectl.get(object, namespace).await?;
    let found = found.ok_or_else(|| LabError::invalid(format!("there is no {object}")))?;
    serde_json::from_value(found).map_err(std::io::Error::from).doing(|| format!("reading {object}"))
}

/// What `crictl inspect` says, as far as it is wanted.
#[derive(Deserialize)]
struct Inspected {
    info: Info,
}

#[derive(Deserialize)]
struct Info {
    pid: u32,
}

/// What `docker network inspect` says, as far as it is wanted.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Network {
    id: String,
    #[serde(default)]
    options: Option<Options>,
}

#[derive(Deserialize)]
struct Options {
    #[serde(rename = "com.docker.network.bridge.name")]
    bridge: Option<String>,
}

impl Network {
    fn bridge(self) -> String {
        let named = self.options.and_then(|options| options.bridge);
        named.unwrap_or_else(|| format!("br-{}", self.id.chars().take(12).collect::<String>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_s_bridge_is_named_by_an_option_or_after_its_id() {
        let bridge = |text: &str| serde_json::from_str::<Network>(text).unwrap().bridge();
        let id = "b7c24ff41bd1b5e5b2d5e8a4e1d4c3b2a1908f7e6d5c4b3a29180706f5e4d3c2";
        assert_eq!(bridge(&format!(r#"{{"Name":"kind","Id":"{id}"}}"#)), "br-b7c24ff41bd1");
        assert_eq!(bridge(&format!(r#"{{"Id":"{id}","Options":null}}"#)), "br-b7c24ff41bd1");
        let options = r#"{"com.docker.network.bridge.name":"kind0","com.docker.network.driver.mtu":"1500"}"#;
        assert_eq!(bridge(&format!(r#"{{"Id":"{id}","Options":{options}}}"#)), "kind0");
    }
}
