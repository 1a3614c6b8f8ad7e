//! Sets of fields, as `metadata.managedFields` holds them (`fieldsV1`).
//!
//! A step of a path is written as in the wire format: `f:name` for a field, `k:{"name":"a"}` for an item of a
//! list by its keys, `v:"a"` for an item of a set.

pub mod managed;

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::schema::{At, ListKind};

/// A set of field paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields(BTreeMap<String, Entry>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Entry {
    /// Whether the path that ends here is in the set (`.`; implied where nothing is below).
    owned: bool,
    below: Fields,
}

/// The parts of a value that have paths of their own.
enum Parts<'v, 'a> {
    /// None: it is owned as a whole.
    Leaf,
    /// With each part's step and schema. `listed`: the items of a list, which are owned themselves too.
    Of { parts: Vec<(String, &'v Value, At<'a>)>, listed: bool },
}

impl Fields {
    /// No fields.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All fields of an object, as server-side apply owns them.
    pub fn of(at: At<'_>, object: &Value) -> Self {
        let mut fields = Self::default();
        if let Parts::Of { parts, listed } = parts(at, object) {
            for (step, value, at) in parts {
                let below = Self::of(at, value);
                fields.0.insert(step, Entry { owned: listed || below.is_empty(), below });
            }
        }
        fields
    }

    /// What changed between two objects: fields that were added or got another value, and fields that went.
    pub fn changes(at: At<'_>, old: &Value, new: &Value) -> (Self, Self) {
        let mut changed = Self::default();
        let mut removed = Self::default();
        let (Parts::Of { parts: old, .. }, Parts::Of { parts: new, .. }) = (parts(at, old), parts(at, new))
        else {
            return (changed, removed);
        };
        let old: BTreeMap<String, (&Value, At<'_>)> =
            old.into_iter().map(|(s, v, at)| (s, (v, at))).collect();
        let mut seen = Vec::new();
        for (step, value, at) in new {
            match old.get(&step) {
                None => {
                    // All of it is new, and so is the place where it is.
                    let fields = Self::all(at, value);
                    changed.0.insert(
                        step.clone(),
                        Entry { owned: !at.is_struct() || fields.is_empty(), below: fields },
                    );
                }
                Some((before, _)) if *before == value => {}
                Some((before, _)) => {
                    if matches!((parts(at, before), parts(at, value)), (Parts::Of { .. }, Parts::Of { .. })) {
                        let (c, r) = Self::changes(at, before, value);
                        changed.insert_below(&step, c);
                        removed.insert_below(&step, r);
                    } else {
                        changed.0.insert(step.clone(), Entry { owned: true, below: Self::all(at, value) });
                    }
                }
            }
            seen.push(step);
        }
        for (step, (value, at)) in old {
            if !seen.contains(&step) {
                removed.0.insert(step, Entry { owned: true, below: Self::all(at, value) });
            }
        }
        (changed, removed)
    }

    /// All fields of a value that came as a whole: also the maps and items on the way.
    fn all(at: At<'_>, value: &Value) -> Self {
        let mut fields = Self::default();
        if let Parts::Of { parts, listed } = parts(at, value) {
            for (step, value, at) in parts {
                let below = Self::all(at, value);
                let owned = listed || below.is_empty() || !at.is_struct();
                fields.0.insert(step, Entry { owned, below });
            }
        }
        fields
    }

    fn insert_below(&mut self, step: &str, below: Fields) {
        if !below.is_empty() {
            self.0.insert(step.to_owned(), Entry { owned: false, below });
        }
    }

    /// Fields of either set.
    pub fn union(&self, other: &Self) -> Self {
        let mut union = self.clone();
        for (step, theirs) in &other.0 {
            let ours = union.0.entry(step.clone()).or_default();
            ours.owned |= theirs.owned;
            ours.below = ours.below.union(&theirs.below);
        }
        union
    }

    /// Fields of this set that are not in the other.
    pub fn without(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && !theirs)
    }

    /// Fields of both sets.
    pub fn intersection(&self, other: &Self) -> Self {
        self.combine(other, |ours, theirs| ours && theirs)
    }

    fn combine(&self, other: &Self, keep: fn(bool, bool) -> bool) -> Self {
        let nothing = Entry::default();
        let kept = self.0.iter().filter_map(|(step, ours)| {
            let theirs = other.0.get(step).unwrap_or(&nothing);
            let entry = Entry {
                owned: keep(ours.owned, theirs.owned),
                below: ours.below.combine(&theirs.below, keep),
            };
            (entry.owned || !entry.below.is_empty()).then(|| (step.clone(), entry))
        });
        Self(kept.collect())
    }

    /// Removes this path and all below it.
    fn remove(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else { return };
        let Some(entry) = self.0.get_mut(*first) else { return };
        if rest.is_empty() {
            self.0.remove(*first);
            return;
        }
        entry.below.remove(rest);
        if !entry.owned && entry.below.is_empty() {
            self.0.remove(*first);
        }
    }

