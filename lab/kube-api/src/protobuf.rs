//! Kubernetes protobuf, as far as requests need it: `kubectl create` and other users of Go's typed clients send
//! built-in objects in it. Answers are JSON, which those clients accept.
//!
//! A body is the four bytes `k8s\0` and a `runtime.Unknown` message, which says the object's kind and holds
//! the object. What a field is, the schema knows; only the numbers of the fields need a table, `fields.txt`.

use std::collections::HashMap;
use std::sync::LazyLock;

use base64::Engine as _;
use chrono::{DateTime, SecondsFormat};
use prost::bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint};
use serde_json::{Map, Value, json};

use crate::schema::{At, Scalar, Shape, builtin};

/// `Content-Type` of such a body.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

const MAGIC: &[u8] = b"k8s\0";

/// Objects are not nested deeper than this.
const MAX_DEPTH: usize = 64;

/// Pointers in Go: where they are set to zero or false, that is what was meant. Elsewhere zero means absent.
const MEANINGFUL_ZEROS: &[&str] = &[
    "allowPrivilegeEscalation",
    "allocateLoadBalancerNodePorts",
    "automountServiceAccountToken",
    "blockOwnerDeletion",
    "controller",
    "defaultMode",
    "deletionGracePeriodSeconds",
    "enableServiceLinks",
    "gracePeriodSeconds",
    "hostUsers",
    "immutable",
    "intVal",
    "leaseTransitions",
    "mode",
    "optional",
    "orphanDependents",
    "partition",
    "port",
    "priority",
    "privileged",
    "progressDeadlineSeconds",
    "readOnlyRootFilesystem",
    "ready",
    "replicas",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "serving",
    "terminating",
    "terminationGracePeriodSeconds",
    "tolerationSeconds",
    "value",
];

