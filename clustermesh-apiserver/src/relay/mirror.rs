//! What is mirrored of one peer: pure bookkeeping between the peer's keys and the own store's.
//!
//! Everything a peer says passes through [`Mirror::put`]: parsed, checked against what that peer may say, and given its
//! name under `cilium/cache/`. The value's bytes go on unchanged, as Cilium's own relay copies them.

use std::collections::HashMap;

use bytes::Bytes;
use isthmus_wire::validate::{self, RemoteCluster};
use isthmus_wire::{Key, KeyError, Resource};

/// Everything mirrored of one peer, by resource and by the peer's own key.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    sections: HashMap<Resource, Section>,
    /// Counts the readings from scratch: what was not seen again in the present one is gone.
    reading: u64,
}

#[derive(Debug, Default)]
struct Section {
    entries: HashMap<Bytes, Entry>,
}

#[derive(Debug)]
struct Entry {
    cached: Bytes,
    value: Bytes,
    reading: u64,
}

/// A key and value to be written into the own store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Cached {
    /// Key under `cilium/cache/`.
    pub(super) key: Bytes,
    /// The peer's bytes.
    pub(super) value: Bytes,
}

/// Why an entry of a peer is not mirrored.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Rejection {
    /// Not a key of the format.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A key of the format that does not belong where it was found.
    #[error("the key `{0}` does not belong into this section")]
    Misplaced(Box<Key>),
    /// Not a value of the format, or not for this peer to say.
    #[error("{key}: {source}")]
    Value {
        /// The key.
        key: Box<Key>,
        /// What is wrong with the value.
        source: Box<validate::Rejection>,
    },
}

impl Rejection {
    /// One fixed word per kind, fit for a metric's label.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Key(_) => "malformed_key",
            Self::Misplaced(_) => "misplaced_key",
            Self::Value { source, .. } => source.reason(),
        }
    }
}

impl Mirror {
    /// Takes note of a key that `peer` has put; answers what to write.
    ///
    /// # Errors
    /// A [`Rejection`]. What was mirrored under that key before stays: a bad entry replaces no good one.
    pub(super) fn put(
        &mut self,
        peer: &RemoteCluster,
        resource: Resource,
        key: Bytes,
        value: Bytes,
    ) -> Result<Cached, Rejection> {
        let reading = self.reading;
        let section = self.sections.entry(resource).or_default();
        match check(peer, resource, &key, &value) {
            Ok(cached) => {
                let cached = cached.to_bytes();
                section.entries.insert(key, Entry { cached: cached.clone(), value: value.clone(), reading });
                Ok(Cached { key: cached, value })
            }
            Err(rejection) => {
                if let Some(entry) = section.entries.get_mut(&key) {
                    entry.reading = reading;
                }
                Err(rejection)
            }
        }
    }

    /// Takes note of a key that the peer has deleted; answers what to delete, if it was mirrored.
    pub(super) fn delete(&mut self, resource: Resource, key: &Bytes) -> Option<Bytes> {
        Some(self.sections.get_mut(&resource)?.entries.remove(key)?.cached)
    }

    /// A reading from scratch begins, through a new connection that tells everything again.
    pub(super) fn reread(&mut self) {
        self.reading += 1;
    }

    /// A section has been told completely: answers what to delete, since it was not told again.
    pub(super) fn sweep(&mut self, resource: Resource) -> Vec<Bytes> {
        let reading = self.reading;
        let Some(section) = self.sections.get_mut(&resource) else { return Vec::new() };
        section
            .entries
            .extract_if(|_, entry| entry.reading != reading)
            .map(|(_, entry)| entry.cached)
            .collect()
    }

    /// Everything that is mirrored of a resource.
    pub(super) fn entries(&self, resource: Resource) -> impl Iterator<Item = Cached> {
        let entries = self.sections.get(&resource).into_iter().flat_map(|section| section.entries.values());
        entries.map(|entry| Cached { key: entry.cached.clone(), value: entry.value.clone() })
    }

    /// Forgets everything; answers what to delete.
    pub(super) fn clear(&mut self) -> Vec<Bytes> {
        let sections = self.sections.drain().flat_map(|(_, section)| section.entries.into_values());
        sections.map(|entry| entry.cached).collect()
    }

    /// How many entries of a resource are mirrored.
    pub(super) fn len(&self, resource: Resource) -> usize {
        self.sections.get(&resource).map_or(0, |section| section.entries.len())
    }
}

