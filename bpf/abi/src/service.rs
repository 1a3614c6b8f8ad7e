use core::fmt;
use core::net::IpAddr;

use crate::{Addr, Protocol};

/// A frontend: what an application dials.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// Service address.
    pub addr: Addr,
    /// Service port, network byte order.
    pub port_be: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}

impl ServiceKey {
    /// The frontend of `addr`, `port` (host byte order) and `protocol`.
    pub fn new(addr: IpAddr, port: u16, protocol: Protocol) -> Self {
        Self { addr: addr.into(), port_be: port.to_be(), protocol: protocol as u8, pad: 0 }
    }

    /// Service port in host byte order.
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port_be)
    }
}

impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_endpoint(f, self.addr, self.port_be, self.protocol)
    }
}

/// A frontend's service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Service {
    /// Names the frontend in [`SlotKey`], [`Backend`] and in connection tracking. Non-zero. Never given to
    /// another frontend while the maps live, so that no old connection is taken for one of a new service.
    pub id: u32,
    /// Number of backends: the slots `0..count` are filled. Zero refuses connections at once.
    pub count: u32,
    /// `sessionAffinity: ClientIP` timeout in seconds; zero is no affinity.
    pub affinity_seconds: u32,
    /// None are defined yet; zero.
    pub flags: u32,
}

/// One place in a service's dense list of backends.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SlotKey {
    /// [`Service::id`].
    pub service: u32,
    /// `0..count`.
    pub slot: u32,
}

/// What stands in a slot.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Slot {
    /// Index of the [`Backend`].
    pub backend: u32,
    /// [`Backend::fingerprint`] of that backend. A slot whose backend has another one by now is passed over.
    pub fingerprint: u32,
}

/// Bits of [`Backend::flags`].
pub mod backend_flags {
    /// Serves the connections that it has, and takes no new ones: no slot leads to it.
    pub const OPEN_ONLY: u8 = 1;
}

/// A backend of one frontend. The same pod behind two frontends has two of these.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Backend {
    /// Address of the pod.
    pub addr: Addr,
    /// Target port, network byte order.
    pub port_be: u16,
    /// Cluster that the backend runs in; 0 is the own one.
    pub cluster: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// [`backend_flags`].
    pub flags: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// [`Service::id`] of the frontend; zero in an unused record.
    pub service: u32,
    /// Hash of service, address, port and protocol; never zero in a used record. Connections remember it beside the
    /// index, and so notice that a record is gone or holds another backend, without any list to clean up.
    pub fingerprint: u32,
}

impl Backend {
    /// An unused record.
    pub const NONE: Self = Self {
        addr: Addr([0; 4]),
        port_be: 0,
        cluster: 0,
        protocol: 0,
        flags: 0,
        pad: [0; 2],
        service: 0,
        fingerprint: 0,
    };

    /// The backend `addr`:`port` (host byte order) of the frontend with id `service`, running in `cluster`.
    pub fn new(service: u32, addr: IpAddr, port: u16, protocol: Protocol, cluster: u16) -> Self {
        let addr = Addr::from(addr);
        let port_be = port.to_be();
        let protocol = protocol as u8;
        let fingerprint = fingerprint(service, &addr, port_be, protocol);
        Self { addr, port_be, cluster, protocol, flags: 0, pad: [0; 2], service, fingerprint }
    }

    /// The same backend as one that takes nothing new.
    pub const fn open_only(self) -> Self {
        Self { flags: self.flags | backend_flags::OPEN_ONLY, ..self }
    }

    /// Whether new connections may go there.
    pub const fn takes_new(&self) -> bool {
        self.flags & backend_flags::OPEN_ONLY == 0
    }

    /// Target port in host byte order.
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port_be)
    }

    /// Whether the record holds a backend.
    pub const fn is_used(&self) -> bool {
        self.fingerprint != 0
    }

    /// The slot value that points to this backend, kept at index `id`.
    pub const fn slot(&self, id: u32) -> Slot {
        Slot { backend: id, fingerprint: self.fingerprint }
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_used() {
            return f.write_str("unused");
        }
        write_endpoint(f, self.addr, self.port_be, self.protocol)?;
        write!(f, " of service {} in cluster {}", self.service, self.cluster)?;
        if self.takes_new() { Ok(()) } else { f.write_str(", for open connections only") }
    }
}

fn write_endpoint(f: &mut fmt::Formatter<'_>, addr: Addr, port_be: u16, protocol: u8) -> fmt::Result {
    match addr.ip() {
        IpAddr::V4(ip) => write!(f, "{ip}:{}", u16::from_be(port_be))?,
        IpAddr::V6(ip) => write!(f, "[{ip}]:{}", u16::from_be(port_be))?,
    }
    match Protocol::from_number(protocol) {
        Some(protocol) => write!(f, "/{protocol}"),
        None => write!(f, "/{protocol}"),
    }
}

/// FNV-1a over the words that make up a backend's identity, with a final mix; never zero.
fn fingerprint(service: u32, addr: &Addr, port_be: u16, protocol: u8) -> u32 {
    let [a, b, c, d] = addr.0;
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for word in [service, a, b, c, d, (u32::from(port_be) << 8) | u32::from(protocol)] {
        for byte in word.to_ne_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    let folded = (hash ^ (hash >> 32)) as u32;
    if folded == 0 { 1 } else { folded }
}

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;

    use super::*;

    const POD: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

    #[test]
    fn a_fingerprint_tells_backends_and_services_apart() {
        let one = Backend::new(1, POD, 80, Protocol::Tcp, 0);
        assert_ne!(one.fingerprint, Backend::new(2, POD, 80, Protocol::Tcp, 0).fingerprint);
        assert_ne!(one.fingerprint, Backend::new(1, POD, 81, Protocol::Tcp, 0).fingerprint);
        assert_ne!(one.fingerprint, Backend::new(1, POD, 80, Protocol::Udp, 0).fingerprint);
        assert_eq!(one.fingerprint, Backend::new(1, POD, 80, Protocol::Tcp, 9).fingerprint);
        assert_eq!(one.fingerprint, one.open_only().fingerprint);
    }

    #[test]
    fn an_unused_record_matches_no_connection() {
        assert!(!Backend::NONE.is_used());
        assert!(Backend::new(1, POD, 80, Protocol::Tcp, 0).is_used());
    }
}
