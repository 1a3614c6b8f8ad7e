//! Incremental Internet checksums (RFC 1624). One's complement sums do not care for byte order, so words are taken as
//! they stand in the packet.

/// Difference between two states of some words.
#[derive(Clone, Copy)]
pub struct Difference(u64);

impl Difference {
    pub const NONE: Self = Self(0);

    #[inline(always)]
    pub fn word(&mut self, old: u32, new: u32) {
        self.0 += !old as u64 + new as u64;
    }

    #[inline(always)]
    pub fn words(&mut self, old: &[u32; 4], new: &[u32; 4]) {
        self.word(old[0], new[0]);
        self.word(old[1], new[1]);
        self.word(old[2], new[2]);
        self.word(old[3], new[3]);
    }

    /// As the kernel's helpers take it.
    #[inline(always)]
    pub fn folded(self) -> u32 {
        let once = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((once & 0xffff_ffff) + (once >> 32)) as u32
    }

    /// The checksum of what had `checksum` before.
    #[inline(always)]
    pub fn apply(self, checksum: u16) -> u16 {
        let mut sum = !checksum as u32 as u64 & 0xffff;
        let diff = self.folded() as u64;
        sum += (diff & 0xffff) + (diff >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        !(sum as u16)
    }
}
