//! The store: objects by resource, one revision counter for all of them, and per resource a bounded log.
//!
//! The log does three jobs. Watchers read it from the revision they have seen, so there is no queue per
//! watcher, a write costs the same with one watcher or a thousand, and one that sleeps longer than the log
//! reaches back is told 410, as etcd would. A list at an older revision (the pages after the first) is the
//! present undone by the log. And "too old" is simply "before the log".

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;

/// A stored object: immutable, shared by all readers, serialized once.
#[derive(Debug)]
pub struct Object {
    /// The object with `metadata.resourceVersion` set.
    pub value: Value,
    json: OnceLock<Bytes>,
}

impl Object {
    pub(crate) fn new(value: Value) -> Arc<Self> {
        Arc::new(Self { value, json: OnceLock::new() })
    }

    /// The object as JSON.
    pub fn json(&self) -> &Bytes {
        self.json.get_or_init(|| Bytes::from(self.value.to_string()))
    }
}

/// Which object of a resource; ordered as lists are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Empty for resources of the cluster.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl Key {
    /// The key of an object by its metadata.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

/// A change of one object.
#[derive(Debug)]
pub struct Event {
    /// The store's revision that this change made.
    pub revision: u64,
    /// Which object.
    pub key: Key,
    /// What happened.
    pub change: Change,
    line: OnceLock<Bytes>,
}

impl Event {
    /// The event as a line of a watch, made once for all watchers that see it as it is.
    pub fn line(&self, make: impl FnOnce() -> Bytes) -> &Bytes {
        self.line.get_or_init(make)
    }
}

/// What happened to an object. `new` of a deletion is its last state, at the deletion's revision.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Change {
    Added { new: Arc<Object> },
    Modified { old: Arc<Object>, new: Arc<Object> },
    Deleted { old: Arc<Object>, new: Arc<Object> },
}

/// The asked-for revision is no longer in the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Compacted {
    /// The oldest revision that can still be asked for.
    pub oldest: u64,
}

/// A resource's name for the store: `group/plural`.
pub type Collection = Arc<str>;

/// See the module's documentation. Not shared by itself: the server holds it in a mutex.
#[derive(Debug)]
pub struct Store {
    revision: u64,
    history: usize,
    collections: HashMap<Collection, Objects>,
}

#[derive(Debug)]
struct Objects {
    current: BTreeMap<Key, Arc<Object>>,
    log: VecDeque<Arc<Event>>,
    /// Events up to this revision are gone from the log.
    compacted: u64,
    /// Wakes watchers; carries the revision of the last change.
    changed: watch::Sender<u64>,
}

impl Store {
    /// A store that keeps `history` events of each resource.
    pub fn new(history: usize) -> Self {
        Self { revision: 1, history: history.max(1), collections: HashMap::new() }
    }

    /// The last revision handed out.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The object as it is now.
    pub fn get(&self, collection: &Collection, key: &Key) -> Option<Arc<Object>> {
        self.get_ref(collection, key).cloned()
    }

    /// The object as it is now, borrowed.
    pub fn get_ref(&self, collection: &Collection, key: &Key) -> Option<&Arc<Object>> {
        self.collections.get(collection)?.current.get(key)
    }

    /// All objects now, of one namespace or of all, in order.
    pub fn list<'a>(
        &'a self,
        collection: &Collection,
        namespace: Option<&'a str>,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Object>)> + use<'a> {
        let start = Key::new(namespace.unwrap_or(""), "");
        self.collections
            .get(collection)
            .into_iter()
            .flat_map(move |objects| objects.current.range(start.clone()..))
            .take_while(move |(key, _)| namespace.is_none_or(|wanted| key.namespace == wanted))
    }

    /// Whether any resource but `except` has an object in this namespace.
    pub fn namespace_in_use(&self, namespace: &str, except: &Collection) -> bool {
        self.collections
            .keys()
            .filter(|collection| *collection != except)
            .any(|collection| self.list(collection, Some(namespace)).next().is_some())
    }

    /// The names of all resources that have, or had, objects.
    pub fn collections(&self) -> Vec<Collection> {
        self.collections.keys().cloned().collect()
    }

    /// All objects as they were at `revision`.
    pub fn list_at(
        &self,
        collection: &Collection,
        namespace: Option<&str>,
        revision: u64,
    ) -> Result<BTreeMap<Key, Arc<Object>>, Compacted> {
        let mut objects: BTreeMap<Key, Arc<Object>> =
            self.list(collection, namespace).map(|(k, o)| (k.clone(), o.clone())).collect();
        for event in self.log_after(collection, revision)?.rev() {
            if namespace.is_some_and(|wanted| event.key.namespace != wanted) {
                continue;
            }
            match &event.change {
                Change::Added { .. } => objects.remove(&event.key),
                Change::Modified { old, .. } | Change::Deleted { old, .. } => {
                    objects.insert(event.key.clone(), old.clone())
                }
            };
        }
        Ok(objects)
    }

    /// The changes after `revision`, oldest first.
    pub fn events_after(&self, collection: &Collection, revision: u64) -> Result<Vec<Arc<Event>>, Compacted> {
        Ok(self.log_after(collection, revision)?.cloned().collect())
    }

