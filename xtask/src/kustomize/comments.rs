//! Every right has its reason above it.

use std::path::Path;

use super::Finding;
use super::render::read;

/// Files in which rights are given, and how the lines begin that do it.
const RIGHTS: [(&str, &[&str]); 8] = [
    ("kustomize/base/clustermesh-apiserver/rbac.yaml", RULE),
    ("kustomize/base/node-agent/rbac.yaml", RULE),
    ("kustomize/components/cert-manager/role.yaml", RULE),
    ("kustomize/components/source-cilium/role.yaml", RULE),
    ("kustomize/components/monitoring/rbac.yaml", RULE),
    ("kustomize/base/node-agent/daemonset.yaml", CONTAINER),
    ("kustomize/base/wireguard/daemonset.yaml", CONTAINER),
    ("kustomize/base/namespace.yaml", &["pod-security.kubernetes.io/enforce"]),
];
const RULE: &[&str] = &["- apiGroups", "- nonResourceURLs"];
/// Capabilities are in capital letters; mounts and what is the node's are named.
const CONTAINER: &[&str] = &[
    "- NET_",
    "- BPF",
    "- PERFMON",
    "- SYS_",
    "- {name: bpf-fs,",
    "- {name: cgroup,",
    "- {name: sysctl-net,",
    "- {name: state,",
    "- {name: run,",
    "- {name: wireguard,",
    "- {name: tun,",
    "- {name: uapi,",
    "hostNetwork",
    "hostPID",
    "seLinuxOptions",
    "appArmorProfile",
    "runAsUser",
];

pub(super) fn missing(workspace: &Path) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (file, rights) in RIGHTS {
        findings.extend(uncommented(file, &read(&workspace.join(file))?, rights));
    }
    Ok(findings)
}

fn uncommented(file: &str, text: &str, rights: &[&str]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut given = 0;
    let mut before = "";
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if rights.iter().any(|right| line.starts_with(right)) {
            given += 1;
            if !before.starts_with('#') {
                findings.push(Finding::new(
                    format!("{file}:{}", number + 1),
                    format!("a right without its reason in the line above: {line}"),
                ));
            }
        }
        before = line;
    }
    if given == 0 {
        findings.push(Finding::new(file, "gives no right that is looked for: look for others"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_without_a_reason_is_found() {
        let good = "rules:\n# So that.\n- apiGroups: [x]\n";
        assert_eq!(uncommented("f", good, RULE), []);
        let bad = uncommented("f", "rules:\n- apiGroups: [x]\n", RULE);
        assert_eq!(bad.len(), 1);
        assert!(bad[0].at == "f:2", "{bad:?}");
        assert_eq!(uncommented("f", "rules: []\n", RULE).len(), 1);
    }
}
