//! The datapath, on the kernel: every program with test packets, and the whole with real sockets in namespaces.
//!
//! Needs root. Each test has its own network and mount namespace, its own BPF file system and its own cgroup; all vanish
//! with it, even when it fails.

mod bpf_fs;
mod churn;
mod device;
mod encryption;
mod maps;
mod model;
mod nodes;
mod open_flows;
mod packet;
mod packets;
mod pods;
mod policy;
mod sandbox;
mod signals;
mod sockets;
mod takeover;
