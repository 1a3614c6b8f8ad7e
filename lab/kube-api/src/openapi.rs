//! OpenAPI documents, by which `kubectl` validates, explains and merges: version 3 per group and version, and
//! version 2 as a whole, which older ones read, as protobuf.

mod v2;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Map, Value, json};

use crate::api::{Answer, Payload};
use crate::resource::{Registry, Resource, group_version};
use crate::schema::builtin;

const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// `/openapi/v3`: where the documents are. Their addresses change when they do, so clients may keep them.
pub(crate) fn v3_index(registry: &Registry) -> Value {
    let mut hashers: BTreeMap<(&str, &str), DefaultHasher> = BTreeMap::new();
    for resource in registry.iter() {
        let hasher = hashers.entry((&resource.group, &resource.version)).or_default();
        (&resource.plural, resource.custom_schema.as_ref().map(Value::to_string)).hash(hasher);
    }
    let paths: Map<String, Value> = hashers
        .into_iter()
        .map(|((group, version), hasher)| {
            let path = format!(
                "{}/{}",
                if group.is_empty() { "api" } else { "apis" },
                group_version(group, version)
            );
            let url = format!("/openapi/v3/{path}?hash={:016X}", hasher.finish());
            (path, json!({ "serverRelativeURL": url }))
        })
        .collect();
    json!({ "paths": paths })
}

/// `/openapi/v3/apis/group/version`.
pub(crate) fn v3(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    let resources: Vec<&Resource> =
        registry.iter().map(|r| &**r).filter(|r| r.group == group && r.version == version).collect();
    if resources.is_empty() {
        return None;
    }
    let schemas = definitions(&resources, "#/components/schemas/");
    let paths: Map<String, Value> = resources.iter().map(|r| (path(r), v3_path(r))).collect();
    Some(json!({
        "openapi": "3.0.0",
        "info": { "title": "Kubernetes", "version": "unversioned" },
        "paths": paths,
        "components": { "schemas": schemas },
    }))
}

/// `/openapi/v2`.
pub(crate) fn v2(registry: &Registry, protobuf: bool) -> Answer {
    let resources: Vec<&Resource> = registry.iter().map(|r| &**r).collect();
    let definitions = definitions(&resources, "#/definitions/");
    if protobuf {
        let document = v2::document(&definitions, &resources);
        return Answer::new(StatusCode::OK, Payload::Typed(Bytes::from(document), PROTOBUF));
    }
    Answer::ok(json!({
        "swagger": "2.0",
        "info": { "title": "Kubernetes", "version": "unversioned" },
        "paths": {},
        "definitions": definitions,
    }))
}

/// Parameters that every write takes; `kubectl` looks them up to learn what the server can do.
const WRITE_PARAMETERS: [&str; 5] = ["dryRun", "fieldManager", "fieldValidation", "force", "pretty"];

fn v3_path(resource: &Resource) -> Value {
    let content = json!({ "schema": { "$ref": format!("#/components/schemas/{}", resource.definition) } });
    let gvk = kind_of(resource);
    let parameters: Vec<Value> = WRITE_PARAMETERS
        .into_iter()
        .map(|name| json!({ "name": name, "in": "query", "schema": { "type": "string", "uniqueItems": true } }))
        .collect();
    let answer = json!({ "200": { "description": "OK", "content": { "application/json": content } } });
    let mut patch_types =
        vec!["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"];
    if !resource.custom {
        patch_types.push("application/strategic-merge-patch+json");
    }
    let patches: Map<String, Value> = patch_types
        .into_iter()
        .map(|media| (media.to_owned(), json!({ "schema": { "type": "object" } })))
        .collect();
    let operation = |action: &str, body: Value| {
        let mut operation = json!({
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk,
            "parameters": parameters,
            "responses": answer,
        });
        if !body.is_null() {
            operation["requestBody"] = json!({ "content": body });
        }
        operation
    };
    let body = || json!({ "application/json": content });
    json!({
        "get": operation("get", Value::Null),
        "put": operation("put", body()),
        "patch": operation("patch", Value::Object(patches)),
        "delete": operation("delete", Value::Null),
    })
}

/// The path of one object.
fn path(resource: &Resource) -> String {
    let root = if resource.group.is_empty() { "api" } else { "apis" };
    let namespace = if resource.namespaced { "/namespaces/{namespace}" } else { "" };
    format!("/{root}/{}{namespace}/{}/{{name}}", resource.api_version(), resource.plural)
}

fn kind_of(resource: &Resource) -> Value {
    json!({ "group": resource.group, "version": resource.version, "kind": resource.kind })
}

/// The schemas of these resources and of all that they refer to.
fn definitions(resources: &[&Resource], prefix: &str) -> Map<String, Value> {
    let mut result = Map::new();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for resource in resources {
        let mut schema = match &resource.custom_schema {
            Some(schema) => {
                let mut schema = schema.clone();
                schema["properties"]["apiVersion"] = json!({ "type": "string" });
                schema["properties"]["kind"] = json!({ "type": "string" });
                schema["properties"]["metadata"] = json!({ "$ref": builtin::OBJECT_META });
                schema
            }
            None => builtin_definition(&resource.definition),
        };
        refer(&mut schema, prefix, &mut wanted);
        schema["x-kubernetes-group-version-kind"] = json!([kind_of(resource)]);
        result.insert(resource.definition.clone(), schema);
    }
    while let Some(name) = wanted.pop_first() {
        if !result.contains_key(&name) {
            let mut schema = builtin_definition(&name);
            refer(&mut schema, prefix, &mut wanted);
            result.insert(name, schema);
        }
    }
    result
}

/// A built-in type with what the tables know about its lists.
fn builtin_definition(name: &str) -> Value {
    let mut schema = builtin::definitions().get(name).cloned().unwrap_or_else(|| json!({ "type": "object" }));
    for (field, keys) in builtin::merging_lists(name) {
        let Some(list) = schema["properties"].get_mut(field) else { continue };
        list["x-kubernetes-patch-strategy"] = json!("merge");
        match keys {
            [] => list["x-kubernetes-list-type"] = json!("set"),
            keys => {
                list["x-kubernetes-patch-merge-key"] = json!(keys[0]);
                list["x-kubernetes-list-type"] = json!("map");
                list["x-kubernetes-list-map-keys"] = json!(keys);
            }
        }
    }
    schema
}

/// Points references to where this document keeps its schemas, and notes what they point to. What OpenAPI
/// has no word for is said in its own way: an int-or-string is a string with that format.
fn refer(schema: &mut Value, prefix: &str, wanted: &mut BTreeSet<String>) {
    match schema {
        Value::Object(object) => {
            if let Some(name) = object.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next())
            {
                let name = name.to_owned();
                *schema = json!({ "$ref": format!("{prefix}{name}") });
                wanted.insert(name);
                return;
            }
            if object.get("x-kubernetes-int-or-string") == Some(&json!(true)) && !object.contains_key("type")
            {
                object.insert("type".into(), json!("string"));
                object.insert("format".into(), json!("int-or-string"));
            }
            for value in object.values_mut() {
                refer(value, prefix, wanted);
            }
        }
        Value::Array(items) => {
            for item in items {
                refer(item, prefix, wanted);
            }
        }
        _ => {}
    }
}
