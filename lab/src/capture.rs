//! What crosses the wires of a network namespace, as someone who taps them sees it.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::{Doing, LabError, Result};
use crate::netns::NetNs;

/// UDP port of WireGuard, on every node.
pub const WIREGUARD: u16 = 51871;

/// Kept at most: a capture is for moments, not for load.
const MOST_BYTES: usize = 128 << 20;
/// What the kernel keeps while nobody reads.
const SOCKET_BUFFER: usize = 32 << 20;

/// A capture that goes on until [`Capture::end`], or until it is dropped.
pub struct Capture {
    stop: Arc<AtomicBool>,
    /// One for each interface that is listened to, or one for all.
    threads: Vec<JoinHandle<io::Result<Packets>>>,
    within: String,
}

/// The IP packets that were seen, without their Ethernet headers. One that crosses several interfaces of the namespace is
/// there several times.
#[derive(Debug, Default)]
pub struct Packets(Vec<Vec<u8>>);

impl NetNs {
    /// Captures everything that comes in or goes out by any interface of this namespace from now on.
    ///
    /// # Errors
    /// When there is no packet socket to be had.
    pub fn capture(&self) -> Result<Capture> {
        let socket = self.run(|| listen(None))?;
        self.read([(socket, None)])
    }

    /// Captures everything that comes in or goes out by any port of a bridge from now on; by ports that it has now. A packet
    /// between two of them is there twice.
    ///
    /// # Errors
    /// When there is no such bridge, it has no ports, or there are no packet sockets to be had.
    pub async fn capture_bridge(&self, bridge: &str) -> Result<Capture> {
        let ports = self.netlink()?.ports(bridge).await?;
        if ports.is_empty() {
            return Err(LabError::invalid(format!("bridge {bridge} of {} has no ports", self.name())));
        }
        // A socket for each, so that what else this machine says needs not be read.
        let sockets = self.run(move || {
            let addresses = getifaddrs()?.filter_map(|found| found.address?.as_link_addr().copied());
            let of_ports = addresses.filter(|address| ports.contains(&index(address)));
            of_ports
                .map(|port| Ok((listen(Some(&port))?, Some(index(&port)))))
                .collect::<io::Result<Vec<_>>>()
        })?;
        self.read(sockets)
    }

    fn read(&self, sockets: impl IntoIterator<Item = (OwnedFd, Option<u32>)>) -> Result<Capture> {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |(socket, interface)| {
            let stopped = Arc::clone(&stop);
            let thread = std::thread::Builder::new().name("capture".into());
            thread.spawn(move || read(&socket, interface, &stopped))
        };
        let threads: io::Result<_> = sockets.into_iter().map(start).collect();
        let threads = threads.doing(|| "starting a thread that captures")?;
        Ok(Capture { stop, threads, within: self.name().to_owned() })
    }
}

impl Capture {
    /// What was seen. Returns once nothing that is under way is left to be read.
    ///
    /// # Errors
    /// When reading failed, or there was too much to keep: then nothing is known about what is missing.
    pub async fn end(mut self) -> Result<Packets> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        let mut all = Packets::default();
        for thread in threads {
            let read = tokio::task::spawn_blocking(move || thread.join()).await;
            let Ok(Ok(packets)) = read else {
                return Err(LabError::invalid(format!("a thread that captures in {} panicked", self.within)));
            };
            all.0.extend(packets.doing(|| format!("capturing in {}", self.within))?.0);
        }
        Ok(all)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Packets {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, each from its IP header on.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice).filter(|packet| !packet.is_empty())
    }

    /// Those that hold these bytes, wherever they stand in them.
    pub fn with(&self, bytes: &[u8]) -> usize {
        self.0.iter().filter(|packet| packet.windows(bytes.len()).any(|window| window == bytes)).count()
    }

    /// Those from or to this address, by the outermost IP header.
    pub fn of(&self, address: IpAddr) -> usize {
        self.0.iter().filter(|packet| ends(packet).is_some_and(|ends| ends.contains(&address))).count()
    }

    /// Those between WireGuard devices.
    pub fn encrypted(&self) -> usize {
        self.0.iter().filter(|packet| udp_ports(packet) == Some([WIREGUARD; 2])).count()
    }

    /// Those between WireGuard devices that are a part of a larger one.
    pub fn encrypted_fragments(&self) -> usize {
        // Of the WireGuard devices' packets only, and a later part has no ports: so between their hosts.
        let hosts: BTreeSet<[IpAddr; 2]> =
            self.0.iter().filter(|p| udp_ports(p) == Some([WIREGUARD; 2])).filter_map(|p| ends(p)).collect();
        let fragment = |packet: &&Vec<u8>| match packet[0] >> 4 {
            4 => u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0 && packet[9] == UDP,
            _ => packet[6] == FRAGMENT,
        };
        let between = |packet: &&Vec<u8>| ends(packet).is_some_and(|ends| hosts.contains(&ends));
        self.0.iter().filter(between).filter(fragment).count()
    }
}

