//! Reading an object by its schema: unknown fields go, defaults come, wrong types and values are found.

use base64::Engine as _;
use serde_json::Value;

use super::{At, Node, Scalar, Schema, Shape};
use crate::status::Cause;

/// What [`Schema::admit`] found. Paths are as Kubernetes writes them: `spec.ports[0].port`.
#[derive(Debug, Default)]
pub struct Findings {
    /// Values of the wrong JSON type.
    pub mismatches: Vec<Mismatch>,
    /// Values of the right type that break a rule of the schema, and missing fields.
    pub causes: Vec<Cause>,
    /// Fields that the schema does not have; they were removed.
    pub unknown: Vec<String>,
}

/// A value of the wrong JSON type.
#[derive(Debug)]
pub struct Mismatch {
    /// Where.
    pub path: String,
    /// What was there.
    pub got: Value,
    /// What belongs there, in words.
    pub expected: &'static str,
}

impl Schema {
    /// Makes `value` what the schema says: removes unknown fields and nulls, fills in defaults, and reports
    /// what cannot be mended.
    pub fn admit(&self, value: &mut Value) -> Findings {
        let mut findings = Findings::default();
        walk(self.at(), value, &mut String::new(), &mut findings);
        findings
    }
}

fn walk(at: At<'_>, value: &mut Value, path: &mut String, findings: &mut Findings) {
    let node = at.node();
    match (&node.shape, &mut *value) {
        (Shape::Any, _) => {}
        (Shape::Struct { fields, required, open }, Value::Object(object)) => {
            object.retain(|name, value| match fields.get(name) {
                Some(_) => !value.is_null() || at.field(name).node().nullable,
                None if *open => true,
                None => {
                    findings.unknown.push(join(path, name));
                    false
                }
            });
            for name in fields.keys() {
                if !object.contains_key(name)
                    && let Some(default) = at.field(name).default_value()
                {
                    object.insert(name.clone(), default.clone());
                }
            }
            for name in required {
                if !object.contains_key(name) {
                    if !node.strict && matches!(at.field(name).node().shape, Shape::List { .. }) {
                        object.insert(name.clone(), Value::Array(Vec::new()));
                    } else if node.strict || (!name.starts_with("status") && !path.starts_with("status")) {
                        findings.causes.push(Cause::required(join(path, name), ""));
                    }
                }
            }
            for (name, value) in object.iter_mut().filter(|(_, v)| !v.is_null()) {
                down(path, &format!(".{name}"), |path| walk(at.field(name), value, path, findings));
            }
        }
        (Shape::Map(_), Value::Object(object)) => {
            object.retain(|_, value| !value.is_null());
            for (name, value) in object.iter_mut() {
                down(path, &format!(".{name}"), |path| walk(at.field(name), value, path, findings));
            }
        }
        (Shape::List { .. }, Value::Array(items)) => {
            check_length(node, items.len(), path, findings);
            for (index, item) in items.iter_mut().enumerate() {
                down(path, &format!("[{index}]"), |path| walk(at.item(), item, path, findings));
            }
        }
        (Shape::Scalar(scalar), value) => match scalar_error(*scalar, value) {
            Some(expected) => mismatch(path, value, expected, findings),
            None => check_rules(node, value, path, findings),
        },
        (Shape::Struct { .. } | Shape::Map(_), value) => mismatch(path, value, "object", findings),
        (Shape::List { .. }, value) => mismatch(path, value, "array", findings),
    }
}

