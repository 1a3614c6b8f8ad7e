//! `isthmus status`: what each apiserver and each agent says of itself, side by side; or, of clusters that are reached
//! through their Kubernetes APIs, what those tell.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use clustermesh_apiserver::status::{ApiserverStatus, PolicyStatus};
use futures::future::join_all;
use isthmus_lab::names::LabName;
use isthmus_lab::state::StateDir;
use isthmus_lab::{Result, status};
use isthmus_node_agent::policy::PolicySummary;
use isthmus_node_agent::status::AgentStatus;
use serde::Serialize;

use crate::Failure;
use crate::mesh::contexts::KubeArgs;
use crate::mesh::status::Request;
use crate::output::{age, duration, json, table, word};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # Of the lab that is kept
  isthmus status
  isthmus status --lab global-service -o json

  # Of real clusters, through their Kubernetes APIs
  isthmus status --context kind-alpha,kind-beta
  isthmus status --context kind-alpha --wait --wait-duration 10m

  # On a node of a real cluster
  isthmus status --agent-socket /run/isthmus/agent.sock

  # On a machine whose clustermesh-apiserver runs with --api-socket
  isthmus status --apiserver-socket /run/isthmus/apiserver.sock

With nothing said it is the lab that is kept, or the current context where there is none.
The exit status is not zero when something is not well.")]
pub(crate) struct StatusArgs {
    /// Contexts of the kubeconfig, separated by commas
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["lab", "apiserver_socket", "agent_socket"])]
    context: Vec<String>,
    #[command(flatten)]
    kube: KubeArgs,
    /// Wait until all is well
    #[arg(long, conflicts_with_all = ["lab", "apiserver_socket", "agent_socket"])]
    wait: bool,
    /// How long to wait: 30s, 5m, 1h
    #[arg(long, default_value = "5m", value_parser = duration)]
    wait_duration: Duration,
    /// Which lab; the only one there is when left out
    #[arg(long, conflicts_with_all = ["apiserver_socket", "agent_socket"])]
    lab: Option<LabName>,
    /// The API socket of a clustermesh-apiserver; may be given several times
    #[arg(long, value_name = "PATH")]
    apiserver_socket: Vec<PathBuf>,
    /// The API socket of a node-agent; may be given several times
    #[arg(long, value_name = "PATH")]
    agent_socket: Vec<PathBuf>,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Everything that was asked, and what is not well.
#[derive(Debug, Serialize)]
struct MeshStatus {
    healthy: bool,
    problems: Vec<String>,
    apiservers: Vec<ApiserverStatus>,
    agents: Vec<AgentStatus>,
}

/// Asks, prints, and says by its exit status whether all is well.
pub(crate) async fn run(args: StatusArgs) -> std::result::Result<ExitCode, Failure> {
    if args.means_kubernetes() {
        let contexts = args.kube.contexts()?;
        let names = if args.context.is_empty() { vec![contexts.current()?] } else { args.context };
        let wait = args.wait.then_some(args.wait_duration);
        let request = Request { names, wait, json: matches!(args.output, Output::Json) };
        return Ok(crate::mesh::status::run(&contexts, &request).await?);
    }
    let (apiservers, agents) = sockets(&args)?;
    let mesh = MeshStatus::ask(&apiservers, &agents).await;
    match args.output {
        Output::Json => json(&mesh),
        Output::Table => print(&mesh),
    }
    Ok(if mesh.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl StatusArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        matches!(self.output, Output::Json)
    }

    fn means_kubernetes(&self) -> bool {
        if self.lab.is_some() || !self.apiserver_socket.is_empty() || !self.agent_socket.is_empty() {
            return false;
        }
        !self.context.is_empty()
            || self.wait
            || self.kube.kubeconfig.is_some()
            || isthmus_lab::state::labs().is_empty()
    }
}

