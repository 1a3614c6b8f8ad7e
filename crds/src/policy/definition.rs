//! The definitions of both kinds of policies, compatible with Cilium's: same names, version, columns and fields.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::schema::{OptionalEnum, OptionalIntOrString, StructuralSchemaRewriter};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use schemars::transform::AddNullable;
use serde_json::{Value, json};

use super::Rule;

/// CiliumNetworkPolicy.
pub(crate) fn namespaced() -> CustomResourceDefinition {
    definition(
        "CiliumNetworkPolicy",
        "ciliumnetworkpolicies",
        &["cnp", "ciliumnp"],
        "Namespaced",
        "Who may talk to the endpoints of a namespace, and to whom they may talk.",
    )
}

/// CiliumClusterwideNetworkPolicy.
pub(crate) fn clusterwide() -> CustomResourceDefinition {
    definition(
        "CiliumClusterwideNetworkPolicy",
        "ciliumclusterwidenetworkpolicies",
        &["ccnp"],
        "Cluster",
        "Who may talk to the endpoints of a cluster, and to whom they may talk.",
    )
}

/// Like that of CiliumIdentity it lacks the label with which Cilium marks the version of its schema, so that an operator
/// installed later puts its own in place.
fn definition(
    kind: &str,
    plural: &str,
    short_names: &[&str],
    scope: &str,
    description: &str,
) -> CustomResourceDefinition {
    let definition = json!({
        "metadata": {"name": format!("{plural}.cilium.io")},
        "spec": {
            "group": "cilium.io",
            "names": {
                "categories": ["cilium", "ciliumpolicy"],
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": plural,
                "shortNames": short_names,
                "singular": kind.to_lowercase(),
            },
            "scope": scope,
            "versions": [{
                "name": "v2",
                "served": true,
                "storage": true,
                "subresources": {"status": {}},
                "additionalPrinterColumns": [
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                    {
                        "name": "Valid",
                        "type": "string",
                        "jsonPath": ".status.conditions[?(@.type=='Valid')].status",
                    },
                ],
                "schema": {"openAPIV3Schema": schema(description)},
            }],
        },
    });
    // The value stands above, whole: that it is a definition is what the tests of this crate say.
    serde_json::from_value(definition).unwrap_or_default()
}

fn schema(description: &str) -> Value {
    let mut rule = schema_of::<Rule>();
    rule["oneOf"] = json!([{"required": ["endpointSelector"]}, {"required": ["nodeSelector"]}]);
    json!({
        "description": description,
        "type": "object",
        "required": ["metadata"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": rule,
            "specs": {"type": "array", "description": "Further rules, each as spec.", "items": rule},
            "status": status(),
        },
    })
}

/// Written by Isthmus and by Cilium, which adds fields of its own.
fn status() -> Value {
    let text = json!({"type": "string"});
    json!({
        "description": "What became of the policy.",
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "properties": {
            "conditions": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status"],
                    "properties": {
                        "type": text,
                        "status": text,
                        "reason": text,
                        "message": text,
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "observedGeneration": {"type": "integer", "format": "int64"},
                    },
                },
            },
        },
    })
}

/// The structural schema of a type, as kube's derive makes it of a `spec`.
fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    let generator = settings
        .with_transform(AddNullable::default())
        .with_transform(StructuralSchemaRewriter)
        .with_transform(OptionalEnum)
        .with_transform(OptionalIntOrString)
        .into_generator();
    let mut schema = generator.into_root_schema_for::<T>().to_value();
    tidy(&mut schema, true);
    schema
}

/// Takes out what an API server has no use for: titles, formats of Rust's integers, and that a field that may be left out may
/// also be null, which no field of Cilium's may. And lets every object keep fields that are not known, so that they are not
/// pruned but named in the policy's status.
fn tidy(schema: &mut Value, is_schema: bool) {
    match schema {
        Value::Object(fields) => {
            if is_schema {
                for idle in ["title", "nullable", "default", "$schema"] {
                    fields.remove(idle);
                }
                if fields.contains_key("properties") {
                    fields.insert("x-kubernetes-preserve-unknown-fields".to_owned(), Value::Bool(true));
                }
                if fields
                    .get("format")
                    .and_then(Value::as_str)
                    .is_some_and(|format| format.starts_with("uint"))
                {
                    fields.remove("format");
                }
            }
            for (name, inner) in fields {
                // Below `properties` stand fields of the object, whatever they are called.
                tidy(inner, name != "properties");
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| tidy(item, true)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an API server demands of every place of a schema: a type, or a number-or-text, or anything at all.
    /// <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>
    fn assert_structural(path: &str, schema: &Value) {
        let anything = schema["x-kubernetes-preserve-unknown-fields"] == true;
        let number_or_text = schema["x-kubernetes-int-or-string"] == true;
        assert!(schema["type"].is_string() || anything || number_or_text, "{path} has no type");
        for junction in ["oneOf", "anyOf", "allOf", "not"] {
            for inner in schema[junction].as_array().into_iter().flatten() {
                let only_required =
                    inner.as_object().is_some_and(|inner| inner.keys().all(|key| key == "required"));
                assert!(only_required, "{path}.{junction} says more than it may");
            }
        }
        assert!(schema["$ref"].is_null() && schema["nullable"].is_null(), "{path}");
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            assert_structural(&format!("{path}.{name}"), inner);
        }
        for inner in ["items", "additionalProperties"] {
            if schema[inner].is_object() {
                assert_structural(&format!("{path}.{inner}"), &schema[inner]);
            }
        }
    }

    #[test]
    fn the_schemas_are_structural_and_keep_what_they_do_not_know() {
        for definition in [namespaced(), clusterwide()] {
            let version = &serde_json::to_value(&definition).expect("JSON")["spec"]["versions"][0];
            let schema = &version["schema"]["openAPIV3Schema"];
            assert_structural("", schema);
            assert_eq!(version["subresources"]["status"], json!({}));
            for rule in [&schema["properties"]["spec"], &schema["properties"]["specs"]["items"]] {
                let peer = &rule["properties"]["egress"]["items"];
                for open in [
                    rule,
                    peer,
                    &peer["properties"]["toPorts"]["items"],
                    &rule["properties"]["enableDefaultDeny"],
                ] {
                    assert_eq!(open["x-kubernetes-preserve-unknown-fields"], true, "{open}");
                }
                let entities =
                    &rule["properties"]["ingress"]["items"]["properties"]["fromEntities"]["items"]["enum"];
                assert_eq!(entities.as_array().map(Vec::len), Some(13));
            }
        }
        assert_eq!(namespaced().spec.scope, "Namespaced");
        assert_eq!(clusterwide().spec.names.short_names, Some(vec!["ccnp".to_owned()]));
    }
}
