//! JSON patch (RFC 6902) within bounds, and strategic merge patch. Merge patch (RFC 7386) needs neither: the
//! `json-patch` crate has it.

use json_patch::{Patch, PatchOperation};
use serde_json::{Map, Value};

use crate::schema::{At, ListKind};
use crate::status::{ApiError, ApiResult};

/// More operations than this in one JSON patch are refused, as by the real server.
const MAX_OPERATIONS: usize = 10_000;
/// What a JSON patch copies, all in all. Copies of copies would else make gigabytes of a byte, or nest
/// deeper than a stack is.
const MAX_COPIED_BYTES: usize = 256 * 1024;
/// Deeper places cannot be patched; what is read from a body is not deeper either.
const MAX_PATCH_DEPTH: usize = 128;

/// The object with a JSON patch applied.
pub fn json_patched(object: &Value, patch: &Patch) -> ApiResult<Value> {
    if patch.len() > MAX_OPERATIONS {
        let why = format!("the patch has more than {MAX_OPERATIONS} operations: send several");
        return Err(ApiError::bad_request(why));
    }
    let mut new = object.clone();
    let mut copied = 0;
    for operation in patch.iter() {
        if operation.path().count() > MAX_PATCH_DEPTH {
            let why = format!("the patch reaches deeper than {MAX_PATCH_DEPTH} levels");
            return Err(ApiError::bad_request(why));
        }
        if let PatchOperation::Copy(copy) = operation {
            copied += new.pointer(copy.from.as_str()).map_or(0, |value| value.to_string().len());
            if copied > MAX_COPIED_BYTES {
                return Err(ApiError::too_large(MAX_COPIED_BYTES));
            }
        }
        json_patch::patch(&mut new, std::slice::from_ref(operation))
            .map_err(|e| ApiError::unprocessable(format!("the server rejected our request: {e}")))?;
    }
    Ok(new)
}

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const SET_ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";

