//! Policies, by kind: what they say goes to the agents, what is to be said of them to their status.

use std::collections::{BTreeSet, HashMap};

use isthmus_wire::local::PolicyKind;

use super::super::facts::{Name, PolicyFact};
use super::identities::LabelSet;
use super::table::{Event, Table};

#[derive(Debug, Default)]
pub(crate) struct Policies {
    tables: [Table<PolicyFact>; PolicyKind::ALL.len()],
    /// Those whose key may say something else now.
    dirty: BTreeSet<(PolicyKind, Name)>,
    /// Those whose status may have to say something else now.
    judged: BTreeSet<(PolicyKind, Name)>,
    exported: BTreeSet<(PolicyKind, Name)>,
    /// How many of the pods' label sets each policy selects.
    selected: HashMap<(PolicyKind, Name), usize>,
    /// Those that say something else now, so that all label sets have to be looked at.
    uncounted: BTreeSet<(PolicyKind, Name)>,
}

impl Policies {
    pub(crate) fn apply(&mut self, kind: PolicyKind, event: Event<PolicyFact>) {
        for change in self.tables[kind as usize].apply(event) {
            let now = self.tables[kind as usize].get(&change.name);
            let says = |fact: &PolicyFact| fact.says.clone();
            if change.old.as_ref().map(says) != now.map(says) {
                self.dirty.insert((kind, change.name.clone()));
                self.uncounted.insert((kind, change.name.clone()));
            }
            self.judged.insert((kind, change.name));
        }
    }

    /// Counts whom policies select. `changed` are the label sets that have come and gone, `all` those that there are now.
    pub(crate) fn count<'a>(
        &mut self,
        changed: &[(LabelSet, bool)],
        all: impl Fn() -> Box<dyn Iterator<Item = &'a LabelSet> + 'a>,
    ) {
        let uncounted = std::mem::take(&mut self.uncounted);
        let selects = |policy: &PolicyFact, labels: &LabelSet| {
            policy.subjects.iter().any(|subject| subject.matches(labels))
        };
        if !changed.is_empty() {
            for (name, policy) in self
                .tables
                .iter()
                .flat_map(|table| table.values())
                .map(|fact| ((fact.kind, fact.name.clone()), fact))
            {
                if uncounted.contains(&name) {
                    continue;
                }
                let before = self.selected.get(&name).copied().unwrap_or(0);
                let now = changed.iter().filter(|(labels, _)| selects(policy, labels)).fold(
                    before,
                    |count, (_, came)| {
                        if *came { count + 1 } else { count.saturating_sub(1) }
                    },
                );
                if (before == 0) != (now == 0) {
                    self.judged.insert(name.clone());
                }
                self.selected.insert(name, now);
            }
        }
        for (kind, name) in uncounted {
            let count = match self.tables[kind as usize].get(&name) {
                Some(policy) => all().filter(|labels| selects(policy, labels)).count(),
                None => {
                    self.selected.remove(&(kind, name));
                    continue;
                }
            };
            self.judged.insert((kind, name.clone()));
            self.selected.insert((kind, name), count);
        }
    }

    /// Has all policies judged anew.
    pub(crate) fn judge_all(&mut self) {
        let all =
            self.tables.iter().flat_map(|table| table.values()).map(|fact| (fact.kind, fact.name.clone()));
        self.judged.extend(all);
    }

    /// Whether a pod has labels that the policy selects.
    pub(crate) fn selects_any(&self, kind: PolicyKind, name: &Name) -> bool {
        self.selected.get(&(kind, name.clone())).is_some_and(|count| *count > 0)
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
