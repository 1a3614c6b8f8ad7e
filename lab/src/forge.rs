//! A node that lies: packets sent into its encryption device with whatever source it likes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, setsockopt,
    socket, sockopt,
};

use crate::error::Result;
use crate::netns::NetNs;

/// The mark that routes a packet to the encryption device, whatever the other routes say.
const TO_DEVICE: u32 = isthmus_node_agent::datapath::routing::MARK;

impl NetNs {
    /// Sends a UDP datagram from this node through its encryption device, in the name of `source`.
    ///
    /// # Errors
    /// When the node has no such device, or the kernel refuses.
    pub fn forge(&self, source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Result<()> {
        let packet = datagram(source, destination, payload);
        self.run(move || {
            // Such a socket takes whole packets, header and all.
            let (family, flags) = match destination {
                SocketAddr::V4(_) => (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC),
                SocketAddr::V6(_) => (AddressFamily::Inet6, SockFlag::SOCK_CLOEXEC),
            };
            let raw = socket(family, SockType::Raw, flags, SockProtocol::Raw)?;
            setsockopt(&raw, sockopt::Mark, &TO_DEVICE)?;
            let sent = match destination {
                SocketAddr::V4(to) => {
                    sendto(raw.as_raw_fd(), &packet, &SockaddrIn::from(to), MsgFlags::empty())
                }
                SocketAddr::V6(mut to) => {
                    // The kernel wants none here.
                    to.set_port(0);
                    sendto(raw.as_raw_fd(), &packet, &SockaddrIn6::from(to), MsgFlags::empty())
                }
            }?;
            match sent == packet.len() {
                true => Ok(()),
                false => Err(io::Error::other(format!("{sent} of {} bytes were sent", packet.len()))),
            }
        })
    }
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
