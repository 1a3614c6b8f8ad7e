//! `isthmus explain` and `isthmus monitor` in two clusters with policies between them. As root; the workspace's programs
//! must have been built (`cargo build --workspace --bins`).

#![allow(clippy::unwrap_used)]

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use isthmus_lab::state::StateDir;
use serde_json::Value;

const LAB: &str = "c-policy";
const SCENARIO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/policy");
const DEADLINE: Duration = Duration::from_secs(90);

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

struct Lab;

impl Lab {
    fn up() -> Self {
        output(&["lab", "down", LAB]);
        let lab = Self;
        let up = output(&["lab", "up", SCENARIO, "--name", LAB]);
        assert!(up.status.success(), "{}", text(&up));
        lab
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        output(&["lab", "down", LAB]);
    }
}

/// What a child that is still running leaves behind is ended with the test.
struct Monitor(Option<Child>);

impl Monitor {
    fn start(args: &[&str]) -> Self {
        let mut command =
            isthmus(&["monitor", "--lab", LAB, "-o", "json", "--limit", "1", "--timeout", "60s"]);
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(Some(command.spawn().unwrap()))
    }

    /// The one flow, which `traffic` is made for.
    fn flow(mut self, mut traffic: impl FnMut()) -> Value {
        let mut child = self.0.take().unwrap();
        while child.try_wait().unwrap().is_none() {
            traffic();
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let flow = output.stdout.split(|byte| *byte == b'\n').find_map(|line| {
            let line: Value = serde_json::from_slice(line).ok()?;
            line.get("flow").cloned()
        });
        flow.unwrap()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn explain(source: &str, destination: &str, port: &str) -> (Option<i32>, Value, String) {
    let output = output(&["explain", "--lab", LAB, "-o", "json", source, destination, port]);
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), json, text(&output))
}

/// Whether there is an answer within so many seconds.
fn reaches(client: &str, address: &str, seconds: &str) -> bool {
    let url = format!("http://{address}:8080/");
    output(&["lab", "exec", "--lab", LAB, client, "--", "curl", "-s", "-m", seconds, "-o", "/dev/null", &url])
        .status
        .success()
}

fn cluster_ip() -> String {
    let kubeconfig = StateDir::of(&LAB.parse().unwrap()).kubeconfig("beta");
    let mut kubectl = Command::new("kubectl");
    kubectl.arg("--kubeconfig").arg(kubeconfig).args([
        "get",
        "service",
        "server",
        "-o",
        "jsonpath={.spec.clusterIP}",
    ]);
    let answer = kubectl.output().unwrap();
    assert!(answer.status.success(), "{}", text(&answer));
    String::from_utf8(answer.stdout).unwrap()
}

#[test]
fn what_is_explained_is_what_happens_and_what_happens_is_told() {
    let _lab = Lab::up();
    let begun = Instant::now();
    let allowed = loop {
        let (code, json, said) = explain("alpha/friend", "beta/server", "http");
        let rule = json["ingress"]["rule"].as_str().unwrap_or_default();
        if code == Some(0) && rule.contains("allow-friend") {
            break json;
        }
        assert!(begun.elapsed() < DEADLINE, "the policy does not come into force: {said}");
    };
    // The other policy is of another kind, which comes by a watch of its own.
    loop {
        let (code, json, said) = explain("alpha/stranger", "beta/server", "8080");
        let by = json["ingress"]["defaultDenyBy"].to_string();
        if code == Some(1) && by.contains("networkpolicy/default/default-deny") {
            break;
        }
        assert!(begun.elapsed() < DEADLINE, "the policy does not come into force: {said}");
    }
    assert_eq!(allowed["ingress"]["rule"], "ciliumnetworkpolicy/default/allow-friend ingress[0]");
    assert_eq!(allowed["ingress"]["node"], "beta/beta-node1");
    assert_eq!(allowed["egress"]["enforced"], false);
    assert_eq!(allowed["port"], serde_json::json!({"protocol": 6, "port": 8080}));
    let address = allowed["destination"]["addresses"][0].as_str().unwrap().to_owned();

    let (code, denied, said) = explain("access=granted", "beta/server", "9000");
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(denied["ingress"]["rule"], "ciliumnetworkpolicy/default/allow-friend ingressDeny[0]");
    let (code, _, said) = explain("192.0.2.1", &address, "80");
    assert_eq!(code, Some(1), "nobody outside is let in: {said}");
    let (code, _, said) = explain("beta/server", "192.0.2.1", "443/udp");
    assert_eq!(code, Some(0), "what it sends is not restricted: {said}");
    let (code, _, said) = explain("alpha/nobody", "beta/server", "80");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("alpha/default/nobody"), "{said}");
    let (code, _, said) = explain("alpha/friend", "beta/server", "gopher");
    assert_eq!(code, Some(2), "{said}");
    // A Service's address is translated before policies are asked.
    let (code, _, said) = explain("beta/server", &cluster_ip(), "80");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("is the Service default/server") && said.contains(&address), "{said}");
    let plain = output(&["explain", "--lab", LAB, "alpha/stranger", "beta/server", "8080"]);
    assert!(text(&plain).contains("It is denied."), "{}", text(&plain));

    let monitor = Monitor::start(&["--pod", "beta/default/server", "--verdict", "dropped", "--port", "8080"]);
    let dropped = monitor.flow(|| assert!(!reaches("alpha/stranger", &address, "1")));
    assert_eq!(dropped["verdict"], "DROPPED");
    assert_eq!(dropped["traffic_direction"], "INGRESS");
    assert_eq!(dropped["node_name"], "beta/beta-node1");
    assert_eq!(dropped["drop_reason_desc"], "POLICY_DENIED");
    assert_eq!(dropped["destination"]["pod_name"], "server");
    assert_eq!(dropped["source"]["cluster_name"], "alpha");
    assert!(dropped["source"]["labels"].to_string().contains("k8s:app=stranger"), "{dropped}");

    let monitor =
        Monitor::start(&["--label", "app=friend", "--verdict", "forwarded", "--node", "beta/beta-node1"]);
    let forwarded = monitor.flow(|| assert!(reaches("alpha/friend", &address, "30")));
    assert_eq!(forwarded["ingress_allowed_by"][0]["name"], "allow-friend", "{forwarded}");

    let nothing = output(&["monitor", "--lab", LAB, "--pod", "nobody", "--limit", "1", "--timeout", "200ms"]);
    assert_eq!(nothing.status.code(), Some(1), "{}", text(&nothing));
    let wrong = output(&["monitor", "--lab", LAB, "--node", "alpha/nowhere"]);
    assert!(text(&wrong).contains("there is no node alpha/nowhere"), "{}", text(&wrong));
}
