//! Turns the mesh's state into eBPF maps on one node.

pub mod datapath;
