//! `isthmus lab run --on kind`: what it asks of kind, docker and kubectl.
//!
//! These programs are small scripts here that write down how they were called and answer as far as a step needs an answer. So
//! this holds which commands are given, in which order, with which files, and that clusters are deleted whatever happens. It
//! does not hold that kind, Docker and a real Kubernetes do with them what is wanted: for that, run a scenario where they are.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const ONE: &str = "title: t
clusters:
- {name: alpha, id: 7, nodes: 2}
manifests:
- {file: web.yaml, clusters: [alpha]}
steps:
- wait: {clusters: [alpha], object: deployment/web, until: ready}
- annotate: {clusters: [alpha], object: service/web, set: {a: b, c: null}}
- label: {clusters: [alpha], object: service/web, set: {d: e}}
- scale: {clusters: [alpha], deployment: web, replicas: 3}
- request: {target: {from: alpha/client, service: web}, count: 2, answers: [alpha]}
- restart: alpha/alpha-node2/node-agent
- delete: {clusters: [alpha], object: service/web}
";

const WEB: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  template:
    spec:
      containers: [{name: echo, image: isthmus.io/echo}]
";

/// Writes down the program and its arguments, and what it is fed.
const RECORD: &str = "#!/bin/sh
printf '%s' \"$(basename \"$0\")\" >> \"$RECORD\"
printf ' %s' \"$@\" >> \"$RECORD\"
echo >> \"$RECORD\"
";

/// Answers as the API would, as far as the steps above and below need it. A pod that is deleted is followed by another.
const KUBECTL: &str = r#"
pod() {
    printf '{"metadata":{"name":"%s","uid":"%s"},"spec":{"nodeName":"isthmus-k-alpha-%s","containers":[]},"status":{"podIPs":[{"ip":"%s"}],"conditions":[{"type":"Ready","status":"True"}],"containerStatuses":[{"name":"c","image":"i","imageID":"","ready":true,"restartCount":0,"containerID":"containerd://id-of-%s"}]}}' "$1" "$1" "$2" "$3" "$1"
}
pods() {
    printf '{"items":['
    while :; do
        name=$1
        while grep -q "delete pod.* $name\$" "$RECORD"; do name=$name-next; done
        pod "$name" "$2" "$3"
        shift 3
        if [ $# = 0 ]; then break; fi
        printf ,
    done
    printf ']}'
}
case "$*" in
*--filename*-) sed 's/^/  | /' >> "$RECORD"; echo >> "$RECORD" ;;
*'--kustomize '*) cat "${*##*--kustomize }/kustomization.yaml" | sed 's/^/  | /' >> "$RECORD"; echo >> "$RECORD" ;;
*get*deployment/web) echo '{"metadata":{"generation":1},"spec":{"replicas":1,"selector":{},"template":{}},"status":{"observedGeneration":1,"replicas":1,"readyReplicas":1}}' ;;
*get*daemonset/isthmus-node-agent) echo '{"spec":{"selector":{"matchLabels":{"x":"agent"}}}}' ;;
*get*daemonset/isthmus-wireguard) echo '{"spec":{"selector":{"matchLabels":{"x":"wireguard"}}}}' ;;
*get*deployment/clustermesh-apiserver) echo '{"spec":{"selector":{"matchLabels":{"x":"api"}}}}' ;;
*get*--selector=x=agent*) pods agent-1 worker 10.1.0.1 agent-2 worker2 10.1.0.2 ;;
*get*--selector=x=wireguard*) pods wireguard-1 worker 10.1.0.1 wireguard-2 worker2 10.1.0.2 ;;
*get*--selector=x=api*) pods clustermesh-apiserver-a worker 10.1.1.5 clustermesh-apiserver-b worker2 10.1.2.5 clustermesh-apiserver-c worker 10.1.1.6 ;;
*get*pod/agent-1) pod agent-1 worker 10.1.0.1 ;;
*get*pod/clustermesh-apiserver-*) pod "${*##*pod/}" worker2 10.1.2.5 ;;
*get*lease/isthmus-clustermesh-apiserver) echo '{"spec":{"holderIdentity":"clustermesh-apiserver-b"}}' ;;
*get*nodes) echo '{"items":[{"metadata":{"name":"isthmus-k-alpha-worker"},"status":{"addresses":[{"type":"InternalIP","address":"172.18.0.3"},{"type":"Hostname","address":"x"}]}}]}' ;;
*get*pod/client) echo '{"metadata":{"name":"client"},"spec":{"nodeName":"isthmus-k-alpha-worker","containers":[]}}' ;;
*get*service/web) echo '{"spec":{"clusterIPs":["10.101.0.9"]}}' ;;
*exec*curl*) echo '{"cluster":"alpha","node":"n","pod":"p"}' ;;
esac
"#;

