//! The TUN device: where packets of the machine come from and go to, many at a time.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use tun_rs::{DeviceBuilder, SyncDevice};

use super::vnet::VNET_HEADER;
use super::{DeviceError, DeviceOptions};

/// The most that one read yields: a header and the largest IP packet.
pub(crate) const FRAME_MAX: usize = VNET_HEADER + 65_536;

/// Packets that wait in one queue. A large segment counts as one.
const QUEUE_LENGTH: u32 = 1000;

/// Queues of each worker. The kernel spreads flows over them and the worker serves them in turn, so that a flow waits
/// behind few others and not behind the megabytes of a bulk transfer: a TUN device has no queueing discipline that
/// could see to that, for it takes whatever it is given.
const QUEUES_EACH: usize = 8;

/// Queues that the kernel lets one device have.
const QUEUES_MAX: usize = 256;

/// An open device. It outlives the process (`IFF_PERSIST`): whoever opens it again finds the same interface index,
/// addresses and routes, so what redirects to it stays valid over a restart.
pub(crate) struct Tun {
    name: String,
    device: SyncDevice,
    queues: Vec<Queues>,
    /// Held while the device is open. A name in the abstract namespace, as network namespaces are apart in it.
    _lock: UnixListener,
}

/// The queues of one worker. Packets of one flow stay in one queue: that in which those of the other direction were
/// last written, if there are any.
pub(crate) struct Queues(Vec<Queue>);

/// One queue of the device.
pub(crate) struct Queue {
    file: File,
}

impl Tun {
    /// Opens the device, or makes it, with this many queues, and brings it up.
    ///
    /// # Errors
    /// Without `/dev/net/tun`, without the right to configure the network, or when another process has it.
    pub(crate) fn open(options: &DeviceOptions) -> Result<Self, DeviceError> {
        let name = &*options.name;
        let lock = lock(name)?;
        let device = DeviceBuilder::new()
            .name(name)
            .offload(true)
            .multi_queue(true)
            .mtu(options.mtu)
            .with(|more| {
                more.tx_queue_len(QUEUE_LENGTH);
            })
            .enable(false)
            .build_sync()
            .map_err(|source| DeviceError::tun(name, source))?;
        let tun = |source| DeviceError::tun(name, source);
        if !options.ephemeral {
            device.persist().map_err(tun)?;
        }
        // No link-local address: nobody answers neighbour discovery on the other side. As kernel WireGuard does.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode"), "1");
        let workers = options.workers.get();
        let each = (QUEUES_MAX / workers).clamp(1, QUEUES_EACH);
        let mut queues = (1..workers * each)
            .map(|_| Queue::new(&device.try_clone()?))
            .collect::<io::Result<Vec<_>>>()
            .map_err(tun)?;
        queues.push(Queue::new(&device).map_err(tun)?);
        let mut queues = queues.into_iter();
        let queues = (0..workers).map(|_| Queues(queues.by_ref().take(each).collect())).collect();
        device.enabled(true).map_err(tun)?;
        Ok(Self { name: name.to_owned(), device, queues, _lock: lock })
    }

    /// Name of the interface.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Index of the interface.
    pub(crate) fn index(&self) -> io::Result<u32> {
        self.device.if_index()
    }

    /// Whether UDP may be handed over in large segments (Linux 6.2).
    pub(crate) fn takes_udp_segments(&self) -> bool {
        self.device.udp_gso()
    }

    /// The queues of a worker.
    pub(crate) fn queues(&self, worker: usize) -> &Queues {
        &self.queues[worker]
    }
}

impl Queues {
    /// One after the other, always in the same order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Queue> {
        self.0.iter()
    }

    /// Gives a frame, header first, to the kernel. Frames of one flow come with the same number, and the kernel puts
    /// what goes the other way into the queue that this number leads to.
    pub(crate) fn write(&self, flow: usize, frame: &[IoSlice<'_>]) -> io::Result<()> {
        self.0[flow % self.0.len()].write(frame)
    }
}

impl Queue {
    fn new(device: &SyncDevice) -> io::Result<Self> {
        device.set_nonblocking(true)?;
        Ok(Self { file: File::from(device.as_fd().try_clone_to_owned()?) })
    }

    /// The next frame, header first: its length, or `None` when there is none now.
    ///
    /// # Errors
    /// When the interface was deleted (`EBADFD`).
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.file).read(buffer) {
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The frame is lost; the next may be good.
                Err(_) => return Ok(None),
            }
        }
    }

    fn write(&self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        loop {
            match (&self.file).write_vectored(frame) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Deletes the interface of a device that is not open. That there is none is fine.
///
/// # Errors
/// [`DeviceError::InUse`] while a process has it open, [`DeviceError::Delete`] when the kernel refuses.
pub async fn delete_interface(name: &str) -> Result<(), DeviceError> {
    let _lock = lock(name)?;
    let failed = |reason: String| DeviceError::Delete { name: name.to_owned(), reason };
    let Ok(index) = nix::net::if_::if_nametoindex(name) else { return Ok(()) };
    let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| failed(error.to_string()))?;
    tokio::spawn(connection);
    handle.link().del(index).execute().await.map_err(|error| failed(error.to_string()))
}

/// A device with several queues lets any number of processes in, each of which would get a part of the packets.
fn lock(name: &str) -> Result<UnixListener, DeviceError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => DeviceError::InUse { name: name.to_owned() },
        _ => DeviceError::tun(name, source),
    };
    let address = SocketAddr::from_abstract_name(format!("isthmus-wireguard/{name}")).map_err(failed)?;
    UnixListener::bind_addr(&address).map_err(failed)
}
