//! Namespaces: their labels are part of every pod's identity, an annotation takes them out of the mesh.

use std::collections::BTreeMap;

use isthmus_wire::annotation::namespace_global;
use k8s_openapi::api::core::v1::Namespace;

use super::{Fact, Finding, Name, Source, annotation};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NamespaceFact {
    pub name: Name,
    pub labels: BTreeMap<String, String>,
    /// What the annotation says, if it is there.
    pub global: Option<bool>,
}

impl Fact for NamespaceFact {
    fn name(&self) -> &Name {
        &self.name
    }
}

impl Source for Namespace {
    type Fact = NamespaceFact;

    fn fact(self, findings: &mut Vec<Finding>) -> NamespaceFact {
        let (global, errors) = self.metadata.annotations.as_ref().map(namespace_global).unwrap_or_default();
        findings.extend(errors.iter().map(annotation));
        NamespaceFact { name: Name::of(&self), global, labels: self.metadata.labels.unwrap_or_default() }
    }
}
