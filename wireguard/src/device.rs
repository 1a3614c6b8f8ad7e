//! A WireGuard device in user space: the protocol is boringtun's `Tunn`, the way of the packets is ours.
//!
//! ```text
//! TUN queue ─▶ outbound: cut (gso) ─▶ owner of the destination (table) ─▶ encrypt (peer, lane) ─▶ UDP, in batches
//! TUN queue ◀─ inbound:  join (gro) ◀─ owner of the source? (table)   ◀─ decrypt (peer, lane) ◀─ UDP, in batches
//!                                  handshake thread: handshakes, timers
//! ```
//!
//! Each worker is one thread with some queues of the TUN device and one pair of sockets, both ways. The kernel keeps the
//! packets of a flow in one queue and the datagrams of a peer in one socket, and whoever sends to a peer holds it
//! until the datagrams are sent, so that the order in which they are numbered is the order in which they leave.
//!
//! Once a session stands nothing is allocated for a packet.

mod checksum;
mod configure;
mod counters;
#[doc(hidden)]
pub mod fuzzing;
mod gro;
mod gso;
mod handshakes;
mod identity;
mod inbound;
mod inbox;
mod lane;
mod limiter;
mod outbound;
#[cfg(test)]
mod paper;
mod peer;
mod shared;
mod table;
#[cfg(test)]
mod testing;
mod tun;
mod udp;
mod vnet;
mod worker;

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

pub use counters::Count;
use handshakes::HandshakeThread;
pub use lane::MessageBounds;
use shared::Shared;
use tun::Tun;
pub use tun::delete_interface;
use udp::Sockets;
use worker::Worker;

/// How a device is opened.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// Name of the interface, at most 15 bytes.
    pub name: String,
    /// MTU of the interface: that of the network minus 80 leaves room for what encryption adds.
    pub mtu: u16,
    /// Threads for packets; one more does handshakes.
    pub workers: NonZeroUsize,
    /// Whether the interface goes when the device is closed. Otherwise whoever opens a device of this name next gets
    /// the same interface, with its index.
    pub ephemeral: bool,
    /// How many messages one session may encrypt.
    pub bounds: MessageBounds,
}

impl DeviceOptions {
    /// One worker, an interface that stays, and the protocol's own bounds.
    pub fn new(name: &str, mtu: u16) -> Self {
        Self {
            name: name.to_owned(),
            mtu,
            workers: NonZeroUsize::MIN,
            ephemeral: false,
            bounds: MessageBounds::PAPER,
        }
    }
}

/// An open device. It stops when dropped.
pub struct Device {
    shared: Arc<Shared>,
    wakes: Vec<Arc<EventFd>>,
    threads: Vec<JoinHandle<()>>,
    /// One configuration at a time.
    configuration: Mutex<configure::Configuration>,
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The TUN device could not be made.
    #[error("interface {name}: {advice}: {source}")]
    Tun {
        /// Its name.
        name: String,
        /// What to do.
        advice: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process has it.
    #[error(
        "interface {name} is in use by another isthmus-wireguard; end that one first, or choose another name with --interface"
    )]
    InUse {
        /// Its name.
        name: String,
    },
    /// A name the kernel does not allow.
    #[error(
        "`{0}` cannot be the name of an interface: 1 to 15 bytes, without spaces, slashes and percent signs"
    )]
    BadName(String),
    /// The interface could not be deleted.
    #[error("interface {name} cannot be deleted: {reason}")]
    Delete {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// No sockets.
    #[error("no UDP socket could be opened: {0}")]
    Socket(#[source] io::Error),
    /// No threads.
    #[error("a thread could not be started: {0}")]
    Thread(#[source] io::Error),
}

impl DeviceError {
    fn tun(name: &str, source: io::Error) -> Self {
        let advice = match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                "not allowed to make it; the process needs CAP_NET_ADMIN and access to /dev/net/tun"
            }
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "there is no /dev/net/tun; load the kernel's module `tun`, or give the container that device"
            }
            Some(libc::EINVAL) => {
                "there is an interface of that name that is no TUN device with several queues; delete it or choose another name with --interface"
            }
            Some(libc::EBUSY) => {
                "another process has it; end that one, or choose another name with --interface"
            }
            _ => "it could not be made",
        };
        Self::Tun { name: name.to_owned(), advice, source }
    }
}

impl Device {
    /// Opens the interface, a free UDP port, and starts to work. Without a key and peers it drops everything.
    ///
    /// # Errors
    /// [`DeviceError`] says what is missing.
    pub fn open(options: &DeviceOptions) -> Result<Self, DeviceError> {
        if !is_interface_name(&options.name) {
            return Err(DeviceError::BadName(options.name.clone()));
        }
        let workers = options.workers.get();
        let tun = Tun::open(options)?;
        let sockets = Sockets::open(0, workers, 0).map_err(DeviceError::Socket)?;
        let shared = Arc::new(Shared::new(tun, usize::from(options.mtu), sockets, options.bounds));
        let mut device =
            Self { shared, wakes: Vec::new(), threads: Vec::new(), configuration: Mutex::default() };
        for number in 0..workers {
            let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| DeviceError::Thread(errno.into()))?;
            let wake = Arc::new(wake);
            device.wakes.push(Arc::clone(&wake));
            let worker =
                Worker::new(Arc::clone(&device.shared), number, wake).map_err(DeviceError::Thread)?;
            let shared = Arc::clone(&device.shared);
            device.start(format!("packets-{number}"), move || {
                if let Err(error) = worker.run() {
                    tracing::error!(%error, worker = number, "packet worker ended; was the interface deleted?");
                    shared.broken.cancel();
                }
            })?;
        }
        let handshakes = HandshakeThread::new(Arc::clone(&device.shared));
        device.start("handshakes".to_owned(), move || handshakes.run())?;
        Ok(device)
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        self.shared.tun.name()
    }

    /// Index of the interface.
    ///
    /// # Errors
    /// When the interface was deleted.
    pub fn interface_index(&self) -> io::Result<u32> {
        self.shared.tun.index()
    }

    /// Cancelled when the device cannot go on, because its interface was deleted. It is to be dropped then.
    pub fn broken(&self) -> CancellationToken {
        self.shared.broken.clone()
    }

    /// How often this happened since the device was opened.
    pub fn count(&self, what: Count) -> u64 {
        self.shared.counters.read(what)
    }

    /// How many peers there are.
    pub fn peer_count(&self) -> usize {
        self.shared.table.peer_count()
    }

    fn start(&mut self, name: String, work: impl FnOnce() + Send + 'static) -> Result<(), DeviceError> {
        let thread = std::thread::Builder::new().name(name).spawn(work).map_err(DeviceError::Thread)?;
        self.threads.push(thread);
        Ok(())
    }

    fn wake_workers(&self) {
        for wake in &self.wakes {
            // It fails only when it is awake many times over already.
            let _ = wake.write(1);
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake_workers();
        self.shared.inbox.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.forget_peers();
    }
}

fn is_interface_name(name: &str) -> bool {
    (1..16).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.bytes().any(|byte| byte.is_ascii_whitespace() || matches!(byte, b'/' | b'%' | b':' | 0))
}
