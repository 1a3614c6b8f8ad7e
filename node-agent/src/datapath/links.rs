//! Attaching: to a cgroup for sockets, to both sides of a veth for packets. What is attached is pinned, and outlives the
//! agent. What is already attached gets the new program in place of the old one, atomically.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::Link as _;
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{SchedClassifier, TcAttachType, tc};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::Features;
use super::error::DatapathError;
use super::load::{SOCKET_PROGRAMS, program, program_fd};
use super::sys::{self, AttachType};

/// Directory of the pinned links, beside those of the maps: links outlive a change of layout.
pub(super) const LINKS: &str = "links";

/// Place among the filters of an interface, and name there, with which ours is known again.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x1571);

/// A program on one side of an interface: the name in its pin, the program, and the side.
type Side = (&'static str, &'static str, AttachType, TcAttachType);

/// The two sides of a pod's veth.
const SIDES: [Side; 2] = [
    ("from-pod", "tc_from_pod", AttachType::TcxIngress, TcAttachType::Ingress),
    ("to-pod", "tc_to_pod", AttachType::TcxEgress, TcAttachType::Egress),
];

/// The side of the encryption device by which packets come in.
const FROM_WIRE: Side = ("from-wire", "tc_from_wire", AttachType::TcxIngress, TcAttachType::Ingress);

/// The side of the node's own interfaces by which packets leave it.
const TO_NETWORK: Side = ("to-network", "tc_to_network", AttachType::TcxEgress, TcAttachType::Egress);

/// Attaches all socket programs to the cgroup at `dir`, for every process below it.
pub(super) fn attach_sockets(ebpf: &mut Ebpf, pin_dir: &Path, dir: &Path) -> Result<(), DatapathError> {
    let (cgroup, id) = open_cgroup(dir)?;
    for (name, attach_type) in SOCKET_PROGRAMS {
        let program = program_fd(ebpf, name)?;
        let pin = pin_dir.join(LINKS).join(name);
        let what = || format!("attaching {name} to {}", dir.display());
        let attached = open_link(&pin).filter(|link| matches!(link_cgroup(link), Some(at) if at == id));
        match attached {
            Some(link) => sys::update_link(link.as_fd(), program.as_fd()),
            None => sys::create_link(program.as_fd(), cgroup.as_raw_fd() as u32, attach_type)
                .and_then(|link| pin_link(link.as_fd(), &pin)),
        }
        .map_err(|source| attach_error(what(), source))?;
    }
    Ok(())
}

/// Detaches the socket programs.
pub(super) fn detach_sockets(pin_dir: &Path) -> Result<(), DatapathError> {
    SOCKET_PROGRAMS.iter().try_for_each(|(name, _)| detach(&pin_dir.join(LINKS).join(name)))
}

/// Attaches both packet programs to the interface.
pub(super) fn attach_pod(
    ebpf: &mut Ebpf,
    pin_dir: &Path,
    ifindex: u32,
    features: Features,
) -> Result<(), DatapathError> {
    SIDES.into_iter().try_for_each(|side| attach_side(ebpf, pin_dir, ifindex, POD_PINS, side, features))
}

/// Detaches both packet programs. That the interface is gone, and they with it, is no error.
pub(super) fn detach_pod(pin_dir: &Path, ifindex: u32) -> Result<(), DatapathError> {
    SIDES.into_iter().try_for_each(|side| detach_side(pin_dir, ifindex, POD_PINS, side))
}

/// Attaches the program for decrypted packets to the encryption device, and detaches it from any former one.
pub(super) fn attach_device(
    ebpf: &mut Ebpf,
    pin_dir: &Path,
    ifindex: u32,
    features: Features,
) -> Result<(), DatapathError> {
    attach_side(ebpf, pin_dir, ifindex, DEVICE_PINS, FROM_WIRE, features)?;
    detach_devices(pin_dir, Some(ifindex))
}

/// Detaches from every encryption device but `except`.
pub(super) fn detach_devices(pin_dir: &Path, except: Option<u32>) -> Result<(), DatapathError> {
    let mut devices: Vec<u32> =
        pins(pin_dir, DEVICE_PINS, &[FROM_WIRE])?.into_iter().map(|(_, _, ifindex)| ifindex).collect();
    devices.retain(|ifindex| Some(*ifindex) != except);
    devices.into_iter().try_for_each(|ifindex| detach_side(pin_dir, ifindex, DEVICE_PINS, FROM_WIRE))
}