/// A folder with a scenario, a repository around it, and programs to be found first.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new(scenario: &str, programs: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Self { dir };
        for made in [
            "bin",
            "tmp",
            "kind-scenarios/s",
            "kustomize/overlays/kind",
            "kustomize/components/high-availability",
            "kustomize/components/encryption-strict",
        ] {
            std::fs::create_dir_all(place.at(made)).unwrap();
        }
        std::fs::write(place.at("kind-scenarios/s/scenario.yaml"), scenario).unwrap();
        std::fs::write(place.at("kind-scenarios/s/web.yaml"), WEB).unwrap();
        for (name, answers) in programs {
            let file = place.at("bin").join(name);
            std::fs::write(&file, format!("{RECORD}{answers}")).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        // What scripts are made of, and nothing else: this machine may have the real ones.
        for tool in ["sh", "basename", "sed", "cat", "grep"] {
            std::os::unix::fs::symlink(Path::new("/bin").join(tool), place.at("bin").join(tool)).unwrap();
        }
        place
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn run(&self) -> Output {
        self.run_with(&[])
    }

    fn run_with(&self, more: &[&str]) -> Output {
        let mut isthmus = Command::new(env!("CARGO_BIN_EXE_isthmus"));
        isthmus.args(["lab", "run", "--on", "kind", "--name", "k"]).arg(self.at("kind-scenarios/s"));
        // It calls itself for some steps: that is to be seen here as well.
        isthmus.args(more).env("ISTHMUS_BIN_DIR", self.at("bin"));
        isthmus.env("PATH", self.at("bin")).env("RECORD", self.at("record")).env("TMPDIR", self.at("tmp"));
        isthmus.current_dir(self.dir.path()).stdin(Stdio::null()).output().unwrap()
    }

    /// What was called, with the folder's name and the kubeconfig left out.
    fn record(&self) -> Vec<String> {
        let record = std::fs::read_to_string(self.at("record")).unwrap_or_default();
        let here = self.dir.path().canonicalize().unwrap();
        let short = |line: &str| {
            let line = line
                .replace(here.to_str().unwrap(), "HERE")
                .replace(self.dir.path().to_str().unwrap(), "HERE");
            let words = line.split(' ').map(|word| match word.split_once("/isthmus-kind-k-") {
                Some((_, rest)) => format!("STATE/{}", rest.split_once('/').map_or("", |(_, file)| file)),
                None => word.to_owned(),
            });
            words
                .collect::<Vec<_>>()
                .join(" ")
                .replace("--kubeconfig STATE/kubeconfig --context alpha", "@alpha")
        };
        record.lines().map(short).collect()
    }

    /// What was called once the clusters were there, without what was only asked of the API.
    fn done(&self) -> Vec<String> {
        let record = self.record();
        let up = record
            .iter()
            .rposition(|line| line.contains("rollout") && line.ends_with("180s daemonset/isthmus-wireguard"));
        let later = record.into_iter().skip(up.expect("the installation is waited for") + 1);
        later.filter(|line| !line.starts_with("  |") && !line.starts_with("kubectl @alpha get")).collect()
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

const ALL: [(&str, &str); 3] = [("kind", ""), ("docker", ""), ("kubectl", KUBECTL)];

/// The nodes, as Docker runs them.
const DOCKER: &str = r#"
case "$*" in
*conntrack*ipv4*) echo 'tcp 6 86399 ESTABLISHED src=172.18.0.3 dst=10.101.0.9 sport=47 dport=2379 src=10.1.1.5 dst=172.18.0.3 sport=2379 dport=47 [ASSURED] mark=0 use=1' ;;
esac
"#;

#[test]
fn a_machine_without_kind_is_told_what_to_get_before_anything_is_done() {
    let place = Place::new(ONE, &[]);
    let run = place.run();
    assert_eq!(run.status.code(), Some(2), "{}", text(&run));
    for part in [
        "kind is not installed",
        "docker is not installed",
        "kubectl is not installed",
        "https://kind.sigs.k8s.io",
    ] {
        assert!(text(&run).contains(part), "{part}: {}", text(&run));
    }
    assert!(std::fs::read_dir(place.at("tmp")).unwrap().next().is_none(), "nothing was made");
}

#[test]
fn a_docker_that_does_not_answer_is_named() {
    let place = Place::new(ONE, &[("kind", ""), ("docker", "exit 1"), ("kubectl", KUBECTL)]);
    let run = place.run();
    assert_eq!(run.status.code(), Some(2), "{}", text(&run));
    assert!(text(&run).contains("docker does not answer"), "{}", text(&run));
    assert_eq!(place.record(), ["docker info"]);
}

#[test]
fn steps_about_daemons_that_kind_does_not_have_are_listed_before_anything_is_done() {
    let steps = "- kill: alpha/etcd\n- restart: alpha/alpha-node3/node-agent\n- kill: alpha/leader\n";
    let place = Place::new(&format!("{ONE}{steps}"), &ALL);
    let run = place.run();
    assert_eq!(run.status.code(), Some(2), "{}", text(&run));
    for part in ["needs the lab", "step 8 (kill alpha/etcd)", "step 9", "CLUSTER/NODE/node-agent"] {
        assert!(text(&run).contains(part), "{part}: {}", text(&run));
    }
    assert!(!text(&run).contains("step 10"), "{}", text(&run));
    assert!(place.record().is_empty(), "{:?}", place.record());
}

#[test]
fn who_captures_is_told_that_docker_has_to_be_on_this_machine() {
    let step =
        "- capture: {target: {from: alpha/client, service: web}, answers: [alpha], plaintext: unseen}\n";
    let elsewhere =
        "case \"$*\" in context*) echo ssh://me@elsewhere ;; info*) echo 'Debian [name=rootless]' ;; esac";
    let place =
        Place::new(&format!("{ONE}{step}"), &[("kind", ""), ("docker", elsewhere), ("kubectl", KUBECTL)]);
    let run = place.run();
    assert_eq!(run.status.code(), Some(2), "{}", text(&run));
    for part in ["ssh://me@elsewhere", "rootless Docker", "capture and forge"] {
        assert!(text(&run).contains(part), "{part}: {}", text(&run));
    }
    assert_eq!(
        place.record(),
        [
            "docker info",
            "docker context inspect --format {{.Endpoints.docker.Host}}",
            "docker info --format {{.OperatingSystem}} {{.SecurityOptions}}",
        ]
    );
}

#[test]
fn a_bridge_that_is_on_another_machine_is_missed_once_there_is_a_cluster_and_it_is_deleted() {
    let step =
        "- capture: {target: {from: alpha/client, service: web}, answers: [alpha], plaintext: unseen}\n";
    let docker = r#"case "$*" in
context*) echo unix:///var/run/docker.sock ;;
network*) echo '[{"Id":"0123456789abcdef0123","Options":{}}]' ;;
esac"#;
    let place =
        Place::new(&format!("{ONE}{step}"), &[("kind", ""), ("docker", docker), ("kubectl", KUBECTL)]);
    let run = place.run();
    assert_eq!(run.status.code(), Some(1), "{}", text(&run));
    assert!(text(&run).contains("br-0123456789ab, the bridge of Docker's network kind"), "{}", text(&run));
    let record = place.record();
    assert!(record.contains(&"docker network inspect kind".to_owned()), "{record:#?}");
    assert!(record.last().is_some_and(|last| last.starts_with("kind delete cluster")), "{record:#?}");
    assert!(!record.iter().any(|line| line.contains("--kustomize")), "nothing was installed: {record:#?}");
}

