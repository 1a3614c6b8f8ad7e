//! How the agent configures a WireGuard device: ours or another one in user space over its UAPI socket, or the kernel's
//! over generic netlink.

mod kernel;
mod link;
mod user;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

pub use self::kernel::{KernelDevice, is_available as kernel_is_available};
use self::link::{Kind, Links};
pub use self::user::UserDevice;
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
#[derive(Debug, Clone)]
pub struct Control {
    device: Device,
    links: Links,
}

#[derive(Debug, Clone)]
enum Device {
    User(UserDevice),
    Kernel(KernelDevice),
}

impl Control {
    /// Takes control of the device, in the network namespace of this thread. The kernel's is created when it is missing;
    /// one in user space need not run yet.
    ///
    /// # Errors
    /// When the kernel was asked for and has no WireGuard, or refuses; or when an interface of this name is of another
    /// kind.
    pub async fn open(backend: Backend, location: &Location) -> Result<Self, ControlError> {
        let interface = &location.interface;
        let links = Links::open(interface)?;
        let found = links.find(interface).await?.map(|(_, kind)| kind);
        let device = match choose(backend, found, interface)? {
            Choice::User => Device::User(UserDevice::ours(location)),
            Choice::Kernel => Device::Kernel(KernelDevice::open(interface)?),
            Choice::NewKernel => {
                links.create_wireguard(interface).await?;
                Device::Kernel(KernelDevice::open(interface)?)
            }
            Choice::Probe => {
                let available = kernel::is_available().await.unwrap_or_else(|error| {
                    tracing::warn!("the kernel does not say whether it has WireGuard: {error}");
                    false
                });
                match if available {
                    links.create_wireguard(interface).await
                } else {
                    Err(ControlError::Unsupported)
                } {
                    Ok(()) => Device::Kernel(KernelDevice::open(interface)?),
                    Err(ControlError::Unsupported) => Device::User(UserDevice::ours(location)),
                    Err(error) => return Err(error),
                }
            }
        };
        Ok(Self { device, links })
    }

    /// Whether this is the kernel's device, which takes no second private key and no successors.
    pub fn is_kernel(&self) -> bool {
        matches!(self.device, Device::Kernel(_))
    }

    /// Name of the network interface.
    pub fn interface(&self) -> &str {
        match &self.device {
            Device::User(device) => device.interface(),
            Device::Kernel(device) => device.interface(),
        }
    }

    /// Applies the update: the device's own values, then the peers in their order. What only our device has is not told
    /// to the kernel's.
    ///
    /// # Errors
    /// When the device is not there or refuses. What came before the refused part stays applied.
    pub async fn apply(&self, update: &DeviceUpdate) -> Result<(), ControlError> {
        match &self.device {
            Device::User(device) => device.apply(update).await,
            Device::Kernel(device) => device.apply(update).await,
        }
    }

    /// What the device is now.
    ///
    /// # Errors
    /// When the device is not there or what it says cannot be understood.
    pub async fn state(&self) -> Result<DeviceState, ControlError> {
        match &self.device {
            Device::User(device) => device.read().await.map(|answer| answer.state),
            Device::Kernel(device) => device.state().await,
        }
    }

    /// What the device has counted; nothing for the kernel's.
    ///
    /// # Errors
    /// As [`state`](Self::state).
    pub async fn counters(&self) -> Result<BTreeMap<String, u64>, ControlError> {
        match &self.device {
            Device::User(device) => device.read().await.map(|answer| answer.counters),
            Device::Kernel(_) => Ok(BTreeMap::new()),
        }
    }

