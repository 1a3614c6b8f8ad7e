//! A namespace as its cluster's agents read it: its labels are part of the identity of its pods.

use std::collections::BTreeMap;

use crate::gojson::{ByName, go_object};
use crate::value::{MAX_OBJECT_BYTES, json_value};

/// Prefix of the keys, without its trailing slash; the canary is `cilium/synced/<own cluster>/` followed by it.
pub const NAMESPACES: &str = "isthmus/namespaces/v1";

go_object! {
    /// A namespace of the own cluster.
    #[derive(Debug, Clone, PartialEq, Eq, Default)]
    pub struct LocalNamespace {
        /// Its labels.
        pub labels: BTreeMap<String, String> = "labels" always as ByName,
    }
}

json_value!(LocalNamespace, MAX_OBJECT_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_survives_the_wire() {
        let namespace = LocalNamespace { labels: BTreeMap::from([("team".to_owned(), "blue".to_owned())]) };
        assert_eq!(namespace.encode(), r#"{"labels":{"team":"blue"}}"#);
        assert_eq!(LocalNamespace::decode(&namespace.encode()).expect("valid"), namespace);
        assert_eq!(LocalNamespace::decode(b"{}").expect("valid"), LocalNamespace::default());
    }
}
