//! Loads the programs, creates their maps or takes over pinned ones.

use std::borrow::Cow;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use aya::programs::{CgroupSockAddr, Program, ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};
use isthmus_bpf_abi::{self as abi, maps};

use super::bpf_fs;
use super::error::DatapathError;
use super::map::Map;
use super::policy::{self, Policies};
use super::sys::AttachType;
use super::uninterrupted;
use super::{DatapathConfig, Features, MapSizes, Maps};

/// Names a file with another object than the one that is built in: for trying one that was just rebuilt.
pub const OBJECT_VARIABLE: &str = "ISTHMUS_BPF_OBJECT";

/// Flags of the agent that set the sizes of maps, for messages.
const SERVICES_FLAG: &str = "--bpf-map-services";
const BACKENDS_FLAG: &str = "--bpf-map-backends";
const IPCACHE_FLAG: &str = "--bpf-map-ipcache";

/// Of maps whose size is fixed.
const NO_FLAG: &str = "nothing: report this";

/// The object that the checked-in source builds to; see `cargo xtask bpf check`.
static OBJECT: &[u8] = include_bytes_aligned!("../../../bpf/isthmus.bpf.o");

/// Fragmented datagrams that are under way at a time.
const FRAGMENTS: u32 = 8192;

/// Addresses of pods of one node: many times what a kubelet starts.
const LOCAL_PODS: u32 = 16_384;

/// Size of the ring buffer of events, in bytes: a power of two.
const EVENT_BYTES: u32 = 1 << 20;

/// The socket programs and where each belongs.
pub(super) const SOCKET_PROGRAMS: [(&str, AttachType); 8] = [
    ("sock_connect4", AttachType::Connect4),
    ("sock_connect6", AttachType::Connect6),
    ("sock_sendmsg4", AttachType::Sendmsg4),
    ("sock_sendmsg6", AttachType::Sendmsg6),
    ("sock_recvmsg4", AttachType::Recvmsg4),
    ("sock_recvmsg6", AttachType::Recvmsg6),
    ("sock_getpeername4", AttachType::Getpeername4),
    ("sock_getpeername6", AttachType::Getpeername6),
];

/// The programs for packets.
pub(super) const PACKET_PROGRAMS: [&str; 5] =
    ["tc_from_pod", "tc_to_pod", "tc_from_wire", "tc_to_network", "tc_empty"];

/// The loaded programs. Dropping it leaves pinned maps and links, and so the traffic, alone.
pub(super) struct Loaded {
    pub(super) ebpf: Ebpf,
    pub(super) maps: Maps,
    pub(super) policies: Policies,
    pub(super) version_dir: PathBuf,
}

pub(super) fn load(config: &DatapathConfig) -> Result<Loaded, DatapathError> {
    raise_memlock();
    let version_dir = prepare_pins(&config.pin_dir, &config.sizes)?;
    let (object, origin) = object()?;
    let jiffies_per_second = jiffies_per_second();
    let detect = config.features == Features::Detect;
    let has_set_retval = u32::from(detect && kernel_is_at_least(5, 18));
    let has_csum_ipv6 = u32::from(detect && kernel_is_at_least(6, 16));
    let mut loader = EbpfLoader::new();
    loader
        .default_map_pin_directory(&version_dir)
        // A BTF map says nothing of pinning.
        .map_pin_path(maps::POLICIES, version_dir.join(maps::POLICIES))
        .override_global("JIFFIES_PER_SECOND", &jiffies_per_second, true)
        .override_global("HAS_SET_RETVAL", &has_set_retval, true)
        .override_global("HAS_CSUM_IPV6", &has_csum_ipv6, true)
        .override_global("EVENTS_PER_SECOND", &config.events_per_second, true);
    for (name, entries) in sizes(&config.sizes) {
        loader.map_max_entries(name, entries);
    }
    // Aya tries with small programs what the kernel can do: an interruption there would pass for a lack.
    let ebpf =
        uninterrupted::with_signals_blocked(|| load_programs(&mut loader, &object, origin.as_deref()))?;
    let maps = Maps {
        services: Map::open(&version_dir.join(maps::SERVICES), maps::SERVICES, SERVICES_FLAG)?,
        slots: Map::open(&version_dir.join(maps::SLOTS), maps::SLOTS, BACKENDS_FLAG)?,
        backends: Map::open(&version_dir.join(maps::BACKENDS), maps::BACKENDS, BACKENDS_FLAG)?,
        ipcache: Map::open(&version_dir.join(maps::IPCACHE), maps::IPCACHE, IPCACHE_FLAG)?,
        encryption: Map::open(&version_dir.join(maps::ENCRYPTION), maps::ENCRYPTION, NO_FLAG)?,
        local_pods: Map::open(&version_dir.join(maps::LOCAL_PODS), maps::LOCAL_PODS, NO_FLAG)?,
        counters: open_pinned(&version_dir, maps::COUNTERS)?,
        cluster_flows: open_pinned(&version_dir, maps::CLUSTER_FLOWS)?,
    };
    let policies = Policies::open(
        Map::open(&version_dir.join(maps::ENDPOINTS), maps::ENDPOINTS, policy::ENDPOINTS_FLAG)?,
        Map::open(&version_dir.join(maps::POLICY_EPOCH), maps::POLICY_EPOCH, policy::ENDPOINTS_FLAG)?,
        Map::open(&version_dir.join(maps::POLICY_CT), maps::POLICY_CT, policy::FLOWS_FLAG)?,
        open_pinned(&version_dir, maps::POLICIES)?,
        config.sizes.policy_entries,
    )?;
    Ok(Loaded { ebpf, maps, policies, version_dir })
}

