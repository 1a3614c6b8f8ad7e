//! Rights are on resources that there are, and everybody who has a token has rights bound to it, and needs them.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::Finding;
use super::object::{Objects, at, list, name, text};

/// Resources, as `group/plural[/subresource]`, that rules can be about.
pub(super) struct Known(BTreeSet<String>);

const VERBS: [&str; 8] = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"];
/// Cilium's own, whose definitions are Cilium's to install.
const CILIUM: [&str; 2] = ["cilium.io/ciliumnodes", "cilium.io/ciliumendpoints"];
/// What the API answers without keeping it.
const ANSWERED: [&str; 1] = ["authentication.k8s.io/tokenreviews"];

impl Known {
    /// Kubernetes' own, as far as the lab's API has them, and ours.
    pub(super) fn new(workspace: &Path) -> anyhow::Result<Self> {
        let mut known: BTreeSet<String> =
            CILIUM.iter().chain(&ANSWERED).map(|&name| name.to_owned()).collect();
        for resource in isthmus_kube_api::resource::builtin::resources() {
            known.insert(format!("{}/{}", resource.group, resource.plural));
        }
        let crds = super::render::render(workspace, "crds/yaml")?;
        for crd in crds.of("CustomResourceDefinition") {
            let spec = &crd["spec"];
            let resource = format!("{}/{}", text(&spec["group"]), text(&spec["names"]["plural"]));
            if list(&spec["versions"]).any(|version| !version["subresources"]["status"].is_null()) {
                known.insert(format!("{resource}/status"));
            }
            known.insert(resource);
        }
        Ok(Self(known))
    }
}

pub(super) fn check(objects: &Objects, known: &Known) -> Vec<Finding> {
    let mut findings = Vec::new();
    for kind in ["ClusterRole", "Role"] {
        for role in objects.of(kind) {
            findings.extend(list(&role["rules"]).flat_map(|rule| of_rule(role, rule, known)));
            if !bindings(objects).any(|binding| binds(binding, role)) {
                findings.push(Finding::new(at(role), "it is bound to nobody"));
            }
        }
    }
    for binding in bindings(objects) {
        let role = &binding["roleRef"];
        if objects.find(text(&role["kind"]), text(&role["name"])).is_none() {
            findings
                .push(Finding::new(at(binding), format!("there is no {} {}", role["kind"], role["name"])));
        }
        for subject in list(&binding["subjects"]) {
            let account = objects.find("ServiceAccount", text(&subject["name"]));
            let there = |account: &Value| account["metadata"]["namespace"] == subject["namespace"];
            if subject["kind"] != "ServiceAccount" || !account.is_some_and(there) {
                findings.push(Finding::new(at(binding), format!("there is no such subject: {subject}")));
            }
        }
    }
    findings.extend(accounts(objects));
    findings
}

fn of_rule(role: &Value, rule: &Value, known: &Known) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut wrong = |problem: String| findings.push(Finding::new(at(role), problem));
    let verbs: Vec<&str> = list(&rule["verbs"]).map(text).collect();
    for verb in verbs.iter().filter(|verb| !VERBS.contains(verb)) {
        wrong(format!("{verb:?} is no verb that a rule may have"));
    }
    for group in list(&rule["apiGroups"]).map(text) {
        for resource in list(&rule["resources"]).map(text) {
            if !known.0.contains(&format!("{group}/{resource}")) {
                wrong(format!("there is no resource {resource} in the group {group:?}"));
            }
        }
    }
    let named = list(&rule["resourceNames"]).next().is_some();
    if named && verbs.iter().any(|verb| ["create", "deletecollection"].contains(verb)) {
        wrong(
            "create and deletecollection cannot be limited to names: such a rule allows nothing".to_owned(),
        );
    }
    if list(&rule["resources"]).any(|r| r == "secrets") && role["kind"] == "ClusterRole" {
        wrong("Secrets of all namespaces are nobody's business here".to_owned());
    }
    findings
}

