//! Label selectors.
//!
//! A requirement can only narrow what a selector matches. So one that cannot be read is left out, and the selector then
//! matches everything that was meant and perhaps more; whoever asks is told that it is not complete.

use serde_json::Value;

use super::fields::{Fields, describe};
use super::problem::{Consequence, ProblemKind, short};
use super::report::{Report, bounded};
use crate::labels::{Operator, Requirement, Selector, Source};

/// Most requirements of a selector, and values of a requirement.
const MAX_REQUIREMENTS: usize = 1000;
/// Longest key: a prefix (253), a slash, a name (63), and a source before them.
const MAX_KEY: usize = 400;
/// Longest value of a label.
const MAX_VALUE: usize = 256;

/// How the keys of a selector are to be understood.
#[derive(Clone, Copy)]
pub(super) enum Keys {
    /// `source:key`, or a key of any source. Cilium's.
    Cilium,
    /// Labels that Kubernetes gave to pods.
    Pod,
    /// Labels of the pods' namespaces.
    Namespace,
}

/// What could be read of a selector.
pub(super) struct Read {
    /// Matches what is meant, and more if it is not complete.
    pub(super) requirements: Vec<Requirement>,
    /// Whether it is all that is said.
    pub(super) complete: bool,
}

impl Read {
    /// Whether a requirement is about this label, given by Kubernetes or by anybody.
    pub(super) fn is_about(&self, key: &str) -> bool {
        self.keys().any(|about| about == key)
    }

    /// Whether a requirement is about a label of this prefix, given by Kubernetes or by anybody.
    pub(super) fn is_about_prefix(&self, prefix: &str) -> bool {
        self.keys().any(|about| about.starts_with(prefix))
    }

    /// Whether a requirement is about a reserved label, as only the fixed identities have them.
    pub(super) fn is_reserved(&self) -> bool {
        self.requirements.iter().any(|requirement| requirement.source == Source::reserved())
    }

    fn keys(&self) -> impl Iterator<Item = &str> {
        self.requirements
            .iter()
            .filter(|requirement| requirement.source == Source::Any || requirement.source == Source::k8s())
            .map(|requirement| &*requirement.key)
    }

    pub(super) fn into_selector(self) -> Selector {
        Selector::new(self.requirements)
    }
}

/// Reads a selector at `path`.
pub(super) fn selector(
    path: &str,
    value: &Value,
    keys: Keys,
    consequence: Consequence,
    report: &mut Report,
) -> Read {
    let mut read = Read { requirements: Vec::new(), complete: true };
    let mut fields = match Fields::of(path, value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, consequence);
            read.complete = false;
            return read;
        }
    };
    match_labels(&mut fields, keys, consequence, &mut read, report);
    match_expressions(&mut fields, keys, consequence, &mut read, report);
    read.complete &= !report.unknown(&fields, consequence);
    read
}

fn match_labels(
    fields: &mut Fields<'_>,
    keys: Keys,
    consequence: Consequence,
    read: &mut Read,
    report: &mut Report,
) {
    let path = fields.at("matchLabels");
    let labels = match fields.get("matchLabels") {
        None => return,
        Some(Value::Object(labels)) => labels,
        Some(other) => {
            report.invalid(path, format!("{} is not an object", describe(other)), consequence);
            read.complete = false;
            return;
        }
    };
    if labels.len() > MAX_REQUIREMENTS {
        report.fail(
            &path,
            ProblemKind::TooLarge,
            format!("more than {MAX_REQUIREMENTS} labels"),
            consequence,
        );
        read.complete = false;
    }
    for (key, value) in labels.iter().take(MAX_REQUIREMENTS) {
        let at = format!("{path}[{}]", short(key));
        let requirement = self::key(key, keys).and_then(|(source, key)| {
            let value = value.as_str().ok_or_else(|| format!("{} is not a text", describe(value)))?;
            Ok(Requirement { key: key.into(), source, operator: Operator::one_of([checked(value)?]) })
        });
        take(requirement, at, consequence, read, report);
    }
}

