//! How encryption is doing, as part of the agent's status.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::publication::RotationReport;

/// `encryption` in `GET /v1/status`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EncryptionStatus {
    /// Traffic between nodes is to be encrypted.
    pub enabled: bool,
    /// What cannot be encrypted is dropped.
    pub strict: bool,
    /// The device works and is configured.
    pub ready: bool,
    /// What is not well.
    pub problem: Option<String>,
    /// `user` or `kernel`, once the device has been found.
    pub mode: Option<String>,
    /// This node's public key.
    pub public_key: Option<String>,
    /// Whether the other nodes are told that key.
    pub published: bool,
    /// The device's network interface.
    pub interface: String,
    /// UDP port of this node and of all others.
    pub port: u16,
    /// Largest packet that is encrypted whole, in bytes.
    pub mtu: u32,
    /// The other nodes that have a key.
    pub peers: Vec<PeerStatus>,
    /// Keys of other nodes that are not used.
    pub refused_keys: Vec<RefusedKeyStatus>,
    /// The latest exchange of this node's key.
    pub rotation: Option<RotationReport>,
    /// Counters of the device; of ours only.
    pub counters: BTreeMap<String, u64>,
}

/// One peer of the device.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Name of the node; none for a peer that is about to be removed.
    pub node: Option<String>,
    /// Name of its cluster.
    pub cluster: Option<String>,
    /// Its public key.
    pub public_key: String,
    /// Where it was last seen, or is expected.
    pub endpoint: Option<String>,
    /// Seconds since the last handshake; none if there was none.
    pub last_handshake_seconds: Option<f64>,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
    /// Prefixes that are its.
    pub allowed_ips: usize,
}

/// A key that is not used.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedKeyStatus {
    /// Name of the node that publishes it.
    pub node: String,
    /// Name of its cluster.
    pub cluster: String,
    /// The key, where it is one.
    pub public_key: Option<String>,
    /// `duplicate`, `own` or `invalid`.
    pub kind: String,
    /// Why, and what to do.
    pub reason: String,
}
