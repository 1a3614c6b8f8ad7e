//! One cluster of a lab: its Kubernetes API, its clustermesh-apiservers, its nodes.

mod agents;
mod apiservers;
mod files;
mod secrets;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ipnet::IpNet;

use crate::error::{LabError, Result};
use crate::kube_api::KubeApi;
use crate::lab::Ground;
use crate::process::Launch;
use crate::projection::Projections;
use crate::spec::{ClusterSpec, LabSpec};
use crate::state::read_json;
use crate::topology::{CONTROL_PLANE, ClusterNet};
use crate::{controllers, crds, forwarder, http, kubelet, programs, rbac, status, wait};

/// A running cluster.
pub struct Cluster {
    spec: ClusterSpec,
    net: ClusterNet,
    api: KubeApi,
    ground: Arc<Ground>,
    /// Certificates as files, once somebody issues them.
    projections: OnceLock<Projections>,
}

/// Where the gateway listens.
const GATEWAY: u16 = 2379;
/// Where etcd listens, on the control plane's host.
const ETCD: u16 = 12379;
/// Time a daemon has to become ready.
const READY: Duration = Duration::from_secs(60);

impl Cluster {
    /// Starts the Kubernetes API and puts types and roles into it, unless it is to be a plain cluster.
    pub(crate) async fn start(
        ground: &Arc<Ground>,
        lab: &LabSpec,
        spec: &ClusterSpec,
        net: ClusterNet,
    ) -> Result<Self> {
        let plan = net.plan;
        let api = KubeApi::start(
            ground,
            &spec.name,
            &net.control_plane,
            &plan.control_plane(),
            &plan.service_ranges(),
        )
        .await?;
        if lab.mesh {
            crds::install(&api.client).await?;
            rbac::install(&api.client).await?;
        }
        Ok(Self { spec: spec.clone(), net, api, ground: Arc::clone(ground), projections: OnceLock::new() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its id in the mesh.
    pub fn id(&self) -> u16 {
        self.spec.id
    }

    /// The names of its nodes.
    pub fn nodes(&self) -> &[String] {
        &self.spec.nodes
    }

    /// A client of its Kubernetes API with every right.
    pub fn client(&self) -> kube::Client {
        self.api.client.clone()
    }

    /// The network namespaces of its hosts.
    pub fn net(&self) -> &ClusterNet {
        &self.net
    }

    /// The status socket of a node's agent.
    pub fn agent_socket(&self, node: &str) -> PathBuf {
        self.ground.state.agent_socket(self.name(), node)
    }

    /// The status socket of a clustermesh-apiserver, from 0.
    pub fn apiserver_socket(&self, replica: usize) -> PathBuf {
        self.ground.state.apiserver_socket(self.name(), replica)
    }

    /// The names of its clustermesh-apiservers: `<cluster>/clustermesh-apiserver`, or with a number each where there are
    /// several.
    pub fn apiservers(&self) -> Vec<String> {
        (0..self.spec.replicas).map(|replica| format!("{}/{}", self.name(), self.replica(replica))).collect()
    }

    fn replica(&self, replica: usize) -> String {
        match self.spec.replicas {
            1 => programs::APISERVER.to_owned(),
            _ => format!("{}-{replica}", programs::APISERVER),
        }
    }

    /// Whether a clustermesh-apiserver says that it is connected to a peer. One that cannot be asked says nothing, and with
    /// etcd behind them the leader alone is connected.
    ///
    /// # Errors
    /// In words: when none answers, or none has such a peer.
    pub async fn peer_connected(&self, peer: &str) -> Result<bool, String> {
        let asked = (0..self.spec.replicas).map(|replica| async move {
            let status =
                status::apiserver(&self.apiserver_socket(replica)).await.map_err(|e| e.to_string())?;
            let found = status.peers.iter().find(|p| p.name == peer);
            found.map(|p| p.connected).ok_or_else(|| format!("it has no peer {peer}"))
        });
        let answers = futures::future::join_all(asked).await;
        match answers.contains(&Ok(true)) {
            true => Ok(true),
            false if answers.contains(&Ok(false)) => Ok(false),
            false => answers.into_iter().next().unwrap_or_else(|| Err("it has no apiserver".into())),
        }
    }

    /// The clustermesh-apiserver that leads.
    pub(crate) async fn leader(&self) -> Result<String> {
        wait::until(format!("{} to have an apiserver that leads", self.name()), READY, || async {
            for (replica, name) in self.apiservers().into_iter().enumerate() {
                // One that does not answer does not lead for long.
                if status::apiserver(&self.apiserver_socket(replica)).await.is_ok_and(|status| status.leading)
                {
                    return Ok(name);
                }
            }
            Err("none says that it does")
        })
        .await
    }

    /// The position of a node.
    ///
    /// # Errors
    /// When there is none of this name; the message lists those there are.
    pub(crate) fn position(&self, node: &str) -> Result<usize> {
        self.spec.nodes.iter().position(|name| name == node).ok_or_else(|| {
            let all = self.spec.nodes.join(", ");
            LabError::invalid(format!("cluster {} has no node {node}, only {all}", self.name()))
        })
    }

    /// The clustermesh-apiserver that a node's agent reads from.
    pub(crate) async fn gateway_of(&self, node: &str) -> Result<String> {
        let status = status::agent(&self.agent_socket(node)).await?;
        let endpoint = status.gateway.endpoint.unwrap_or_default();
        let position = self.gateways().iter().position(|gateway| endpoint.contains(&gateway.to_string()));
        let position = position.ok_or_else(|| {
            LabError::invalid(format!("{}/{node} reads from {endpoint:?}, which is no gateway", self.name()))
        })?;
        Ok(self.apiservers().swap_remove(position))
    }

    pub(crate) fn real_kubernetes(&self) -> bool {
        self.api.real()
    }

    /// The node on which a pod runs, as the kubelet wrote it down; waits for nothing.
    ///
    /// # Errors
    /// When no such pod runs.
    pub fn pod(&self, namespace: &str, pod: &str) -> Result<kubelet::PodRecord> {
        read_json(&self.ground.state.pod(self.name(), namespace, pod)).map_err(|_| {
            LabError::invalid(format!("no pod {namespace}/{pod} runs in cluster {}", self.name()))
        })
    }

    /// A command to be run in a pod, as `kubectl exec` does.
    ///
    /// # Errors
    /// When no such pod runs, or the command is empty.
    pub fn in_pod(&self, namespace: &str, pod: &str, command: &[String]) -> Result<Launch> {
        self.pod(namespace, pod)?.launch(command)
    }

    /// Scheduler, controllers and a kubelet for each node.
    pub(crate) async fn start_roles(&self) -> Result<()> {
        let client = &self.api.client;
        for (i, node) in self.spec.nodes.iter().enumerate() {
            let kubelet = kubelet::Kubelet {
                cluster: self.spec.name.clone(),
                node: node.clone(),
                client: client.clone(),
                host: self.net.nodes[i].clone(),
                addresses: self.net.plan.node(i).iter().map(IpNet::addr).collect(),
                pod_ranges: self.net.plan.pod_ranges(i),
                ground: Arc::clone(&self.ground),
            };
            kubelet.start().await?;
        }
        controllers::start(client, &self.ground.stop, &self.ground.tasks);
        Ok(())
    }

    /// Where its gateways are reached by peers, the first replica's first.
    pub fn gateways(&self) -> Vec<SocketAddr> {
        let of = |replica| SocketAddr::new(self.net.plan.apiserver(replica)[0].addr(), GATEWAY);
        (0..self.spec.replicas).map(of).collect()
    }

    /// Opens a door on the root namespace's loopback to its first gateway, and returns a client configuration that goes
    /// through it as the cluster's administrator.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn gateway_door(&self) -> Result<String> {
        let (host, gateway) = (self.net.control_plane.clone(), self.gateways()[0]);
        let door = forwarder::forward(host, gateway, self.ground.stop.clone()).await?;
        let dir = self.ground.state.admin_certificate(self.name());
        Ok(client_config(&[format!("https://{door}")], &dir))
    }

    /// Waits until a daemon answers that it is ready.
    ///
    /// # Errors
    /// When it does not in time, or has ended; with the last lines of its log.
    pub async fn wait_ready(&self, daemon: &str) -> Result<()> {
        let process = self.ground.daemon(daemon)?;
        if daemon.ends_with(programs::WIREGUARD) {
            // Ready is what its agent makes of it.
            let agent = daemon.replace(programs::WIREGUARD, programs::NODE_AGENT);
            return Box::pin(self.wait_ready(&agent)).await;
        }
        let (ns, address, path) = self.health(daemon)?;
        let waited = wait::until(format!("{daemon} to be ready"), READY, || async {
            if !process.running() {
                return Ok(Err(process.died()));
            }
            match http::get(&ns, address, path, Duration::from_secs(2)).await {
                Ok((200, _)) => Ok(Ok(())),
                Ok((status, body)) => Err(format!("{path} answers {status}: {}", body.trim())),
                Err(e) => Err(format!("{path}: {e}")),
            }
        });
        match waited.await {
            Ok(outcome) => outcome,
            Err(LabError::Deadline { what, within, last }) => {
                let log = process.launch().log.clone();
                let last = format!(
                    "{last}\nThe last lines of {}:\n{}",
                    log.display(),
                    crate::process::tail(&log, 20)
                );
                Err(LabError::Deadline { what, within, last })
            }
            Err(e) => Err(e),
        }
    }

    fn health(&self, daemon: &str) -> Result<(crate::netns::NetNs, SocketAddr, &'static str)> {
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let parts: Vec<&str> = daemon.split('/').collect();
        let position = |node: &str| self.spec.nodes.iter().position(|n| n == node);
        match parts.as_slice() {
            [_, "etcd"] => Ok((self.net.control_plane.clone(), self.etcd(), "/health")),
            [_, replica] if self.replica_number(replica).is_some() => {
                let number = self.replica_number(replica).unwrap_or_default();
                Ok((self.net.apiservers[number].clone(), local(9880), "/readyz"))
            }
            [_, node, programs::NODE_AGENT] if position(node).is_some() => {
                Ok((self.net.nodes[position(node).unwrap_or_default()].clone(), local(9879), "/readyz"))
            }
            _ => Err(LabError::invalid(format!("{daemon} cannot be asked whether it is ready"))),
        }
    }

    fn replica_number(&self, name: &str) -> Option<usize> {
        (0..self.spec.replicas).find(|replica| self.replica(*replica) == name)
    }

    /// A program of the cluster's own, on the host of a clustermesh-apiserver.
    fn control_plane_launch(&self, name: &str, host: usize, program: PathBuf, flags: Flags) -> Launch {
        let last = name.rsplit('/').next().unwrap_or(name);
        Launch {
            name: name.to_owned(),
            program,
            args: flags.0,
            env: Default::default(),
            netns: self.net.apiservers[host].path(),
            cgroup: self.ground.cgroup.join(self.name()).join(CONTROL_PLANE).join(last),
            hostname: Some(format!("{}-{CONTROL_PLANE}", self.name())),
            log: self.ground.state.log(name),
        }
    }
}

/// An etcd client's configuration, with the certificate of a folder.
fn client_config(endpoints: &[String], certificate: &std::path::Path) -> String {
    let endpoints: String = endpoints.iter().map(|endpoint| format!("- {endpoint}\n")).collect();
    let file = |name| certificate.join(name).display().to_string();
    format!(
        "endpoints:\n{endpoints}trusted-ca-file: {}\ncert-file: {}\nkey-file: {}\n",
        file("ca.crt"),
        file("tls.crt"),
        file("tls.key"),
    )
}

/// `--flag value` pairs.
#[derive(Default)]
struct Flags(Vec<OsString>);

impl Flags {
    fn add(&mut self, flag: &str, value: impl AsRef<std::ffi::OsStr>) {
        self.0.push(flag.into());
        self.0.push(value.as_ref().into());
    }
}
