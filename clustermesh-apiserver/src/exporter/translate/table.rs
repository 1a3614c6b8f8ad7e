//! The known objects of one kind, through relists, with every change told once.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use super::super::facts::{Fact, Name};

/// What a watch says about one kind of object. Any order and repetition is legal.
#[derive(Clone, Debug)]
pub(crate) enum Event<F> {
    /// A list begins. Nothing is forgotten before it is complete.
    ListBegins,
    /// An object of the list.
    Listed(F),
    /// An object of the list, or a changed one, that cannot be read: what was known of it before holds on.
    Unreadable(Name),
    /// The list is complete: what was not in it is gone.
    ListEnds,
    /// An object is new or has changed.
    Applied(F),
    /// An object is gone.
    Deleted { name: Name, uid: String },
}

/// What an object was before. What it is now stands in the table.
#[derive(Debug)]
pub(crate) struct Change<F> {
    pub name: Name,
    pub old: Option<F>,
}

#[derive(Debug)]
pub(crate) struct Table<F> {
    rows: BTreeMap<Name, F>,
    /// While a list is under way, what has been seen since it began.
    seen: Option<HashSet<Name>>,
    synced: bool,
}

impl<F> Default for Table<F> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), seen: None, synced: false }
    }
}

impl<F: Fact> Table<F> {
    /// Takes an event in and returns what it changed: nothing, for most events of a relist.
    pub(crate) fn apply(&mut self, event: Event<F>) -> Vec<Change<F>> {
        match event {
            Event::ListBegins => {
                self.seen = Some(HashSet::new());
                Vec::new()
            }
            Event::Listed(fact) | Event::Applied(fact) => self.upsert(fact).into_iter().collect(),
            Event::Unreadable(name) => {
                if let Some(seen) = &mut self.seen {
                    seen.insert(name);
                }
                Vec::new()
            }
            Event::Deleted { name, uid } => self.remove(name, &uid).into_iter().collect(),
            Event::ListEnds => {
                self.synced = true;
                let Some(seen) = self.seen.take() else { return Vec::new() };
                self.rows
                    .extract_if(.., |name, _| !seen.contains(name))
                    .map(|(name, old)| Change { name, old: Some(old) })
                    .collect()
            }
        }
    }

    fn upsert(&mut self, fact: F) -> Option<Change<F>> {
        let name = fact.name().clone();
        if let Some(seen) = &mut self.seen {
            seen.insert(name.clone());
        }
        if self.rows.get(&name) == Some(&fact) {
            return None;
        }
        let old = self.rows.insert(name.clone(), fact);
        Some(Change { name, old })
    }

    /// A deletion that names another object than the one known is an old one, come late.
    fn remove(&mut self, name: Name, uid: &str) -> Option<Change<F>> {
        let known = self.rows.get(&name)?.uid();
        if !known.is_empty() && !uid.is_empty() && known != uid {
            return None;
        }
        if let Some(seen) = &mut self.seen {
            seen.remove(&name);
        }
        let old = self.rows.remove(&name);
        Some(Change { name, old })
    }

    /// Whether a whole list has been seen since the start.
    pub(crate) fn is_synced(&self) -> bool {
        self.synced
    }

    pub(crate) fn get(&self, name: &Name) -> Option<&F> {
        self.rows.get(name)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &F> {
        self.rows.values()
    }

    /// The objects of one namespace.
    pub(crate) fn in_namespace<'a>(&'a self, namespace: &'a Arc<str>) -> impl Iterator<Item = &'a Name> {
        let first = Name { namespace: Arc::clone(namespace), name: "".into() };
        self.rows
            .range((Bound::Included(first), Bound::Unbounded))
            .map(|(name, _)| name)
            .take_while(move |name| name.namespace == *namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    struct Thing {
        name: Name,
        uid: &'static str,
        value: u32,
    }

    impl Fact for Thing {
        fn name(&self) -> &Name {
            &self.name
        }

        fn uid(&self) -> &str {
            self.uid
        }
    }

    fn thing(name: &str, value: u32) -> Thing {
        Thing { name: Name::new("ns", name), uid: "", value }
    }

    fn deleted(name: &str, uid: &str) -> Event<Thing> {
        Event::Deleted { name: Name::new("ns", name), uid: uid.to_owned() }
    }

    #[test]
    fn nothing_is_forgotten_until_a_relist_is_complete() {
        let mut table = Table::default();
        table.apply(Event::Applied(thing("a", 1)));
        table.apply(Event::Applied(thing("b", 1)));
        assert!(table.apply(Event::ListBegins).is_empty());
        assert!(table.apply(Event::Listed(thing("a", 1))).is_empty(), "an unchanged object is no change");
        // The list breaks off and begins again.
        assert!(table.apply(Event::ListBegins).is_empty());
        assert!(table.apply(Event::Listed(thing("a", 1))).is_empty());
        assert_eq!(table.len(), 2);
        let gone = table.apply(Event::ListEnds);
        assert_eq!(gone.iter().map(|change| &*change.name.name).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn an_object_that_cannot_be_read_any_more_keeps_its_last_state() {
        let mut table = Table::default();
        table.apply(Event::Applied(thing("a", 1)));
        table.apply(Event::ListBegins);
        table.apply(Event::Unreadable(Name::new("ns", "a")));
        assert!(table.apply(Event::ListEnds).is_empty());
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_late_deletion_of_an_earlier_object_of_the_name_is_ignored() {
        let mut table = Table::default();
        table.apply(Event::Applied(Thing { uid: "second", ..thing("a", 1) }));
        assert!(table.apply(deleted("a", "first")).is_empty());
        assert_eq!(table.apply(deleted("a", "second")).len(), 1);
    }

    #[test]
    fn a_namespaces_objects_are_found_without_its_neighbours() {
        let mut table = Table::default();
        for (namespace, name) in [("a", "z"), ("app", "x"), ("app", "y"), ("app2", "x")] {
            table.apply(Event::Applied(Thing { name: Name::new(namespace, name), uid: "", value: 0 }));
        }
        let namespace: Arc<str> = "app".into();
        let found: Vec<_> = table.in_namespace(&namespace).map(|name| &*name.name).collect();
        assert_eq!(found, ["x", "y"]);
    }
}
