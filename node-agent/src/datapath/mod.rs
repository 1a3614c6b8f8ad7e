//! The kernel's side of the agent: loads the eBPF programs, attaches them, and changes and reads their maps.

mod error;
pub mod ops;

pub use error::{DatapathError, OpError};
pub use ops::{MapOp, Phase, Target};

/// How many entries the maps have room for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MapSizes {
    /// Frontends (address, port and protocol).
    pub services: u32,
    /// Backends of all frontends together, and their slots. Backend ids are below this.
    pub backends: u32,
    /// Addresses and prefixes with an identity.
    pub ipcache: u32,
    /// Flows through TC. The least recently used give way.
    pub flows: u32,
    /// Sockets connected to services. The least recently used give way.
    pub sockets: u32,
    /// Clients of services with session affinity. The least recently used give way.
    pub affinity: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            services: 65_536,
            backends: 262_144,
            ipcache: 512_000,
            flows: 262_144,
            sockets: 262_144,
            affinity: 65_536,
        }
    }
}
