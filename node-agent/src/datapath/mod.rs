//! The kernel's side of the agent: loads the eBPF programs, attaches them, and changes and reads their maps.
//!
//! Everything is pinned below one directory of a BPF file system:
//!
//! ```text
//! <pin dir>/maps-v2-4f0c55aa/{services,slots,backends,ipcache,ct,...}   one directory per layout and sizes
//! <pin dir>/links/{sock_connect4,...,pod-<ifindex>-from-pod,...}         what is attached
//! ```
//!
//! So traffic flows on while no agent runs, and one that starts again finds its maps filled and exchanges the programs
//! in place. An agent with another layout, or other sizes, fills new maps first; the old programs and maps serve until
//! [`Datapath::attach_sockets`] and [`Datapath::attach_pod`] put the new ones in their place.
//!
//! The right order at start is therefore: [`Datapath::open`], read the dumps, bring the maps to the desired state with
//! [`Datapath::apply`], then attach, then [`Datapath::remove_older_maps`].

mod apply;
pub mod bpf_fs;
mod encryption;
mod error;
pub mod events;
mod links;
mod load;
mod map;
pub mod ops;
pub mod policy;
pub mod routing;
mod sys;
mod uninterrupted;

use std::fmt;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use aya::Ebpf;
use isthmus_bpf_abi::{
    Backend, CLUSTERS, Counter, Encryption, IpcacheEntry, IpcacheKey, LocalPod, LocalPodKey, Service,
    ServiceKey, Slot, SlotKey, maps,
};

pub use encryption::{EncryptionDevice, EncryptionMode};
pub use error::{DatapathError, OpError};
pub use events::Events;
pub use load::OBJECT_VARIABLE;
pub use ops::{MapOp, Phase, Target};
pub use policy::{AtFirst, EndpointSettings, Enforcement, PolicyError};
pub use sys::{PacketContext, TestRun};

use map::Map;
use policy::Policies;

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
    /// Pods of this node.
    pub endpoints: u32,
    /// Entries of one pod's policy. Another number needs no new maps.
    pub policy_entries: u32,
    /// Flows of pods with a policy. The least recently used give way.
    pub policy_flows: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            services: 65_536,
            backends: 262_144,
            ipcache: 512_000,
            flows: 131_072,
            sockets: 131_072,
            affinity: 65_536,
            endpoints: 2_048,
            policy_entries: 16_384,
            policy_flows: 262_144,
        }
    }
}

/// Which of the kernel's features are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Features {
    /// What this kernel has.
    #[default]
    Detect,
    /// Only what Linux 5.10 has: clsact filters instead of TCX, EPERM instead of ECONNREFUSED, a slower way for IPv6
    /// checksums. For kernels whose version number promises too much, and for tests.
    Floor,
}

/// What [`Datapath::open`] needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DatapathConfig {
    /// Directory on a BPF file system, made if it is not there. One agent at a time.
    pub pin_dir: PathBuf,
    /// Sizes of the maps. With other sizes than before the agent starts with empty maps beside the old ones.
    pub sizes: MapSizes,
    /// Which of the kernel's features are used.
    pub features: Features,
    /// How many packets that were dropped each CPU tells of per second, and how many new flows that were let through.
    pub events_per_second: u32,
}

impl DatapathConfig {
    /// The defaults, pinned below `pin_dir`.
    pub fn new(pin_dir: impl Into<PathBuf>) -> Self {
        Self {
            pin_dir: pin_dir.into(),
            sizes: MapSizes::default(),
            features: Features::default(),
            events_per_second: 1000,
        }
    }
}

/// A packet program, for [`Datapath::test_run`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PacketProgram {
    /// Packets that a pod sends.
    FromPod,
    /// Packets that a pod gets.
    ToPod,
    /// Does nothing.
    Empty,
}

/// The loaded programs and their maps. Dropping it detaches nothing.
pub struct Datapath {
    config: DatapathConfig,
    version_dir: PathBuf,
    maps: Maps,
    policies: Policies,
    reading: events::Reading,
    ebpf: Mutex<Ebpf>,
}

/// The maps that user space writes or reads.
#[derive(Debug)]
struct Maps {
    services: Map<ServiceKey, Service>,
    slots: Map<SlotKey, Slot>,
    backends: Map<u32, Backend>,
    ipcache: Map<IpcacheKey, IpcacheEntry>,
    encryption: Map<u32, Encryption>,
    local_pods: Map<LocalPodKey, LocalPod>,
    counters: OwnedFd,
    cluster_flows: OwnedFd,
}

