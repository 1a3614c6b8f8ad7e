//! Label and field selectors as list, watch and deletecollection take them.

use serde_json::Value;

use crate::status::{ApiError, ApiResult};

/// Both selectors of a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<FieldRequirement>,
}

#[derive(Debug, Clone, PartialEq)]
enum Requirement {
    Exists(String),
    Absent(String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Greater(String, i64),
    Less(String, i64),
}

#[derive(Debug, Clone, PartialEq)]
struct FieldRequirement {
    path: String,
    value: String,
    equal: bool,
}

/// The fields that may be selected by, beside the metadata's: as the real server has them per kind.
const FIELDS: &[(&str, &[&str])] = &[
    (
        "Pod",
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
    ),
    ("Node", &["spec.unschedulable"]),
    ("Namespace", &["status.phase"]),
    ("Secret", &["type"]),
    ("Service", &["spec.clusterIP", "spec.type"]),
    ("ReplicaSet", &["status.replicas"]),
    (
        "Event",
        &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
    ),
];

impl Selector {
    /// Parses `labelSelector` and `fieldSelector` for objects of `kind`.
    pub fn parse(labels: &str, fields: &str, kind: &str) -> ApiResult<Self> {
        let labels = LabelParser { rest: labels }.parse().map_err(|why| {
            ApiError::bad_request(format!("unable to parse requirement: {why} in labelSelector {labels:?}"))
        })?;
        Ok(Self { labels, fields: parse_fields(fields, kind)? })
    }

    /// Whether everything matches.
    pub fn is_everything(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether the object matches.
    pub fn matches(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels");
        let label = |key: &str| labels.and_then(|l| l.get(key)).and_then(Value::as_str);
        self.labels.iter().all(|requirement| requirement.matches(label))
            && self.fields.iter().all(|field| (field_text(object, &field.path) == field.value) == field.equal)
    }

    /// The one name that can match (`metadata.name=x`), if there is one.
    pub fn name(&self) -> Option<&str> {
        self.fields.iter().find(|f| f.path == "metadata.name" && f.equal).map(|f| f.value.as_str())
    }
}

impl Requirement {
    fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        let number = |key: &str| label(key).and_then(|v| v.parse::<i64>().ok());
        match self {
            Self::Exists(key) => label(key).is_some(),
            Self::Absent(key) => label(key).is_none(),
            Self::In(key, values) => label(key).is_some_and(|v| values.iter().any(|w| w == v)),
            Self::NotIn(key, values) => label(key).is_none_or(|v| values.iter().all(|w| w != v)),
            Self::Greater(key, than) => number(key).is_some_and(|n| n > *than),
            Self::Less(key, than) => number(key).is_some_and(|n| n < *than),
        }
    }
}

fn field_text(object: &Value, path: &str) -> String {
    let mut value = object;
    for step in path.split('.') {
        match value.get(step) {
            Some(next) => value = next,
            // What is false when absent, in Go, is "false".
            None if path == "spec.unschedulable" || path == "spec.hostNetwork" => return "false".into(),
            None => return String::new(),
        }
    }
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn parse_fields(text: &str, kind: &str) -> ApiResult<Vec<FieldRequirement>> {
    let allowed = FIELDS.iter().find(|(k, _)| *k == kind).map_or(&[][..], |(_, fields)| fields);
    text.split(',')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (path, value, equal) = [("!=", false), ("==", true), ("=", true)]
                .into_iter()
                .find_map(|(operator, equal)| part.split_once(operator).map(|(p, v)| (p, v, equal)))
                .ok_or_else(|| {
                    ApiError::bad_request(format!(
                        "invalid field selector {part:?}; can't understand it: write field=value or field!=value"
                    ))
                })?;
            let path = path.trim();
            if !["metadata.name", "metadata.namespace"].contains(&path) && !allowed.contains(&path) {
                return Err(ApiError::bad_request(format!("field label not supported: {path}")));
            }
            Ok(FieldRequirement { path: path.to_owned(), value: value.trim().to_owned(), equal })
        })
        .collect()
}

struct LabelParser<'a> {
    rest: &'a str,
}