/// Attaches the program for what leaves the node to these interfaces, and detaches it from all others.
pub(super) fn attach_networks(
    ebpf: &mut Ebpf,
    pin_dir: &Path,
    interfaces: &[u32],
    features: Features,
) -> Result<(), DatapathError> {
    for ifindex in interfaces {
        attach_side(ebpf, pin_dir, *ifindex, NETWORK_PINS, TO_NETWORK, features)?;
    }
    detach_networks(pin_dir, interfaces)
}

/// Detaches it from all interfaces but `except`.
pub(super) fn detach_networks(pin_dir: &Path, except: &[u32]) -> Result<(), DatapathError> {
    for (_, _, ifindex) in pins(pin_dir, NETWORK_PINS, &[TO_NETWORK])? {
        if !except.contains(&ifindex) {
            detach_side(pin_dir, ifindex, NETWORK_PINS, TO_NETWORK)?;
        }
    }
    Ok(())
}

fn attach_side(
    ebpf: &mut Ebpf,
    pin_dir: &Path,
    ifindex: u32,
    pins: Pins,
    (side, name, attach_type, tc_type): Side,
    features: Features,
) -> Result<(), DatapathError> {
    let what = || format!("attaching {name} to interface {ifindex}");
    if features == Features::Detect {
        let program = program_fd(ebpf, name)?;
        let pin = pins.link(pin_dir, ifindex, side);
        match attach_tcx(program.as_fd(), &pin, ifindex, attach_type) {
            Ok(()) => return Ok(()),
            // The kernel does not know TCX (6.6).
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(attach_error(what(), error)),
        }
    }
    let marker = pins.filter(pin_dir, ifindex, side);
    attach_clsact(ebpf, name, ifindex, tc_type, &marker).map_err(|source| attach_error(what(), source))
}

fn detach_side(
    pin_dir: &Path,
    ifindex: u32,
    pins: Pins,
    (side, _, _, tc_type): Side,
) -> Result<(), DatapathError> {
    detach(&pins.link(pin_dir, ifindex, side))?;
    let marker = pins.filter(pin_dir, ifindex, side);
    if marker.exists() {
        detach_clsact(ifindex, tc_type);
        detach(&marker)?;
    }
    Ok(())
}

/// Detaches all that is pinned.
pub(super) fn detach_all(pin_dir: &Path) -> Result<(), DatapathError> {
    if !pin_dir.join(LINKS).exists() {
        return Ok(());
    }
    detach_sockets(pin_dir)?;
    detach_devices(pin_dir, None)?;
    detach_networks(pin_dir, &[])?;
    attached_pods(pin_dir)?.into_iter().try_for_each(|ifindex| detach_pod(pin_dir, ifindex))
}

/// Interfaces that packet programs of ours are attached to. Pins of interfaces that have gone are removed.
pub(super) fn attached_pods(pin_dir: &Path) -> Result<Vec<u32>, DatapathError> {
    let mut pods = Vec::new();
    for (path, is_link, ifindex) in pins(pin_dir, POD_PINS, &SIDES)? {
        let there = match is_link {
            true => open_link(&path)
                .and_then(|link| sys::link_info(link.as_fd()).ok())
                .is_some_and(|info| info.ifindex() == ifindex),
            false => interface_name(ifindex).is_ok(),
        };
        if there { pods.push(ifindex) } else { detach(&path)? }
    }
    pods.sort_unstable();
    pods.dedup();
    Ok(pods)
}

/// The pins of one kind of interface: where each is, whether it is a link (or else marks a filter), and its interface.
fn pins(pin_dir: &Path, kind: Pins, sides: &[Side]) -> Result<Vec<(PathBuf, bool, u32)>, DatapathError> {
    let dir = pin_dir.join(LINKS);
    let file = |source| DatapathError::File { path: dir.clone(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(&dir).map_err(file)? {
        let entry = entry.map_err(file)?;
        if let Some((is_link, ifindex)) = entry.file_name().to_str().and_then(|name| kind.read(name, sides)) {
            found.push((entry.path(), is_link, ifindex));
        }
    }
    Ok(found)
}

fn attach_tcx(program: BorrowedFd<'_>, pin: &Path, ifindex: u32, attach_type: AttachType) -> io::Result<()> {
    if let Some(link) = open_link(pin)
        // An index is given to another interface when the first has gone.
        && sys::link_info(link.as_fd()).is_ok_and(|info| info.ifindex() == ifindex)
    {
        return sys::update_link(link.as_fd(), program);
    }
    let link = sys::create_link(program, ifindex, attach_type)?;
    pin_link(link.as_fd(), pin)
}

/// Filters of the clsact qdisc belong to the interface, and stay without a pin. What is pinned, the program, only marks that
/// there is one.
fn attach_clsact(
    ebpf: &mut Ebpf,
    name: &str,
    ifindex: u32,
    tc_type: TcAttachType,
    marker: &Path,
) -> io::Result<()> {
    let interface = interface_name(ifindex)?;
    // It may be there already: the CNI's, or ours.
    let qdisc = tc::qdisc_add_clsact(&interface);
    let program: &mut SchedClassifier = program(ebpf, name).map_err(io::Error::other)?;
    let ours = SchedClassifierLink::attached(&interface, tc_type, PRIORITY, HANDLE, None)?;
    // Exchanges the program of a filter of an earlier run; there is none if this fails.
    let id = match program.attach_to_link(ours) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program
                .attach_with_options(&interface, tc_type, TcAttachOptions::Netlink(options))
                .map_err(|error| io::Error::other(format!("{error} (adding clsact: {qdisc:?})")))?
        }
    };
    let link = program.take_link(id).map_err(io::Error::other)?;
    // Dropping it would detach.
    std::mem::forget(link);
    let program = program_fd(ebpf, name).map_err(io::Error::other)?;
    pin_link(program.as_fd(), marker)
}

