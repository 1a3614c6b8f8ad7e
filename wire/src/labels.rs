//! Labels of an identity, and the text form in which they travel.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;

use crate::ValueError;
use crate::error::bounded;

/// Source of labels that come from Kubernetes.
const SOURCE_K8S: &str = "k8s";
/// Source of a label that names none.
const SOURCE_UNSPECIFIED: &str = "unspec";

/// The label set of an identity. At most one label per key; ordered by key, which is the order on the wire.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Labels(BTreeMap<String, Label>);

/// One label without its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label {
    /// Who gave the label: `k8s`, `reserved`, `container`, ...
    pub source: String,
    /// Its value, often empty.
    pub value: String,
}

impl Labels {
    /// Label that tells which cluster an identity belongs to.
    pub const CLUSTER: &'static str = "io.cilium.k8s.policy.cluster";
    /// Label that tells the namespace.
    pub const NAMESPACE: &'static str = "io.kubernetes.pod.namespace";
    /// Label that tells the service account.
    pub const SERVICE_ACCOUNT: &'static str = "io.cilium.k8s.policy.serviceaccount";
    /// Prefix of the labels that repeat those of the namespace.
    pub const NAMESPACE_LABEL_PREFIX: &'static str = "io.cilium.k8s.namespace.labels.";
    /// Longest label list that is read, in bytes. Kubernetes bounds a pod's labels far below.
    pub const MAX_BYTES: usize = 64 << 10;

    /// A set without labels.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a label whose source is Kubernetes; replaces one of the same key.
    ///
    /// # Errors
    /// The text form has no escapes: neither part may hold `;`, nor the key `=`.
    pub fn insert_k8s(&mut self, key: &str, value: &str) -> Result<(), ValueError> {
        self.insert(SOURCE_K8S, key, value)
    }

    /// Adds a label; replaces one of the same key.
    ///
    /// # Errors
    /// The text form has no escapes: no part may hold `;`, the source no `:` or `=`, the key no `=`. The key must
    /// not be empty.
    pub fn insert(&mut self, source: &str, key: &str, value: &str) -> Result<(), ValueError> {
        let source = if source.is_empty() { SOURCE_UNSPECIFIED } else { source };
        let problem = if key.is_empty() {
            "a label without a key"
        } else if source.contains([':', '=', ';']) || key.contains(['=', ';']) || value.contains(';') {
            "a character that separates labels"
        } else {
            self.0.insert(key.to_owned(), Label { source: source.to_owned(), value: value.to_owned() });
            return Ok(());
        };
        Err(ValueError::field(format_args!("{source}:{key}"), problem))
    }

    /// The label of that key.
    pub fn get(&self, key: &str) -> Option<&Label> {
        self.0.get(key)
    }

    /// The value of that key, if the label comes from Kubernetes.
    pub fn k8s(&self, key: &str) -> Option<&str> {
        self.0.get(key).filter(|label| label.source == SOURCE_K8S).map(|label| label.value.as_str())
    }

    /// All labels, ordered by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Label)> {
        self.0.iter().map(|(key, label)| (key.as_str(), label))
    }

    /// Number of labels.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no label.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads `source:key=value;source:key=value;`, the value of an identity key.
    ///
    /// # Errors
    /// Too long, not UTF-8, a label without a key, or a key that occurs twice.
    pub fn decode(bytes: &[u8]) -> Result<Self, ValueError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(ValueError::TooLarge { size: bytes.len(), limit: Self::MAX_BYTES });
        }
        let text = std::str::from_utf8(bytes).map_err(|error| ValueError::field("labels", error))?;
        let mut labels = Self::new();
        for item in text.split(';').filter(|item| !item.is_empty()) {
            let (source, key, value) = split(item);
            if labels.0.contains_key(key) {
                return Err(ValueError::field(bounded(item), "the label occurs twice"));
            }
            labels.insert(source, key, value)?;
        }
        Ok(labels)
    }

    /// The text form, as bytes.
    pub fn encode(&self) -> Bytes {
        self.to_string().into()
    }
}

/// Source, key and value of one label. Without a `:` before the `=` there is no source; `$x` means `reserved:x`.
fn split(item: &str) -> (&str, &str, &str) {
    let (name, value) = item.split_once('=').unwrap_or((item, ""));
    match name.split_once(':') {
        Some((source, key)) => (source, key, value),
        None => match name.strip_prefix('$').or_else(|| name.strip_prefix("reserved.")) {
            Some(key) => ("reserved", key, value),
            None => (SOURCE_UNSPECIFIED, name, value),
        },
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(key, Label { source, value })| write!(f, "{source}:{key}={value};"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_emitted_in_the_order_of_their_keys_with_a_last_semicolon() {
        let mut labels = Labels::new();
        labels.insert_k8s("io.kubernetes.pod.namespace", "bar").expect("valid");
        labels.insert_k8s("app", "foo").expect("valid");
        labels.insert_k8s(Labels::CLUSTER, "cluster3").expect("valid");
        let text =
            "k8s:app=foo;k8s:io.cilium.k8s.policy.cluster=cluster3;k8s:io.kubernetes.pod.namespace=bar;";
        assert_eq!(labels.to_string(), text);
        assert_eq!(Labels::decode(text.as_bytes()).expect("valid"), labels);
    }

    #[test]
    fn a_source_is_told_from_a_colon_in_the_value() {
        let labels = Labels::decode(b"a=b:c;:d=;reserved:host;$world;k8s:e=x=y").expect("valid");
        assert_eq!(labels.get("a").expect("a").source, "unspec");
        assert_eq!(labels.get("a").expect("a").value, "b:c");
        assert_eq!(labels.get("d").expect("d").source, "unspec");
        assert_eq!(labels.get("host").expect("host").source, "reserved");
        assert_eq!(labels.get("world").expect("world").source, "reserved");
        assert_eq!(labels.k8s("e"), Some("x=y"));
        assert_eq!(labels.k8s("a"), None);
    }

    #[test]
    fn what_would_not_survive_the_text_form_is_refused() {
        let mut labels = Labels::new();
        assert!(labels.insert_k8s("a;k8s:b", "c").is_err());
        assert!(labels.insert_k8s("a", "b;k8s:c=d").is_err());
        assert!(labels.insert_k8s("", "b").is_err());
        assert!(Labels::decode(b"k8s:a=1;k8s:a=2;").is_err());
        assert!(Labels::decode(b"k8s:=1;").is_err());
        assert!(Labels::decode(&[0xff]).is_err());
    }
}
