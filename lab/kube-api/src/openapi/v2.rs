//! OpenAPI version 2 in protobuf. `kubectl` before 1.27 accepts nothing else.
//!
//! The messages are those of `OpenAPIv2.proto` of the gnostic project, without the fields that nobody reads.

use prost::Message;
use serde_json::{Map, Value, json};

use super::{WRITE_PARAMETERS, kind_of, path};
use crate::resource::Resource;

/// The document of these schemas, with the PATCH operations of these resources.
pub(super) fn document(definitions: &Map<String, Value>, resources: &[&Resource]) -> Vec<u8> {
    let document = Document {
        swagger: "2.0".into(),
        info: Some(Info { title: "Kubernetes".into(), version: "unversioned".into() }),
        paths: Some(Paths { path: resources.iter().map(|resource| patch_path(resource)).collect() }),
        definitions: Some(schemas(definitions)),
    };
    document.encode_to_vec()
}

fn patch_path(resource: &Resource) -> NamedPathItem {
    let parameters = WRITE_PARAMETERS
        .iter()
        .map(|name| ParametersItem {
            parameter: Some(Parameter {
                non_body: Some(NonBodyParameter {
                    query: Some(QueryParameter {
                        location: "query".into(),
                        name: (*name).into(),
                        kind: "string".into(),
                    }),
                }),
            }),
        })
        .collect();
    let operation = Operation {
        parameters,
        extensions: vec![extension("x-kubernetes-group-version-kind", &kind_of(resource))],
    };
    NamedPathItem { name: path(resource), value: Some(PathItem { patch: Some(operation) }) }
}

fn schemas(map: &Map<String, Value>) -> NamedSchemas {
    let properties =
        map.iter().map(|(name, value)| NamedSchema { name: name.clone(), value: Some(schema(value)) });
    NamedSchemas { properties: properties.collect() }
}

fn schema(value: &Value) -> Schema {
    let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
    let any = value["x-kubernetes-preserve-unknown-fields"] == true;
    let kind = text("type");
    let extensions = value.as_object().into_iter().flatten().filter(|(name, _)| name.starts_with("x-"));
    Schema {
        reference: text("$ref"),
        format: text("format"),
        description: text("description"),
        required: value["required"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        additional: match &value["additionalProperties"] {
            Value::Object(_) => {
                Some(AdditionalProperties { schema: Some(Box::new(schema(&value["additionalProperties"]))) })
            }
            _ => None,
        },
        // Without a type anything goes.
        kind: (!kind.is_empty() && !any).then(|| Types { value: vec![kind] }),
        items: value.get("items").map(|items| Items { schema: vec![schema(items)] }),
        properties: value["properties"].as_object().filter(|_| !any).map(schemas),
        extensions: extensions.map(|(name, value)| extension(name, value)).collect(),
    }
}

/// Extensions hold YAML, and JSON is YAML.
fn extension(name: &str, value: &Value) -> NamedAny {
    NamedAny { name: name.to_owned(), value: Some(Any { yaml: json!(value).to_string() }) }
}

#[derive(Clone, PartialEq, Message)]
struct Document {
    #[prost(string, tag = "1")]
    swagger: String,
    #[prost(message, tag = "2")]
    info: Option<Info>,
    #[prost(message, tag = "8")]
    paths: Option<Paths>,
    #[prost(message, tag = "9")]
    definitions: Option<NamedSchemas>,
}

#[derive(Clone, PartialEq, Message)]
struct Info {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Paths {
    #[prost(message, repeated, tag = "2")]
    path: Vec<NamedPathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedPathItem {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, tag = "2")]
    value: Option<PathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct PathItem {
    #[prost(message, tag = "8")]
    patch: Option<Operation>,
}

#[derive(Clone, PartialEq, Message)]
struct Operation {
    #[prost(message, repeated, tag = "8")]
    parameters: Vec<ParametersItem>,
    #[prost(message, repeated, tag = "13")]
    extensions: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct ParametersItem {
    #[prost(message, tag = "1")]
    parameter: Option<Parameter>,
}

#[derive(Clone, PartialEq, Message)]
struct Parameter {
    #[prost(message, tag = "2")]
    non_body: Option<NonBodyParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct NonBodyParameter {
    #[prost(message, tag = "3")]
    query: Option<QueryParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct QueryParameter {
    #[prost(string, tag = "2")]
    location: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "6")]
    kind: String,
}

#[derive(Clone, PartialEq, Message)]
struct NamedSchemas {
    #[prost(message, repeated, tag = "1")]
    properties: Vec<NamedSchema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedSchema {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, tag = "2")]
    value: Option<Schema>,
}

#[derive(Clone, PartialEq, Message)]
struct Schema {
    #[prost(string, tag = "1")]
    reference: String,
    #[prost(string, tag = "2")]
    format: String,
    #[prost(string, tag = "4")]
    description: String,
    #[prost(string, repeated, tag = "19")]
    required: Vec<String>,
    #[prost(message, tag = "21")]
    additional: Option<AdditionalProperties>,
    #[prost(message, tag = "22")]
    kind: Option<Types>,
    #[prost(message, tag = "23")]
    items: Option<Items>,
    #[prost(message, tag = "25")]
    properties: Option<NamedSchemas>,
    #[prost(message, repeated, tag = "31")]
    extensions: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct AdditionalProperties {
    #[prost(message, tag = "1")]
    schema: Option<Box<Schema>>,
}

#[derive(Clone, PartialEq, Message)]
struct Types {
    #[prost(string, repeated, tag = "1")]
    value: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Items {
    #[prost(message, repeated, tag = "1")]
    schema: Vec<Schema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedAny {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, tag = "2")]
    value: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "2")]
    yaml: String,
}
