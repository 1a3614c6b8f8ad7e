//! Identities, and which of them have which labels.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_wire::{Labels, NumericIdentity};

use super::NamedPorts;
use super::peers::PeerId;
use crate::labels::{Operator, Requirement, Selector};

/// What is known of an identity.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) labels: Arc<Labels>,
    /// The prefix it stands for, if it is one of this node's own.
    pub(super) prefix: Option<IpNet>,
    pub(super) named_ports: NamedPorts,
    /// The descriptions that fit it, ordered.
    pub(super) peers: Vec<PeerId>,
}

impl Identity {
    pub(super) fn new(labels: Arc<Labels>, prefix: Option<IpNet>) -> Self {
        Self { labels, prefix, named_ports: NamedPorts::new(), peers: Vec::new() }
    }
}

/// All identities, by number and by label.
#[derive(Debug, Default)]
pub(super) struct Identities {
    all: HashMap<NumericIdentity, Identity>,
    by_key: HashMap<Box<str>, ByValue>,
}

/// Identities with a label of one key.
#[derive(Debug, Default)]
struct ByValue {
    any: BTreeSet<NumericIdentity>,
    values: HashMap<Box<str>, BTreeSet<NumericIdentity>>,
}

impl Identities {
    pub(super) fn get(&self, id: NumericIdentity) -> Option<&Identity> {
        self.all.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: NumericIdentity) -> Option<&mut Identity> {
        self.all.get_mut(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (NumericIdentity, &Identity)> {
        self.all.iter().map(|(id, identity)| (*id, identity))
    }

    /// Puts an identity in place of another, of which `peers` and named ports stay for the caller to settle.
    pub(super) fn insert(&mut self, id: NumericIdentity, mut identity: Identity) {
        if let Some(old) = self.remove(id) {
            identity.peers = old.peers;
            identity.named_ports = old.named_ports;
        }
        for (key, label) in identity.labels.iter() {
            // Nearly every key and value is known already.
            if !self.by_key.contains_key(key) {
                self.by_key.insert(key.into(), ByValue::default());
            }
            let Some(by_value) = self.by_key.get_mut(key) else { continue };
            by_value.any.insert(id);
            match by_value.values.get_mut(label.value.as_str()) {
                Some(ids) => {
                    ids.insert(id);
                }
                None => {
                    by_value.values.insert(label.value.as_str().into(), BTreeSet::from([id]));
                }
            }
        }
        self.all.insert(id, identity);
    }

    pub(super) fn remove(&mut self, id: NumericIdentity) -> Option<Identity> {
        let old = self.all.remove(&id)?;
        for (key, label) in old.labels.iter() {
            let Some(by_value) = self.by_key.get_mut(key) else { continue };
            by_value.any.remove(&id);
            if let Some(ids) = by_value.values.get_mut(label.value.as_str()) {
                ids.remove(&id);
                if ids.is_empty() {
                    by_value.values.remove(label.value.as_str());
                }
            }
            if by_value.any.is_empty() {
                self.by_key.remove(key);
            }
        }
        Some(old)
    }

    /// The identities a selector matches. Looks at those alone that have its rarest label.
    pub(super) fn matching(&self, selector: &Selector) -> BTreeSet<NumericIdentity> {
        let rarest = selector
            .requirements()
            .iter()
            .filter_map(|requirement| self.with(requirement))
            .min_by_key(|sets| sets.iter().map(|set| set.len()).sum::<usize>());
        match rarest {
            Some(sets) => sets
                .into_iter()
                .flatten()
                .copied()
                .filter(|id| self.all.get(id).is_some_and(|identity| selector.matches(&identity.labels)))
                .collect(),
            None => self
                .all
                .iter()
                .filter(|(_, identity)| selector.matches(&identity.labels))
                .map(|(id, _)| *id)
                .collect(),
        }
    }

    /// The identities that can fulfil a requirement, whatever the source of their label; none if it says what they must not
    /// have.
    fn with(&self, requirement: &Requirement) -> Option<Vec<&BTreeSet<NumericIdentity>>> {
        let by_value = self.by_key.get(&*requirement.key);
        match &requirement.operator {
            Operator::In(values) => Some(
                by_value
                    .into_iter()
                    .flat_map(|by_value| values.iter().filter_map(|value| by_value.values.get(&**value)))
                    .collect(),
            ),
            Operator::Exists => Some(by_value.into_iter().map(|by_value| &by_value.any).collect()),
            Operator::NotIn(_) | Operator::DoesNotExist => None,
        }
    }
}
