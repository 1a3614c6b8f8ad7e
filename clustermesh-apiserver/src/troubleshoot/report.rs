//! What a probe found: steps in the order in which a connection is made, each with what was seen and, where something is
//! wrong, with the likely cause and the command to run next. Served as JSON, and shown by `isthmus troubleshoot`.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Everything that one apiserver found out about its peers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Name of the cluster that was asked from.
    pub cluster: String,
    /// Where the probe ran, which is the place in the network that its answers are about.
    pub origin: Origin,
    /// When it ran, by the clock of that machine.
    pub taken: DateTime<Utc>,
    /// The peers that were asked for, by name.
    pub peers: Vec<PeerReport>,
}

/// Where a probe ran.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// In the apiserver that keeps the connections: its addresses, its identity, its name resolution.
    Apiserver,
    /// In a command of its own, which may stand elsewhere in the network.
    Command,
}

/// What was found out about one peer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerReport {
    /// Its cluster name.
    pub name: String,
    /// The Secret or file that says how to reach it.
    pub source: String,
    /// The steps, in order; those that could not be tried are there too.
    pub steps: Vec<StepReport>,
}

/// What became of one step.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StepReport {
    /// Which one.
    pub step: Step,
    /// How it ended: as the worst of its findings.
    pub outcome: Outcome,
    /// What was seen, one line each.
    pub seen: Vec<String>,
    /// What is not right.
    pub findings: Vec<Finding>,
}

/// The steps from a configuration to a mesh that carries traffic.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The Secret or file, and the certificates in it.
    Configuration,
    /// The peer's name is resolved.
    Dns,
    /// Its addresses answer.
    Tcp,
    /// Both sides take the other's certificate.
    Tls,
    /// It speaks the etcd v3 API.
    Gateway,
    /// It lets us read what a relay reads.
    Permissions,
    /// Its cluster configuration fits this mesh.
    ClusterConfig,
    /// Every answer comes from one store.
    Store,
    /// Its exporter has said of each prefix that it is complete.
    Canaries,
    /// Its exporter lives.
    Heartbeat,
    /// The relay follows it.
    Relay,
    /// Its nodes and ours reach each other's WireGuard devices.
    Wireguard,
}

impl Step {
    /// Those that an apiserver takes. The last one, [`Step::Wireguard`], is the node-agents'.
    pub const OF_APISERVER: [Self; 11] = [
        Self::Configuration,
        Self::Dns,
        Self::Tcp,
        Self::Tls,
        Self::Gateway,
        Self::Permissions,
        Self::ClusterConfig,
        Self::Store,
        Self::Canaries,
        Self::Heartbeat,
        Self::Relay,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Configuration => "configuration",
            Self::Dns => "DNS",
            Self::Tcp => "TCP",
            Self::Tls => "TLS",
            Self::Gateway => "gateway",
            Self::Permissions => "permissions",
            Self::ClusterConfig => "cluster config",
            Self::Store => "store",
            Self::Canaries => "canaries",
            Self::Heartbeat => "heartbeat",
            Self::Relay => "relay",
            Self::Wireguard => "WireGuard",
        })
    }
}

/// How a step ended. In order of severity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it should be.
    Passed,
    /// Not tried, because of an earlier step or of where the probe ran.
    Skipped,
    /// It works, and somebody should look at it.
    Warning,
    /// It does not work.
    Failed,
}

/// Something that is not right.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What it is, for programs: a word that stays the same from version to version.
    pub kind: String,
    /// [`Outcome::Warning`] or [`Outcome::Failed`].
    pub severity: Outcome,
    /// What is wrong, with names and numbers.
    pub problem: String,
    /// What it most likely comes from.
    pub cause: String,
    /// What to run next.
    pub next: Next,
}

/// A command, and the cluster that it is for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Next {
    /// The cluster whose context or machines it is to be run with.
    pub cluster: String,
    /// The command line.
    pub command: String,
}

impl Report {
    /// The worst that was found.
    pub fn outcome(&self) -> Outcome {
        self.peers.iter().map(PeerReport::outcome).max().unwrap_or(Outcome::Passed)
    }
}

impl PeerReport {
    /// The worst of its steps.
    pub fn outcome(&self) -> Outcome {
        self.steps.iter().map(|step| step.outcome).max().unwrap_or(Outcome::Passed)
    }

    /// What was found in one step.
    pub fn step(&self, step: Step) -> Option<&StepReport> {
        self.steps.iter().find(|report| report.step == step)
    }

    /// Everything that is not right, in order.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.steps.iter().flat_map(|step| &step.findings)
    }
}

impl StepReport {
    /// One that went as its findings say.
    pub fn new(step: Step, seen: Vec<String>, findings: Vec<Finding>) -> Self {
        let outcome = findings.iter().map(|finding| finding.severity).max().unwrap_or(Outcome::Passed);
        Self { step, outcome, seen, findings }
    }

    /// One that was not tried, and why.
    pub fn skipped(step: Step, reason: impl Into<String>) -> Self {
        Self { step, outcome: Outcome::Skipped, seen: vec![reason.into()], findings: Vec::new() }
    }

    /// Whether the steps after it can be tried.
    pub fn holds(&self) -> bool {
        matches!(self.outcome, Outcome::Passed | Outcome::Warning)
    }
}