fn match_expressions(
    fields: &mut Fields<'_>,
    keys: Keys,
    consequence: Consequence,
    read: &mut Read,
    report: &mut Report,
) {
    let path = fields.at("matchExpressions");
    let expressions = match fields.list("matchExpressions") {
        Ok(expressions) => expressions.unwrap_or_default(),
        Err(what) => {
            report.invalid(path, what, consequence);
            read.complete = false;
            return;
        }
    };
    let (expressions, all) = bounded(expressions, MAX_REQUIREMENTS, &path, consequence, report);
    read.complete &= all;
    for (index, expression) in expressions.iter().enumerate() {
        let at = format!("{path}[{index}]");
        let requirement = Fields::of(at.as_str(), expression).and_then(|mut fields| {
            let requirement = self::expression(&mut fields, keys)?;
            match fields.unknown().next() {
                Some((name, _)) => Err(format!("there is no such field as {:?}", short(name))),
                None => Ok(requirement),
            }
        });
        take(requirement, at, consequence, read, report);
    }
}

fn take(
    requirement: Result<Requirement, String>,
    at: String,
    consequence: Consequence,
    read: &mut Read,
    report: &mut Report,
) {
    match requirement {
        Ok(requirement) => read.requirements.push(requirement),
        Err(what) => {
            report.invalid(at, what, consequence);
            read.complete = false;
        }
    }
}

fn expression(fields: &mut Fields<'_>, keys: Keys) -> Result<Requirement, String> {
    let key = fields.text("key")?.ok_or("it has no key")?;
    let (source, key) = self::key(key, keys)?;
    let operator = fields.text("operator")?.ok_or("it has no operator")?;
    let values = fields.list("values")?.unwrap_or_default();
    if values.len() > MAX_REQUIREMENTS {
        return Err(format!("more than {MAX_REQUIREMENTS} values"));
    }
    let values = values
        .iter()
        .map(|value| {
            checked(value.as_str().ok_or_else(|| format!("the value {} is not a text", describe(value)))?)
        })
        .collect::<Result<Vec<&str>, String>>()?;
    let operator = match (operator, values.is_empty()) {
        ("In", false) => Operator::one_of(values),
        ("NotIn", false) => Operator::none_of(values),
        ("In" | "NotIn", true) => return Err(format!("{operator} needs at least one value")),
        ("Exists", true) => Operator::Exists,
        ("DoesNotExist", true) => Operator::DoesNotExist,
        ("Exists" | "DoesNotExist", false) => return Err(format!("{operator} takes no values")),
        (other, _) => {
            return Err(format!("operator {:?} is not one of In, NotIn, Exists, DoesNotExist", short(other)));
        }
    };
    Ok(Requirement { key: key.into(), source, operator })
}

/// Sources of labels that only Cilium's identities of addresses and nodes have.
const UNSUPPORTED_SOURCES: [&str; 5] = ["cidr", "cidrgroup", "fqdn", "node", "directory"];

fn key(text: &str, keys: Keys) -> Result<(Source, String), String> {
    if text.is_empty() || text.len() > MAX_KEY {
        return Err(format!("the key {:?} is empty or longer than {MAX_KEY} characters", short(text)));
    }
    if text.contains([';', '=']) || text.chars().any(char::is_whitespace) {
        return Err(format!("{:?} is not a label's key", short(text)));
    }
    match keys {
        Keys::Pod => Ok((Source::k8s(), text.to_owned())),
        Keys::Namespace => {
            Ok((Source::k8s(), format!("{}{text}", isthmus_wire::Labels::NAMESPACE_LABEL_PREFIX)))
        }
        Keys::Cilium => match text.split_once(':') {
            None => Ok((Source::Any, text.to_owned())),
            Some((_, "")) => Err(format!("{:?} has no key after its source", short(text))),
            Some(("any", key)) => Ok((Source::Any, key.to_owned())),
            Some((source, _)) if UNSUPPORTED_SOURCES.contains(&source) => {
                Err(format!("Isthmus does not support labels of source {source:?} yet"))
            }
            Some((source, key)) => Ok((Source::Named(source.into()), key.to_owned())),
        },
    }
}

fn checked(value: &str) -> Result<&str, String> {
    if value.len() > MAX_VALUE {
        return Err(format!("the value {:?} is longer than {MAX_VALUE} characters", short(value)));
    }
    Ok(value)
}
