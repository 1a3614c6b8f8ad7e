//! What a lab is made of, before it is made.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::names::{Families, LabName};

/// A lab to be raised.
#[derive(Debug, Clone)]
pub struct LabSpec {
    /// Prefixes all that it makes.
    pub name: LabName,
    /// Where it came from, for `isthmus lab list`.
    pub scenario: PathBuf,
    /// Of all clusters.
    pub families: Families,
    /// Behind each clustermesh-apiserver.
    pub store: Store,
    /// 255 or 511.
    pub max_connected_clusters: u16,
    /// Of traffic between nodes.
    pub encryption: Encryption,
    /// How clusters find and trust each other.
    pub peering: Peering,
    /// Whether they are connected from the beginning; if not, they have the Secrets for it.
    pub connected: bool,
    /// How long what was mirrored of a peer is kept once it is disconnected; as long as the apiserver does by itself when left
    /// out.
    pub drain_grace: Option<Duration>,
    /// Whether clusters have a clustermesh-apiserver and node-agents; without, they are plain clusters.
    pub mesh: bool,
    /// At least one.
    pub clusters: Vec<ClusterSpec>,
}

/// A cluster to be raised.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// Its name in the mesh.
    pub name: String,
    /// Its id in the mesh.
    pub id: u16,
    /// The names of its nodes.
    pub nodes: Vec<String>,
    /// How many clustermesh-apiservers it has.
    pub replicas: usize,
    /// The clusters it joins.
    pub peers: Vec<String>,
}

/// How clusters find and trust each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Peering {
    /// By Secrets: each cluster has an authority and certificates of its own there, and a Secret for each peer.
    #[default]
    Secrets,
    /// By files, as Cilium's own configuration is: one authority for all clusters, and a file for each peer.
    Files,
}

/// Whether traffic between nodes is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encryption {
    /// It is not, and no node has a WireGuard device.
    Off,
    /// Each node has a device, and what can be encrypted is.
    #[default]
    On,
    /// As `On`; what cannot be encrypted is dropped.
    Strict,
}

impl Encryption {
    /// As a scenario spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Strict => "strict",
        }
    }
}

/// What is behind a clustermesh-apiserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Store {
    /// Its own memory.
    #[default]
    Memory,
    /// An etcd of its own.
    Etcd,
}

impl Store {
    /// As the daemons' flag spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Etcd => "etcd",
        }
    }
}
