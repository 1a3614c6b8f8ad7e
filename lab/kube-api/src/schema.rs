//! What objects look like: one arena of types, made from JSON schema.
//!
//! The built-in kinds take theirs from `k8s-openapi`, custom resources from their CRD, and from there on no
//! code knows the difference: decoding, defaulting, strategic merge patch, server-side apply and OpenAPI all
//! walk the same graph. What JSON schema does not say about the built-in kinds (merge keys, defaults) is in
//! the tables of [`builtin`].

mod admit;
pub mod builtin;

pub use admit::{Findings, Mismatch};

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};

/// A type and the arena it lives in. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Schema {
    types: Arc<Vec<Node>>,
    root: usize,
}

/// A place in a schema, to walk down from.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    types: &'a [Node],
    node: &'a Node,
}

/// One type.
#[derive(Debug, Default)]
pub(crate) struct Node {
    /// The full name of a built-in type.
    pub(crate) name: String,
    pub(crate) shape: Shape,
    /// Replaced as a whole by patches and owned as a whole by field managers.
    pub(crate) atomic: bool,
    pub(crate) nullable: bool,
    /// Of a custom resource, whose schema is all there is to say: nothing is filled in beyond it.
    pub(crate) strict: bool,
    pub(crate) default: Option<Value>,
    pub(crate) rules: Rules,
}

#[derive(Debug, Default)]
pub(crate) enum Shape {
    /// Nothing is known: maps merge, lists are replaced.
    #[default]
    Any,
    Scalar(Scalar),
    Struct {
        fields: HashMap<String, usize>,
        required: Vec<String>,
        /// `x-kubernetes-preserve-unknown-fields`.
        open: bool,
    },
    Map(usize),
    List {
        item: usize,
        kind: ListKind,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    String,
    Integer,
    Number,
    Boolean,
    IntOrString,
    /// A number is accepted and kept as a string, as Kubernetes does.
    Quantity,
    /// RFC 3339.
    Time,
    /// RFC 3339 with six digits behind the second, no more and no less.
    MicroTime,
    /// Base64.
    Bytes,
}

/// How the items of a list are told apart (`x-kubernetes-list-type`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ListKind {
    /// Not at all: the list is one value.
    #[default]
    Atomic,
    /// By their value.
    Set,
    /// By these fields. Strategic merge patch goes by the first.
    Map(Vec<String>),
}

/// Value rules that a CRD's schema may state.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    pub(crate) one_of: Vec<Value>,
    pub(crate) minimum: Option<f64>,
    pub(crate) maximum: Option<f64>,
    pub(crate) min_length: Option<usize>,
    pub(crate) max_length: Option<usize>,
    pub(crate) min_items: Option<usize>,
    pub(crate) max_items: Option<usize>,
    pub(crate) pattern: Option<regex::Regex>,
}

static ANY: Node = Node {
    name: String::new(),
    shape: Shape::Any,
    atomic: false,
    nullable: false,
    strict: false,
    default: None,
    rules: Rules {
        one_of: Vec::new(),
        minimum: None,
        maximum: None,
        min_length: None,
        max_length: None,
        min_items: None,
        max_items: None,
        pattern: None,
    },
};

impl Schema {
    /// The schema that knows nothing and allows everything.
    pub fn any() -> Self {
        Self { types: Arc::new(vec![Node::default()]), root: 0 }
    }

    /// The schema of a custom resource: `schema` is `openAPIV3Schema` of its CRD. Errors are sentences.
    pub fn of_custom_resource(schema: &Value) -> Result<Self, String> {
        let mut root = schema.clone();
        if root.get("type").and_then(Value::as_str) != Some("object") {
            return Err("must be object at the root".to_owned());
        }
        root["properties"]["apiVersion"] = serde_json::json!({ "type": "string" });
        root["properties"]["kind"] = serde_json::json!({ "type": "string" });
        root["properties"]["metadata"] = serde_json::json!({ "$ref": builtin::OBJECT_META });
        let mut builder = Builder::new(builtin::definitions(), true);
        let root = builder.node(&root, 0)?;
        Ok(Self { types: Arc::new(builder.nodes), root })
    }

    /// The schema of a part of a custom resource.
    pub(crate) fn of_part(schema: &Value) -> Result<Self, String> {
        let mut builder = Builder::new(builtin::definitions(), true);
        let root = builder.node(schema, 0)?;
        Ok(Self { types: Arc::new(builder.nodes), root })
    }

    /// The root of the walk.
    pub fn at(&self) -> At<'_> {
        At { types: &self.types, node: &self.types[self.root] }
    }
}

