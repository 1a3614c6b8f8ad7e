//! The resources that a CustomResourceDefinition defines.

use serde_json::Value;

use super::{Resource, Scale};
use crate::schema::Schema;
use crate::status::Cause;
use crate::table::{Columns, JsonPath};

/// One resource per served version.
pub fn resources(crd: &Value) -> Result<Vec<Resource>, Vec<Cause>> {
    let spec = &crd["spec"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let texts = |value: &Value| value.as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    let mut resources = Vec::new();
    let mut causes = Vec::new();
    for (index, version) in spec["versions"].as_array().into_iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.versions[{index}].{name}");
        let schema = match version.pointer("/schema/openAPIV3Schema") {
            Some(schema) => Schema::of_custom_resource(schema).unwrap_or_else(|why| {
                causes.push(Cause::invalid(field("schema.openAPIV3Schema"), &Value::from("..."), &why));
                Schema::any()
            }),
            None => {
                causes.push(Cause::required(field("schema.openAPIV3Schema"), "schemas are required"));
                Schema::any()
            }
        };
        let columns = Columns::custom(&version["additionalPrinterColumns"]).unwrap_or_else(|why| {
            causes.push(Cause::invalid(field("additionalPrinterColumns"), &Value::from("..."), &why));
            Columns::plain()
        });
        let scale = match version.pointer("/subresources/scale") {
            Some(definition) => scale(definition)
                .map_err(|why| vec![Cause::invalid(field("subresources.scale"), definition, &why)])?,
            None => None,
        };
        if version["served"] == false {
            continue;
        }
        resources.push(Resource {
            group: group.clone(),
            version: text(&version["name"]),
            kind: text(&spec["names"]["kind"]),
            list_kind: text(&spec["names"]["listKind"]),
            singular: text(&spec["names"]["singular"]),
            short_names: texts(&spec["names"]["shortNames"]),
            categories: texts(&spec["names"]["categories"]),
            namespaced: spec["scope"] == "Namespaced",
            status: version.pointer("/subresources/status").is_some(),
            scale,
            actions: &[],
            schema,
            definition: definition_name(&group, &text(&version["name"]), &text(&spec["names"]["kind"])),
            custom_schema: version.pointer("/schema/openAPIV3Schema").cloned(),
            columns,
            path_segment_names: false,
            virtual_: false,
            custom: true,
            collection: format!("{group}/{plural}").into(),
            plural: plural.clone(),
        });
    }
    if causes.is_empty() { Ok(resources) } else { Err(causes) }
}

/// `io.cilium.v2.CiliumNode` of `cilium.io`, `v2`, `CiliumNode`.
fn definition_name(group: &str, version: &str, kind: &str) -> String {
    let reversed: Vec<&str> = group.rsplit('.').collect();
    format!("{}.{version}.{kind}", reversed.join("."))
}

fn scale(definition: &Value) -> Result<Option<Scale>, String> {
    let path = |field: &str| -> Result<Option<Vec<String>>, String> {
        let Some(text) = definition[field].as_str() else { return Ok(None) };
        let fields = JsonPath::parse(text)?.fields();
        fields.map(Some).ok_or_else(|| format!("{field} must be made of field names only"))
    };
    Ok(Some(Scale {
        spec_replicas: path("specReplicasPath")?.ok_or("specReplicasPath is required")?,
        status_replicas: path("statusReplicasPath")?.ok_or("statusReplicasPath is required")?,
        selector: path("labelSelectorPath")?,
    }))
}
