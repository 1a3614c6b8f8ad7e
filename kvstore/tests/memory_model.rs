//! The memory store against a model that keeps everything: whatever is done, both give the same answers.
#![allow(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_kvstore::memory::{
    Event, KeyRange, Limits, MemoryStore, Mutation, RangeRequest, Revision, StoreError, StoreId,
    WatchRequest, Watcher,
};
use proptest::prelude::*;

/// A key's value with its revisions: value, create, mod, version.
type Version = (String, i64, i64, i64);
type State = BTreeMap<String, Version>;
/// Key, what it became, what it was.
type Change = (String, Option<Version>, Option<Version>);

/// Every state there ever was, by revision.
struct Model {
    states: Vec<State>,
    changes: Vec<Vec<Change>>,
    compacted: i64,
}

impl Model {
    fn new() -> Self {
        // Revisions 0 and 1 are empty.
        Self { states: vec![State::new(); 2], changes: vec![vec![]; 2], compacted: 0 }
    }

    fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    fn apply(&mut self, batch: &[(String, Option<String>)]) {
        let revision = self.revision() + 1;
        let mut state = self.states.last().unwrap().clone();
        let mut changes = Vec::new();
        for (position, (key, value)) in batch.iter().enumerate() {
            if batch[position + 1..].iter().any(|(later, _)| later == key) {
                continue;
            }
            let old = state.get(key).cloned();
            let new = match (value, &old) {
                (None, None) => continue,
                (None, Some(_)) => None,
                (Some(value), None) => Some((value.clone(), revision, revision, 1)),
                (Some(value), Some((_, created, _, version))) => {
                    Some((value.clone(), *created, revision, version + 1))
                }
            };
            match &new {
                Some(version) => drop(state.insert(key.clone(), version.clone())),
                None => drop(state.remove(key)),
            }
            changes.push((key.clone(), new, old));
        }
        if !changes.is_empty() {
            self.states.push(state);
            self.changes.push(changes);
        }
    }

    fn range(&self, range: &KeyRange, revision: i64) -> Vec<(String, Version)> {
        let state = &self.states[revision as usize];
        state
            .iter()
            .filter(|(key, _)| range.contains(key.as_bytes()))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    }

