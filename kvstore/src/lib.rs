//! An MVCC store served over the etcd v3 API, and the sync protocol of Cluster Mesh.
#![forbid(unsafe_code)]

mod backoff;
mod certificate;
pub mod client;
pub mod config;
pub mod etcd;
pub mod gateway;
pub mod memory;
pub mod metrics;
mod pem;
pub mod reader;
mod section;
pub mod writer;

pub use certificate::{Certificate, Validity};
pub use client::{ConnectError, RateLimits};
pub use section::Section;