    /// The device's network interface.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn link(&self) -> Result<Link, ControlError> {
        let found = self.links.find(self.interface()).await?;
        found
            .map(|(link, _)| link)
            .ok_or_else(|| ControlError::NoInterface { interface: self.interface().to_owned() })
    }

    /// Sets the interface's MTU, gives it these addresses (as /32 and /128, so that no route comes with them; others
    /// it has are left), and brings it up.
    ///
    /// # Errors
    /// When there is no such interface or the kernel refuses.
    pub async fn bring_up(&self, mtu: u32, addresses: &[IpAddr]) -> Result<Link, ControlError> {
        let index = self.link().await?.index;
        self.links.bring_up(self.interface(), index, mtu, addresses).await?;
        self.link().await
    }
}

/// Whether [`Backend::Auto`] takes the kernel's device, in the network namespace of this thread. For whoever runs the one in user
/// space, and makes none where it would not be used.
///
/// # Errors
/// When interfaces cannot be listed, or the one of this name is of another kind.
pub async fn kernel_is_chosen(interface: &str) -> Result<bool, ControlError> {
    let links = Links::open(interface)?;
    let found = links.find(interface).await?.map(|(_, kind)| kind);
    Ok(match choose(Backend::Auto, found, interface)? {
        Choice::User => false,
        Choice::Kernel | Choice::NewKernel => true,
        Choice::Probe => kernel::is_available().await.unwrap_or(false),
    })
}

/// What to do about the device.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    User,
    /// The interface is there.
    Kernel,
    /// The interface is to be made, or there will be no device.
    NewKernel,
    /// The kernel's if there is one.
    Probe,
}

/// An interface that is there already decides what is left to choose.
fn choose(backend: Backend, found: Option<Kind>, interface: &str) -> Result<Choice, ControlError> {
    let wrong_kind = |kind, advice| {
        let interface = interface.to_owned();
        Err(ControlError::WrongKind { interface, kind, advice })
    };
    match (backend, found) {
        (Backend::Auto, None) => Ok(Choice::Probe),
        (Backend::Kernel, None) => Ok(Choice::NewKernel),
        (Backend::Auto | Backend::Kernel, Some(Kind::Wireguard)) => Ok(Choice::Kernel),
        (Backend::Auto | Backend::User, Some(Kind::Tun)) | (Backend::User, None) => Ok(Choice::User),
        (Backend::Kernel, Some(Kind::Tun)) => {
            wrong_kind("a device in user space", "end the process behind it first")
        }
        (Backend::User, Some(Kind::Wireguard)) => {
            wrong_kind("WireGuard in the kernel", "`ip link delete` it first, or choose `--wireguard=kernel`")
        }
        (_, Some(Kind::Other)) => wrong_kind("no WireGuard device", "choose another name"),
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
    /// The interface belongs to something else.
    #[error("the network interface `{interface}` is {kind}: {advice}")]
    WrongKind {
        /// Its name.
        interface: String,
        /// What it is.
        kind: &'static str,
        /// What can be done about it.
        advice: &'static str,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(backend: Backend, found: Option<Kind>) -> Result<Choice, String> {
        choose(backend, found, "isthmus_wg0").map_err(|error| error.to_string())
    }

    #[test]
    fn an_interface_that_is_there_decides() {
        assert_eq!(chosen(Backend::Auto, None), Ok(Choice::Probe));
        assert_eq!(chosen(Backend::Auto, Some(Kind::Tun)), Ok(Choice::User));
        assert_eq!(chosen(Backend::Auto, Some(Kind::Wireguard)), Ok(Choice::Kernel));
        assert_eq!(chosen(Backend::Kernel, None), Ok(Choice::NewKernel));
        assert_eq!(chosen(Backend::User, None), Ok(Choice::User));
    }

    #[test]
    fn an_interface_of_another_kind_is_left_alone_and_named() {
        for (backend, kind) in
            [(Backend::Auto, Kind::Other), (Backend::User, Kind::Wireguard), (Backend::Kernel, Kind::Tun)]
        {
            let refusal = chosen(backend, Some(kind)).unwrap_err();
            assert!(refusal.contains("`isthmus_wg0` is"), "{refusal}");
        }
    }
}
