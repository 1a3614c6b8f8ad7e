//! What an object names is there: ConfigMaps and their keys, Secrets, ports, and what selectors select.

use serde_json::Value;

use super::Finding;
use super::object::{Objects, Pod, at, list, text};

/// Secrets that the clustermesh-apiserver makes, unless told that they come from elsewhere.
const MADE_BY_APISERVER: [&str; 6] = [
    "isthmus-ca",
    "clustermesh-apiserver-server-cert",
    "clustermesh-apiserver-remote-cert",
    "clustermesh-apiserver-admin-cert",
    "clustermesh-apiserver-local-cert",
    "isthmus-node-agent-cert",
];
/// Which the user of components/etcd-external brings along.
const BROUGHT: &str = "isthmus-etcd-client";

pub(super) fn check(objects: &Objects) -> Vec<Finding> {
    let pods = objects.pods();
    let mut findings: Vec<Finding> = pods.iter().flat_map(|pod| of_pod(objects, pod)).collect();
    for service in objects.of("Service") {
        findings.extend(of_service(&pods, service));
    }
    for kind in ["PodDisruptionBudget", "PodMonitor"] {
        for object in objects.of(kind) {
            findings.extend(selects(&pods, object, &object["spec"]["selector"]["matchLabels"]));
            for endpoint in list(&object["spec"]["podMetricsEndpoints"]) {
                let selected =
                    pods.iter().filter(|p| p.has_labels(&object["spec"]["selector"]["matchLabels"]));
                findings.extend(has_port(object, selected, &endpoint["port"]));
                let secret = text(&endpoint["authorization"]["credentials"]["name"]);
                if !is_made(objects, secret) {
                    findings.push(Finding::new(at(object), format!("nobody makes Secret {secret:?}")));
                }
            }
        }
    }
    for policy in objects.of("NetworkPolicy") {
        findings.extend(of_policy(&pods, policy));
    }
    findings
}

fn of_pod(objects: &Objects, pod: &Pod<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut missing = |at: &str, what: String| findings.push(Finding::new(at, what));
    for volume in list(&pod.spec["volumes"]) {
        if let Some(name) = volume["configMap"]["name"].as_str()
            && objects.find("ConfigMap", name).is_none()
        {
            missing(&pod.at, format!("there is no ConfigMap {name}"));
        }
        if let Some(name) = volume["secret"]["secretName"].as_str()
            && !is_made(objects, name)
        {
            missing(&pod.at, format!("nobody makes Secret {name:?}"));
        }
        if !volume["hostPath"].is_null() && text(&volume["hostPath"]["type"]).is_empty() {
            missing(&pod.at, format!("hostPath of volume {} has no type", text(&volume["name"])));
        }
    }
    let volumes = pod.volumes();
    for container in pod.containers() {
        for mount in list(&container.value["volumeMounts"]) {
            let name = text(&mount["name"]);
            if !volumes.contains(&name) {
                missing(&container.at, format!("there is no volume {name}"));
            }
        }
        for variable in list(&container.value["env"]) {
            let (name, key) = key_of(variable);
            if !name.is_empty()
                && objects.find("ConfigMap", name).is_none_or(|map| map["data"][key].is_null())
            {
                missing(&container.at, format!("ConfigMap {name} has no {key}"));
            }
        }
    }
    let volumes_used: Vec<&str> = pod
        .containers()
        .iter()
        .flat_map(|c| list(&c.value["volumeMounts"]))
        .map(|mount| text(&mount["name"]))
        .collect();
    for volume in volumes {
        if !volumes_used.contains(&volume) {
            missing(&pod.at, format!("nobody mounts volume {volume}"));
        }
    }
    findings
}

/// Name and key of the ConfigMap that a variable comes from.
fn key_of(variable: &Value) -> (&str, &str) {
    let from = &variable["valueFrom"]["configMapKeyRef"];
    (text(&from["name"]), text(&from["key"]))
}

/// Whether somebody makes a Secret of this name.
fn is_made(objects: &Objects, name: &str) -> bool {
    let certified = objects.of("Certificate").any(|c| c["spec"]["secretName"] == name);
    let external = objects
        .pods()
        .iter()
        .flat_map(Pod::containers)
        .any(|container| list(&container.value["args"]).any(|arg| arg == "--certificates=external"));
    let apiserver = !external && MADE_BY_APISERVER.contains(&name);
    let brought = name == BROUGHT && objects.find("StatefulSet", "isthmus-etcd").is_none();
    objects.find("Secret", name).is_some() || certified || apiserver || brought
}

