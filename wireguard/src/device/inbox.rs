//! What the packet workers leave to the handshake thread. Bounded: handshakes by their number, wishes for one by the
//! number of peers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::identity::Identity;
use super::lane::HANDSHAKE_MAX;
use super::peer::Peer;
use super::udp::Endpoint;

/// Handshake messages that wait. At the rate they are answered under load this is two seconds' worth.
const MESSAGES_MAX: usize = 512;

/// A handshake message that one of our identities has admitted.
pub(crate) struct HandshakeMessage {
    pub(crate) bytes: [u8; HANDSHAKE_MAX],
    pub(crate) length: usize,
    pub(crate) from: Endpoint,
    pub(crate) identity: Arc<Identity>,
    /// Others are being turned away.
    pub(crate) under_load: bool,
}

impl HandshakeMessage {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Whether it answers something we sent. Such go first, so that a flood of strangers' initiations does not keep
    /// our own handshakes from completing.
    fn is_answer(&self) -> bool {
        self.bytes[0] != 1
    }
}

/// The inbox.
#[derive(Default)]
pub(crate) struct Inbox {
    contents: Mutex<Contents>,
    filled: Condvar,
}

/// What was in it.
#[derive(Default)]
pub(crate) struct Contents {
    pub(crate) answers: VecDeque<HandshakeMessage>,
    pub(crate) initiations: VecDeque<HandshakeMessage>,
    /// Peers that packets wait for.
    pub(crate) wanted: Vec<Arc<Peer>>,
    pub(crate) stop: bool,
}

impl Contents {
    fn is_empty(&self) -> bool {
        self.answers.is_empty() && self.initiations.is_empty() && self.wanted.is_empty() && !self.stop
    }
}

impl Inbox {
    /// Whether there was room.
    pub(crate) fn put(&self, message: HandshakeMessage) -> bool {
        let mut contents = self.contents.lock();
        let queue = if message.is_answer() { &mut contents.answers } else { &mut contents.initiations };
        let fits = queue.len() < MESSAGES_MAX;
        if fits {
            queue.push_back(message);
            drop(contents);
            self.filled.notify_one();
        }
        fits
    }

    /// Asks for a handshake with a peer, or for its timers to be looked at. The caller sees to it that it does so once.
    pub(crate) fn want(&self, peer: Arc<Peer>) {
        self.contents.lock().wanted.push(peer);
        self.filled.notify_one();
    }

    /// Tells the handshake thread to end.
    pub(crate) fn stop(&self) {
        self.contents.lock().stop = true;
        self.filled.notify_one();
    }

    /// Waits until something is there or this time has come, and takes all answers and wishes and at most this many
    /// initiations.
    pub(crate) fn take(&self, until: Instant, initiations: usize, taken: &mut Contents) {
        let mut contents = self.contents.lock();
        if contents.is_empty() {
            self.filled.wait_until(&mut contents, until);
        }
        taken.stop = contents.stop;
        std::mem::swap(&mut taken.answers, &mut contents.answers);
        std::mem::swap(&mut taken.wanted, &mut contents.wanted);
        let count = initiations.min(contents.initiations.len());
        taken.initiations.extend(contents.initiations.drain(..count));
    }
}
