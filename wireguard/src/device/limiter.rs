//! How many handshakes one address may begin while there are too many: a bucket of tokens for each, in a table whose
//! size does not depend on how many addresses there are.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Tokens a bucket holds, and the time in which one is added: as kernel WireGuard's.
const BURST: u32 = 5;
const REFILL: Duration = Duration::from_millis(50);

const BUCKETS: usize = 8192;

/// Buckets by address. Addresses that fall on the same place share one; which do, nobody outside can know.
pub(crate) struct AddressLimiter {
    buckets: Box<[Bucket]>,
    hasher: RandomState,
}

#[derive(Clone, Copy)]
struct Bucket {
    tokens: u32,
    filled: Instant,
}

impl AddressLimiter {
    pub(crate) fn new(now: Instant) -> Self {
        let full = Bucket { tokens: BURST, filled: now };
        Self { buckets: vec![full; BUCKETS].into(), hasher: RandomState::new() }
    }

    /// Whether this address may now; takes a token if so.
    pub(crate) fn admit(&mut self, address: IpAddr, now: Instant) -> bool {
        // Whoever has an IPv6 address has 2^64 of them.
        let key = match address {
            IpAddr::V4(address) => u64::from(address.to_bits()),
            IpAddr::V6(address) => (address.to_bits() >> 64) as u64,
        };
        let place = self.hasher.hash_one((address.is_ipv4(), key)) as usize % BUCKETS;
        let bucket = &mut self.buckets[place];
        let periods = now.duration_since(bucket.filled).as_millis() / REFILL.as_millis();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        if periods > 0 {
            bucket.tokens = bucket.tokens.saturating_add(periods).min(BURST);
            bucket.filled = now;
        }
        let admitted = bucket.tokens > 0;
        bucket.tokens = bucket.tokens.saturating_sub(1);
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_burst_and_then_has_to_wait_while_others_need_not() {
        let start = Instant::now();
        let mut limiter = AddressLimiter::new(start);
        let flooder: IpAddr = "192.0.2.1".parse().unwrap();
        let admitted = (0..1000).filter(|_| limiter.admit(flooder, start)).count();
        assert_eq!(admitted, BURST as usize);
        let others =
            (0..100u8).filter(|host| limiter.admit(IpAddr::from([198, 51, 100, *host]), start)).count();
        assert!(others >= 95, "only {others} of 100 others were let in");
        assert!(limiter.admit(flooder, start + REFILL));
        assert!(!limiter.admit(flooder, start + REFILL));
        let later = start + Duration::from_secs(60);
        assert_eq!((0..1000).filter(|_| limiter.admit(flooder, later)).count(), BURST as usize);
    }

    #[test]
    fn a_host_with_many_ipv6_addresses_is_one() {
        let start = Instant::now();
        let mut limiter = AddressLimiter::new(start);
        let host = |n: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n]);
        assert_eq!((0..1000).filter(|n| limiter.admit(host(*n), start)).count(), BURST as usize);
    }
}
