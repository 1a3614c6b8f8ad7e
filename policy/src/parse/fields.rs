//! Reading JSON objects field by field, so that no field goes unnoticed.

use serde_json::{Map, Value};

use super::problem::short;

/// An object that is being read, and where it stands in the policy.
pub(super) struct Fields<'a> {
    path: String,
    map: Option<&'a Map<String, Value>>,
    asked: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The object at `path`; an error in words if it is none.
    pub(super) fn of(path: impl Into<String>, value: &'a Value) -> Result<Self, String> {
        match value {
            Value::Object(map) => Ok(Self { path: path.into(), map: Some(map), asked: Vec::new() }),
            other => Err(format!("{} is not an object", describe(other))),
        }
    }

    /// Where a field of it stands.
    pub(super) fn at(&self, field: &str) -> String {
        format!("{}.{field}", self.path)
    }

    /// A field; one that is null is not there, as in Kubernetes.
    pub(super) fn get(&mut self, field: &'static str) -> Option<&'a Value> {
        self.asked.push(field);
        self.map?.get(field).filter(|value| !value.is_null())
    }

    /// The elements of a list with the path of each; an error in words if it is none.
    pub(super) fn list(&mut self, field: &'static str) -> Result<Option<&'a [Value]>, String> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(format!("{} is not a list", describe(other))),
        }
    }

    /// A text; an error in words if it is none.
    pub(super) fn text(&mut self, field: &'static str) -> Result<Option<&'a str>, String> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(format!("{} is not a text", describe(other))),
        }
    }

    /// The fields nobody has asked for. They may be null, which says nothing.
    pub(super) fn unknown(&self) -> impl Iterator<Item = (&'a str, String)> + '_ {
        self.map
            .into_iter()
            .flatten()
            .filter(|(name, value)| !value.is_null() && !self.asked.contains(&name.as_str()))
            .map(|(name, _)| (name.as_str(), self.at(name)))
    }
}

/// A value in a message.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("{:?}", short(text)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}