impl Datapath {
    /// Loads the programs and creates their maps, or takes over those of an earlier run with the same layout and sizes.
    /// Attaches nothing, and changes nothing that is attached.
    ///
    /// # Errors
    /// The directory is not on a BPF file system, or the kernel refuses: see [`DatapathError`].
    pub fn open(config: DatapathConfig) -> Result<Self, DatapathError> {
        let load::Loaded { ebpf, maps, policies, version_dir } = load::load(&config)?;
        Ok(Self {
            config,
            version_dir,
            maps,
            policies,
            reading: events::Reading::default(),
            ebpf: Mutex::new(ebpf),
        })
    }

    /// Makes changes, in the order that [`ops`] explains and in batches. One result per operation, in the list's order.
    ///
    /// A change of the ipcache lets every flow be decided anew, if there are endpoints with policies.
    pub fn apply(&self, ops: &[MapOp]) -> Vec<Result<(), OpError>> {
        let mut results = apply::apply(&self.maps, ops);
        let is_ipcache = |op: &&MapOp| matches!(op.target(), Target::Ipcache(_));
        if let Some(changed) = ops.iter().position(|op| is_ipcache(&op))
            && let Err(error) = self.policies.decide_anew()
        {
            tracing::error!("flows go on by old identities until the next change: {error}");
            results[changed] = Err(OpError::Refused { map: maps::POLICY_EPOCH, errno: libc::EIO });
        }
        results
    }

    /// Attaches the socket programs to a cgroup2 directory, for every process below it, or gives new programs to what is
    /// attached there already.
    ///
    /// # Errors
    /// It is no cgroup2 directory, or the kernel refuses.
    pub fn attach_sockets(&self, cgroup: &Path) -> Result<(), DatapathError> {
        links::attach_sockets(&mut self.ebpf(), &self.config.pin_dir, cgroup)
    }

    /// Detaches the socket programs. Connections that were made stay with their backends.
    ///
    /// # Errors
    /// The pins cannot be removed.
    pub fn detach_sockets(&self) -> Result<(), DatapathError> {
        links::detach_sockets(&self.config.pin_dir)
    }

    /// Attaches the packet programs to the host's side of a pod's veth, given by its index in the calling thread's network
    /// namespace, or gives new programs to what is attached there already.
    ///
    /// # Errors
    /// There is no such interface, or the kernel refuses.
    pub fn attach_pod(&self, ifindex: u32) -> Result<(), DatapathError> {
        links::attach_pod(&mut self.ebpf(), &self.config.pin_dir, ifindex, self.config.features)
    }

    /// Detaches the packet programs. An interface that has gone has taken them along, which is no error.
    ///
    /// # Errors
    /// The pins cannot be removed.
    pub fn detach_pod(&self, ifindex: u32) -> Result<(), DatapathError> {
        links::detach_pod(&self.config.pin_dir, ifindex)
    }

    /// Interfaces with packet programs of this or an earlier run, so that a new agent can detach those of pods that left
    /// meanwhile.
    ///
    /// # Errors
    /// The pin directory cannot be read.
    pub fn attached_pods(&self) -> Result<Vec<u32>, DatapathError> {
        links::attached_pods(&self.config.pin_dir)
    }

