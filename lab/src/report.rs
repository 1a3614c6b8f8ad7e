//! What a run of a scenario found, for people (the story) and for programs (`--report json`).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The whole run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The scenario's title.
    pub title: String,
    /// The lab's name.
    pub lab: String,
    /// `memory` or `etcd`.
    pub store: String,
    /// `stand-in`, `kube-apiserver` or `kind`.
    pub kubernetes: String,
    /// When it began, RFC 3339.
    pub started: String,
    /// Raising the lab took so long, in milliseconds.
    pub raised_ms: f64,
    /// The steps took so long, in milliseconds.
    pub steps_ms: f64,
    /// Whether every expectation held.
    pub passed: bool,
    /// In order; those after the first that failed have not been tried.
    pub steps: Vec<StepReport>,
    /// When a step failed: the last lines of what was involved.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub logs: Vec<LogTail>,
}

/// One step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StepReport {
    /// From 1.
    pub number: usize,
    /// What it is.
    pub say: String,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
    /// Whether what is expected of it held.
    pub passed: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<String>,
    /// From the change in the Kubernetes API to the first answer that shows it, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub shown_after_ms: Option<f64>,
    /// What the requests of this step met.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub requests: Option<Tally>,
    /// What was seen on the wires meanwhile.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub captured: Option<Captured>,
}

/// What someone who taps every wire between nodes has seen. A packet that crosses several is counted at each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Captured {
    /// IP packets of all kinds.
    pub packets: usize,
    /// Those in which a request can be read.
    pub requests: usize,
    /// Those in which an answer can be read.
    pub answers: usize,
    /// Those whose outer header names one of the pods involved.
    pub plain: usize,
    /// Those between WireGuard devices.
    pub encrypted: usize,
    /// Those of them that are fragments.
    pub encrypted_fragments: usize,
}

/// Who answered, and how often nobody did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tally {
    /// Answers by cluster.
    pub answers: BTreeMap<String, usize>,
    /// Answers by pod.
    pub pods: BTreeMap<String, usize>,
    /// Requests that failed.
    pub failed: usize,
    /// How the first of them failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub first_failure: Option<String>,
}

/// The end of a log.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogTail {
    /// Whose.
    pub process: String,
    /// Its last lines.
    pub lines: String,
}
