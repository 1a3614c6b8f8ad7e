//! Label selectors, as Kubernetes defines them, over labels that have sources.
//!
//! See <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors>.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use isthmus_wire::Labels;

/// What Kubernetes calls itself as a source of labels.
const SOURCE_K8S: &str = "k8s";

/// Requirements that must all hold. Without any it matches everything. Equal whenever the requirements are, in any order.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(Vec<Requirement>);

/// What is required of one label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    /// The label's key, without its source.
    pub key: Arc<str>,
    /// Who must have given the label for it to count at all.
    pub source: Source,
    /// What must hold.
    pub operator: Operator,
}

/// Who must have given a label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Anybody.
    Any,
    /// This one: `k8s`, `reserved`, ...
    Named(Arc<str>),
}

/// What is required of a label's value. Lists of values are ordered and without duplicates.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// The label is there and has one of these values.
    In(Vec<Arc<str>>),
    /// The label is not there or has none of these values.
    NotIn(Vec<Arc<str>>),
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

impl Source {
    /// Kubernetes.
    pub fn k8s() -> Self {
        Self::Named(SOURCE_K8S.into())
    }

    /// The reserved identities' own labels.
    pub fn reserved() -> Self {
        Self::Named("reserved".into())
    }

    fn admits(&self, source: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Named(name) => **name == *source,
        }
    }
}

impl Operator {
    /// `In`, with the values put in order.
    pub fn one_of<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        Self::In(ordered(values))
    }

    /// `NotIn`, with the values put in order.
    pub fn none_of<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        Self::NotIn(ordered(values))
    }

    /// Whether it holds of a label of this value, or (none) of its absence.
    pub fn holds(&self, value: Option<&str>) -> bool {
        match (self, value) {
            (Self::In(values), Some(value)) => values.iter().any(|wanted| **wanted == *value),
            (Self::NotIn(values), Some(value)) => !values.iter().any(|wanted| **wanted == *value),
            (Self::Exists, found) => found.is_some(),
            (Self::DoesNotExist, found) => found.is_none(),
            (Self::In(_), None) => false,
            (Self::NotIn(_), None) => true,
        }
    }
}

fn ordered<'a>(values: impl IntoIterator<Item = &'a str>) -> Vec<Arc<str>> {
    let mut values: Vec<Arc<str>> = values.into_iter().map(Arc::from).collect();
    values.sort_unstable();
    values.dedup();
    values
}

impl Requirement {
    /// `key` must have this value.
    pub fn equals(source: Source, key: &str, value: &str) -> Self {
        Self { key: key.into(), source, operator: Operator::one_of([value]) }
    }

    /// `key` must be there.
    pub fn exists(source: Source, key: &str) -> Self {
        Self { key: key.into(), source, operator: Operator::Exists }
    }

    fn matches(&self, labels: &Labels) -> bool {
        let label = labels.get(&self.key).filter(|label| self.source.admits(&label.source));
        self.operator.holds(label.map(|label| label.value.as_str()))
    }
}

impl Selector {
    /// All of these requirements.
    pub fn new(mut requirements: Vec<Requirement>) -> Self {
        requirements.sort_unstable();
        requirements.dedup();
        Self(requirements)
    }

    /// Matches everything.
    pub fn everything() -> Self {
        Self::default()
    }

    /// What is required, in order.
    pub fn requirements(&self) -> &[Requirement] {
        &self.0
    }

    /// Whether all requirements hold of these labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.matches(labels))
    }

    /// The same for labels without sources, such as those of a Service.
    pub fn matches_plain(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0
            .iter()
            .all(|requirement| requirement.operator.holds(labels.get(&*requirement.key).map(String::as_str)))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("everything");
        }
        for (at, requirement) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str(",")?;
            }
            fmt::Display::fmt(requirement, f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Requirement {
    /// As `kubectl --selector` takes it, with the source in front where there is one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        let source = match &self.source {
            Source::Any => String::new(),
            Source::Named(name) => format!("{name}:"),
        };
        match &self.operator {
            Operator::In(values) if values.len() == 1 => write!(f, "{source}{key}={}", values[0]),
            Operator::In(values) => write!(f, "{source}{key} in ({})", values.join(",")),
            Operator::NotIn(values) => write!(f, "{source}{key} notin ({})", values.join(",")),
            Operator::Exists => write!(f, "{source}{key}"),
            Operator::DoesNotExist => write!(f, "!{source}{key}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> Labels {
        Labels::decode(b"k8s:app=web;k8s:empty=;reserved:host=;").expect("labels")
    }

    fn requirement(source: Source, key: &str, operator: Operator) -> bool {
        Selector::new(vec![Requirement { key: key.into(), source, operator }]).matches(&labels())
    }

    #[test]
    fn operators_hold_as_kubernetes_defines_them() {
        for (key, operator, holds) in [
            ("app", Operator::one_of(["api", "web"]), true),
            ("app", Operator::one_of(["api"]), false),
            ("app", Operator::one_of([]), false),
            ("none", Operator::one_of(["web"]), false),
            ("app", Operator::none_of(["api"]), true),
            ("app", Operator::none_of(["web"]), false),
            ("none", Operator::none_of(["web"]), true),
            ("empty", Operator::one_of([""]), true),
            ("empty", Operator::Exists, true),
            ("none", Operator::Exists, false),
            ("none", Operator::DoesNotExist, true),
            ("app", Operator::DoesNotExist, false),
        ] {
            assert_eq!(requirement(Source::Any, key, operator.clone()), holds, "{key} {operator:?}");
        }
    }

    #[test]
    fn a_label_of_another_source_is_not_there() {
        assert!(requirement(Source::k8s(), "app", Operator::Exists));
        assert!(!requirement(Source::reserved(), "app", Operator::Exists));
        assert!(requirement(Source::reserved(), "host", Operator::one_of([""])));
        assert!(requirement(Source::k8s(), "host", Operator::DoesNotExist));
        assert!(requirement(Source::k8s(), "host", Operator::none_of([""])));
    }

    #[test]
    fn the_order_of_requirements_does_not_matter() {
        let a = Requirement::equals(Source::Any, "a", "1");
        let b = Requirement::exists(Source::k8s(), "b");
        let forth = Selector::new(vec![a.clone(), b.clone(), a.clone()]);
        assert_eq!(forth, Selector::new(vec![b, a]));
        assert_eq!(forth.to_string(), "a=1,k8s:b");
    }
}
