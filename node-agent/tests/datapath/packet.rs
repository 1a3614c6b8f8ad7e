//! Builds Ethernet frames and reads them again, with every checksum computed from scratch.

use std::net::{IpAddr, SocketAddr};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;
pub(crate) const FIN: u8 = 1;
pub(crate) const RST: u8 = 4;

const MACS: [u8; 12] = [2, 0, 0, 0, 0, 0xaa, 2, 0, 0, 0, 0, 0xbb];

/// What a frame is built from, and what is read from one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) protocol: u8,
    pub(crate) tcp_flags: u8,
    pub(crate) payload: Vec<u8>,
    /// IPv4 options or IPv6 extension headers, as they stand in the packet. For IPv6, pairs of a type and a header.
    pub(crate) options: Vec<u8>,
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
    /// UDP only.
    pub(crate) zero_checksum: bool,
}

impl Frame {
    pub(crate) fn udp(source: &str, destination: &str) -> Self {
        Self::new(UDP, source, destination)
    }

    pub(crate) fn tcp(source: &str, destination: &str, flags: u8) -> Self {
        Self { tcp_flags: flags, ..Self::new(TCP, source, destination) }
    }

    fn new(protocol: u8, source: &str, destination: &str) -> Self {
        Self {
            source: source.parse().expect("a socket address"),
            destination: destination.parse().expect("a socket address"),
            protocol,
            tcp_flags: 0,
            payload: b"an odd number of bytes!".to_vec(),
            options: Vec::new(),
            extensions: Vec::new(),
            zero_checksum: false,
        }
    }

    /// The whole Ethernet frame.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.around(&self.transport())
    }

    /// Transport header and payload, with a valid checksum.
    pub(crate) fn transport(&self) -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend(self.source.port().to_be_bytes());
        segment.extend(self.destination.port().to_be_bytes());
        if self.protocol == TCP {
            segment.extend([0, 0, 0, 7, 0, 0, 0, 9, 5 << 4, self.tcp_flags, 1, 0, 0, 0, 0, 0]);
        } else {
            segment.extend((8 + self.payload.len() as u16).to_be_bytes());
            segment.extend([0, 0]);
        }
        segment.extend(&self.payload);
        if !self.zero_checksum {
            let at = if self.protocol == TCP { 16 } else { 6 };
            let sum = !checksum_of(&self.pseudo_header(segment.len()), &segment);
            let sum = if sum == 0 && self.protocol == UDP { 0xffff } else { sum };
            segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        segment
    }

    /// A frame of these addresses and options around any transport bytes.
    pub(crate) fn around(&self, transport: &[u8]) -> Vec<u8> {
        self.around_fragment(transport, 0, false)
    }

    /// The same as a fragment: `offset` in bytes, IPv4 only (IPv6 has a header for it).
    pub(crate) fn around_fragment(&self, transport: &[u8], offset: u16, more: bool) -> Vec<u8> {
        let mut frame = MACS.to_vec();
        frame.extend(ip_packet(self, transport, offset, more));
        frame
    }

    fn pseudo_header(&self, len: usize) -> Vec<u8> {
        pseudo_header(self.source.ip(), self.destination.ip(), self.protocol, len)
    }

    /// Reads a frame, and panics unless every checksum in it is right.
    pub(crate) fn read(frame: &[u8]) -> Self {
        let ethertype = u16::from_be_bytes([frame[12], frame[13]]);
        let packet = &frame[14..];
        let (source, destination, mut protocol, mut l4, options) = match ethertype {
            0x0800 => {
                let len = usize::from(packet[0] & 0xf) * 4;
                assert_eq!(checksum_of(&[], &packet[..len]), 0xffff, "IPv4 header checksum");
                assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
                (ipv4(&packet[12..]), ipv4(&packet[16..]), packet[9], len, packet[20..len].to_vec())
            }
            0x86dd => {
                assert_eq!(usize::from(u16::from_be_bytes([packet[4], packet[5]])), packet.len() - 40);
                (ipv6(&packet[8..]), ipv6(&packet[24..]), packet[6], 40, Vec::new())
            }
            other => panic!("ethertype {other:#x}"),
        };
        let mut extensions = Vec::new();
        while ethertype == 0x86dd && protocol != TCP && protocol != UDP {
            let len = if protocol == 44 { 8 } else { 8 * (usize::from(packet[l4 + 1]) + 1) };
            extensions.push((protocol, packet[l4..l4 + len].to_vec()));
            (protocol, l4) = (packet[l4], l4 + len);
        }
        let segment = &packet[l4..];
        let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
        let (tcp_flags, header) = if protocol == TCP { (segment[13], 20) } else { (0, 8) };
        let zero_checksum = protocol == UDP && segment[6..8] == [0, 0];
        if !zero_checksum {
            let pseudo = pseudo_header(source, destination, protocol, segment.len());
            assert_eq!(checksum_of(&pseudo, segment), 0xffff, "transport checksum");
        }
        Self {
            source: SocketAddr::new(source, port(0)),
            destination: SocketAddr::new(destination, port(2)),
            protocol,
            tcp_flags,
            payload: segment[header..].to_vec(),
            options,
            extensions,
            zero_checksum,
        }
    }
}

