//! What the programs remember of connections. User space only reads these maps.
//!
//! Times are the low 32 bits of the kernel's jiffies: reading them costs a load, where a clock costs a call.

use crate::Addr;

/// Bits of [`CtEntry::flags`].
pub mod ct_flags {
    /// The client has sent more than its SYN.
    pub const ESTABLISHED: u32 = 1;
    /// FIN from the client.
    pub const FIN_FORWARD: u32 = 2;
    /// FIN from the backend.
    pub const FIN_REPLY: u32 = 4;
    /// RST from either side.
    pub const RESET: u32 = 8;
    /// The backend is the client itself.
    pub const HAIRPIN: u32 = 16;
}

/// Bits of [`ReplyEntry::flags`].
pub mod reply_flags {
    /// The backend is the client itself.
    pub const HAIRPIN: u16 = 1;
}

/// A flow from a pod to a service, as TC sees it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CtKey {
    /// The pod's address.
    pub client: Addr,
    /// Id of the service; stands for its address, port and protocol.
    pub service: u32,
    /// The pod's port, network byte order.
    pub client_port_be: u16,
    /// Zero.
    pub pad: u16,
}

/// Where a flow goes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CtEntry {
    /// Index of the backend.
    pub backend: u32,
    /// Fingerprint that the backend had; with another one by now the flow chooses anew.
    pub fingerprint: u32,
    /// Jiffies of the last packet from the client, up to a second late.
    pub last_seen: u32,
    /// [`ct_flags`].
    pub flags: u32,
}

/// The same flow as its answers show it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ReplyKey {
    /// Source of the answer.
    pub backend: Addr,
    /// Destination of the answer.
    pub client: Addr,
    /// Source port, network byte order.
    pub backend_port_be: u16,
    /// Destination port, network byte order.
    pub client_port_be: u16,
    /// IP protocol number; as wide as the gap that it would leave.
    pub protocol: u32,
}

/// What the answers of a flow must be made to come from.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ReplyEntry {
    /// Service address.
    pub addr: Addr,
    /// Service port, network byte order.
    pub port_be: u16,
    /// [`reply_flags`].
    pub flags: u16,
    /// Id of the service.
    pub service: u32,
    /// Jiffies of the last packet in either direction, up to a second late.
    pub last_seen: u32,
}

/// A client of a service with `sessionAffinity: ClientIP`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AffinityKey {
    /// A pod's address at TC; at the socket all ones and the cookie of its network namespace, which every
    /// address of a pod shares.
    pub client: Addr,
    /// Id of the service.
    pub service: u32,
}

/// The backend that this client keeps.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AffinityEntry {
    /// Index of the backend.
    pub backend: u32,
    /// Fingerprint that the backend had.
    pub fingerprint: u32,
    /// Jiffies of the last connection.
    pub last_used: u32,
}

/// Which of the two things that are remembered of a socket a [`SocketKey`] names.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SocketKeyKind {
    /// From the backend's address to the service's: what the application must see.
    Peer = 0,
    /// From the service's address to the backend that this unconnected UDP socket keeps.
    Choice = 1,
}

/// A socket and an address it talks to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SocketKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// See [`SocketKeyKind`].
    pub addr: Addr,
    /// Network byte order.
    pub port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`SocketKeyKind`].
    pub kind: u8,
    /// Zero.
    pub pad: u32,
}

/// What is remembered of it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SocketEntry {
    /// The service's address.
    pub addr: Addr,
    /// The service's port, network byte order.
    pub port_be: u16,
    /// Zero.
    pub pad: u16,
    /// Index of the backend.
    pub backend: u32,
    /// Fingerprint that the backend had.
    pub fingerprint: u32,
}

/// A fragmented datagram. Only its first fragment has ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey {
    /// Source before translation.
    pub source: Addr,
    /// Destination before translation.
    pub destination: Addr,
    /// Identification field of the IP header.
    pub id: u32,
    /// IP protocol number; as wide as the gap that it would leave.
    pub protocol: u32,
}

/// Where its later fragments go.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentEntry {
    /// Source after translation.
    pub source: Addr,
    /// Destination after translation.
    pub destination: Addr,
    /// Non-zero: back to the pod that it came from.
    pub hairpin: u32,
}

#[cfg(test)]
mod tests {
    use core::mem::size_of;

    use super::*;

    #[test]
    fn what_a_connection_costs_in_bytes_does_not_creep() {
        assert_eq!(size_of::<CtKey>() + size_of::<CtEntry>(), 24 + 16);
        assert_eq!(size_of::<ReplyKey>() + size_of::<ReplyEntry>(), 40 + 28);
        assert_eq!(size_of::<AffinityKey>() + size_of::<AffinityEntry>(), 20 + 12);
        assert_eq!(size_of::<SocketKey>() + size_of::<SocketEntry>(), 32 + 28);
        assert_eq!(size_of::<FragmentKey>() + size_of::<FragmentEntry>(), 40 + 36);
    }
}
