//! Cutting what the kernel sends in one piece (TSO, USO) into the packets that go through the tunnel, with complete
//! headers and checksums.
//!
//! Nothing is copied: the payload of each packet stays where it is, and its headers are written into the bytes before
//! it, which belong to the packet before and have been sent by then.

use std::ops::Range;

use super::checksum;
use super::vnet::{ChecksumField, Gso, VnetHeader};

/// The longest IP and transport header of a segment that is cut: IPv4 and TCP with all their options, or IPv6 with
/// some extension headers.
const HEADER_MAX: usize = 256;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// A frame from the kernel that cannot be what its header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadFrame;

/// The packets of one frame, to be taken one after the other with [`Segments::next`].
pub(crate) struct Segments {
    kind: Kind,
    /// Where the next packet's payload begins.
    at: usize,
    /// Bytes of the frame.
    length: usize,
}

#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack, and most are of the large kind")]
enum Kind {
    Whole { taken: bool },
    Cut(Cut),
}

struct Cut {
    template: [u8; HEADER_MAX],
    header_length: usize,
    transport: usize,
    tcp: bool,
    ipv4: bool,
    gso_size: usize,
    index: u16,
    /// Sum of the addresses and the protocol: the pseudo header but for the length.
    pseudo: u64,
}

impl Segments {
    /// Prepares to cut `frame`, an IP packet that `header` came with. A checksum that needs finishing is finished here
    /// when there is nothing to cut.
    ///
    /// # Errors
    /// [`BadFrame`] if header and frame contradict each other.
    pub(crate) fn new(frame: &mut [u8], header: &VnetHeader) -> Result<Self, BadFrame> {
        let length = frame.len();
        if header.gso == Gso::None {
            if let Some(field) = header.checksum {
                finish_checksum(frame, field)?;
            }
            return Ok(Self { kind: Kind::Whole { taken: false }, at: 0, length });
        }
        let cut = Cut::new(frame, header)?;
        let at = cut.header_length;
        Ok(Self { kind: Kind::Cut(cut), at, length })
    }

    /// Where in `frame`, which is the same as before, the next packet is. The bytes of those before it are no more
    /// what they were.
    pub(crate) fn next(&mut self, frame: &mut [u8]) -> Option<Range<usize>> {
        match &mut self.kind {
            Kind::Whole { taken } => (!std::mem::replace(taken, true)).then_some(0..self.length),
            Kind::Cut(cut) => {
                if self.at >= self.length {
                    return None;
                }
                let payload = self.at..self.length.min(self.at + cut.gso_size);
                let packet = payload.start - cut.header_length..payload.end;
                cut.write_header(&mut frame[packet.clone()], payload.end == self.length);
                self.at = payload.end;
                Some(packet)
            }
        }
    }
}

impl Cut {
    fn new(frame: &[u8], header: &VnetHeader) -> Result<Self, BadFrame> {
        let version = frame.first().ok_or(BadFrame)? >> 4;
        let ipv4 = match (version, header.gso) {
            (4, Gso::Tcp4 | Gso::Udp) => true,
            (6, Gso::Tcp6 | Gso::Udp) => false,
            _ => return Err(BadFrame),
        };
        let tcp = header.gso != Gso::Udp;
        let field = header.checksum.ok_or(BadFrame)?;
        let transport = usize::from(field.start);
        let shortest = if ipv4 { 20 } else { 40 };
        let room = transport + if tcp { 20 } else { 8 };
        if transport < shortest || frame.len() < room || header.gso_size == 0 {
            return Err(BadFrame);
        }
        let header_length =
            if tcp { transport + usize::from(frame[transport + 12] >> 4) * 4 } else { transport + 8 };
        if header_length < room || header_length > HEADER_MAX || frame.len() <= header_length {
            return Err(BadFrame);
        }
        let mut template = [0; HEADER_MAX];
        template[..header_length].copy_from_slice(&frame[..header_length]);
        let (source, destination) = addresses(frame, ipv4);
        let protocol = if tcp { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP } as u8;
        let pseudo = checksum::pseudo_header(source, destination, protocol, 0);
        let gso_size = usize::from(header.gso_size);
        Ok(Self { template, header_length, transport, tcp, ipv4, gso_size, index: 0, pseudo })
    }

