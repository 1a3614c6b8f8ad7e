//! Joining the packets of a stream, as they come out of the tunnel, into large segments that cross the kernel's stack
//! once: what a network card's receive offload does.
//!
//! Packets stay where they were decrypted; a joined segment is a list of slices for one `writev`. A packet joins only
//! if cutting the segment would give back the same packets. Packets of one flow never overtake each other.

use std::io::IoSlice;
use std::ops::Range;

use super::checksum;
use super::vnet::{ChecksumField, Gso, VNET_HEADER, VnetHeader};

/// Packets in one segment. Kernels before 6.9 cut UDP into no more than this many.
const SEGMENTS_MAX: usize = 64;

/// The longest IP packet.
const PACKET_MAX: usize = 65_535;

/// Flows whose latest packet is remembered. A flow that shares a slot with another only joins less.
const SLOTS: usize = 64;

const NONE: u32 = u32::MAX;

const TCP_ACK: u8 = 0x10;
const TCP_PSH: u8 = 0x08;

/// Collects the packets of a batch and hands them on, joined.
///
/// All memory is taken at the beginning; a batch that is larger than expected makes it grow once.
pub(crate) struct Coalescer {
    packets: Vec<Packet>,
    items: Vec<Item>,
    slots: [u32; SLOTS],
    /// Whether the kernel takes UDP segments from a TUN device.
    udp: bool,
}

/// A packet in the arena, and the one that follows it in its segment.
struct Packet {
    at: u32,
    length: u32,
    next: u32,
}

/// What becomes one write.
struct Item {
    first: u32,
    last: u32,
    packets: u16,
    /// Bytes of IP packet when joined.
    total: u32,
    /// The same for all packets of a flow.
    slot: usize,
    flow: Option<Flow>,
}

/// What the next packet of the flow must look like to join.
struct Flow {
    headers: Headers,
    /// Bytes of payload in each packet but the last.
    size: u16,
    next_sequence: u32,
    next_id: u16,
    /// A packet that ends a segment is in: nothing may follow.
    closed: bool,
    push: bool,
}

/// Where a joinable packet has what.
#[derive(Clone, Copy)]
struct Headers {
    ipv4: bool,
    tcp: bool,
    transport: u8,
    length: u8,
}

impl Coalescer {
    /// For batches of about `packets` packets.
    pub(crate) fn new(packets: usize, udp: bool) -> Self {
        Self {
            packets: Vec::with_capacity(packets),
            items: Vec::with_capacity(packets),
            slots: [NONE; SLOTS],
            udp,
        }
    }

    /// Adds the IP packet at `range` of `arena`. Its length field has been checked, nothing else.
    pub(crate) fn push(&mut self, arena: &[u8], range: Range<usize>) {
        let packet = &arena[range.clone()];
        let index = self.packets.len() as u32;
        self.packets.push(Packet { at: range.start as u32, length: packet.len() as u32, next: NONE });
        let Some((headers, slot)) = Headers::parse(packet) else {
            self.items.push(Item::single(index, packet.len(), 0, None));
            return;
        };
        let flow = Flow::begin(packet, headers, self.udp);
        if let Some(flow) = &flow
            && let Some(item) = self.items.get_mut(self.slots[slot] as usize)
            && let Some(open) = &mut item.flow
        {
            let first = &self.packets[item.first as usize];
            let first = &arena[first.at as usize..(first.at + first.length) as usize];
            let payload = packet.len() - usize::from(headers.length);
            let fits =
                item.total as usize + payload <= PACKET_MAX && usize::from(item.packets) < SEGMENTS_MAX;
            if fits && open.takes(first, flow, packet) {
                open.add(flow, payload);
                self.packets[item.last as usize].next = index;
                item.last = index;
                item.packets += 1;
                item.total += payload as u32;
                return;
            }
        }
        // From here on the flow continues, if at all, behind this packet.
        self.slots[slot] = self.items.len() as u32;
        self.items.push(Item::single(index, packet.len(), slot, flow));
    }

