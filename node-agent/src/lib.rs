//! Turns the mesh's state into eBPF maps on one node.
//!
//! ```text
//! sources ──events──▶ mesh (what is known) ──▶ desired (what should be) ──▶ plan (differences) ──▶ datapath
//! ```
//!
//! `mesh`, `desired` and `plan` are pure; `reconcile` drives them; `sources`, `pods` and `datapath` touch the world.

pub mod api;
pub mod daemon;
pub mod datapath;
pub mod desired;
pub mod encryption;
pub mod events;
pub mod explain;
pub mod kubernetes;
pub mod mesh;
pub mod metrics;
pub mod plan;
pub mod pods;
pub mod policy;
pub mod reconcile;
pub mod refusals;
pub mod sources;
pub mod status;