const UDP: u8 = 17;
const FRAGMENT: u8 = 44;

/// A socket for all packets of one interface, or of all of the calling thread's namespace.
fn listen(interface: Option<&LinkAddr>) -> io::Result<OwnedFd> {
    let socket =
        socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    if let Some(interface) = interface {
        bind(socket.as_raw_fd(), interface)?;
    }
    setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20))?;
    Ok(socket)
}

fn index(interface: &LinkAddr) -> u32 {
    interface.ifindex() as u32
}

/// All packets; those of one interface alone where one is given.
fn read(socket: &OwnedFd, interface: Option<u32>, stop: &AtomicBool) -> io::Result<Packets> {
    // Between its making and its binding a socket hears every interface.
    let elsewhere = |from: Option<LinkAddr>| interface.is_some() && from.as_ref().map(index) != interface;
    let mut buffer = vec![0; 128 << 10];
    let (mut packets, mut bytes) = (Vec::new(), 0);
    loop {
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((_, from)) if elsewhere(from) => {}
            Ok((length, _)) => {
                bytes += length;
                if bytes > MOST_BYTES {
                    return Err(io::Error::other(format!("more than {MOST_BYTES} bytes were seen")));
                }
                packets.push(buffer[..length].to_vec());
            }
            // Nothing came for a while. What was sent before the end was told is here by now.
            Err(nix::Error::EAGAIN) if stop.load(Ordering::Relaxed) => return Ok(Packets(packets)),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            // An interface of the namespace has gone down, which is none of our business.
            Err(nix::Error::ENETDOWN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Source and destination.
fn ends(packet: &[u8]) -> Option<[IpAddr; 2]> {
    let v4 = |at: usize| <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok().map(IpAddr::from);
    let v6 = |at: usize| <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok().map(IpAddr::from);
    match packet.first()? >> 4 {
        4 => Some([v4(12)?, v4(16)?]),
        6 => Some([v6(8)?, v6(24)?]),
        _ => None,
    }
}

fn udp_ports(packet: &[u8]) -> Option<[u16; 2]> {
    let at = match packet.first()? >> 4 {
        4 if *packet.get(9)? == UDP => usize::from(packet[0] & 0xf) * 4,
        6 if *packet.get(6)? == UDP => 40,
        _ => return None,
    };
    let ports = packet.get(at..at + 4)?;
    Some([u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]])])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0];
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, protocol, 0, 0, 172, 20, 1, 10, 172, 20, 2, 10]);
        packet.extend(payload);
        packet
    }

    #[test]
    fn packets_are_known_by_their_headers_and_by_what_they_hold() {
        let ports = [0xca, 0x9f, 0xca, 0x9f, 0, 0, 0, 0];
        let packets = Packets(vec![
            packet(UDP, 0, &ports),
            packet(6, 0, b"..GET / HTTP/1.1"),
            packet(UDP, 0x2000, &ports),
            packet(UDP, 0x0040, b"the rest"),
            vec![0x45],
            Vec::new(),
        ]);
        assert_eq!(packets.encrypted(), 2);
        assert_eq!(packets.encrypted_fragments(), 2);
        assert_eq!(packets.with(b"HTTP"), 1);
        assert_eq!(packets.of("172.20.2.10".parse().unwrap_or_else(|_| unreachable!())), 4);
    }
}
