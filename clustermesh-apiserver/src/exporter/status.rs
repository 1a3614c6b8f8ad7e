//! What the status page shows of the exporter.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::translate::Counts;

/// State of the exporter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExporterStatus {
    /// Whether everything that there was at the start is exported and announced to readers.
    pub ready: bool,
    /// By kind of object.
    pub watches: BTreeMap<String, WatchStatus>,
    /// By prefix of keys: whether its canary has been written.
    pub sections: BTreeMap<String, bool>,
    /// How much is exported.
    pub exported: ExportedCounts,
    /// Policies that are not enforced as written, and why: `Kind namespace/name` to one sentence per problem.
    pub policies_with_problems: BTreeMap<String, Vec<String>>,
    /// How many times something in an object could not be used, by reason. The log says what.
    pub problems: BTreeMap<String, u64>,
}

/// State of the watch of one kind of object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WatchStatus {
    /// Whether a complete list has been seen.
    pub synced: bool,
    /// Whether the cluster does not have the kind, and need not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub absent: bool,
    /// Why it does not work at present, and what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Number of exported keys by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExportedCounts {
    /// Nodes.
    pub nodes: u64,
    /// Security identities.
    pub identities: u64,
    /// Pod addresses.
    pub endpoints: u64,
    /// Services that other clusters see.
    pub global_services: u64,
    /// Services that the cluster's own agents see.
    pub local_services: u64,
    /// Pods that wait for an identity or cannot get one. Not exported.
    pub pods_without_identity: u64,
    /// Network policies.
    #[serde(default)]
    pub policies: u64,
}

impl From<Counts> for ExportedCounts {
    fn from(counts: Counts) -> Self {
        Self {
            nodes: counts.nodes as u64,
            identities: counts.identities as u64,
            endpoints: counts.addresses as u64,
            global_services: counts.services as u64,
            local_services: counts.local_services as u64,
            pods_without_identity: counts.pods_without_identity as u64,
            policies: counts.policies as u64,
        }
    }
}
