//! The Internet checksum (RFC 1071).
//!
//! Sums are kept unfolded and in the machine's byte order, in which the result is the same as in the network's once
//! it is stored in memory order.

#[cfg(test)]
use std::net::IpAddr;

/// Adds the 16-bit words of `data` to `sum`. An odd last byte counts as if a zero followed: only the last piece of a
/// message may have one.
///
/// `sum` may be any sum of up to 2^40 bytes without overflow.
pub(crate) fn sum(data: &[u8], sum: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if data.len() >= WIDE && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2, as was just asked.
        return unsafe { sum_avx2(data, sum) };
    }
    sum_words(data, sum)
}

/// The checksum of what was summed, ready to be stored with `to_ne_bytes`.
pub(crate) fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// The sum itself in 16 bits: what the kernel expects in the field of a checksum it is to finish.
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // No more than 16 bits are left.
    sum as u16
}

/// The sum of the pseudo header of TCP and UDP (RFC 9293, RFC 8200) with `length` bytes of transport header and
/// payload.
pub(crate) fn pseudo_header(source: &[u8], destination: &[u8], protocol: u8, length: usize) -> u64 {
    // A length above 16 bits has its upper half in a word of its own.
    let length = (length as u32).to_be_bytes();
    let rest = [0, protocol, length[0], length[1], length[2], length[3]];
    sum_words(&rest, sum_words(destination, sum_words(source, 0)))
}

/// As [`pseudo_header`], from addresses.
#[cfg(test)]
pub(crate) fn pseudo_header_of(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u64 {
    match (source, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => pseudo_header(&a.octets(), &b.octets(), protocol, length),
        (IpAddr::V6(a), IpAddr::V6(b)) => pseudo_header(&a.octets(), &b.octets(), protocol, length),
        _ => panic!("addresses of two families"),
    }
}

/// Below this many bytes the wide registers do not pay.
#[cfg(target_arch = "x86_64")]
const WIDE: usize = 128;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(data: &[u8], sum: u64) -> u64 {
    sum_words(data, sum)
}

/// Written so that the compiler turns it into as wide additions as the function it is inlined into may use.
#[inline(always)]
fn sum_words(data: &[u8], sum: u64) -> u64 {
    const LANES: usize = 16;
    let mut lanes = [0u64; LANES];
    let mut blocks = data.chunks_exact(4 * LANES);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
    }
    let mut words = blocks.remainder().chunks_exact(4);
    let mut total = lanes.iter().fold(sum, |total, lane| total + lane);
    for word in &mut words {
        total += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut last = [0; 4];
    last[..words.remainder().len()].copy_from_slice(words.remainder());
    total + u64::from(u32::from_ne_bytes(last))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Word by word in the network's byte order, as RFC 1071 tells it.
    fn by_the_book(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn every_length_and_content_sums_as_by_the_book(data in proptest::collection::vec(any::<u8>(), 0..4000)) {
            let checksum = finish(sum(&data, 0)).to_ne_bytes();
            prop_assert_eq!(u16::from_be_bytes(checksum), by_the_book(&data));
        }

        #[test]
        fn a_message_summed_in_even_pieces_sums_the_same(data in proptest::collection::vec(any::<u8>(), 0..4000), at in 0usize..2000) {
            let at = (at * 2).min(data.len() & !1);
            prop_assert_eq!(fold(sum(&data[at..], sum(&data[..at], 0))), fold(sum(&data, 0)));
        }
    }

    #[test]
    fn a_checksum_written_into_its_message_makes_it_sum_to_all_ones() {
        let mut header = [0x45, 0, 0, 52, 7, 9, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let checksum = finish(sum(&header, 0));
        header[10..12].copy_from_slice(&checksum.to_ne_bytes());
        assert_eq!(fold(sum(&header, 0)), 0xffff);
    }
}