fn sockets(args: &StatusArgs) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    if !args.apiserver_socket.is_empty() || !args.agent_socket.is_empty() {
        return Ok((args.apiserver_socket.clone(), args.agent_socket.clone()));
    }
    let lab = crate::lab::choose(args.lab.clone())?;
    let dir = StateDir::of(&lab);
    let state = dir.read()?;
    let apiservers = state.clusters.iter().flat_map(|c| dir.apiserver_sockets(c)).collect();
    let nodes =
        state.clusters.iter().flat_map(|c| c.nodes.iter().map(|node| dir.agent_socket(&c.name, node)));
    Ok((apiservers, nodes.collect()))
}

impl MeshStatus {
    async fn ask(apiservers: &[PathBuf], agents: &[PathBuf]) -> Self {
        let mut mesh =
            Self { healthy: false, problems: Vec::new(), apiservers: Vec::new(), agents: Vec::new() };
        for answer in join_all(apiservers.iter().map(PathBuf::as_path).map(status::apiserver)).await {
            match answer {
                Ok(status) => {
                    mesh.problems.extend(status.problems());
                    mesh.apiservers.push(status);
                }
                Err(e) => mesh.problems.push(e.to_string()),
            }
        }
        for answer in join_all(agents.iter().map(PathBuf::as_path).map(status::agent)).await {
            match answer {
                Ok(status) => {
                    mesh.problems.extend(agent_problems(&status));
                    mesh.agents.push(status);
                }
                Err(e) => mesh.problems.push(e.to_string()),
            }
        }
        mesh.healthy = mesh.problems.is_empty();
        mesh
    }
}

fn agent_problems(agent: &AgentStatus) -> Vec<String> {
    let at = |what: &str| format!("cluster {}: node {}: {what}", agent.cluster, agent.node);
    let mut problems: Vec<String> = agent.problems.iter().map(|p| at(p)).collect();
    if !agent.ready && problems.is_empty() {
        problems.push(at("the agent is not ready"));
    }
    problems
}

/// The columns of the table of peers.
const PEERS: [&str; 11] = [
    "CLUSTER",
    "PEER",
    "ID",
    "STATE",
    "CONNECTED",
    "AGE",
    "LAG",
    "NODES",
    "IDENTITIES",
    "ENDPOINTS",
    "SERVICES",
];

fn print(mesh: &MeshStatus) {
    if !mesh.apiservers.is_empty() {
        let mut clusters = table(&[
            "CLUSTER",
            "ID",
            "APISERVER",
            "STORE",
            "REVISION",
            "NODES",
            "IDENTITIES",
            "ENDPOINTS",
            "SERVICES",
            "POLICIES",
        ]);
        let mut peers = table(&PEERS);
        for apiserver in &mesh.apiservers {
            let counts = &apiserver.exporter.counts;
            clusters.add_row([
                apiserver.cluster.clone(),
                apiserver.cluster_id.to_string(),
                word(apiserver.ready, "ready", "not ready"),
                apiserver.store.engine.clone(),
                apiserver.store.revision.to_string(),
                counts.nodes.to_string(),
                counts.identities.to_string(),
                counts.endpoints.to_string(),
                counts.services.to_string(),
                policies(&apiserver.exporter.policies),
            ]);
            for peer in &apiserver.peers {
                peers.add_row([
                    apiserver.cluster.clone(),
                    peer.name.clone(),
                    peer.cluster_id.map_or_else(|| "-".into(), |id| id.to_string()),
                    peer.state.to_string(),
                    word(peer.connected, "yes", "no"),
                    age(peer.data_age_seconds),
                    peer.revision_lag.to_string(),
                    peer.counts.nodes.to_string(),
                    peer.counts.identities.to_string(),
                    peer.counts.endpoints.to_string(),
                    peer.counts.services.to_string(),
                ]);
            }
            for peer in &apiserver.admitted {
                // It may read, and nothing is read from it.
                let known = [apiserver.cluster.as_str(), &peer.name, "-", "admitted"].map(str::to_owned);
                peers.add_row(known.into_iter().chain(std::iter::repeat_n("-".to_owned(), PEERS.len() - 4)));
            }
        }
        say!("{clusters}\n");
        if !peers.is_empty() {
            say!("{peers}\n");
        }
    }
    if !mesh.agents.is_empty() {
        let mut nodes = table(&[
            "CLUSTER",
            "NODE",
            "AGENT",
            "PODS",
            "RESTRICTED",
            "KNOWS",
            "STATE",
            "AGE",
            "LAG",
            "NODES",
            "IDENTITIES",
            "ENDPOINTS",
            "SERVICES",
        ]);
        for agent in &mesh.agents {
            for cluster in &agent.clusters {
                nodes.add_row([
                    agent.cluster.clone(),
                    agent.node.clone(),
                    word(agent.ready, "ready", "not ready"),
                    agent.datapath.attached_pods.to_string(),
                    restricted(&agent.policy),
                    cluster.name.clone(),
                    state(cluster.state),
                    age(cluster.data_age_seconds),
                    cluster.revision_lag.map_or_else(|| "-".into(), |lag| lag.to_string()),
                    cluster.nodes.to_string(),
                    cluster.identities.to_string(),
                    cluster.endpoints.to_string(),
                    cluster.services.to_string(),
                ]);
            }
        }
        say!("{nodes}\n");
        print_encryption(&mesh.agents);
    }
    match mesh.problems.as_slice() {
        [] => say!("All is well."),
        problems => {
            say!("Not well:");
            problems.iter().for_each(|p| say!("  - {p}"));
        }
    }
}

