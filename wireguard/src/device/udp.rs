//! The UDP sockets: many datagrams for each call, in large segments where the kernel takes them (`UDP_SEGMENT`) and
//! gives them (`UDP_GRO`).

mod receive;
mod send;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

pub(crate) use receive::{Datagrams, ReceiveBatch};
pub(crate) use send::SendBatch;

/// Bytes that wait in a socket for us, and for the network. At 10 Gbit/s the first is 13 ms.
const RECEIVE_BUFFER: libc::c_int = 16 << 20;
const SEND_BUFFER: libc::c_int = 4 << 20;

/// How long a full send buffer holds a worker up before the datagrams are given up.
const SEND_TIMEOUT: libc::timeval = libc::timeval { tv_sec: 0, tv_usec: 100_000 };

/// Where a peer is, and which of our own addresses it knows us by: answers come from the address that was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Address and port of the peer.
    pub(crate) remote: SocketAddr,
    /// Our address; `None` lets the kernel choose by its routes.
    pub(crate) local: Option<IpAddr>,
}

impl Endpoint {
    /// An endpoint from the configuration.
    pub(crate) fn new(remote: SocketAddr) -> Self {
        Self { remote, local: None }
    }
}

/// The sockets of all workers, on one port. Each worker receives from a pair of its own; the kernel chooses by the
/// addresses and ports of both sides, so datagrams of one peer arrive in one socket and stay in order.
pub(crate) struct Sockets {
    port: u16,
    pairs: Vec<Pair>,
}

/// A socket for each IP version. A machine without one of the two has the other only.
#[derive(Debug)]
pub(crate) struct Pair {
    v4: Option<OwnedFd>,
    v6: Option<OwnedFd>,
}

impl Sockets {
    /// Opens `pairs` pairs on this port, or on any free one if it is 0.
    ///
    /// # Errors
    /// When the port is taken, or the machine has neither IPv4 nor IPv6.
    pub(crate) fn open(port: u16, pairs: usize, mark: u32) -> io::Result<Self> {
        // Several sockets may share the port, which would let a second program join unnoticed: the first asks for it
        // alone.
        const ATTEMPTS: usize = 10;
        let mut attempt = 0;
        let port = loop {
            match probe(port) {
                Ok(port) => break port,
                Err(error) if port == 0 && attempt < ATTEMPTS && error.kind() == io::ErrorKind::AddrInUse => {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        };
        let pairs = (0..pairs).map(|_| Pair::open(port, pairs > 1, mark)).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { port, pairs })
    }

    /// The port they are bound to.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The pair of a worker.
    pub(crate) fn pair(&self, worker: usize) -> &Pair {
        &self.pairs[worker % self.pairs.len()]
    }

    /// Marks what is sent from now on.
    pub(crate) fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.pairs.iter().flat_map(Pair::sockets).try_for_each(|socket| set_mark(socket, mark))
    }
}

impl Pair {
    fn open(port: u16, shared: bool, mark: u32) -> io::Result<Self> {
        let open = |ip: IpAddr| -> io::Result<Option<OwnedFd>> {
            let Some(socket) = socket(ip)? else { return Ok(None) };
            if shared {
                set(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, &1)?;
            }
            prepare(&socket, ip)?;
            if mark != 0 {
                set_mark(socket.as_fd(), mark)?;
            }
            match bind(&socket, SocketAddr::new(ip, port)) {
                // IPv6 exists and is switched off.
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(None),
                bound => bound.map(|()| Some(socket)),
            }
        };
        let pair = Self { v4: open(Ipv4Addr::UNSPECIFIED.into())?, v6: open(Ipv6Addr::UNSPECIFIED.into())? };
        if pair.v4.is_none() && pair.v6.is_none() {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        Ok(pair)
    }

    /// Those there are.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.v4.iter().chain(&self.v6).map(AsFd::as_fd)
    }

    /// The one that reaches this address.
    fn toward(&self, remote: IpAddr) -> Option<RawFd> {
        let socket = if remote.is_ipv4() { &self.v4 } else { &self.v6 };
        socket.as_ref().map(AsRawFd::as_raw_fd)
    }
}

