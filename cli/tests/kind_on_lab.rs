//! `isthmus lab run --on kind` where what it leads to is real: the wires, agents and pods of a lab. As root; the workspace's
//! programs must have been built (`cargo build --workspace --bins`).
//!
//! kind and Docker are scripts here, which answer for the nodes of a lab what they would answer for their own, and the lab is
//! what would have been installed. Real are the bridge that is listened to, the network namespaces that are entered, the packets
//! that are forged, the routes that cut clusters off from each other, the agents that are asked, and, by `kubectl` and
//! `isthmus rotate-key`, the Kubernetes API. The daemons of a lab are no pods: the steps that kill, pause and replace them, and
//! start agents with other flags, are left to `kind.rs`, which holds their commands.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use isthmus_lab::cleanup::Remains;
use isthmus_lab::names::LabName;
use isthmus_lab::report::Report;
use isthmus_lab::state::StateDir;

const LAB: &str = "c-kind";

const CLUSTERS: &str = "title: t
families: dual
clusters:
- {name: alpha, id: 1, nodes: 2}
- {name: beta, id: 2}
";

const STEPS: &str = "manifests:
- {file: rebel-base.yaml, clusters: [alpha, beta]}
- {file: client.yaml, clusters: [alpha, beta]}
steps:
- wait: {clusters: [alpha, beta], object: deployment/rebel-base, until: ready}
- wait: {clusters: [alpha, beta], object: pod/client, until: ready}
- scale: {clusters: [alpha], deployment: rebel-base, replicas: 0}
- request: {target: {from: alpha/client, service: rebel-base}, answers: [beta], within: 20s}
- capture:
    target: {from: alpha/client, service: rebel-base, family: ipv4}
    answers: [beta]
    plaintext: unseen
    within: 20s
- capture:
    target: {from: alpha/client, service: rebel-base, family: ipv6}
    answers: [beta]
    plaintext: unseen
    within: 20s
- forge: {node: beta/beta-node1, as: alpha/client, to: alpha/client}
- traffic: {name: steady, target: {from: alpha/client, service: rebel-base}}
- rotateKey: {node: beta/beta-node1, within: 60s}
- endTraffic: {name: steady}
- partition: {from: alpha, to: beta}
- request: {target: {from: alpha/client, service: rebel-base}, count: 1, answers: [], within: 30s}
- heal: {}
- request: {target: {from: alpha/client, service: rebel-base}, answers: [beta], within: 60s}
";

/// What all scripts begin with: this machine's own namespace for what wants the API, and kind's names of nodes replaced by the
/// lab's.
const BEGIN: &str = r#"#!/bin/bash
unset ISTHMUS_BIN_DIR
here="nsenter --net=@NET@ --"
args=("${@//isthmus-k-alpha-worker2/alpha-node2}")
args=("${args[@]//isthmus-k-alpha-worker/alpha-node1}")
args=("${args[@]//isthmus-k-beta-control-plane/beta-node1}")
set -- "${args[@]}"
"#;

const KIND: &str = r#"
case "$1" in
create) cp "@STATE@/all.kubeconfig" "${@: -1}" ;;
esac
"#;

/// The lab's API, and the lab's way into pods. What would be installed is there.
const KUBECTL: &str = r#"
case "$*" in
*rename-context*|*--kustomize*|*rollout*) ;;
*" exec "*) exec $here "@ISTHMUS@" lab exec --lab "@LAB@" "$4/$7/$8" -- "${@:10}" ;;
*) exec $here "@KUBECTL@" "$@" ;;
esac
"#;

/// The nodes of the lab as containers: a process, what runs in them, and the bridge of the first cluster for that of all.
const DOCKER: &str = r#"
first() { head -n 1 "$1/cgroup.procs"; }
cluster=${2%%-*}
case "$1 $3" in
context*) echo unix:///var/run/docker.sock ;;
"network kind") echo '[{"Id":"0123456789ab","Options":{"com.docker.network.bridge.name":"br-1"}}]' ;;
inspect*) first "@CGROUP@/${4%%-*}/$4/system/node-agent" ;;
"exec curl") exec curl --silent --fail --unix-socket "@STATE@/$cluster/$2/agent.sock" "${@: -1}" ;;
"exec crictl") echo "{\"info\":{\"pid\":$(first "$(sed -n 's/.*"cgroup": *"\([^"]*\)".*/\1/p' "@CLIENT@")")}}" ;;
"exec ip") exec nsenter --net="/run/netns/@HOST@$cluster.$2" -- "${@:3}" ;;
esac
"#;