    /// Resolves whenever the resource changes.
    pub fn subscribe(&mut self, collection: &Collection) -> watch::Receiver<u64> {
        self.objects(collection).changed.subscribe()
    }

    /// Creates or replaces an object; its `metadata.resourceVersion` is set here.
    pub fn put(&mut self, collection: &Collection, key: Key, mut value: Value) -> Arc<Object> {
        let revision = self.next_revision(&mut value);
        let new = Object::new(value);
        let old = self.objects(collection).current.insert(key.clone(), new.clone());
        let change = match old {
            Some(old) => Change::Modified { old, new: new.clone() },
            None => Change::Added { new: new.clone() },
        };
        self.record(collection, revision, key, change);
        new
    }

    /// Removes an object and returns its last state. `last` replaces what the watchers see of it.
    pub fn delete(&mut self, collection: &Collection, key: &Key) -> Option<Arc<Object>> {
        let old = self.objects(collection).current.remove(key)?;
        let mut value = old.value.clone();
        let revision = self.next_revision(&mut value);
        let new = Object::new(value);
        let change = Change::Deleted { old, new: new.clone() };
        self.record(collection, revision, key.clone(), change);
        Some(new)
    }

    /// Forgets the history up to now, as etcd's compaction does: older revisions answer 410 from here on.
    pub fn compact(&mut self) {
        let revision = self.revision;
        for objects in self.collections.values_mut() {
            objects.log.clear();
            objects.compacted = revision;
        }
    }

    fn objects(&mut self, collection: &Collection) -> &mut Objects {
        let revision = self.revision;
        self.collections.entry(collection.clone()).or_insert_with(|| Objects {
            current: BTreeMap::new(),
            log: VecDeque::new(),
            compacted: 0,
            changed: watch::Sender::new(revision),
        })
    }

    fn next_revision(&mut self, value: &mut Value) -> u64 {
        self.revision += 1;
        value["metadata"]["resourceVersion"] = Value::String(self.revision.to_string());
        self.revision
    }

    fn record(&mut self, collection: &Collection, revision: u64, key: Key, change: Change) {
        let history = self.history;
        let event = Event { revision, key, change, line: OnceLock::new() };
        let objects = self.objects(collection);
        objects.log.push_back(Arc::new(event));
        while objects.log.len() > history {
            objects.compacted = objects.log.pop_front().map_or(objects.compacted, |e| e.revision);
        }
        objects.changed.send_replace(revision);
    }

    fn log_after(
        &self,
        collection: &Collection,
        revision: u64,
    ) -> Result<impl DoubleEndedIterator<Item = &Arc<Event>> + use<'_>, Compacted> {
        let (compacted, log) = match self.collections.get(collection) {
            Some(objects) => (objects.compacted, Some(&objects.log)),
            None => (0, None),
        };
        if revision < compacted {
            return Err(Compacted { oldest: compacted });
        }
        let skip = log.map_or(0, |log| log.partition_point(|event| event.revision <= revision));
        Ok(log.into_iter().flat_map(move |log| log.range(skip..)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn put(store: &mut Store, name: &str, n: u64) -> u64 {
        store.put(&pods(), Key::new("ns", name), json!({"metadata": {"name": name}, "n": n}));
        store.revision()
    }

    fn pods() -> Collection {
        "/pods".into()
    }

    #[test]
    fn an_older_revision_lists_what_was_there_then() {
        let mut store = Store::new(100);
        put(&mut store, "a", 1);
        let then = put(&mut store, "b", 1);
        put(&mut store, "b", 2);
        put(&mut store, "c", 1);
        store.delete(&pods(), &Key::new("ns", "a"));
        let names: Vec<String> =
            store.list_at(&pods(), Some("ns"), then).expect("kept").into_keys().map(|k| k.name).collect();
        assert_eq!(names, ["a", "b"]);
        let b = &store.list_at(&pods(), None, then).expect("kept")[&Key::new("ns", "b")];
        assert_eq!(b.value["n"], 1);
    }

    #[test]
    fn a_reader_behind_the_log_is_told_so() {
        let mut store = Store::new(2);
        let first = put(&mut store, "a", 1);
        for n in 2..6 {
            put(&mut store, "a", n);
        }
        assert_eq!(store.events_after(&pods(), first).unwrap_err(), Compacted { oldest: 4 });
        assert_eq!(store.events_after(&pods(), 4).expect("kept").len(), 2);
        store.compact();
        assert!(store.events_after(&pods(), 5).is_err());
        assert_eq!(store.events_after(&pods(), store.revision()).expect("the present").len(), 0);
    }

    #[test]
    fn every_change_has_a_revision_of_its_own_and_wakes_the_watchers() {
        let mut store = Store::new(100);
        let mut changed = store.subscribe(&pods());
        let first = put(&mut store, "a", 1);
        let gone = store.delete(&pods(), &Key::new("ns", "a")).expect("was there");
        assert_eq!(gone.value["metadata"]["resourceVersion"], (first + 1).to_string());
        assert!(changed.has_changed().expect("the store lives"));
        assert_eq!(*changed.borrow_and_update(), first + 1);
    }
}
