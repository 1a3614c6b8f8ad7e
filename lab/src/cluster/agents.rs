//! The node-agents of a cluster, each with a WireGuard device beside it.

use super::{Cluster, Flags, client_config};
use crate::error::Result;
use crate::process::{Launch, Process};
use crate::spec::{Encryption, LabSpec};
use crate::{programs, rbac, state};

impl Cluster {
    /// Starts all of them, and returns when each is ready. Their certificates are there by then.
    pub(crate) async fn start_agents(&self, lab: &LabSpec) -> Result<()> {
        let dir = self.ground.state.cluster(self.name());
        self.api.kubeconfig(&dir.join("agent.kubeconfig"), self.name(), rbac::AGENT_USER, &[])?;
        let gateways: Vec<String> =
            self.gateways().iter().map(|gateway| format!("https://{gateway}")).collect();
        let mut names = Vec::new();
        for (i, node) in self.spec.nodes.iter().enumerate() {
            let certificate = self.ground.state.agent_certificate(self.name(), node);
            let config = client_config(&gateways, &certificate);
            state::write_whole(&dir.join(node).join("gateway.yaml"), config.as_bytes())?;
            if lab.encryption != Encryption::Off {
                self.start_device(i, node).await?;
            }
            let process = self.run_on(i, node, programs::NODE_AGENT, self.agent_flags(lab, node)).await?;
            names.push(process.name().to_owned());
        }
        futures::future::try_join_all(names.iter().map(|name| self.wait_ready(name))).await?;
        Ok(())
    }

    fn agent_flags(&self, lab: &LabSpec, node: &str) -> Flags {
        let dir = self.ground.state.cluster(self.name());
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
        flags
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
}
