//! Containers have the rights that they need and no others, run an image that is named, and ask for what they use; and
//! their pods may have the priority that they ask for.

use serde_json::{Value, json};

use super::Finding;
use super::object::{Container, Objects, Pod, list, text};

/// What containers that cannot do without may have more than others. Everything else that is not restricted is a finding, and so
/// is an exception that nobody makes use of.
struct Exception {
    container: &'static str,
    capabilities: &'static [&'static str],
    privileged: bool,
}

const EXCEPTIONS: [Exception; 3] = [
    Exception {
        container: "node-agent",
        capabilities: &["NET_ADMIN", "BPF", "PERFMON", "SYS_ADMIN", "SYS_PTRACE", "SYS_RESOURCE"],
        privileged: false,
    },
    Exception { container: "wireguard", capabilities: &["NET_ADMIN"], privileged: false },
    Exception { container: "mount-bpf-fs", capabilities: &[], privileged: true },
];
/// Pods that use their node's network and processes.
const ON_THE_NODE: [(&str, &str); 3] = [
    ("DaemonSet isthmus-node-agent", "hostNetwork"),
    ("DaemonSet isthmus-node-agent", "hostPID"),
    ("DaemonSet isthmus-wireguard", "hostNetwork"),
];

pub(super) fn check(objects: &Objects) -> Vec<Finding> {
    objects
        .pods()
        .iter()
        .flat_map(|pod| check_pod(pod).into_iter().chain(check_priority(pod, objects)))
        .collect()
}

/// Clusters may admit the system's priorities only to namespaces with a quota for them, as GKE does:
/// <https://kubernetes.io/docs/concepts/policy/resource-quotas/#limit-priority-class-consumption-by-default>
fn check_priority(pod: &Pod<'_>, objects: &Objects) -> Option<Finding> {
    let priority = text(&pod.spec["priorityClassName"]);
    let is_admitted = |quota: &Value| {
        let mut scopes = list(&quota["spec"]["scopeSelector"]["matchExpressions"]);
        text(&quota["metadata"]["namespace"]) == pod.namespace()
            && scopes.any(|scope| {
                scope["scopeName"] == "PriorityClass"
                    && list(&scope["values"]).any(|value| text(value) == priority)
            })
    };
    let finding = || Finding::new(&pod.at, format!("no ResourceQuota of its namespace is for {priority}"));
    (priority.starts_with("system-") && !objects.of("ResourceQuota").any(is_admitted)).then(finding)
}

fn check_pod(pod: &Pod<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut want = |right: bool, at: &str, problem: &str| {
        if !right {
            findings.push(Finding::new(at, problem));
        }
    };
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        let allowed = ON_THE_NODE.contains(&(pod.at.as_str(), field));
        want(allowed || pod.spec[field] != true, &pod.at, &format!("{field} is not for it"));
    }
    let seccomp = &pod.spec["securityContext"]["seccompProfile"]["type"];
    want(*seccomp == "RuntimeDefault", &pod.at, "its seccompProfile is not RuntimeDefault");
    let priority = text(&pod.spec["priorityClassName"]);
    want(priority.starts_with("system-"), &pod.at, "it has no priorityClassName of the system's");
    let containers = pod.containers();
    want(!containers.is_empty(), &pod.at, "it has no containers");
    for container in &containers {
        findings.extend(check_container(pod, container));
    }
    findings
}

