//! `isthmus lab run --on kind` where what it leads to is real: the wires, agents and pods of a lab. As root; the workspace's
//! programs must have been built (`cargo build --workspace --bins`).
//!
//! kind and Docker are scripts here, which answer for the nodes of a lab what they would answer for their own, and the lab is
//! what would have been installed. Real are the bridge that is listened to, the network namespaces that are entered, the packets
//! that are forged, the routes that cut clusters off from each other, the agents that are asked, and, by `kubectl` and
//! `isthmus rotate-key`, the Kubernetes API. The daemons of a lab are no pods: killed, paused and replaced are others here, by
//! the name of the installation's. Who leads and who serves an agent, and agents with other flags, are left to `kind.rs`, which
//! holds their commands.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use isthmus_lab::cleanup::Remains;
use isthmus_lab::names::LabName;
use isthmus_lab::report::Report;
use isthmus_lab::state::StateDir;

const LAB: &str = "c-kind";

/// In place of the apiservers: pods that the lab's kubelets run.
const APISERVERS: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: clustermesh-apiserver, namespace: isthmus-system}
spec:
  replicas: 3
  selector: {matchLabels: {app: in-place-of-apiservers}}
  template:
    metadata: {labels: {app: in-place-of-apiservers}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: isthmus.io/echo
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1}
";

const CLUSTERS: &str = "title: t
families: dual
clusters:
- {name: alpha, id: 1, nodes: 2}
- {name: beta, id: 2}
";

const STEPS: &str = "manifests:
- {file: rebel-base.yaml, clusters: [alpha, beta]}
- {file: client.yaml, clusters: [alpha, beta]}
- {file: apiservers.yaml, clusters: [alpha]}
steps:
- wait: {clusters: [alpha, beta], object: deployment/rebel-base, until: ready}
- wait: {clusters: [alpha, beta], object: pod/client, until: ready}
- scale: {clusters: [alpha], deployment: rebel-base, replicas: 0}
- request: {target: {from: alpha/client, service: rebel-base}, answers: [beta], within: 60s}
- capture:
    target: {from: alpha/client, service: rebel-base, family: ipv4}
    answers: [beta]
    plaintext: unseen
    within: 60s
- capture:
    target: {from: alpha/client, service: rebel-base, family: ipv6}
    answers: [beta]
    plaintext: unseen
    within: 60s
- forge: {node: beta/beta-node1, as: alpha/client, to: alpha/client}
- traffic: {name: steady, target: {from: alpha/client, service: rebel-base}}
- rotateKey: {node: beta/beta-node1, within: 60s}
- endTraffic: {name: steady}
- partition: {from: alpha, to: beta}
- request: {target: {from: alpha/client, service: rebel-base}, count: 1, answers: [], within: 30s}
- heal: {}
- request: {target: {from: alpha/client, service: rebel-base}, answers: [beta], within: 60s}
- wait:
    clusters: [alpha]
    object: deployment/clustermesh-apiserver
    namespace: isthmus-system
    until: ready
- kill: alpha/clustermesh-apiserver-0
- restart: alpha/clustermesh-apiserver-1
- pause: alpha/clustermesh-apiserver-2
- resume: alpha/clustermesh-apiserver-2
- restart: alpha/clustermesh-apiserver
";

/// A node that tells the truth: what it says arrives, which is not what is expected of one that forges.
const HONEST: &str = "steps:
- forge: {node: beta/beta-node1, as: beta/client, to: alpha/client, within: 10s}
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
"exec ctr")
    pid=$(first @CGROUP@/$cluster/$2/kubepods/*/*/${10#lab://})
    kill -s "${9#SIG}" "$pid"
    case "$9" in
    SIGSTOP) until grep -q '^State:.T' "/proc/$pid/status"; do sleep 0.01; done ;;
    SIGCONT) while grep -q '^State:.T' "/proc/$pid/status"; do sleep 0.01; done ;;
    esac
    echo "$9" >> "@SIGNALS@" ;;
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

