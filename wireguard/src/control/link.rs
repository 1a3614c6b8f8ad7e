//! The network interface of a device, over rtnetlink.

use std::io;
use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkUnspec, LinkWireguard};

use super::{ControlError, Link};

/// Network interfaces of the namespace in which this was opened.
#[derive(Clone, Debug)]
pub(super) struct Links {
    handle: Handle,
}

/// What kind of device an interface belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// WireGuard in the kernel.
    Wireguard,
    /// TUN: a process is behind it.
    Tun,
    /// Something else.
    Other,
}

impl Links {
    pub(super) fn open(interface: &str) -> Result<Self, ControlError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| ControlError::Io { interface: interface.to_owned(), source })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// The interface of this name and its kind; `None` when there is none.
    pub(super) async fn find(&self, interface: &str) -> Result<Option<(Link, Kind)>, ControlError> {
        let request = self.handle.link().get().match_name(interface.to_owned());
        match request.execute().try_next().await {
            Ok(message) => Ok(message.as_ref().map(|message| (link(message), kind(message)))),
            Err(error) => match io_error(error) {
                source if source.raw_os_error() == Some(libc::ENODEV) => Ok(None),
                source => Err(ControlError::Io { interface: interface.to_owned(), source }),
            },
        }
    }

    /// Makes an interface of the kernel's WireGuard.
    pub(super) async fn create_wireguard(&self, interface: &str) -> Result<(), ControlError> {
        match self.handle.link().add(LinkWireguard::new(interface).build()).execute().await {
            Ok(()) => Ok(()),
            Err(error) => match io_error(error) {
                // Another process was faster.
                source if source.raw_os_error() == Some(libc::EEXIST) => Ok(()),
                source if source.raw_os_error() == Some(libc::EOPNOTSUPP) => Err(ControlError::Unsupported),
                source => Err(refused(interface, "to be made", source)),
            },
        }
    }

    /// Sets the MTU, adds the addresses, brings it up.
    pub(super) async fn bring_up(
        &self,
        interface: &str,
        index: u32,
        mtu: u32,
        addresses: &[IpAddr],
    ) -> Result<(), ControlError> {
        for address in addresses {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            match self.handle.address().add(index, *address, bits).execute().await.map_err(io_error) {
                Ok(()) => {}
                Err(source) if source.raw_os_error() == Some(libc::EEXIST) => {}
                Err(source) => return Err(refused(interface, "an address", source)),
            }
        }
        let change = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
        let set = self.handle.link().set(change).execute().await;
        set.map_err(|error| refused(interface, "its MTU, or to be brought up", io_error(error)))
    }
}

fn link(message: &LinkMessage) -> Link {
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Link {
        index: message.header.index,
        mtu: mtu.unwrap_or_default(),
        up: message.header.flags.contains(LinkFlags::Up),
    }
}

fn kind(message: &LinkMessage) -> Kind {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let kind = infos.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        Some(InfoKind::Wireguard) => Kind::Wireguard,
        Some(InfoKind::Tun) => Kind::Tun,
        _ => Kind::Other,
    }
}

fn refused(interface: &str, what: &'static str, source: io::Error) -> ControlError {
    ControlError::Refused { interface: interface.to_owned(), what, source }
}

fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}