const THREE: &str = "title: t
clusters:
- {name: alpha, id: 7, nodes: 2, replicas: 3}
steps:
";

const CTR: &str = "ctr --namespace k8s.io tasks kill --signal";

#[test]
fn daemons_are_killed_paused_and_replaced_by_signals_to_their_containers_and_by_deleting_pods() {
    let steps = "
- kill: alpha/alpha-node1/gateway
- pause: alpha/leader
- resume: alpha/leader
- restart: alpha/alpha-node1/gateway
- restart: alpha/clustermesh-apiserver
- kill: alpha/alpha-node2/isthmus-wireguard
- pause: alpha/alpha-node1/node-agent
- resume: alpha/alpha-node1/node-agent
- kill: alpha/clustermesh-apiserver-2
";
    let place =
        Place::new(&format!("{THREE}{steps}"), &[("kind", ""), ("docker", DOCKER), ("kubectl", KUBECTL)]);
    let run = place.run();
    assert!(run.status.success(), "{}\n{}", text(&run), place.record().join("\n"));
    let worker = "docker exec isthmus-k-alpha-worker";
    let delete = "kubectl @alpha delete pod --namespace isthmus-system clustermesh-apiserver";
    let conntrack = "conntrack --dump --family ipv4 --proto tcp --state ESTABLISHED --orig-port-dst 2379";
    let expected = [
        format!("{worker} {conntrack}"),
        format!("{worker} {CTR} SIGKILL id-of-clustermesh-apiserver-a"),
        format!("{worker}2 {CTR} SIGSTOP id-of-clustermesh-apiserver-b"),
        format!("{worker}2 {CTR} SIGCONT id-of-clustermesh-apiserver-b"),
        // The one that was killed, whoever the agent reads from now.
        format!("{delete}-a"),
        format!("{delete}-a-next"),
        format!("{delete}-b"),
        format!("{delete}-c"),
        format!("{worker}2 {CTR} SIGKILL id-of-wireguard-2"),
        format!("{worker} {CTR} SIGSTOP id-of-agent-1"),
        format!("{worker} {CTR} SIGCONT id-of-agent-1"),
        format!("{worker} {CTR} SIGKILL id-of-clustermesh-apiserver-c-next"),
        "kind delete cluster --name isthmus-k-alpha --kubeconfig STATE/kubeconfig".to_owned(),
    ];
    assert_eq!(place.done(), expected, "in:\n{}", place.record().join("\n"));
}