    fn write_header(&mut self, packet: &mut [u8], last: bool) {
        packet[..self.header_length].copy_from_slice(&self.template[..self.header_length]);
        self.write_ip(packet);
        let transport = self.transport;
        let segment_length = packet.len() - transport;
        let field = if self.tcp { transport + 16 } else { transport + 6 };
        if self.tcp {
            let first = u32::from_be_bytes([
                self.template[transport + 4],
                self.template[transport + 5],
                self.template[transport + 6],
                self.template[transport + 7],
            ]);
            // A frame is at most 64 KiB, so this fits in 32 bits; sequence numbers wrap by design.
            let sequence = first.wrapping_add(u32::from(self.index) * self.gso_size as u32);
            packet[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            if !last {
                packet[transport + 13] &= !(TCP_FIN | TCP_PSH);
            }
            if self.index > 0 {
                packet[transport + 13] &= !TCP_CWR;
            }
        } else {
            packet[transport + 4..transport + 6].copy_from_slice(&(segment_length as u16).to_be_bytes());
        }
        packet[field..field + 2].fill(0);
        let sum = self.pseudo + u64::from((segment_length as u16).to_be());
        let mut sum = checksum::finish(checksum::sum(&packet[transport..], sum));
        if !self.tcp && sum == 0 {
            sum = 0xffff;
        }
        packet[field..field + 2].copy_from_slice(&sum.to_ne_bytes());
        self.index = self.index.wrapping_add(1);
    }

    fn write_ip(&self, packet: &mut [u8]) {
        let total = packet.len();
        if self.ipv4 {
            packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            let first = u16::from_be_bytes([self.template[4], self.template[5]]);
            packet[4..6].copy_from_slice(&first.wrapping_add(self.index).to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(&packet[..self.transport], 0));
            packet[10..12].copy_from_slice(&sum.to_ne_bytes());
        } else {
            packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
        }
    }
}

fn finish_checksum(frame: &mut [u8], field: ChecksumField) -> Result<(), BadFrame> {
    let start = usize::from(field.start);
    let at = start + usize::from(field.offset);
    if at + 2 > frame.len() {
        return Err(BadFrame);
    }
    let mut sum = checksum::finish(checksum::sum(&frame[start..], 0));
    // Only UDP reads zero as "no checksum"; for TCP both spell the same number.
    if sum == 0 {
        sum = 0xffff;
    }
    frame[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
    Ok(())
}

fn addresses(frame: &[u8], ipv4: bool) -> (&[u8], &[u8]) {
    if ipv4 { (&frame[12..16], &frame[16..20]) } else { (&frame[8..24], &frame[24..40]) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::testing::{Family, TestPacket, packet_is_sound};

    fn cut(frame: &[u8], header: &VnetHeader) -> Vec<Vec<u8>> {
        let mut frame = frame.to_vec();
        let mut segments = Segments::new(&mut frame, header).unwrap();
        let mut packets = Vec::new();
        while let Some(range) = segments.next(&mut frame) {
            packets.push(frame[range].to_vec());
        }
        packets
    }

    /// The same packets built one by one from what the frame means.
    fn model(frame: &TestPacket, size: usize) -> Vec<Vec<u8>> {
        let count = frame.payload.len().div_ceil(size);
        frame
            .payload
            .chunks(size)
            .enumerate()
            .map(|(index, payload)| {
                let last = index + 1 == count;
                let mut packet = frame.clone();
                packet.payload = payload.to_vec();
                packet.id = frame.id.wrapping_add(index as u16);
                packet.sequence = frame.sequence.wrapping_add((index * size) as u32);
                if !last {
                    packet.flags &= !(TCP_FIN | TCP_PSH);
                }
                if index > 0 {
                    packet.flags &= !TCP_CWR;
                }
                packet.build()
            })
            .collect()
    }

    fn gso(packet: &TestPacket) -> Gso {
        match (packet.tcp, packet.family) {
            (false, _) => Gso::Udp,
            (true, Family::V4) => Gso::Tcp4,
            (true, Family::V6) => Gso::Tcp6,
        }
    }

    proptest! {
        #[test]
        fn a_large_segment_is_cut_into_the_packets_it_means(
            packet in TestPacket::any(1..20_000),
            size in 1u16..3000,
        ) {
            let (frame, field) = packet.build_unfinished();
            let header = VnetHeader { gso: gso(&packet), gso_size: size, header_length: 0, checksum: Some(field) };
            let packets = cut(&frame, &header);
            prop_assert_eq!(&packets, &model(&packet, usize::from(size)));
            for packet in packets {
                prop_assert!(packet_is_sound(&packet));
            }
        }

        #[test]
        fn a_single_packet_only_has_its_checksum_finished(packet in TestPacket::any(0..1400)) {
            let (frame, field) = packet.build_unfinished();
            let header = VnetHeader { checksum: Some(field), ..VnetHeader::PLAIN };
            let packets = cut(&frame, &header);
            prop_assert_eq!(packets.len(), 1);
            prop_assert!(packet_is_sound(&packets[0]));
        }

        #[test]
        fn whatever_the_header_says_nothing_is_read_or_written_outside_the_frame(
            mut frame in proptest::collection::vec(any::<u8>(), 0..300),
            header in any::<[u8; super::super::vnet::VNET_HEADER]>(),
        ) {
            if let Some(header) = VnetHeader::parse(&header)
                && let Ok(mut segments) = Segments::new(&mut frame, &header)
            {
                while let Some(range) = segments.next(&mut frame) {
                    prop_assert!(range.end <= frame.len());
                }
            }
        }
    }

    #[test]
    fn a_frame_without_offload_is_left_alone() {
        let frame = [0x60, 1, 2, 3];
        assert_eq!(cut(&frame, &VnetHeader::PLAIN), vec![frame.to_vec()]);
    }
}
