//! What the daemon is to do, and why it cannot.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use isthmus_daemon::{HttpError, LoopbackAddr};
use isthmus_kvstore::config::ConfigError;
use isthmus_kvstore::etcd::EtcdEnd;
use isthmus_kvstore::gateway::{GatewayError, TlsError, TlsFiles};
use isthmus_wire::{ClusterId, ClusterName, MaxConnectedClusters};

use crate::certificates::{self, Issuer};
use crate::election;
use crate::exporter::{ExporterError, Source};
use crate::relay::{self, OwnCluster};

/// What the daemon is to do.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// Name of this cluster.
    pub cluster: ClusterName,
    /// Its id.
    pub cluster_id: ClusterId,
    /// What the mesh is set up for.
    pub max_connected_clusters: MaxConnectedClusters,
    /// Access to the Kubernetes API; none for that of the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Where our own objects are in the Kubernetes API; none to have none.
    pub namespace: Option<String>,
    /// Who this replica is, among several.
    pub replica: String,
    /// Runs for the lead with these times, in `namespace`; none to lead alone.
    pub election: Option<election::Timing>,
    /// Where pods, nodes and identities come from.
    pub source: Source,
    /// Whether namespaces take part in the mesh unless they say otherwise.
    pub namespaces_are_global: bool,
    /// The directory with the peers' configurations.
    pub peers_dir: Option<PathBuf>,
    /// The relay's times.
    pub timing: relay::Timing,
    /// Where the gateway listens.
    pub listen: SocketAddr,
    /// Its certificates.
    pub tls: Tls,
    /// Where the state is kept.
    pub engine: Engine,
    /// Where health answers.
    pub health_address: LoopbackAddr,
    /// Where metrics answer.
    pub metrics_address: LoopbackAddr,
    /// The API socket, if there is to be one.
    pub api_socket: Option<PathBuf>,
}

impl DaemonConfig {
    /// The own cluster, as far as peers must fit it.
    pub(super) fn own(&self) -> OwnCluster {
        OwnCluster { name: self.cluster.clone(), id: self.cluster_id, mesh: self.max_connected_clusters }
    }
}

/// Where the gateway's certificates are.
#[derive(Clone, Debug)]
pub enum Tls {
    /// In files, kept by somebody else.
    Files(TlsFiles),
    /// In Secrets in this namespace of the Kubernetes API.
    Secrets {
        /// The namespace.
        namespace: String,
        /// Who issues them.
        issuer: Issuer,
        /// How long those that we issue are valid.
        validity: Duration,
        /// Further names and addresses of the gateway.
        gateway_names: Vec<String>,
        /// The times that are kept.
        timing: certificates::Timing,
    },
}

/// Where the state is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// In this process.
    Memory,
    /// In the etcd that this client configuration names.
    Etcd(PathBuf),
}

/// Why the daemon did not start, or ended by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// A local endpoint cannot be opened.
    #[error(transparent)]
    Endpoint(#[from] HttpError),
    /// The gateway cannot be opened.
    #[error("gateway (--listen, --tls-cert, --tls-key, --tls-client-ca): {0}")]
    Gateway(#[from] GatewayError),
    /// The authorities in the gateway's Secret cannot be used.
    #[error("gateway: Secret {secret}: {source}", secret = isthmus_crds::names::SERVER_CERT_SECRET)]
    Trust {
        /// What is wrong with them.
        #[from]
        source: TlsError,
    },
    /// The etcd client configuration cannot be used.
    #[error("--etcd-config {}: {source}", path.display())]
    EtcdConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The Kubernetes API's access file cannot be used.
    #[error("--kubeconfig {}: {problem}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no service account, or it cannot be used.
    #[error("no access to the Kubernetes API: {0}; outside of a pod, give --kubeconfig FILE")]
    InCluster(String),
    /// The exporter cannot run.
    #[error("exporter: {0}")]
    Exporter(#[from] ExporterError),
    /// A task that never should has ended.
    #[error("{0} has stopped unexpectedly; restart the program and report the fault")]
    Stopped(&'static str),
    /// Another etcd answers than the one that was followed.
    #[error(
        "etcd: {0}; the program ends so that its next start serves the new state to readers as a new store"
    )]
    EtcdExchanged(String),
}

impl From<EtcdEnd> for DaemonError {
    fn from(end: EtcdEnd) -> Self {
        match end {
            EtcdEnd::Exchanged(reason) => Self::EtcdExchanged(reason),
            EtcdEnd::Stopped(what) => Self::Stopped(what),
        }
    }
}