#[test]
fn a_key_is_rotated_by_isthmus_and_encryption_changes_with_the_overlay_and_a_rollout() {
    let steps = "
- rotateKey: {node: alpha/alpha-node2, within: 40s}
- encryption: strict
- encryption: off
";
    let programs = [("kind", ""), ("docker", DOCKER), ("kubectl", KUBECTL), ("isthmus", "")];
    let place = Place::new(&format!("{THREE}{steps}"), &programs);
    let run = place.run();
    assert!(run.status.success(), "{}\n{}", text(&run), place.record().join("\n"));
    let apply = "kubectl @alpha apply --server-side --force-conflicts --field-manager isthmus-lab --kustomize STATE/alpha";
    let rollout = "kubectl @alpha rollout status --namespace isthmus-system --timeout=180s daemonset/isthmus-node-agent";
    assert_eq!(
        place.done(),
        [
            "isthmus rotate-key --kubeconfig STATE/kubeconfig isthmus-k-alpha-worker2 --context alpha --timeout 40",
            apply,
            rollout,
            apply,
            rollout,
            "kind delete cluster --name isthmus-k-alpha --kubeconfig STATE/kubeconfig",
        ]
    );
    let kustomizations: Vec<String> =
        place.record().into_iter().filter(|line| line.contains("kustomize.config.k8s.io")).collect();
    let [on, strict, off] = kustomizations.as_slice() else { panic!("{kustomizations:#?}") };
    let has = |text: &str, part: &str| text.contains(part);
    assert!(!has(on, "encryption"), "{on}");
    assert!(has(strict, "kustomize/components/encryption-strict"), "{strict}");
    assert!(has(off, "--encryption=off") && !has(off, "encryption-strict"), "{off}");
    assert!(kustomizations.iter().all(|text| has(text, "kustomize/components/high-availability")));
}

