//! `isthmus monitor`: verdicts on packets, as they are made.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use isthmus_lab::{LabError, Result};
use isthmus_node_agent::events::flow::{
    Endpoint, Flow, Icmp, Layer4, Line, LostEventSource, LostEvents, TrafficDirection, Verdict,
};
use isthmus_node_agent::events::{Filter, FilterError};
use tokio::sync::mpsc;

use crate::agents::{Agent, AgentArgs};
use crate::output::duration;

/// Lines on their way to the terminal. A terminal that is slower is waited for; then the agents are, who count what they
/// have to leave out.
const QUEUE: usize = 1024;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # Everything, of all nodes of the lab that is kept
  isthmus monitor

  # What is dropped on its way to or from a pod
  isthmus monitor --verdict dropped --pod default/client

  # One node of a real cluster, for programs
  isthmus monitor --socket /run/isthmus/agent.sock -o json | jq .flow.destination.pod_name

  # Between clusters: alpha's side of what concerns beta
  isthmus monitor --node alpha/alpha-node1 --cluster beta --port 80

Values of one option are alternatives; all options that are given have to hold.
JSON lines have the shape of Hubble's flows. What was lost on the way is counted and told.
The exit status is 1 if --timeout came before --limit, and 2 on errors.")]
pub(crate) struct MonitorArgs {
    #[command(flatten)]
    agents: AgentArgs,
    /// Only of this node, CLUSTER/NODE; may be given several times
    #[arg(long, conflicts_with = "socket")]
    node: Vec<String>,
    /// A pod on either side: [[CLUSTER/]NAMESPACE/]NAME, where the name may be a prefix
    #[arg(long, value_name = "POD")]
    pod: Vec<String>,
    /// A label on either side: KEY or KEY=VALUE, with its source (k8s:app=web) or without; several, separated by commas, have to hold together
    #[arg(short, long, value_name = "LABEL")]
    label: Vec<String>,
    /// What became of the packet
    #[arg(long, value_parser = ["forwarded", "dropped"], ignore_case = true)]
    verdict: Vec<String>,
    /// A cluster on either side
    #[arg(long)]
    cluster: Vec<String>,
    /// An address on either side, or a prefix
    #[arg(long)]
    ip: Vec<String>,
    /// A numeric identity on either side
    #[arg(long)]
    identity: Vec<String>,
    /// A source or destination port
    #[arg(long)]
    port: Vec<String>,
    /// What is above IP
    #[arg(long, value_parser = ["tcp", "udp", "sctp", "icmp", "icmpv4", "icmpv6"], ignore_case = true)]
    protocol: Vec<String>,
    /// Which policy was asked: that of the pod that sends (egress) or of the one that receives (ingress)
    #[arg(long, value_parser = ["ingress", "egress"], ignore_case = true)]
    direction: Vec<String>,
    /// End after so many flows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// End after this time: 30s, 5m, 1h
    #[arg(long, value_parser = duration)]
    timeout: Option<Duration>,
    /// How to print them
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

impl MonitorArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        self.output == Output::Json
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A line each, for people
    Table,
    /// A line of JSON each, for programs
    Json,
}

/// What comes of a node.
enum News {
    Line(String),
    /// The connection is gone, or is there again.
    Note(String),
}

/// Prints until it is enough.
pub(crate) async fn run(args: MonitorArgs) -> Result<ExitCode> {
    let path =
        format!("/v1/events?{}", filter(&args).map_err(|e| LabError::invalid(e.to_string()))?.to_query());
    let agents = agents(&args)?;
    let (news, mut incoming) = mpsc::channel(QUEUE);
    connect(agents, &path, news).await?;
    let deadline = args.timeout.map(|timeout| tokio::time::Instant::now() + timeout);
    let mut left = args.limit;
    loop {
        if left == Some(0) {
            return Ok(ExitCode::SUCCESS);
        }
        let end = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = end => {
                return Ok(if left.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS });
            }
            next = incoming.recv() => match next {
                None => return Ok(ExitCode::SUCCESS),
                Some(News::Note(note)) => note_down(&note),
                Some(News::Line(text)) => match print(&text, args.output) {
                    Printed::Flow => left = left.map(|left| left - 1),
                    Printed::Other => {}
                    // Nobody reads any more.
                    Printed::Nowhere => return Ok(ExitCode::SUCCESS),
                },
            },
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
        }
    }
}

fn filter(args: &MonitorArgs) -> std::result::Result<Filter, FilterError> {
    let mut filter = Filter::default();
    let fields = [
        ("pod", &args.pod),
        ("label", &args.label),
        ("verdict", &args.verdict),
        ("cluster", &args.cluster),
        ("ip", &args.ip),
        ("identity", &args.identity),
        ("port", &args.port),
        ("protocol", &args.protocol),
        ("direction", &args.direction),
    ];
    for (field, values) in fields {
        values.iter().try_for_each(|value| filter.add(field, value))?;
    }
    Ok(filter)
}