fn of_service(pods: &[Pod<'_>], service: &Value) -> Vec<Finding> {
    let selector = &service["spec"]["selector"];
    let mut findings = selects(pods, service, selector);
    for port in list(&service["spec"]["ports"]) {
        let selected = pods.iter().filter(|pod| pod.has_labels(selector));
        findings.extend(has_port(service, selected, &port["targetPort"]));
    }
    findings
}

fn of_policy(pods: &[Pod<'_>], policy: &Value) -> Vec<Finding> {
    let own = &policy["spec"]["podSelector"]["matchLabels"];
    let mut findings = selects(pods, policy, own);
    for (rules, peers) in [("ingress", "from"), ("egress", "to")] {
        for rule in list(&policy["spec"][rules]) {
            let others: Vec<&Value> = list(&rule[peers]).map(|p| &p["podSelector"]["matchLabels"]).collect();
            for other in &others {
                findings.extend(selects(pods, policy, other));
            }
            // A port is the receiving side's.
            let receiving = if rules == "ingress" { vec![own] } else { others };
            for port in list(&rule["ports"]).map(|port| &port["port"]) {
                let selected =
                    pods.iter().filter(|pod| receiving.iter().any(|labels| pod.has_labels(labels)));
                findings.extend(has_port(policy, selected, port));
            }
        }
    }
    findings
}

fn selects(pods: &[Pod<'_>], object: &Value, labels: &Value) -> Vec<Finding> {
    match pods.iter().any(|pod| pod.has_labels(labels)) {
        true => Vec::new(),
        false => vec![Finding::new(at(object), format!("no pod has the labels {labels}"))],
    }
}

/// Named ports are looked for; numbers need no name.
fn has_port<'a>(
    object: &Value,
    mut selected: impl Iterator<Item = &'a Pod<'a>>,
    port: &Value,
) -> Option<Finding> {
    let name = port.as_str()?;
    let found = selected.any(|pod| pod.has_port(name));
    (!found).then(|| Finding::new(at(object), format!("no pod that it selects has a port {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
kind: ConfigMap
metadata: {name: c}
data: {k: v}
---
kind: Certificate
metadata: {name: s}
spec: {secretName: s}
---
kind: Deployment
metadata: {name: x}
spec:
  template:
    metadata: {labels: {app: x}}
    spec:
      containers:
      - name: x
        env: [{name: K, valueFrom: {configMapKeyRef: {name: c, key: k}}}]
        ports: [{name: http, containerPort: 80}]
        volumeMounts: [{name: a, mountPath: /a}, {name: b, mountPath: /b}, {name: h, mountPath: /h}]
      volumes:
      - {name: a, configMap: {name: c}}
      - {name: b, secret: {secretName: s}}
      - {name: h, hostPath: {path: /h, type: Directory}}
---
kind: Service
metadata: {name: x}
spec: {selector: {app: x}, ports: [{port: 80, targetPort: http}]}
---
kind: PodDisruptionBudget
metadata: {name: x}
spec: {selector: {matchLabels: {app: x}}}
---
kind: NetworkPolicy
metadata: {name: x}
spec: {podSelector: {matchLabels: {app: x}}, ingress: [{ports: [{port: http}]}]}
";

    fn findings(yaml: &str) -> Vec<String> {
        let objects = Objects::parse(yaml).expect("YAML");
        check(&objects).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_there_is_found() {
        assert_eq!(findings(GOOD), [""; 0]);
    }

    #[test]
    fn what_is_missing_is_named() {
        for (from, to, says) in [
            ("key: k}", "key: l}", "ConfigMap c has no l"),
            ("configMap: {name: c}", "configMap: {name: d}", "no ConfigMap d"),
            ("spec: {secretName: s}", "spec: {secretName: t}", "nobody makes Secret \"s\""),
            ("{name: b, mountPath: /b}, ", "", "nobody mounts volume b"),
            ("{name: b, mountPath: /b}", "{name: b, mountPath: /b}, {name: z, mountPath: /z}", "no volume z"),
            (", type: Directory", "", "has no type"),
            ("selector: {app: x}", "selector: {app: y}", "Service x: no pod has the labels"),
            ("targetPort: http", "targetPort: web", "port web"),
            (
                "spec: {selector: {matchLabels: {app: x}}}",
                "spec: {selector: {matchLabels: {app: y}}}",
                "Budget x",
            ),
            ("{port: http}", "{port: web}", "NetworkPolicy x: no pod that it selects has a port web"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let found = findings(&GOOD.replacen(from, to, 1));
            assert!(found.iter().any(|f| f.contains(says)), "{to}: {found:?}");
        }
    }

    #[test]
    fn the_apiserver_makes_certificates_only_where_nobody_else_does() {
        let own = GOOD.replace("secret: {secretName: s}", "secret: {secretName: isthmus-node-agent-cert}");
        assert_eq!(findings(&own), [""; 0]);
        let external =
            own.replace("      - name: x\n", "      - name: x\n        args: [--certificates=external]\n");
        let found = findings(&external);
        assert!(found.iter().any(|f| f.contains("isthmus-node-agent-cert")), "{found:?}");
    }
}
