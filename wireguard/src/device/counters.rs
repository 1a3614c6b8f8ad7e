//! What the device counts: traffic, and each packet it dropped under the reason why.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counts {
    ($($(#[doc = $doc:literal])+ $variant:ident => $name:literal,)+) => {
        /// Something that is counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Count {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Count {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Its name in snake case.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What it means, in one line.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii_start(),)+ }
            }
        }
    };
}

counts! {
    /// Packets taken from the machine, encrypted and sent.
    SentPackets => "sent_packets",
    /// Packets received, decrypted and given to the machine.
    ReceivedPackets => "received_packets",
    /// Handshakes completed.
    Handshakes => "handshakes",
    /// Handshake initiations sent.
    InitiationsSent => "initiations_sent",
    /// Cookie replies sent, while handshakes were coming in faster than they are answered.
    CookiesSent => "cookies_sent",
    /// Outgoing packets dropped: no peer owns the destination.
    NoPeer => "drop_out_no_peer",
    /// Outgoing packets dropped: it is not known where the peer is.
    NoEndpoint => "drop_out_no_endpoint",
    /// Outgoing packets dropped: too many waited for a handshake, or it did not come about.
    NoSession => "drop_out_no_session",
    /// Outgoing packets dropped: not IP, or not what the kernel said they were.
    BadFrame => "drop_out_bad_frame",
    /// Outgoing packets dropped: the session has sent as many as one key may.
    SessionSpent => "drop_out_session_spent",
    /// Datagrams the network would not take.
    SendFailed => "drop_out_send_failed",
    /// Datagrams dropped: no WireGuard message, or of a length it cannot have.
    Malformed => "drop_in_malformed",
    /// Datagrams dropped: for a session that does not exist, or no more.
    UnknownSession => "drop_in_unknown_session",
    /// Datagrams dropped: not encrypted with the session's key.
    NotAuthentic => "drop_in_not_authentic",
    /// Datagrams dropped: received before, or so long ago that this cannot be told.
    Replayed => "drop_in_replayed",
    /// Packets dropped: the sender does not own their source address.
    ForgedSource => "drop_in_forged_source",
    /// Packets dropped: what was encrypted is not an IP packet.
    BadPacket => "drop_in_bad_packet",
    /// Packets the machine would not take.
    NotTaken => "drop_in_not_taken",
    /// Handshake messages dropped: not meant for this device's key.
    BadMac => "drop_handshake_bad_mac",
    /// Handshake messages dropped: under load, without a valid cookie; one was sent.
    NoCookie => "drop_handshake_no_cookie",
    /// Handshake messages dropped: too many from one address or peer.
    RateLimited => "drop_handshake_rate_limited",
    /// Handshake messages dropped: too many at once.
    HandshakeQueueFull => "drop_handshake_queue_full",
    /// Handshake messages dropped: from a key that is no peer's.
    UnknownKey => "drop_handshake_unknown_key",
    /// Handshake messages dropped: with a public key that makes every secret the same.
    WeakKey => "drop_handshake_weak_key",
    /// Handshake messages dropped: not authentic, repeated, or not asked for.
    BadHandshake => "drop_handshake_bad",
}

/// The counts of a device.
pub(crate) struct Counters([AtomicU64; Count::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Counters {
    /// One more.
    pub(crate) fn count(&self, what: Count) {
        self.add(what, 1);
    }

    /// So many more.
    pub(crate) fn add(&self, what: Count, number: u64) {
        if number > 0 {
            self.0[what as usize].fetch_add(number, Ordering::Relaxed);
        }
    }

    /// How many so far.
    pub(crate) fn read(&self, what: Count) -> u64 {
        self.0[what as usize].load(Ordering::Relaxed)
    }
}
