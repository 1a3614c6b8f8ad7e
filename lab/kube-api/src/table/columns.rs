//! The columns of the built-in kinds, as `kubectl` shows them.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::{Cell, Column, Columns, JsonPath};

type Code = fn(&Value) -> Value;

/// The columns of a built-in resource.
pub fn builtin(group: &str, plural: &str) -> Columns {
    let rows: &[(&str, &str, i64, Code)] = match (group, plural) {
        ("", "pods") => &[
            ("Ready", "string", 0, |o| {
                let (ready, total) = container_counts(o);
                json!(format!("{ready}/{total}"))
            }),
            ("Status", "string", 0, |o| json!(pod_status(o))),
            ("Restarts", "string", 0, |o| json!(restarts(o).to_string())),
            ("Age", "string", 0, age),
            ("IP", "string", 1, |o| or_none(at(o, "/status/podIP"))),
            ("Node", "string", 1, |o| or_none(at(o, "/spec/nodeName"))),
            ("Nominated Node", "string", 1, |o| or_none(at(o, "/status/nominatedNodeName"))),
            ("Readiness Gates", "string", 1, |_| json!("<none>")),
        ],
        ("", "services") => &[
            ("Type", "string", 0, |o| at(o, "/spec/type")),
            ("Cluster-IP", "string", 0, |o| or_none(at(o, "/spec/clusterIP"))),
            ("External-IP", "string", 0, |o| json!(external_ip(o))),
            ("Port(s)", "string", 0, |o| json!(service_ports(o))),
            ("Age", "string", 0, age),
            ("Selector", "string", 1, |o| json!(labels_text(&o["spec"]["selector"]))),
        ],
        ("", "nodes") => &[
            ("Status", "string", 0, |o| json!(node_status(o))),
            ("Roles", "string", 0, |o| json!(node_roles(o))),
            ("Age", "string", 0, age),
            ("Version", "string", 0, |o| at(o, "/status/nodeInfo/kubeletVersion")),
            ("Internal-IP", "string", 1, |o| json!(node_address(o, "InternalIP"))),
            ("External-IP", "string", 1, |o| json!(node_address(o, "ExternalIP"))),
            ("OS-Image", "string", 1, |o| or_unknown(at(o, "/status/nodeInfo/osImage"))),
            ("Kernel-Version", "string", 1, |o| or_unknown(at(o, "/status/nodeInfo/kernelVersion"))),
            ("Container-Runtime", "string", 1, |o| {
                or_unknown(at(o, "/status/nodeInfo/containerRuntimeVersion"))
            }),
        ],
        ("", "namespaces") => {
            &[("Status", "string", 0, |o| at(o, "/status/phase")), ("Age", "string", 0, age)]
        }
        ("", "configmaps") => &[
            ("Data", "integer", 0, |o| json!(size(&o["data"]) + size(&o["binaryData"]))),
            ("Age", "string", 0, age),
        ],
        ("", "secrets") => &[
            ("Type", "string", 0, |o| at(o, "/type")),
            ("Data", "integer", 0, |o| json!(size(&o["data"]))),
            ("Age", "string", 0, age),
        ],
        ("", "events") => &[
            ("Last Seen", "string", 0, |o| {
                let time = ["lastTimestamp", "eventTime", "firstTimestamp"].map(|f| o.get(f));
                age_of(time.into_iter().flatten().find(|t| t.is_string()))
            }),
            ("Type", "string", 0, |o| at(o, "/type")),
            ("Reason", "string", 0, |o| at(o, "/reason")),
            ("Object", "string", 0, |o| {
                let of = |field: &str| o["involvedObject"][field].as_str().unwrap_or_default().to_owned();
                json!(format!("{}/{}", of("kind").to_lowercase(), of("name")))
            }),
            ("Message", "string", 0, |o| at(o, "/message")),
        ],
        ("apps", "deployments") => &[
            ("Ready", "string", 0, |o| {
                json!(format!("{}/{}", number(o, "/status/readyReplicas"), number(o, "/spec/replicas")))
            }),
            ("Up-to-date", "integer", 0, |o| json!(number(o, "/status/updatedReplicas"))),
            ("Available", "integer", 0, |o| json!(number(o, "/status/availableReplicas"))),
            ("Age", "string", 0, age),
            ("Containers", "string", 1, |o| json!(template_containers(o, "name"))),
            ("Images", "string", 1, |o| json!(template_containers(o, "image"))),
            ("Selector", "string", 1, |o| json!(labels_text(&o["spec"]["selector"]["matchLabels"]))),
        ],
        ("apps", "replicasets") => &[
            ("Desired", "integer", 0, |o| json!(number(o, "/spec/replicas"))),
            ("Current", "integer", 0, |o| json!(number(o, "/status/replicas"))),
            ("Ready", "integer", 0, |o| json!(number(o, "/status/readyReplicas"))),
            ("Age", "string", 0, age),
            ("Containers", "string", 1, |o| json!(template_containers(o, "name"))),
            ("Images", "string", 1, |o| json!(template_containers(o, "image"))),
            ("Selector", "string", 1, |o| json!(labels_text(&o["spec"]["selector"]["matchLabels"]))),
        ],
        ("apps", "statefulsets") => &[
            ("Ready", "string", 0, |o| {
                json!(format!("{}/{}", number(o, "/status/readyReplicas"), number(o, "/spec/replicas")))
            }),
            ("Age", "string", 0, age),
            ("Containers", "string", 1, |o| json!(template_containers(o, "name"))),
            ("Images", "string", 1, |o| json!(template_containers(o, "image"))),
        ],
        ("apps", "daemonsets") => &[
            ("Desired", "integer", 0, |o| json!(number(o, "/status/desiredNumberScheduled"))),
            ("Current", "integer", 0, |o| json!(number(o, "/status/currentNumberScheduled"))),
            ("Ready", "integer", 0, |o| json!(number(o, "/status/numberReady"))),
            ("Up-to-date", "integer", 0, |o| json!(number(o, "/status/updatedNumberScheduled"))),
            ("Available", "integer", 0, |o| json!(number(o, "/status/numberAvailable"))),
            ("Node Selector", "string", 0, |o| {
                json!(labels_text(&o["spec"]["template"]["spec"]["nodeSelector"]))
            }),
            ("Age", "string", 0, age),
        ],
        ("discovery.k8s.io", "endpointslices") => &[
            ("AddressType", "string", 0, |o| at(o, "/addressType")),
            ("Ports", "string", 0, |o| {
                json!(joined(items(&o["ports"]).map(|p| p["port"].to_string()), "<unset>"))
            }),
            ("Endpoints", "string", 0, |o| {
                let addresses = items(&o["endpoints"]).flat_map(|e| items(&e["addresses"]));
                json!(joined(addresses.filter_map(Value::as_str).map(str::to_owned), "<unset>"))
            }),
            ("Age", "string", 0, age),
        ],
        ("", "endpoints") => &[
            ("Endpoints", "string", 0, |o| {
                let addresses = items(&o["subsets"]).flat_map(|s| items(&s["addresses"]));
                json!(joined(addresses.filter_map(|a| a["ip"].as_str()).map(str::to_owned), "<none>"))
            }),
            ("Age", "string", 0, age),
        ],
        ("coordination.k8s.io", "leases") => {
            &[("Holder", "string", 0, |o| at(o, "/spec/holderIdentity")), ("Age", "string", 0, age)]
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => &[
            ("Role", "string", 0, |o| {
                let of = |field: &str| o["roleRef"][field].as_str().unwrap_or_default().to_owned();
                json!(format!("{}/{}", of("kind"), of("name")))
            }),
            ("Age", "string", 0, age),
        ],
        ("rbac.authorization.k8s.io", "roles" | "clusterroles")
        | ("apiextensions.k8s.io", "customresourcedefinitions") => {
            &[("Created At", "date", 0, |o| at(o, "/metadata/creationTimestamp"))]
        }
        _ => &[("Age", "string", 0, age)],
    };
    let rest =
        rows.iter().map(|&(name, kind, priority, code)| column(name, kind, priority, Cell::Code(code)));
    Columns(std::iter::once(name()).chain(rest).collect())
}

/// Name and age, for whatever has no columns of its own.
pub(super) fn plain() -> Columns {
    let created = JsonPath::parse(".metadata.creationTimestamp").expect("a path");
    Columns(vec![name(), column("Age", "date", 0, Cell::Age(created))])
}

/// The first column of every table.
pub(super) fn name() -> Column {
    let mut name = column("Name", "string", 0, Cell::Code(|o| at(o, "/metadata/name")));
    name.format = "name".to_owned();
    name
}

/// How long ago a time was, in the form of `kubectl`: `5s`, `3m20s`, `2d4h`.
pub(super) fn age_of(time: Option<&Value>) -> Value {
    let Some(time) = time.and_then(Value::as_str).and_then(|t| DateTime::parse_from_rfc3339(t).ok()) else {
        return json!("<unknown>");
    };
    json!(human_duration((Utc::now() - time.with_timezone(&Utc)).num_seconds().max(0)))
}

fn column(name: &str, kind: &str, priority: i64, cell: Cell) -> Column {
    Column {
        name: name.to_owned(),
        kind: kind.to_owned(),
        format: String::new(),
        description: String::new(),
        priority,
        cell,
    }
}

fn human_duration(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let two = |big: i64, unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big}{unit}"),
        small => format!("{big}{unit}{small}{small_unit}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        _ => two(days / 365, "y", days % 365, "d"),
    }
}

