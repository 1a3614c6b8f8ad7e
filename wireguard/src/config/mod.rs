//! What is said to a WireGuard device and what it says about itself, whichever device it is: ours, another one in user
//! space, or the kernel's.
//!
//! The shape follows WireGuard's own configuration protocol: an update names what changes and leaves the rest alone.

mod key;

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::SystemTime;

use ipnet::IpNet;

pub(crate) use key::parse_hex_key;
pub use key::{KEY_LENGTH, KeyError, PresharedKey, PrivateKey, PublicKey};

/// One change to a value that can also be absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Change<T> {
    /// As it was.
    #[default]
    Keep,
    /// No value from now on.
    Clear,
    /// This value from now on.
    Set(T),
}

impl<T> Change<T> {
    /// What the value is after this change, when it was `before`.
    pub fn apply_to(self, before: &mut Option<T>) {
        match self {
            Self::Keep => {}
            Self::Clear => *before = None,
            Self::Set(value) => *before = Some(value),
        }
    }

    /// Whether this says anything.
    pub fn is_change(&self) -> bool {
        !matches!(self, Self::Keep)
    }
}

/// A change to a device. `DeviceUpdate::default()` changes nothing.
///
/// The device's own values are applied first, then the peers in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceUpdate {
    /// The key this device is known by. Cleared: the device neither begins nor answers a handshake.
    pub private_key: Change<PrivateKey>,
    /// A second key under which handshakes are answered, and begun, while the first is being replaced.
    /// Devices other than ours do not have it.
    pub next_private_key: Change<PrivateKey>,
    /// UDP port, the same on IPv4 and IPv6. 0: any free one.
    pub listen_port: Option<u16>,
    /// `SO_MARK` of the datagrams the device sends. 0: none.
    pub fwmark: Option<u32>,
    /// Peers that `peers` does not name are removed.
    pub replace_peers: bool,
    /// Changes to peers. A key may occur more than once: the later one then adds to the earlier.
    pub peers: Vec<PeerUpdate>,
}

/// A change to one peer, or a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerUpdate {
    /// Names the peer.
    pub public_key: PublicKey,
    /// The peer goes, with all it owns; the rest of this update is then of no account.
    pub remove: bool,
    /// Nothing happens when there is no such peer.
    pub update_only: bool,
    /// A symmetric key mixed into each handshake.
    pub preshared_key: Change<PresharedKey>,
    /// Where datagrams go until the peer shows itself elsewhere.
    pub endpoint: Option<SocketAddr>,
    /// Seconds of silence after which an empty packet is sent. 0: never.
    pub persistent_keepalive: Option<u16>,
    /// Prefixes that `allowed_ips` does not name are taken from this peer.
    pub replace_allowed_ips: bool,
    /// Prefixes that this peer gains or loses. A prefix has one owner: gaining it takes it from another.
    pub allowed_ips: Vec<AllowedIp>,
    /// The peer this one takes over from: until that one is removed both may send from this one's prefixes.
    /// Devices other than ours do not have it.
    pub successor_of: Option<PublicKey>,
}

impl PeerUpdate {
    /// An update of this peer that changes nothing yet (but makes the peer, if there is none).
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: Change::Keep,
            endpoint: None,
            persistent_keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
            successor_of: None,
        }
    }

    /// An update that removes this peer.
    pub fn removal(public_key: PublicKey) -> Self {
        Self { remove: true, ..Self::new(public_key) }
    }
}

/// A prefix that a peer gains or loses. The bits behind the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AllowedIp {
    /// The peer owns it from now on.
    Add(IpNet),
    /// The peer owns it no more; nothing happens when it did not. Kernels before 6.16 do not know this.
    Remove(IpNet),
}

