//! The maps. Their sizes here are placeholders: the loader sets them.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{self, ArrayOfMaps};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use isthmus_bpf_abi::{
    AffinityEntry, AffinityKey, Backend, CLUSTERS, Counter, CtEntry, CtKey, Encryption, Endpoint,
    FragmentEntry, FragmentKey, IpcacheEntry, IpcacheKey, LocalPod, LocalPodKey, PolicyCtEntry, PolicyCtKey,
    PolicyEntry, PolicyKey, ReplyEntry, ReplyKey, Service, ServiceKey, Slot, SlotKey, SocketEntry, SocketKey,
};

#[map(name = "services")]
pub static SERVICES: HashMap<ServiceKey, Service> = HashMap::pinned(1, BPF_F_NO_PREALLOC);

#[map(name = "slots")]
pub static SLOTS: HashMap<SlotKey, Slot> = HashMap::pinned(1, BPF_F_NO_PREALLOC);

/// An array: a lookup is an addition, so that checking a connection's backend on every packet costs next to nothing.
#[map(name = "backends")]
pub static BACKENDS: Array<Backend> = Array::pinned(1, 0);

#[map(name = "ct")]
pub static CT: LruHashMap<CtKey, CtEntry> = LruHashMap::pinned(1, 0);

#[map(name = "ct_reply")]
pub static CT_REPLY: LruHashMap<ReplyKey, ReplyEntry> = LruHashMap::pinned(1, 0);

#[map(name = "affinity")]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityEntry> = LruHashMap::pinned(1, 0);

#[map(name = "sockets")]
pub static SOCKETS: LruHashMap<SocketKey, SocketEntry> = LruHashMap::pinned(1, 0);

#[map(name = "fragments")]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentEntry> = LruHashMap::pinned(1, 0);

#[map(name = "counters")]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(Counter::CAPACITY, 0);

#[map(name = "cluster_flows")]
pub static CLUSTER_FLOWS: PerCpuArray<u64> = PerCpuArray::pinned(CLUSTERS, 0);

/// What follows the prefix length in an ipcache key, in words.
pub type IpcacheRest = [u32; size_of::<IpcacheKey>() / 4 - 1];

/// By address, longest prefix first; see [`crate::ipcache`]. Load balancing needs no lookup in it, since a backend carries
/// its cluster.
#[map(name = "ipcache")]
pub static IPCACHE: LpmTrie<IpcacheRest, IpcacheEntry> = LpmTrie::pinned(1, 0);

#[map(name = "encryption")]
pub static ENCRYPTION: Array<Encryption> = Array::pinned(1, 0);

#[map(name = "local_pods")]
pub static LOCAL_PODS: HashMap<LocalPodKey, LocalPod> = HashMap::pinned(1, BPF_F_NO_PREALLOC);

#[map(name = "endpoints")]
pub static ENDPOINTS: HashMap<u32, Endpoint> = HashMap::pinned(1, BPF_F_NO_PREALLOC);

/// What follows the prefix length in a policy key.
pub type PolicyRest = [u8; size_of::<PolicyKey>() - 4];

/// One endpoint's rules. How many it has room for is up to user space, which makes these maps.
pub type Policy = btf_maps::LpmTrie<PolicyRest, PolicyEntry, 1>;

#[btf_map(name = "policies")]
pub static POLICIES: ArrayOfMaps<Policy, 1> = ArrayOfMaps::new();

#[map(name = "policy_epoch")]
pub static POLICY_EPOCH: Array<u32> = Array::pinned(1, 0);

#[map(name = "policy_ct")]
pub static POLICY_CT: LruHashMap<PolicyCtKey, PolicyCtEntry> = LruHashMap::pinned(1, 0);

#[map(name = "events")]
pub static EVENTS: RingBuf = RingBuf::pinned(4096, 0);

#[map(name = "event_budget")]
pub static EVENT_BUDGET: PerCpuArray<EventBudget> = PerCpuArray::pinned(1, 0);

/// How many events this CPU may still send.
#[repr(C)]
pub struct EventBudget {
    /// Jiffies when it was filled up last.
    pub filled: u32,
    /// Of packets that were forwarded.
    pub forwarded: u32,
    /// Of packets that were dropped.
    pub dropped: u32,
}
