//! A small Kubernetes API server for the lab, used where the real one cannot be had.

fn main() {}