/// The port, once it is known that no one else has it on either IP version.
fn probe(port: u16) -> io::Result<u16> {
    let mut held = None;
    let mut port = port;
    for ip in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let Some(socket) = socket(ip)? else { continue };
        match bind(&socket, SocketAddr::new(ip, port)) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => continue,
            bound => bound?,
        }
        port = bound_port(&socket)?;
        held.get_or_insert(socket);
    }
    Ok(port)
}

fn socket(ip: IpAddr) -> io::Result<Option<OwnedFd>> {
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EAFNOSUPPORT) { Ok(None) } else { Err(error) };
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if ip.is_ipv6() {
        set(&socket, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &1)?;
    }
    Ok(Some(socket))
}

fn prepare(socket: &OwnedFd, ip: IpAddr) -> io::Result<()> {
    // FORCE goes beyond the system's limit and needs a capability; the other way gives what the limit allows.
    if set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER).is_err() {
        set(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &RECEIVE_BUFFER)?;
    }
    if set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER).is_err() {
        set(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, &SEND_BUFFER)?;
    }
    set(socket, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &SEND_TIMEOUT)?;
    // Linux 5.0; without it each datagram comes by itself.
    let _ = set(socket, libc::SOL_UDP, libc::UDP_GRO, &1);
    if ip.is_ipv4() {
        set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, &1)?;
        set(socket, libc::IPPROTO_IP, libc::IP_RECVTOS, &1)?;
        // As kernel WireGuard: a path that is narrower than the tunnel believes fragments, rather than to lose all.
        set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_DONT)
    } else {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, &1)?;
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, &1)?;
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, &libc::IPV6_PMTUDISC_DONT)
    }
}

fn set_mark(socket: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
    set(&socket, libc::SOL_SOCKET, libc::SO_MARK, &mark)
}

fn set<T>(socket: &impl AsRawFd, level: i32, option: i32, value: &T) -> io::Result<()> {
    let (pointer, length) = (std::ptr::from_ref(value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the pointer is to `length` bytes that live through the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, pointer, length) }).map(drop)
}

fn bind(socket: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    let (raw, length) = RawAddress::new(address);
    // SAFETY: the pointer is to at least `length` initialised bytes.
    check(unsafe { libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&raw).cast(), length) }).map(drop)
}

fn bound_port(socket: &OwnedFd) -> io::Result<u16> {
    let mut raw = RawAddress::default();
    let mut length = size_of::<RawAddress>() as libc::socklen_t;
    // SAFETY: the pointer is to `length` writable bytes.
    check(unsafe {
        libc::getsockname(socket.as_raw_fd(), std::ptr::from_mut(&mut raw).cast(), &mut length)
    })?;
    Ok(raw.parse().map_or(0, |address| address.port()))
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A `sockaddr` of either IP version.
#[derive(Clone, Copy)]
#[repr(C)]
union RawAddress {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
    bytes: [u8; size_of::<libc::sockaddr_in6>()],
}

impl Default for RawAddress {
    fn default() -> Self {
        Self { bytes: [0; size_of::<libc::sockaddr_in6>()] }
    }
}

impl RawAddress {
    fn new(address: SocketAddr) -> (Self, libc::socklen_t) {
        let mut raw = Self::default();
        let length = match address {
            SocketAddr::V4(address) => {
                raw.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                    sin_zero: [0; 8],
                };
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(address) => {
                raw.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                size_of::<libc::sockaddr_in6>()
            }
        };
        (raw, length as libc::socklen_t)
    }

    fn parse(&self) -> Option<SocketAddr> {
        // SAFETY: every field is initialised from the start (all zero) and any bytes are a valid value of each.
        unsafe {
            match i32::from(self.v4.sin_family) {
                libc::AF_INET => {
                    let ip = Ipv4Addr::from(self.v4.sin_addr.s_addr.to_ne_bytes());
                    Some(SocketAddr::new(ip.into(), u16::from_be(self.v4.sin_port)))
                }
                libc::AF_INET6 => {
                    let (ip, port) = (self.v6.sin6_addr.s6_addr.into(), u16::from_be(self.v6.sin6_port));
                    Some(std::net::SocketAddrV6::new(ip, port, 0, self.v6.sin6_scope_id).into())
                }
                _ => None,
            }
        }
    }
}

/// Room for the control messages of one `msghdr`.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 128]);
