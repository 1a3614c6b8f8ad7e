//! Packets for tests, built from what they mean and one field after the other: the naive model that the fast code is
//! compared with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use proptest::prelude::*;

use crate::device::checksum::{finish, fold, pseudo_header_of, sum};
use crate::device::vnet::ChecksumField;

/// Which IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// A TCP or UDP packet.
#[derive(Debug, Clone)]
pub(crate) struct TestPacket {
    pub(crate) family: Family,
    pub(crate) tcp: bool,
    pub(crate) hosts: (u8, u8),
    pub(crate) ports: (u16, u16),
    pub(crate) id: u16,
    pub(crate) sequence: u32,
    pub(crate) flags: u8,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl TestPacket {
    /// A TCP segment of a connection between 10.0.0.1 and 10.0.0.2 or the like in IPv6.
    pub(crate) fn tcp(family: Family, sequence: u32, payload: Vec<u8>) -> Self {
        let options = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2].to_vec();
        let (hosts, ports) = ((1, 2), (40_000, 5201));
        Self { family, tcp: true, hosts, ports, id: 0, sequence, flags: 0x10, options, payload }
    }

    /// As [`TestPacket::tcp`], a UDP datagram.
    pub(crate) fn udp(family: Family, payload: Vec<u8>) -> Self {
        Self { tcp: false, options: Vec::new(), ..Self::tcp(family, 0, payload) }
    }

    pub(crate) fn any(length: Range<usize>) -> impl Strategy<Value = Self> {
        let options = (0usize..=10).prop_flat_map(|words| proptest::collection::vec(any::<u8>(), words * 4));
        let what = (any::<bool>(), any::<bool>(), any::<(u8, u8)>(), any::<(u16, u16)>());
        (
            what,
            any::<u16>(),
            any::<u32>(),
            any::<u8>(),
            options,
            proptest::collection::vec(any::<u8>(), length),
        )
            .prop_map(|((v4, tcp, hosts, ports), id, sequence, flags, options, payload)| Self {
                family: if v4 { Family::V4 } else { Family::V6 },
                tcp,
                hosts,
                ports,
                id,
                sequence,
                flags,
                options: if tcp { options } else { Vec::new() },
                payload,
            })
    }

    pub(crate) fn source(&self) -> IpAddr {
        self.address(self.hosts.0)
    }

    pub(crate) fn destination(&self) -> IpAddr {
        self.address(self.hosts.1)
    }

    /// The whole packet with its checksums.
    pub(crate) fn build(&self) -> Vec<u8> {
        let (mut packet, field) = self.build_unfinished();
        let (start, at) = (usize::from(field.start), usize::from(field.start + field.offset));
        let mut checksum = finish(sum(&packet[start..], 0));
        if !self.tcp && checksum == 0 {
            checksum = 0xffff;
        }
        packet[at..at + 2].copy_from_slice(&checksum.to_ne_bytes());
        packet
    }

    /// The packet as the kernel hands it to a device that finishes checksums.
    pub(crate) fn build_unfinished(&self) -> (Vec<u8>, ChecksumField) {
        let transport = self.transport();
        let (protocol, offset) = if self.tcp { (6, 16) } else { (17, 6) };
        let mut packet = match self.family {
            Family::V4 => {
                let total = (20 + transport.len()) as u16;
                let mut header = vec![0x45, 0];
                header.extend(total.to_be_bytes());
                header.extend(self.id.to_be_bytes());
                header.extend([0x40, 0, 64, protocol, 0, 0, 10, 0, 0, self.hosts.0, 10, 0, 0, self.hosts.1]);
                let checksum = finish(sum(&header, 0));
                header[10..12].copy_from_slice(&checksum.to_ne_bytes());
                header
            }
            Family::V6 => {
                let mut header = vec![0x60, 0, 0, 0];
                header.extend((transport.len() as u16).to_be_bytes());
                header.extend([protocol, 64]);
                for host in [self.source(), self.destination()] {
                    let IpAddr::V6(host) = host else { unreachable!() };
                    header.extend(host.octets());
                }
                header
            }
        };
        let start = packet.len();
        let pseudo = pseudo_header_of(self.source(), self.destination(), protocol, transport.len());
        packet.extend(transport);
        let at = start + offset;
        packet[at..at + 2].copy_from_slice(&fold(pseudo).to_ne_bytes());
        (packet, ChecksumField { start: start as u16, offset: offset as u16 })
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.ports.0.to_be_bytes());
        bytes.extend(self.ports.1.to_be_bytes());
        if self.tcp {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend(7u32.to_be_bytes());
            bytes.extend([((5 + self.options.len() / 4) as u8) << 4, self.flags, 0x01, 0xf6, 0, 0, 0, 0]);
            bytes.extend(&self.options);
        } else {
            bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn address(&self, host: u8) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(10, 0, 0, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into()).into(),
        }
    }
}

/// Whether lengths and checksums of a TCP or UDP packet without IP options are right.
pub(crate) fn packet_is_sound(packet: &[u8]) -> bool {
    let word = |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
    let v4 = packet[0] >> 4 == 4;
    let (header, protocol, addresses) = if v4 { (20, packet[9], 12..20) } else { (40, packet[6], 8..40) };
    let length_is_right = if v4 { word(2) == packet.len() } else { word(4) + 40 == packet.len() };
    let ip_is_right = !v4 || fold(sum(&packet[..20], 0)) == 0xffff;
    let udp_is_right = protocol != 17 || (word(header + 4) == packet.len() - header && word(header + 6) != 0);
    let addresses = &packet[addresses];
    let (source, destination) = addresses.split_at(addresses.len() / 2);
    let pseudo = crate::device::checksum::pseudo_header(source, destination, protocol, packet.len() - header);
    length_is_right && ip_is_right && udp_is_right && fold(sum(&packet[header..], pseudo)) == 0xffff
}