    /// Removes the maps of other versions, after everything that is attached was attached anew.
    ///
    /// # Errors
    /// The pin directory cannot be read or changed.
    pub fn remove_older_maps(&self) -> Result<(), DatapathError> {
        let dir = &self.config.pin_dir;
        let file = |source| DatapathError::File { path: dir.clone(), source };
        for entry in fs::read_dir(dir).map_err(file)? {
            let path = entry.map_err(file)?.path();
            let ours = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes().starts_with(load::VERSION_PREFIX.as_bytes()));
            if ours && path != self.version_dir {
                fs::remove_dir_all(&path).map_err(|source| DatapathError::File { path, source })?;
            }
        }
        Ok(())
    }

    /// Detaches everything that is pinned below `pin_dir` and removes the pins: what uninstalling does. To be called in the
    /// network namespace of the interfaces.
    ///
    /// # Errors
    /// The directory cannot be removed.
    pub fn remove_pins(pin_dir: &Path) -> Result<(), DatapathError> {
        links::detach_all(pin_dir)?;
        match fs::remove_dir_all(pin_dir) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(DatapathError::File { path: pin_dir.to_owned(), source })
            }
            _ => Ok(()),
        }
    }

    /// All frontends.
    ///
    /// # Errors
    /// The map cannot be read; so with all dumps.
    pub fn services(&self) -> Result<Vec<(ServiceKey, Service)>, DatapathError> {
        self.maps.services.entries()
    }

    /// All slots.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn slots(&self) -> Result<Vec<(SlotKey, Slot)>, DatapathError> {
        self.maps.slots.entries()
    }

    /// All backend records in use, with their ids.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn backends(&self) -> Result<Vec<(u32, Backend)>, DatapathError> {
        let mut entries = self.maps.backends.entries()?;
        entries.retain(|(_, backend)| backend.is_used());
        Ok(entries)
    }

    /// All of the ipcache.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn ipcache(&self) -> Result<Vec<(IpcacheKey, IpcacheEntry)>, DatapathError> {
        self.maps.ipcache.entries()
    }

    /// What the ipcache says of an address: the entry with the longest prefix.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn ipcache_lookup(&self, addr: std::net::IpAddr) -> Result<Option<IpcacheEntry>, DatapathError> {
        self.maps.ipcache.value(&IpcacheKey::host(addr))
    }

    /// Sizes of the maps.
    pub fn sizes(&self) -> MapSizes {
        self.config.sizes
    }

    /// Counters of the datapath since the maps were made, all CPUs together.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, DatapathError> {
        let mut values = per_cpu_values();
        Counter::ALL
            .into_iter()
            .map(|counter| Ok((counter, sum(&self.maps.counters, counter as u32, &mut values)?)))
            .collect()
    }

    /// Flows sent to backends of each cluster since the maps were made; clusters without any are left out. Cluster 0 is
    /// the own one.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn cluster_flows(&self) -> Result<Vec<(u16, u64)>, DatapathError> {
        let mut values = per_cpu_values();
        let mut flows = Vec::new();
        for cluster in 0..CLUSTERS {
            let count = sum(&self.maps.cluster_flows, cluster, &mut values)?;
            if count != 0 {
                flows.push((cluster as u16, count));
            }
        }
        Ok(flows)
    }

    /// Runs a packet program `repeat` times on an Ethernet frame, for tests and benchmarks. The frame is not restored
    /// between the runs.
    ///
    /// # Errors
    /// The kernel refuses the frame (it must have 14 bytes at least).
    pub fn test_run(
        &self,
        program: PacketProgram,
        packet: &[u8],
        repeat: u32,
    ) -> Result<TestRun, DatapathError> {
        self.test_run_in(program, packet, PacketContext::default(), repeat)
    }

    /// The same for a frame that brings along more than its bytes.
    ///
    /// # Errors
    /// As [`Datapath::test_run`].
    pub fn test_run_in(
        &self,
        program: PacketProgram,
        packet: &[u8],
        context: PacketContext,
        repeat: u32,
    ) -> Result<TestRun, DatapathError> {
        let name = match program {
            PacketProgram::FromPod => "tc_from_pod",
            PacketProgram::ToPod => "tc_to_pod",
            PacketProgram::Empty => "tc_empty",
        };
        let fd = load::program_fd(&mut self.ebpf(), name)?;
        // The kernel gives up many runs at a pending signal, and says nothing of those that were made.
        uninterrupted::with_signals_blocked(|| sys::test_run(fd.as_fd(), packet, context, repeat))
            .map_err(|source| DatapathError::Kernel { what: format!("a test run of {name}"), source })
    }

    fn ebpf(&self) -> std::sync::MutexGuard<'_, Ebpf> {
        // A panic in between leaves nothing half done that matters: the kernel holds the state.
        self.ebpf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath").field("config", &self.config).finish_non_exhaustive()
    }
}

fn per_cpu_values() -> Vec<u64> {
    // Where the number is not to be had, more than any machine has: the kernel fills what it needs.
    vec![0; aya::util::nr_cpus().unwrap_or(8192)]
}

fn sum(map: &OwnedFd, index: u32, values: &mut [u64]) -> Result<u64, DatapathError> {
    sys::lookup_per_cpu(map.as_fd(), index, values)
        .map_err(|source| DatapathError::Kernel { what: "reading the counters".to_owned(), source })?;
    Ok(values.iter().fold(0, |sum, value| sum.wrapping_add(*value)))
}