/// Fails when there is no such filter, or no interface any more, which is as well.
fn detach_clsact(ifindex: u32, tc_type: TcAttachType) {
    if let Ok(interface) = interface_name(ifindex)
        && let Ok(link) = SchedClassifierLink::attached(&interface, tc_type, PRIORITY, HANDLE, None)
    {
        let _ = link.detach();
    }
}

fn pin_link(link: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    // What stands there belongs to an interface or cgroup that is gone, or to one that is no longer ours.
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::pin(link, pin)
}

/// Detaches a pinned link and removes the pin.
fn detach(pin: &Path) -> Result<(), DatapathError> {
    if let Some(link) = open_link(pin) {
        // Fails when what it was attached to is gone, which is as well.
        let _ = sys::detach_link(link.as_fd());
    }
    match fs::remove_file(pin) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::File { path: pin.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn open_link(pin: &Path) -> Option<OwnedFd> {
    sys::pinned(pin).ok()
}

fn link_cgroup(link: &OwnedFd) -> Option<u64> {
    sys::link_info(link.as_fd()).ok().map(|info| info.cgroup_id())
}

/// The directory and the cgroup's id, which is its inode number.
fn open_cgroup(dir: &Path) -> Result<(File, u64), DatapathError> {
    let file = |source| DatapathError::File { path: dir.to_owned(), source };
    let opened = File::open(dir).map_err(file)?;
    let kind = statfs(dir).map_err(|error| file(error.into()))?.filesystem_type();
    if kind != CGROUP2_SUPER_MAGIC {
        return Err(DatapathError::NotCgroup2 { path: dir.to_owned() });
    }
    let id = opened.metadata().map_err(file)?.ino();
    Ok((opened, id))
}

/// Names of the pins of one kind of interface: of links, and of marks of filters.
#[derive(Clone, Copy)]
struct Pins {
    link: &'static str,
    filter: &'static str,
}

const POD_PINS: Pins = Pins { link: "pod", filter: "filter" };
const DEVICE_PINS: Pins = Pins { link: "device", filter: "devicefilter" };
const NETWORK_PINS: Pins = Pins { link: "network", filter: "networkfilter" };

impl Pins {
    fn link(self, pin_dir: &Path, ifindex: u32, side: &str) -> PathBuf {
        pin_dir.join(LINKS).join(format!("{}-{ifindex}-{side}", self.link))
    }

    fn filter(self, pin_dir: &Path, ifindex: u32, side: &str) -> PathBuf {
        pin_dir.join(LINKS).join(format!("{}-{ifindex}-{side}", self.filter))
    }

    /// Whether it is a link, and the interface.
    fn read(self, name: &str, sides: &[Side]) -> Option<(bool, u32)> {
        let (kind, rest) = name.split_once('-')?;
        let (ifindex, side) = rest.split_once('-')?;
        let ours =
            (kind == self.link || kind == self.filter) && sides.iter().any(|(known, ..)| *known == side);
        Some((kind == self.link, ifindex.parse().ok().filter(|_| ours)?))
    }
}

fn interface_name(ifindex: u32) -> io::Result<String> {
    let name = nix::net::if_::if_indextoname(ifindex)?;
    // nix 0.31 takes the null pointer of an index that is gone for an empty name.
    if name.is_empty() {
        return Err(io::ErrorKind::NotFound.into());
    }
    name.into_string().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn attach_error(what: String, source: io::Error) -> DatapathError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => DatapathError::Permission { what, source },
        Some(libc::EINVAL | libc::EOPNOTSUPP | sys::ENOTSUPP) => {
            let release = nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default();
            DatapathError::Unsupported { what, release, source }
        }
        _ => DatapathError::Kernel { what, source },
    }
}
