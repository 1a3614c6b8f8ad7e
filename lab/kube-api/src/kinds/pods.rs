//! Pods, and the templates of pods in workloads.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::port_name;
use crate::status::Cause;
use crate::validate;

/// Defaults that depend on other fields.
pub(super) fn default_pod(pod: &mut Value) {
    let spec = &mut pod["spec"];
    default_spec(spec);
    // What the ServiceAccount admission does; there are no tokens to mount.
    let account = [&spec["serviceAccountName"], &spec["serviceAccount"]];
    let account = account.into_iter().find_map(|a| a.as_str().filter(|a| !a.is_empty()));
    let account = json!(account.unwrap_or("default"));
    spec["serviceAccountName"] = account.clone();
    spec["serviceAccount"] = account;
    if spec.get("enableServiceLinks").is_none() {
        spec["enableServiceLinks"] = json!(true);
    }
    if pod["status"].get("qosClass").is_none() {
        pod["status"]["qosClass"] = json!(qos_class(&pod["spec"]));
    }
}

/// Completes and checks a Deployment, ReplicaSet, StatefulSet or DaemonSet.
pub(super) fn prepare_workload(object: &mut Value) -> Vec<Cause> {
    if !object["spec"]["template"].is_object() {
        return Vec::new();
    }
    default_spec(&mut object["spec"]["template"]["spec"]);
    if object["kind"] == "Deployment" {
        let strategy = &mut object["spec"]["strategy"];
        if strategy["type"] == "RollingUpdate" && strategy.get("rollingUpdate").is_none() {
            strategy["rollingUpdate"] = json!({ "maxSurge": "25%", "maxUnavailable": "25%" });
        }
    }
    let template = &object["spec"]["template"];
    let mut causes = check_pod(template, "spec.template.spec");
    if let Some(replicas) = object["spec"]["replicas"].as_i64().filter(|n| *n < 0) {
        let rule = "must be greater than or equal to 0";
        causes.push(Cause::invalid("spec.replicas", &json!(replicas), rule));
    }
    let wanted = object["spec"]["selector"]["matchLabels"].as_object();
    let labels = &template["metadata"]["labels"];
    if wanted.is_none_or(|w| w.is_empty()) && object["spec"]["selector"]["matchExpressions"].is_null() {
        let rule = "empty selector is invalid for deployment";
        causes.push(Cause::invalid("spec.selector", &object["spec"]["selector"], rule));
    } else if wanted.into_iter().flatten().any(|(key, value)| labels.get(key) != Some(value)) {
        let rule = "`selector` does not match template `labels`";
        causes.push(Cause::invalid("spec.template.metadata.labels", labels, rule));
    }
    causes
}

/// What is wrong with the pod's spec, which is found at `path`.
pub(super) fn check_pod(pod: &Value, path: &str) -> Vec<Cause> {
    let spec = &pod["spec"];
    let mut causes = Vec::new();
    let mut names = HashSet::new();
    if spec["containers"].as_array().is_none_or(Vec::is_empty) {
        causes.push(Cause::required(format!("{path}.containers"), ""));
    }
    for list in ["containers", "initContainers"] {
        for (index, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            let field = |name: &str| format!("{path}.{list}[{index}].{name}");
            let name = container["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                causes.push(Cause::required(field("name"), ""));
            } else if let Some(why) = validate::dns1123_label(name) {
                causes.push(Cause::invalid(field("name"), &container["name"], &why));
            } else if !names.insert(name) {
                causes.push(Cause::duplicate(field("name"), &container["name"]));
            }
            if container["image"].as_str().unwrap_or_default().is_empty() {
                causes.push(Cause::required(field("image"), ""));
            }
            for (at, port) in container["ports"].as_array().into_iter().flatten().enumerate() {
                causes.extend(port_name(field(&format!("ports[{at}].name")), &port["name"]));
                if !port["containerPort"].as_i64().is_some_and(|n| (1..=65535).contains(&n)) {
                    let field = field(&format!("ports[{at}].containerPort"));
                    let rule = "must be between 1 and 65535, inclusive";
                    causes.push(Cause::invalid(field, &port["containerPort"], rule));
                }
            }
        }
    }
    let policy = &spec["restartPolicy"];
    if !matches!(policy.as_str(), Some("Always" | "OnFailure" | "Never")) {
        let field = format!("{path}.restartPolicy");
        causes.push(Cause::unsupported(field, policy, &["Always", "OnFailure", "Never"]));
    }
    causes
}

/// A pod's spec is fixed but for a few fields.
pub(super) fn check_update(old: &Value, new: &Value) -> Vec<Cause> {
    let fixed = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        for field in
            ["activeDeadlineSeconds", "terminationGracePeriodSeconds", "tolerations", "schedulingGates"]
        {
            crate::api::forget(&mut spec, field);
        }
        for list in ["containers", "initContainers"] {
            for container in spec[list].as_array_mut().into_iter().flatten() {
                crate::api::forget(container, "image");
                crate::api::forget(container, "imagePullPolicy");
            }
            if spec[list].is_null() {
                crate::api::forget(&mut spec, list);
            }
        }
        spec
    };
    if fixed(old) == fixed(new) {
        return Vec::new();
    }
    let rule = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";
    vec![Cause::forbidden("spec", rule)]
}

fn default_spec(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    for list in ["containers", "initContainers"] {
        if let Some(containers) = spec.get_mut(list).and_then(Value::as_array_mut) {
            for container in containers {
                default_container(container);
            }
        }
    }
}

fn default_container(container: &mut Value) {
    if container.get("imagePullPolicy").is_none() {
        let image = container["image"].as_str().unwrap_or_default();
        let last = image.rsplit('/').next().unwrap_or(image);
        let latest = !last.contains(['@', ':']) || last.ends_with(":latest");
        container["imagePullPolicy"] = json!(if latest { "Always" } else { "IfNotPresent" });
    }
    // What is limited and not requested is requested.
    let limits = container["resources"]["limits"].as_object().cloned().unwrap_or_default();
    for (name, value) in limits {
        if container["resources"]["requests"].get(&name).is_none() {
            container["resources"]["requests"][&name] = value;
        }
    }
    if container["resources"].is_null() {
        container["resources"] = json!({});
    }
}

fn qos_class(spec: &Value) -> &'static str {
    let containers = || spec["containers"].as_array().into_iter().flatten();
    let of =
        |container: &Value, kind: &str| container["resources"][kind].as_object().cloned().unwrap_or_default();
    if containers().all(|c| of(c, "limits").is_empty() && of(c, "requests").is_empty()) {
        return "BestEffort";
    }
    let guaranteed = containers().all(|c| {
        let limits = of(c, "limits");
        limits.contains_key("cpu") && limits.contains_key("memory") && limits == of(c, "requests")
    });
    if guaranteed { "Guaranteed" } else { "Burstable" }
}
