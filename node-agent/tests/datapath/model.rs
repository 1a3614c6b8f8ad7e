//! The smallest planner that keeps the contract of `datapath::ops`: one service with dense slots.

use std::net::{IpAddr, SocketAddr};

use isthmus_bpf_abi::{Backend, Protocol, Service, ServiceKey, SlotKey};
use isthmus_node_agent::datapath::{Datapath, MapOp};

/// Backend ids of a service.
const IDS: u32 = 64;

pub(crate) struct Model {
    pub(crate) key: ServiceKey,
    pub(crate) id: u32,
    protocol: Protocol,
    affinity_seconds: u32,
    /// Backend ids and addresses, slot by slot.
    slots: Vec<(u32, SocketAddr)>,
    /// Those that serve only what is open.
    retired: Vec<(u32, SocketAddr)>,
    next_id: u32,
}

impl Model {
    /// A service with the id `id`; its backends take ids from `id * 64` on.
    pub(crate) fn new(id: u32, addr: &str, protocol: Protocol) -> Self {
        let addr = socket_addr(addr);
        Self {
            key: ServiceKey::new(addr.ip(), addr.port(), protocol),
            id,
            protocol,
            affinity_seconds: 0,
            slots: Vec::new(),
            retired: Vec::new(),
            next_id: 0,
        }
    }

    pub(crate) fn with_affinity(mut self, seconds: u32) -> Self {
        self.affinity_seconds = seconds;
        self
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        SocketAddr::new(self.key.addr.ip(), self.key.port())
    }

    pub(crate) fn add(&mut self, addr: SocketAddr) -> Vec<MapOp> {
        // The one that was free for longest, as the contract asks.
        let id = loop {
            let id = self.id * IDS + self.next_id % IDS;
            self.next_id += 1;
            if self.slots.iter().chain(&self.retired).all(|(used, _)| *used != id) {
                break id;
            }
        };
        let backend = self.backend(addr);
        let slot = self.slots.len() as u32;
        self.slots.push((id, addr));
        vec![
            MapOp::PutBackend { id, backend },
            MapOp::PutSlot { key: SlotKey { service: self.id, slot }, slot: backend.slot(id) },
            self.count(),
        ]
    }

    pub(crate) fn remove(&mut self, addr: SocketAddr) -> Vec<MapOp> {
        let gap = self.slots.iter().position(|(_, known)| *known == addr).expect("a known backend");
        let (id, _) = self.slots.swap_remove(gap);
        let mut ops = Vec::new();
        if let Some(&(moved, addr)) = self.slots.get(gap) {
            let key = SlotKey { service: self.id, slot: gap as u32 };
            ops.push(MapOp::PutSlot { key, slot: self.backend(addr).slot(moved) });
        }
        ops.push(self.count());
        ops.push(MapOp::DeleteSlot { key: SlotKey { service: self.id, slot: self.slots.len() as u32 } });
        ops.push(MapOp::DeleteBackend { id, service: self.id });
        ops
    }

    pub(crate) fn count(&self) -> MapOp {
        MapOp::PutService {
            key: self.key,
            service: Service {
                id: self.id,
                count: self.slots.len() as u32,
                affinity_seconds: self.affinity_seconds,
                flags: 0,
            },
        }
    }

    /// Adds backends and makes it so.
    pub(crate) fn grow(&mut self, datapath: &Datapath, addrs: &[&str]) {
        if addrs.is_empty() {
            apply(datapath, &[self.count()]);
        }
        for addr in addrs {
            let ops = self.add(socket_addr(addr));
            apply(datapath, &ops);
        }
    }

    /// Removes a backend and makes it so.
    pub(crate) fn shrink(&mut self, datapath: &Datapath, addr: &str) {
        let ops = self.remove(socket_addr(addr));
        apply(datapath, &ops);
    }

    /// Leaves a backend what is open there, and makes it so.
    pub(crate) fn retire(&mut self, datapath: &Datapath, addr: &str) {
        let mut ops = self.remove(socket_addr(addr));
        let Some(MapOp::DeleteBackend { id, .. }) = ops.pop() else { panic!("the record goes last") };
        let addr = socket_addr(addr);
        ops.push(MapOp::PutBackend { id, backend: self.backend(addr).open_only() });
        self.retired.push((id, addr));
        apply(datapath, &ops);
    }

    /// Removes a backend that was retired, and makes it so.
    pub(crate) fn forget(&mut self, datapath: &Datapath, addr: &str) {
        let addr = socket_addr(addr);
        let known = self.retired.iter().position(|(_, known)| *known == addr).expect("a retired backend");
        let (id, _) = self.retired.swap_remove(known);
        apply(datapath, &[MapOp::DeleteBackend { id, service: self.id }]);
    }

    fn backend(&self, addr: SocketAddr) -> Backend {
        let cluster = match addr.ip() {
            IpAddr::V4(ip) => u16::from(ip.octets()[3]),
            IpAddr::V6(ip) => ip.segments()[7],
        };
        Backend::new(self.id, addr.ip(), addr.port(), self.protocol, cluster)
    }
}

pub(crate) fn apply(datapath: &Datapath, ops: &[MapOp]) {
    for (op, result) in ops.iter().zip(datapath.apply(ops)) {
        if let Err(error) = result {
            panic!("{op:?}: {error}");
        }
    }
}

pub(crate) fn socket_addr(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}
