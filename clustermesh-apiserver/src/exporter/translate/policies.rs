//! Policies, by kind: what they say goes to the agents, what is to be said of them to their status.

use std::collections::BTreeSet;

use isthmus_wire::local::PolicyKind;

use super::super::facts::{Name, PolicyFact};
use super::table::{Event, Table};

#[derive(Debug, Default)]
pub(crate) struct Policies {
    tables: [Table<PolicyFact>; PolicyKind::ALL.len()],
    /// Those whose key may say something else now.
    dirty: BTreeSet<(PolicyKind, Name)>,
    /// Those whose status may have to say something else now.
    judged: BTreeSet<(PolicyKind, Name)>,
    exported: BTreeSet<(PolicyKind, Name)>,
}

impl Policies {
    pub(crate) fn apply(&mut self, kind: PolicyKind, event: Event<PolicyFact>) {
        for change in self.tables[kind as usize].apply(event) {
            let now = self.tables[kind as usize].get(&change.name);
            let says = |fact: &PolicyFact| fact.says.clone();
            if change.old.as_ref().map(says) != now.map(says) {
                self.dirty.insert((kind, change.name.clone()));
            }
            self.judged.insert((kind, change.name));
        }
    }

    pub(crate) fn get(&self, kind: PolicyKind, name: &Name) -> Option<&PolicyFact> {
        self.tables[kind as usize].get(name)
    }

    pub(crate) fn take_dirty(&mut self) -> BTreeSet<(PolicyKind, Name)> {
        std::mem::take(&mut self.dirty)
    }

    pub(crate) fn take_judged(&mut self) -> BTreeSet<(PolicyKind, Name)> {
        std::mem::take(&mut self.judged)
    }

    /// Notes what became of a policy's key. Returns whether it was exported before.
    pub(crate) fn note(&mut self, kind: PolicyKind, name: &Name, exported: bool) -> bool {
        let policy = (kind, name.clone());
        if exported { !self.exported.insert(policy) } else { self.exported.remove(&policy) }
    }

    pub(crate) fn exported(&self) -> usize {
        self.exported.len()
    }

    pub(crate) fn is_synced(&self) -> bool {
        self.tables.iter().all(Table::is_synced)
    }
}
