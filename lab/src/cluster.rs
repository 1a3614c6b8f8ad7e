//! One cluster of a lab: its Kubernetes API, its clustermesh-apiserver, its nodes.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_apiserver::pki::Client;
use ipnet::IpNet;

use crate::error::{LabError, Result};
use crate::kube_api::KubeApi;
use crate::lab::Ground;
use crate::pki::{Authority, CertFiles};
use crate::process::{Launch, Process};
use crate::spec::{ClusterSpec, Encryption, LabSpec, Store};
use crate::state::{self, read_json};
use crate::topology::{CONTROL_PLANE, ClusterNet};
use crate::{controllers, crds, forwarder, http, kubelet, programs, rbac, status, wait};

/// A running cluster.
pub struct Cluster {
    spec: ClusterSpec,
    net: ClusterNet,
    api: KubeApi,
    ground: Arc<Ground>,
}

/// Where the gateway listens.
const GATEWAY: u16 = 2379;
/// Where etcd listens, on the control plane's loopback.
const ETCD: u16 = 12379;
/// Time a daemon has to become ready.
const READY: Duration = Duration::from_secs(60);

impl Cluster {
    /// Starts the Kubernetes API and puts into it what every cluster has: types and roles.
    pub(crate) async fn start(
        ground: &Arc<Ground>,
        _lab: &LabSpec,
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
        crds::install(&api.client).await?;
        rbac::install(&api.client).await?;
        Ok(Self { spec: spec.clone(), net, api, ground: Arc::clone(ground) })
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

    /// The status socket of its clustermesh-apiserver.
    pub fn apiserver_socket(&self) -> PathBuf {
        self.ground.state.apiserver_socket(self.name())
    }

    /// Whether the clustermesh-apiserver says that it is connected to a peer.
    ///
    /// # Errors
    /// In words: when it does not answer, or has no such peer.
    pub async fn peer_connected(&self, peer: &str) -> Result<bool, String> {
        let status = status::apiserver(&self.apiserver_socket()).await.map_err(|e| e.to_string())?;
        let found = status.peers.iter().find(|p| p.name == peer);
        found.map(|p| p.connected).ok_or_else(|| format!("it has no peer {peer}"))
    }

    pub(crate) fn real_kubernetes(&self) -> bool {
        self.api.real()
    }

    /// The folder with its peers' files.
    pub fn peers_dir(&self) -> PathBuf {
        self.ground.state.cluster(self.name()).join("peers")
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

    /// Certificates, peer files and kubeconfigs of the daemons.
    pub(crate) fn prepare_mesh(&self, pki: &Authority, lab: &LabSpec, all: &[Cluster]) -> Result<()> {
        let addresses: Vec<String> =
            self.net.plan.control_plane().iter().map(|a| a.addr().to_string()).collect();
        pki.gateway(&format!("{}-gateway", self.name()), &addresses)?;
        pki.mesh_client(Client::Admin(self.name()))?;
        pki.mesh_client(Client::Local(self.name()))?;
        let remote = pki.mesh_client(Client::Remote(self.name()))?;
        for peer in &self.spec.peers {
            let other = all.iter().find(|c| c.name() == peer);
            let other =
                other.ok_or_else(|| LabError::invalid(format!("there is no cluster {peer} to join")))?;
            other.write_client_config(&self.peers_dir().join(peer), pki, &remote)?;
        }
        let agent = pki.mesh_client(Client::Agent(self.name()))?;
        let dir = self.ground.state.cluster(self.name());
        self.api.kubeconfig(&dir.join("apiserver.kubeconfig"), self.name(), rbac::APISERVER_USER, &[])?;
        for node in self.nodes() {
            self.write_client_config(&dir.join(node).join("gateway.yaml"), pki, &agent)?;
        }
        self.api.kubeconfig(&dir.join("agent.kubeconfig"), self.name(), rbac::AGENT_USER, &[])?;
        if lab.store == Store::Etcd {
            let config = format!("endpoints:\n- http://127.0.0.1:{ETCD}\n");
            state::write_whole(&dir.join("etcd.yaml"), config.as_bytes())?;
        }
        Ok(())
    }

    /// An etcd client configuration for this cluster's gateway.
    fn write_client_config(&self, path: &std::path::Path, pki: &Authority, client: &CertFiles) -> Result<()> {
        let gateway = self.gateway();
        let text = format!(
            "endpoints:\n- https://{gateway}\ntrusted-ca-file: {}\nkey-file: {}\ncert-file: {}\n",
            pki.ca().display(),
            client.key.display(),
            client.certificate.display(),
        );
        state::write_whole(path, text.as_bytes())
    }

    /// Where its gateway is reached by peers.
    pub fn gateway(&self) -> SocketAddr {
        SocketAddr::new(self.net.plan.control_plane()[0].addr(), GATEWAY)
    }

    /// Opens a door on the root namespace's loopback to its gateway, and returns a client configuration that goes
    /// through it as the cluster's administrator.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn gateway_door(&self) -> Result<String> {
        let door =
            forwarder::forward(self.net.control_plane.clone(), self.gateway(), self.ground.stop.clone())
                .await?;
        let pki = self.ground.state.path().join("pki");
        let file = |name: String| pki.join(name).display().to_string();
        Ok(format!(
            "endpoints:\n- https://{door}\ntrusted-ca-file: {}\ncert-file: {}\nkey-file: {}\n",
            file("ca.crt".into()),
            file(format!("admin-{}.crt", self.name())),
            file(format!("admin-{}.key", self.name())),
        ))
    }

    pub(crate) async fn start_apiserver(&self, lab: &LabSpec) -> Result<()> {
        let dir = self.ground.state.cluster(self.name());
        let pki = self.ground.state.path().join("pki");
        if lab.store == Store::Etcd {
            self.start_etcd().await?;
        }
        let name = format!("{}/{}", self.name(), programs::APISERVER);
        let mut flags = Flags::default();
        flags.add("--cluster-name", self.name());
        flags.add("--cluster-id", self.id().to_string());
        flags.add("--max-connected-clusters", lab.max_connected_clusters.to_string());
        flags.add("--kubeconfig", dir.join("apiserver.kubeconfig"));
        flags.add("--source", "kubernetes");
        flags.add("--peers-dir", self.peers_dir());
        flags.add("--listen", format!("[::]:{GATEWAY}"));
        flags.add("--tls-cert", pki.join(format!("{}-gateway.crt", self.name())));
        flags.add("--tls-key", pki.join(format!("{}-gateway.key", self.name())));
        flags.add("--tls-client-ca", pki.join("ca.crt"));
        flags.add("--store", lab.store.as_str());
        if lab.store == Store::Etcd {
            flags.add("--etcd-config", dir.join("etcd.yaml"));
        }
        flags.add("--health-address", "127.0.0.1:9880");
        flags.add("--metrics-address", "127.0.0.1:9962");
        flags.add("--api-socket", self.apiserver_socket());
        self.ground
            .run(self.control_plane_launch(&name, programs::ours(programs::APISERVER)?, flags))
            .await?;
        self.wait_ready(&name).await
    }

    async fn start_etcd(&self) -> Result<()> {
        let name = format!("{}/etcd", self.name());
        let peer = format!("http://127.0.0.1:{}", ETCD + 1);
        let client = format!("http://127.0.0.1:{ETCD}");
        let mut flags = Flags::default();
        flags.add("--name", self.name());
        flags.add("--data-dir", self.ground.state.cluster(self.name()).join("etcd"));
        flags.add("--listen-client-urls", &client);
        flags.add("--advertise-client-urls", &client);
        flags.add("--listen-peer-urls", &peer);
        flags.add("--initial-advertise-peer-urls", &peer);
        flags.add("--initial-cluster", format!("{}={peer}", self.name()));
        // Distinct ids for distinct clusters, as readers expect.
        flags.add("--initial-cluster-token", format!("isthmus-{}-{}", self.ground.name, self.name()));
        // The lab's folder is in memory, and a lab does not outlive the machine.
        flags.0.push("--unsafe-no-fsync".into());
        let launch = self.control_plane_launch(&name, programs::machines("etcd", "etcd-server")?, flags);
        self.ground.run(launch).await?;
        self.wait_ready(&name).await
    }

    pub(crate) async fn start_agents(&self, lab: &LabSpec) -> Result<()> {
        let dir = self.ground.state.cluster(self.name());
        let mut names = Vec::new();
        for (i, node) in self.spec.nodes.iter().enumerate() {
            if lab.encryption != Encryption::Off {
                self.start_device(i, node).await?;
            }
            let mut flags = Flags::default();
            flags.add("--cluster-name", self.name());
            flags.add("--cluster-id", self.id().to_string());
            flags.add("--max-connected-clusters", lab.max_connected_clusters.to_string());
            flags.add("--node-name", node);
            flags.add("--kubeconfig", dir.join("agent.kubeconfig"));
            flags.add("--gateway-config", dir.join(node).join("gateway.yaml"));
            flags.add("--bpf-fs", self.ground.state.bpf().join(self.name()).join(node));
            flags.add("--cgroup-root", self.ground.cgroup.join(self.name()).join(node));
            flags.0.push("--kube-proxy-replacement".into());
            flags.add("--health-address", "127.0.0.1:9879");
            flags.add("--metrics-address", "127.0.0.1:9963");
            flags.add("--api-socket", self.agent_socket(node));
            flags.add("--state-dir", self.ground.state.agent_state(self.name(), node));
            match lab.encryption {
                Encryption::Off => flags.add("--encryption", "off"),
                Encryption::On | Encryption::Strict => {
                    // The one that every machine has.
                    flags.add("--wireguard", "user");
                    flags.add("--wireguard-uapi-dir", self.ground.state.wireguard(self.name(), node));
                }
            }
            if lab.encryption == Encryption::Strict {
                flags.0.push("--encryption-strict".into());
            }
            let process = self.run_on(i, node, programs::NODE_AGENT, flags).await?;
            names.push(process.name().to_owned());
        }
        futures::future::try_join_all(names.iter().map(|name| self.wait_ready(name))).await?;
        Ok(())
    }

    /// The node's WireGuard device: a process of its own, so that traffic flows on while the agent is replaced.
    async fn start_device(&self, i: usize, node: &str) -> Result<()> {
        let mut flags = Flags::default();
        flags.add("--uapi-dir", self.ground.state.wireguard(self.name(), node));
        flags.add("--metrics-address", "127.0.0.1:9964");
        self.run_on(i, node, programs::WIREGUARD, flags).await?;
        Ok(())
    }

    /// Starts one of our programs where systemd would have it: on the node, but not in a pod.
    async fn run_on(&self, i: usize, node: &str, program: &str, flags: Flags) -> Result<Process> {
        let name = format!("{}/{node}/{program}", self.name());
        let launch = Launch {
            name: name.clone(),
            program: programs::ours(program)?,
            args: flags.0,
            env: Default::default(),
            netns: self.net.nodes[i].path(),
            cgroup: self.ground.cgroup.join(self.name()).join(node).join("system").join(program),
            hostname: Some(node.to_owned()),
            log: self.ground.state.log(&name),
        };
        self.ground.run(launch).await
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
            [_, programs::APISERVER] => Ok((self.net.control_plane.clone(), local(9880), "/readyz")),
            [_, "etcd"] => Ok((self.net.control_plane.clone(), local(ETCD), "/health")),
            [_, node, programs::NODE_AGENT] if position(node).is_some() => {
                Ok((self.net.nodes[position(node).unwrap_or_default()].clone(), local(9879), "/readyz"))
            }
            _ => Err(LabError::invalid(format!("{daemon} cannot be asked whether it is ready"))),
        }
    }

    fn control_plane_launch(&self, name: &str, program: PathBuf, flags: Flags) -> Launch {
        let last = name.rsplit('/').next().unwrap_or(name);
        Launch {
            name: name.to_owned(),
            program,
            args: flags.0,
            env: Default::default(),
            netns: self.net.control_plane.path(),
            cgroup: self.ground.cgroup.join(self.name()).join(CONTROL_PLANE).join(last),
            hostname: Some(format!("{}-{CONTROL_PLANE}", self.name())),
            log: self.ground.state.log(name),
        }
    }
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
