//! How the agent configures a WireGuard device: ours or another one in user space over its UAPI socket, or the kernel's
//! over generic netlink.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::config::{DeviceState, DeviceUpdate};

/// Which device carries the traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Backend {
    /// The kernel's where the kernel has WireGuard, ours elsewhere.
    #[default]
    Auto,
    /// The kernel's, or none.
    Kernel,
    /// The one that `isthmus-wireguard` runs.
    User,
}

/// Where the device is.
#[derive(Debug, Clone)]
pub struct Location {
    /// Name of the network interface, such as `isthmus_wg0`.
    pub interface: String,
    /// The folder in which a device in user space has its socket, `<interface>.sock`.
    pub uapi_dir: PathBuf,
}

/// The network interface of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Bytes in the largest packet it takes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
}

/// A WireGuard device under control.
#[derive(Debug)]
pub enum Control {
    /// In user space, over its socket.
    User,
    /// In the kernel, over generic netlink.
    Kernel,
}

impl Control {
    /// Takes control of the device. The kernel's is created when it is missing; one in user space need not run yet.
    ///
    /// # Errors
    /// When the kernel was asked for and has no WireGuard, or refuses.
    pub async fn open(_backend: Backend, _location: &Location) -> Result<Self, ControlError> {
        Err(ControlError::Unsupported)
    }

    /// Whether this is the kernel's device, which takes no second private key and no successors.
    pub fn is_kernel(&self) -> bool {
        matches!(self, Self::Kernel)
    }

    /// Applies the update: the device's own values, then the peers in their order.
    ///
    /// # Errors
    /// When the device is not there or refuses. What came before the refused part stays applied.
    pub async fn apply(&self, _update: &DeviceUpdate) -> Result<(), ControlError> {
        Err(ControlError::Unsupported)
    }

    /// What the device is now.
    ///
    /// # Errors
    /// When the device is not there or what it says cannot be understood.
    pub async fn state(&self) -> Result<DeviceState, ControlError> {
        Err(ControlError::Unsupported)
    }

    /// What the device has counted; nothing for the kernel's.
    ///
    /// # Errors
    /// As [`state`](Self::state).
    pub async fn counters(&self) -> Result<BTreeMap<String, u64>, ControlError> {
        Err(ControlError::Unsupported)
    }

    /// The device's network interface.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn link(&self) -> Result<Link, ControlError> {
        Err(ControlError::Unsupported)
    }

    /// Sets the interface's MTU, gives it these addresses (as /32 and /128, so that no route comes with them; others
    /// it has are left), and brings it up.
    ///
    /// # Errors
    /// When there is no such interface or the kernel refuses.
    pub async fn bring_up(&self, _mtu: u32, _addresses: &[IpAddr]) -> Result<Link, ControlError> {
        Err(ControlError::Unsupported)
    }
}

/// Why a device could not be controlled.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The kernel has no WireGuard.
    #[error(
        "this kernel has no WireGuard: load its module (`modprobe wireguard`), or choose the device in user space with \
         `--wireguard=user`"
    )]
    Unsupported,
    /// No device in user space has its socket here.
    #[error("no WireGuard device listens at {path}: start `isthmus-wireguard --interface {interface}`", path = path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// The interface.
        interface: String,
    },
    /// There is no such network interface.
    #[error("there is no network interface `{interface}`: the device that makes it does not run")]
    NoInterface {
        /// Its name.
        interface: String,
    },
    /// The device did not take an update or a question.
    #[error("the WireGuard device {interface} refused {what}: {source}")]
    Refused {
        /// The interface.
        interface: String,
        /// What was asked of it.
        what: &'static str,
        /// What the number it answered means.
        source: io::Error,
    },
    /// The device said something that cannot be understood.
    #[error("the WireGuard device {interface} answered what cannot be understood: {reason}")]
    BadAnswer {
        /// The interface.
        interface: String,
        /// What is wrong about it.
        reason: String,
    },
    /// Talking to the device failed.
    #[error("talking to the WireGuard device {interface} failed: {source}")]
    Io {
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
}
