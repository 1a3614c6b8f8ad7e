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
    let mut causes = check_pod(&with_claims(object), "spec.template.spec");
    causes.extend(check_rolling_update(object));
    let policy = &template["spec"]["restartPolicy"];
    if *policy != "Always" {
        causes.push(Cause::unsupported("spec.template.spec.restartPolicy", policy, &["Always"]));
    }
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

/// The template with the volumes that a StatefulSet claims for each of its pods.
fn with_claims(object: &Value) -> Value {
    let mut template = object["spec"]["template"].clone();
    let claims = object["spec"]["volumeClaimTemplates"].as_array().into_iter().flatten();
    let claimed: Vec<Value> = claims.map(|claim| json!({ "name": claim["metadata"]["name"] })).collect();
    if !claimed.is_empty() {
        let volumes = template["spec"]["volumes"].as_array().into_iter().flatten().cloned();
        template["spec"]["volumes"] = volumes.chain(claimed).collect();
    }
    template
}

/// An update has to be able to move: of what is there too much or too little, one at least. A DaemonSet has only one of both.
fn check_rolling_update(object: &Value) -> Vec<Cause> {
    let (name, of_daemons) = match object["kind"].as_str() {
        Some("Deployment") => ("strategy", false),
        Some("DaemonSet") => ("updateStrategy", true),
        _ => return Vec::new(),
    };
    let update = &object["spec"][name];
    if update["type"] != "RollingUpdate" {
        return Vec::new();
    }
    let is_none = |field: &str| {
        let value = &update["rollingUpdate"][field];
        value.is_null() || *value == 0 || *value == "0%" || *value == "0"
    };
    let (unavailable, surge) = (!is_none("maxUnavailable"), !is_none("maxSurge"));
    let field = format!("spec.{name}.rollingUpdate.maxUnavailable");
    let value = &update["rollingUpdate"]["maxUnavailable"];
    if !unavailable && !surge {
        return vec![Cause::invalid(field, value, "may not be 0 when `maxSurge` is 0")];
    }
    if of_daemons && unavailable && surge {
        return vec![Cause::invalid(field, value, "may not be set when `maxSurge` is")];
    }
    Vec::new()
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
                let on_host = &port["hostPort"];
                if spec["hostNetwork"] == true && !on_host.is_null() && *on_host != port["containerPort"] {
                    let field = field(&format!("ports[{at}].hostPort"));
                    let rule = "must match `containerPort` when `hostNetwork` is true";
                    causes.push(Cause::invalid(field, on_host, rule));
                }
            }
            causes.extend(check_mounts(spec, container, &format!("{path}.{list}[{index}]")));
            causes.extend(check_privileges(container, &format!("{path}.{list}[{index}]")));
            causes.extend(check_probes(container, &format!("{path}.{list}[{index}]")));
        }
    }
    let mut volumes = HashSet::new();
    for (index, volume) in spec["volumes"].as_array().into_iter().flatten().enumerate() {
        let field = format!("{path}.volumes[{index}].name");
        let name = volume["name"].as_str().unwrap_or_default();
        if let Some(why) = validate::dns1123_label(name) {
            causes.push(Cause::invalid(field, &volume["name"], &why));
        } else if !volumes.insert(name) {
            causes.push(Cause::duplicate(field, &volume["name"]));
        }
    }
    let policy = &spec["restartPolicy"];
    if !matches!(policy.as_str(), Some("Always" | "OnFailure" | "Never")) {
        let field = format!("{path}.restartPolicy");
        causes.push(Cause::unsupported(field, policy, &["Always", "OnFailure", "Never"]));
    }
    causes
}

/// Each volume is there, and each path is mounted once.
fn check_mounts(spec: &Value, container: &Value, path: &str) -> Vec<Cause> {
    let volumes: HashSet<&str> = spec["volumes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|volume| volume["name"].as_str())
        .collect();
    let mut paths = HashSet::new();
    let mut causes = Vec::new();
    for (index, mount) in container["volumeMounts"].as_array().into_iter().flatten().enumerate() {
        let field = |name: &str| format!("{path}.volumeMounts[{index}].{name}");
        if !mount["name"].as_str().is_some_and(|name| volumes.contains(name)) {
            causes.push(Cause::invalid(field("name"), &mount["name"], "Not found"));
        }
        match mount["mountPath"].as_str().unwrap_or_default() {
            "" => causes.push(Cause::required(field("mountPath"), "")),
            path if !paths.insert(path) => {
                causes.push(Cause::invalid(field("mountPath"), &mount["mountPath"], "must be unique"));
            }
            _ => {}
        }
        if mount["mountPropagation"] == "Bidirectional" && container["securityContext"]["privileged"] != true
        {
            let rule = "Bidirectional mount propagation is available only to privileged containers";
            causes.push(Cause::forbidden(field("mountPropagation"), rule));
        }
    }
    causes
}

/// What contradicts itself is refused.
fn check_privileges(container: &Value, path: &str) -> Vec<Cause> {
    let context = &container["securityContext"];
    let gains = context["privileged"] == true
        || context["capabilities"]["add"]
            .as_array()
            .is_some_and(|added| added.iter().any(|name| name == "CAP_SYS_ADMIN"));
    if context["allowPrivilegeEscalation"] == false && gains {
        let rule = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
        return vec![Cause::invalid(format!("{path}.securityContext"), context, rule)];
    }
    Vec::new()
}

fn check_probes(container: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let probe = &container[name];
        if probe.is_null() {
            continue;
        }
        let ways = ["exec", "httpGet", "tcpSocket", "grpc"];
        match ways.iter().filter(|way| !probe[**way].is_null()).count() {
            0 => causes.push(Cause::required(format!("{path}.{name}"), "must specify a handler type")),
            1 => {}
            _ => causes
                .push(Cause::forbidden(format!("{path}.{name}"), "may not specify more than 1 handler type")),
        }
        let successes = &probe["successThreshold"];
        if name != "readinessProbe" && !successes.is_null() && *successes != 1 {
            causes.push(Cause::invalid(format!("{path}.{name}.successThreshold"), successes, "must be 1"));
        }
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
