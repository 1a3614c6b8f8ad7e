//! `isthmus lab` as a user meets it: kept, killed, interrupted, failing. As root; the workspace's programs must have
//! been built (`cargo build --workspace --bins`).

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use isthmus_lab::cleanup::Remains;
use isthmus_lab::names::LabName;
use isthmus_lab::state::StateDir;

const PLAIN: &str = "title: t\nclusters:\n- {name: alpha, id: 1}\n- {name: beta, id: 2}\n";

fn isthmus(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isthmus"));
    command.args(args).stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> Output {
    isthmus(args).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Removes what an earlier, killed test left; and again at the end, whatever happens.
struct Clean(LabName);

impl Clean {
    fn new(name: &str) -> Self {
        output(&["lab", "down", name]);
        Self(name.parse().unwrap())
    }

    fn nothing_left(&self) {
        assert!(Remains::of(&self.0).none(), "{:?}", Remains::of(&self.0));
    }
}

impl Drop for Clean {
    fn drop(&mut self) {
        output(&["lab", "down", self.0.as_str()]);
    }
}

fn scenario(dir: &Path, text: &str) -> PathBuf {
    std::fs::write(dir.join("scenario.yaml"), text).unwrap();
    dir.to_owned()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

#[test]
fn a_kept_lab_that_is_killed_is_cleared_away_by_down() {
    let clean = Clean::new("c-kept");
    let dir = tempfile::tempdir().unwrap();
    let path = scenario(dir.path(), PLAIN);
    let up = output(&["lab", "up", path.to_str().unwrap(), "--name", "c-kept"]);
    assert!(up.status.success(), "{}", text(&up));
    let down = format!("  {} lab down c-kept\n", env!("CARGO_BIN_EXE_isthmus"));
    assert!(text(&up).contains(&down), "it is not on the path: {}", text(&up));

    let status = output(&["status", "--lab", "c-kept"]);
    assert!(status.status.success(), "{}", text(&status));
    assert!(text(&status).contains("All is well"), "{}", text(&status));
    let json = output(&["status", "--lab", "c-kept", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["healthy"], true);
    assert_eq!(json["apiservers"].as_array().unwrap().len(), 2);
    assert_eq!(json["agents"].as_array().unwrap().len(), 2);

    a_key_is_rotated("c-kept", "alpha/alpha-node1");

    let supervisor = StateDir::of(&clean.0).read().unwrap().supervisor;
    assert!(supervisor.alive());
    let killed = Command::new("kill").args(["-9", &supervisor.pid.to_string()]).status().unwrap();
    assert!(killed.success());
    until("the supervisor ends", || !supervisor.alive());
    let unwell = output(&["status", "--lab", "c-kept"]);
    assert!(
        !unwell.status.success(),
        "daemons die with the supervisor, and status says so: {}",
        text(&unwell)
    );
    assert!(!Remains::of(&clean.0).none(), "namespaces are left");
    let down = output(&["lab", "down", "c-kept"]);
    assert!(down.status.success(), "{}", text(&down));
    clean.nothing_left();
}

/// What `rotate-key` prints for programs and for people, and how it ends.
fn a_key_is_rotated(lab: &str, node: &str) {
    let rotate = |node: &str, format: &str| {
        output(&["rotate-key", node, "--lab", lab, "--timeout", "60", "-o", format])
    };
    let rotated = rotate(node, "json");
    assert!(rotated.status.success(), "{}", text(&rotated));
    let report: serde_json::Value = serde_json::from_slice(&rotated.stdout).unwrap();
    assert_eq!(report["done"], true, "{report}");
    assert_ne!(report["formerKey"], report["publicKey"], "{report}");

    let again = rotate(node, "text");
    let said = text(&again);
    assert!(again.status.success(), "{said}");
    assert!(said.contains("has a new WireGuard key") && said.contains("published"), "{said}");
    assert!(!said.contains(report["publicKey"].as_str().unwrap()), "another one each time: {said}");

    let nobody = rotate("alpha/nobody", "text");
    assert!(!nobody.status.success());
    assert!(text(&nobody).contains("alpha/alpha-node1"), "the nodes are named: {}", text(&nobody));
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let clean = Clean::new("c-interrupt");
    let dir = tempfile::tempdir().unwrap();
    let path = scenario(dir.path(), PLAIN);
    for moment in ["wan", "alpha.alpha-node1"] {
        let mut run = isthmus(&["lab", "run", path.to_str().unwrap(), "--name", "c-interrupt"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let namespace = Path::new("/run/netns").join(format!("isthmus-c-interrupt.{moment}"));
        until("the lab comes up", || namespace.exists());
        Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap();
        assert!(!run.wait().unwrap().success());
        clean.nothing_left();
    }
}

#[test]
fn an_expectation_that_does_not_hold_is_named_and_fails_the_run() {
    let clean = Clean::new("c-fails");
    let dir = tempfile::tempdir().unwrap();
    let steps = "steps:\n- say: a pod that is not there\n  wait: {clusters: [alpha], object: pod/nobody, until: ready, within: 200ms}\n- heal: {}\n";
    let path = scenario(dir.path(), &format!("{PLAIN}{steps}"));
    let run = output(&["lab", "run", path.to_str().unwrap(), "--name", "c-fails", "--report", "json"]);
    assert_eq!(run.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["passed"], false);
    assert_eq!(report["steps"].as_array().unwrap().len(), 1, "what comes after is not tried");
    assert!(report["steps"][0]["failure"].as_str().unwrap().contains("does not exist"), "{report}");
    assert!(!report["logs"].as_array().unwrap().is_empty(), "{report}");
    clean.nothing_left();
}

#[test]
fn a_scenario_that_is_none_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = scenario(dir.path(), &format!("{PLAIN}steps:\n- sacle: {{}}\n"));
    let run = output(&["lab", "run", path.to_str().unwrap()]);
    assert_eq!(run.status.code(), Some(1));
    assert!(text(&run).contains("scenario.yaml: steps[0]: unknown field `sacle`"), "{}", text(&run));
}

#[test]
fn what_is_not_there_is_said_so_with_what_is() {
    assert!(
        text(&output(&["lab", "exec", "--lab", "c-nobody", "alpha/client", "--", "true"]))
            .contains("no lab c-nobody")
    );
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("global")).unwrap();
    scenario(&folder.path().join("global"), PLAIN);
    let slip = output(&["lab", "up", folder.path().join("globl").to_str().unwrap()]);
    assert_eq!(slip.status.code(), Some(1), "{}", text(&slip));
    assert!(
        text(&slip).contains("globl is no scenario") && text(&slip).contains("there are global"),
        "{}",
        text(&slip)
    );
    let none = output(&["lab", "down", "c-nobody"]);
    assert!(none.status.success() && text(&none).contains("nothing is left"), "{}", text(&none));
}

#[test]
fn a_reader_that_has_gone_is_no_reason_to_panic() {
    for (args, code) in [
        (vec!["lab", "list"], 0),
        (vec!["status", "--agent-socket", "/nonexistent"], 1),
        (vec!["status", "--agent-socket", "/nonexistent", "-o", "json"], 1),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = isthmus(&args).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output).as_str()), (Some(code), ""), "{args:?}");
    }
}
