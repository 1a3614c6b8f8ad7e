//! Exports a cluster into the mesh and mirrors its peers.
#![forbid(unsafe_code)]

pub mod certificates;
pub mod cluster_info;
pub mod daemon;
pub mod election;
pub mod exporter;
pub mod flags;
pub mod peering;
pub mod pki;
mod recorder;
pub mod relay;
pub mod status;
pub mod tasks;
pub mod troubleshoot;
