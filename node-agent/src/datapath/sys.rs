//! The `bpf(2)` commands that aya does not offer: batches on maps, links by file descriptor, test runs.
//!
//! Each takes a structure whose layout is a part of `union bpf_attr` (include/uapi/linux/bpf.h); the kernel takes
//! bytes beyond a shorter structure for zero.

#![expect(unsafe_code, reason = "system calls")]

use std::ffi::{CStr, CString};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The kernel's own "not supported", which libc does not know.
pub(super) const ENOTSUPP: i32 = 524;

const MAP_CREATE: u32 = 0;
const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const MAP_GET_NEXT_KEY: u32 = 4;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const PROG_TEST_RUN: u32 = 10;
const MAP_GET_FD_BY_ID: u32 = 14;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const MAP_LOOKUP_BATCH: u32 = 24;
const MAP_UPDATE_BATCH: u32 = 26;
const MAP_DELETE_BATCH: u32 = 27;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;
const LINK_DETACH: u32 = 34;

/// Where a link attaches to: the value of `enum bpf_attach_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum AttachType {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    TcxIngress = 46,
    TcxEgress = 47,
}

const MAP_TYPE_LPM_TRIE: u32 = 11;
/// Required of LPM tries.
const BPF_F_NO_PREALLOC: u32 = 1;

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

#[repr(C)]
struct MapElem {
    map_fd: u32,
    pad: u32,
    key: u64,
    value_or_next_key: u64,
    flags: u64,
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
struct Pin {
    pathname: u64,
    fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct InfoByFd {
    fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreate {
    program_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_program_fd: u32,
    flags: u32,
    old_program_fd: u32,
}

#[repr(C)]
struct TestRunAttr {
    program_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(super) struct MapInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

/// The beginning of `struct bpf_link_info`, for cgroup and TCX links.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(super) struct LinkInfo {
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) program_id: u32,
    pad: u32,
    /// The cgroup's id, or a TCX link's interface index (low half) and attach type (high half).
    union: u64,
    cgroup_attach_type: u32,
    pad2: u32,
}

impl LinkInfo {
    /// The cgroup that a cgroup link is attached to; zero after the cgroup is gone.
    pub(super) fn cgroup_id(&self) -> u64 {
        self.union
    }

    /// The interface that a TCX link is attached to; zero after the interface is gone.
    pub(super) fn ifindex(&self) -> u32 {
        self.union as u32
    }
}

/// What a program did with a test packet.
#[derive(Clone, Debug)]
pub struct TestRun {
    /// Its return value (`TC_ACT_*`).
    pub retval: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Its mark afterwards.
    pub mark: u32,
    /// Nanoseconds per run, averaged by the kernel over all.
    pub nanoseconds: u32,
}

pub(super) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(map)
}

pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(link)
}

/// Makes a map that nothing refers to. `name` has 15 bytes at most, letters, digits and underscores.
pub(super) fn create_lpm_trie(
    name: &CStr,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
) -> io::Result<OwnedFd> {
    let mut attr = MapCreate {
        kind: MAP_TYPE_LPM_TRIE,
        key_size,
        value_size,
        max_entries,
        flags: BPF_F_NO_PREALLOC,
        inner_map_fd: 0,
        numa_node: 0,
        name: [0; 16],
    };
    // The last byte stays zero.
    for (to, from) in attr.name[..15].iter_mut().zip(name.to_bytes()) {
        *to = *from;
    }
    bpf(MAP_CREATE, &mut attr).map(owned)
}

/// Opens a map by its id.
pub(super) fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = [id, 0, 0];
    bpf(MAP_GET_FD_BY_ID, &mut attr).map(owned)
}

/// Changes one entry; creates it if need be.
pub(super) fn update<K: Copy, V: Copy>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr =
        MapElem { map_fd: fd(map), pad: 0, key: pointer(key), value_or_next_key: pointer(value), flags: 0 };
    bpf(MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Deletes one entry; `NotFound` if there is none.
pub(super) fn delete<K: Copy>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut attr = MapElem { map_fd: fd(map), pad: 0, key: pointer(key), value_or_next_key: 0, flags: 0 };
    bpf(MAP_DELETE_ELEM, &mut attr).map(drop)
}