    /// Gives each segment and each single packet to `write`, as slices that begin with the vnet header, in the order
    /// of their first packets, and forgets them. The number that comes with them is the same for all of a flow.
    pub(crate) fn flush(&mut self, arena: &mut [u8], mut write: impl FnMut(usize, &[IoSlice<'_>])) {
        for item in &self.items {
            let first = &self.packets[item.first as usize];
            let first = first.at as usize..(first.at + first.length) as usize;
            let header = match &item.flow {
                Some(flow) if item.packets > 1 => {
                    flow.write_header(&mut arena[first.clone()], item.total as usize)
                }
                _ => VnetHeader::PLAIN,
            };
            let header: [u8; VNET_HEADER] = header.encode();
            let mut slices = [IoSlice::new(&[]); SEGMENTS_MAX + 1];
            slices[0] = IoSlice::new(&header);
            slices[1] = IoSlice::new(&arena[first]);
            let mut count = 2;
            let skip = item.flow.as_ref().map_or(0, |flow| u32::from(flow.headers.length));
            let mut next = self.packets[item.first as usize].next;
            while let Some(packet) = self.packets.get(next as usize) {
                let payload = (packet.at + skip) as usize..(packet.at + packet.length) as usize;
                slices[count] = IoSlice::new(&arena[payload]);
                count += 1;
                next = packet.next;
            }
            write(item.slot, &slices[..count]);
        }
        self.items.clear();
        self.packets.clear();
        self.slots.fill(NONE);
    }
}

impl Item {
    fn single(index: u32, length: usize, slot: usize, flow: Option<Flow>) -> Self {
        Self { first: index, last: index, packets: 1, total: length as u32, slot, flow }
    }
}

impl Headers {
    /// The headers of a TCP or UDP packet that is all there and in one piece, and the slot of its flow.
    fn parse(packet: &[u8]) -> Option<(Self, usize)> {
        let (ipv4, transport, protocol, addresses) = match packet.first()? >> 4 {
            // 5 words: no options. No offset and no more fragments: whole.
            4 if packet[0] & 15 == 5 && packet.len() >= 28 && u16_at(packet, 6) & 0x3fff == 0 => {
                (true, 20, packet[9], 12..20)
            }
            6 if packet.len() >= 48 => (false, 40, packet[6], 8..40),
            _ => return None,
        };
        let (tcp, length) = match i32::from(protocol) {
            libc::IPPROTO_TCP if packet.len() >= transport + 20 => {
                (true, transport + usize::from(packet[transport + 12] >> 4) * 4)
            }
            libc::IPPROTO_UDP => (false, transport + 8),
            _ => return None,
        };
        if length > packet.len() || (tcp && length < transport + 20) {
            return None;
        }
        let mut hash = u64::from(u32_at(packet, transport)) ^ (u64::from(tcp) << 32);
        for word in packet[addresses].chunks_exact(4) {
            hash = hash.rotate_left(9) ^ u64::from(u32_at(word, 0));
        }
        let slot = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SLOTS.trailing_zeros());
        Some((Self { ipv4, tcp, transport: transport as u8, length: length as u8 }, slot as usize))
    }
}

impl Flow {
    /// What may join behind `packet`, or nothing if it stands alone.
    fn begin(packet: &[u8], headers: Headers, udp: bool) -> Option<Self> {
        let transport = usize::from(headers.transport);
        let payload = packet.len() - usize::from(headers.length);
        if payload == 0 {
            return None;
        }
        let (mut push, mut sequence) = (false, 0);
        if headers.tcp {
            let flags = packet[transport + 13];
            if flags & !TCP_PSH != TCP_ACK {
                return None;
            }
            push = flags & TCP_PSH != 0;
            sequence = u32_at(packet, transport + 4);
        } else if !udp
            || u16_at(packet, transport + 6) == 0
            || usize::from(u16_at(packet, transport + 4)) != packet.len() - transport
        {
            return None;
        }
        if !checksum_is_right(packet, headers) {
            return None;
        }
        Some(Self {
            headers,
            size: payload as u16,
            next_sequence: sequence.wrapping_add(payload as u32),
            next_id: if headers.ipv4 { u16_at(packet, 4).wrapping_add(1) } else { 0 },
            closed: push,
            push,
        })
    }

