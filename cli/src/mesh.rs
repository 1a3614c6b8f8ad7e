//! Whole clusters, through their Kubernetes APIs: connecting them, taking them apart, and how they are.
//!
//! The way of a command: [`contexts`] opens the clusters' APIs, [`facts`] reads them, [`checks`] judges, [`exchange`]
//! decides which Secrets are written, [`apply`] writes them, [`wait`] waits for the answer. What judges and decides asks
//! nobody and can be tested without a cluster.

mod apply;
mod certificates;
mod checks;
pub(crate) mod connect;
pub(crate) mod contexts;
pub(crate) mod disconnect;
mod endpoints;
pub(crate) mod error;
mod exchange;
mod expiry;
mod facts;
pub(crate) mod peers;
mod ranges;
mod reach;
pub(crate) mod rotate_ca;
pub(crate) mod status;
mod topology;
mod wait;

pub(crate) use error::MeshError;