    fn changes(&self, range: &KeyRange, from: i64) -> Vec<(i64, Change)> {
        let numbered = self.changes.iter().enumerate().skip(from.max(0) as usize);
        let each = numbered
            .flat_map(|(revision, changes)| changes.iter().map(move |c| (revision as i64, c.clone())));
        each.filter(|(_, (key, ..))| range.contains(key.as_bytes())).collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Apply(Vec<(String, Option<String>)>),
    Compact(f64),
    Range(KeyRange, f64, usize),
    Watch(KeyRange, f64),
    Poll,
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof!["[ab]", "[ab]/[ab]", "[ab]/[ab]/[a-d]"]
}

fn range() -> impl Strategy<Value = KeyRange> {
    prop_oneof![
        key().prop_map(KeyRange::key),
        key().prop_map(KeyRange::prefix),
        key().prop_map(KeyRange::from),
        (key(), key()).prop_map(|(start, end)| KeyRange::between(start, end)),
        Just(KeyRange::all()),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let change = || (key(), prop::option::weighted(0.7, "[a-z]{1,3}"));
    prop_oneof![
        6 => prop::collection::vec(change(), 1..2).prop_map(Step::Apply),
        2 => prop::collection::vec(change(), 0..6).prop_map(Step::Apply),
        1 => (0.0..1.1).prop_map(Step::Compact),
        3 => (range(), 0.0..1.1, 0..5_usize).prop_map(|(range, at, limit)| Step::Range(range, at, limit)),
        1 => (range(), 0.0..1.3).prop_map(|(range, from)| Step::Watch(range, from)),
        2 => Just(Step::Poll),
    ]
}

/// A watcher, where the model says it is, and what it has told.
struct Watching {
    watcher: Option<Watcher>,
    range: KeyRange,
    from: i64,
    told: Vec<(i64, Change)>,
}

impl Watching {
    fn take(&mut self, events: &[Event]) {
        let version = |kv: &isthmus_kvstore::memory::KeyValue| {
            let value = String::from_utf8(kv.value.to_vec()).unwrap();
            (value, kv.create_revision.0, kv.mod_revision.0, kv.version)
        };
        for event in events {
            let key = String::from_utf8(event.kv.key.to_vec()).unwrap();
            let new = (!event.is_delete()).then(|| version(&event.kv));
            self.told.push((event.revision().0, (key, new, event.prev.as_deref().map(version))));
        }
    }

    /// What it told is a beginning of what happened, with no commit torn apart: ordered, unique, atomic, reliable.
    fn check(&self, model: &Model) {
        let happened = model.changes(&self.range, self.from);
        assert!(happened.starts_with(&self.told), "told {:?}\nof {happened:?}", self.told);
        let next = happened.get(self.told.len());
        if let (Some((last, _)), Some((next, _))) = (self.told.last(), next) {
            assert!(last < next, "revision {last} is torn apart");
        }
    }
}

fn at(model: &Model, fraction: f64) -> i64 {
    (model.revision() as f64 * fraction) as i64
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn the_store_answers_as_the_model_does(steps in prop::collection::vec(step(), 1..120), small_feed in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let feed_commits = if small_feed { 2 } else { 1000 };
        let store = MemoryStore::new(StoreId(1), Limits { feed_commits, batch_bytes: 300, ..Limits::default() });
        let mut model = Model::new();
        let mut watching: Vec<Watching> = Vec::new();
        for step in steps {
            match step {
                Step::Apply(batch) => {
                    model.apply(&batch);
                    let mutation = |(key, value): (String, Option<String>)| match value {
                        Some(value) => Mutation::put(key, value),
                        None => Mutation::delete(key),
                    };
                    let revision = store.apply(batch.into_iter().map(mutation).collect());
                    prop_assert_eq!(revision.0, model.revision());
                }
                Step::Compact(fraction) => {
                    let revision = at(&model, fraction);
                    let expected = if revision <= model.compacted {
                        Err(StoreError::Compacted { compact_revision: Revision(model.compacted) })
                    } else if revision > model.revision() {
                        Err(StoreError::Future { current: Revision(model.revision()) })
                    } else {
                        model.compacted = revision;
                        Ok(())
                    };
                    prop_assert_eq!(store.compact(Revision(revision)), expected);
                }
                Step::Range(range, fraction, limit) => {
                    let revision = at(&model, fraction);
                    let request = RangeRequest { revision: Some(Revision(revision)), limit, ..RangeRequest::new(range.clone()) };
                    let answer = store.range(&request);
                    if revision > model.revision() {
                        prop_assert_eq!(answer.unwrap_err(), StoreError::Future { current: Revision(model.revision()) });
                    } else if revision < model.compacted {
                        let compact_revision = Revision(model.compacted);
                        prop_assert_eq!(answer.unwrap_err(), StoreError::Compacted { compact_revision });
                    } else {
                        let (answer, expected) = (answer.unwrap(), model.range(&range, revision));
                        prop_assert_eq!(answer.count, expected.len());
                        prop_assert_eq!(answer.more, limit > 0 && expected.len() > limit);
                        prop_assert_eq!(answer.revision.0, model.revision());
                        let shown: Vec<_> = answer.kvs.iter().map(|kv| {
                            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                            (text(&kv.key), (text(&kv.value), kv.create_revision.0, kv.mod_revision.0, kv.version))
                        }).collect();
                        let page = if limit == 0 { expected.len() } else { limit.min(expected.len()) };
                        prop_assert_eq!(&shown[..], &expected[..page]);
                    }
                }
                Step::Watch(range, fraction) => {
                    let from = at(&model, fraction).max(1);
                    let request = WatchRequest { start_revision: Some(Revision(from)), ..WatchRequest::new(range.clone()) };
                    match store.watch(request) {
                        Ok(watcher) => watching.push(Watching { watcher: Some(watcher), range, from, told: vec![] }),
                        Err(StoreError::Compacted { compact_revision }) => {
                            prop_assert!(from < model.compacted);
                            prop_assert_eq!(compact_revision.0, model.compacted);
                        }
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                Step::Poll => {
                    for watch in &mut watching {
                        match watch.watcher.as_mut().map(Watcher::try_next) {
                            Some(Ok(Some(batch))) => watch.take(&batch.events),
                            Some(Ok(None)) | None => {}
                            Some(Err(canceled)) => {
                                prop_assert_eq!(canceled.compact_revision.0, model.compacted);
                                watch.watcher = None;
                            }
                        }
                        watch.check(&model);
                    }
                }
            }
        }
        // Whoever was not cancelled gets everything, in the end.
        runtime.block_on(async {
            for watch in &mut watching {
                let happened = model.changes(&watch.range, watch.from).len();
                while watch.watcher.is_some() && watch.told.len() < happened {
                    let next = watch.watcher.as_mut().unwrap().next();
                    match tokio::time::timeout(Duration::from_secs(20), next).await.expect("the missing events") {
                        Ok(batch) => watch.take(&batch.events),
                        Err(canceled) => {
                            assert_eq!(canceled.compact_revision.0, model.compacted);
                            watch.watcher = None;
                        }
                    }
                    watch.check(&model);
                }
            }
        });
    }
}
