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

/// Answers as the API would, as far as the steps above need it.
const KUBECTL: &str = r#"
case "$*" in
*--filename*-) sed 's/^/  | /' >> "$RECORD"; echo >> "$RECORD" ;;
*'--kustomize '*) cat "${*##*--kustomize }/kustomization.yaml" | sed 's/^/  | /' >> "$RECORD"; echo >> "$RECORD" ;;
*get*deployment/web) echo '{"metadata":{"generation":1},"spec":{"replicas":1,"selector":{},"template":{}},"status":{"observedGeneration":1,"replicas":1,"readyReplicas":1}}' ;;
*get*daemonset/*) echo '{"spec":{"selector":{"matchLabels":{"x":"y"}}}}' ;;
*get*--selector=x=y*) echo '{"items":[{"metadata":{"name":"agent-1"},"spec":{"nodeName":"isthmus-k-alpha-worker","containers":[]}},{"metadata":{"name":"agent-2"},"spec":{"nodeName":"isthmus-k-alpha-worker2","containers":[]}}]}' ;;
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
        for made in ["bin", "tmp", "kind-scenarios/s", "kustomize/overlays/kind"] {
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
        for tool in ["sh", "basename", "sed", "cat"] {
            std::os::unix::fs::symlink(Path::new("/bin").join(tool), place.at("bin").join(tool)).unwrap();
        }
        place
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn run(&self) -> Output {
        let mut isthmus = Command::new(env!("CARGO_BIN_EXE_isthmus"));
        isthmus.args(["lab", "run", "--on", "kind", "--name", "k"]).arg(self.at("kind-scenarios/s"));
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
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

const ALL: [(&str, &str); 3] = [("kind", ""), ("docker", ""), ("kubectl", KUBECTL)];

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
fn steps_that_need_the_lab_are_listed_before_anything_is_done() {
    let steps = "- kill: alpha/clustermesh-apiserver\n- encryption: strict\n";
    let place = Place::new(&format!("{ONE}{steps}"), &ALL);
    let run = place.run();
    assert_eq!(run.status.code(), Some(2), "{}", text(&run));
    for part in ["needs the lab", "step 8 (kill alpha/clustermesh-apiserver)", "step 9"] {
        assert!(text(&run).contains(part), "{part}: {}", text(&run));
    }
    assert!(place.record().is_empty(), "{:?}", place.record());
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
        "kubectl @alpha get --namespace isthmus-system --output json --selector=x=y pods",
        "kubectl @alpha delete pod --namespace isthmus-system agent-2",
        "kubectl @alpha rollout status --namespace isthmus-system --timeout=180s daemonset/isthmus-node-agent",
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
