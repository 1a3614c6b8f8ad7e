//! `isthmus rotate-key`: asks a node's agent for another WireGuard key, and waits until it is in use everywhere.
//!
//! Everything goes through the Node object: the request and the agent's answer are annotations of it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use isthmus_crds::names;
use isthmus_lab::names::LabName;
use isthmus_lab::state::StateDir;
use isthmus_lab::{LabError, Result};
use isthmus_node_agent::encryption::publication::{
    PUBLIC_KEY, ROTATE, ROTATION, RotationReport, RotationState,
};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use serde::Serialize;
use serde_json::json;

use crate::mesh::contexts::{Api, Contexts};
use crate::output::note;

type Nodes = kube::Api<Node>;

/// How often the Node is looked at.
const POLL: Duration = Duration::from_millis(500);
/// An agent that has not answered after this is probably not there.
const HINT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # In the cluster of the current context
  isthmus rotate-key worker-1

  # In another one, for a script
  isthmus rotate-key worker-1 --context beta -o json

  # In the lab that is kept: CLUSTER/NODE, or the node's name alone
  isthmus rotate-key alpha/alpha-node1 --lab mine

Peers with isthmus' own WireGuard device lose no packet. With the kernel's, packets are lost until the other nodes have \
read the new key. The exit status is zero once the new key alone is in use.")]
pub(crate) struct RotateKeyArgs {
    /// Name of the node; in a lab also CLUSTER/NODE
    node: String,
    /// How to reach the Kubernetes API of the node's cluster; $KUBECONFIG or ~/.kube/config when left out
    #[arg(long, value_name = "FILE", conflicts_with = "lab")]
    kubeconfig: Option<PathBuf>,
    /// Which context of the kubeconfig; the current one when left out
    #[arg(long, value_name = "NAME", conflicts_with = "lab")]
    context: Option<String>,
    /// The node is in this lab
    #[arg(long, value_name = "LAB")]
    lab: Option<LabName>,
    /// How long to wait, in seconds; the agent goes on after that. A peer that cannot be reached takes 190 seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 240)]
    timeout: u64,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

impl RotateKeyArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        self.output == Output::Json
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people, with the progress on standard error
    Text,
    /// For programs
    Json,
}

/// What is printed for programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Rotated {
    node: String,
    rotation: String,
    former_key: Option<String>,
    public_key: Option<String>,
    done: bool,
    switched: usize,
    peers: usize,
    seconds: f64,
}