/// Parses and validates; the answer is the key to mirror under.
fn check(peer: &RemoteCluster, resource: Resource, key: &[u8], value: &[u8]) -> Result<Key, Rejection> {
    let key = Key::parse(key)?;
    let cached = match key.mirrored(&peer.name) {
        Some(cached) if key.resource() == Some(resource) => cached,
        _ => return Err(Rejection::Misplaced(Box::new(key))),
    };
    match validate::entry(&key, value, peer) {
        Ok(()) => Ok(cached),
        Err(source) => Err(Rejection::Value { key: Box::new(key), source: Box::new(source) }),
    }
}

#[cfg(test)]
mod tests {
    use isthmus_wire::{ClusterId, MaxConnectedClusters};

    use super::*;

    fn beta() -> RemoteCluster {
        RemoteCluster {
            name: "beta".parse().unwrap(),
            id: ClusterId::try_from(2).unwrap(),
            max_connected_clusters: MaxConnectedClusters::C255,
        }
    }

    fn identity(cluster: &str) -> Bytes {
        format!("k8s:app=x;k8s:io.cilium.k8s.policy.cluster={cluster};k8s:io.kubernetes.pod.namespace=n;")
            .into()
    }

    const KEY: &str = "cilium/state/identities/v1/id/131073";

    fn put(mirror: &mut Mirror, key: &str, value: Bytes) -> Result<Cached, Rejection> {
        mirror.put(&beta(), Resource::Identities, Bytes::copy_from_slice(key.as_bytes()), value)
    }

    #[test]
    fn what_a_peer_says_of_itself_goes_on_byte_for_byte_under_its_name() {
        let cached = put(&mut Mirror::default(), KEY, identity("beta")).unwrap();
        assert_eq!(cached.key, "cilium/cache/identities/v1/beta/id/131073");
        assert_eq!(cached.value, identity("beta"));
    }

    #[test]
    fn what_a_peer_says_of_others_does_not_and_replaces_nothing() {
        let mut mirror = Mirror::default();
        put(&mut mirror, KEY, identity("beta")).unwrap();
        let foreign = [
            (KEY, identity("alpha"), "cluster_label"),
            ("cilium/state/identities/v1/id/65537", identity("beta"), "foreign_identity"),
            ("cilium/state/nodes/v1/beta/n1", identity("beta"), "misplaced_key"),
            ("cilium/cache/identities/v1/alpha/id/131073", identity("beta"), "misplaced_key"),
            ("\u{0}", identity("beta"), "malformed_key"),
        ];
        for (key, value, reason) in foreign {
            assert_eq!(put(&mut mirror, key, value).unwrap_err().reason(), reason, "{key}");
        }
        let kept: Vec<_> = mirror.entries(Resource::Identities).collect();
        assert_eq!(
            kept,
            [Cached { key: "cilium/cache/identities/v1/beta/id/131073".into(), value: identity("beta") }]
        );
    }

    #[test]
    fn what_is_not_told_again_is_gone_and_what_turned_bad_is_not() {
        let mut mirror = Mirror::default();
        put(&mut mirror, KEY, identity("beta")).unwrap();
        put(&mut mirror, "cilium/state/identities/v1/id/131074", identity("beta")).unwrap();
        put(&mut mirror, "cilium/state/identities/v1/id/131075", identity("beta")).unwrap();
        mirror.reread();
        put(&mut mirror, KEY, identity("beta")).unwrap();
        put(&mut mirror, "cilium/state/identities/v1/id/131075", "nonsense".into()).unwrap_err();
        assert_eq!(mirror.sweep(Resource::Identities), ["cilium/cache/identities/v1/beta/id/131074"]);
        assert_eq!(mirror.len(Resource::Identities), 2);
        assert!(mirror.sweep(Resource::Identities).is_empty());
    }

    #[test]
    fn deleting_answers_only_what_was_mirrored() {
        let mut mirror = Mirror::default();
        put(&mut mirror, KEY, identity("beta")).unwrap();
        let key = Bytes::from(KEY);
        assert_eq!(
            mirror.delete(Resource::Identities, &key).unwrap(),
            "cilium/cache/identities/v1/beta/id/131073"
        );
        assert_eq!(mirror.delete(Resource::Identities, &key), None);
        assert_eq!(mirror.delete(Resource::Nodes, &key), None);
    }
}
