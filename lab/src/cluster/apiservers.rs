//! The clustermesh-apiservers of a cluster, and the etcd behind them.

use std::net::SocketAddr;

use futures::future::try_join_all;

use super::{Cluster, ETCD, Flags, GATEWAY};
use crate::error::Result;
use crate::spec::{LabSpec, Peering, Store};
use crate::{programs, rbac, state};

/// A clustermesh-apiserver that is gone is followed by another within this time. Clusters wait longer by themselves (15
/// seconds): their processors and their networks are slower to be believed dead.
const LEASE: &str = "4s";

impl Cluster {
    /// Starts all of them, and returns when each is ready.
    pub(crate) async fn start_apiservers(&self, lab: &LabSpec) -> Result<()> {
        let dir = self.ground.state.cluster(self.name());
        self.api.kubeconfig(&dir.join("apiserver.kubeconfig"), self.name(), rbac::APISERVER_USER, &[])?;
        if lab.store == Store::Etcd {
            let config = format!("endpoints:\n- http://{}\n", self.etcd());
            state::write_whole(&dir.join("etcd.yaml"), config.as_bytes())?;
            self.start_etcd().await?;
        }
        try_join_all((0..self.spec.replicas).map(|replica| self.start_apiserver(lab, replica))).await?;
        Ok(())
    }

    async fn start_apiserver(&self, lab: &LabSpec, replica: usize) -> Result<()> {
        let dir = self.ground.state.cluster(self.name());
        let name = format!("{}/{}", self.name(), self.replica(replica));
        let mut flags = Flags::default();
        flags.add("--cluster-name", self.name());
        flags.add("--cluster-id", self.id().to_string());
        flags.add("--max-connected-clusters", lab.max_connected_clusters.to_string());
        flags.add("--kubeconfig", dir.join("apiserver.kubeconfig"));
        flags.add("--source", "kubernetes");
        flags.add("--listen", format!("[::]:{GATEWAY}"));
        match lab.peering {
            Peering::Secrets => {
                self.secrets_flags(&mut flags);
                flags.add("--replica-name", self.replica(replica));
                flags.add("--leader-elect-lease-duration", LEASE);
            }
            Peering::Files => self.files_flags(&mut flags),
        }
        if let Some(grace) = lab.drain_grace {
            flags.add("--peer-drain-grace", format!("{}ms", grace.as_millis()));
        }
        flags.add("--store", lab.store.as_str());
        if lab.store == Store::Etcd {
            flags.add("--etcd-config", dir.join("etcd.yaml"));
        }
        flags.add("--health-address", "127.0.0.1:9880");
        flags.add("--metrics-address", "127.0.0.1:9962");
        flags.add("--api-socket", self.apiserver_socket(replica));
        let program = programs::ours(programs::APISERVER)?;
        self.ground.run(self.control_plane_launch(&name, replica, program, flags)).await?;
        self.wait_ready(&name).await
    }

    /// Where etcd listens.
    pub(super) fn etcd(&self) -> SocketAddr {
        SocketAddr::new(self.net.plan.control_plane()[0].addr(), ETCD)
    }

    async fn start_etcd(&self) -> Result<()> {
        let name = format!("{}/etcd", self.name());
        let peer = format!("http://127.0.0.1:{}", ETCD + 1);
        let client = format!("http://{}", self.etcd());
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
        let launch = self.control_plane_launch(&name, 0, programs::machines("etcd", "etcd-server")?, flags);
        self.ground.run(launch).await?;
        self.wait_ready(&name).await
    }
}