/// An ICMP or ICMPv6 error from `router`, to the source of `about`, which it quotes as far as routers do at least.
pub(crate) fn icmp_error(router: IpAddr, kind: u8, code: u8, about: &Frame) -> Vec<u8> {
    let kept = if router.is_ipv4() { 28 + about.options.len() } else { usize::MAX };
    icmp_error_quoting(router, kind, code, about.source, &about.bytes()[14..], kept)
}

/// An error to `to` about an IP packet, of which the first bytes are quoted.
pub(crate) fn icmp_error_quoting(
    router: IpAddr,
    kind: u8,
    code: u8,
    to: SocketAddr,
    quoted: &[u8],
    kept: usize,
) -> Vec<u8> {
    let v4 = router.is_ipv4();
    let mut message = vec![kind, code, 0, 0, 0, 0, 5, 0x14];
    message.extend(&quoted[..kept.min(quoted.len())]);
    let outer = Frame {
        source: SocketAddr::new(router, 0),
        destination: to,
        ..Frame::new(if v4 { 1 } else { 58 }, "0.0.0.0:0", "0.0.0.0:0")
    };
    let pseudo = if v4 { Vec::new() } else { outer.pseudo_header(message.len()) };
    let sum = !checksum_of(&pseudo, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    outer.around(&message)
}

/// Checks an ICMP error's own checksums, and returns source and destination of the packet that it quotes.
pub(crate) fn read_icmp_error(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let packet = &frame[14..];
    let v4 = packet[0] >> 4 == 4;
    let message = &packet[if v4 { 20 } else { 40 }..];
    let pseudo = if v4 {
        assert_eq!(checksum_of(&[], &packet[..20]), 0xffff, "IPv4 header checksum");
        Vec::new()
    } else {
        pseudo_header(ipv6(&packet[8..]), ipv6(&packet[24..]), 58, message.len())
    };
    assert_eq!(checksum_of(&pseudo, message), 0xffff, "ICMP checksum");
    let quoted = &message[8..];
    let (source, destination, l4) = if v4 {
        let len = usize::from(quoted[0] & 0xf) * 4;
        assert_eq!(checksum_of(&[], &quoted[..len]), 0xffff, "quoted IPv4 header checksum");
        (ipv4(&quoted[12..]), ipv4(&quoted[16..]), len)
    } else {
        (ipv6(&quoted[8..]), ipv6(&quoted[24..]), 40)
    };
    let port = |at: usize| u16::from_be_bytes([quoted[l4 + at], quoted[l4 + at + 1]]);
    (SocketAddr::new(source, port(0)), SocketAddr::new(destination, port(2)))
}

fn ip_packet(frame: &Frame, transport: &[u8], offset: u16, more: bool) -> Vec<u8> {
    match (frame.source.ip(), frame.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let len = 20 + frame.options.len();
            let fragment = (offset / 8) | if more { 0x2000 } else { 0 };
            let mut packet = vec![0x08, 0x00, 0x40 | (len / 4) as u8, 0];
            packet.extend(((len + transport.len()) as u16).to_be_bytes());
            packet.extend([0x12, 0x34]);
            packet.extend(fragment.to_be_bytes());
            packet.extend([64, frame.protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            packet.extend(&frame.options);
            let sum = !checksum_of(&[], &packet[2..]);
            packet[12..14].copy_from_slice(&sum.to_be_bytes());
            packet.extend(transport);
            packet
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let extensions: usize = frame.extensions.iter().map(|(_, header)| header.len()).sum();
            let first = frame.extensions.first().map_or(frame.protocol, |(kind, _)| *kind);
            let mut packet = vec![0x86, 0xdd, 0x60, 0, 0, 0];
            packet.extend(((extensions + transport.len()) as u16).to_be_bytes());
            packet.extend([first, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            for (index, (_, header)) in frame.extensions.iter().enumerate() {
                let next = frame.extensions.get(index + 1).map_or(frame.protocol, |(kind, _)| *kind);
                packet.push(next);
                packet.extend(&header[1..]);
            }
            packet.extend(transport);
            packet
        }
        _ => panic!("one frame, one family"),
    }
}

fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, len: usize) -> Vec<u8> {
    let mut header = Vec::new();
    for addr in [source, destination] {
        match addr {
            IpAddr::V4(addr) => header.extend(addr.octets()),
            IpAddr::V6(addr) => header.extend(addr.octets()),
        }
    }
    header.extend((len as u32).to_be_bytes());
    header.extend([0, 0, 0, protocol]);
    header
}

/// The one's complement sum (0xffff over what includes a right checksum).
pub(crate) fn checksum_of(pseudo: &[u8], bytes: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        bytes
            .chunks(2)
            .map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
            .sum()
    };
    let mut sum = words(pseudo) + words(bytes);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn ipv4(bytes: &[u8]) -> IpAddr {
    IpAddr::from(<[u8; 4]>::try_from(&bytes[..4]).expect("four bytes"))
}

fn ipv6(bytes: &[u8]) -> IpAddr {
    IpAddr::from(<[u8; 16]>::try_from(&bytes[..16]).expect("sixteen bytes"))
}
