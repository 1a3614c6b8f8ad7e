//! What network policies mean, decided one packet at a time by reading every policy from the beginning.
//!
//! It is slow and shares nothing with the resolver: it reads the objects' JSON, as users wrote it, and follows the text
//! of two documents:
//!
//! - Kubernetes, *Network Policies* and the reference of `networking.k8s.io/v1` `NetworkPolicy`,
//! - Cilium, *Network Policy* (layer 3, layer 4, deny policies, policy enforcement modes, Kubernetes constructs, cluster
//!   mesh) and the descriptions of the fields of `cilium.io/v2`.
//!
//! [`generate`] makes worlds of policies, pods and packets, leaning to the edges; [`decide`] says what should become of
//! a packet; [`shrink`] makes a world in which something else came of it small enough to read.
#![forbid(unsafe_code)]

pub mod generate;
mod reference;
mod report;
mod shrink;
mod world;

pub use reference::{Decision, asks_for_more, decide};
pub use report::report;
pub use shrink::shrink;
pub use world::{Direction, Kind, Packet, Peer, Pod, Policy, Protocol, Reserved, Service, World};

/// Seed and count of a run: from `ISTHMUS_TRUTH_SEED` and `ISTHMUS_TRUTH_CASES`, else as given.
pub fn run_of(cases: usize) -> Run {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.trim().parse::<u64>().ok());
    Run {
        seed: number("ISTHMUS_TRUTH_SEED").unwrap_or(1),
        cases: number("ISTHMUS_TRUTH_CASES").and_then(|cases| usize::try_from(cases).ok()).unwrap_or(cases),
    }
}

/// How much is tried, and from where.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Where the generator begins. The same seed makes the same worlds.
    pub seed: u64,
    /// Packets that are decided at least.
    pub cases: usize,
}
