//! Map keys and values shared by the eBPF programs and the node-agent.
//!
//! Addresses are 16 bytes everywhere, IPv4 in its v4-mapped form (`::ffff:a.b.c.d`), so that both families
//! share maps and code. Ports are kept in network byte order, as they stand in packets and in sockets. No type
//! has implicit padding: hash maps compare keys byte by byte, and the verifier refuses uninitialised bytes.
//!
//! Changing a layout or the meaning of a field needs a new [`VERSION`]: it is part of the pin path, so that an
//! agent never takes over maps that it would misread. A bit in what was zero needs none, where zero goes on meaning what it
//! meant and programs of an earlier build may pass over the bit: with a new version every open flow would be forgotten.
#![no_std]

mod addr;
mod conntrack;
mod counters;
mod encryption;
mod endpoint;
mod event;
mod ipcache;
#[cfg(feature = "user")]
mod pod;
mod policy;
mod service;

pub use addr::{Addr, LOOPBACK_V4, LOOPBACK_V6, Protocol};
pub use conntrack::{
    AffinityEntry, AffinityKey, CtEntry, CtKey, FragmentEntry, FragmentKey, ReplyEntry, ReplyKey,
    SocketEntry, SocketKey, SocketKeyKind, ct_flags, reply_flags,
};
pub use counters::Counter;
pub use encryption::{Encryption, encryption_flags, mark};
pub use endpoint::{Endpoint, LocalPod, LocalPodKey, endpoint_flags};
pub use event::{DropReason, PolicyEvent, PolicyVerdict, event_flags};
pub use ipcache::{IpcacheEntry, IpcacheKey, ipcache_flags};
pub use policy::{
    Direction, PolicyCtEntry, PolicyCtKey, PolicyEntry, PolicyKey, policy_ct_flags, policy_flags,
    reserved_identity, reserved_rule,
};
pub use service::{Backend, Service, ServiceKey, Slot, SlotKey, backend_flags};

/// Version of the layouts in this crate and of what their fields mean.
pub const VERSION: u32 = 2;

/// Largest cluster id plus one (clusters are numbered 1..=511, 0 is the own or an unknown one).
pub const CLUSTERS: u32 = 512;

/// Names of the maps, as they stand in the object and in the pin directory.
pub mod maps {
    /// [`ServiceKey`](crate::ServiceKey) to [`Service`](crate::Service), hash.
    pub const SERVICES: &str = "services";
    /// [`SlotKey`](crate::SlotKey) to [`Slot`](crate::Slot), hash.
    pub const SLOTS: &str = "slots";
    /// Backend id to [`Backend`](crate::Backend), array.
    pub const BACKENDS: &str = "backends";
    /// [`IpcacheKey`](crate::IpcacheKey) to [`IpcacheEntry`](crate::IpcacheEntry), LPM trie.
    pub const IPCACHE: &str = "ipcache";
    /// Interface index to [`Endpoint`](crate::Endpoint), hash.
    pub const ENDPOINTS: &str = "endpoints";
    /// Address to [`LocalPod`](crate::LocalPod), hash.
    pub const LOCAL_PODS: &str = "local_pods";
    /// One [`Encryption`](crate::Encryption), array.
    pub const ENCRYPTION: &str = "encryption";
    /// Number to a policy map, which is an LPM trie from [`PolicyKey`](crate::PolicyKey) to
    /// [`PolicyEntry`](crate::PolicyEntry); array of maps.
    pub const POLICIES: &str = "policies";
    /// The number (u32) under which flows are decided now, array of one. A change of policy or of an identity raises it. 0
    /// while no endpoint was ever made known: then nothing of policy is looked at.
    pub const POLICY_EPOCH: &str = "policy_epoch";
    /// [`PolicyCtKey`](crate::PolicyCtKey) to [`PolicyCtEntry`](crate::PolicyCtEntry), LRU hash.
    pub const POLICY_CT: &str = "policy_ct";
    /// [`PolicyEvent`](crate::PolicyEvent)s, ring buffer.
    pub const EVENTS: &str = "events";
    /// How many more events each CPU may send now; the programs' own. Per-CPU array.
    pub const EVENT_BUDGET: &str = "event_budget";
    /// [`CtKey`](crate::CtKey) to [`CtEntry`](crate::CtEntry), LRU hash.
    pub const CT: &str = "ct";
    /// [`ReplyKey`](crate::ReplyKey) to [`ReplyEntry`](crate::ReplyEntry), LRU hash.
    pub const CT_REPLY: &str = "ct_reply";
    /// [`AffinityKey`](crate::AffinityKey) to [`AffinityEntry`](crate::AffinityEntry), LRU hash.
    pub const AFFINITY: &str = "affinity";
    /// [`SocketKey`](crate::SocketKey) to [`SocketEntry`](crate::SocketEntry), LRU hash.
    pub const SOCKETS: &str = "sockets";
    /// [`FragmentKey`](crate::FragmentKey) to [`FragmentEntry`](crate::FragmentEntry), LRU hash.
    pub const FRAGMENTS: &str = "fragments";
    /// [`Counter`](crate::Counter) to u64, per-CPU array.
    pub const COUNTERS: &str = "counters";
    /// Cluster id to new flows towards its backends (u64), per-CPU array.
    pub const CLUSTER_FLOWS: &str = "cluster_flows";
}