/// Applies a strategic merge patch: lists merge by the keys that the schema knows.
pub fn strategic(at: At<'_>, target: &mut Value, patch: &Value) -> ApiResult<()> {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    match directive(patch)? {
        Some("replace") => {
            let mut whole = patch.clone();
            whole.shift_remove(DIRECTIVE);
            *target = Value::Object(whole);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        _ => {}
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let object = target.as_object_mut().expect("made an object above");
    for (name, value) in patch {
        if let Some(field) = name.strip_prefix(DELETE_PRIMITIVES) {
            let doomed = value.as_array().ok_or_else(|| unreadable(name, "a list"))?;
            if let Some(list) = object.get_mut(field).and_then(Value::as_array_mut) {
                list.retain(|item| !doomed.contains(item));
            }
        } else if name == RETAIN_KEYS {
            let keys = value.as_array().ok_or_else(|| unreadable(name, "a list"))?;
            object.retain(|key, _| keys.iter().any(|k| k == key));
        } else if name == DIRECTIVE || name.starts_with(SET_ORDER) {
            continue;
        } else {
            member(at.field(name), object, name, value)?;
        }
    }
    for (name, order) in patch {
        if let Some(field) = name.strip_prefix(SET_ORDER) {
            let order = order.as_array().ok_or_else(|| unreadable(name, "a list"))?;
            if let Some(list) = object.get_mut(field).and_then(Value::as_array_mut) {
                reorder(at.field(field), list, order);
            }
        }
    }
    Ok(())
}

fn member(at: At<'_>, object: &mut Map<String, Value>, name: &str, value: &Value) -> ApiResult<()> {
    match (value, at.list_kind()) {
        (Value::Null, _) => {
            object.shift_remove(name);
        }
        (Value::Array(patch), ListKind::Map(keys)) if !keys.is_empty() => {
            let list = object.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            merge_list(at.item(), list, patch, &keys[0], name)?;
        }
        (Value::Array(patch), ListKind::Set) => {
            let list = object.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            let list = list.as_array_mut().ok_or_else(|| unreadable(name, "a list"))?;
            for item in patch {
                if !list.contains(item) {
                    list.push(item.clone());
                }
            }
        }
        (Value::Object(_), _) => {
            let entry = object.entry(name).or_insert(Value::Null);
            strategic(at, entry, value)?;
            let deleted = value.get(DIRECTIVE).and_then(Value::as_str) == Some("delete");
            if deleted {
                object.shift_remove(name);
            }
        }
        _ => {
            object.insert(name.to_owned(), value.clone());
        }
    }
    Ok(())
}

fn merge_list(item: At<'_>, list: &mut Value, patch: &[Value], key: &str, name: &str) -> ApiResult<()> {
    if list.is_null() {
        *list = Value::Array(Vec::new());
    }
    let list = list.as_array_mut().ok_or_else(|| unreadable(name, "a list"))?;
    let replace = patch.iter().any(|p| p.get(DIRECTIVE).and_then(Value::as_str) == Some("replace"));
    if replace {
        *list = patch.iter().filter(|p| p.get(DIRECTIVE).is_none()).cloned().collect();
        return Ok(());
    }
    for change in patch {
        let fields = change.as_object().ok_or_else(|| unreadable(name, "a list of objects"))?;
        let wanted = fields.get(key).ok_or_else(|| {
            ApiError::bad_request(format!("map: {change} does not contain declared merge key: {key}"))
        })?;
        if directive(fields)? == Some("delete") {
            list.retain(|present| present.get(key) != Some(wanted));
            continue;
        }
        match list.iter_mut().find(|present| present.get(key) == Some(wanted)) {
            Some(present) => strategic(item, present, change)?,
            None => {
                // Through the merge, so that directives inside do not stay.
                let mut new = Value::Object(Map::new());
                strategic(item, &mut new, change)?;
                list.push(new);
            }
        }
    }
    Ok(())
}

/// Sorts what the order names into that order; what it does not name keeps its place among its neighbours.
fn reorder(at: At<'_>, list: &mut [Value], order: &[Value]) {
    let key = match at.list_kind() {
        ListKind::Map(keys) => keys.first(),
        _ => None,
    };
    let rank = |item: &Value| {
        let part = |value: &Value| key.map_or_else(|| Some(value.clone()), |k| value.get(k).cloned());
        let item = part(item)?;
        order.iter().position(|o| part(o).as_ref() == Some(&item))
    };
    let mut ordered: Vec<Value> = list.iter().filter(|item| rank(item).is_some()).cloned().collect();
    ordered.sort_by_key(|item| rank(item));
    let mut next = ordered.into_iter();
    for slot in list.iter_mut().filter(|item| rank(item).is_some()) {
        if let Some(item) = next.next() {
            *slot = item;
        }
    }
}

fn directive(patch: &Map<String, Value>) -> ApiResult<Option<&str>> {
    match patch.get(DIRECTIVE) {
        None => Ok(None),
        Some(Value::String(text)) if ["replace", "merge", "delete"].contains(&text.as_str()) => {
            Ok(Some(text.as_str()))
        }
        Some(other) => Err(ApiError::bad_request(format!(
            "unknown patch directive {other}: use replace, merge or delete"
        ))),
    }
}

fn unreadable(name: &str, expected: &str) -> ApiError {
    ApiError::bad_request(format!("the patch of {name:?} must be {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::Registry;
    use proptest::prelude::*;
    use serde_json::json;

    fn patched(plural: &str, mut object: Value, patch: Value) -> Value {
        let registry = Registry::builtin();
        let resource = registry.iter().find(|r| r.plural == plural).expect(plural).clone();
        strategic(resource.schema.at(), &mut object, &patch).expect("a good patch");
        object
    }

    #[test]
    fn a_json_patch_cannot_grow_without_bound() {
        let doubling = |n: u32| json!({ "op": "copy", "from": "", "path": format!("/{n}") });
        let patch =
            |operations: Vec<Value>| serde_json::from_value::<Patch>(json!(operations)).expect("a patch");
        let object = json!({ "data": { "key": "value" } });
        let error = json_patched(&object, &patch((0..60).map(doubling).collect())).expect_err("too large");
        assert_eq!(error.code(), 413);
        let deep = json!({ "op": "add", "path": "/a".repeat(129), "value": 1 });
        assert_eq!(json_patched(&object, &patch(vec![deep])).expect_err("too deep").code(), 400);
        let missing = json!({ "op": "test", "path": "/data/key", "value": "other" });
        assert_eq!(json_patched(&object, &patch(vec![missing])).expect_err("not equal").code(), 422);
    }

    #[test]
    fn lists_merge_by_their_key() {
        let service = json!({"spec": {"ports": [{"port": 80, "name": "a"}, {"port": 81, "name": "b"}]}});
        let patch = json!({"spec": {
            "$setElementOrder/ports": [{"port": 82}, {"port": 80}],
            "ports": [{"port": 80, "name": "c"}, {"$patch": "delete", "port": 81}, {"port": 82}],
        }});
        let ports = json!([{"port": 82}, {"port": 80, "name": "c"}]);
        assert_eq!(patched("services", service, patch)["spec"]["ports"], ports);
    }

    #[test]
    fn sets_gain_and_lose_single_values() {
        let object = json!({"metadata": {"finalizers": ["a/a", "b/b"]}});
        let patch = json!({"metadata": {
            "$deleteFromPrimitiveList/finalizers": ["a/a"], "finalizers": ["c/c", "b/b"],
        }});
        assert_eq!(patched("pods", object, patch)["metadata"]["finalizers"], json!(["b/b", "c/c"]));
    }

    #[test]
    fn directives_replace_and_retain() {
        let deployment =
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        assert_eq!(
            patched("deployments", deployment, patch)["spec"]["strategy"],
            json!({"type": "Recreate"})
        );
        let map = json!({"data": {"a": "1", "b": "2"}});
        let patch = json!({"data": {"$patch": "replace", "c": "3"}});
        assert_eq!(patched("configmaps", map, patch)["data"], json!({"c": "3"}));
    }

    fn json_values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[a-c]", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_patch_panics(mut object in json_values(), patch in json_values()) {
            let registry = Registry::builtin();
            let pods = registry.any_version("", "pods").expect("pods").clone();
            let _ = strategic(pods.schema.at(), &mut object, &patch);
        }
    }
}
