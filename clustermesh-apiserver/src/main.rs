//! Exports a cluster into the mesh and mirrors its peers.

fn main() {}
