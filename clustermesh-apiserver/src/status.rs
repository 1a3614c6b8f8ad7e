//! What the apiserver says about itself: served as JSON on the API socket, read by `isthmus status`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use chrono::{DateTime, Utc};
use isthmus_crds::SecretVersion;
use serde::{Deserialize, Serialize};

/// The whole apiserver.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiserverStatus {
    /// Name of the own cluster.
    pub cluster: String,
    /// Id of the own cluster.
    pub cluster_id: u16,
    /// Version of the program.
    pub version: String,
    /// When the process started.
    pub started: DateTime<Utc>,
    /// Whether `/readyz` answers 200; if not, what it waits for.
    pub ready: bool,
    /// What readiness waits for.
    pub waiting_for: Option<String>,
    /// Whether this replica leads: only the leader writes to the Kubernetes API, and to an etcd that replicas share.
    #[serde(default = "yes")]
    pub leading: bool,
    /// Which replica leads, as far as is known; none where there is no election.
    #[serde(default)]
    pub leader: Option<String>,
    /// The cluster's certificates, if they are in Secrets.
    #[serde(default)]
    pub certificates: Vec<CertificateStatus>,
    /// The store that agents and peers read.
    pub store: StoreStatus,
    /// What the own cluster shares.
    pub exporter: ExportStatus,
    /// The peers, by name.
    pub peers: Vec<PeerStatus>,
    /// The clusters that may read from this one, and from which nothing is read.
    #[serde(default)]
    pub admitted: Vec<AdmittedPeer>,
    /// Files in the peer directory that cannot be used, and why.
    pub refused_files: BTreeMap<String, String>,
    /// Secrets of peers that cannot be used, `namespace/name`, and why.
    #[serde(default)]
    pub refused_secrets: BTreeMap<String, String>,
    /// Why the Secrets of peers cannot be read at present.
    #[serde(default)]
    pub secrets_unread: Option<String>,
}

impl ApiserverStatus {
    /// What is not well, one sentence each; empty when all is.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(reason) = &self.waiting_for {
            problems.push(format!("cluster {}: the apiserver is not ready: {reason}", self.cluster));
        }
        for certificate in &self.certificates {
            if let Some(problem) = &certificate.problem {
                problems.push(format!("cluster {}: Secret {}: {problem}", self.cluster, certificate.name));
            }
        }
        for (file, reason) in &self.refused_files {
            problems.push(format!("cluster {}: peer file {file}: {reason}", self.cluster));
        }
        for (secret, reason) in &self.refused_secrets {
            problems.push(format!("cluster {}: peer Secret {secret}: {reason}", self.cluster));
        }
        if let Some(reason) = &self.secrets_unread {
            problems.push(format!("cluster {}: the peers' Secrets: {reason}", self.cluster));
        }
        for (policy, reasons) in &self.exporter.policies.with_problems {
            problems.push(format!("cluster {}: {policy}: {}", self.cluster, reasons.join("; ")));
        }
        for peer in self.peers.iter().filter(|peer| peer.state != PeerState::Ready) {
            let reason = peer.reason.as_deref().unwrap_or("no reason known yet");
            problems
                .push(format!("cluster {}: peer {} is {}: {reason}", self.cluster, peer.name, peer.state));
        }
        problems
    }
}

fn yes() -> bool {
    true
}

/// A certificate of the own cluster, in a Secret.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    /// The Secret.
    pub name: String,
    /// Whose certificate it is; empty if none could be used yet.
    pub subject: String,
    /// Who issued it.
    pub issuer: String,
    /// Valid from then on.
    pub not_before: Option<DateTime<Utc>>,
    /// Valid until then.
    pub not_after: Option<DateTime<Utc>>,
    /// What is wrong with what is in the Secret, and what to do. If there is a certificate beside it, that is still in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The store behind the gateway.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreStatus {
    /// `memory` or `etcd`.
    pub engine: String,
    /// The cluster id in every response header; another one is another store.
    pub store_id: u64,
    /// The newest revision.
    pub revision: i64,
    /// Keys in the store.
    pub keys: usize,
}

/// What the own cluster shares.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportStatus {
    /// Whether the first lists have all been exported.
    pub synced: bool,
    /// What is exported.
    pub counts: Counts,
    /// The own cluster's network policies.
    #[serde(default)]
    pub policies: PolicyStatus,
    /// Objects or parts of objects that were left out, by reason.
    pub refused: BTreeMap<String, u64>,
}

/// The network policies of a cluster.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyStatus {
    /// How many there are.
    pub total: usize,
    /// Those that are not enforced as written, `Kind namespace/name`, and why: one sentence per problem. What such a part
    /// would have decided is denied.
    pub with_problems: BTreeMap<String, Vec<String>>,
}

/// How many of each there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Nodes.
    pub nodes: usize,
    /// Security identities.
    pub identities: usize,
    /// Pod addresses.
    pub endpoints: usize,
    /// Global services.
    pub services: usize,
    /// Endpoint slices of global services.
    pub endpoint_slices: usize,
    /// Services exported through the Multi-Cluster Services API.
    pub service_exports: usize,
}

