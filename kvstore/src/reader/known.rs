//! What a section's consumer has been told: the mark-and-sweep that turns lists into differences.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher as _,
};

use bytes::Bytes;

/// The keys that the consumer knows, with a fingerprint of each value in place of the value.
#[derive(Debug, Default)]
pub(super) struct Known {
    entries: HashMap<Bytes, Entry>,
    fingerprints: RandomState,
    /// Counts the lists; an entry that carries an older number is not in the present list.
    list: u32,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    /// 64 bits under a key that nobody outside of this process knows, so that a peer cannot make two values alike.
    fingerprint: u64,
    value_bytes: u32,
    list: u32,
}

impl Known {
    /// How many keys the consumer knows.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The bytes of their keys and values.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The bytes of a key and its value, if the consumer knows it.
    pub(super) fn bytes_of(&self, key: &[u8]) -> Option<usize> {
        self.entries.get(key).map(|entry| key.len() + entry.value_bytes as usize)
    }

    /// Whether the consumer knows the key.
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.entries.contains_key(key)
    }

    /// Whether the consumer knows the key with another value, or not at all. A key that it knows so is marked as seen.
    pub(super) fn differs(&mut self, key: &[u8], value: &[u8]) -> bool {
        let fingerprint = self.fingerprints.hash_one(value);
        match self.entries.get_mut(key) {
            Some(entry) if entry.fingerprint == fingerprint && entry.value_bytes as usize == value.len() => {
                entry.list = self.list;
                false
            }
            _ => true,
        }
    }

    /// The consumer has been told of this value.
    pub(super) fn told(&mut self, key: Bytes, value: &[u8]) {
        let fingerprint = self.fingerprints.hash_one(value);
        let value_bytes = u32::try_from(value.len()).unwrap_or(u32::MAX);
        self.bytes += key.len() + value.len();
        let key_bytes = key.len();
        if let Some(old) = self.entries.insert(key, Entry { fingerprint, value_bytes, list: self.list }) {
            self.bytes -= key_bytes + old.value_bytes as usize;
        }
    }

    /// The consumer has been told that the key is gone.
    pub(super) fn forgotten(&mut self, key: &[u8]) {
        if let Some(old) = self.entries.remove(key) {
            self.bytes -= key.len() + old.value_bytes as usize;
        }
    }

    /// A list begins: everything that it does not show will be stale at its end.
    pub(super) fn begin_list(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    /// The keys that the list, now complete, has not shown.
    pub(super) fn stale(&self) -> Vec<Bytes> {
        let stale = self.entries.iter().filter(|(_, entry)| entry.list != self.list);
        stale.map(|(key, _)| key.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tell(known: &mut Known, key: &'static str, value: &str) -> bool {
        let differs = known.differs(key.as_bytes(), value.as_bytes());
        if differs {
            known.told(Bytes::from_static(key.as_bytes()), value.as_bytes());
        }
        differs
    }

    #[test]
    fn only_differences_are_told_and_only_leftovers_are_swept() {
        let mut known = Known::default();
        known.begin_list();
        assert!(tell(&mut known, "a", "1"));
        assert!(tell(&mut known, "b", "1"));
        assert!(!tell(&mut known, "a", "1"));
        known.begin_list();
        assert!(!tell(&mut known, "a", "1"));
        assert!(tell(&mut known, "c", "1"));
        assert_eq!(known.stale(), [Bytes::from_static(b"b")]);
        known.forgotten(b"b");
        assert_eq!(known.len(), 2);
        assert_eq!(known.bytes(), 4);
    }

    #[test]
    fn a_list_that_was_broken_off_sweeps_nothing_by_itself() {
        let mut known = Known::default();
        known.begin_list();
        tell(&mut known, "a", "1");
        tell(&mut known, "b", "1");
        known.begin_list();
        tell(&mut known, "b", "2");
        known.begin_list();
        tell(&mut known, "a", "1");
        tell(&mut known, "b", "2");
        assert!(known.stale().is_empty());
    }

    #[test]
    fn an_entry_stays_small() {
        assert_eq!(size_of::<Entry>(), 16);
    }
}
