//! WireGuard in user space around boringtun's `noise::Tunn`, and how to configure it or the kernel's.

pub mod config;
pub mod control;
pub mod device;
pub mod metrics;
pub mod routing;
pub mod uapi;