impl<'a> At<'a> {
    /// The field of a struct, or the value of a map, under this name.
    pub fn field(self, name: &str) -> At<'a> {
        let id = match &self.node.shape {
            Shape::Struct { fields, .. } => fields.get(name).copied(),
            Shape::Map(value) => Some(*value),
            _ => None,
        };
        self.go(id)
    }

    /// The items of a list.
    pub fn item(self) -> At<'a> {
        match &self.node.shape {
            Shape::List { item, .. } => self.go(Some(*item)),
            _ => self.go(None),
        }
    }

    /// How the items of this list are told apart.
    pub fn list_kind(self) -> &'a ListKind {
        match &self.node.shape {
            Shape::List { kind, .. } if !self.node.atomic => kind,
            _ => &ListKind::Atomic,
        }
    }

    /// Whether a map or struct is one value.
    pub fn is_atomic(self) -> bool {
        self.node.atomic
    }

    /// Whether the server knows the fields here, rather than arbitrary keys.
    pub fn is_struct(self) -> bool {
        matches!(self.node.shape, Shape::Struct { .. })
    }

    /// The default value, if absent.
    pub fn default_value(self) -> Option<&'a Value> {
        self.node.default.as_ref()
    }

    /// The value under which an item is known among the items of a list by `keys`: the keys with their
    /// values, defaults filled in. `None` if a key is missing.
    pub fn item_key(self, keys: &[String], item: &Value) -> Option<Map<String, Value>> {
        keys.iter()
            .map(|key| {
                let value = item.get(key).or_else(|| self.field(key).default_value())?;
                Some((key.clone(), value.clone()))
            })
            .collect()
    }

    /// The full name of a built-in type, for instance `io.k8s.api.core.v1.PodSpec`.
    pub fn type_name(self) -> &'a str {
        &self.node.name
    }

    pub(crate) fn node(self) -> &'a Node {
        self.node
    }

    fn go(self, id: Option<usize>) -> At<'a> {
        At { types: self.types, node: id.map_or(&ANY, |id| &self.types[id]) }
    }
}

/// Deeper schemas than this are refused rather than followed.
const MAX_DEPTH: usize = 128;

/// Turns JSON schema into nodes. References are resolved once each, so that recursive types are fine.
pub(crate) struct Builder<'d> {
    pub(crate) nodes: Vec<Node>,
    definitions: &'d Map<String, Value>,
    named: HashMap<String, usize>,
    /// A custom resource's schema says all there is to say; the built-in ones are completed by tables.
    custom: bool,
}

impl<'d> Builder<'d> {
    pub(crate) fn new(definitions: &'d Map<String, Value>, custom: bool) -> Self {
        Self { nodes: Vec::new(), definitions, named: HashMap::new(), custom }
    }

    pub(crate) fn finish(self, roots: Vec<usize>) -> Vec<Schema> {
        let types = Arc::new(self.nodes);
        roots.into_iter().map(|root| Schema { types: types.clone(), root }).collect()
    }