/// The folder with the programs.
fn programs(dir: &Path, lab: &LabName) -> PathBuf {
    let bin = dir.join("bin");
    std::fs::create_dir(&bin).unwrap();
    let state = StateDir::of(lab);
    let kubectl = isthmus_lab::programs::on_path("kubectl").expect("kubectl is installed by `make test`");
    let host = lab.host_netns("", "");
    for (name, script) in [("kind", KIND), ("kubectl", KUBECTL), ("docker", DOCKER), ("isthmus", ISTHMUS)] {
        let text = format!("{BEGIN}{script}")
            .replace("@NET@", &format!("/proc/{}/ns/net", std::process::id()))
            .replace("@STATE@", &state.path().to_string_lossy())
            .replace("@CGROUP@", &state.read().unwrap().cgroup.to_string_lossy())
            .replace("@CLIENT@", &state.pod("alpha", "default", "client").to_string_lossy())
            .replace("@SIGNALS@", &dir.join("signals").to_string_lossy())
            .replace("@HOST@", host.strip_suffix('.').unwrap())
            .replace("@LAB@", lab.as_str())
            .replace("@KUBECTL@", &kubectl.to_string_lossy())
            .replace("@ISTHMUS@", env!("CARGO_BIN_EXE_isthmus"));
        std::fs::write(bin.join(name), text).unwrap();
        std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    bin
}

/// Runs steps as on a machine with Docker: the bridge is in the namespace of whoever runs them.
fn run(dir: &Path, lab: &LabName, steps: &str) -> Output {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let scenario = tempfile::tempdir_in(dir).unwrap();
    for file in ["rebel-base.yaml", "client.yaml"] {
        let manifest = repository.join("kind-scenarios/encryption").join(file);
        std::fs::copy(manifest, scenario.path().join(file)).unwrap();
    }
    std::fs::write(scenario.path().join("apiservers.yaml"), APISERVERS).unwrap();
    let clusters = CLUSTERS.replace("nodes: 2", "nodes: 2, replicas: 3");
    std::fs::write(scenario.path().join("scenario.yaml"), format!("{clusters}{steps}")).unwrap();
    let mut run = Command::new("nsenter");
    run.arg(format!("--net=/run/netns/{}", lab.wan_netns())).arg("--").arg(env!("CARGO_BIN_EXE_isthmus"));
    run.args(["lab", "run", "--on", "kind", "--name", "k", "--report", "json"]).arg(scenario.path());
    let (bin, path) = (dir.join("bin"), std::env::var("PATH").unwrap_or_default());
    run.env("PATH", format!("{}:{path}", bin.display())).env("ISTHMUS_BIN_DIR", bin);
    run.current_dir(repository).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn wires_are_tapped_and_cut_packets_forged_keys_rotated_and_daemons_replaced_as_on_kind() {
    let clean = Clean::new();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("scenario.yaml"), CLUSTERS).unwrap();
    let up = isthmus(&["lab", "up", &dir.path().to_string_lossy(), "--name", LAB]);
    assert!(up.status.success(), "{}", text(&up));
    programs(dir.path(), &clean.0);

    let all = run(dir.path(), &clean.0, STEPS);
    assert!(all.status.success(), "{}", text(&all));
    let report: Report = serde_json::from_slice(&all.stdout).unwrap();
    assert!(report.passed && report.kubernetes == "kind", "{report:?}");
    let captured: Vec<_> = report.steps.iter().filter_map(|step| step.captured.as_ref()).collect();
    assert_eq!(captured.len(), 2, "{report:?}");
    assert!(captured.iter().all(|seen| seen.plain == 0 && seen.encrypted > 0), "{captured:?}");
    let signals = std::fs::read_to_string(dir.path().join("signals")).unwrap();
    assert_eq!(signals.lines().collect::<Vec<_>>(), ["SIGKILL", "SIGSTOP", "SIGCONT"]);

    let honest = run(dir.path(), &clean.0, HONEST);
    assert_eq!(honest.status.code(), Some(1), "{}", text(&honest));
    assert!(text(&honest).contains(" packets in the name of 10.2."), "{}", text(&honest));

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
