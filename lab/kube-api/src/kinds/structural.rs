//! What a schema must be for the server to prune, default and merge by it: structural.
//!
//! <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>

use serde_json::{Map, Value};

use crate::schema::Schema;
use crate::status::Cause;

/// What the schema of a custom resource's version breaks, found at `path`.
pub(super) fn check(schema: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    if schema["type"] != "object" {
        causes.push(Cause::invalid(format!("{path}.type"), &schema["type"], "must be object at the root"));
    }
    for flag in ["nullable", "x-kubernetes-embedded-resource"] {
        if schema[flag] == true {
            causes.push(Cause::forbidden(format!("{path}.{flag}"), "must not be true at the root"));
        }
    }
    for field in schema["properties"]["metadata"].as_object().into_iter().flat_map(Map::keys) {
        if !["type", "description", "properties"].contains(&field.as_str()) {
            let field = format!("{path}.properties[metadata].{field}");
            causes.push(Cause::forbidden(field, "only the name of a resource may be restricted"));
        }
    }
    place(schema, path, &mut causes);
    causes
}

/// What no schema of a custom resource may say.
const NOWHERE: [&str; 10] = [
    "$ref",
    "definitions",
    "dependencies",
    "deprecated",
    "discriminator",
    "id",
    "patternProperties",
    "readOnly",
    "writeOnly",
    "xml",
];
const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];
const JUNCTIONS: [&str; 3] = ["allOf", "anyOf", "oneOf"];
/// What only the structure itself may say, and no part of a junction.
const OUTSIDE_OF_JUNCTIONS: [&str; 9] = [
    "type",
    "title",
    "description",
    "default",
    "nullable",
    "additionalProperties",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-embedded-resource",
    "x-kubernetes-int-or-string",
];

fn place(schema: &Value, path: &str, causes: &mut Vec<Cause>) {
    let field = |name: &str| format!("{path}.{name}");
    for name in NOWHERE.iter().filter(|name| schema.get(**name).is_some()) {
        causes.push(Cause::forbidden(field(name), &format!("{name} is not supported")));
    }
    if schema["uniqueItems"] == true {
        causes.push(Cause::forbidden(field("uniqueItems"), "uniqueItems cannot be set to true"));
    }
    kind(schema, path, causes);
    list(schema, path, causes);
    if let Some(default) = schema.get("default") {
        causes.extend(misfit(schema, default).map(|why| Cause::invalid(field("default"), default, &why)));
    }
    if schema["additionalProperties"] == false {
        causes.push(Cause::forbidden(field("additionalProperties"), "must not be false"));
    }
    if schema.get("properties").is_some() && schema.get("additionalProperties").is_some() {
        let why = "additionalProperties and properties are mutually exclusive";
        causes.push(Cause::forbidden(field("additionalProperties"), why));
    }
    if !is_int_or_string(schema) {
        for part in parts(schema) {
            junction(part, schema, path, causes);
        }
    }
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        place(inner, &format!("{path}.properties[{name}]"), causes);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            place(&schema[inner], &field(inner), causes);
        }
    }
}

/// Every place has a type, or says that it takes a number or a text, or anything.
fn kind(schema: &Value, path: &str, causes: &mut Vec<Cause>) {
    let field = format!("{path}.type");
    let either = schema["x-kubernetes-int-or-string"] == true;
    match &schema["type"] {
        Value::Null if either || schema["x-kubernetes-preserve-unknown-fields"] == true => {}
        Value::Null => causes.push(Cause::required(field, "must not be empty for specified places")),
        given if either => {
            causes.push(Cause::invalid(field, given, "must be empty if x-kubernetes-int-or-string is true"));
        }
        given if given.as_str().is_some_and(|name| TYPES.contains(&name)) => {}
        given => causes.push(Cause::unsupported(field, given, &TYPES)),
    }
    if schema["type"] == "array" && !schema["items"].is_object() {
        causes.push(Cause::required(format!("{path}.items"), "must be one schema"));
    }
}

/// How the items of a list are told apart must be found in all of them.
fn list(schema: &Value, path: &str, causes: &mut Vec<Cause>) {
    let field = format!("{path}.x-kubernetes-list-type");
    let given = &schema["x-kubernetes-list-type"];
    let keys: Vec<&str> = texts(&schema["x-kubernetes-list-map-keys"]).collect();
    if !given.is_null() && schema["type"] != "array" {
        causes.push(Cause::invalid(
            field.clone(),
            given,
            "must be array if x-kubernetes-list-type is specified",
        ));
    }
    let items = &schema["items"];
    match given.as_str() {
        Some("map") => {
            if keys.is_empty() {
                let keys = format!("{path}.x-kubernetes-list-map-keys");
                causes.push(Cause::required(keys, "must not be empty if x-kubernetes-list-type is map"));
            }
            for key in keys {
                let property = &items["properties"][key];
                let is_given = texts(&items["required"]).any(|name| name == key);
                let scalar =
                    property["type"].as_str().is_some_and(|kind| !["object", "array"].contains(&kind));
                if !scalar || property["nullable"] == true || !(is_given || property.get("default").is_some())
                {
                    let rule =
                        format!("{key} must be a scalar property of the items, required or with a default");
                    causes.push(Cause::invalid(field.clone(), given, &rule));
                }
            }
        }
        Some("set") => {
            let whole =
                ["x-kubernetes-map-type", "x-kubernetes-list-type"].map(|kind| items[kind] == "atomic");
            if ["object", "array"].contains(&items["type"].as_str().unwrap_or_default())
                && whole == [false; 2]
            {
                causes.push(Cause::invalid(field, given, "the items of a set must be scalars or atomic"));
            }
        }
        Some("atomic") | None => {
            if !keys.is_empty() {
                let keys = format!("{path}.x-kubernetes-list-map-keys");
                causes.push(Cause::forbidden(keys, "only with x-kubernetes-list-type map"));
            }
        }
        Some(_) => causes.push(Cause::unsupported(field, given, &["atomic", "set", "map"])),
    }
}

