//! One conversation with a peer under one of our keys: a `Tunn`, and what it leaves to its user.
//!
//! Where `Tunn` stops short of the WireGuard paper, this is where it is made up for:
//! - it counts messages and never refuses one: the bounds Rekey-After-Messages and Reject-After-Messages are kept here,
//!   by the counter that each datagram carries;
//! - it sends packets at their exact length: here they are padded (see [`padded_length`]);
//! - its clock stands still between calls of `update_timers`: it is set before every handshake;
//! - it believes a session on which it answered to be good: here a session counts once the peer has used it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};

use super::Count;
use super::identity::Identity;
use crate::config::{PresharedKey, PublicKey};

/// Bytes that encryption adds to a packet: header and tag.
pub(crate) const OVERHEAD: usize = 32;

/// Bytes of a data message before the encrypted packet.
const HEADER: usize = 16;

/// Bytes of the longest handshake message.
pub(crate) const HANDSHAKE_MAX: usize = 148;

/// Sessions are forgotten this long after their handshake (Reject-After-Time), and there is nothing to time after it.
const SESSION_LIFE: Duration = Duration::from_secs(181);

/// How many messages one key may encrypt (WireGuard paper, section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageBounds {
    /// After so many a new session is agreed.
    pub rekey: u64,
    /// After so many none is sent or taken any more.
    pub reject: u64,
}

impl MessageBounds {
    /// Those of the protocol: 2^60, and 2^64 - 2^13 - 1.
    pub const PAPER: Self = Self { rekey: 1 << 60, reject: u64::MAX - (1 << 13) };
}

/// A conversation under one of our keys.
pub(crate) struct Lane {
    identity: Arc<Identity>,
    index: u32,
    tunn: Tunn,
    bounds: MessageBounds,
    /// There is a session that the peer has shown to have, too.
    established: bool,
    /// The session we answered with and that the peer has not used yet.
    unconfirmed: Option<u32>,
    /// When there will be nothing to time any more, if nothing happens.
    quiet_from: Instant,
    /// Replaced by another lane: still receives, and sends until the other can; begins nothing.
    retired: bool,
    /// What became due while a handshake message was looked at, and is still to be sent.
    held: Option<([u8; HANDSHAKE_MAX], Due)>,
}

/// What came of encrypting a packet.
pub(crate) enum Sealed {
    /// A datagram of so many bytes.
    Datagram(usize),
    /// A datagram of so many bytes, and it is time for a new session.
    RekeyDue(usize),
    /// The session may encrypt no more.
    Spent,
    /// There is no session.
    NoSession,
}

/// What came of decrypting a datagram.
pub(crate) struct Opened {
    /// Bytes of IP packet; 0 for a keepalive.
    pub(crate) length: usize,
    /// The first use of the session by the peer: it has it, and the handshake is complete.
    pub(crate) confirmed: bool,
}

/// What came of a handshake message.
pub(crate) enum Answer {
    /// So many bytes are to be sent.
    Reply(usize),
    /// The handshake is complete: so many bytes are to be sent that tell the peer.
    Established(usize),
    /// Nothing.
    Noted,
    /// It was refused.
    Refused,
}

/// What is to be done as time passes.
#[derive(Clone, Copy)]
pub(crate) enum Due {
    /// Nothing.
    Nothing,
    /// Send a handshake initiation of so many bytes.
    Initiation(usize),
    /// Send so many bytes of keepalive.
    Keepalive(usize),
    /// The peer did not answer for so long that its packets are not to wait any more.
    GaveUp,
}

impl Lane {
    /// `index` names the lane in the upper 24 bits of its sessions' indices.
    pub(crate) fn new(
        identity: Arc<Identity>,
        peer: PublicKey,
        preshared: Option<&PresharedKey>,
        index: u32,
        bounds: MessageBounds,
    ) -> Self {
        let tunn = Tunn::new(
            identity.private().secret().clone(),
            peer.into(),
            preshared.map(|key| *key.as_bytes()),
            // Persistent keepalive is the peer's, not the lane's.
            None,
            index,
            Some(identity.open_limiter()),
        );
        Self {
            identity,
            index,
            tunn,
            bounds,
            established: false,
            unconfirmed: None,
            quiet_from: Instant::now(),
            retired: false,
            held: None,
        }
    }

    pub(crate) fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    pub(crate) fn is_established(&self) -> bool {
        self.established
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired
    }

    pub(crate) fn retire(&mut self) {
        self.retired = true;
    }

    /// Whether time matters to it: there is a session or a handshake under way.
    pub(crate) fn is_awake(&self, now: Instant) -> bool {
        self.established || now < self.quiet_from
    }

    /// Encrypts `packet` (nothing: a keepalive) into `out`.
    pub(crate) fn seal(&mut self, packet: &[u8], out: &mut [u8]) -> Sealed {
        if !self.established {
            return Sealed::NoSession;
        }
        let TunnResult::WriteToNetwork(datagram) = self.tunn.encapsulate(packet, out) else {
            self.established = false;
            return Sealed::NoSession;
        };
        let length = datagram.len();
        let Some(counter) = data_counter(datagram) else {
            // An initiation: the session was gone. The packet waits inside `Tunn`; it is the only one that can.
            self.established = false;
            return Sealed::NoSession;
        };
        if counter >= self.bounds.reject {
            Sealed::Spent
        } else if counter >= self.bounds.rekey {
            Sealed::RekeyDue(length)
        } else {
            Sealed::Datagram(length)
        }
    }

