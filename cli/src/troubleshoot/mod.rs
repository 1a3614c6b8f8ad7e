//! `isthmus troubleshoot`: why clusters are not connected, step by step, asked where their connections are made.

mod nodes;
mod place;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use clustermesh_apiserver::status::ApiserverStatus;
use clustermesh_apiserver::troubleshoot::{self as probe, Outcome, Report, Signs};
use futures::future::join_all;
use isthmus_lab::names::LabName;
use isthmus_lab::state::StateDir;
use isthmus_lab::{LabError, Result};
use isthmus_node_agent::encryption::ReachReport;
use serde::Serialize;

use self::nodes::{Asked, Silent};
use self::place::{Daemon, Found, NoAnswer, Place};
use crate::mesh::MeshError;
use crate::mesh::contexts::KubeArgs;
use crate::output::{json, signs};

const EXAMPLES: &str = "Examples:
  # Everything about the clusters of the lab that is kept
  isthmus troubleshoot

  # Of real clusters: why alpha does not get beta's services, and everything about two of them
  isthmus troubleshoot beta --context kind-alpha
  isthmus troubleshoot --context kind-alpha,kind-beta

  # On a machine whose daemons run with --api-socket
  isthmus troubleshoot --apiserver-socket /run/isthmus/apiserver.sock \\
    --agent-socket /run/isthmus/agent.sock

  # From here, without a running apiserver and without Kubernetes
  isthmus troubleshoot --config ./beta.yaml
  isthmus troubleshoot --peers-dir /var/lib/cilium/clustermesh beta

With nothing said it is the lab that is kept, or the current context where there is none.
The exit status is 0 if nothing failed, 1 if something did, 2 if the question makes no sense.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TroubleshootArgs {
    /// The peers; all when none is named
    #[arg(value_name = "PEER")]
    peers: Vec<String>,
    /// Which lab; the only one there is when left out
    #[arg(long, conflicts_with_all = ["apiserver_socket", "agent_socket", "context", "config", "peers_dir"])]
    lab: Option<LabName>,
    /// The API socket of a clustermesh-apiserver; may be given several times
    #[arg(long, value_name = "PATH", conflicts_with_all = ["context", "config", "peers_dir"])]
    apiserver_socket: Vec<PathBuf>,
    /// The API socket of a node-agent, to ask which nodes it reaches; may be given several times
    #[arg(long, value_name = "PATH", conflicts_with_all = ["context", "config", "peers_dir"])]
    agent_socket: Vec<PathBuf>,
    /// Contexts of the kubeconfig, separated by commas: the clusters' pods are asked through their Kubernetes APIs
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["config", "peers_dir"])]
    context: Vec<String>,
    #[command(flatten)]
    kube: KubeArgs,
    /// Ask from here by one client configuration file
    #[arg(long, value_name = "FILE", conflicts_with = "peers_dir")]
    config: Option<PathBuf>,
    /// Ask from here by a directory of client configuration files
    #[arg(long, value_name = "DIR")]
    peers_dir: Option<PathBuf>,
    /// Letters instead of signs, as where the terminal is not in UTF-8
    #[arg(long)]
    ascii: bool,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// For programs
    Json,
}

/// Everything that was found out.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Everything {
    outcome: Outcome,
    reports: Vec<Report>,
    /// Daemons that could not be asked, and why.
    unanswered: Vec<String>,
}

/// Asks, prints, and says by its exit status what was found.
pub(crate) async fn run(args: TroubleshootArgs) -> Result<ExitCode> {
    let everything = ask(&args).await?;
    match args.output {
        Output::Json => json(&everything),
        Output::Text => print(&everything, if args.ascii { Signs::Ascii } else { signs() }),
    }
    Ok(if everything.outcome == Outcome::Failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn ask(args: &TroubleshootArgs) -> Result<Everything> {
    if args.config.is_some() || args.peers_dir.is_some() {
        let report = from_here(args).await?;
        return Ok(Everything { outcome: report.outcome(), reports: vec![report], unanswered: Vec::new() });
    }
    let Found { apiservers, agents, left_out, missing } = daemons(args).await?;
    let reports = join_all(apiservers.iter().map(|apiserver| report(apiserver, &args.peers)));
    // Each on its own, and both at once: neither waits for the other.
    let (reports, reached) = tokio::join!(reports, join_all(agents.iter().map(reach)));
    let (mut all, mut refusals) = (Vec::new(), Vec::new());
    for report in reports {
        match report {
            Ok(Some(report)) => all.push(report),
            Ok(None) => {}
            Err(refused) => refusals.push(refused),
        }
    }
    // Replicas that wait for their turn know nothing of peers; where nobody else knows, that is what is wrong.
    let answered = !all.is_empty();
    let refusals = refusals.into_iter().filter(|refused| !(refused.standby && answered));
    let unanswered: Vec<String> = missing.into_iter().chain(refusals.map(|refused| refused.reason)).collect();
    let (mut reaches, mut silent) = (Vec::new(), Vec::new());
    for (agent, answer) in agents.iter().zip(reached) {
        match answer {
            Ok(report) => reaches.push(report),
            Err(NoAnswer { reason, .. }) => {
                silent.push(Silent { cluster: agent.cluster.clone(), name: agent.name.clone(), reason })
            }
        }
    }
    if !agents.is_empty() {
        for report in &mut all {
            let asked = Asked { reached: &reaches, silent: &silent, left_out };
            nodes::add(report, asked, &args.kube.namespace, args.peers.is_empty());
        }
    }
    let worst = all.iter().map(Report::outcome).max().unwrap_or(Outcome::Passed);
    let outcome = if unanswered.is_empty() { worst } else { Outcome::Failed };
    Ok(Everything { outcome, reports: all, unanswered })
}

/// As an apiserver would, with nothing but the file.
async fn from_here(args: &TroubleshootArgs) -> Result<Report> {
    let peers = args
        .peers
        .iter()
        .map(|name| name.parse().map_err(|error| LabError::invalid(format!("{name}: {error}"))));
    let flags = probe::Flags {
        peers: peers.collect::<Result<_>>()?,
        peers_dir: args.peers_dir.clone(),
        config: args.config.clone(),
        cluster_name: None,
        cluster_id: None,
        max_connected_clusters: Default::default(),
        ascii: args.ascii,
        json: false,
    };
    probe::from_files(&flags).await.map_err(LabError::invalid)
}

impl TroubleshootArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        matches!(self.output, Output::Json)
    }

    fn means_kubernetes(&self) -> bool {
        if self.lab.is_some() || !self.apiserver_socket.is_empty() || !self.agent_socket.is_empty() {
            return false;
        }
        !self.context.is_empty() || self.kube.kubeconfig.is_some() || isthmus_lab::state::labs().is_empty()
    }
}

