//! `isthmus troubleshoot` as a user meets it: on files alone, and in a lab. In a lab as root; the workspace's programs must
//! have been built (`cargo build --workspace --bins`).

#![allow(clippy::unwrap_used)]

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const LAB: &str = "c-trouble";
const PLAIN: &str = "title: t\nclusters:\n- {name: alpha, id: 1}\n- {name: beta, id: 2}\n";

fn output(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isthmus"));
    command.args(args).env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(output)))
}

/// Everything that was found to be wrong, by kind.
fn kinds(report: &Value) -> Vec<String> {
    let list = |value: &Value, field: &str| value[field].as_array().cloned().unwrap_or_default();
    let peers = list(report, "reports").into_iter().flat_map(|report| list(&report, "peers"));
    let steps = peers.flat_map(|peer| list(&peer, "steps"));
    let findings = steps.flat_map(|step| list(&step, "findings"));
    findings.map(|finding| finding["kind"].as_str().unwrap().to_owned()).collect()
}

struct Lab;

impl Lab {
    fn up(dir: &std::path::Path) -> Self {
        std::fs::write(dir.join("scenario.yaml"), PLAIN).unwrap();
        output(&["lab", "down", LAB]);
        let lab = Self;
        let up = output(&["lab", "up", dir.to_str().unwrap(), "--name", LAB]);
        assert!(up.status.success(), "{}", text(&up));
        lab
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        output(&["lab", "down", LAB]);
    }
}

#[test]
fn one_file_is_enough_and_the_exit_status_says_what_was_found() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("beta.yaml");
    let unused = isthmus_kube_api::ports::reserve().unwrap();
    std::fs::write(&file, format!("endpoints:\n- http://{unused}\n")).unwrap();
    let file = file.to_str().unwrap();

    let found = output(&["troubleshoot", "--config", file]);
    assert_eq!(found.status.code(), Some(1), "{}", text(&found));
    for wanted in ["→ beta", "✗ TCP", "refuses the connection", "likely cause: ", "run next, in beta: "] {
        assert!(text(&found).contains(wanted), "{wanted} in {}", text(&found));
    }
    let ascii = output(&["troubleshoot", "--config", file, "--ascii"]);
    assert!(ascii.stdout.is_ascii(), "{}", text(&ascii));
    assert!(text(&ascii).contains("XX TCP"), "{}", text(&ascii));
    let json = json(&output(&["troubleshoot", "--config", file, "-o", "json"]));
    assert_eq!(json["outcome"], "failed", "{json}");
    assert_eq!(kinds(&json), ["plain-text", "connection-refused"], "{json}");

    for senseless in [
        &["troubleshoot", "--config", file, "--peers-dir", "/tmp"][..],
        &["troubleshoot", "--config", file, "beta", "gamma"],
        &["troubleshoot", "--peers-dir", "/nonexistent"],
        &["troubleshoot", "--lab", "no-such-lab"],
    ] {
        assert_eq!(output(senseless).status.code(), Some(2), "{senseless:?}");
    }
}

/// A kubeconfig with these contexts, whose API servers are where nobody listens.
fn nobody_listens(folder: &std::path::Path, contexts: &[&str]) -> String {
    let mut text = "apiVersion: v1\nkind: Config\nclusters:\n".to_owned();
    for context in contexts {
        let unused = isthmus_kube_api::ports::reserve().unwrap();
        text += &format!("- {{name: {context}, cluster: {{server: 'http://{unused}'}}}}\n");
    }
    text += "users: [{name: somebody, user: {}}]\ncontexts:\n";
    for context in contexts {
        text += &format!("- {{name: {context}, context: {{cluster: {context}, user: somebody}}}}\n");
    }
    text += &format!("current-context: {}\n", contexts[0]);
    let file = folder.join("kubeconfig");
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn a_cluster_that_does_not_answer_is_told_and_hides_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let file = nobody_listens(folder.path(), &["kind-alpha", "kind-beta"]);
    let asked = |more: &[&str]| output(&[&["troubleshoot", "beta", "--kubeconfig", &file], more].concat());
    let unanswered = |output: &Output| {
        assert_eq!(output.status.code(), Some(1), "{}", text(output));
        let told = json(output)["unanswered"].as_array().cloned().unwrap_or_default();
        told.into_iter().map(|reason| reason.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let both = unanswered(&asked(&["--context", "kind-alpha,kind-beta", "-o", "json"]));
    assert_eq!(both.len(), 2, "{both:?}");
    for (context, told) in ["kind-alpha", "kind-beta"].into_iter().zip(&both) {
        assert!(told.starts_with(&format!("context {context}: ")), "{told}");
        assert!(told.contains("refuses connections"), "{told}");
    }
    let current = unanswered(&asked(&["-o", "json"]));
    assert!(current.len() == 1 && current[0].starts_with("context kind-alpha: "), "{current:?}");

    let unknown = asked(&["--context", "kind-gamma"]);
    assert_eq!(unknown.status.code(), Some(2), "{}", text(&unknown));
    assert!(text(&unknown).contains("no such context; it has kind-alpha, kind-beta"), "{}", text(&unknown));
}

#[test]
fn in_a_lab_every_cluster_is_asked_about_every_peer_and_every_node() {
    let folder = tempfile::tempdir().unwrap();
    let _lab = Lab::up(folder.path());
    let deadline = Instant::now() + Duration::from_secs(60);
    let well = loop {
        let asked = output(&["troubleshoot", "--lab", LAB]);
        if asked.status.success() {
            break text(&asked);
        }
        assert!(Instant::now() < deadline, "{}", text(&asked));
    };
    for wanted in ["alpha → beta", "beta → alpha", "1 of 1 pairs of nodes reach each other", "All is well."]
    {
        assert!(well.contains(wanted), "{wanted} in {well}");
    }
    let one = json(&output(&["troubleshoot", "beta", "--lab", LAB, "-o", "json"]));
    assert_eq!(one["reports"].as_array().unwrap().len(), 1, "beta itself has nothing to say: {one}");

    let nobody = output(&["troubleshoot", "delta", "--lab", LAB, "-o", "json"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(kinds(&json(&nobody)).iter().all(|kind| kind == "not-configured"), "{}", text(&nobody));
}