    /// Decrypts a data message into `out`, which is at least as long.
    pub(crate) fn open(&mut self, datagram: &[u8], out: &mut [u8]) -> Result<Opened, Count> {
        let session = receiver_index(datagram).ok_or(Count::Malformed)?;
        if data_counter(datagram).ok_or(Count::Malformed)? >= self.bounds.reject {
            return Err(Count::Replayed);
        }
        let length = match self.tunn.decapsulate(None, datagram, out) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => packet.len(),
            TunnResult::Done => 0,
            TunnResult::WriteToNetwork(_) => return Err(Count::BadPacket),
            TunnResult::Err(error) => return Err(reason(&error)),
        };
        let confirmed = self.unconfirmed == Some(session);
        if confirmed {
            self.unconfirmed = None;
            self.established = true;
        }
        Ok(Opened { length, confirmed })
    }

    /// Begins a handshake, unless one is under way.
    pub(crate) fn initiate(&mut self, out: &mut [u8]) -> Option<usize> {
        if let Due::Initiation(length) = self.tick(out) {
            return Some(length);
        }
        match self.tunn.format_handshake_initiation(out, false) {
            TunnResult::WriteToNetwork(message) => {
                self.stay_awake();
                Some(message.len())
            }
            _ => None,
        }
    }

    /// Takes in a handshake message, which the identity has admitted.
    pub(crate) fn handshake(&mut self, message: &[u8], out: &mut [u8]) -> Answer {
        // Sets the clock. What else is due waits until the next tick: `Tunn` believes it to be sent, and a stranger's
        // message must not keep it from being so.
        if let due @ (Due::Initiation(length) | Due::Keepalive(length)) = self.update(out) {
            let mut bytes = [0; HANDSHAKE_MAX];
            bytes[..length].copy_from_slice(&out[..length]);
            self.held = Some((bytes, due));
        }
        match self.tunn.decapsulate(None, message, out) {
            TunnResult::WriteToNetwork(reply) => {
                // There is a new session, or will be.
                self.held = None;
                let length = reply.len();
                let sender = u32::from_le_bytes([reply[4], reply[5], reply[6], reply[7]]);
                let established = data_counter(reply).is_some();
                self.stay_awake();
                if established {
                    self.established = true;
                    Answer::Established(length)
                } else {
                    self.unconfirmed = Some(sender);
                    Answer::Reply(length)
                }
            }
            TunnResult::Done => Answer::Noted,
            _ => Answer::Refused,
        }
    }

    /// Lets the lane do what is due. To be called several times a second while it is awake.
    pub(crate) fn tick(&mut self, out: &mut [u8]) -> Due {
        if let Some((bytes, due @ (Due::Initiation(length) | Due::Keepalive(length)))) = self.held.take() {
            out[..length].copy_from_slice(&bytes[..length]);
            return due;
        }
        self.update(out)
    }

    fn update(&mut self, out: &mut [u8]) -> Due {
        let due = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) if data_counter(message).is_some() => {
                Due::Keepalive(message.len())
            }
            TunnResult::WriteToNetwork(message) => {
                let length = message.len();
                self.stay_awake();
                Due::Initiation(length)
            }
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.quiet_from = Instant::now();
                Due::GaveUp
            }
            _ => Due::Nothing,
        };
        if self.established && self.tunn.time_since_last_handshake().is_none() {
            self.established = false;
        }
        due
    }

    fn stay_awake(&mut self) {
        self.quiet_from = Instant::now() + SESSION_LIFE;
    }
}

/// The counter of a data message; `None` if it is something else.
fn data_counter(datagram: &[u8]) -> Option<u64> {
    match datagram {
        [4, 0, 0, 0, _, _, _, _, counter @ ..] => Some(u64::from_le_bytes(*counter.first_chunk()?)),
        _ => None,
    }
}

/// The index in a message that names the receiver's session.
pub(crate) fn receiver_index(datagram: &[u8]) -> Option<u32> {
    let at = match datagram.first()? {
        2 => 8,
        3 | 4 => 4,
        _ => return None,
    };
    Some(u32::from_le_bytes(*datagram.get(at..)?.first_chunk()?))
}

/// Whether this may be a data message.
pub(crate) fn is_data(datagram: &[u8]) -> bool {
    datagram.len() >= OVERHEAD && datagram.starts_with(&[4, 0, 0, 0])
}

/// The length that a packet is sent at: a multiple of 16, so that less can be told from it, but no more than the
/// device's MTU.
pub(crate) fn padded_length(length: usize, mtu: usize) -> usize {
    length.next_multiple_of(HEADER).min(mtu.max(length))
}

fn reason(error: &WireGuardError) -> Count {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => Count::Replayed,
        WireGuardError::InvalidAeadTag => Count::NotAuthentic,
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => Count::UnknownSession,
        _ => Count::BadPacket,
    }
}