fn load_programs(
    loader: &mut EbpfLoader<'_>,
    object: &[u8],
    origin: Option<&Path>,
) -> Result<Ebpf, DatapathError> {
    let mut ebpf = loader.load(object).map_err(|error| load_error(origin, error))?;
    for (name, _) in SOCKET_PROGRAMS {
        program::<CgroupSockAddr>(&mut ebpf, name)
            .and_then(|program| uninterrupted::load(|| program.load()))
            .map_err(|error| program_error(origin, name, error))?;
    }
    for name in PACKET_PROGRAMS {
        program::<SchedClassifier>(&mut ebpf, name)
            .and_then(|program| uninterrupted::load(|| program.load()))
            .map_err(|error| program_error(origin, name, error))?;
    }
    Ok(ebpf)
}

/// The program `name` as its own type.
pub(super) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, ProgramError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name).ok_or(ProgramError::UnexpectedProgramType)?.try_into()
}

/// A descriptor of a loaded program.
pub(super) fn program_fd(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd, DatapathError> {
    let kernel = |source| DatapathError::Kernel { what: format!("using program {name}"), source };
    let missing = || kernel(io::ErrorKind::NotFound.into());
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    let fd = program.fd().map_err(|_| missing())?;
    fd.as_fd().try_clone_to_owned().map_err(kernel)
}

fn open_pinned(dir: &Path, name: &'static str) -> Result<OwnedFd, DatapathError> {
    let path = dir.join(name);
    super::sys::pinned(&path)
        .map_err(|source| DatapathError::Kernel { what: format!("opening map {}", path.display()), source })
}

fn object() -> Result<(Cow<'static, [u8]>, Option<PathBuf>), DatapathError> {
    let Some(path) = std::env::var_os(OBJECT_VARIABLE).map(PathBuf::from) else {
        return Ok((Cow::Borrowed(OBJECT), None));
    };
    let bytes = fs::read(&path).map_err(|source| DatapathError::File { path: path.clone(), source })?;
    Ok((Cow::Owned(bytes), Some(path)))
}

fn sizes(sizes: &MapSizes) -> [(&'static str, u32); 14] {
    [
        (maps::SERVICES, sizes.services),
        (maps::SLOTS, sizes.backends),
        (maps::BACKENDS, sizes.backends),
        (maps::IPCACHE, sizes.ipcache),
        (maps::CT, sizes.flows),
        (maps::CT_REPLY, sizes.flows),
        (maps::AFFINITY, sizes.affinity),
        (maps::SOCKETS, sizes.sockets),
        (maps::FRAGMENTS, FRAGMENTS),
        (maps::LOCAL_PODS, LOCAL_PODS),
        // And one place for all that there is no room for.
        (maps::ENDPOINTS, sizes.endpoints.saturating_add(1)),
        (maps::POLICIES, sizes.endpoints.saturating_mul(2)),
        (maps::POLICY_CT, sizes.policy_flows),
        (maps::EVENTS, EVENT_BYTES),
    ]
}

/// Makes the directory for this version's maps. Another layout or other sizes have another directory: what old programs
/// still read stays as it is until new ones have taken their place.
fn prepare_pins(pin_dir: &Path, sizes: &MapSizes) -> Result<PathBuf, DatapathError> {
    let existing = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !bpf_fs::is(existing).map_err(|source| DatapathError::File { path: existing.to_owned(), source })? {
        return Err(DatapathError::NotBpffs { path: pin_dir.to_owned() });
    }
    let made = pin_dir.strip_prefix(existing).unwrap_or(pin_dir);
    if made.as_os_str().as_encoded_bytes().contains(&b'.') {
        return Err(DatapathError::DottedName { path: pin_dir.to_owned() });
    }
    let version_dir = pin_dir.join(version_name(sizes));
    for dir in [version_dir.clone(), pin_dir.join(super::links::LINKS)] {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|source| {
            match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    DatapathError::Permission { what: format!("making {}", dir.display()), source }
                }
                _ => DatapathError::File { path: dir, source },
            }
        })?;
    }
    Ok(version_dir)
}