fn agents(args: &MonitorArgs) -> Result<Vec<Agent>> {
    let all = args.agents.agents()?;
    for wanted in &args.node {
        if all.iter().all(|agent| agent.name != *wanted) {
            let names: Vec<_> = all.iter().map(|agent| agent.name.as_str()).collect();
            return Err(LabError::invalid(format!(
                "there is no node {wanted}; there are {}",
                names.join(", ")
            )));
        }
    }
    Ok(all.into_iter().filter(|agent| args.node.is_empty() || args.node.contains(&agent.name)).collect())
}

/// Follows each agent in a task of its own, for as long as anybody listens.
///
/// # Errors
/// None of them answers.
async fn connect(agents: Vec<Agent>, path: &str, news: mpsc::Sender<News>) -> Result<()> {
    let mut refusals = Vec::new();
    let count = agents.len();
    for agent in agents {
        let first = agent.lines(path).await;
        if let Err(error) = &first {
            refusals.push(agent.refused(error));
        }
        tokio::spawn(follow(agent, path.to_owned(), first.ok(), news.clone()));
    }
    if refusals.len() == count {
        return Err(refusals.into_iter().next().unwrap_or_else(|| LabError::invalid("the lab has no nodes")));
    }
    refusals.iter().for_each(|refusal| note_down(&format!("{refusal}; trying again")));
    Ok(())
}

type AgentLines = tokio::io::Lines<tokio::io::BufReader<tokio::net::unix::OwnedReadHalf>>;