/// One peer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Its cluster name.
    pub name: String,
    /// Its cluster id, once its configuration was admitted.
    pub cluster_id: Option<u16>,
    /// Where it stands.
    pub state: PeerState,
    /// What configures it; none once it was removed before this process started.
    #[serde(default)]
    pub source: Option<PeerOrigin>,
    /// The version of the Secret that it is connected by; none if it is no Secret, or it was not connected yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_secret: Option<SecretVersion>,
    /// Why it stands there, for programs.
    #[serde(default)]
    pub cause: PeerCause,
    /// Why it stands there, in words that say what to do; none when it is ready.
    pub reason: Option<String>,
    /// Whether its gateway answers.
    pub connected: bool,
    /// The endpoint in use.
    pub endpoint: Option<String>,
    /// The address that the endpoint's name has led to.
    #[serde(default)]
    pub address: Option<SocketAddr>,
    /// When everything mirrored was last known to be complete.
    #[serde(default)]
    pub confirmed: Option<DateTime<Utc>>,
    /// Seconds since everything mirrored was last known to be complete; none before that.
    pub data_age_seconds: Option<f64>,
    /// The lowest revision that every section is known to be complete up to.
    pub revision: i64,
    /// How many revisions of the peer's store are not mirrored yet, at most.
    pub revision_lag: i64,
    /// What is mirrored.
    pub counts: Counts,
    /// Entries of the peer that were refused, by reason.
    pub rejected: BTreeMap<String, u64>,
    /// How often the connection failed.
    pub failures: u64,
    /// The last failure, also after recovery.
    pub last_error: Option<String>,
    /// When that was.
    pub last_failure: Option<DateTime<Utc>>,
}

/// A cluster that may read from this one, while nothing is read from it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdmittedPeer {
    /// Its cluster name.
    pub name: String,
    /// What says so.
    pub source: PeerOrigin,
    /// The version of the Secret that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_secret: Option<SecretVersion>,
    /// Why it may not, although that is asked for, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What configures a peer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PeerOrigin {
    /// A file in the directory, by its name.
    File(String),
    /// A Secret.
    Secret {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

impl std::fmt::Display for PeerOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(name) => write!(f, "file {name}"),
            Self::Secret { namespace, name } => write!(f, "Secret {namespace}/{name}"),
        }
    }
}

/// Why a peer stands where it does. The names are those of the reasons in the conditions of a ClusterPeer, and stay.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub enum PeerCause {
    /// The first attempt to connect is under way.
    #[default]
    Connecting,
    /// The name of the gateway has no address.
    NameNotResolved,
    /// Nothing answers at the gateway's addresses.
    Unreachable,
    /// The gateway's certificate has expired, or is not valid yet.
    CertificateExpired,
    /// The gateway's certificate comes from an authority that is not trusted.
    CertificateNotTrusted,
    /// The gateway does not take our certificate.
    CertificateRefused,
    /// The gateway's certificate is for another name.
    WrongName,
    /// Our own certificate, or the authorities that are to be trusted, cannot be used.
    Misconfigured,
    /// There was a connection, and it is gone; or something answers that is no gateway.
    ConnectionLost,
    /// Connected; it has not written its cluster configuration.
    AwaitingConfiguration,
    /// Its cluster id is that of another cluster.
    IdConflict,
    /// Its cluster configuration does not fit this mesh.
    Refused,
    /// What it shares is being read.
    Synchronizing,
    /// Everything that it shares is mirrored and followed.
    Mirrored,
    /// It was removed.
    Draining,
    /// The Secret that should configure it cannot be used.
    InvalidSecret,
}

impl PeerCause {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "Connecting",
            Self::NameNotResolved => "NameNotResolved",
            Self::Unreachable => "Unreachable",
            Self::CertificateExpired => "CertificateExpired",
            Self::CertificateNotTrusted => "CertificateNotTrusted",
            Self::CertificateRefused => "CertificateRefused",
            Self::WrongName => "WrongName",
            Self::Misconfigured => "Misconfigured",
            Self::ConnectionLost => "ConnectionLost",
            Self::AwaitingConfiguration => "AwaitingConfiguration",
            Self::IdConflict => "IdConflict",
            Self::Refused => "Refused",
            Self::Synchronizing => "Synchronizing",
            Self::Mirrored => "Mirrored",
            Self::Draining => "Draining",
            Self::InvalidSecret => "InvalidSecret",
        }
    }
}

/// Where a peer stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerState {
    /// No connection yet, or none at the moment. What was mirrored stays.
    Connecting,
    /// Connected; its cluster configuration is not there yet.
    AwaitingConfiguration,
    /// Its cluster configuration does not fit this mesh.
    Refused,
    /// The first lists are under way.
    Synchronizing,
    /// Mirrored and followed.
    Ready,
    /// Its configuration was removed: what was mirrored goes after the grace period.
    Draining,
}

impl std::fmt::Display for PeerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Connecting => "connecting",
            Self::AwaitingConfiguration => "awaiting-configuration",
            Self::Refused => "refused",
            Self::Synchronizing => "synchronizing",
            Self::Ready => "ready",
            Self::Draining => "draining",
        })
    }
}