fn age(object: &Value) -> Value {
    age_of(object.pointer("/metadata/creationTimestamp"))
}

fn at(object: &Value, pointer: &str) -> Value {
    object.pointer(pointer).cloned().unwrap_or_else(|| json!(""))
}

fn or_none(value: Value) -> Value {
    if value == "" { json!("<none>") } else { value }
}

fn or_unknown(value: Value) -> Value {
    if value == "" { json!("<unknown>") } else { value }
}

fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

fn size(map: &Value) -> usize {
    map.as_object().map_or(0, |m| m.len())
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

/// The first three of a list and how many more, as `kubectl` has it.
fn joined(texts: impl Iterator<Item = String>, empty: &str) -> String {
    let all: Vec<String> = texts.collect();
    match all.len() {
        0 => empty.to_owned(),
        1..=3 => all.join(","),
        n => format!("{} + {} more...", all[..3].join(","), n - 3),
    }
}

fn labels_text(labels: &Value) -> String {
    let pairs = labels.as_object().into_iter().flatten();
    let all: Vec<String> = pairs.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    if all.is_empty() { "<none>".to_owned() } else { all.join(",") }
}

fn container_counts(pod: &Value) -> (usize, usize) {
    let ready = items(&pod["status"]["containerStatuses"]).filter(|c| c["ready"] == true).count();
    (ready, items(&pod["spec"]["containers"]).count())
}

fn restarts(pod: &Value) -> i64 {
    items(&pod["status"]["containerStatuses"]).filter_map(|c| c["restartCount"].as_i64()).sum()
}

fn pod_status(pod: &Value) -> String {
    if pod["metadata"].get("deletionTimestamp").is_some() {
        return "Terminating".to_owned();
    }
    let waiting = items(&pod["status"]["containerStatuses"])
        .flat_map(|c| [&c["state"]["waiting"]["reason"], &c["state"]["terminated"]["reason"]])
        .find_map(Value::as_str);
    let reason = waiting.or(pod["status"]["reason"].as_str()).or(pod["status"]["phase"].as_str());
    reason.unwrap_or("Unknown").to_owned()
}

fn external_ip(service: &Value) -> String {
    let spec = &service["spec"];
    let external = items(&spec["externalIPs"]).filter_map(Value::as_str);
    let balancers = items(&service["status"]["loadBalancer"]["ingress"])
        .filter_map(|i| i["ip"].as_str().or(i["hostname"].as_str()));
    let all: Vec<&str> = external.chain(balancers).collect();
    match spec["type"].as_str() {
        Some("ExternalName") => spec["externalName"].as_str().unwrap_or_default().to_owned(),
        Some("LoadBalancer") if all.is_empty() => "<pending>".to_owned(),
        _ if all.is_empty() => "<none>".to_owned(),
        _ => all.join(","),
    }
}

fn service_ports(service: &Value) -> String {
    let ports = items(&service["spec"]["ports"]).map(|port| {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        match port["nodePort"].as_u64() {
            Some(node_port) if node_port > 0 => format!("{}:{node_port}/{protocol}", port["port"]),
            _ => format!("{}/{protocol}", port["port"]),
        }
    });
    let all: Vec<String> = ports.collect();
    if all.is_empty() { "<none>".to_owned() } else { all.join(",") }
}

fn node_status(node: &Value) -> String {
    let ready = items(&node["status"]["conditions"]).find(|c| c["type"] == "Ready").map(|c| &c["status"]);
    let mut status = match ready.and_then(Value::as_str) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node["spec"]["unschedulable"] == true {
        status.push_str(",SchedulingDisabled");
    }
    status
}

fn node_roles(node: &Value) -> String {
    let labels = node["metadata"]["labels"].as_object().into_iter().flatten();
    let roles: Vec<&str> =
        labels.filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/")).collect();
    if roles.is_empty() { "<none>".to_owned() } else { roles.join(",") }
}

fn node_address(node: &Value, kind: &str) -> String {
    let address = items(&node["status"]["addresses"]).find(|a| a["type"] == kind);
    address.and_then(|a| a["address"].as_str()).unwrap_or("<none>").to_owned()
}

fn template_containers(object: &Value, field: &str) -> String {
    let containers = items(&object["spec"]["template"]["spec"]["containers"]);
    containers.filter_map(|c| c[field].as_str()).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_in_kubectl() {
        for (seconds, text) in [
            (5, "5s"),
            (119, "119s"),
            (200, "3m20s"),
            (240, "4m"),
            (3600, "60m"),
            (90_000, "25h"),
            (180_000, "2d2h"),
        ] {
            assert_eq!(human_duration(seconds), text);
        }
    }
}