/// The daemons to ask: apiservers and node-agents.
async fn daemons(args: &TroubleshootArgs) -> Result<Found> {
    if args.means_kubernetes() {
        return in_clusters(args).await.map_err(|error| LabError::invalid(error.to_string()));
    }
    if !args.apiserver_socket.is_empty() || !args.agent_socket.is_empty() {
        let at = |socket: &PathBuf| Daemon {
            name: socket.display().to_string(),
            cluster: None,
            place: Place::Socket(socket.clone()),
        };
        return Ok(Found {
            apiservers: args.apiserver_socket.iter().map(at).collect(),
            agents: args.agent_socket.iter().map(at).collect(),
            ..Found::default()
        });
    }
    let lab = crate::lab::choose(args.lab.clone())?;
    let dir = StateDir::of(&lab);
    let state = dir.read()?;
    let apiservers = state.clusters.iter().flat_map(|cluster| {
        let sockets = dir.apiserver_sockets(cluster).into_iter();
        sockets.enumerate().map(|(replica, socket)| Daemon {
            name: match cluster.replicas {
                1 => format!("clustermesh-apiserver of {}", cluster.name),
                _ => format!("clustermesh-apiserver-{replica} of {}", cluster.name),
            },
            cluster: Some(cluster.name.to_string()),
            place: Place::Socket(socket),
        })
    });
    let agents = state.clusters.iter().flat_map(|cluster| {
        cluster.nodes.iter().map(|node| Daemon {
            name: format!("{}/{node}", cluster.name),
            cluster: Some(cluster.name.to_string()),
            place: Place::Socket(dir.agent_socket(&cluster.name, node)),
        })
    });
    Ok(Found { apiservers: apiservers.collect(), agents: agents.collect(), ..Found::default() })
}

/// Those of the clusters that contexts name. One that does not answer hides no other.
async fn in_clusters(args: &TroubleshootArgs) -> std::result::Result<Found, MeshError> {
    let contexts = args.kube.contexts()?;
    let names = if args.context.is_empty() { vec![contexts.current()?] } else { args.context.clone() };
    let mut all = Found::default();
    for found in join_all(names.iter().map(|name| place::in_cluster(&contexts, name))).await {
        let found = found?;
        all.apiservers.extend(found.apiservers);
        all.agents.extend(found.agents);
        all.left_out += found.left_out;
        all.missing.extend(found.missing);
    }
    Ok(all)
}

/// What an apiserver says about the named peers, or about all. Nothing if all that were named are itself.
async fn report(apiserver: &Daemon, peers: &[String]) -> std::result::Result<Option<Report>, NoAnswer> {
    if peers.is_empty() {
        return apiserver.ask("/v1/troubleshoot").await.map(Some);
    }
    let status: ApiserverStatus = apiserver.ask("/v1/status").await?;
    let mut whole: Option<Report> = None;
    for peer in peers.iter().filter(|peer| **peer != status.cluster) {
        let mut report: Report =
            apiserver.ask(&format!("/v1/troubleshoot?peer={}", place::quoted(peer))).await?;
        match &mut whole {
            None => whole = Some(report),
            Some(whole) => whole.peers.append(&mut report.peers),
        }
    }
    Ok(whole)
}

async fn reach(agent: &Daemon) -> std::result::Result<ReachReport, NoAnswer> {
    agent.ask("/v1/probe").await
}

fn print(everything: &Everything, signs: Signs) {
    for report in &everything.reports {
        say!("{}", probe::text(report, signs).trim_end());
        say!("");
    }
    match everything.unanswered.as_slice() {
        [] => {}
        reasons => {
            say!("Not asked:");
            reasons.iter().for_each(|reason| say!("  - {reason}"));
        }
    }
}
