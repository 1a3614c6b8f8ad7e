//! A node that lies: packets sent into its encryption device with whatever source it likes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{fs, io};

use isthmus_node_agent::datapath::routing::MARK;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::{Doing, LabError, Result};
use crate::netns::NetNs;

/// How long the device may take to show a packet that is sent through it.
const SHOWN: Duration = Duration::from_secs(5);

/// A node that sends through its encryption device in whatever name it likes.
///
/// It hands packets to the device itself, below routes and packet filters. Where those write another source into what leaves
/// the node, as they do on kind, a lie would become the truth on the way.
pub struct Liar {
    socket: OwnedFd,
    /// The device, and the family of packets.
    device: LinkAddr,
    to: SocketAddr,
}

impl NetNs {
    /// Makes this node one that lies to `destination`, through its encryption device (the interface `device`).
    ///
    /// # Errors
    /// When the node has no such device, or the kernel refuses.
    pub fn liar(&self, device: &str, destination: SocketAddr) -> Result<Liar> {
        let name = device.to_owned();
        let (socket, device) = self.run(move || {
            // Such a socket takes whole packets, header and all.
            let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
            Ok((raw, address_of(&name, destination)?))
        })?;
        Ok(Liar { socket, device, to: destination })
    }
}

impl Liar {
    /// Sends a UDP datagram in the name of `source`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn send(&self, source: SocketAddr, payload: &[u8]) -> Result<()> {
        let packet = datagram(source, self.to, payload);
        let sent = sendto(self.socket.as_raw_fd(), &packet, &self.device, MsgFlags::empty());
        match sent.doing(|| format!("sending in the name of {source}"))? {
            sent if sent == packet.len() => Ok(()),
            sent => Err(LabError::invalid(format!("{sent} of {} bytes were sent", packet.len()))),
        }
    }
}

/// An interface of the calling thread's namespace as packet sockets name it, with the family of a destination. The kernel tells
/// it of packets that go out by the interface, so one is sent, honestly, by the mark that routes it there.
fn address_of(device: &str, destination: SocketAddr) -> io::Result<LinkAddr> {
    let index = if_nametoindex(device).map_err(|_| missing(device))? as usize;
    let heard =
        socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    setsockopt(&heard, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100))?;
    let any: IpAddr = match destination {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let probe = UdpSocket::bind((any, 0))?;
    setsockopt(&probe, sockopt::Mark, &MARK)?;
    let (begun, mut buffer) = (Instant::now(), [0; 128]);
    while begun.elapsed() < SHOWN {
        probe.send_to(&[], destination)?;
        while let Ok((length, Some(address))) = recvfrom::<LinkAddr>(heard.as_raw_fd(), &mut buffer) {
            if address.ifindex() == index && is_to(&buffer[..length], destination.ip()) {
                return Ok(address);
            }
            if begun.elapsed() >= SHOWN {
                break;
            }
        }
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("what is sent to {destination} does not go by {device}"),
    ))
}

fn is_to(packet: &[u8], destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(to) => {
            packet.first().is_some_and(|b| b >> 4 == 4) && packet.get(16..20) == Some(&to.octets())
        }
        IpAddr::V6(to) => {
            packet.first().is_some_and(|b| b >> 4 == 6) && packet.get(24..40) == Some(&to.octets())
        }
    }
}

impl NetNs {
    /// How many packets an interface of this namespace has refused for what they are. WireGuard in the kernel counts so those
    /// that bear a source which their sender does not own.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn frame_errors(&self, interface: &str) -> Result<u64> {
        let interface = interface.to_owned();
        self.run(move || {
            let all = fs::read_to_string("/proc/thread-self/net/dev")?;
            frame_errors(&all, &interface).ok_or_else(|| missing(&interface))
        })
    }
}

/// From what procfs says of all interfaces: `name: bytes packets errs drop fifo frame ...`, of what was received first.
fn frame_errors(all: &str, interface: &str) -> Option<u64> {
    let of = |line: &str| line.trim_start().strip_prefix(interface)?.strip_prefix(':').map(str::to_owned);
    all.lines().find_map(of)?.split_ascii_whitespace().nth(5)?.parse().ok()
}

fn missing(interface: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {interface}"))
}

fn datagram(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut udp = Vec::with_capacity(length.into());
    udp.extend(source.port().to_be_bytes());
    udp.extend(destination.port().to_be_bytes());
    udp.extend(length.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(payload);
    let mut packet = Vec::new();
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend([0x45, 0]);
            packet.extend((20 + length).to_be_bytes());
            packet.extend([0, 1, 0, 0, 64, UDP, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (from, to) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([UDP, 64]);
            packet.extend(v6(from).octets());
            packet.extend(v6(to).octets());
        }
    }
    // IPv6 knows no datagram without a checksum.
    let ends = if source.is_ipv4() { &packet[12..20] } else { &packet[8..40] };
    let pseudo = [ends, &[0, 0], &length.to_be_bytes(), &[0, UDP], &udp].concat();
    let sum = match checksum(&pseudo) {
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&u16::to_be_bytes(sum));
    packet.extend(udp);
    packet
}

const UDP: u8 = 17;

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::to_ipv6_mapped(&address),
        IpAddr::V6(address) => address,
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_packets_are_the_sixth_number_of_those_received() {
        let all = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:  102400     100    0    0    0     0          0         0   102400     100    0    0    0     0       0          0
isthmus_wg0: 1480  12   21    0    0    20          0         0     2960      24    0    0    0     0       0          0
isthmus_wg01:   1   2    3    4    5     6          7         8        9      10   11   12   13    14      15         16
";
        assert_eq!(frame_errors(all, "isthmus_wg0"), Some(20));
        assert_eq!(frame_errors(all, "isthmus_wg1"), None);
    }

    #[test]
    fn a_datagram_of_either_family_has_right_checksums() {
        for (source, destination) in
            [("10.2.0.9:1", "10.1.0.3:7000"), ("[fd00:10:2::9]:1", "[fd00:10:1::3]:7000")]
        {
            let packet = datagram(
                source.parse().unwrap_or_else(|_| unreachable!()),
                destination.parse().unwrap_or_else(|_| unreachable!()),
                b"odd",
            );
            let v4 = packet[0] == 0x45;
            let (ends, udp) =
                if v4 { (&packet[12..20], &packet[20..]) } else { (&packet[8..40], &packet[40..]) };
            let pseudo = [ends, &[0, 0, 0, 11, 0, UDP], udp].concat();
            assert_eq!(checksum(&pseudo), 0);
            assert!(!v4 || checksum(&packet[..20]) == 0);
        }
    }
}