/// Clusters are joined already.
const ISTHMUS: &str = r#"
case "$1" in
connect) ;;
*) exec $here "@ISTHMUS@" "$@" ;;
esac
"#;

/// Removes the lab at the end, and what an earlier, killed test left.
struct Clean(LabName);

impl Clean {
    fn new() -> Self {
        isthmus(&["lab", "down", LAB]);
        Self(LAB.parse().unwrap())
    }
}

impl Drop for Clean {
    fn drop(&mut self) {
        isthmus(&["lab", "down", self.0.as_str()]);
    }
}

fn isthmus(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isthmus")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The scenario's folder, and one with the programs.
fn write(dir: &Path, lab: &LabName) -> (PathBuf, PathBuf) {
    let (scenario, bin) = (dir.join("s"), dir.join("bin"));
    std::fs::create_dir(&scenario).unwrap();
    std::fs::create_dir(&bin).unwrap();
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind-scenarios/encryption");
    for file in ["rebel-base.yaml", "client.yaml"] {
        std::fs::copy(manifests.join(file), scenario.join(file)).unwrap();
    }
    std::fs::write(scenario.join("scenario.yaml"), format!("{CLUSTERS}{STEPS}")).unwrap();
    let state = StateDir::of(lab);
    let kubectl = isthmus_lab::programs::on_path("kubectl").expect("kubectl is installed by `make test`");
    let host = lab.host_netns("", "");
    for (name, script) in [("kind", KIND), ("kubectl", KUBECTL), ("docker", DOCKER), ("isthmus", ISTHMUS)] {
        let text = format!("{BEGIN}{script}")
            .replace("@NET@", &format!("/proc/{}/ns/net", std::process::id()))
            .replace("@STATE@", &state.path().to_string_lossy())
            .replace("@CGROUP@", &state.read().unwrap().cgroup.to_string_lossy())
            .replace("@CLIENT@", &state.pod("alpha", "default", "client").to_string_lossy())
            .replace("@HOST@", host.strip_suffix('.').unwrap())
            .replace("@LAB@", lab.as_str())
            .replace("@KUBECTL@", &kubectl.to_string_lossy())
            .replace("@ISTHMUS@", env!("CARGO_BIN_EXE_isthmus"));
        std::fs::write(bin.join(name), text).unwrap();
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    (scenario, bin)
}

#[test]
fn wires_are_tapped_and_cut_packets_forged_and_keys_rotated_as_on_kind() {
    let clean = Clean::new();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("scenario.yaml"), CLUSTERS).unwrap();
    let up = isthmus(&["lab", "up", &dir.path().to_string_lossy(), "--name", LAB]);
    assert!(up.status.success(), "{}", text(&up));
    let (scenario, bin) = write(dir.path(), &clean.0);

    // As on a machine with Docker: the bridge is in the namespace of whoever runs it.
    let mut run = Command::new("nsenter");
    run.arg(format!("--net=/run/netns/{}", clean.0.wan_netns())).arg("--").arg(env!("CARGO_BIN_EXE_isthmus"));
    run.args(["lab", "run", "--on", "kind", "--name", "k", "--report", "json"]).arg(scenario);
    let path = std::env::var("PATH").unwrap_or_default();
    run.env("PATH", format!("{}:{path}", bin.display())).env("ISTHMUS_BIN_DIR", &bin);
    let run = run.current_dir(repository).stdin(Stdio::null()).output().unwrap();
    assert!(run.status.success(), "{}", text(&run));

    let report: Report = serde_json::from_slice(&run.stdout).unwrap();
    assert!(report.passed && report.kubernetes == "kind", "{report:?}");
    let captured: Vec<_> = report.steps.iter().filter_map(|step| step.captured.as_ref()).collect();
    assert_eq!(captured.len(), 2, "{report:?}");
    assert!(captured.iter().all(|seen| seen.plain == 0 && seen.encrypted > 0), "{captured:?}");
    let nodes = [("alpha", "alpha-node1"), ("alpha", "alpha-node2"), ("beta", "beta-node1")];
    for (cluster, node) in nodes {
        let routes = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", clean.0.host_netns(cluster, node)))
            .args(["--", "ip", "route", "show", "type", "blackhole"])
            .output()
            .unwrap();
        assert!(routes.status.success() && routes.stdout.is_empty(), "{node}: {}", text(&routes));
    }

    let name = clean.0.clone();
    drop(clean);
    assert!(Remains::of(&name).none(), "{:?}", Remains::of(&name));
}
