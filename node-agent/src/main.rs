//! Turns the mesh's state into eBPF maps on one node.

fn main() {}
