//! The part of JSONPath that CRDs use for columns and scale: fields, indexes, and filters by equality.

use serde_json::Value;

/// A parsed path such as `.status.conditions[?(@.type=="Ready")].status`.
#[derive(Debug, Clone, PartialEq)]
pub struct JsonPath(Vec<Step>);

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Field(String),
    Index(usize),
    /// `[*]`: the first one, as a column shows one value.
    First,
    /// `[?(@.field=="value")]`.
    Where(JsonPath, String),
}

impl JsonPath {
    /// Parses a path; errors are sentences.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut rest = text.trim().trim_start_matches('{').trim_end_matches('}').trim_start_matches('$');
        let mut steps = Vec::new();
        while !rest.is_empty() {
            let (step, remaining) =
                step(rest).ok_or_else(|| format!("cannot read jsonPath {text:?} at {rest:?}"))?;
            steps.push(step);
            rest = remaining;
        }
        Ok(Self(steps))
    }

    /// The field names, if the path is made of nothing else.
    pub fn fields(&self) -> Option<Vec<String>> {
        self.0
            .iter()
            .map(|step| if let Step::Field(name) = step { Some(name.clone()) } else { None })
            .collect()
    }

    /// The first value at this path.
    pub fn find<'a>(&self, value: &'a Value) -> Option<&'a Value> {
        self.0.iter().try_fold(value, |value, step| match step {
            Step::Field(name) => value.get(name),
            Step::Index(index) => value.get(index),
            Step::First => value.as_array()?.first(),
            Step::Where(path, wanted) => {
                value.as_array()?.iter().find(|item| path.find(item).is_some_and(|v| text_of(v) == *wanted))
            }
        })
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn step(rest: &str) -> Option<(Step, &str)> {
    if let Some(rest) = rest.strip_prefix('.') {
        if rest.is_empty() || rest.starts_with('[') {
            return None;
        }
        // A dot in a name is written `\.`.
        let mut name = String::new();
        let mut characters = rest.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' => name.push(characters.next()?.1),
                '.' | '[' => return Some((Step::Field(name), &rest[at..])),
                c => name.push(c),
            }
        }
        return Some((Step::Field(name), ""));
    }
    let inside = rest.strip_prefix('[')?;
    let end = if inside.starts_with("?(") { inside.find(")]")? + 1 } else { inside.find(']')? };
    let (inside, rest) = (&inside[..end], &inside[end + 1..]);
    let step = if inside == "*" {
        Step::First
    } else if let Some(filter) = inside.strip_prefix("?(@").and_then(|f| f.strip_suffix(')')) {
        let (path, value) = filter.split_once("==")?;
        Step::Where(JsonPath::parse(path.trim()).ok()?, unquote(value.trim()).to_owned())
    } else if let Ok(index) = inside.parse() {
        Step::Index(index)
    } else {
        Step::Field(unquote(inside).to_owned())
    };
    Some((step, rest))
}

fn unquote(text: &str) -> &str {
    ['"', '\'']
        .into_iter()
        .find_map(|quote| text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote)))
        .unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_of_printer_columns() {
        let object = json!({
            "spec": {"replicas": 3, "a.b": 1, "list": [{"x": 7}]},
            "status": {"conditions": [{"type": "A", "status": "0"}, {"type": "Ready", "status": "True"}]},
        });
        for (path, value) in [
            (".spec.replicas", json!(3)),
            ("$.spec['a.b']", json!(1)),
            (".spec.a\\.b", json!(1)),
            (".spec.list[0].x", json!(7)),
            (".spec.list[*].x", json!(7)),
            (".status.conditions[?(@.type==\"Ready\")].status", json!("True")),
            (".status.conditions[?(@.type=='Ready')].status", json!("True")),
        ] {
            assert_eq!(JsonPath::parse(path).expect(path).find(&object), Some(&value), "{path}");
        }
        assert_eq!(JsonPath::parse(".spec.nothing.here").expect("a path").find(&object), None);
        for bad in ["spec", ".a[", ".a[?(@.b)]", ".", ".a..b["] {
            assert!(JsonPath::parse(bad).is_err(), "{bad}");
        }
    }
}