/// Prefix of the directories that hold maps.
pub(super) const VERSION_PREFIX: &str = "maps-v";

fn version_name(sizes: &MapSizes) -> String {
    let layout: [usize; 14] = [
        size_of::<abi::Service>() + (size_of::<abi::ServiceKey>() << 16),
        size_of::<abi::Slot>() + (size_of::<abi::SlotKey>() << 16),
        size_of::<abi::Backend>(),
        size_of::<abi::IpcacheEntry>() + (size_of::<abi::IpcacheKey>() << 16),
        size_of::<abi::CtEntry>() + (size_of::<abi::CtKey>() << 16),
        size_of::<abi::ReplyEntry>() + (size_of::<abi::ReplyKey>() << 16),
        size_of::<abi::AffinityEntry>() + (size_of::<abi::AffinityKey>() << 16),
        size_of::<abi::SocketEntry>() + (size_of::<abi::SocketKey>() << 16),
        size_of::<abi::Encryption>(),
        size_of::<abi::LocalPod>() + (size_of::<abi::LocalPodKey>() << 16),
        size_of::<abi::Endpoint>(),
        size_of::<abi::PolicyEntry>() + (size_of::<abi::PolicyKey>() << 16),
        size_of::<abi::PolicyCtEntry>() + (size_of::<abi::PolicyCtKey>() << 16),
        size_of::<abi::PolicyEvent>(),
    ];
    let sizes = self::sizes(sizes).map(|(_, entries)| entries as usize);
    // FNV-1a: it must be the same in every build, which the standard hasher does not promise.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in layout.iter().chain(&sizes).flat_map(|word| word.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    format!("{VERSION_PREFIX}{}-{:08x}", abi::VERSION, (hash ^ (hash >> 32)) as u32)
}

/// By the release's first two numbers: a distribution that has carried a feature back gets the older way, which works
/// there too.
fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let Ok(name) = nix::sys::utsname::uname() else { return false };
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (major, minor)
}

/// The coarse clock ticks with jiffies.
fn jiffies_per_second() -> u32 {
    let resolution = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    match resolution.map(|time| time.tv_nsec()) {
        Ok(nanoseconds @ 1..=1_000_000_000) => (1_000_000_000 / nanoseconds) as u32,
        _ => 1000,
    }
}

/// Before 5.11 maps count against this limit. Without the right to raise it the kernel's refusal tells.
fn raise_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

fn load_error(origin: Option<&Path>, error: EbpfError) -> DatapathError {
    classify("loading the eBPF maps".to_owned(), &error, origin)
}

fn program_error(origin: Option<&Path>, name: &str, error: ProgramError) -> DatapathError {
    // The verifier refuses with the same errno as a lack of rights, but gives its reasons.
    if let ProgramError::LoadError { io_error, verifier_log } = &error
        && !verifier_log.to_string().is_empty()
    {
        let message = format!("loading program {name}: {io_error}: {verifier_log}");
        return DatapathError::Load { origin: origin.map(Path::to_owned), message };
    }
    classify(format!("loading program {name}"), &error, origin)
}

fn classify(what: String, error: &(dyn std::error::Error + 'static), origin: Option<&Path>) -> DatapathError {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::PermissionDenied
        {
            return DatapathError::Permission { what, source: io::Error::from(io.kind()) };
        }
        message = format!("{message}: {error}");
        cause = error.source();
    }
    DatapathError::Load { origin: origin.map(Path::to_owned), message: format!("{what}: {message}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_sizes_get_other_pins_and_the_same_sizes_the_same() {
        let sizes = MapSizes::default();
        assert_eq!(version_name(&sizes), version_name(&MapSizes::default()));
        assert_ne!(version_name(&sizes), version_name(&MapSizes { flows: 1, ..sizes }));
    }

    #[test]
    fn the_built_in_object_is_aligned_for_its_parser() {
        assert_eq!(OBJECT.as_ptr() as usize % 8, 0);
        assert_eq!(&OBJECT[..4], b"\x7fELF");
    }
}
