//! A part of the key space that is synchronized as one: a prefix and the canary that says it is complete.

use bytes::Bytes;

/// A prefix and its canary (wire format, section A.4).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Section {
    /// What the section's keys begin with, without the final slash: `cilium/state/nodes/v1/beta`. The keys are those
    /// below it, so that `beta` does not take in `beta-2`.
    pub prefix: Bytes,
    /// The key that its writer puts when the section is complete: `cilium/synced/beta/cilium/state/nodes/v1`. None for
    /// a section that is never announced as complete.
    pub canary: Option<Bytes>,
}

impl Section {
    /// The section of the keys below `prefix`. A final slash is dropped.
    pub fn new(prefix: impl Into<Bytes>, canary: Option<impl Into<Bytes>>) -> Self {
        let mut prefix = prefix.into();
        while prefix.ends_with(b"/") {
            prefix.truncate(prefix.len() - 1);
        }
        Self { prefix, canary: canary.map(Into::into) }
    }

    /// The prefix with its final slash.
    pub(crate) fn directory(&self) -> Bytes {
        [&self.prefix, &b"/"[..]].concat().into()
    }

    /// The prefix as people read it.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.prefix).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cluster_name_may_begin_another() {
        let section = Section::new("cilium/state/nodes/v1/beta/", None::<Bytes>);
        assert_eq!(section.name(), "cilium/state/nodes/v1/beta");
        assert!(!b"cilium/state/nodes/v1/beta-2/n1".starts_with(&section.directory()));
    }
}
