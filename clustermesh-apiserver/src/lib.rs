//! Exports a cluster into the mesh and mirrors its peers.

pub mod exporter;
pub mod pki;
