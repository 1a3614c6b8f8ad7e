//! What both daemons share: logs, signals, the local HTTP endpoints, and how to ask these in a probe.
//!
//! Nothing here listens in plain text beyond the machine: [`LoopbackAddr`] cannot hold another address, and the API
//! socket is a file that only its owner may open.
#![forbid(unsafe_code)]

mod http;
mod log;
mod probe;
mod signal;

pub use http::{Endpoints, HttpError, LoopbackAddr, NotLoopback, Readiness};
pub use log::{LogFormat, LogLevel, init_logging};
pub use probe::probe;
pub use signal::shutdown_on_signal;

/// The machine's architecture as Go and container images call it: the label `arch` of the programs' version metrics.
pub const ARCH: &str = if cfg!(target_arch = "x86_64") {
    "amd64"
} else if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    std::env::consts::ARCH
};
