//! A key pair of this device, and the guard before handshakes with it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, TunnResult};
use boringtun::x25519;

use super::Count;
use crate::config::{PrivateKey, PublicKey};

/// Handshake messages a second that are answered without a cookie. One costs about 0.2 ms of a core.
pub(super) const HANDSHAKES_PER_SECOND: u64 = 250;

/// A key pair under which this device is known.
pub(crate) struct Identity {
    private: PrivateKey,
    public: PublicKey,
    guard: RateLimiter,
    /// What `Tunn` asks again and is never refused: the guard has decided already.
    open: Arc<RateLimiter>,
    /// Messages with a valid first MAC in this second.
    seen: AtomicU64,
}

/// What is to be done with a handshake message.
pub(crate) enum Verdict {
    /// It knows our key, and there is time for it.
    Welcome,
    /// As [`Verdict::Welcome`], and it has proved where it comes from; others are being turned away.
    UnderLoad,
    /// So many bytes of cookie reply are to be sent.
    Cookie(usize),
    /// It is for someone else.
    NotForUs,
    /// It is no handshake message.
    Refused(Count),
}

impl Identity {
    pub(crate) fn new(private: PrivateKey) -> Self {
        let public = private.public_key();
        let dalek = x25519::PublicKey::from(public);
        Self {
            private,
            public,
            guard: RateLimiter::new(&dalek, HANDSHAKES_PER_SECOND),
            open: Arc::new(RateLimiter::new(&dalek, u64::MAX)),
            seen: AtomicU64::new(0),
        }
    }

    pub(crate) fn private(&self) -> &PrivateKey {
        &self.private
    }

    pub(crate) fn public(&self) -> PublicKey {
        self.public
    }

    pub(super) fn open_limiter(&self) -> Arc<RateLimiter> {
        Arc::clone(&self.open)
    }

    /// Looks at the MACs of a handshake message. A cookie reply is written into `reply`.
    pub(crate) fn admit(&self, from: IpAddr, message: &[u8], reply: &mut [u8]) -> Verdict {
        match self.guard.verify_packet(Some(from), message, reply) {
            Ok(Packet::PacketData(_)) => Verdict::Refused(Count::Malformed),
            Ok(Packet::PacketCookieReply(_)) => Verdict::Welcome,
            Ok(_) if self.seen.fetch_add(1, Ordering::Relaxed) >= HANDSHAKES_PER_SECOND => Verdict::UnderLoad,
            Ok(_) => Verdict::Welcome,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                self.seen.fetch_add(1, Ordering::Relaxed);
                Verdict::Cookie(cookie.len())
            }
            Err(TunnResult::Err(boringtun::noise::errors::WireGuardError::InvalidMac)) => Verdict::NotForUs,
            Err(_) => Verdict::Refused(Count::Malformed),
        }
    }

    /// Called once a second.
    pub(crate) fn second_passed(&self) {
        self.guard.reset_count();
        self.seen.store(0, Ordering::Relaxed);
    }
}

/// Whether secrets agreed with this key would be the same for everyone: all zero, or another point of small order.
pub(crate) fn is_weak(key: &x25519::PublicKey) -> bool {
    // Any scalar shows it, since all are multiples of the curve's cofactor.
    !x25519::StaticSecret::from([0x42; 32]).diffie_hellman(key).was_contributory()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_small_order_are_weak_and_others_are_not() {
        let one = std::array::from_fn(|index| u8::from(index == 0));
        // One of the two points of order eight, from RFC 7748's security considerations and the literature.
        let eight = [
            0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a,
            0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
        ];
        for key in [[0; 32], one, eight] {
            assert!(is_weak(&key.into()), "{key:?}");
        }
        assert!(!is_weak(&PrivateKey::generate().public_key().into()));
    }
}