#[test]
fn a_daemon_that_its_kubelet_has_replaced_meanwhile_goes_on_already() {
    let steps = "- pause: alpha/leader\n- resume: alpha/leader\n";
    let replaced = KUBECTL.replace(r#"pod "${*##*pod/}" worker2"#, "pod another worker2");
    assert_ne!(replaced, KUBECTL);
    let place =
        Place::new(&format!("{THREE}{steps}"), &[("kind", ""), ("docker", DOCKER), ("kubectl", &replaced)]);
    let run = place.run();
    assert!(run.status.success(), "{}\n{}", text(&run), place.record().join("\n"));
    let done = place.done();
    assert!(done[0].contains("SIGSTOP") && !done.iter().any(|line| line.contains("SIGCONT")), "{done:#?}");
}

#[test]
fn a_step_that_fails_is_named_with_its_command_and_the_clusters_are_deleted() {
    let fails = format!("{DOCKER}case \"$*\" in *SIGKILL*) echo no running task found >&2; exit 1 ;; esac\n");
    let steps = "- say: the leader falls\n  kill: alpha/leader\n";
    let place =
        Place::new(&format!("{THREE}{steps}"), &[("kind", ""), ("docker", &fails), ("kubectl", KUBECTL)]);
    let run = place.run();
    assert_eq!(run.status.code(), Some(1), "{}", text(&run));
    for part in
        ["✘ the leader falls", "SIGKILL id-of-clustermesh-apiserver-b` failed", "no running task found"]
    {
        assert!(text(&run).contains(part), "{part}: {}", text(&run));
    }
    assert!(place.done().last().is_some_and(|last| last.starts_with("kind delete cluster")));
}

#[test]
fn what_is_cut_and_paused_at_the_end_is_mended_before_clusters_are_kept() {
    let steps = "
- pause: alpha/leader
- partition: {from: alpha, to: alpha, oneWay: true}
- scale: {clusters: [alpha], deployment: web, replicas: 3}
";
    // The last step fails, and so does the first thing that is mended.
    let kubectl = format!("{KUBECTL}case \"$*\" in *scale*) exit 1 ;; esac\n");
    let docker = format!("{DOCKER}case \"$*\" in *flush*) echo cannot flush >&2; exit 1 ;; esac\n");
    let place =
        Place::new(&format!("{THREE}{steps}"), &[("kind", ""), ("docker", &docker), ("kubectl", &kubectl)]);
    let run = place.run_with(&["--keep"]);
    assert_eq!(run.status.code(), Some(1), "{}", text(&run));
    let node = "docker exec isthmus-k-alpha-worker";
    let done: Vec<String> = place.done().into_iter().filter(|line| line.starts_with("docker")).collect();
    assert_eq!(
        done,
        [
            format!("{node}2 {CTR} SIGSTOP id-of-clustermesh-apiserver-b"),
            format!("{node} ip -4 route replace blackhole 172.18.0.3/32"),
            format!("{node} ip -4 route flush type blackhole exact 172.18.0.3/32"),
            format!("{node}2 {CTR} SIGCONT id-of-clustermesh-apiserver-b"),
        ]
    );
    assert!(!place.record().iter().any(|line| line.starts_with("kind delete")), "they are kept");
    for part in ["cannot flush", "kind delete cluster --name isthmus-k-alpha"] {
        assert!(text(&run).contains(part), "{part}: {}", text(&run));
    }
    // It is the test's to remove.
    assert!(std::fs::read_dir(place.at("tmp")).unwrap().next().is_some(), "the kubeconfig is kept");
}

#[test]
fn a_scenario_is_gone_through_with_kind_docker_and_kubectl_and_its_clusters_are_deleted() {
    let place = Place::new(ONE, &ALL);
    let run = place.run();
    assert!(run.status.success(), "{}\n{}", text(&run), place.record().join("\n"));
    let record = place.record();
    let called: Vec<&str> =
        record.iter().map(String::as_str).filter(|line| !line.starts_with("  |")).collect();
    let expected = [
        "docker info",
        "docker build --tag isthmus.io/clustermesh-apiserver:dev --file HERE/images/clustermesh-apiserver/Dockerfile HERE",
        "docker build --tag isthmus.io/node-agent:dev --file HERE/images/node-agent/Dockerfile HERE",
        "docker build --tag isthmus.io/echo --file HERE/kind-scenarios/images/Dockerfile --target echo HERE",
        "docker build --tag isthmus.io/client --file HERE/kind-scenarios/images/Dockerfile --target client HERE",
        "kind create cluster --name isthmus-k-alpha --wait 5m --config STATE/alpha.kind.yaml --kubeconfig STATE/kubeconfig",
        "kubectl --kubeconfig STATE/kubeconfig config rename-context kind-isthmus-k-alpha alpha",
        "kind load docker-image isthmus.io/clustermesh-apiserver:dev isthmus.io/node-agent:dev isthmus.io/echo isthmus.io/client --name isthmus-k-alpha",
        "kubectl @alpha apply --server-side --force-conflicts --field-manager isthmus-lab --kustomize STATE/alpha",
        "kubectl @alpha rollout status --namespace isthmus-system --timeout=180s deployment/clustermesh-apiserver",
        "kubectl @alpha rollout status --namespace isthmus-system --timeout=180s daemonset/isthmus-node-agent",
        "kubectl @alpha rollout status --namespace isthmus-system --timeout=180s daemonset/isthmus-wireguard",
        "kubectl @alpha apply --server-side --force-conflicts --field-manager isthmus-lab --filename -",
        "kubectl @alpha get --namespace default --ignore-not-found --output json deployment/web",
        "kubectl @alpha annotate --namespace default --overwrite service/web a=b c-",
        "kubectl @alpha label --namespace default --overwrite service/web d=e",
        "kubectl @alpha scale --namespace default deployment/web --replicas=3",
        "kubectl @alpha get --namespace default --ignore-not-found --output json pod/client",
        "kubectl @alpha get --namespace default --ignore-not-found --output json service/web",
        "kubectl @alpha exec --namespace default client -- curl --silent --show-error --fail --noproxy * --max-time 5 http://10.101.0.9:80/",
        "kubectl @alpha exec --namespace default client -- curl --silent --show-error --fail --noproxy * --max-time 5 http://10.101.0.9:80/",
        "kubectl @alpha get --namespace isthmus-system --ignore-not-found --output json daemonset/isthmus-node-agent",
        "kubectl @alpha get --namespace isthmus-system --output json --selector=x=agent pods",
        "kubectl @alpha delete pod --namespace isthmus-system agent-2",
        "kubectl @alpha get --namespace isthmus-system --output json --selector=x=agent pods",
        "kubectl @alpha delete --namespace default --wait=false service/web",
        "kind delete cluster --name isthmus-k-alpha --kubeconfig STATE/kubeconfig",
    ];
    for (called, expected) in called.iter().zip(&expected) {
        assert_eq!(called, expected, "in:\n{}", record.join("\n"));
    }
    assert_eq!(called.len(), expected.len(), "{called:#?}");
    let fed: String = record.iter().filter(|line| line.starts_with("  |")).cloned().collect();
    for part in [
        "../../../kustomize/overlays/kind",
        r#"\"cluster-name\":\"alpha\",\"cluster-id\":\"7\""#,
        r#"{"name":"LAB_CLUSTER","value":"alpha"}"#,
        r#""imagePullPolicy":"IfNotPresent""#,
    ] {
        assert!(fed.contains(part), "{part} is missing: {fed}");
    }
    assert!(std::fs::read_dir(place.at("tmp")).unwrap().next().is_none(), "the kubeconfig is gone");
}

#[test]
fn clusters_are_deleted_when_one_of_them_cannot_be_made() {
    let two = "title: t\nclusters:\n- {name: alpha, id: 1}\n- {name: beta, id: 2}\n";
    let fails = "case \"$*\" in *create*beta*) echo no space left >&2; exit 1;; esac\n";
    let place = Place::new(two, &[("kind", fails), ("docker", ""), ("kubectl", KUBECTL)]);
    let run = place.run();
    assert_eq!(run.status.code(), Some(1), "{}", text(&run));
    assert!(text(&run).contains("no space left"), "{}", text(&run));
    let record = place.record();
    let deleted: Vec<&String> = record.iter().filter(|line| line.starts_with("kind delete")).collect();
    assert_eq!(deleted.len(), 2, "also the one that was half made: {record:#?}");
}