fn check_container(pod: &Pod<'_>, container: &Container<'_>) -> Vec<Finding> {
    let mut problems: Vec<String> = Vec::new();
    let mut want = |right: bool, problem: &str| {
        if !right {
            problems.push(problem.to_owned());
        }
    };
    let value = container.value;
    let exception = EXCEPTIONS.iter().find(|e| value["name"] == e.container);
    let security = &value["securityContext"];

    want(is_pinned(text(&value["image"])), "its image has no tag, or `latest`");
    want(security["readOnlyRootFilesystem"] == true, "its root file system can be written");
    if exception.is_some_and(|e| e.privileged) {
        want(security["privileged"] == true, "it is an exception that it makes no use of");
    } else {
        want(security["privileged"] != true, "it is privileged");
        want(security["allowPrivilegeEscalation"] == false, "it may gain privileges");
        want(security["capabilities"]["drop"] == json!(["ALL"]), "it does not drop all capabilities");
    }
    let capabilities: Vec<&str> = list(&security["capabilities"]["add"]).map(text).collect();
    let allowed = exception.map_or(&[][..], |e| e.capabilities);
    want(capabilities == allowed, &format!("its capabilities are {capabilities:?} instead of {allowed:?}"));
    let of_pod = &pod.spec["securityContext"];
    let setting = |field: &str| if security[field].is_null() { &of_pod[field] } else { &security[field] };
    if exception.is_none() {
        want(*setting("runAsNonRoot") == true, "it may run as root");
        want(setting("runAsUser").as_u64().is_some_and(|id| id > 0), "it does not say which user it is");
    }

    let requests = &value["resources"]["requests"];
    want(requests["cpu"].is_string() && requests["memory"].is_string(), "it requests no cpu or no memory");
    if is_ours_to_probe(value) && list(&pod.spec["containers"]).any(|c| c == value) {
        want(value["startupProbe"].is_object(), "it has no startupProbe");
        let probes = value["livenessProbe"].is_object() || value["readinessProbe"].is_object();
        want(probes, "it has neither a livenessProbe nor a readinessProbe");
    }
    problems.into_iter().map(|problem| Finding::new(&container.at, problem)).collect()
}

/// A tag other than `latest`, or a digest.
fn is_pinned(image: &str) -> bool {
    let name = image.rsplit('/').next().unwrap_or(image);
    match name.split_once(['@', ':']) {
        Some((name, tag)) => !name.is_empty() && !tag.is_empty() && tag != "latest",
        None => false,
    }
}

/// Sidecars live and die with what they stand beside.
fn is_ours_to_probe(container: &Value) -> bool {
    !text(&container["image"]).contains("kube-rbac-proxy")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
kind: Deployment
metadata: {name: x}
spec:
  template:
    spec:
      priorityClassName: system-cluster-critical
      securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: x
        image: isthmus.io/x:1
        startupProbe: {exec: {command: [x]}}
        readinessProbe: {exec: {command: [x]}}
        resources: {requests: {cpu: 1m, memory: 1Mi}}
        securityContext:
          {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
---
kind: ResourceQuota
metadata: {name: y}
spec: {scopeSelector: {matchExpressions: [{scopeName: PriorityClass, values: [system-cluster-critical]}]}}
";

    fn findings(yaml: &str) -> Vec<String> {
        let objects = Objects::parse(yaml).expect("YAML");
        check(&objects).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_restricted_pod_is_fine() {
        assert_eq!(findings(GOOD), [""; 0]);
    }

    #[test]
    fn each_right_too_many_is_found() {
        for (from, to, says) in [
            ("x:1", "x:latest", "`latest`"),
            ("x:1", "x", "no tag"),
            ("isthmus.io/x:1", "localhost:5000/x", "no tag"),
            ("runAsNonRoot: true", "runAsNonRoot: false", "as root"),
            ("runAsUser: 65532, ", "", "which user"),
            ("type: RuntimeDefault", "type: Unconfined", "seccompProfile"),
            ("Escalation: false", "Escalation: true", "gain"),
            ("Filesystem: true", "Filesystem: false", "root file system"),
            ("{drop: [ALL]}", "{drop: [KILL]}", "drop all"),
            ("{drop: [ALL]}", "{drop: [ALL], add: [BPF]}", "[\"BPF\"]"),
            ("{allowPriv", "{privileged: true, allowPriv", "privileged"),
            ("      containers", "      hostNetwork: true\n      containers", "hostNetwork"),
            ("memory: 1Mi", "", "requests"),
            ("        startupProbe: {exec: {command: [x]}}\n", "", "startupProbe"),
            ("        readinessProbe: {exec: {command: [x]}}\n", "", "readinessProbe"),
            ("      priorityClassName: system-cluster-critical\n", "", "priorityClassName"),
            ("priorityClassName: system-cluster", "priorityClassName: system-node", "no ResourceQuota"),
            ("metadata: {name: y}", "metadata: {name: y, namespace: z}", "no ResourceQuota"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let found = findings(&GOOD.replace(from, to));
            assert!(found.len() == 1 && found[0].contains(says), "{to}: {found:?}");
        }
    }
}