    /// The paths in the set, as people read them: `.spec.ports[port=80].name`.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        for (step, entry) in &self.0 {
            let shown = shown(step);
            if entry.owned {
                paths.push(shown.clone());
            }
            paths.extend(entry.below.paths().into_iter().map(|below| format!("{shown}{below}")));
        }
        paths
    }

    /// `fieldsV1`.
    pub fn to_value(&self) -> Value {
        let mut map = Map::new();
        for (step, entry) in &self.0 {
            let mut below = entry.below.to_value();
            if entry.owned && !entry.below.is_empty() {
                below["."] = json!({});
            }
            map.insert(step.clone(), below);
        }
        Value::Object(map)
    }

    /// Reads `fieldsV1`; what it cannot be is left out.
    pub fn from_value(value: &Value) -> Self {
        let entries = value.as_object().into_iter().flatten().filter(|(step, _)| *step != ".");
        Self(
            entries
                .map(|(step, value)| {
                    let below = Self::from_value(value);
                    let owned = below.is_empty() || value.get(".").is_some();
                    (step.clone(), Entry { owned, below })
                })
                .collect(),
        )
    }

    /// Merges what these fields of `config` say into `object`, by the schema.
    pub fn merge(at: At<'_>, object: &mut Value, config: &Value) {
        let (Parts::Of { .. }, Parts::Of { parts: wanted, listed }) = (parts(at, object), parts(at, config))
        else {
            // An empty map or list of items takes nothing away from what others put there.
            let adds_nothing = match (&*object, config) {
                (Value::Object(_), Value::Object(config)) => config.is_empty() && !at.is_atomic(),
                (Value::Array(_), Value::Array(config)) => {
                    config.is_empty() && *at.list_kind() != ListKind::Atomic
                }
                _ => false,
            };
            if !adds_nothing {
                *object = config.clone();
            }
            return;
        };
        for (step, value, at_part) in wanted {
            let present = locate(at, object, &step);
            match (present, listed) {
                (Some(present), _) => Self::merge(at_part, present, value),
                (None, true) => {
                    if let Some(items) = object.as_array_mut() {
                        items.push(value.clone());
                    }
                }
                (None, false) => {
                    if let Some(name) = step.strip_prefix("f:") {
                        object[name] = value.clone();
                    }
                }
            }
        }
    }

    /// Removes from `object` the fields of this set that neither `wanted` nor `others` has.
    pub fn prune(&self, at: At<'_>, object: &mut Value, wanted: &Self, others: &Self) {
        let nothing = Self::default();
        for (step, entry) in &self.0 {
            let wants = wanted.0.get(step);
            let held = others.0.get(step);
            if wants.is_none() && held.is_none() {
                take_out(at, object, step);
                continue;
            }
            let Some(present) = locate(at, object, step) else { continue };
            let at_part = part_at(at, step);
            entry.below.prune(
                at_part,
                present,
                wants.map_or(&nothing, |e| &e.below),
                held.map_or(&nothing, |e| &e.below),
            );
        }
    }
}

/// What a value is made of, by its schema.
fn parts<'v, 'a>(at: At<'a>, value: &'v Value) -> Parts<'v, 'a> {
    match value {
        Value::Object(object) if !object.is_empty() && !at.is_atomic() => Parts::Of {
            parts: object.iter().map(|(name, value)| (format!("f:{name}"), value, at.field(name))).collect(),
            listed: false,
        },
        Value::Array(items) if !items.is_empty() && *at.list_kind() != ListKind::Atomic => {
            let steps: Option<Vec<_>> =
                items.iter().map(|item| Some((item_step(at, item)?, item, at.item()))).collect();
            steps.map_or(Parts::Leaf, |parts| Parts::Of { parts, listed: true })
        }
        _ => Parts::Leaf,
    }
}

/// The step to an item of a list; `None` if it lacks a key.
fn item_step(at: At<'_>, item: &Value) -> Option<String> {
    match at.list_kind() {
        ListKind::Map(keys) => {
            let mut key: Vec<(String, Value)> = at.item().item_key(keys, item)?.into_iter().collect();
            key.sort_by(|a, b| a.0.cmp(&b.0));
            Some(format!("k:{}", Value::Object(key.into_iter().collect())))
        }
        ListKind::Set => Some(format!("v:{item}")),
        ListKind::Atomic => None,
    }
}

fn part_at<'a>(at: At<'a>, step: &str) -> At<'a> {
    step.strip_prefix("f:").map_or_else(|| at.item(), |name| at.field(name))
}

fn locate<'v>(at: At<'_>, object: &'v mut Value, step: &str) -> Option<&'v mut Value> {
    match (object, step.strip_prefix("f:")) {
        (Value::Object(object), Some(name)) => object.get_mut(name),
        (Value::Array(items), None) => {
            items.iter_mut().find(|item| item_step(at, item).as_deref() == Some(step))
        }
        _ => None,
    }
}

fn take_out(at: At<'_>, object: &mut Value, step: &str) {
    match (object, step.strip_prefix("f:")) {
        (Value::Object(object), Some(name)) => {
            object.shift_remove(name);
        }
        (Value::Array(items), None) => items.retain(|item| item_step(at, item).as_deref() != Some(step)),
        _ => {}
    }
}

fn shown(step: &str) -> String {
    match step.split_once(':') {
        Some(("f", name)) => format!(".{name}"),
        Some(("k", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let keys: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
            format!("[{}]", keys.join(","))
        }
        Some(("v", value)) => format!("[={value}]"),
        _ => format!("[{step}]"),
    }
}