/// Reads one entry.
pub(super) fn lookup<K: Copy, V: Copy>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = MapElem {
        map_fd: fd(map),
        pad: 0,
        key: pointer(key),
        value_or_next_key: value.as_mut_ptr() as u64,
        flags: 0,
    };
    match bpf(MAP_LOOKUP_ELEM, &mut attr) {
        // SAFETY: the kernel has filled the value; callers' types are plain old data of the map's value size, which
        // is checked when the map is opened.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads one entry of a per-CPU map: a value per possible CPU.
pub(super) fn lookup_per_cpu(map: BorrowedFd<'_>, key: u32, values: &mut [u64]) -> io::Result<()> {
    let mut attr = MapElem {
        map_fd: fd(map),
        pad: 0,
        key: pointer(&key),
        value_or_next_key: values.as_mut_ptr() as u64,
        flags: 0,
    };
    bpf(MAP_LOOKUP_ELEM, &mut attr).map(drop)
}

/// The key after `key` in the map's own order, or the first.
pub(super) fn next_key<K: Copy>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = MaybeUninit::<K>::uninit();
    let mut attr = MapElem {
        map_fd: fd(map),
        pad: 0,
        key: key.map_or(0, pointer),
        value_or_next_key: next.as_mut_ptr() as u64,
        flags: 0,
    };
    match bpf(MAP_GET_NEXT_KEY, &mut attr) {
        // SAFETY: the kernel has filled the key.
        Ok(_) => Ok(Some(unsafe { next.assume_init() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Changes entries in one call. On error, the number that was changed before the one that failed.
pub(super) fn update_batch<K: Copy, V: Copy>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    debug_assert_eq!(keys.len(), values.len());
    let mut attr = batch(map, keys.as_ptr() as u64, values.as_ptr() as u64, keys.len());
    run_batch(MAP_UPDATE_BATCH, &mut attr, keys.len())
}

/// Deletes entries in one call. On error, the number that was deleted before the one that failed.
pub(super) fn delete_batch<K: Copy>(map: BorrowedFd<'_>, keys: &[K]) -> Result<(), (usize, io::Error)> {
    let mut attr = batch(map, keys.as_ptr() as u64, 0, keys.len());
    run_batch(MAP_DELETE_BATCH, &mut attr, keys.len())
}

/// Place in a map where the next batch begins: a bucket, or a key, as the map's type has it.
#[derive(Clone, Copy)]
pub(super) struct Cursor {
    bytes: [u8; 64],
}

/// Appends up to `keys.capacity()` entries. Returns where the next batch begins, or nothing at the end.
pub(super) fn lookup_batch<K: Copy, V: Copy>(
    map: BorrowedFd<'_>,
    from: Option<&Cursor>,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
) -> io::Result<Option<Cursor>> {
    const { assert!(size_of::<K>() <= size_of::<Cursor>()) };
    let room = keys.capacity().min(values.capacity());
    keys.clear();
    values.clear();
    let mut next = Cursor { bytes: [0; 64] };
    let mut attr = batch(map, keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64, room);
    attr.in_batch = from.map_or(0, |cursor| cursor.bytes.as_ptr() as u64);
    attr.out_batch = next.bytes.as_mut_ptr() as u64;
    let result = bpf(MAP_LOOKUP_BATCH, &mut attr);
    let more = match result {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    let count = (attr.count as usize).min(room);
    // SAFETY: the kernel has filled `count` keys and values, which is within the capacity.
    unsafe {
        keys.set_len(count);
        values.set_len(count);
    }
    Ok(more.then_some(next))
}

pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_string(path)?;
    let mut attr = Pin { pathname: path.as_ptr() as u64, fd: fd(object), file_flags: 0 };
    bpf(OBJ_PIN, &mut attr).map(drop)
}

/// Opens a pinned object.
pub(super) fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    let mut attr = Pin { pathname: path.as_ptr() as u64, fd: 0, file_flags: 0 };
    bpf(OBJ_GET, &mut attr).map(owned)
}

/// Attaches a program to a cgroup (by the directory's descriptor) or to an interface (by its index).
pub(super) fn create_link(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        program_fd: fd(program),
        target,
        attach_type: attach_type as u32,
        flags: 0,
        // No particular place among others.
        relative: 0,
        pad: 0,
        expected_revision: 0,
    };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

/// Exchanges a link's program, atomically: no packet and no connection passes without one.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate { link_fd: fd(link), new_program_fd: fd(program), flags: 0, old_program_fd: 0 };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link at once. Closing its last descriptor, or removing its pin, does so only some time later.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = fd(link);
    bpf(LINK_DETACH, &mut attr).map(drop)
}

/// What a test packet brings along besides its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PacketContext {
    /// `skb->mark`.
    pub mark: u32,
    /// Payload of each of the segments that it stands for, in bytes; 0 for a packet of its own.
    pub gso_size: u32,
    /// The interface whose program runs, in the calling thread's network namespace; 0 is the loopback.
    pub ifindex: u32,
    /// The interface that it has come to this node by; 0 if the node itself sends it.
    pub ingress_ifindex: u32,
}

/// `struct __sk_buff`, word by word, with room for what kernels add to it; what a test run may not set is zero.
type SkBuff = [u32; 64];
const SKB_MARK: usize = 2;
const SKB_INGRESS_IFINDEX: usize = 9;
const SKB_IFINDEX: usize = 10;
const SKB_GSO_SIZE: usize = 44;

/// Runs a TC program `repeat` times on one packet. The packet is not restored in between.
pub(super) fn test_run(
    program: BorrowedFd<'_>,
    packet: &[u8],
    context: PacketContext,
    repeat: u32,
) -> io::Result<TestRun> {
    let mut out = vec![0u8; packet.len() + 256];
    let mut before: SkBuff = [0; 64];
    before[SKB_MARK] = context.mark;
    before[SKB_INGRESS_IFINDEX] = context.ingress_ifindex;
    before[SKB_IFINDEX] = context.ifindex;
    before[SKB_GSO_SIZE] = context.gso_size;
    let mut after: SkBuff = [0; 64];
    let mut attr = TestRunAttr {
        program_fd: fd(program),
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        duration: 0,
        ctx_size_in: size_of::<SkBuff>() as u32,
        ctx_size_out: size_of::<SkBuff>() as u32,
        ctx_in: pointer(&before),
        ctx_out: (&raw mut after) as u64,
    };
    bpf(PROG_TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok(TestRun { retval: attr.retval, packet: out, mark: after[SKB_MARK], nanoseconds: attr.duration })
}

fn info<T: Copy + Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = InfoByFd { fd: fd(object), info_len: size_of::<T>() as u32, info: (&raw mut info) as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

fn batch(map: BorrowedFd<'_>, keys: u64, values: u64, count: usize) -> Batch {
    Batch {
        in_batch: 0,
        out_batch: 0,
        keys,
        values,
        count: count as u32,
        map_fd: fd(map),
        elem_flags: 0,
        flags: 0,
    }
}

fn run_batch(command: u32, attr: &mut Batch, asked: usize) -> Result<(), (usize, io::Error)> {
    // Where the command is not known at all the kernel leaves the count as it was given.
    match bpf(command, attr) {
        Ok(_) => Ok(()),
        Err(error) => {
            let done = attr.count as usize;
            Err((if done >= asked { 0 } else { done }, error))
        }
    }
}

fn bpf<T>(command: u32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is a live structure of this size, and every pointer in it comes from a live borrow of the
    // caller's with room for what the command reads or writes.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, (&raw mut *attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(descriptor: i64) -> OwnedFd {
    // SAFETY: the kernel has just returned this descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor as i32) }
}

fn fd(object: BorrowedFd<'_>) -> u32 {
    object.as_raw_fd() as u32
}

fn pointer<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}
