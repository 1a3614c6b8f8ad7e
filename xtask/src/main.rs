//! What make and CI call: the eBPF build and its check, CRD generation.

fn main() {}