/// What was expected, if the value is not it. Quantities given as numbers become strings.
fn scalar_error(scalar: Scalar, value: &mut Value) -> Option<&'static str> {
    let (fits, expected) = match scalar {
        Scalar::String => (value.is_string(), "string"),
        Scalar::Boolean => (value.is_boolean(), "boolean"),
        Scalar::Number => (value.is_number(), "number"),
        Scalar::Integer => (is_integer(value), "integer"),
        Scalar::IntOrString => (value.is_string() || is_integer(value), "integer or string"),
        Scalar::Quantity => {
            if value.is_number() {
                *value = Value::String(value.to_string());
            }
            (value.as_str().is_some_and(is_quantity), "quantity such as 100m or 2Gi")
        }
        Scalar::Time => (value.as_str().is_some_and(is_time), "RFC 3339 time"),
        Scalar::MicroTime => {
            (value.as_str().is_some_and(is_micro_time), "RFC 3339 time with six digits behind the second")
        }
        Scalar::Bytes => (value.as_str().is_some_and(is_base64), "base64 string"),
    };
    (!fits).then_some(expected)
}

fn is_integer(value: &Value) -> bool {
    value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0)
}

fn is_quantity(text: &str) -> bool {
    let digits = text.trim_start_matches(['+', '-']);
    let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    const SUFFIXES: [&str; 16] =
        ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    number.parse::<f64>().is_ok()
        && (SUFFIXES.contains(&suffix)
            || suffix.strip_prefix(['e', 'E']).is_some_and(|exponent| exponent.parse::<i8>().is_ok()))
}

fn is_time(text: &str) -> bool {
    chrono::DateTime::parse_from_rfc3339(text).is_ok()
}

fn is_micro_time(text: &str) -> bool {
    let digits = text.split_once('.').map_or("", |(_, rest)| rest);
    is_time(text) && digits.chars().take_while(char::is_ascii_digit).count() == 6
}

fn is_base64(text: &str) -> bool {
    base64::engine::general_purpose::STANDARD.decode(text).is_ok()
}

fn check_rules(node: &Node, value: &Value, path: &str, findings: &mut Findings) {
    let rules = &node.rules;
    let mut broken = |rule: String| findings.causes.push(Cause::invalid(path, value, &rule));
    if let Some(number) = value.as_f64() {
        if let Some(min) = rules.minimum.filter(|min| number < *min) {
            broken(format!("{path} in body should be greater than or equal to {min}"));
        }
        if let Some(max) = rules.maximum.filter(|max| number > *max) {
            broken(format!("{path} in body should be less than or equal to {max}"));
        }
    }
    if let Some(text) = value.as_str() {
        let length = text.chars().count();
        if let Some(min) = rules.min_length.filter(|min| length < *min) {
            broken(format!("{path} in body should be at least {min} chars long"));
        }
        if let Some(max) = rules.max_length.filter(|max| length > *max) {
            broken(format!("{path} in body should be at most {max} chars long"));
        }
        if let Some(pattern) = rules.pattern.as_ref().filter(|pattern| !pattern.is_match(text)) {
            broken(format!("{path} in body should match '{pattern}'"));
        }
    }
    if !rules.one_of.is_empty() && !rules.one_of.contains(value) {
        let allowed: Vec<&str> = rules.one_of.iter().filter_map(Value::as_str).collect();
        findings.causes.push(Cause::unsupported(path, value, &allowed));
    }
}

fn check_length(node: &Node, length: usize, path: &str, findings: &mut Findings) {
    let mut broken = |rule: String| {
        findings.causes.push(Cause::invalid(path, &Value::from(length), &rule));
    };
    if let Some(min) = node.rules.min_items.filter(|min| length < *min) {
        broken(format!("{path} in body should have at least {min} items"));
    }
    if let Some(max) = node.rules.max_items.filter(|max| length > *max) {
        broken(format!("{path} in body should have at most {max} items"));
    }
}

fn mismatch(path: &str, value: &Value, expected: &'static str, findings: &mut Findings) {
    findings.mismatches.push(Mismatch { path: path.to_owned(), got: value.clone(), expected });
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn down(path: &mut String, step: &str, visit: impl FnOnce(&mut String)) {
    let length = path.len();
    path.push_str(if path.is_empty() { step.trim_start_matches('.') } else { step });
    visit(path);
    path.truncate(length);
}
