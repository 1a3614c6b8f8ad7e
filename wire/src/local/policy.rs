//! A network policy as its cluster's agents read it: what the user wrote, not yet understood.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use serde_json::Value;

use crate::gojson::{self, go_object};
use crate::{Namespace, ObjectName, ValueError};

/// Prefix of the keys, without its trailing slash; the canary is `cilium/synced/<own cluster>/` followed by it.
pub const POLICIES: &str = "isthmus/policies/v1";

/// Which kind of object a policy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    /// `cilium.io/v2`, of a namespace.
    CiliumNetworkPolicy,
    /// `cilium.io/v2`, of the whole cluster.
    CiliumClusterwideNetworkPolicy,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [Self; 3] =
        [Self::NetworkPolicy, Self::CiliumNetworkPolicy, Self::CiliumClusterwideNetworkPolicy];

    /// As in keys: the kind in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "networkpolicy",
            Self::CiliumNetworkPolicy => "ciliumnetworkpolicy",
            Self::CiliumClusterwideNetworkPolicy => "ciliumclusterwidenetworkpolicy",
        }
    }

    /// As Kubernetes writes it.
    pub fn kind(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "NetworkPolicy",
            Self::CiliumNetworkPolicy => "CiliumNetworkPolicy",
            Self::CiliumClusterwideNetworkPolicy => "CiliumClusterwideNetworkPolicy",
        }
    }

    /// Whether its objects belong to a namespace.
    pub fn is_namespaced(self) -> bool {
        self != Self::CiliumClusterwideNetworkPolicy
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.kind())
    }
}

/// Which policy. In keys and in text it is `<kind>/<namespace or ->/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyKey {
    /// Its kind.
    pub kind: PolicyKind,
    /// Its namespace; `None` exactly if the kind has none.
    pub namespace: Option<Namespace>,
    /// Its name.
    pub name: ObjectName,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let namespace = self.namespace.as_ref().map_or("-", Namespace::as_str);
        write!(f, "{}/{namespace}/{}", self.kind.as_str(), self.name)
    }
}

impl FromStr for PolicyKey {
    type Err = crate::key::KeyProblem;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = || crate::key::KeyProblem::Shape {
            expected: "isthmus/policies/v1/<kind>/<namespace or ->/<name>",
        };
        let mut parts = text.splitn(3, '/');
        let (Some(kind), Some(namespace), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(shape());
        };
        let kind = PolicyKind::parse(kind).ok_or_else(shape)?;
        let namespace = match (kind.is_namespaced(), namespace) {
            (false, "-") => None,
            (true, namespace) => Some(namespace.parse()?),
            (false, _) => return Err(shape()),
        };
        Ok(Self { kind, namespace, name: name.parse()? })
    }
}

go_object! {
    /// A policy of the own cluster.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct LocalPolicy {
        /// UID of the object.
        pub uid: String = "uid" always,
        /// Generation of the object: grows with each change of what the policy says.
        pub generation: i64 = "generation" always,
        /// What the policy says: the object's `spec`, and each of its `specs`, as JSON. No number has a fraction.
        pub specs: Vec<Value> = "specs" always,
    }
}

impl LocalPolicy {
    /// A policy with these specs. No field of a policy holds a number with a fraction, and JSON readers differ about
    /// them: such a number becomes text here, which every reader refuses alike.
    pub fn new(uid: String, generation: i64, mut specs: Vec<Value>) -> Self {
        specs.iter_mut().for_each(without_fractions);
        Self { uid, generation, specs }
    }

    /// Reads the value.
    ///
    /// # Errors
    /// Too long, not JSON, or a field that does not hold what it should; names the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, ValueError> {
        let policy: Self = gojson::decode(bytes, crate::value::MAX_BYTES)?;
        match policy.specs.iter().position(has_fraction) {
            Some(index) => Err(ValueError::field(format_args!("specs[{index}]"), "a number with a fraction")),
            None => Ok(policy),
        }
    }

    /// The value as [`LocalPolicy::decode`] reads it.
    pub fn encode(&self) -> Bytes {
        gojson::encode(self)
    }
}

fn without_fractions(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => *value = Value::String(number.to_string()),
        Value::Array(items) => items.iter_mut().for_each(without_fractions),
        Value::Object(fields) => fields.values_mut().for_each(without_fractions),
        _ => {}
    }
}

fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(items) => items.iter().any(has_fraction),
        Value::Object(fields) => fields.values().any(has_fraction),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_policy_is_read_as_the_user_wrote_it() {
        let spec = json!({"podSelector": {}, "ingress": [{"ports": [{"port": 80, "endPort": 90}]}]});
        let policy = LocalPolicy::new("u-1".to_owned(), 3, vec![spec]);
        let bytes = policy.encode();
        assert_eq!(LocalPolicy::decode(&bytes).expect("valid"), policy);
        assert!(bytes.starts_with(br#"{"uid":"u-1","generation":3,"specs":[{"#), "{bytes:?}");
    }

    #[test]
    fn a_number_with_a_fraction_is_text_for_every_reader() {
        let policy = LocalPolicy::new(String::new(), 1, vec![json!({"ports": [1.5, 2]})]);
        assert_eq!(policy.specs, [json!({"ports": ["1.5", 2]})]);
        assert!(LocalPolicy::decode(br#"{"uid":"","generation":1,"specs":[{"a":1.5}]}"#).is_err());
    }

    #[test]
    fn a_policy_s_key_has_a_namespace_exactly_if_its_kind_has() {
        for text in
            ["networkpolicy/app/a", "ciliumnetworkpolicy/app/a.b", "ciliumclusterwidenetworkpolicy/-/a"]
        {
            assert_eq!(text.parse::<PolicyKey>().expect(text).to_string(), text);
        }
        for text in [
            "networkpolicy/-/a",
            "ciliumclusterwidenetworkpolicy/app/a",
            "networkpolicy/app",
            "networkpolicy/app/a/b",
            "NetworkPolicy/app/a",
            "other/app/a",
        ] {
            assert!(text.parse::<PolicyKey>().is_err(), "{text}");
        }
    }
}