impl LabelParser<'_> {
    fn parse(mut self) -> Result<Vec<Requirement>, String> {
        let mut requirements = Vec::new();
        loop {
            self.skip_space();
            if self.rest.is_empty() {
                return Ok(requirements);
            }
            requirements.push(self.requirement()?);
            self.skip_space();
            if !self.rest.is_empty() && !self.take(",") {
                return Err(format!("found {:?}, expected ','", self.rest));
            }
        }
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        if self.take("!") {
            return Ok(Requirement::Absent(self.key()?));
        }
        let key = self.key()?;
        self.skip_space();
        for (operator, negated) in [("!=", true), ("==", false), ("=", false)] {
            if self.take(operator) {
                let value = self.value()?;
                return Ok(if negated {
                    Requirement::NotIn(key, vec![value])
                } else {
                    Requirement::In(key, vec![value])
                });
            }
        }
        for (operator, greater) in [(">", true), ("<", false)] {
            if self.take(operator) {
                let number = self.value()?.parse().map_err(|_| "a number must follow > and <".to_owned())?;
                return Ok(if greater {
                    Requirement::Greater(key, number)
                } else {
                    Requirement::Less(key, number)
                });
            }
        }
        if self.take_word("notin") {
            return Ok(Requirement::NotIn(key, self.values()?));
        }
        if self.take_word("in") {
            return Ok(Requirement::In(key, self.values()?));
        }
        Ok(Requirement::Exists(key))
    }

    fn values(&mut self) -> Result<Vec<String>, String> {
        self.skip_space();
        if !self.take("(") {
            return Err(format!("found {:?}, expected '('", self.rest));
        }
        let mut values = Vec::new();
        loop {
            values.push(self.value()?);
            self.skip_space();
            if self.take(")") {
                return Ok(values);
            }
            if !self.take(",") {
                return Err(format!("found {:?}, expected ',' or ')'", self.rest));
            }
        }
    }

    fn key(&mut self) -> Result<String, String> {
        let key = self.word();
        if crate::validate::label_key(&key).is_some() {
            return Err(format!("{key:?} is no label key"));
        }
        Ok(key)
    }

    fn value(&mut self) -> Result<String, String> {
        let value = self.word();
        if crate::validate::label_value(&value).is_some() {
            return Err(format!("{value:?} is no label value"));
        }
        Ok(value)
    }

    fn word(&mut self) -> String {
        self.skip_space();
        let end =
            self.rest.find(|c: char| c.is_whitespace() || "=!,()<>".contains(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word.to_owned()
    }

    fn take(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn take_word(&mut self, word: &str) -> bool {
        self.rest
            .strip_prefix(word)
            .filter(|rest| rest.starts_with(|c: char| c.is_whitespace() || c == '('))
            .is_some_and(|rest| {
                self.rest = rest;
                true
            })
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn selects(selector: &str, labels: Value) -> bool {
        Selector::parse(selector, "", "Pod")
            .expect(selector)
            .matches(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn label_selectors_of_every_form() {
        let labels = || json!({"app": "web", "tier": "a", "n": "5"});
        for yes in [
            "",
            "app",
            "app=web",
            "app==web",
            "app = web , tier=a",
            "app!=db",
            "nope!=x",
            "!nope",
            "app in (web,db)",
            "app in ( web )",
            "nope notin (a,b)",
            "tier notin (b)",
            "n>4",
            "n<6,app",
        ] {
            assert!(selects(yes, labels()), "{yes}");
        }
        for no in ["nope", "app=db", "app!=web", "!app", "app in (db)", "app notin (web)", "n>5", "app>1"] {
            assert!(!selects(no, labels()), "{no}");
        }
    }

    #[test]
    fn an_unreadable_selector_is_a_bad_request() {
        for bad in ["a=(", "a in b", "=x", "a,,b=*", "in (a)", "a in (a", "a b"] {
            let error = Selector::parse(bad, "", "Pod").expect_err(bad);
            assert_eq!(error.code(), 400, "{bad}");
        }
        assert_eq!(Selector::parse("", "spec.nonsense=1", "Pod").expect_err("unknown").code(), 400);
    }

    #[test]
    fn field_selectors_compare_text() {
        let pod =
            json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Running"}});
        let matches = |s: &str| Selector::parse("", s, "Pod").expect(s).matches(&pod);
        assert!(matches("spec.nodeName=n1,status.phase!=Failed"));
        assert!(matches("spec.hostNetwork=false"));
        assert!(!matches("metadata.name=b"));
    }
}
