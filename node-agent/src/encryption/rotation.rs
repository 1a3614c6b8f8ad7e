//! How this node exchanges its key pair without losing a packet. Pure, with the time passed in.
//!
//! ```text
//! Idle ──request──▶ Prepared ──the device answers to both keys──▶ Announcing ──the annotation shows the new one──▶
//! Switching ──every session is under the new key, or no session can be under the old one──▶ Idle
//! ```
//!
//! The next key lies in a file of its own from the first step to the last, so that a restarted agent goes on.
//! The kernel's device has one key at a time: it goes from `Prepared` to `Idle` in one step, and the other nodes' packets
//! are lost until they have read the new key.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use isthmus_wireguard::config::{PrivateKey, PublicKey};

use super::device::REJECT_AFTER;
use super::key_file::NodeKey;
use crate::mesh::NodeId;
use crate::mesh::fact::Moment;

/// A node that has no session now may begin one with the old key until it has read the new one.
pub const SHORTEST: Duration = Duration::from_secs(5);
/// After this no session under the old key can be in use by a node that has read the new one.
pub const LONGEST: Duration = REJECT_AFTER.saturating_add(Duration::from_secs(10));

/// Where an exchange of the key stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Rotation {
    /// There is one key.
    #[default]
    Idle,
    /// There is a next key; the device does not answer to it yet.
    Prepared(NodeKey),
    /// The device answers to both keys; the others have not been told the next one.
    Announcing(NodeKey),
    /// The others have been told.
    Switching {
        /// The next key.
        next: NodeKey,
        /// Since when.
        since: Moment,
    },
}

/// Nodes that this one has a session with, and the own public keys under which. There are two while the other node
/// exchanges its key, too.
pub type Sessions = BTreeMap<NodeId, BTreeSet<PublicKey>>;

/// How many peers have gone over to the next key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Switched {
    /// Peers that have a session under the next key.
    pub done: usize,
    /// Peers that have a session.
    pub of: usize,
}

impl Rotation {
    /// Goes on with what an earlier run began.
    pub fn resume(next: Option<NodeKey>) -> Self {
        next.map_or(Self::Idle, Self::Prepared)
    }

    /// The next key, if there is one.
    pub fn next(&self) -> Option<&NodeKey> {
        match self {
            Self::Idle => None,
            Self::Prepared(next) | Self::Announcing(next) | Self::Switching { next, .. } => Some(next),
        }
    }

    /// The key that others should be told.
    pub fn advertised<'a>(&'a self, current: &'a PrivateKey) -> &'a PrivateKey {
        match self {
            Self::Idle | Self::Prepared(_) => current,
            Self::Announcing(next) | Self::Switching { next, .. } => &next.key,
        }
    }

    /// The device answers to the next key.
    pub fn accepted(&mut self) {
        if let Self::Prepared(next) = self {
            *self = Self::Announcing(next.clone());
        }
    }

    /// The API shows this key as this node's.
    pub fn shown(&mut self, key: PublicKey, now: Moment) {
        if let Self::Announcing(next) = self
            && next.key.public_key() == key
        {
            *self = Self::Switching { next: next.clone(), since: now };
        }
    }

    /// How far the others are.
    pub fn switched(&self, sessions: &Sessions) -> Switched {
        let Some(next) = self.next().map(|next| next.key.public_key()) else { return Switched::default() };
        let done = sessions.values().filter(|keys| keys.contains(&next)).count();
        Switched { done, of: sessions.len() }
    }

    /// Whether the next key can take the present one's place.
    pub fn is_complete(&self, sessions: &Sessions, now: Moment) -> bool {
        let Self::Switching { since, .. } = self else { return false };
        let elapsed = now.0.saturating_sub(since.0);
        let switched = self.switched(sessions);
        elapsed >= LONGEST || (elapsed >= SHORTEST && switched.done == switched.of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next() -> NodeKey {
        NodeKey { key: PrivateKey::generate(), rotation: "one".to_owned() }
    }

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    fn sessions(nodes: &[&[&PrivateKey]]) -> Sessions {
        let node = |(number, keys): (usize, &&[&PrivateKey])| {
            let id = NodeId { cluster: 0, name: number.to_string().into() };
            (id, keys.iter().map(|key| key.public_key()).collect())
        };
        nodes.iter().enumerate().map(node).collect()
    }

    #[test]
    fn others_are_told_once_the_device_answers_and_the_old_key_goes_once_all_have_switched() {
        let (current, next) = (PrivateKey::generate(), next());
        let mut rotation = Rotation::resume(Some(next.clone()));
        assert_eq!(rotation.advertised(&current), &current);
        rotation.shown(next.key.public_key(), at(0));
        assert!(matches!(rotation, Rotation::Prepared(_)), "the device does not answer to it yet");
        rotation.accepted();
        assert_eq!(rotation.advertised(&current), &next.key);
        rotation.shown(current.public_key(), at(1));
        assert!(matches!(rotation, Rotation::Announcing(_)), "that is the old one");
        rotation.shown(next.key.public_key(), at(2));

        let half = sessions(&[&[&next.key], &[&current]]);
        assert_eq!(rotation.switched(&half), Switched { done: 1, of: 2 });
        assert!(!rotation.is_complete(&half, at(100)));
        let all = sessions(&[&[&next.key], &[&current, &next.key]]);
        assert!(!rotation.is_complete(&all, at(3)), "who has no session may not have read it yet");
        assert!(rotation.is_complete(&all, at(7)));
    }

    #[test]
    fn a_peer_that_cannot_be_reached_holds_it_up_for_as_long_as_its_session_may_live() {
        let (current, next) = (PrivateKey::generate(), next());
        let rotation = Rotation::Switching { next, since: at(10) };
        let stuck = sessions(&[&[&current]]);
        assert!(!rotation.is_complete(&stuck, at(10 + 189)));
        assert!(rotation.is_complete(&stuck, at(10 + 190)));
    }

    #[test]
    fn with_one_key_there_is_nothing_to_complete() {
        let mut rotation = Rotation::default();
        rotation.accepted();
        rotation.shown(PublicKey::new([1; 32]), at(0));
        assert_eq!(rotation, Rotation::Idle);
        assert!(!rotation.is_complete(&sessions(&[]), at(1000)));
    }
}
