//! Exports a cluster into the mesh and mirrors its peers.
#![forbid(unsafe_code)]

pub mod exporter;
pub mod pki;
pub mod relay;
pub mod status;
