//! An MVCC store served over the etcd v3 API, and the sync protocol of Cluster Mesh.
#![forbid(unsafe_code)]

mod backoff;
pub mod config;
pub mod memory;
