//! The header that precedes every packet on a TUN device with offload: `struct virtio_net_hdr` of the virtio
//! specification, in the byte order of the machine. It says what the kernel left for the device to do (finish a
//! checksum, cut a large segment into packets) and what the device leaves to the kernel.

/// Bytes of the header.
pub(crate) const VNET_HEADER: usize = 10;

const NEEDS_CSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Set besides the type when a segment carries CWR. The device does not offer it, so it does not come.
const GSO_ECN: u8 = 0x80;

/// How the packet behind the header is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gso {
    /// It is one packet.
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either.
    Udp,
}

/// The header, parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    /// How to cut.
    pub(crate) gso: Gso,
    /// Bytes of payload in each packet but the last, when there is cutting to do.
    pub(crate) gso_size: u16,
    /// Bytes of IP and transport header. The kernel's own are exact; others' are a hint.
    pub(crate) header_length: u16,
    /// Where the unfinished checksum begins to count, and how far from there it is stored.
    pub(crate) checksum: Option<ChecksumField>,
}

/// A checksum that covers everything from `start` and is stored at `start + offset`, where the sum of the pseudo
/// header already is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChecksumField {
    /// From the start of the packet.
    pub(crate) start: u16,
    /// From `start`.
    pub(crate) offset: u16,
}

impl VnetHeader {
    /// A packet with nothing left to do.
    pub(crate) const PLAIN: Self = Self { gso: Gso::None, gso_size: 0, header_length: 0, checksum: None };

    /// `None` for a kind of offload that was not asked for.
    pub(crate) fn parse(bytes: &[u8; VNET_HEADER]) -> Option<Self> {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let gso = match bytes[1] & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 => Gso::Tcp4,
            GSO_TCPV6 => Gso::Tcp6,
            GSO_UDP_L4 => Gso::Udp,
            _ => return None,
        };
        let checksum =
            (bytes[0] & NEEDS_CSUM != 0).then(|| ChecksumField { start: word(6), offset: word(8) });
        Some(Self { gso, gso_size: word(4), header_length: word(2), checksum })
    }

    /// As the kernel reads it.
    pub(crate) fn encode(&self) -> [u8; VNET_HEADER] {
        let mut bytes = [0; VNET_HEADER];
        bytes[1] = match self.gso {
            Gso::None => GSO_NONE,
            Gso::Tcp4 => GSO_TCPV4,
            Gso::Tcp6 => GSO_TCPV6,
            Gso::Udp => GSO_UDP_L4,
        };
        bytes[2..4].copy_from_slice(&self.header_length.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        if let Some(field) = self.checksum {
            bytes[0] = NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&field.start.to_ne_bytes());
            bytes[8..10].copy_from_slice(&field.offset.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_parses_to_the_same() {
        for gso in [Gso::None, Gso::Tcp4, Gso::Tcp6, Gso::Udp] {
            for checksum in [None, Some(ChecksumField { start: 40, offset: 16 })] {
                let header = VnetHeader { gso, gso_size: 1368, header_length: 52, checksum };
                assert_eq!(VnetHeader::parse(&header.encode()), Some(header));
            }
        }
        assert_eq!(VnetHeader::PLAIN.encode(), [0; VNET_HEADER]);
    }

    #[test]
    fn unknown_kinds_of_offload_are_refused() {
        let mut bytes = [0; VNET_HEADER];
        bytes[1] = 3;
        assert_eq!(VnetHeader::parse(&bytes), None);
    }
}