/// An agent that goes is waited for.
async fn follow(agent: Agent, path: String, mut lines: Option<AgentLines>, news: mpsc::Sender<News>) {
    let mut was_there = lines.is_some();
    let mut retry = FIRST_RETRY;
    loop {
        if let Some(open) = &mut lines {
            while let Ok(Some(line)) = open.next_line().await {
                if news.send(News::Line(line)).await.is_err() {
                    return;
                }
            }
        }
        if was_there
            && news
                .send(News::Note(format!("{}: the agent has gone; waiting for it", agent.name)))
                .await
                .is_err()
        {
            return;
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(LONGEST_RETRY);
        lines = agent.lines(&path).await.ok();
        was_there = lines.is_some();
        if was_there {
            retry = FIRST_RETRY;
            let note =
                format!("{}: the agent is there (again); what happened meanwhile is not told", agent.name);
            if news.send(News::Note(note)).await.is_err() {
                return;
            }
        } else if news.is_closed() {
            return;
        }
    }
}

fn note_down(note: &str) {
    let _ = writeln!(std::io::stderr(), "isthmus: {note}");
}

enum Printed {
    Flow,
    Other,
    Nowhere,
}

fn print(text: &str, output: Output) -> Printed {
    let Ok(line) = serde_json::from_str::<Line>(text) else {
        note_down("a line of another version was left out");
        return Printed::Other;
    };
    let shown = match (output, &line) {
        (Output::Json, _) => text.to_owned(),
        (Output::Table, Line { flow: Some(flow), .. }) => row(flow),
        (Output::Table, Line { lost_events: Some(lost), node_name, .. }) => {
            note_down(&loss(lost, node_name));
            return Printed::Other;
        }
        (Output::Table, _) => return Printed::Other,
    };
    let mut out = std::io::stdout().lock();
    match (writeln!(out, "{shown}").and_then(|()| out.flush()), line.flow) {
        (Err(_), _) => Printed::Nowhere,
        (Ok(()), Some(_)) => Printed::Flow,
        (Ok(()), None) => Printed::Other,
    }
}

/// `03:41:07.123 alpha/node1 egress DROPPED TCP alpha/default/client:40122 -> beta/default/web:80 (a rule denies it: ...)`
fn row(flow: &Flow) -> String {
    let verdict = match flow.verdict {
        Verdict::Forwarded => "FORWARDED",
        Verdict::Dropped => "DROPPED",
    };
    let direction = match flow.traffic_direction {
        TrafficDirection::Ingress => "ingress",
        TrafficDirection::Egress => "egress",
    };
    let (protocol, ports) = match &flow.l4 {
        Some(l4 @ (Layer4::ICMPv4(Icmp { kind }) | Layer4::ICMPv6(Icmp { kind }))) => {
            (format!("{}/{kind}", l4.name()), None)
        }
        Some(l4) => (l4.name().to_owned(), l4.ports()),
        None => (flow.summary.clone(), None),
    };
    let side = |endpoint: &Endpoint, ip: std::net::IpAddr, port: Option<u16>| {
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let address =
            if ip.is_ipv6() && !port.is_empty() { format!("[{ip}]{port}") } else { format!("{ip}{port}") };
        match (endpoint.pod_name.as_str(), endpoint.labels.as_slice()) {
            ("", []) => format!("{address} (identity {})", endpoint.identity),
            ("", labels) => format!("{address} ({})", short(labels)),
            (pod, _) => format!("{}/{}/{pod}{port}", endpoint.cluster_name, endpoint.namespace),
        }
    };
    let mut why = flow.isthmus.reason.clone();
    if let Some(rule) = &flow.isthmus.rule {
        why = format!("{why}: {rule}");
    }
    let reply = if flow.is_reply { " reply" } else { "" };
    format!(
        "{} {:<18} {direction:<7} {verdict:<9} {protocol:<8} {} -> {}{reply} ({why})",
        flow.time.format("%H:%M:%S%.3f"),
        flow.node_name,
        side(&flow.source, flow.ip.source, ports.map(|(from, _)| from)),
        side(&flow.destination, flow.ip.destination, ports.map(|(_, to)| to)),
    )
}

/// The labels that people gave, unless there are none.
fn short(labels: &[String]) -> String {
    let given: Vec<&str> =
        labels.iter().map(String::as_str).filter(|label| !label.contains("io.cilium.")).collect();
    let shown = if given.is_empty() { labels.iter().map(String::as_str).collect() } else { given };
    shown.join(",")
}

fn loss(LostEvents { source, num_events_lost: count }: &LostEvents, node: &str) -> String {
    let why = match source {
        LostEventSource::PerfEventRingBuffer => "the agent was too busy to read them",
        LostEventSource::HubbleRingBuffer => "this command was too slow; a filter helps",
        LostEventSource::RateLimit => "there were more per second than the node tells of",
    };
    format!("{node}: {count} events are missing here: {why}")
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// Takes one request and answers with one line.
    async fn answer(listener: &UnixListener, line: &str) {
        let (mut stream, _) = listener.accept().await.expect("a caller");
        let mut request = [0; 256];
        let length = stream.read(&mut request).await.expect("a request");
        assert!(request[..length].starts_with(b"GET /v1/events?pod=client HTTP/1.0\r\n"));
        let text = format!("HTTP/1.0 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n{line}\n");
        stream.write_all(text.as_bytes()).await.expect("an answer");
    }

    #[tokio::test]
    async fn an_agent_that_restarts_is_waited_for_and_the_gap_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("agent.sock");
        let agent = Agent { name: "alpha/node1".into(), socket: socket.clone() };
        let (news, mut incoming) = mpsc::channel(8);
        let listener = UnixListener::bind(&socket).expect("a socket");
        let agents = async {
            answer(&listener, "before").await;
            std::fs::remove_file(&socket).expect("the socket goes with the agent");
            let listener = UnixListener::bind(&socket).expect("a socket");
            answer(&listener, "after").await;
        };
        let told = async {
            let mut told = Vec::new();
            while told.len() < 4 {
                told.push(match incoming.recv().await.expect("more news") {
                    News::Line(line) => line,
                    News::Note(note) => note,
                });
            }
            told
        };
        let path = "/v1/events?pod=client";
        let both = async { tokio::join!(connect(vec![agent.clone()], path, news), agents, told) };
        let (connected, (), told) =
            tokio::time::timeout(Duration::from_secs(20), both).await.expect("within the deadline");
        connected.expect("the agent answers");
        assert_eq!(
            (told[0].as_str(), told[2].contains("again"), told[3].as_str()),
            ("before", true, "after")
        );
        assert!(told[1].contains("has gone"), "{told:?}");
    }

    #[tokio::test]
    async fn agents_that_are_all_away_are_an_error_and_their_refusals_are_passed_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("agent.sock");
        let agent = Agent { name: "alpha/node1".into(), socket: socket.clone() };
        let (news, _incoming) = mpsc::channel(8);
        let error = connect(vec![agent.clone()], "/", news.clone()).await.expect_err("nobody answers");
        assert!(error.to_string().contains("alpha/node1: no answer"), "{error}");

        let listener = UnixListener::bind(&socket).expect("a socket");
        let refusing = async {
            let (mut stream, _) = listener.accept().await.expect("a caller");
            let _ = stream.read(&mut [0; 256]).await;
            let text = b"HTTP/1.0 400 Bad Request\r\n\r\n`colour` is not a filter\n";
            stream.write_all(text).await.expect("an answer");
        };
        let (error, ()) = tokio::join!(connect(vec![agent], "/", news), refusing);
        let error = error.expect_err("a refusal");
        assert!(error.to_string().contains("`colour` is not a filter"), "{error}");
    }
}