/// What a device says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The key this device is known by.
    pub private_key: Option<PrivateKey>,
    /// The second key; of our device only.
    pub next_private_key: Option<PrivateKey>,
    /// UDP port that is listened on; 0 when none is.
    pub listen_port: u16,
    /// `SO_MARK` of the datagrams sent; 0 when there is none.
    pub fwmark: u32,
    /// In no order.
    pub peers: Vec<PeerState>,
}

impl DeviceState {
    /// The peer with this key.
    pub fn peer(&self, public_key: &PublicKey) -> Option<&PeerState> {
        self.peers.iter().find(|peer| peer.public_key == *public_key)
    }
}

/// What a device says about one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerState {
    /// Names the peer.
    pub public_key: PublicKey,
    /// A symmetric key mixed into each handshake.
    pub preshared_key: Option<PresharedKey>,
    /// Where datagrams go now.
    pub endpoint: Option<SocketAddr>,
    /// When a handshake was last completed.
    pub last_handshake: Option<SystemTime>,
    /// Bytes of UDP payload received from this peer that were authentic.
    pub rx_bytes: u64,
    /// Bytes of UDP payload sent to this peer.
    pub tx_bytes: u64,
    /// Seconds of silence after which an empty packet is sent.
    pub persistent_keepalive: Option<NonZeroU16>,
    /// The prefixes this peer owns, in no order.
    pub allowed_ips: Vec<IpNet>,
    /// The peer this one takes over from; of our device only.
    pub successor_of: Option<PublicKey>,
    /// Which of this device's own keys the session that is sent on was agreed under, once the peer has confirmed it;
    /// of our device only.
    pub session_key: Option<PublicKey>,
}

impl PeerState {
    /// A peer about which nothing is known but its key.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            endpoint: None,
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
            persistent_keepalive: None,
            allowed_ips: Vec::new(),
            successor_of: None,
            session_key: None,
        }
    }
}

/// A number that a device counts, under a name in snake case.
pub type Counter = (&'static str, u64);

/// What can be configured: the device, seen from its UAPI socket.
///
/// Calls come from one thread at a time and may take as long as opening a socket takes.
pub trait Configurable: Send + Sync + 'static {
    /// Applies the device's own values, then the peers in their order. At an error what came before it stays applied,
    /// as with every WireGuard device.
    ///
    /// # Errors
    /// Says what could not be applied.
    fn apply(&self, update: DeviceUpdate) -> Result<(), ApplyError>;

    /// What the device is now.
    fn state(&self) -> DeviceState;

    /// What the device has counted, each name once.
    fn counters(&self) -> Vec<Counter>;
}

/// Why a device did not apply an update.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The UDP port could not be opened.
    #[error("UDP port {port} cannot be listened on: {source}; choose another, or end what uses it")]
    Listen {
        /// As asked for.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// `SO_MARK` could not be set.
    #[error("the mark {mark:#x} cannot be set on the sockets: {source}; the device needs CAP_NET_ADMIN")]
    Mark {
        /// As asked for.
        mark: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another peer would not be held in bounded memory.
    #[error("there are {limit} peers already, and there can be no more; remove some first")]
    TooManyPeers {
        /// How many there can be.
        limit: usize,
    },
    /// Another prefix would not be held in bounded memory.
    #[error("there are {limit} prefixes already, and there can be no more; join some first")]
    TooManyPrefixes {
        /// How many there can be.
        limit: usize,
    },
    /// The key is this device's own, or cannot be anyone's.
    #[error("{key} cannot be the key of a peer: {reason}")]
    BadPeerKey {
        /// As given.
        key: PublicKey,
        /// What is wrong about it.
        reason: &'static str,
    },
}

impl ApplyError {
    /// The number that answers for this error over UAPI and in the kernel's netlink.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Listen { source, .. } | Self::Mark { source, .. } => {
                source.raw_os_error().unwrap_or(libc::EIO)
            }
            Self::TooManyPeers { .. } | Self::TooManyPrefixes { .. } => libc::ENOSPC,
            Self::BadPeerKey { .. } => libc::EINVAL,
        }
    }
}