/// Whoever has a token uses it, and whoever has rights has a token.
fn accounts(objects: &Objects) -> Vec<Finding> {
    let mut findings = Vec::new();
    let pods = objects.pods();
    for pod in &pods {
        let account = text(&pod.spec["serviceAccountName"]);
        let token = pod.spec["automountServiceAccountToken"] != false;
        if account.is_empty() && token {
            findings.push(Finding::new(
                &pod.at,
                "it names no ServiceAccount and gets a token of the default one",
            ));
        }
        if !account.is_empty() && objects.find("ServiceAccount", account).is_none() {
            findings.push(Finding::new(&pod.at, format!("there is no ServiceAccount {account}")));
        }
        if token && !is_bound(objects, account) {
            findings
                .push(Finding::new(&pod.at, format!("ServiceAccount {account} has a token and no rights")));
        }
    }
    for account in objects.of("ServiceAccount") {
        let used = pods.iter().any(|pod| pod.spec["serviceAccountName"] == name(account));
        let token = objects.of("Secret").any(|secret| {
            secret["metadata"]["annotations"]["kubernetes.io/service-account.name"] == name(account)
        });
        if !used && !token {
            findings.push(Finding::new(at(account), "nobody uses it"));
        }
    }
    findings
}

fn is_bound(objects: &Objects, account: &str) -> bool {
    bindings(objects).any(|b| list(&b["subjects"]).any(|subject| subject["name"] == account))
}

fn bindings(objects: &Objects) -> impl Iterator<Item = &Value> {
    objects.of("ClusterRoleBinding").chain(objects.of("RoleBinding"))
}

fn binds(binding: &Value, role: &Value) -> bool {
    binding["roleRef"]["kind"] == role["kind"] && binding["roleRef"]["name"] == name(role)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
kind: ServiceAccount
metadata: {name: a, namespace: n}
---
kind: ClusterRole
metadata: {name: r}
rules: [{apiGroups: [''], resources: [pods], verbs: [get]}]
---
kind: ClusterRoleBinding
metadata: {name: b}
roleRef: {kind: ClusterRole, name: r}
subjects: [{kind: ServiceAccount, name: a, namespace: n}]
---
kind: Deployment
metadata: {name: x}
spec: {template: {spec: {serviceAccountName: a}}}
";

    fn findings(yaml: &str) -> Vec<String> {
        let known = Known(["/pods", "/secrets"].map(str::to_owned).into());
        let objects = Objects::parse(yaml).expect("YAML");
        check(&objects, &known).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_bound_account_that_is_used_is_fine() {
        assert_eq!(findings(GOOD), [""; 0]);
    }

    #[test]
    fn what_is_wrong_with_rights_is_named() {
        for (from, to, says) in [
            ("[pods]", "[pod]", "no resource pod "),
            ("['']", "[apps]", "in the group \"apps\""),
            ("[get]", "[read]", "no verb"),
            ("[get]", "['*']", "no verb"),
            ("[pods]", "[secrets]", "nobody's business"),
            ("verbs: [get]", "verbs: [create], resourceNames: [x]", "allows nothing"),
            ("ClusterRole, name: r", "ClusterRole, name: s", "there is no"),
            ("ClusterRole, name: r", "ClusterRole, name: s", "bound to nobody"),
            (
                "ServiceAccount, name: a, namespace: n",
                "ServiceAccount, name: a, namespace: m",
                "no such subject",
            ),
            ("serviceAccountName: a", "serviceAccountName: c", "no ServiceAccount c"),
            ("serviceAccountName: a", "serviceAccountName: c", "nobody uses it"),
            ("subjects: [{kind: ServiceAccount, name: a, namespace: n}]", "subjects: []", "no rights"),
            ("{serviceAccountName: a}", "{}", "default one"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let found = findings(&GOOD.replacen(from, to, 1));
            assert!(found.iter().any(|f| f.contains(says)), "{to}: {found:?}");
        }
    }
}