    /// Whether `packet`, of which `flow` is known, may join behind those that `first` began.
    fn takes(&self, first: &[u8], flow: &Self, packet: &[u8]) -> bool {
        let transport = usize::from(self.headers.transport);
        if self.closed
            || flow.size > self.size
            || flow.headers.ipv4 != self.headers.ipv4
            || flow.headers.tcp != self.headers.tcp
            || flow.headers.length != self.headers.length
        {
            return false;
        }
        let ip_matches = if self.headers.ipv4 {
            // Version, header length, traffic class; flags; TTL and protocol; addresses.
            let dont_fragment = first[6] & 0x40 != 0;
            first[..2] == packet[..2]
                && first[6] == packet[6]
                && first[8..10] == packet[8..10]
                && first[12..20] == packet[12..20]
                && (dont_fragment || u16_at(packet, 4) == self.next_id)
        } else {
            // All but the length.
            first[..4] == packet[..4] && first[6..40] == packet[6..40]
        };
        let ports_match = first[transport..transport + 4] == packet[transport..transport + 4];
        if !(ip_matches && ports_match) {
            return false;
        }
        !self.headers.tcp || {
            // Acknowledgment, offset, window, options; flags have been looked at.
            let (start, end) = (transport + 8, usize::from(self.headers.length));
            u32_at(packet, transport + 4) == self.next_sequence
                && first[start..start + 5] == packet[start..start + 5]
                && first[start + 6..start + 8] == packet[start + 6..start + 8]
                && first[start + 10..end] == packet[start + 10..end]
        }
    }

    fn add(&mut self, flow: &Self, payload: usize) {
        self.next_sequence = flow.next_sequence;
        self.next_id = self.next_id.wrapping_add(1);
        self.push |= flow.push;
        self.closed = flow.push || payload < usize::from(self.size);
    }

