//! What an agent says of itself, as JSON on its API socket. The command line reads the same types.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

pub use crate::encryption::status::{EncryptionStatus, PeerStatus, RefusedKeyStatus};
use crate::policy::PolicySummary;

/// `GET /v1/status`
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    /// Name of the node.
    pub node: String,
    /// Name of the own cluster.
    pub cluster: String,
    /// Id of the own cluster.
    pub cluster_id: u16,
    /// Version of the agent.
    pub version: String,
    /// When the agent was started.
    pub started: DateTime<Utc>,
    /// Whether the maps hold what the mesh asks for, as far as the agent knows.
    pub ready: bool,
    /// Why it is not, or what else is not well. Empty when all is well.
    pub problems: Vec<String>,
    /// The connection to the own cluster's gateway.
    pub gateway: GatewayStatus,
    /// The own cluster first, then the peers by name.
    pub clusters: Vec<ClusterStatus>,
    /// The kernel's side.
    pub datapath: DatapathStatus,
    /// Encryption of traffic between nodes.
    #[serde(default)]
    pub encryption: EncryptionStatus,
    /// Network policies.
    #[serde(default)]
    pub policy: PolicySummary,
    /// How full the maps are.
    pub maps: Vec<MapStatus>,
    /// The newest revision per section (its prefix in the store) that the maps show.
    pub applied: BTreeMap<String, u64>,
    /// Entries of the store left out since the start; the log has the reasons.
    pub rejected_entries: u64,
}

/// The connection to the gateway.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// Whether it answers.
    pub connected: bool,
    /// Since when it does, or does not.
    pub since: DateTime<Utc>,
    /// The endpoint in use.
    pub endpoint: Option<String>,
    /// How often the connection failed.
    pub failures: u64,
    /// The latest failure, in words.
    pub last_error: Option<String>,
    /// The id of the gateway's store; another one is another store.
    pub store_id: Option<u64>,
    /// The newest revision that the store has shown.
    pub revision: i64,
    /// Age of the store's heartbeat in seconds.
    pub heartbeat_age_seconds: Option<f64>,
}

/// What is known of a cluster.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    /// Its name.
    pub name: String,
    /// Whether it is the agent's own.
    pub own: bool,
    /// Its id, once known.
    pub id: Option<u16>,
    /// Where it stands.
    pub state: ClusterState,
    /// All of it is known, and followed now.
    pub ready: bool,
    /// Nodes.
    pub nodes: usize,
    /// Addresses and prefixes with an identity.
    pub endpoints: usize,
    /// Identities.
    pub identities: usize,
    /// Services.
    pub services: usize,
    /// Seconds since all of it was last known to be complete.
    pub data_age_seconds: Option<f64>,
    /// Seconds since something of it last changed.
    pub last_change_seconds: Option<f64>,
    /// Revisions of the gateway's store that its sections may be behind.
    pub revision_lag: Option<i64>,
    /// Kinds of entries that have not been read whole yet.
    pub missing: Vec<String>,
}

/// Where a cluster stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClusterState {
    /// All of it has been read and is followed.
    Synced,
    /// Some of it has not been read yet.
    Syncing,
    /// All of it was read, but it cannot be followed now: what is known may be old.
    Stale,
    /// It has not described itself, or claims an id that another cluster holds.
    Unknown,
    /// It is being disconnected: nothing new goes to its services, and what is open has until its entries go.
    Draining,
}

/// The kernel's side.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatapathStatus {
    /// Every service is balanced, not only the global ones.
    pub kube_proxy_replacement: bool,
    /// Socket programs are attached to the cgroup.
    pub sockets_attached: bool,
    /// Pods of this node with packet programs.
    pub attached_pods: usize,
    /// Pods of this node that should have them and do not, with the reason.
    pub waiting_pods: BTreeMap<String, String>,
    /// Counters of the programs.
    pub counters: BTreeMap<String, u64>,
}

/// How full a map is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MapStatus {
    /// Its name.
    pub name: String,
    /// Entries in use.
    pub entries: usize,
    /// Entries that it has room for.
    pub capacity: u32,
}

/// `GET /v1/services`: one of these per frontend.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendStatus {
    /// `namespace/name` of the Service.
    pub service: String,
    /// Address, port and protocol: `10.96.0.10:53/UDP`.
    pub frontend: String,
    /// `sessionAffinity: ClientIP` timeout; 0 is none.
    pub affinity_seconds: u32,
    /// Who answers.
    pub backends: Vec<BackendStatus>,
}

/// A backend of a frontend.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendStatus {
    /// Address and port.
    pub address: String,
    /// Name of its cluster.
    pub cluster: String,
}

/// `GET /v1/ipcache`: one of these per prefix.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpcacheStatus {
    /// Address or prefix.
    pub prefix: String,
    /// Numeric identity.
    pub identity: u32,
    /// Node to reach it through.
    pub host: Option<String>,
    /// Name of its cluster.
    pub cluster: String,
    /// Encryption key index.
    pub encryption_key: u8,
}

/// `GET /v1/applied`: one JSON line for every batch that reached the maps, from the call on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    /// The newest revision that the batch held of each section.
    pub sections: BTreeMap<String, u64>,
    /// Operations made.
    pub operations: usize,
    /// Operations that failed and will be tried again.
    pub failed: usize,
    /// When the first event of the batch arrived at the agent, in nanoseconds since 1970.
    pub received_unix_nanos: u64,
    /// When the last operation had been made.
    pub applied_unix_nanos: u64,
}
