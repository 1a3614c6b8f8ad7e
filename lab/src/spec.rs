//! What a lab is made of, before it is made.

use std::path::PathBuf;

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
    /// The clusters it joins: for each it has a peer file.
    pub peers: Vec<String>,
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