/// Asks, waits, and says by its exit status whether the new key is in use.
pub(crate) async fn run(args: RotateKeyArgs) -> Result<ExitCode> {
    let (api, name) = target(&args).await?;
    let nodes: Nodes = api.global();
    let node = nodes.get(&name).await.map_err(|error| refused(&api, &name, error))?;
    let former = annotation(&node, PUBLIC_KEY);
    if former.is_none() {
        return Err(LabError::invalid(format!(
            "node {name} publishes no WireGuard key: its agent does not run, or not with --encryption=on"
        )));
    }
    let (node, joined) = ask(&api, &nodes, node).await?;
    let rotation = annotation(&node, ROTATE).unwrap_or_default();
    if joined && args.output == Output::Text {
        note(&format!("A rotation of {name}'s key is under way ({rotation}); waiting for it."));
    }
    let begun = Instant::now();
    let report = wait(&nodes, &name, &rotation, &args).await?;
    let done = report.as_ref().is_some_and(|report| report.state == RotationState::Done);
    let rotated = Rotated {
        node: name,
        rotation,
        former_key: former,
        public_key: report.as_ref().map(|report| report.public_key.clone()),
        done,
        switched: report.as_ref().map_or(0, |report| report.switched),
        peers: report.as_ref().map_or(0, |report| report.peers),
        seconds: begun.elapsed().as_secs_f64(),
    };
    print(&rotated, report.as_ref(), &args)?;
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes the request, unless one is being answered already.
async fn ask(api: &Api, nodes: &Nodes, node: Node) -> Result<(Node, bool)> {
    let under_way = report(&node).is_some_and(|report| report.state == RotationState::InProgress);
    if under_way && annotation(&node, ROTATE).is_some() {
        return Ok((node, true));
    }
    let name = node.metadata.name.unwrap_or_default();
    let id = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
    let request = json!({"metadata": {"annotations": {ROTATE: id}}});
    let asked = nodes.patch(&name, &PatchParams::default(), &Patch::Merge(request)).await;
    Ok((asked.map_err(|error| refused(api, &name, error))?, false))
}

/// The last report about the rotation: at its end, when the time is over, or when nobody wants to wait any longer.
async fn wait(
    nodes: &Nodes,
    name: &str,
    rotation: &str,
    args: &RotateKeyArgs,
) -> Result<Option<RotationReport>> {
    let begun = Instant::now();
    let (mut last, mut hinted) = (None, false);
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    while begun.elapsed() < Duration::from_secs(args.timeout) {
        // The API may be away for a moment; the agent goes on meanwhile.
        let node = nodes.get(name).await.ok();
        let now = node.as_ref().and_then(report).filter(|report| report.id == rotation);
        if now != last && now.is_some() {
            last = now;
            if let Some(report) = last.as_ref().filter(|_| args.output == Output::Text) {
                note(&format!("{:>5.1}s  {}", begun.elapsed().as_secs_f64(), progress(report)));
            }
        }
        if last.as_ref().is_some_and(|report| report.state != RotationState::InProgress) {
            break;
        }
        if last.is_none() && !hinted && begun.elapsed() > HINT && args.output == Output::Text {
            hinted = true;
            note(&format!(
                "{:>5.1}s  no answer from node {name}'s agent yet; is it running?",
                HINT.as_secs_f64()
            ));
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            _ = &mut interrupted => break,
        }
    }
    Ok(last)
}

fn progress(report: &RotationReport) -> String {
    match report.state {
        RotationState::InProgress => format!(
            "new key {} published; {} of {} connected peers use it",
            report.public_key, report.switched, report.peers
        ),
        RotationState::Done => "the new key alone is in use".to_owned(),
        RotationState::Failed => {
            format!(
                "there is no new key: {}",
                report.message.as_deref().unwrap_or("the agent's log says why")
            )
        }
    }
}

fn print(rotated: &Rotated, report: Option<&RotationReport>, args: &RotateKeyArgs) -> Result<()> {
    if args.output == Output::Json {
        crate::output::json(rotated);
        return Ok(());
    }
    let Rotated { node, seconds, .. } = rotated;
    match report {
        Some(report) if report.state == RotationState::Done => {
            say!("Node {node} has a new WireGuard key, {} ({seconds:.1} s).", report.public_key);
        }
        Some(report) if report.state == RotationState::Failed => {
            say!("Node {node} keeps its WireGuard key: {}.", progress(report));
        }
        Some(report) => say!(
            "Not done after {seconds:.0} s: {}. The agent of node {node} goes on; both keys work until it is done.",
            progress(report)
        ),
        None => say!(
            "The agent of node {node} has not answered within {seconds:.0} s. It will do so when it runs."
        ),
    }
    Ok(())
}

/// The API of the node's cluster, and the node's name.
async fn target(args: &RotateKeyArgs) -> Result<(Api, String)> {
    let (file, context, node) = match args.lab.clone() {
        Some(lab) => in_lab(&crate::lab::choose(Some(lab))?, &args.node)?,
        // As `isthmus status`: where nothing is said and a lab is there, it is meant.
        // No Node is called CLUSTER/NODE.
        None if args.node.contains('/')
            || !is_kubernetes_meant(args) && !isthmus_lab::state::labs().is_empty() =>
        {
            in_lab(&crate::lab::choose(None)?, &args.node)?
        }
        None => (args.kubeconfig.clone(), args.context.clone(), args.node.clone()),
    };
    let opened = async {
        let contexts = Contexts::read(file.as_deref(), names::DEFAULT_NAMESPACE)?;
        contexts.open(&contexts.or_current(context.as_deref())?).await
    };
    let api = opened.await.map_err(|error| LabError::invalid(error.to_string()))?;
    Ok((api, node))
}

fn is_kubernetes_meant(args: &RotateKeyArgs) -> bool {
    args.kubeconfig.is_some() || args.context.is_some() || std::env::var_os("KUBECONFIG").is_some()
}

/// The kubeconfig of the node's cluster, whose only context is that cluster, and the node's name.
fn in_lab(lab: &LabName, node: &str) -> Result<(Option<PathBuf>, Option<String>, String)> {
    let dir = StateDir::of(lab);
    let state = dir.read()?;
    let (cluster, name) = match node.split_once('/') {
        Some((cluster, name)) => (Some(cluster), name),
        None => (None, node),
    };
    let has = |c: &&isthmus_lab::state::ClusterState| {
        cluster.is_none_or(|cluster| c.name == cluster) && c.nodes.iter().any(|n| n == name)
    };
    let found = state.clusters.iter().find(has).ok_or_else(|| {
        let all: Vec<String> = state
            .clusters
            .iter()
            .flat_map(|c| c.nodes.iter().map(|node| format!("{}/{node}", c.name)))
            .collect();
        LabError::invalid(format!("lab {lab} has no node {node}, only {}", all.join(", ")))
    })?;
    Ok((Some(dir.kubeconfig(&found.name)), None, name.to_owned()))
}

fn annotation(node: &Node, name: &str) -> Option<String> {
    node.metadata.annotations.as_ref()?.get(name).cloned()
}

/// What the agent says; something that is no report is none.
fn report(node: &Node) -> Option<RotationReport> {
    serde_json::from_str(&annotation(node, ROTATION)?).ok()
}

fn refused(api: &Api, node: &str, error: kube::Error) -> LabError {
    let context = &api.context;
    match &error {
        kube::Error::Api(status) if status.code == 404 => LabError::invalid(format!(
            "context {context}: there is no node {node} in this cluster; `kubectl --context {context} get nodes` lists them"
        )),
        kube::Error::Api(status) if status.code == 403 => LabError::invalid(format!(
            "context {context}: not allowed to read and patch node {node}: {}; rotating a key takes the rights `get` and \
             `patch` on nodes",
            status.message
        )),
        _ => LabError::invalid(api.refused(format!("read and patch node {node}"), error).to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_report_is_none() {
        let node = |text: &str| -> Node {
            serde_json::from_value(json!({"metadata": {"name": "n", "annotations": {ROTATION: text}}}))
                .expect("a Node")
        };
        assert_eq!(report(&node("oops")), None);
        let done = r#"{"id":"1","state":"done","publicKey":"x","switched":2,"peers":3}"#;
        let read = report(&node(done)).expect("a report");
        assert_eq!((read.state, read.switched, read.peers), (RotationState::Done, 2, 3));
    }
}
