//! `CiliumIdentity`: a numeric identity and the label set it stands for.

use std::collections::BTreeMap;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition, CustomResourceDefinitionNames,
    CustomResourceDefinitionSpec, CustomResourceDefinitionVersion, CustomResourceValidation, JSONSchemaProps,
    JSONSchemaPropsOrBool,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{ClusterResourceScope, TypeMeta};
use serde::{Deserialize, Serialize};

use crate::resource::cilium_resource;

/// The label that says who made an object.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// The value of [`MANAGED_BY_LABEL`] on identities that Isthmus allocated, the only ones it ever deletes.
pub const MANAGED_BY: &str = "isthmus";
/// The label that `kubectl get ciliumidentities` shows as the namespace.
pub const POD_NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";

/// A numeric identity, persisted: the object's name is the number in decimal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CiliumIdentity {
    /// `apiVersion` and `kind`; absent on the items of some lists.
    #[serde(flatten, default)]
    pub types: Option<TypeMeta>,
    /// The name is the numeric identity.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// The label set, each key prefixed with its source: `k8s:app` → `echo`.
    #[serde(rename = "security-labels", default)]
    pub security_labels: BTreeMap<String, String>,
}

impl CiliumIdentity {
    /// An object to create, marked as allocated by Isthmus.
    pub fn new(id: u32, namespace: Option<&str>, security_labels: BTreeMap<String, String>) -> Self {
        let mut labels = BTreeMap::from([(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned())]);
        if let Some(namespace) = namespace {
            labels.insert(POD_NAMESPACE_LABEL.to_owned(), namespace.to_owned());
        }
        Self {
            types: Some(TypeMeta { api_version: "cilium.io/v2".into(), kind: "CiliumIdentity".into() }),
            metadata: ObjectMeta {
                name: Some(id.to_string()),
                labels: Some(labels),
                ..ObjectMeta::default()
            },
            security_labels,
        }
    }

    /// Whether Isthmus allocated this identity.
    pub fn is_ours(&self) -> bool {
        self.metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(MANAGED_BY_LABEL))
            .is_some_and(|value| value == MANAGED_BY)
    }
}

cilium_resource!(CiliumIdentity, ClusterResourceScope, kind: "CiliumIdentity", plural: "ciliumidentities");

/// The definition, compatible with Cilium's: same name, names, version, columns and fields.
///
/// It lacks the label with which Cilium marks the version of its schema, so that an operator installed later sees it as
/// outdated and puts its own in place.
pub(crate) fn definition() -> CustomResourceDefinition {
    CustomResourceDefinition {
        metadata: ObjectMeta { name: Some("ciliumidentities.cilium.io".into()), ..ObjectMeta::default() },
        spec: CustomResourceDefinitionSpec {
            group: "cilium.io".into(),
            names: CustomResourceDefinitionNames {
                categories: Some(vec!["cilium".into()]),
                kind: "CiliumIdentity".into(),
                list_kind: Some("CiliumIdentityList".into()),
                plural: "ciliumidentities".into(),
                short_names: Some(vec!["ciliumid".into()]),
                singular: Some("ciliumidentity".into()),
            },
            scope: "Cluster".into(),
            versions: vec![CustomResourceDefinitionVersion {
                name: "v2".into(),
                served: true,
                storage: true,
                additional_printer_columns: Some(vec![
                    column("Namespace", "string", r".metadata.labels.io\.kubernetes\.pod\.namespace"),
                    column("Age", "date", ".metadata.creationTimestamp"),
                ]),
                schema: Some(CustomResourceValidation { open_api_v3_schema: Some(schema()) }),
                ..CustomResourceDefinitionVersion::default()
            }],
            ..CustomResourceDefinitionSpec::default()
        },
        status: None,
    }
}

fn column(name: &str, type_: &str, json_path: &str) -> CustomResourceColumnDefinition {
    CustomResourceColumnDefinition {
        name: name.into(),
        type_: type_.into(),
        json_path: json_path.into(),
        ..CustomResourceColumnDefinition::default()
    }
}

fn schema() -> JSONSchemaProps {
    let of_type = |type_: &str| JSONSchemaProps { type_: Some(type_.into()), ..JSONSchemaProps::default() };
    let security_labels = JSONSchemaProps {
        description: Some("The label set of this identity, each key prefixed with its source.".into()),
        additional_properties: Some(JSONSchemaPropsOrBool::Schema(Box::new(of_type("string")))),
        ..of_type("object")
    };
    JSONSchemaProps {
        description: Some(
            "A security identity: the name is its number, security-labels the label set that it stands for."
                .into(),
        ),
        properties: Some(BTreeMap::from([
            ("apiVersion".into(), of_type("string")),
            ("kind".into(), of_type("string")),
            ("metadata".into(), of_type("object")),
            ("security-labels".into(), security_labels),
        ])),
        required: Some(vec!["metadata".into(), "security-labels".into()]),
        ..of_type("object")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_written_by_cilium_is_read_and_known_not_to_be_ours() {
        let identity: CiliumIdentity = serde_json::from_value(serde_json::json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumIdentity",
            "metadata": {"name": "196915", "labels": {"io.kubernetes.pod.namespace": "app"}},
            "security-labels": {"k8s:app": "echo"},
            "status": {"nodes": {}},
        }))
        .expect("parse");
        assert_eq!(identity.metadata.name.as_deref(), Some("196915"));
        assert_eq!(identity.security_labels["k8s:app"], "echo");
        assert!(!identity.is_ours());
    }

    #[test]
    fn a_created_identity_carries_its_type_and_our_mark() {
        let identity =
            CiliumIdentity::new(65793, Some("app"), BTreeMap::from([("k8s:app".into(), "echo".into())]));
        assert_eq!(
            serde_json::to_value(&identity).expect("render"),
            serde_json::json!({
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumIdentity",
                "metadata": {
                    "name": "65793",
                    "labels": {"app.kubernetes.io/managed-by": "isthmus", "io.kubernetes.pod.namespace": "app"},
                },
                "security-labels": {"k8s:app": "echo"},
            })
        );
        assert!(identity.is_ours());
    }

    #[test]
    fn an_item_of_a_list_may_lack_its_type() {
        let identity: CiliumIdentity =
            serde_json::from_value(serde_json::json!({"metadata": {"name": "1"}})).expect("parse");
        assert!(identity.security_labels.is_empty());
    }
}
