//! `isthmus connect`, `disconnect`, `peers` and `status` against two Kubernetes APIs, as a user runs them.

#![allow(clippy::unwrap_used)]

mod cluster;
mod real;
mod refusing;

use std::process::Output;

use isthmus_crds::peer::{CONNECT_ANNOTATION, PeerSecret, Relation};
use k8s_openapi::api::core::v1::{Secret, Service};
use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use cluster::{Cluster, DEADLINE, NAMESPACE, Setup, info};
use refusing::refusing;

const ALPHA: Setup = Setup { name: "alpha", id: 1, net: 1 };
const BETA: Setup = Setup { name: "beta", id: 2, net: 2 };

/// Two clusters, and a kubeconfig with a context for each, and one for a cluster that is gone.
struct World {
    alpha: Cluster,
    beta: Cluster,
    folder: TempDir,
}

struct Answer {
    code: i32,
    out: String,
    err: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    #[track_caller]
    fn fails_saying(&self, what: &[&str]) {
        assert_eq!(self.code, 1, "{self}");
        for what in what {
            assert!(self.err.contains(what), "it says {what:?}: {self}");
        }
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit status {}\n{}\n{}", self.code, self.out, self.err)
    }
}

impl World {
    async fn start() -> Self {
        Self::of(Cluster::start(ALPHA).await, Cluster::start(BETA).await)
    }

    fn of(alpha: Cluster, beta: Cluster) -> Self {
        // A port that nobody listens on.
        let gone = isthmus_kube_api::ports::reserve().unwrap();
        let servers = [("alpha", &alpha.server), ("beta", &beta.server), ("gone", &format!("http://{gone}"))];
        let named = |name: &str, what: &str, value: Value| json!({"name": name, what: value});
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "kind-alpha",
            "clusters": servers.map(|(name, server)| named(name, "cluster", json!({"server": server}))),
            "users": [{"name": "me", "user": {}}],
            "contexts": servers.map(|(name, _)| {
                named(&format!("kind-{name}"), "context", json!({"cluster": name, "user": "me"}))
            }),
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config"), kubeconfig.to_string()).unwrap();
        Self { alpha, beta, folder }
    }

    /// From now on a cluster's API server is elsewhere.
    fn lead(&self, cluster: &str, server: &str) {
        let file = self.folder.path().join("config");
        let mut kubeconfig: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let clusters = kubeconfig["clusters"].as_array_mut().unwrap();
        let named = clusters.iter_mut().find(|named| named["name"] == cluster).unwrap();
        named["cluster"]["server"] = json!(server);
        std::fs::write(file, kubeconfig.to_string()).unwrap();
    }

    fn command(&self, args: &str) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_isthmus"));
        command.args(args.split_whitespace()).env("KUBECONFIG", self.folder.path().join("config"));
        command
            .env_remove("ISTHMUS_NAMESPACE")
            .env("LC_ALL", "C.UTF-8")
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn isthmus(&self, args: &str) -> Answer {
        let output =
            tokio::time::timeout(DEADLINE, self.command(args).output()).await.expect("an end").unwrap();
        let Output { status, stdout, stderr } = output;
        Answer {
            code: status.code().unwrap(),
            out: String::from_utf8(stdout).unwrap(),
            err: String::from_utf8(stderr).unwrap(),
        }
    }
}

