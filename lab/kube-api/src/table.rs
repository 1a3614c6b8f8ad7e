//! `kubectl get`'s tables (`Accept: application/json;as=Table;v=v1;g=meta.k8s.io`).

mod columns;
mod path;

pub use columns::builtin;
pub use path::JsonPath;

use serde_json::{Value, json};

/// The columns of a resource, in order.
#[derive(Debug, Clone)]
pub struct Columns(pub(crate) Vec<Column>);

/// One column.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) format: String,
    pub(crate) description: String,
    /// Above 0: shown with `-o wide` only.
    pub(crate) priority: i64,
    pub(crate) cell: Cell,
}

#[derive(Debug, Clone)]
pub(crate) enum Cell {
    /// A value computed for a built-in kind.
    Code(fn(&Value) -> Value),
    /// A value found in a custom resource.
    Path(JsonPath),
    /// The same for a time, shown as how long ago it was.
    Age(JsonPath),
}

/// How much of the object comes with its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// `PartialObjectMetadata`.
    #[default]
    Metadata,
    /// All of it.
    Object,
}

impl Columns {
    /// Name and age.
    pub fn plain() -> Self {
        columns::plain()
    }

    /// The columns of a custom resource: `additionalPrinterColumns` of its version. Paths that cannot be
    /// read are returned as a sentence.
    pub fn custom(definitions: &Value) -> Result<Self, String> {
        let Some(definitions) = definitions.as_array().filter(|d| !d.is_empty()) else {
            return Ok(Self::plain());
        };
        let text = |column: &Value, field: &str| column[field].as_str().unwrap_or_default().to_owned();
        let mut all = vec![columns::name()];
        for definition in definitions {
            let path = JsonPath::parse(&text(definition, "jsonPath"))?;
            let kind = text(definition, "type");
            all.push(Column {
                name: text(definition, "name"),
                cell: if kind == "date" { Cell::Age(path) } else { Cell::Path(path) },
                kind,
                format: text(definition, "format"),
                description: text(definition, "description"),
                priority: definition["priority"].as_i64().unwrap_or(0),
            });
        }
        Ok(Self(all))
    }

    /// The table of these objects. `metadata` is that of the list, or of the object.
    pub fn table<'a>(
        &self,
        metadata: Value,
        objects: impl Iterator<Item = &'a Value>,
        include: IncludeObject,
    ) -> Value {
        let definitions: Vec<Value> = self
            .0
            .iter()
            .map(|c| {
                json!({
                    "name": c.name, "type": c.kind, "format": c.format,
                    "description": c.description, "priority": c.priority,
                })
            })
            .collect();
        let rows: Vec<Value> = objects
            .map(|object| {
                let cells: Vec<Value> = self.0.iter().map(|column| column.cell.value(object)).collect();
                match include {
                    IncludeObject::None => json!({ "cells": cells }),
                    IncludeObject::Metadata => json!({ "cells": cells, "object": partial(object) }),
                    IncludeObject::Object => json!({ "cells": cells, "object": object }),
                }
            })
            .collect();
        json!({
            "kind": "Table",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": metadata,
            "columnDefinitions": definitions,
            "rows": rows,
        })
    }
}

/// `PartialObjectMetadata` of an object.
pub fn partial(object: &Value) -> Value {
    json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"] })
}

impl Cell {
    fn value(&self, object: &Value) -> Value {
        match self {
            Self::Code(code) => code(object),
            Self::Path(path) => path.find(object).cloned().unwrap_or(Value::Null),
            Self::Age(path) => columns::age_of(path.find(object)),
        }
    }
}
