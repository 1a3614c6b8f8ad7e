//! The datapath's part in encryption: which device, how strictly, and where the pods of this node are.

use std::net::IpAddr;

use isthmus_bpf_abi::{Addr, Encryption, LocalPod, encryption_flags};

use super::error::{DatapathError, OpError};
use super::{Datapath, links};

/// The device that encrypts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EncryptionDevice {
    /// Its index in this process' network namespace.
    pub ifindex: u32,
    /// Largest IP packet that it takes, in bytes.
    pub mtu: u32,
}

/// What happens to packets between pods of this node and of others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EncryptionMode {
    /// They go as they would without us.
    #[default]
    Off,
    /// What goes to a pod with an encryption key goes through the device. While there is none, it is dropped.
    On {
        /// `None` while there is none.
        device: Option<EncryptionDevice>,
        /// What cannot be encrypted is dropped too, and what comes in the clear from pods of other nodes.
        strict: bool,
    },
}

impl Datapath {
    /// Attaches the program for decrypted packets to the device, and sends what must be encrypted there from now on. Comes
    /// into effect at once and in one piece, and stays when the agent ends.
    ///
    /// With new maps (another version, other sizes) the mode is off until this is called: call it before pods are attached.
    ///
    /// # Errors
    /// There is no such interface, or the kernel refuses. What was set before stays, except that a device which is gone
    /// takes nothing any more.
    pub fn set_encryption(&self, mode: EncryptionMode) -> Result<(), DatapathError> {
        let device = match mode {
            EncryptionMode::Off => None,
            EncryptionMode::On { device, .. } => device,
        };
        if let Some(device) = device {
            // Before anything is sent there: an answer is never met by a device without a program.
            let features = self.config.features;
            links::attach_device(&mut self.ebpf(), &self.config.pin_dir, device.ifindex, features)?;
        }
        self.maps.encryption.set(&0, &entry(mode))?;
        if device.is_none() {
            links::detach_devices(&self.config.pin_dir, None)?;
        }
        match mode {
            EncryptionMode::Off => links::detach_networks(&self.config.pin_dir, &[]),
            EncryptionMode::On { .. } => Ok(()),
        }
    }

    /// Watches over what leaves the node by these interfaces (see [`routing::outward`](super::routing::outward)) and by no
    /// others: packets of pods whose own programs are not attached yet go into the device too, or are dropped.
    ///
    /// # Errors
    /// There is no such interface, or the kernel refuses.
    pub fn watch_over(&self, interfaces: &[u32]) -> Result<(), DatapathError> {
        links::attach_networks(&mut self.ebpf(), &self.config.pin_dir, interfaces, self.config.features)
    }

    /// What was set last, by this run or an earlier one.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn encryption(&self) -> Result<EncryptionMode, DatapathError> {
        Ok(mode(self.maps.encryption.value(&0)?.unwrap_or_default()))
    }

    /// From now on, hands decrypted packets for `addr` to this pod, and takes the pod's word that it has the address.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses.
    pub fn put_local_pod(&self, addr: IpAddr, pod: LocalPod) -> Result<(), OpError> {
        self.maps.local_pods.put(&[Addr::from(addr)], &[pod]).into_iter().collect()
    }

    /// Forgets where `addr` is; that it was not known is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_local_pod(&self, addr: IpAddr) -> Result<(), OpError> {
        self.maps.local_pods.delete(&[Addr::from(addr)]).into_iter().collect()
    }

    /// Where the pods of this node are, as this run or an earlier one has put it.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn local_pods(&self) -> Result<Vec<(IpAddr, LocalPod)>, DatapathError> {
        let entries = self.maps.local_pods.entries()?;
        Ok(entries.into_iter().map(|(addr, pod)| (addr.ip(), pod)).collect())
    }
}

fn entry(mode: EncryptionMode) -> Encryption {
    let EncryptionMode::On { device, strict } = mode else { return Encryption::default() };
    let strict = if strict { encryption_flags::STRICT } else { 0 };
    Encryption {
        ifindex: device.map_or(0, |device| device.ifindex),
        mtu: device.map_or(0, |device| device.mtu),
        flags: encryption_flags::ON | strict,
        pad: 0,
    }
}

fn mode(entry: Encryption) -> EncryptionMode {
    if entry.flags & encryption_flags::ON == 0 {
        return EncryptionMode::Off;
    }
    let device = EncryptionDevice { ifindex: entry.ifindex, mtu: entry.mtu };
    EncryptionMode::On {
        device: (entry.ifindex != 0).then_some(device),
        strict: entry.flags & encryption_flags::STRICT != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let device = Some(EncryptionDevice { ifindex: 7, mtu: 1420 });
        for written in [
            EncryptionMode::Off,
            EncryptionMode::On { device: None, strict: false },
            EncryptionMode::On { device: None, strict: true },
            EncryptionMode::On { device, strict: false },
            EncryptionMode::On { device, strict: true },
        ] {
            assert_eq!(mode(entry(written)), written);
        }
    }
}