/// How many policies, and how many of them are not enforced as written.
fn policies(policies: &PolicyStatus) -> String {
    match policies.with_problems.len() {
        0 => policies.total.to_string(),
        bad => format!("{} ({bad} not as written)", policies.total),
    }
}

/// Pods' interfaces whose traffic policies restrict: incoming and outgoing.
fn restricted(policy: &PolicySummary) -> String {
    match policy.decided {
        true => format!("{} in, {} out", policy.ingress_enforced, policy.egress_enforced),
        false => "not read yet".to_owned(),
    }
}

/// One line per node, and one for each of its peers that there has been no handshake with.
fn print_encryption(agents: &[AgentStatus]) {
    if agents.iter().all(|agent| !agent.encryption.enabled) {
        return;
    }
    let mut nodes = table(&[
        "CLUSTER",
        "NODE",
        "ENCRYPTION",
        "STRICT",
        "PEERS",
        "SESSIONS",
        "LAST HANDSHAKE",
        "RECEIVED",
        "SENT",
        "MTU",
        "PUBLIC KEY",
    ]);
    for agent in agents {
        let encryption = &agent.encryption;
        let mode = match (encryption.enabled, encryption.ready) {
            (false, _) => "off".to_owned(),
            (true, false) => "not ready".to_owned(),
            (true, true) => encryption.mode.clone().unwrap_or_default(),
        };
        let handshakes = || encryption.peers.iter().filter_map(|peer| peer.last_handshake_seconds);
        let latest = handshakes().min_by(f64::total_cmp);
        nodes.add_row([
            agent.cluster.clone(),
            agent.node.clone(),
            mode,
            word(encryption.strict, "yes", "no"),
            encryption.peers.len().to_string(),
            handshakes().filter(|age| *age < SESSION_SECONDS).count().to_string(),
            age(latest),
            bytes(encryption.peers.iter().map(|peer| peer.rx_bytes).sum()),
            bytes(encryption.peers.iter().map(|peer| peer.tx_bytes).sum()),
            encryption.mtu.to_string(),
            encryption.public_key.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    say!("{nodes}\n");
}

/// How long a WireGuard session can be used.
const SESSION_SECONDS: f64 = 180.0;

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn state(state: isthmus_node_agent::status::ClusterState) -> String {
    // As in JSON, so that both can be searched for alike.
    serde_json::to_value(state).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_a_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }

    #[tokio::test]
    async fn a_daemon_that_does_not_answer_is_a_problem_and_not_a_failure() {
        let mesh =
            MeshStatus::ask(&["/nonexistent/apiserver.sock".into()], &["/nonexistent/agent.sock".into()])
                .await;
        assert!(!mesh.healthy);
        assert_eq!(mesh.problems.len(), 2);
        assert!(mesh.problems[0].contains("/nonexistent/apiserver.sock"), "{:?}", mesh.problems);
    }
}