/// The object in a protobuf body, as JSON. Errors are sentences.
pub fn decode(body: &[u8]) -> Result<Value, String> {
    let unknown = body.strip_prefix(MAGIC).ok_or("the body does not begin as Kubernetes protobuf does")?;
    let (mut kind, mut api_version, mut raw) = (String::new(), String::new(), &[][..]);
    for field in Fields(unknown) {
        match field? {
            (1, Wire::Bytes(type_meta)) => {
                for field in Fields(type_meta) {
                    match field? {
                        (1, Wire::Bytes(bytes)) => api_version = text(bytes)?,
                        (2, Wire::Bytes(bytes)) => kind = text(bytes)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let schema = builtin::schema_of(&api_version, &kind)
        .ok_or_else(|| format!("{kind:?} of {api_version:?} cannot be read from protobuf here: send JSON"))?;
    let mut object = message(schema.at(), raw, 0)?;
    object["kind"] = json!(kind);
    object["apiVersion"] = json!(api_version);
    Ok(object)
}

fn message(at: At<'_>, bytes: &[u8], depth: usize) -> Result<Value, String> {
    let mut object = Map::new();
    fill(at, at.type_name(), bytes, depth, &mut object)?;
    Ok(Value::Object(object))
}

/// Reads a message of the type `name` into `object`, whose schema is `at`. The two differ for messages that
/// are embedded in others.
fn fill(
    at: At<'_>,
    name: &str,
    bytes: &[u8],
    depth: usize,
    object: &mut Map<String, Value>,
) -> Result<(), String> {
    if depth > MAX_DEPTH {
        return Err(format!("the object is nested deeper than {MAX_DEPTH} levels"));
    }
    let Some(numbers) = NUMBERS.get(name) else { return Ok(()) };
    for field in Fields(bytes) {
        let (number, wire) = field?;
        let Some(target) = numbers.get(&number) else { continue };
        let field = match target {
            Target::Field(field) => *field,
            Target::Embedded(name) => {
                if let Wire::Bytes(bytes) = wire {
                    fill(at, name, bytes, depth + 1, object)?;
                }
                continue;
            }
        };
        let here = at.field(field);
        match &here.node().shape {
            Shape::List { .. } => {
                let list = object.entry(field).or_insert_with(|| json!([]));
                let item = value(here.item(), &wire, depth)?.ok_or_else(|| misfit(field))?;
                list.as_array_mut().ok_or_else(|| misfit(field))?.push(item);
            }
            Shape::Map(_) => {
                let Wire::Bytes(entry) = wire else { return Err(misfit(field)) };
                let (key, entry) = map_entry(here, entry, depth)?;
                object.entry(field).or_insert_with(|| json!({}))[key] = entry;
            }
            _ => {
                let found =
                    value(here, &wire, depth)?.filter(|v| !is_zero(v) || MEANINGFUL_ZEROS.contains(&field));
                if let Some(found) = found.filter(|found| found != "") {
                    object.insert(field.to_owned(), found);
                }
            }
        }
    }
    Ok(())
}

/// A single value; `None` for a time that is not set.
fn value(at: At<'_>, wire: &Wire<'_>, depth: usize) -> Result<Option<Value>, String> {
    let found = match (&at.node().shape, wire) {
        (Shape::Scalar(scalar), wire) => return scalar_value(*scalar, wire),
        (Shape::Struct { .. }, Wire::Bytes(bytes)) => message(at, bytes, depth + 1)?,
        // Raw JSON, in a message of one field.
        (Shape::Any, Wire::Bytes(bytes)) => match Fields(bytes).next().transpose()? {
            Some((1, Wire::Bytes(json))) => {
                serde_json::from_slice(json).map_err(|e| format!("embedded JSON is not readable: {e}"))?
            }
            _ => return Ok(None),
        },
        _ => return Err(misfit("a field")),
    };
    Ok(Some(found))
}

fn scalar_value(scalar: Scalar, wire: &Wire<'_>) -> Result<Option<Value>, String> {
    Ok(Some(match (scalar, wire) {
        (Scalar::String, Wire::Bytes(bytes)) => json!(text(bytes)?),
        (Scalar::Bytes, Wire::Bytes(bytes)) => json!(base64::engine::general_purpose::STANDARD.encode(bytes)),
        (Scalar::Boolean, Wire::Number(number)) => json!(*number != 0),
        // int32 and int64 alike: two's complement in 64 bits.
        (Scalar::Integer, Wire::Number(number)) => json!(number.cast_signed()),
        (Scalar::Number, Wire::Fixed(bits)) => json!(f64::from_bits(*bits)),
        (Scalar::Quantity, Wire::Bytes(bytes)) => match Fields(bytes).next().transpose()? {
            Some((1, Wire::Bytes(quantity))) => json!(text(quantity)?),
            _ => json!("0"),
        },
        (Scalar::IntOrString, Wire::Bytes(bytes)) => {
            let (mut is_text, mut number, mut string) = (false, 0, String::new());
            for field in Fields(bytes) {
                match field? {
                    (1, Wire::Number(kind)) => is_text = kind == 1,
                    (2, Wire::Number(value)) => number = value.cast_signed(),
                    (3, Wire::Bytes(bytes)) => string = text(bytes)?,
                    _ => {}
                }
            }
            if is_text { json!(string) } else { json!(number) }
        }
        (Scalar::Time | Scalar::MicroTime, Wire::Bytes(bytes)) => {
            if bytes.is_empty() {
                return Ok(None);
            }
            let (mut seconds, mut nanos) = (0, 0);
            for field in Fields(bytes) {
                match field? {
                    (1, Wire::Number(value)) => seconds = value.cast_signed(),
                    (2, Wire::Number(value)) => nanos = u32::try_from(value).unwrap_or(0),
                    _ => {}
                }
            }
            let time = DateTime::from_timestamp(seconds, nanos).ok_or("a time is out of range")?;
            let format = match scalar {
                Scalar::MicroTime => SecondsFormat::Micros,
                _ if nanos == 0 => SecondsFormat::Secs,
                _ => SecondsFormat::Micros,
            };
            json!(time.to_rfc3339_opts(format, true))
        }
        _ => return Err(misfit("a field")),
    }))
}

fn map_entry(map: At<'_>, entry: &[u8], depth: usize) -> Result<(String, Value), String> {
    let mut key = String::new();
    let mut found = None;
    for field in Fields(entry) {
        match field? {
            (1, Wire::Bytes(bytes)) => key = text(bytes)?,
            (2, wire) => found = value(map.field(""), &wire, depth)?,
            _ => {}
        }
    }
    Ok((key, found.unwrap_or_else(|| json!(""))))
}

fn is_zero(value: &Value) -> bool {
    *value == json!(0) || *value == json!(false)
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "a string is not UTF-8".to_owned())
}

fn misfit(field: &str) -> String {
    format!("{field} has another type in protobuf than the schema says")
}

/// The fields of a message, one after the other.
struct Fields<'b>(&'b [u8]);

enum Wire<'b> {
    Number(u64),
    Fixed(u64),
    Bytes(&'b [u8]),
}

impl<'b> Iterator for Fields<'b> {
    type Item = Result<(u32, Wire<'b>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.read();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'b> Fields<'b> {
    fn read(&mut self) -> Result<(u32, Wire<'b>), String> {
        let broken = |e: prost::DecodeError| format!("the protobuf is not readable: {e}");
        let short = || "the protobuf ends early".to_owned();
        let (number, wire) = decode_key(&mut self.0).map_err(broken)?;
        let wire = match wire {
            WireType::Varint => Wire::Number(decode_varint(&mut self.0).map_err(broken)?),
            WireType::LengthDelimited => {
                let length = decode_varint(&mut self.0).map_err(broken)?;
                let length = usize::try_from(length).map_err(|_| short())?;
                let (bytes, rest) = self.0.split_at_checked(length).ok_or_else(short)?;
                self.0 = rest;
                Wire::Bytes(bytes)
            }
            WireType::SixtyFourBit => Wire::Fixed(self.0.try_get_u64_le().map_err(|_| short())?),
            WireType::ThirtyTwoBit => Wire::Fixed(self.0.try_get_u32_le().map_err(|_| short())?.into()),
            WireType::StartGroup | WireType::EndGroup => {
                return Err("groups are not used by Kubernetes".into());
            }
        };
        Ok((number, wire))
    }
}

enum Target {
    Field(&'static str),
    /// A message whose fields are the parent's own in JSON, by its type's name.
    Embedded(String),
}

/// Type → field number → field.
static NUMBERS: LazyLock<HashMap<String, HashMap<u32, Target>>> = LazyLock::new(|| {
    let lines = include_str!("protobuf/fields.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, fields)| {
            let package = name.rsplit_once('.').map_or("", |(package, _)| package);
            let fields = fields.split(' ').filter_map(|field| field.split_once('='));
            let numbers = fields.filter_map(|(field, number)| {
                let target = match field.strip_prefix('+') {
                    Some(name) => Target::Embedded(format!("io.k8s.{package}.{name}")),
                    None => Target::Field(field),
                };
                Some((number.parse().ok()?, target))
            });
            (format!("io.k8s.{name}"), numbers.collect())
        })
        .collect()
});

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2, u8::try_from(content.len()).expect("short")];
        bytes.extend_from_slice(content);
        bytes
    }

    fn body(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let type_meta = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &type_meta), field(2, raw)].concat()
    }

    #[test]
    fn a_deployment_as_a_go_client_sends_it() {
        let metadata = field(1, &[field(1, b"web"), field(2, b""), field(8, b"")].concat());
        let port = [vec![24, 80], field(4, b"TCP")].concat();
        let container = [field(1, b"c"), field(2, b"nginx"), field(6, &port)].concat();
        let volume = [field(1, b"v"), field(2, &field(2, b""))].concat();
        let pod = [field(1, &volume), field(2, &container)].concat();
        let template = field(3, &field(2, &pod));
        let labels = field(1, &[field(1, b"app"), field(2, b"web")].concat());
        let spec = field(2, &[vec![8, 0], field(2, &labels), template, vec![40, 0]].concat());
        let decoded =
            decode(&body("apps/v1", "Deployment", &[metadata, spec].concat())).expect("a deployment");
        let expected = json!({
            "kind": "Deployment", "apiVersion": "apps/v1", "metadata": { "name": "web" },
            "spec": { "replicas": 0, "selector": { "matchLabels": { "app": "web" } }, "template": { "spec": {
                "volumes": [{ "name": "v", "emptyDir": {} }],
                "containers": [{ "name": "c", "image": "nginx", "ports": [{ "containerPort": 80, "protocol": "TCP" }] }],
            } } },
        });
        assert_eq!(decoded, expected);
    }

    #[test]
    fn the_table_names_fields_of_the_schema() {
        for (name, numbers) in NUMBERS.iter() {
            let Some(definition) = builtin::definitions().get(name) else { continue };
            for target in numbers.values() {
                let Target::Field(field) = target else { continue };
                assert!(definition["properties"].get(field).is_some(), "{name} has no field {field}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(raw in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = decode(&body("v1", "Pod", &raw));
            let _ = decode(&raw);
        }
    }
}
