//! The values of the format, each with `decode` and `encode`.
//!
//! `decode` is bounded in size and reads what any supported Cilium version writes; `encode` writes what Cilium writes.
//! Neither looks at the key or at who sent it: that is [`crate::validate`]'s part.

mod cluster_config;
mod endpoint_slice;
mod ip;
mod node;
mod service;
mod service_export;
mod timestamp;

pub use cluster_config::{Capabilities, ClusterConfig, EndpointSlicesExportMode};
pub use endpoint_slice::{AddressType, ClusterEndpointSlice, Conditions, Endpoint, EndpointPort};
pub use ip::{IpEntry, IpIdentityPair, NamedPort};
pub use node::{AddressKind, Node, NodeAddress, PodCidr};
pub use service::{ClusterService, PortName, Protocol, ServicePort, ServicePorts, Zone, ZoneHint};
pub use service_export::{
    ClientIpConfig, ExportType, ExportedPort, IpFamily, McsApiServiceSpec, SessionAffinity,
    SessionAffinityConfig, TrafficPolicy,
};
pub use timestamp::Timestamp;

/// Largest value that is read, in bytes: what etcd stores by default (1.5 MiB), with room for raised limits.
pub const MAX_BYTES: usize = 2 << 20;
/// Largest single-object value (a node, an address, a cluster configuration), in bytes. Kubernetes allows an object's
/// annotations 256 KiB.
pub const MAX_OBJECT_BYTES: usize = 512 << 10;

/// `decode` and `encode` for a value that is JSON.
macro_rules! json_value {
    ($name:ident, $limit:expr) => {
        impl $name {
            /// Reads the value.
            ///
            /// # Errors
            /// Too long, not JSON, or a field that does not hold what it should; names the field.
            pub fn decode(bytes: &[u8]) -> Result<Self, $crate::ValueError> {
                $crate::gojson::decode(bytes, $limit)
            }

            /// The value as Cilium writes it.
            pub fn encode(&self) -> bytes::Bytes {
                $crate::gojson::encode(self)
            }
        }
    };
}
pub(crate) use json_value;