    /// Turns the headers of the first packet into those of the segment.
    fn write_header(&self, packet: &mut [u8], total: usize) -> VnetHeader {
        let transport = usize::from(self.headers.transport);
        let segment = total - transport;
        let (protocol, offset) =
            if self.headers.tcp { (libc::IPPROTO_TCP, 16) } else { (libc::IPPROTO_UDP, 6) };
        let addresses = if self.headers.ipv4 {
            packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(&packet[..20], 0));
            packet[10..12].copy_from_slice(&sum.to_ne_bytes());
            &packet[12..20]
        } else {
            packet[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
            &packet[8..40]
        };
        let (source, destination) = addresses.split_at(addresses.len() / 2);
        let pseudo = checksum::pseudo_header(source, destination, protocol as u8, segment);
        let at = transport + offset;
        packet[at..at + 2].copy_from_slice(&checksum::fold(pseudo).to_ne_bytes());
        if self.headers.tcp {
            packet[transport + 13] |= if self.push { TCP_PSH } else { 0 };
        } else {
            packet[transport + 4..transport + 6].copy_from_slice(&(segment as u16).to_be_bytes());
        }
        VnetHeader {
            gso: match (self.headers.tcp, self.headers.ipv4) {
                (true, true) => Gso::Tcp4,
                (true, false) => Gso::Tcp6,
                (false, _) => Gso::Udp,
            },
            gso_size: self.size,
            header_length: u16::from(self.headers.length),
            checksum: Some(ChecksumField { start: transport as u16, offset: offset as u16 }),
        }
    }
}

/// A joined segment gets a new checksum, so one that was wrong would become right.
fn checksum_is_right(packet: &[u8], headers: Headers) -> bool {
    let transport = usize::from(headers.transport);
    let (addresses, protocol) =
        if headers.ipv4 { (&packet[12..20], packet[9]) } else { (&packet[8..40], packet[6]) };
    if headers.ipv4 && checksum::fold(checksum::sum(&packet[..20], 0)) != 0xffff {
        return false;
    }
    let (source, destination) = addresses.split_at(addresses.len() / 2);
    let pseudo = checksum::pseudo_header(source, destination, protocol, packet.len() - transport);
    checksum::fold(checksum::sum(&packet[transport..], pseudo)) == 0xffff
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::gso::Segments;
    use crate::device::testing::{Family, TestPacket, packet_is_sound};

    /// What is written for these packets.
    fn join(packets: &[Vec<u8>], udp: bool) -> Vec<Vec<u8>> {
        let mut arena = Vec::new();
        let mut coalescer = Coalescer::new(packets.len(), udp);
        let mut ranges = Vec::new();
        for packet in packets {
            ranges.push(arena.len()..arena.len() + packet.len());
            arena.extend(packet);
        }
        for range in ranges {
            coalescer.push(&arena, range);
        }
        let mut written = Vec::new();
        coalescer.flush(&mut arena, |_, slices| {
            written.push(slices.iter().flat_map(|slice| slice.iter().copied()).collect());
        });
        written
    }

    /// What the kernel would make of what is written: the single packets.
    fn cut(written: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        for frame in written {
            let (header, frame) = frame.split_first_chunk().unwrap();
            let header = VnetHeader::parse(header).unwrap();
            let mut frame = frame.to_vec();
            let mut segments = Segments::new(&mut frame, &header).unwrap();
            while let Some(range) = segments.next(&mut frame) {
                packets.push(frame[range].to_vec());
            }
        }
        packets
    }

    fn stream(family: Family, count: u32, size: usize) -> Vec<Vec<u8>> {
        (0..count)
            .map(|index| {
                let mut packet = TestPacket::tcp(family, 100 + index * size as u32, vec![index as u8; size]);
                packet.id = index as u16;
                packet.build()
            })
            .collect()
    }

    #[test]
    fn a_stream_of_full_packets_becomes_one_segment() {
        for family in [Family::V4, Family::V6] {
            let packets = stream(family, 45, 1368);
            let written = join(&packets, true);
            assert_eq!(written.len(), 1);
            assert_eq!(cut(&written), packets);
        }
    }

    #[test]
    fn all_of_a_flow_is_written_under_one_number_and_flows_are_spread_over_many() {
        let mut coalescer = Coalescer::new(64, true);
        let (mut arena, mut ranges) = (Vec::new(), Vec::new());
        for port in 0..32 {
            for payload in [vec![1; 10], Vec::new()] {
                let mut packet = TestPacket::tcp(Family::V4, 1, payload);
                packet.ports.0 = 40_000 + port;
                let packet = packet.build();
                ranges.push(arena.len()..arena.len() + packet.len());
                arena.extend(packet);
            }
        }
        ranges.into_iter().for_each(|range| coalescer.push(&arena, range));
        let mut numbers = std::collections::BTreeMap::<[u8; 2], Vec<usize>>::new();
        coalescer.flush(&mut arena, |number, slices| {
            numbers.entry([slices[1][20], slices[1][21]]).or_default().push(number);
        });
        assert_eq!(numbers.len(), 32);
        assert!(numbers.values().all(|of_flow| of_flow.len() == 2 && of_flow[0] == of_flow[1]));
        let used: std::collections::BTreeSet<_> = numbers.values().map(|of_flow| of_flow[0] % 8).collect();
        assert!(used.len() > 4, "32 flows in {used:?} of 8 queues");
    }

    #[test]
    fn datagrams_of_one_size_become_one_segment_only_where_the_kernel_takes_it() {
        let packets: Vec<_> = (0..10).map(|_| TestPacket::udp(Family::V4, vec![7; 1200]).build()).collect();
        assert_eq!(join(&packets, true).len(), 1);
        assert_eq!(join(&packets, false).len(), 10);
    }

    #[test]
    fn a_segment_ends_where_the_sender_pushed_and_where_a_packet_is_short() {
        let mut packets = stream(Family::V4, 4, 1000);
        let mut pushed = TestPacket::tcp(Family::V4, 100 + 4000, vec![1; 1000]);
        pushed.flags |= TCP_PSH;
        pushed.id = 4;
        packets.push(pushed.build());
        let mut short = TestPacket::tcp(Family::V4, 100 + 5000, vec![1; 10]);
        short.id = 5;
        packets.push(short.build());
        let mut next = TestPacket::tcp(Family::V4, 100 + 5010, vec![1; 10]);
        next.id = 6;
        packets.push(next.build());
        let written = join(&packets, true);
        assert_eq!(written.len(), 2);
        assert_eq!(cut(&written), packets);
    }

    #[test]
    fn a_packet_with_a_wrong_checksum_is_passed_on_as_it_is() {
        let mut packets = stream(Family::V6, 3, 1000);
        packets[1][100] ^= 1;
        let written = join(&packets, true);
        assert_eq!(written.len(), 3);
        assert_eq!(cut(&written), packets);
    }

    #[test]
    fn an_acknowledgment_between_data_keeps_its_place() {
        let mut packets = stream(Family::V4, 2, 1000);
        packets.insert(1, TestPacket::tcp(Family::V4, 1100, Vec::new()).build());
        let written = join(&packets, true);
        assert_eq!(cut(&written), packets);
    }

    proptest! {
        /// Several flows of several kinds, in pieces and with holes, mixed: what the kernel cuts the segments into is
        /// what was put in, and within a flow in the same order.
        #[test]
        fn what_is_joined_cuts_back_into_the_same_packets(
            picks in proptest::collection::vec((0u8..6, prop_oneof![3 => Just(1000usize), 1 => 0usize..1400], 0u8..20), 1..120),
            udp in any::<bool>(),
        ) {
            let mut sequences = [0u32; 6];
            let mut ids = [0u16; 6];
            let packets: Vec<(u8, Vec<u8>)> = picks.into_iter().map(|(flow, size, chance)| {
                let family = if flow % 2 == 0 { Family::V4 } else { Family::V6 };
                let n = usize::from(flow);
                let mut packet = if flow < 4 {
                    TestPacket::tcp(family, sequences[n], vec![chance; size])
                } else {
                    TestPacket::udp(family, vec![chance; size])
                };
                packet.ports.0 += u16::from(flow);
                packet.id = ids[n];
                match chance {
                    0 => packet.flags |= TCP_PSH,
                    1 => packet.flags |= 0x01,
                    2 => packet.sequence = packet.sequence.wrapping_add(5),
                    3 if packet.tcp => packet.options[11] = 9,
                    _ => {}
                }
                sequences[n] = sequences[n].wrapping_add(size as u32);
                ids[n] = ids[n].wrapping_add(1);
                (flow, packet.build())
            }).collect();
            let input: Vec<_> = packets.iter().map(|(_, packet)| packet.clone()).collect();
            let output = cut(&join(&input, udp));
            for packet in &output {
                prop_assert!(packet_is_sound(packet));
            }
            for flow in 0..6u8 {
                let port = (40_000 + u16::from(flow)).to_be_bytes();
                let of_flow = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
                    packets.iter().filter(|packet| {
                        let at = if packet[0] >> 4 == 4 { 20 } else { 40 };
                        packet[at..at + 2] == port
                    }).cloned().collect()
                };
                prop_assert_eq!(of_flow(&output), of_flow(&input));
            }
        }

        #[test]
        fn garbage_passes_through_untouched(packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..200), 1..50)) {
            let written = join(&packets, true);
            let plain: Vec<Vec<u8>> = written.iter().map(|frame| frame[VNET_HEADER..].to_vec()).collect();
            prop_assert_eq!(plain, packets);
        }
    }
}
