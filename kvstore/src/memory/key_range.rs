//! Which keys a request is about.

use std::ops::Bound;

use bytes::Bytes;

/// A contiguous set of keys: one key, `[start, end)`, or everything from `start` on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KeyRange {
    start: Bytes,
    end: End,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum End {
    /// Just `start` itself.
    Single,
    /// Up to, not including.
    Before(Bytes),
    /// No end.
    Open,
}

impl KeyRange {
    /// One key.
    pub fn key(key: impl Into<Bytes>) -> Self {
        Self { start: key.into(), end: End::Single }
    }

    /// All keys that start with `prefix`; all keys if it is empty.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        let start = prefix.into();
        let end = prefix_end(&start).map_or(End::Open, End::Before);
        Self { start, end }
    }

    /// All keys `>= start` and `< end`. None if `end <= start`.
    pub fn between(start: impl Into<Bytes>, end: impl Into<Bytes>) -> Self {
        Self { start: start.into(), end: End::Before(end.into()) }
    }

    /// All keys `>= start`.
    pub fn from(start: impl Into<Bytes>) -> Self {
        Self { start: start.into(), end: End::Open }
    }

    /// Every key.
    #[must_use]
    pub const fn all() -> Self {
        Self { start: Bytes::new(), end: End::Open }
    }

    /// The range that etcd's requests spell as `key` and `range_end`: no end is the key alone, the end `\0` is no end.
    #[must_use]
    pub fn from_wire(key: Bytes, range_end: Bytes) -> Self {
        let end = match &range_end[..] {
            [] => End::Single,
            [0] => End::Open,
            _ => End::Before(range_end),
        };
        // No key is empty, so everything from "\0" on is everything.
        let start = if end != End::Single && key[..] == [0] { Bytes::new() } else { key };
        Self { start, end }
    }

    /// The lowest key it may hold.
    #[must_use]
    pub const fn start(&self) -> &Bytes {
        &self.start
    }

    /// The key it is about, if it is about one only.
    #[must_use]
    pub fn as_key(&self) -> Option<&Bytes> {
        (self.end == End::Single).then_some(&self.start)
    }

    /// The prefix that spells the same range, if there is one.
    #[must_use]
    pub fn as_prefix(&self) -> Option<&Bytes> {
        let same = match &self.end {
            End::Single => false,
            End::Before(end) => prefix_end(&self.start).is_some_and(|prefix_end| prefix_end == end),
            End::Open => prefix_end(&self.start).is_none(),
        };
        same.then_some(&self.start)
    }

    /// Whether no key can be in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(&self.end, End::Before(end) if *end <= self.start)
    }

    /// Whether it holds `key`.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            End::Single => *key == self.start[..],
            End::Before(end) => *key >= self.start[..] && *key < end[..],
            End::Open => *key >= self.start[..],
        }
    }

    /// Whether every key of `other` is in this range too.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        if let Some(key) = other.as_key() {
            return self.contains(key);
        }
        if other.start < self.start {
            return false;
        }
        match (&self.end, &other.end) {
            (End::Single, _) => false,
            (End::Open, _) => true,
            (End::Before(_), End::Open) => false,
            (End::Before(ours), End::Before(theirs)) => theirs <= ours,
            (End::Before(_), End::Single) => unreachable!("a single key was answered above"),
        }
    }

    /// The part of it that comes after `key`.
    pub(super) fn bounds_after<'a>(&'a self, after: Option<&'a [u8]>) -> (Bound<&'a [u8]>, Bound<&'a [u8]>) {
        let lower = after.map_or(Bound::Included(&self.start[..]), Bound::Excluded);
        let upper = match &self.end {
            End::Single => Bound::Included(&self.start[..]),
            End::Before(end) => Bound::Excluded(&end[..]),
            End::Open => Bound::Unbounded,
        };
        (lower, upper)
    }

    /// What remains of it from `start` on.
    pub(super) fn with_start(&self, start: Bytes) -> Self {
        Self { start, end: self.end.clone() }
    }
}

/// The lowest key above every key with this prefix; none if there is no such key.
fn prefix_end(prefix: &[u8]) -> Option<Bytes> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_its_successor_begins() {
        let range = KeyRange::prefix("a/");
        assert!(range.contains(b"a/") && range.contains(b"a/\xff\xff"));
        assert!(!range.contains(b"a0") && !range.contains(b"a"));
        assert_eq!(range, KeyRange::from_wire("a/".into(), "a0".into()));
        assert_eq!(range.as_prefix().unwrap(), "a/");
        assert!(KeyRange::prefix(&b"\xff\xff"[..]).contains(b"\xff\xff\x01"));
    }

    #[test]
    fn wire_conventions_are_etcds() {
        let wire = |key: &'static [u8], end: &'static [u8]| KeyRange::from_wire(key.into(), end.into());
        assert_eq!(wire(b"k", b"").as_key().unwrap(), "k");
        assert_eq!(wire(b"\0", b"\0"), KeyRange::all());
        assert_eq!(wire(b"k", b"\0"), KeyRange::from("k"));
        assert!(wire(b"k", b"a").is_empty());
        assert!(wire(b"\0", b"").contains(b"\0"));
    }

    #[test]
    fn a_grant_covers_what_lies_within_it() {
        let grant = KeyRange::prefix("cilium/state/");
        assert!(grant.covers(&KeyRange::prefix("cilium/state/nodes/")));
        assert!(grant.covers(&KeyRange::key("cilium/state/x")));
        assert!(!grant.covers(&KeyRange::prefix("cilium/")));
        assert!(!grant.covers(&KeyRange::from("cilium/state/")));
        assert!(!grant.covers(&KeyRange::key("cilium/state")));
        assert!(KeyRange::all().covers(&KeyRange::from("x")));
        assert!(!KeyRange::key("x").covers(&KeyRange::between("x", "x\0\0")));
    }
}
