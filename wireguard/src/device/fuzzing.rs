//! A device that is given datagrams by hand, as its packet workers take them from their sockets: for the fuzz target.

use std::net::SocketAddr;

use super::Device;
use super::inbound::{Inbound, Inlet};
use super::table::TableCache;
use super::udp::{Datagrams, Endpoint};

/// Receives for a device what no socket has received.
pub struct Receiver {
    device: Device,
    inbound: Inbound,
    cache: TableCache,
}

impl Receiver {
    /// For this device.
    pub fn new(device: Device) -> Self {
        let inbound = Inbound::new(&device.shared);
        Self { device, inbound, cache: TableCache::new() }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Datagrams of `size` bytes each, but for the last, that the kernel has joined; all the way to the machine.
    pub fn receive(&mut self, from: SocketAddr, bytes: &mut [u8], size: usize) {
        let shared = &self.device.shared;
        self.cache.refresh(&shared.table);
        let sockets = shared.sockets();
        let queues = shared.tun.queues(0);
        let mut inlet = Inlet { shared, cache: &mut self.cache, queues, sockets: sockets.pair(0) };
        let datagrams = Datagrams { bytes, size: size.max(1), from: Endpoint::new(from), congested: false };
        self.inbound.take(&mut inlet, datagrams);
        self.inbound.flush(queues, shared);
    }
}
