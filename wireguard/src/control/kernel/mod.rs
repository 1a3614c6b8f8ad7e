//! The kernel's device, over generic netlink. Source of the format: the kernel's `include/uapi/linux/wireguard.h`.
//!
//! Thin by intention: `message` makes the messages and reads them, and is where the tests are; this file sends them.

mod message;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use genetlink::{GenetlinkError, GenetlinkHandle};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{WireguardAttribute, WireguardCmd, WireguardMessage};
use tokio::sync::Mutex;

use super::ControlError;
use crate::config::{AllowedIp, DeviceState, DeviceUpdate};

/// The kernel's device.
#[derive(Debug, Clone)]
pub struct KernelDevice {
    interface: String,
    netlink: GenetlinkHandle,
    /// Whether the kernel has refused to take one prefix from a peer, as those before 6.16 do.
    cannot_remove: Arc<AtomicBool>,
    /// An update may be several messages; another must not come between them.
    updates: Arc<Mutex<()>>,
}

/// Whether this kernel has WireGuard. Asking makes it load the module where there is one.
///
/// # Errors
/// When generic netlink itself does not work.
pub async fn is_available() -> io::Result<bool> {
    let (connection, handle, _) = genetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let resolved = handle.resolve_family::<WireguardMessage>().await;
    connection.abort();
    match resolved {
        Ok(_) => Ok(true),
        Err(error) => match io_error(error) {
            source if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            source => Err(source),
        },
    }
}

impl KernelDevice {
    /// The device behind this interface, which is there already.
    pub(super) fn open(interface: &str) -> Result<Self, ControlError> {
        let (connection, netlink, _) = genetlink::new_connection()
            .map_err(|source| ControlError::Io { interface: interface.to_owned(), source })?;
        tokio::spawn(connection);
        Ok(Self {
            interface: interface.to_owned(),
            netlink,
            cannot_remove: Arc::default(),
            updates: Arc::default(),
        })
    }

    pub(super) fn interface(&self) -> &str {
        &self.interface
    }

    /// Applies an update, in as many messages as it takes.
    ///
    /// # Errors
    /// When there is no such interface or the kernel refuses.
    pub async fn apply(&self, update: &DeviceUpdate) -> Result<(), ControlError> {
        let _one_at_a_time = self.updates.lock().await;
        if !removes_prefixes(update) {
            return self.send(update).await;
        }
        if !self.cannot_remove.load(Ordering::Relaxed) {
            match self.send(update).await {
                Err(ControlError::Refused { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {}
                done => return done,
            }
        }
        // The same, said with what older kernels know. What was applied of the first attempt is only applied again.
        let rewritten = message::without_removals(update, &self.state().await?);
        self.send(&rewritten).await?;
        self.cannot_remove.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn send(&self, update: &DeviceUpdate) -> Result<(), ControlError> {
        for attributes in message::updates(&self.interface, update) {
            let message = WireguardMessage { cmd: WireguardCmd::SetDevice, attributes };
            self.exchange(message, NLM_F_ACK, "an update").await?;
        }
        Ok(())
    }

    /// What the device is.
    ///
    /// # Errors
    /// When there is no such interface or the kernel refuses.
    pub async fn state(&self) -> Result<DeviceState, ControlError> {
        let attributes = vec![WireguardAttribute::IfName(self.interface.clone())];
        let message = WireguardMessage { cmd: WireguardCmd::GetDevice, attributes };
        let parts = self.exchange(message, NLM_F_DUMP, "to tell its state").await?;
        Ok(message::state(parts))
    }

    async fn exchange(
        &self,
        message: WireguardMessage,
        flags: u16,
        what: &'static str,
    ) -> Result<Vec<WireguardMessage>, ControlError> {
        let mut message = NetlinkMessage::from(GenlMessage::from_payload(message));
        message.header.flags = NLM_F_REQUEST | flags;
        let mut answers = Vec::new();
        let mut netlink = self.netlink.clone();
        let mut stream =
            netlink.request(message).await.map_err(|error| self.refused(what, io_error(error)))?;
        while let Some(answer) = stream.next().await {
            let answer = answer.map_err(|error| ControlError::BadAnswer {
                interface: self.interface.clone(),
                reason: error.to_string(),
            })?;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => answers.push(message.payload),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(self.refused(what, error.to_io()));
                }
                _ => {}
            }
        }
        Ok(answers)
    }

    fn refused(&self, what: &'static str, source: io::Error) -> ControlError {
        let interface = self.interface.clone();
        match source.raw_os_error() {
            Some(libc::ENOENT) => ControlError::Unsupported,
            Some(libc::ENODEV) => ControlError::NoInterface { interface },
            _ => ControlError::Refused { interface, what, source },
        }
    }
}

fn removes_prefixes(update: &DeviceUpdate) -> bool {
    let mut changes = update.peers.iter().filter(|peer| !peer.remove).flat_map(|peer| &peer.allowed_ips);
    changes.any(|change| matches!(change, AllowedIp::Remove(_)))
}

fn io_error(error: GenetlinkError) -> io::Error {
    match error {
        GenetlinkError::NetlinkError(source) => source,
        other => io::Error::other(other),
    }
}
