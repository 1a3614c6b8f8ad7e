//! What a planner asks of the maps, and the order in which it happens.
//!
//! A reader in the kernel looks at a service while it changes: it reads the count once, picks a slot below it,
//! and follows the slot to a backend. It must never meet a backend that has gone. So every difference between two
//! states of a service is made in this order, whatever the order in the list:
//!
//! | phase | operation | why here |
//! |---|---|---|
//! | 1 | [`MapOp::PutBackend`] | nothing points to it yet |
//! | 2 | [`MapOp::PutSlot`] | its backend exists; a slot beyond the count is not read yet |
//! | 3 | [`MapOp::PutService`] | grown: all slots below the count are filled. Shrunk: the last slot, moved into the gap in phase 2, is still there for who read the old count |
//! | 4 | [`MapOp::DeleteService`] | from here on nobody finds the service |
//! | 5 | [`MapOp::DeleteSlot`] | nobody reads beyond the new count |
//! | 6 | [`MapOp::PutBackend`] of one that [takes nothing new](Backend::takes_new) | no slot points to it; what is open goes on |
//! | 7 | [`MapOp::DeleteBackend`] | no slot points to it; connections that stuck to it choose anew |
//!
//! So one endpoint more is `PutBackend, PutSlot(count), PutService(count + 1)`; one less is `PutSlot(gap, last),
//! PutService(count - 1), DeleteSlot(last), DeleteBackend`; one exchanged for another is `PutBackend, PutSlot,
//! DeleteBackend`. A backend that is to serve only what is open has `PutBackend` in place of `DeleteBackend`. ipcache
//! entries go before everything, so that a new backend's identity is known before the first packet to it, and are
//! deleted after everything.
//!
//! What the planner owes:
//! - One list holds at most one operation per key and kind of key ([`MapOp::target`] tells them apart).
//! - A backend id or service id freed in one list is given out again only in a later one; a **service id** not
//!   at all while the maps live (they are 32 bits wide: start behind the highest that a dump shows), and
//!   **backend ids** as late as possible (a queue, not a stack). Ids of backends are below
//!   [`MapSizes::backends`](super::MapSizes).
//! - A backend record belongs to one service and is not moved to another while it is used.
//! - A service's backends are of its own address family and protocol.
//!
//! What it gets back is one result per operation. After a failure the later operations of **that service** are
//! left out ([`OpError::Withheld`](super::OpError)): it keeps its last consistent state, and all others go on. The
//! planner tries again from the state that it knows to have been reached (a dump, or the results).

use isthmus_bpf_abi::{Backend, IpcacheEntry, IpcacheKey, Service, ServiceKey, Slot, SlotKey};

/// One change of one map entry. Puts create or replace; deleting what is not there succeeds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapOp {
    /// Fill a backend record. One that takes nothing new has no slot.
    PutBackend {
        /// Index into the map of backends.
        id: u32,
        /// Its new content.
        backend: Backend,
    },
    /// Let a slot point to a backend ([`Backend::slot`]).
    PutSlot {
        /// Service and slot number.
        key: SlotKey,
        /// Where it points.
        slot: Slot,
    },
    /// Create or change a frontend: its count decides how many slots are read.
    PutService {
        /// Address, port, protocol.
        key: ServiceKey,
        /// Id, count, affinity.
        service: Service,
    },
    /// Remove a frontend.
    DeleteService {
        /// Address, port, protocol.
        key: ServiceKey,
        /// [`Service::id`] it had.
        service: u32,
    },
    /// Empty a slot at or beyond the count, or of a removed frontend.
    DeleteSlot {
        /// Service and slot number.
        key: SlotKey,
    },
    /// Free a backend record.
    DeleteBackend {
        /// Index into the map of backends.
        id: u32,
        /// [`Backend::service`] it had.
        service: u32,
    },
    /// Set what is known of an address or prefix.
    PutIpcache {
        /// Address or prefix.
        key: IpcacheKey,
        /// Identity, host, cluster, key.
        entry: IpcacheEntry,
    },
    /// Forget an address or prefix.
    DeleteIpcache {
        /// Address or prefix.
        key: IpcacheKey,
    },
}

/// The phases of a list, in the order in which they are made. See the [module's documentation](self).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[expect(
    missing_docs,
    reason = "named like the operations of MapOp, but for RetireBackend, which the table explains"
)]
pub enum Phase {
    PutIpcache,
    PutBackend,
    PutSlot,
    PutService,
    DeleteService,
    DeleteSlot,
    RetireBackend,
    DeleteBackend,
    DeleteIpcache,
}

impl Phase {
    /// All phases in order.
    pub const ALL: [Self; 9] = [
        Self::PutIpcache,
        Self::PutBackend,
        Self::PutSlot,
        Self::PutService,
        Self::DeleteService,
        Self::DeleteSlot,
        Self::RetireBackend,
        Self::DeleteBackend,
        Self::DeleteIpcache,
    ];
}

/// The map entry that an operation is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Target {
    /// A frontend.
    Service(ServiceKey),
    /// A slot of a service.
    Slot(SlotKey),
    /// A backend record, by index.
    Backend(u32),
    /// An address or prefix.
    Ipcache(IpcacheKey),
}

impl MapOp {
    /// When it is made, relative to the others of its list.
    pub fn phase(&self) -> Phase {
        match self {
            Self::PutBackend { backend, .. } if backend.takes_new() => Phase::PutBackend,
            Self::PutBackend { .. } => Phase::RetireBackend,
            Self::PutSlot { .. } => Phase::PutSlot,
            Self::PutService { .. } => Phase::PutService,
            Self::DeleteService { .. } => Phase::DeleteService,
            Self::DeleteSlot { .. } => Phase::DeleteSlot,
            Self::DeleteBackend { .. } => Phase::DeleteBackend,
            Self::PutIpcache { .. } => Phase::PutIpcache,
            Self::DeleteIpcache { .. } => Phase::DeleteIpcache,
        }
    }

    /// The entry that it changes.
    pub fn target(&self) -> Target {
        match *self {
            Self::PutBackend { id, .. } | Self::DeleteBackend { id, .. } => Target::Backend(id),
            Self::PutSlot { key, .. } | Self::DeleteSlot { key } => Target::Slot(key),
            Self::PutService { key, .. } | Self::DeleteService { key, .. } => Target::Service(key),
            Self::PutIpcache { key, .. } | Self::DeleteIpcache { key } => Target::Ipcache(key),
        }
    }

    /// Id of the service that it belongs to; none for ipcache entries, which depend on nothing.
    pub fn service(&self) -> Option<u32> {
        match self {
            Self::PutBackend { backend, .. } => Some(backend.service),
            Self::PutSlot { key, .. } | Self::DeleteSlot { key } => Some(key.service),
            Self::PutService { service, .. } => Some(service.id),
            Self::DeleteService { service, .. } | Self::DeleteBackend { service, .. } => Some(*service),
            Self::PutIpcache { .. } | Self::DeleteIpcache { .. } => None,
        }
    }
}