/// What is wrong with a default: it must be valid, and nothing of it may be pruned.
fn misfit(schema: &Value, default: &Value) -> Option<String> {
    let findings = match Schema::of_part(schema) {
        Ok(part) => part.admit(&mut default.clone()),
        Err(why) => return Some(why),
    };
    let wrong = findings.mismatches.first().map(|wrong| format!("{} must be {}", wrong.path, wrong.expected));
    let broken = findings.causes.first().map(|cause| format!("{}: {}", cause.field, cause.message));
    let unknown = findings.unknown.first().map(|field| format!("{field} is not specified"));
    wrong.or(broken).or(unknown)
}

/// A part of a junction says something about values, of nothing that the structure does not have.
fn junction(part: &Value, structure: &Value, path: &str, causes: &mut Vec<Cause>) {
    for name in OUTSIDE_OF_JUNCTIONS.iter().filter(|name| part.get(**name).is_some()) {
        let why = format!("must not be in an allOf, anyOf, oneOf or not: {name}");
        causes.push(Cause::forbidden(format!("{path}.{name}"), &why));
    }
    for (name, inner) in part["properties"].as_object().into_iter().flatten() {
        match structure["properties"].get(name) {
            Some(of) => junction(inner, of, &format!("{path}.properties[{name}]"), causes),
            None => {
                let why = "because it is defined in a junction";
                causes.push(Cause::required(format!("{path}.properties[{name}]"), why));
            }
        }
    }
    if let Some(items) = part.get("items") {
        junction(items, &structure["items"], &format!("{path}.items"), causes);
    }
    for inner in parts(part) {
        junction(inner, structure, path, causes);
    }
}

fn parts(schema: &Value) -> impl Iterator<Item = &Value> {
    let several = JUNCTIONS.into_iter().filter_map(|name| schema[name].as_array()).flatten();
    several.chain(schema.get("not"))
}

/// The one junction that may name types, as generators write it.
fn is_int_or_string(schema: &Value) -> bool {
    let types = |junction: &Value| {
        junction.as_array().is_some_and(|parts| {
            parts.iter().map(|part| part["type"].as_str()).eq([Some("integer"), Some("string")])
        })
    };
    schema["x-kubernetes-int-or-string"] == true && types(&schema["anyOf"])
}

fn texts(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn broken(schema: Value) -> Vec<String> {
        check(&schema, "s").into_iter().map(|cause| cause.field).collect()
    }

    #[test]
    fn a_schema_that_says_all_there_is_to_say_is_taken() {
        let fine = json!({"type": "object", "properties": {
            "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}}},
            "spec": {"type": "object", "required": ["a"], "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
                "properties": {
                    "a": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                    "b": {"type": "object", "default": {"c": "d"}, "properties": {"c": {"type": "string"}}},
                    "e": {"x-kubernetes-preserve-unknown-fields": true},
                    "f": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
                        "items": {"type": "object", "required": ["k"], "properties": {"k": {"type": "string"}}}},
                }},
        }});
        assert_eq!(broken(fine), [""; 0]);
    }

    #[test]
    fn what_the_real_server_refuses_is_refused() {
        let one = |inner: Value| broken(json!({"type": "object", "properties": {"a": inner}}));
        let at = |field: &str| vec![format!("s.properties[a].{field}")];
        assert_eq!(broken(json!({"type": "string"})), ["s.type"]);
        assert_eq!(one(json!({})), at("type"));
        assert_eq!(one(json!({"type": ["string", "null"]})), at("type"));
        assert_eq!(one(json!({"type": "array"})), at("items"));
        assert_eq!(one(json!({"type": "object", "$ref": "#/x"})), at("$ref"));
        assert_eq!(
            one(json!({"type": "array", "items": {"type": "string"}, "uniqueItems": true})),
            at("uniqueItems")
        );
        let both = json!({"type": "object", "properties": {}, "additionalProperties": {"type": "string"}});
        assert_eq!(one(both), at("additionalProperties"));
        assert_eq!(one(json!({"type": "string", "default": 1})), at("default"));
        let pruned = json!({"type": "object", "default": {"b": 1}, "properties": {"c": {"type": "integer"}}});
        assert_eq!(one(pruned), at("default"));
        assert_eq!(one(json!({"type": "string", "anyOf": [{"type": "string"}]})), at("type"));
        assert_eq!(
            one(json!({"type": "object", "anyOf": [{"properties": {"b": {"minLength": 1}}}]})),
            at("properties[b]")
        );
        let keyless = json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "properties": {"k": {"type": "string"}}}});
        assert_eq!(one(keyless), at("x-kubernetes-list-type"), "the key may be missing");
    }
}
