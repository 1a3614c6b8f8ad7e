//! Nodes.

use std::collections::{BTreeSet, HashSet};

use super::super::facts::{Name, NodeFact};
use super::table::{Event, Table};

#[derive(Debug, Default)]
pub(crate) struct Nodes {
    table: Table<NodeFact>,
    dirty: BTreeSet<Name>,
    exported: HashSet<Name>,
}

impl Nodes {
    /// Returns the nodes that have changed.
    pub(crate) fn apply(&mut self, event: Event<NodeFact>) -> Vec<Name> {
        let changed: Vec<Name> = self.table.apply(event).into_iter().map(|change| change.name).collect();
        self.dirty.extend(changed.iter().cloned());
        changed
    }

    pub(crate) fn take_dirty(&mut self) -> BTreeSet<Name> {
        std::mem::take(&mut self.dirty)
    }

    pub(crate) fn get(&self, name: &Name) -> Option<&NodeFact> {
        self.table.get(name)
    }

    pub(crate) fn named(&self, name: &str) -> Option<&NodeFact> {
        self.table.get(&Name::new("", name))
    }

    /// Notes what became of a node's key. Returns whether it was exported before.
    pub(crate) fn note(&mut self, name: &Name, exported: bool) -> bool {
        if exported { !self.exported.insert(name.clone()) } else { self.exported.remove(name) }
    }

    pub(crate) fn exported(&self) -> usize {
        self.exported.len()
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.table.is_synced()
    }
}