const CONNECT: &str = "connect --context kind-alpha --destination-context kind-beta";
const DISCONNECT: &str = "disconnect --context kind-alpha --destination-context kind-beta";

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_are_connected_and_taken_apart_again() {
    let world = World::start().await;
    let first = world.isthmus(CONNECT).await;
    assert_eq!(first.code, 0, "{first}");
    for said in ["kind-alpha: Secret isthmus-system/peer-beta created", "kind-beta: alpha is Ready"] {
        assert!(first.err.contains(said), "{first}");
    }
    let row = first.out.lines().find(|line| line.starts_with("kind-alpha")).unwrap();
    assert!(
        row.contains("beta") && row.contains("yes") && row.contains("https://172.18.2.1:32379"),
        "{first}"
    );

    let known = world.alpha.secret("peer-beta").await.unwrap();
    let peer = PeerSecret::parse(&known).unwrap();
    assert!(peer.relation == Relation::Connected && peer.identity.is_none(), "no key has gone anywhere");
    assert_eq!(peer.endpoints[0].to_string(), "https://172.18.2.1:32379");
    assert_eq!(known.labels()["app.kubernetes.io/managed-by"], "isthmus-cli");

    let again = world.isthmus(&format!("{CONNECT} -o json")).await;
    assert_eq!(again.code, 0, "{again}");
    let report = again.json();
    assert_eq!(report["ready"], true);
    assert_eq!(
        report["secrets"],
        json!([
            {"context": "kind-alpha", "namespace": NAMESPACE, "name": "peer-beta", "peer": "beta",
             "relation": "connected", "change": "unchanged"},
            {"context": "kind-beta", "namespace": NAMESPACE, "name": "peer-alpha", "peer": "alpha",
             "relation": "connected", "change": "unchanged"},
        ])
    );
    assert_eq!(report["peers"][0]["peer"], "beta");
    assert_eq!(report["peers"][0]["counts"]["endpoints"], 4);
    let after = world.alpha.secret("peer-beta").await.unwrap();
    assert_eq!(after.resource_version(), known.resource_version(), "unchanged means untouched");

    let peers = world.isthmus("peers --context kind-alpha,kind-beta -o json").await;
    assert_eq!((peers.code, peers.json()["peers"].as_array().unwrap().len()), (0, 2), "{peers}");
    let status = world.isthmus("status --context kind-alpha,kind-beta").await;
    assert_eq!(status.code, 0, "{status}");

    let apart = world.isthmus(DISCONNECT).await;
    assert_eq!(apart.code, 0, "{apart}");
    assert!(apart.err.contains("nothing of beta is left"), "{apart}");
    let known = world.alpha.secret("peer-beta").await.unwrap();
    assert_eq!(known.annotations()[CONNECT_ANNOTATION], "false");
    assert_eq!(world.beta.peers().await, Vec::<String>::new());
    let again = world.isthmus(&format!("{DISCONNECT} -o json")).await;
    assert_eq!((again.code, &again.json()["secrets"][0]["change"]), (0, &json!("unchanged")), "{again}");

    let back = world.isthmus(CONNECT).await;
    assert!(back.code == 0 && back.err.contains("peer-beta updated"), "{back}");
    let forgotten = world.isthmus(&format!("{DISCONNECT} --delete")).await;
    assert_eq!(forgotten.code, 0, "{forgotten}");
    assert!(
        world.alpha.secret("peer-beta").await.is_none() && world.beta.secret("peer-alpha").await.is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_get_ready_is_told_of_with_the_reason() {
    let world = World::start().await;
    world.beta.set_healthy(false);
    let late = world.isthmus(&format!("{CONNECT} --wait-duration 3s")).await;
    late.fails_saying(&[
        "kind-alpha: beta is Ready",
        "not connected within 3 s",
        "kind-beta: alpha is not Ready: connection refused; is a firewall in between? (Unreachable)",
        "The Secrets stay",
    ]);
    let peers = world.isthmus("peers --context kind-beta").await;
    peers.fails_saying(&["is a firewall in between?"]);
    let status = world.isthmus("status --context kind-beta").await;
    assert_eq!(status.code, 1, "{status}");
    assert!(status.out.contains("1. ") && status.out.contains("is a firewall in between?"), "{status}");
    let json = world.isthmus(&format!("{CONNECT} --wait-duration 1s -o json")).await;
    assert_eq!((json.code, &json.json()["ready"]), (1, &json!(false)), "{json}");
    assert_eq!(json.err, "", "JSON is for programs");
    world.beta.set_healthy(true);
    let well = world.isthmus(CONNECT).await;
    assert_eq!(well.code, 0, "{well}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_waited_for_until_it_is_in_use_and_not_only_until_something_is_said() {
    let world = World::start().await;
    world.alpha.set_observing(true);
    assert_eq!(world.isthmus(CONNECT).await.code, 0);

    // Another CA, by which nothing that is seen of the peer changes. It has none in common with the former one.
    world.alpha.set_observing(false);
    world.beta.publish(&info("beta", 2)).await;
    world.isthmus(CONNECT).await.fails_saying(&["knows cluster beta by other CAs", "--force"]);
    let early = world.isthmus(&format!("{CONNECT} --force --wait-duration 3s")).await;
    early.fails_saying(&[
        "kind-alpha: Secret isthmus-system/peer-beta updated",
        "kind-alpha: beta is Ready as before its Secret was changed",
    ]);
    let again = world.isthmus(&format!("{CONNECT} --wait-duration 1s")).await;
    again.fails_saying(&["peer-beta unchanged", "beta is Ready as before its Secret was changed"]);
    world.alpha.set_observing(true);
    let used = world.isthmus(CONNECT).await;
    assert_eq!(used.code, 0, "{used}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_wait_says_what_stays() {
    let world = World::start().await;
    world.beta.set_healthy(false);
    let mut command = world.command(CONNECT);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap().cast_signed());
    let written = async {
        while world.beta.peers().await.is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, written).await.expect("the Secrets are written");
    // Interrupted until it has begun to wait, which alone ends it so.
    let ended = child.wait_with_output();
    let interrupt = async {
        loop {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    let output = tokio::select! {
        output = tokio::time::timeout(DEADLINE, ended) => output.expect("an end").unwrap(),
        () = interrupt => unreachable!("it has no end"),
    };
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("interrupted") && text.contains("The Secrets stay"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_speaks_against_it_is_told_at_once_and_nothing_is_written() {
    let alpha = Cluster::start(ALPHA).await;
    let beta = Cluster::start(Setup { name: "beta", id: 1, net: 1 }).await;
    let world = World::of(alpha, beta);
    let refused = world.isthmus(CONNECT).await;
    refused.fails_saying(&[
        "✗ kind-alpha, kind-beta: both clusters have id 1",
        "10.1.0.0/24 is used for pods in kind-alpha and for pods in kind-beta",
        "10.101.0.0/16 is used for Services in kind-alpha and for Services in kind-beta",
        "both have the InternalIP 172.18.1.1",
        "nothing was written; 4 of the above",
    ]);
    let json = world.isthmus(&format!("{CONNECT} -o json")).await;
    assert_eq!((json.code, json.json()["findings"].as_array().unwrap().len()), (1, 4), "{json}");
    assert!(
        world.alpha.secret("peer-beta").await.is_none() && world.beta.secret("peer-alpha").await.is_none()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn clusters_that_are_not_there_are_named_with_what_to_do() {
    let alpha = Cluster::start(ALPHA).await;
    let world = World::of(alpha, Cluster::without_isthmus(&BETA).await);
    world
        .isthmus(CONNECT)
        .await
        .fails_saying(&["✗ kind-beta: Isthmus is not installed", "kustomize/README.md"]);
    let gone = "connect --context kind-alpha --destination-context kind-gone,kind-none";
    world.isthmus(gone).await.fails_saying(&[
        "✗ kind-gone: cannot ask for the version: http://127.0.0.1:",
        "refuses connections",
        "is the cluster running",
        "✗ kind-none: the kubeconfig has no such context\n    → it has kind-alpha, kind-beta, kind-gone",
    ]);
    let twice = world.isthmus("connect --context kind-alpha --destination-context kind-alpha").await;
    assert_eq!(twice.code, 2, "{twice}");
    assert_eq!(world.isthmus("connect").await.code, 2);
    let status = world.isthmus("status --context kind-gone").await;
    assert!(status.code == 1 && status.out.contains("refuses connections"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnection_that_is_refused_halfway_tells_what_is_done_and_goes_on_when_it_is_given_again() {
    use Relation::{Apart, Connected};
    let world = World::start().await;
    // As by rights that are taken away between the rehearsal and the write.
    let refusing = refusing(&world.beta.server, |asked| asked.writes() && !asked.is_rehearsal()).await;
    for (command, left) in [(DISCONNECT.to_owned(), Some(Apart)), (format!("{DISCONNECT} --delete"), None)] {
        world.lead("beta", &world.beta.server);
        assert_eq!(world.isthmus(CONNECT).await.code, 0);
        world.lead("beta", &refusing);
        let half = world.isthmus(&command).await;
        half.fails_saying(&[
            "kind-beta: Secret isthmus-system/peer-alpha is as it was",
            "isthmus: context kind-beta: cannot",
            "is forbidden",
            "kubectl --context kind-beta auth can-i --list",
            "disconnected in part: 1 of 2 Secrets are as they are to be",
            "Give the same command again",
        ]);
        assert_eq!(half.out, "", "nothing claims that it is done: {half}");
        assert_eq!(relations(&world).await, (left, Some(Connected)), "{half}");

        // The same for programs; and what is done already is no reason to refuse it.
        let again = world.isthmus(&format!("{command} -o json")).await;
        let report = again.json();
        assert_eq!((again.code, &report["gone"]), (1, &Value::Null), "{again}");
        assert!(report["problem"].as_str().unwrap().contains("is forbidden"), "{again}");
        let changes: Vec<_> =
            report["secrets"].as_array().unwrap().iter().map(|secret| &secret["change"]).collect();
        assert_eq!(changes, ["unchanged", "kept"], "{again}");

        world.lead("beta", &world.beta.server);
        let rest = world.isthmus(&command).await;
        assert_eq!(rest.code, 0, "{rest}");
        assert_eq!(relations(&world).await, (left, left), "{rest}");
        assert!(world.alpha.peers().await.is_empty() && world.beta.peers().await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_nobody_takes_note_of_is_pointed_out() {
    let world = World::start().await;
    let annotations = json!({CONNECT_ANNOTATION: "true"});
    let slip = json!({"metadata": {"name": "peer-beta", "annotations": annotations}, "stringData": {"cluster-name": "beta"}});
    world.alpha.create::<Secret>(slip).await;
    let status = world.isthmus("status --context kind-alpha").await;
    let says = "Secret isthmus-system/peer-beta is annotated as a peer's, and is not of type isthmus.io/peer";
    assert!(status.code == 1 && status.out.contains(says), "{status}");
    for force in ["", "--force"] {
        world.isthmus(&format!("{CONNECT} {force}")).await.fails_saying(&[
            "✗ kind-alpha: Secret isthmus-system/peer-beta is there and of another type",
            "kubectl --context kind-alpha -n isthmus-system delete secret peer-beta",
            "nothing was written",
        ]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_cannot_be_used_can_be_disconnected_and_a_slip_is_not_taken_for_a_peer() {
    let world = World::start().await;
    world
        .alpha
        .create::<Secret>(json!({
            "metadata": {"name": "peer-delta", "annotations": {CONNECT_ANNOTATION: "true"}},
            "type": "isthmus.io/peer", "stringData": {"cluster-name": "Delta"},
        }))
        .await;
    let slip = world.isthmus("disconnect --destination-cluster detla").await;
    assert!(slip.code == 0 && slip.err.contains("has no Secret about detla; there are peer-delta"), "{slip}");
    let apart = world.isthmus("disconnect --destination-cluster delta").await;
    assert!(apart.code == 0 && apart.err.contains("peer-delta disconnected"), "{apart}");
    let either = world.isthmus("disconnect").await;
    assert!(either.code == 2 && either.err.contains("--destination-cluster"), "{either}");
    for wrong in ["", "Mesh", "a/b", "-a"] {
        let mut command = world.command("peers");
        let output = command.args([format!("--namespace={wrong}")]).output().await.unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
    }
}

/// A Secret with a certificate that began so many days ago and ends in so many, and with its key.
fn certificate(name: &str, began: u64, ends: i64) -> (Value, String) {
    let day = 24 * 60 * 60;
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "clustermesh-apiserver.cilium.io");
    let now = chrono::Utc::now();
    params.not_before =
        std::time::SystemTime::from(now - chrono::TimeDelta::seconds(day * began.cast_signed())).into();
    params.not_after = std::time::SystemTime::from(now + chrono::TimeDelta::seconds(day * ends)).into();
    let pem = params.self_signed(&key).unwrap().pem();
    let secret = json!({
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "isthmus"}}, "type": "kubernetes.io/tls",
        "stringData": {"tls.crt": pem, "tls.key": key.serialize_pem(), "ca.crt": pem},
    });
    (secret, key.serialize_pem())
}

#[tokio::test(flavor = "multi_thread")]
async fn how_long_certificates_are_valid_is_told_and_no_key_is() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let world = World::start().await;
    let (gateway, key) = certificate("clustermesh-apiserver-server-cert", 10, 80);
    world.alpha.create::<Secret>(gateway).await;
    let (relay, _) = certificate("clustermesh-apiserver-remote-cert", 64, 26);
    world.alpha.create::<Secret>(relay).await;
    assert_eq!(world.isthmus(CONNECT).await.code, 0);

    let status = world.isthmus("status --context kind-alpha").await;
    assert_eq!(status.code, 0, "what is overdue still works: {status}");
    for said in [
        "Well, but somebody should look at this:",
        "1. ‼ kind-alpha: the certificate of the relay",
        "has not been renewed, although two thirds of its life are over",
        "kubectl --context kind-alpha -n isthmus-system logs -l app.kubernetes.io/name=clustermesh-apiserver",
    ] {
        assert!(status.out.contains(said), "it says {said:?}: {status}");
    }
    for (role, left, stage) in [
        ("gateway", "80d", "valid"),
        ("relay", "26d", "overdue"),
        ("authority", "", "valid"),
        ("peer-authority", "", "valid"),
    ] {
        let row = status.out.lines().find(|line| line.split_whitespace().nth(1) == Some(role));
        let row = row.unwrap_or_else(|| panic!("a row for {role}: {status}"));
        assert!(row.contains(left) && row.contains(stage), "{row}");
    }

    let json = world.isthmus("status --context kind-alpha -o json").await;
    let report = json.json();
    assert_eq!(
        (&report["healthy"], &report["problems"][0]["level"]),
        (&json!(true), &json!("warning")),
        "{json}"
    );
    let all = report["clusters"][0]["certificates"].as_array().unwrap();
    let relay = all.iter().find(|one| one["role"] == "relay").unwrap();
    assert_eq!(
        (&relay["stage"], &relay["keptIn"]),
        (&json!("overdue"), &json!("Secret clustermesh-apiserver-remote-cert")),
        "{json}"
    );
    let until = relay["notAfter"].as_str().unwrap();
    let until = chrono::DateTime::parse_from_rfc3339(until).expect("RFC 3339").to_utc() - chrono::Utc::now();
    assert!((25..=26).contains(&until.num_days()), "{json}");
    let beta = all.iter().find(|one| one["role"] == "peer-authority").unwrap();
    assert_eq!((&beta["peer"], &beta["subject"]), (&json!("beta"), &json!("CA of beta")), "{json}");

    let line = key.lines().nth(1).unwrap();
    for secret in ["PRIVATE KEY", line, &STANDARD.encode(&key)[..64]] {
        for answer in [&status, &json] {
            assert!(!answer.to_string().contains(secret), "{answer}");
        }
    }

    let (expired, _) = certificate("isthmus-node-agent-cert", 90, -1);
    world.alpha.create::<Secret>(expired).await;
    let status = world.isthmus("status --context kind-alpha").await;
    assert!(status.code == 1 && status.out.contains("Not well:"), "{status}");
    let says = "✗ kind-alpha: the certificate of the node-agents";
    assert!(status.out.contains(says) && status.out.contains("has expired: it is"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_read_secrets_is_told_which_right_is_missing_and_sees_the_rest() {
    let world = World::start().await;
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    world.lead("alpha", &refusing(&world.alpha.server, refusing::Asked::is_about_secrets).await);
    let status = world.isthmus("status --context kind-alpha").await;
    assert_eq!(status.code, 0, "that is no failure: {status}");
    for said in [
        "‼ kind-alpha: not all certificates are looked at: cannot get Secret isthmus-system/clustermesh-apiserver-server-cert: ",
        "is forbidden",
        "(nor 5 more)",
        "ask for the right to get and list secrets in namespace isthmus-system",
        "ConfigMap isthmus-cluster-info",
        "https://172.18.2.1:32379",
    ] {
        assert!(status.out.contains(said), "it says {said:?}: {status}");
    }
    assert_eq!(status.out.matches("is forbidden").count(), 1, "once: {status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_get_a_document_also_where_nothing_could_be_done() {
    let world = World::start().await;
    let file = world.folder.path().join("broken");
    std::fs::write(&file, "apiVersion: [").unwrap();
    let broken = format!("--kubeconfig {}", file.display());
    let commands = [
        (format!("connect --destination-context kind-beta {broken}"), 1),
        (format!("disconnect --destination-context kind-beta {broken}"), 1),
        (format!("peers {broken}"), 1),
        (format!("status {broken}"), 1),
        (format!("rotate-ca {broken}"), 1),
        (format!("rotate-key node-1 {broken}"), 1),
        (format!("troubleshoot {broken}"), 2),
        ("disconnect --destination-context kind-none".to_owned(), 1),
        ("rotate-ca --context kind-none".to_owned(), 1),
        ("rotate-key node-1 --context kind-none".to_owned(), 1),
        ("troubleshoot --context kind-none".to_owned(), 2),
        ("connect --context kind-alpha --destination-context kind-alpha".to_owned(), 2),
        ("explain alpha/a beta/b 80 --lab no-such-lab".to_owned(), 2),
        ("explain alpha/a beta/b 80 --socket /nonexistent".to_owned(), 2),
        ("monitor --lab no-such-lab".to_owned(), 2),
        ("monitor --ip nonsense".to_owned(), 2),
        ("status --lab no-such-lab".to_owned(), 1),
    ];
    for (command, code) in commands {
        let answer = world.isthmus(&format!("{command} -o json")).await;
        assert_eq!(answer.code, code, "{command}: {answer}");
        let error =
            answer.json()["error"].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned();
        assert_eq!(answer.err, format!("isthmus: {error}\n"), "people read the same: {command}");
        let text = world.isthmus(&command).await;
        assert_eq!((text.out.as_str(), &text.err), ("", &answer.err), "{command}");
    }
    let run = world.isthmus("lab run /nonexistent --report json").await;
    assert!(run.json()["error"].as_str().unwrap().contains("/nonexistent"), "{run}");
    // What cannot be asked of a cluster is part of the report, in which others have answered.
    for command in ["peers", "status"] {
        let answer = world.isthmus(&format!("{command} --context kind-alpha,kind-none -o json")).await;
        assert_eq!((answer.code, &answer.json()["error"]), (1, &Value::Null), "{answer}");
    }
}

/// A proxy that leads to one address, whatever it is asked for. Where it listens.
async fn proxy_to(server: &str) -> std::net::SocketAddr {
    let server = server.trim_start_matches("http://").to_owned();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                let mut client = BufReader::new(client);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert_ne!(client.read_line(&mut head).await.unwrap(), 0, "{head}");
                }
                assert!(head.starts_with("CONNECT kubernetes.invalid:6443 "), "{head}");
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let mut server = tokio::net::TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_behind_a_proxy_is_reached_through_it() {
    let world = World::start().await;
    let proxy = proxy_to(&world.alpha.server).await;
    let server = "http://kubernetes.invalid:6443";
    let kubeconfig = |cluster: Value| {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "far",
            "clusters": [{"name": "far", "cluster": cluster}], "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "far", "context": {"cluster": "far", "user": "me"}}],
        })
    };
    let file = world.folder.path().join("proxied");
    let peers = format!("peers --kubeconfig {} -o json", file.display());
    let proxied = json!({"server": server, "proxy-url": format!("http://{proxy}")});
    std::fs::write(&file, kubeconfig(proxied).to_string()).unwrap();
    let answer = world.isthmus(&peers).await;
    assert!(answer.code == 0 && answer.json()["ready"] == true, "{answer}");

    std::fs::write(&file, kubeconfig(json!({"server": server})).to_string()).unwrap();
    assert_eq!(world.isthmus(&peers).await.code, 1, "there is no such host");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_gone_can_be_disconnected_from() {
    let world = World::start().await;
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    let both = "disconnect --context kind-alpha --destination-context kind-gone";
    world.isthmus(both).await.fails_saying(&["--destination-cluster NAME", "nothing was changed"]);
    let one = world.isthmus("disconnect --destination-cluster beta").await;
    assert_eq!(one.code, 0, "{one}");
    assert_eq!(world.alpha.peers().await, Vec::<String>::new());
    assert_eq!(world.beta.peers().await, ["alpha"], "the other side is as it was");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_disconnected_is_said_before_anything_is_changed() {
    let world = World::start().await;
    world.beta.set_observing(true);
    let twice = world.isthmus(&format!("{DISCONNECT},kind-alpha")).await;
    assert!(twice.code == 2 && twice.err.contains("kind-alpha is named twice"), "{twice}");

    assert_eq!(world.isthmus(&format!("{CONNECT} --connection-mode unicast")).await.code, 0);
    world.alpha.mirror_from_a_file("gamma").await;
    let both = "disconnect --context kind-alpha --destination-context kind-beta --destination-cluster gamma";
    world.isthmus(both).await.fails_saying(&["kind-alpha", "the file gamma in the apiserver's --peers-dir"]);
    assert_eq!(relations(&world).await, (Some(Relation::Connected), Some(Relation::Admitted)));
}

/// What alpha is to beta's Secret and the other way round: `None` where there is no Secret.
async fn relations(world: &World) -> (Option<Relation>, Option<Relation>) {
    let of = |secret: Option<Secret>| secret.map(|secret| PeerSecret::parse(&secret).unwrap().relation);
    (of(world.alpha.secret("peer-beta").await), of(world.beta.secret("peer-alpha").await))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_cluster_reads_from_another_that_only_lets_it_in() {
    use Relation::{Admitted, Apart, Connected};
    let world = World::start().await;
    world.beta.set_observing(true);
    let one_way = format!("{CONNECT} --connection-mode unicast");
    let connected = world.isthmus(&one_way).await;
    assert_eq!(connected.code, 0, "{connected}");
    for said in ["kind-beta: Secret isthmus-system/peer-alpha created", "kind-beta: alpha is let in"] {
        assert!(connected.err.contains(said), "{connected}");
    }
    assert!(
        connected.err.find("peer-alpha created") < connected.err.find("peer-beta created"),
        "who is let in when it first asks need not ask again: {connected}"
    );
    assert_eq!(relations(&world).await, (Some(Connected), Some(Admitted)));
    let again = world.isthmus(&format!("{one_way} -o json")).await;
    let report = again.json();
    assert_eq!((again.code, &report["ready"]), (0, &json!(true)), "{again}");
    for (at, relation) in [(0, "admitted"), (1, "connected")] {
        let secret = &report["secrets"][at];
        assert_eq!(
            (&secret["relation"], &secret["change"]),
            (&json!(relation), &json!("unchanged")),
            "{again}"
        );
    }

    // Nothing is claimed of what is not read.
    let peers = world.isthmus("peers --context kind-beta -o json").await;
    let peer = &peers.json()["peers"][0];
    assert_eq!(
        (peers.code, &peer["relation"], &peer["ready"], &peer["reason"]),
        (0, &json!("Admitted"), &Value::Null, &json!("MayRead")),
        "{peers}"
    );
    let table = world.isthmus("peers --context kind-alpha,kind-beta").await;
    let row = table.out.lines().find(|line| line.starts_with("kind-beta")).unwrap();
    assert!(table.code == 0 && row.contains("alpha") && row.contains("Admitted"), "{table}");
    let status = world.isthmus("status --context kind-beta").await;
    assert!(status.code == 0 && status.out.contains("0/0, 1 admitted"), "{status}");

    // Both ways, and the second way back.
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    assert_eq!(relations(&world).await, (Some(Connected), Some(Connected)));
    let as_it_is = world.isthmus(&one_way).await;
    assert!(as_it_is.code == 0 && as_it_is.err.contains("peer-alpha unchanged"), "{as_it_is}");
    let back = "disconnect --context kind-beta --destination-context kind-alpha --connection-mode unicast";
    let back = world.isthmus(back).await;
    assert_eq!(back.code, 0, "{back}");
    for said in ["peer-alpha lets alpha in, which reads from here", "nothing is read from alpha"] {
        assert!(back.err.contains(said), "{back}");
    }
    assert_eq!(relations(&world).await, (Some(Connected), Some(Admitted)));
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    let alone = |value: &str| json!({"metadata": {"annotations": {CONNECT_ANNOTATION: value}}});
    let params = PatchParams::default();
    let secrets = world.beta.namespaced::<Secret>();
    secrets.patch("peer-alpha", &params, &Patch::Merge(alone("false"))).await.unwrap();
    assert_eq!(
        relations(&world).await,
        (Some(Connected), Some(Apart)),
        "the annotation alone takes a connection apart"
    );

    // Both halves go, and nothing else is left behind.
    assert_eq!(world.isthmus(&one_way).await.code, 0);
    let apart = world.isthmus(&format!("{DISCONNECT} --connection-mode unicast")).await;
    assert_eq!(apart.code, 0, "{apart}");
    assert_eq!(relations(&world).await, (Some(Apart), Some(Apart)));
    assert!(world.alpha.peers().await.is_empty() && world.beta.peers().await.is_empty());
    assert_eq!(world.isthmus(&one_way).await.code, 0);
    let forgotten = world.isthmus(&format!("{DISCONNECT} --connection-mode unicast --delete")).await;
    assert_eq!(forgotten.code, 0, "{forgotten}");
    assert_eq!(relations(&world).await, (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_other_direction_needs_is_not_deleted_with_this_one() {
    let world = World::start().await;
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    let one = world.isthmus(&format!("{DISCONNECT} --connection-mode unicast --delete")).await;
    assert_eq!(one.code, 0, "{one}");
    assert!(one.err.contains("peer-beta lets beta in"), "{one}");
    assert_eq!(relations(&world).await, (Some(Relation::Admitted), Some(Relation::Connected)));
    let both = world.isthmus(&format!("{DISCONNECT} --delete")).await;
    assert_eq!(both.code, 0, "{both}");
    assert_eq!(relations(&world).await, (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_only_lets_a_cluster_in_need_not_be_told_where_it_is() {
    let world = World::start().await;
    world.beta.set_observing(true);
    let services = world.alpha.namespaced::<Service>();
    services.delete("clustermesh-apiserver", &DeleteParams::default()).await.unwrap();
    let one_way = format!("{CONNECT} --connection-mode unicast");
    let manifests = world.isthmus(&format!("{one_way} --dry-run -o yaml")).await;
    assert_eq!(manifests.code, 0, "{manifests}");
    let (admits, connects) = manifests.out.split_once("---\n").unwrap();
    assert!(
        admits.starts_with("# For kind-beta: the certificates of alpha's authority, to let it in")
            && admits.contains("isthmus.io/admit: 'true'")
            && !admits.contains("endpoints:"),
        "{manifests}"
    );
    assert!(
        connects.contains("isthmus.io/connect: 'true'") && connects.contains("endpoints:"),
        "{manifests}"
    );
    assert_eq!(world.isthmus(&one_way).await.code, 0);
    world.isthmus(CONNECT).await.fails_saying(&["where the gateway of cluster alpha is is not known"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_writes_nothing_and_says_what_would_be_written() {
    let world = World::start().await;
    let dry = world.isthmus(&format!("{CONNECT} --dry-run")).await;
    assert!(dry.code == 0 && dry.out.contains("would be created"), "{dry}");
    assert!(world.alpha.secret("peer-beta").await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_in_a_repository_is_not_taken_over_by_the_command_that_wrote_it_down() {
    let world = World::start().await;
    let written = world.isthmus(&format!("{CONNECT} --dry-run -o yaml")).await;
    let first = serde_norway::Deserializer::from_str(&written.out).next().expect("a document");
    let kept = Value::deserialize(first).unwrap();
    assert_eq!(kept["metadata"]["name"], "peer-beta", "{written}");
    let params = PatchParams::apply("argocd-controller");
    world.alpha.namespaced::<Secret>().patch("peer-beta", &params, &Patch::Apply(&kept)).await.unwrap();
    let same = world.isthmus(CONNECT).await;
    assert_eq!(same.code, 0, "it says what it would say: {same}");

    world.beta.publish(&info("beta", 2)).await;
    world.isthmus(CONNECT).await.fails_saying(&["peer-beta was made by argocd-controller", "--force"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_those_of_the_service_or_those_that_are_given() {
    let world = World::start().await;
    let services = world.beta.namespaced::<Service>();
    services.delete("clustermesh-apiserver", &DeleteParams::default()).await.unwrap();
    let ports = json!([{"port": 2379}]);
    world
        .beta
        .create::<Service>(json!({"metadata": {"name": "clustermesh-apiserver"}, "spec": {"ports": ports}}))
        .await;
    world.isthmus(CONNECT).await.fails_saying(&["type ClusterIP", "--destination-endpoint"]);

    let given = world.isthmus(&format!("{CONNECT} --destination-endpoint beta.example:1")).await;
    assert_eq!(given.code, 0, "{given}");
    let known = PeerSecret::parse(&world.alpha.secret("peer-beta").await.unwrap()).unwrap();
    assert_eq!(known.endpoints[0].to_string(), "https://beta.example:1");
    let again = world.isthmus(&format!("{CONNECT} -o json")).await;
    assert_eq!(again.json()["secrets"][0]["change"], "unchanged", "what was given once is kept: {again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_somebody_else_keeps_is_not_taken_over_silently() {
    let world = World::start().await;
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    let secrets = world.alpha.namespaced::<Secret>();
    let kept = json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": "argocd"}}});
    secrets.patch("peer-beta", &PatchParams::default(), &Patch::Merge(kept)).await.unwrap();
    let same = world.isthmus(CONNECT).await;
    assert_eq!(same.code, 0, "it says what it would say: {same}");

    world.beta.publish(&info("beta", 2)).await;
    world.isthmus(CONNECT).await.fails_saying(&["peer-beta was made by argocd", "its ca.crt", "--force"]);
    let forced = world.isthmus(&format!("{CONNECT} --force")).await;
    assert!(
        forced.code == 0 && forced.err.contains("kind-alpha: Secret isthmus-system/peer-beta updated"),
        "{forced}"
    );
}

const ROTATE: &str = "rotate-ca --context kind-alpha --destination-context kind-beta";

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_is_rotated_while_peers_are_told_and_then_told_again() {
    let world = World::start().await;
    let rotations = world.alpha.rotate_when_asked("steady", "alpha", 1).await;
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    let alone = world.isthmus("rotate-ca --context kind-alpha").await;
    alone.fails_saying(&["connected to beta too", "--without-peer", "nothing was changed"]);

    let rotated = world.isthmus(ROTATE).await;
    assert_eq!(rotated.code, 0, "{rotated}");
    assert_eq!(
        rotated.err.matches("kind-beta: Secret isthmus-system/peer-alpha updated").count(),
        2,
        "{rotated}"
    );
    assert!(rotated.out.contains("alpha has a new CA"), "{rotated}");
    assert_eq!(ca_known_of_alpha(&world).await, rotations.new.as_str().trim());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_that_was_interrupted_goes_on_where_it_was() {
    let world = World::start().await;
    let rotations = world.alpha.rotate_when_asked("prepared", "alpha", 1).await;
    assert_eq!(world.isthmus(CONNECT).await.code, 0);
    assert_eq!(ca_known_of_alpha(&world).await, rotations.both.as_str().trim());
    let rotated = world.isthmus(&format!("{ROTATE} -o json")).await;
    assert_eq!((rotated.code, &rotated.json()["done"]), (0, &json!(true)), "{rotated}");
    assert_eq!(ca_known_of_alpha(&world).await, rotations.new.as_str().trim());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_that_is_not_ours_and_a_leader_that_is_silent_are_told_of() {
    let world = World::start().await;
    world
        .isthmus(ROTATE)
        .await
        .fails_saying(&["there is no Secret isthmus-system/isthmus-ca", "renew its CA where it is kept"]);
    world.alpha.create::<Secret>(json!({"metadata": {"name": "isthmus-ca"}, "type": "isthmus.io/ca"})).await;
    let silent = world.isthmus(&format!("{ROTATE} --wait-duration 2s")).await;
    silent.fails_saying(&[
        "alpha is not prepared",
        "does a clustermesh-apiserver lead?",
        "Give the command again",
    ]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_only_lets_a_cluster_in_is_told_of_its_next_ca_and_takes_note_before_it_is_used() {
    let world = World::start().await;
    world.beta.set_observing(true);
    let rotations = world.alpha.rotate_when_asked("steady", "alpha", 1).await;
    assert_eq!(world.isthmus(&format!("{CONNECT} --connection-mode unicast")).await.code, 0);
    let rotated = world.isthmus(ROTATE).await;
    assert_eq!(rotated.code, 0, "{rotated}");
    let steps: Vec<_> = ["peer-alpha updated", "kind-beta: alpha is let in", "issued by the next CA"]
        .map(|said| rotated.err.find(said).unwrap_or_else(|| panic!("it says {said:?}: {rotated}")))
        .into();
    assert!(steps.is_sorted(), "{rotated}");
    assert_eq!(ca_known_of_alpha(&world).await, rotations.new.as_str().trim());
    let known = PeerSecret::parse(&world.beta.secret("peer-alpha").await.unwrap()).unwrap();
    assert_eq!(known.relation, Relation::Admitted, "and lets it in as before");

    // The other cluster has readers, too, which have to be named.
    let alone = world.isthmus("rotate-ca --context kind-beta").await;
    alone.fails_saying(&["alpha", "--without-peer"]);
}

async fn ca_known_of_alpha(world: &World) -> String {
    let known = world.beta.secret("peer-alpha").await.unwrap();
    PeerSecret::parse(&known).unwrap().ca.as_str().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_for_shells_are_printed() {
    let world = World::start().await;
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = world.isthmus(&format!("completion {shell}")).await;
        assert!(script.code == 0 && script.out.contains("destination-context"), "{shell}: {script}");
    }
}
