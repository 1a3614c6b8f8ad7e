//! Whole clusters on one machine: network namespaces as nodes and pods, faults, scenarios.

#![forbid(unsafe_code)]

mod capabilities;
pub mod capture;
pub mod cgroup;
pub mod cleanup;
mod cluster;
mod command;
mod controllers;
mod crds;
pub mod error;
pub mod forge;
mod forwarder;
mod http;
pub mod images;
pub mod kind;
mod kube_api;
pub mod kubectl;
mod kubelet;
mod lab;
pub mod names;
pub mod netlink;
pub mod netns;
mod pki;
mod platform;
pub mod preflight;
pub mod process;
pub mod programs;
mod projection;
mod rbac;
pub mod report;
mod runner;
pub mod scenario;
pub mod spec;
pub mod state;
pub mod status;
pub mod story;
pub mod topology;
pub mod wait;

pub use cluster::Cluster;
pub use error::{LabError, Result};
pub use kind::Kind;
pub use kubelet::PodRecord;
pub use lab::Lab;
pub use runner::{Audience, Silent, run, run_on_kind};
