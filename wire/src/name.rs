//! Names: of clusters, namespaces and objects. Cheap to clone, checked once.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::bounded;

/// Why a text is not a name of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind}: {problem}")]
pub struct InvalidName {
    kind: &'static str,
    text: String,
    problem: String,
}

/// What a kind of name may look like.
struct Rule {
    kind: &'static str,
    max: usize,
    dots: bool,
}

impl Rule {
    fn check(&self, text: &str) -> Result<(), InvalidName> {
        let fail = |problem: String| Err(InvalidName { kind: self.kind, text: bounded(text), problem });
        if text.is_empty() {
            return fail("it is empty".into());
        }
        if text.len() > self.max {
            return fail(format!("it has {} characters; at most {} are allowed", text.len(), self.max));
        }
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if let Some(bad) = text.chars().find(|c| {
            !(c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-' || (self.dots && *c == '.'))
        }) {
            let dots = if self.dots { ", `.`" } else { "" };
            return fail(format!("{bad:?} is not one of a-z, 0-9, `-`{dots}"));
        }
        let bytes = text.as_bytes();
        if !alphanumeric(bytes[0]) || !alphanumeric(bytes[bytes.len() - 1]) {
            return fail("it must start and end with a letter or a digit".into());
        }
        Ok(())
    }
}

macro_rules! name {
    ($(#[$meta:meta])* $name:ident, $rule:expr) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                ($rule).check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// Name of a cluster: at most 32 of `[a-z0-9-]`, a letter or digit at both ends.
    ClusterName,
    Rule { kind: "cluster name", max: 32, dots: false }
);
name!(
    /// Name of a Kubernetes namespace: an RFC 1123 label of at most 63 characters.
    Namespace,
    Rule { kind: "namespace", max: 63, dots: false }
);
name!(
    /// Name of a Kubernetes object (node, Service, EndpointSlice): an RFC 1123 subdomain of at most 253 characters.
    ObjectName,
    Rule { kind: "object name", max: 253, dots: true }
);

impl ClusterName {
    /// Whether this is the name that Cilium refuses beside a cluster id other than 0.
    pub fn is_default(&self) -> bool {
        self.as_str() == "default"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_follow_the_rule_and_errors_say_what_is_wrong() {
        for good in ["a", "alpha", "real-a", "0", &"a".repeat(32)] {
            assert_eq!(good.parse::<ClusterName>().expect(good).as_str(), good);
        }
        for (bad, says) in [
            ("", "empty"),
            ("Alpha", "'A'"),
            ("a.b", "'.'"),
            ("-a", "start and end"),
            ("a-", "start and end"),
            ("..", "'.'"),
            ("a/b", "'/'"),
            (&"a".repeat(33), "at most 32"),
            ("é", "'é'"),
        ] {
            let error = bad.parse::<ClusterName>().expect_err(bad).to_string();
            assert!(error.contains(says), "{bad:?}: {error}");
        }
    }

    #[test]
    fn object_names_allow_dots_but_no_path_elements() {
        assert!("node-1.example.org".parse::<ObjectName>().is_ok());
        assert!(".".parse::<ObjectName>().is_err());
        assert!("..".parse::<ObjectName>().is_err());
        assert!("a.b".parse::<Namespace>().is_err());
    }
}