    /// The node of a schema.
    pub(crate) fn node(&mut self, schema: &Value, depth: usize) -> Result<usize, String> {
        if depth > MAX_DEPTH {
            return Err(format!("the schema is nested deeper than {MAX_DEPTH} levels"));
        }
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            return self.named(reference, depth);
        }
        let id = self.reserve();
        let node = self.build(schema, "", depth)?;
        self.nodes[id] = node;
        Ok(id)
    }

    fn named(&mut self, reference: &str, depth: usize) -> Result<usize, String> {
        let name = reference.rsplit('/').next().unwrap_or(reference);
        if let Some(&id) = self.named.get(name) {
            return Ok(id);
        }
        let Some(definition) = self.definitions.get(name) else {
            return Err(format!("$ref {reference:?} is not allowed in a structural schema"));
        };
        let id = self.reserve();
        self.named.insert(name.to_owned(), id);
        // What a built-in type refers to is built-in, also below a custom resource.
        let custom = std::mem::replace(&mut self.custom, false);
        let node = self.build(definition, name, depth);
        self.custom = custom;
        self.nodes[id] = node?;
        Ok(id)
    }

    fn reserve(&mut self) -> usize {
        self.nodes.push(Node::default());
        self.nodes.len() - 1
    }

    fn build(&mut self, schema: &Value, name: &str, depth: usize) -> Result<Node, String> {
        let flag = |key: &str| schema.get(key).and_then(Value::as_bool).unwrap_or(false);
        let kind = schema.get("type").and_then(Value::as_str);
        let format = schema.get("format").and_then(Value::as_str);
        let open = flag("x-kubernetes-preserve-unknown-fields");
        let shape = if name.ends_with(".JSON") {
            Shape::Any
        } else if name.ends_with(".Quantity") {
            Shape::Scalar(Scalar::Quantity)
        } else if name.ends_with(".MicroTime") {
            Shape::Scalar(Scalar::MicroTime)
        } else if flag("x-kubernetes-int-or-string") {
            Shape::Scalar(Scalar::IntOrString)
        } else {
            match (kind, format) {
                (Some("string"), Some("date-time")) => Shape::Scalar(Scalar::Time),
                (Some("string"), Some("byte")) => Shape::Scalar(Scalar::Bytes),
                (Some("string"), _) => Shape::Scalar(Scalar::String),
                (Some("integer"), _) => Shape::Scalar(Scalar::Integer),
                (Some("number"), _) => Shape::Scalar(Scalar::Number),
                (Some("boolean"), _) => Shape::Scalar(Scalar::Boolean),
                (Some("array"), _) => self.list(schema, depth)?,
                (Some("object"), _) => self.object(schema, name, open, depth)?,
                _ => Shape::Any,
            }
        };
        let atomic = schema.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic")
            || builtin::is_atomic(name);
        let number = |key: &str| schema.get(key).and_then(Value::as_f64);
        let size = |key: &str| schema.get(key).and_then(Value::as_u64).map(|n| n as usize);
        let pattern = match schema.get("pattern").and_then(Value::as_str) {
            Some(p) => Some(regex::Regex::new(p).map_err(|e| format!("pattern {p:?} cannot be read: {e}"))?),
            None => None,
        };
        Ok(Node {
            name: name.to_owned(),
            shape,
            atomic,
            nullable: flag("nullable"),
            strict: self.custom,
            default: schema.get("default").cloned(),
            rules: Rules {
                one_of: schema.get("enum").and_then(Value::as_array).cloned().unwrap_or_default(),
                minimum: number("minimum"),
                maximum: number("maximum"),
                min_length: size("minLength"),
                max_length: size("maxLength"),
                min_items: size("minItems"),
                max_items: size("maxItems"),
                pattern,
            },
        })
    }

    fn list(&mut self, schema: &Value, depth: usize) -> Result<Shape, String> {
        let item = match schema.get("items") {
            Some(items) => self.node(items, depth + 1)?,
            None => self.reserve(),
        };
        let kind = match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
            Some("set") => ListKind::Set,
            Some("map") => {
                let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
                let keys = keys.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
                ListKind::Map(keys)
            }
            _ => ListKind::Atomic,
        };
        Ok(Shape::List { item, kind })
    }

    fn object(&mut self, schema: &Value, name: &str, open: bool, depth: usize) -> Result<Shape, String> {
        if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
            let mut fields = HashMap::with_capacity(properties.len());
            for (field, schema) in properties {
                let mut id = self.node(schema, depth + 1)?;
                if let Some(facts) = builtin::facts(name, field) {
                    id = self.with_facts(id, facts)?;
                }
                fields.insert(field.clone(), id);
            }
            let required = schema.get("required").and_then(Value::as_array);
            let required =
                required.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
            return Ok(Shape::Struct { fields, required, open });
        }
        match schema.get("additionalProperties") {
            Some(Value::Object(values)) if !values.is_empty() => {
                Ok(Shape::Map(self.node(&Value::Object(values.clone()), depth + 1)?))
            }
            Some(Value::Bool(true) | Value::Object(_)) => Ok(Shape::Any),
            _ if open || !self.custom => Ok(Shape::Any),
            _ => Ok(Shape::Struct { fields: HashMap::new(), required: Vec::new(), open: false }),
        }
    }

    /// A field of a built-in type with what the tables know about it. The node is made anew: its type may
    /// be used by other fields.
    fn with_facts(&mut self, id: usize, facts: builtin::Facts) -> Result<usize, String> {
        let of = &self.nodes[id];
        let mut node = Node {
            name: of.name.clone(),
            atomic: of.atomic || facts.atomic,
            default: facts.default,
            ..Node::default()
        };
        node.shape = match (&of.shape, facts.list) {
            (Shape::List { item, .. }, Some(kind)) => Shape::List { item: *item, kind },
            (Shape::List { item, kind }, None) => Shape::List { item: *item, kind: kind.clone() },
            (Shape::Map(value), _) => Shape::Map(*value),
            (Shape::Scalar(scalar), _) => Shape::Scalar(*scalar),
            (Shape::Struct { fields, required, open }, _) => {
                Shape::Struct { fields: fields.clone(), required: required.clone(), open: *open }
            }
            (Shape::Any, _) => Shape::Any,
        };
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }
}
