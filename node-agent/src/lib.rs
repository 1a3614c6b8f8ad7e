//! Turns the mesh's state into eBPF maps on one node.

pub mod datapath;
pub mod desired;
pub mod mesh;
pub mod plan;
pub mod reconcile;
