//! `isthmus explain`: which policy decides about a packet, and why.

use std::net::IpAddr;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use futures::future::join_all;
use isthmus_lab::{LabError, Result};
use isthmus_node_agent::explain::{Answer, AnsweredPort, Asked, Behind, Party, Port, Side, Target};
use serde::Serialize;

use crate::agents::{Agent, AgentArgs};
use crate::output::json;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # From a pod of one cluster to one of another
  isthmus explain alpha/client beta/default/rebel-base 80

  # To an address outside, by the name of a port, a ping
  isthmus explain alpha/client 192.0.2.1 443
  isthmus explain alpha/client beta/rebel-base http
  isthmus explain alpha/client beta/rebel-base icmp/8

  # What any pod with these labels may do
  isthmus explain app=client,io.cilium.k8s.policy.cluster=alpha beta/rebel-base 53/udp

  # On nodes of a real cluster
  isthmus explain --socket /run/isthmus/agent.sock alpha/client 10.2.0.7 80

Policies are about pods: of a Service, name one of the pods behind it.
The exit status is 0 if the packet passes, 1 if it is denied, 2 if that cannot be told.")]
pub(crate) struct ExplainArgs {
    /// Who would send it: CLUSTER/[NAMESPACE/]POD, an address, or KEY=VALUE,...
    #[arg(value_name = "SOURCE")]
    source: Target,
    /// Who would receive it, in the same way
    #[arg(value_name = "DESTINATION")]
    destination: Target,
    /// 80, 80/udp, the name of a port of the destination, icmp/8 or icmpv6/128
    #[arg(value_name = "PORT")]
    port: Port,
    #[command(flatten)]
    agents: AgentArgs,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

impl ExplainArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        matches!(self.output, Output::Json)
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// For programs
    Json,
}

/// The whole answer, put together from those of the agents.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Explained {
    /// It passes.
    allowed: bool,
    source: Party,
    destination: Party,
    port: AnsweredPort,
    /// What the source's policies say; none if it is no pod of a node that was asked.
    egress: Option<Judged>,
    /// What the destination's policies say.
    ingress: Option<Judged>,
}

/// One end's policies, and the node that they are enforced on.
#[derive(Debug, Serialize)]
struct Judged {
    node: String,
    #[serde(flatten)]
    side: Side,
}

/// Asks, prints, and says by its exit status what would become of the packet.
pub(crate) async fn run(args: ExplainArgs) -> Result<ExitCode> {
    let output = args.output;
    let explained = explain(args).await?;
    match output {
        Output::Json => json(&explained),
        Output::Text => print(&explained),
    }
    Ok(if explained.allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn explain(args: ExplainArgs) -> Result<Explained> {
    let agents = args.agents.agents()?;
    let asked = Asked { source: args.source, destination: args.destination, port: args.port };
    // First who they are: a pod's own node knows best. Then what becomes of a packet between those.
    let (answers, silent) = ask_all(&agents, &asked).await;
    let known = |party: fn(&Answer) -> Option<&Party>, target: &Target, what: &str| {
        let local = answers.iter().filter_map(party).find(|party| party.local);
        let any = || answers.iter().filter_map(party).next();
        local.or_else(any).cloned().ok_or_else(|| unknown(what, target, &agents, &silent))
    };
    let source = known(|answer| answer.source.as_ref(), &asked.source, "source")?;
    let destination = known(|answer| answer.destination.as_ref(), &asked.destination, "destination")?;
    let behind = answers.iter().find_map(|answer| answer.destination.as_ref()?.service.as_ref());
    if let Some(behind) = behind {
        return Err(service(&asked.destination, behind));
    }
    let port = answers.iter().find_map(|answer| answer.port).ok_or_else(|| {
        LabError::invalid(format!("{} has no port called {}", asked.destination, asked.port))
    })?;

    let family = |ip: &IpAddr| {
        let fixed = |target: &Target| match target {
            Target::Address(address) => Some(address.is_ipv4()),
            _ => None,
        };
        fixed(&asked.source).or(fixed(&asked.destination)).is_none_or(|v4| ip.is_ipv4() == v4)
    };
    let found = Asked {
        source: target(&source, family),
        destination: target(&destination, family),
        port: Port::Number { protocol: port.protocol, port: port.port },
    };
    let (answers, _) = ask_all(&agents, &found).await;
    let judged = |side: fn(&Answer) -> Option<&Side>| {
        answers
            .iter()
            .find_map(|answer| Some(Judged { node: answer.node.clone(), side: side(answer)?.clone() }))
    };
    let egress = judged(|answer| answer.egress.as_ref());
    let ingress = judged(|answer| answer.ingress.as_ref());
    if egress.is_none() && ingress.is_none() {
        return Err(LabError::invalid(format!(
            "neither {} nor {} is a pod of a node that was asked ({}), and policies are about pods",
            asked.source,
            asked.destination,
            names(&agents)
        )));
    }
    if (source.local && egress.is_none()) || (destination.local && ingress.is_none()) {
        return Err(LabError::invalid("a pod or its agent went away meanwhile; ask again"));
    }
    let allowed = [&egress, &ingress].into_iter().flatten().all(|judged| judged.side.allowed);
    Ok(Explained { allowed, source, destination, port, egress, ingress })
}

/// The agents' answers, and what is wrong with those that have none.
async fn ask_all(agents: &[Agent], asked: &Asked) -> (Vec<Answer>, Vec<String>) {
    let path = format!("/v1/explain?{}", asked.to_query());
    let (mut answers, mut silent) = (Vec::new(), Vec::new());
    for (agent, answer) in agents.iter().zip(join_all(agents.iter().map(|agent| agent.get(&path))).await) {
        match answer.map(|text| serde_json::from_str::<Answer>(&text)) {
            Ok(Ok(answer)) => answers.push(answer),
            Ok(Err(error)) => {
                silent.push(format!("{}: the answer is of another version ({error})", agent.name))
            }
            Err(error) => silent.push(error.to_string()),
        }
    }
    (answers, silent)
}

/// As every agent understands it.
fn target(party: &Party, family: impl Fn(&IpAddr) -> bool) -> Target {
    let fitting = party.addresses.iter().find(|ip| family(ip)).or(party.addresses.first());
    fitting.map_or(Target::Identity(party.identity), |ip| Target::Address(*ip))
}

/// Backends that are named in an error.
const MOST_BACKENDS: usize = 8;

fn service(target: &Target, behind: &Behind) -> LabError {
    let named: Vec<_> = behind.backends.iter().take(MOST_BACKENDS).map(ToString::to_string).collect();
    let advice = match (named.is_empty(), behind.backends.len() > MOST_BACKENDS) {
        (true, _) => "it has none now".to_owned(),
        (false, false) => format!("ask about {}", named.join(" or ")),
        (false, true) => format!("ask about {} or another of {}", named.join(", "), behind.backends.len()),
    };
    LabError::invalid(format!(
        "{target} is the Service {}: policies are about the pods behind it, and their own ports; {advice}",
        behind.service
    ))
}

fn unknown(what: &str, target: &Target, agents: &[Agent], silent: &[String]) -> LabError {
    let mut text = format!("no agent that was asked ({}) knows the {what} {target}", names(agents));
    match target {
        Target::Pod { .. } => text += ": ask the agent of its node, or give its address",
        Target::Labels(_) => text += ": no pod has such labels",
        Target::Address(_) | Target::Identity(_) => {}
    }
    for reason in silent {
        text += &format!("\n  {reason}");
    }
    LabError::invalid(text)
}

fn names(agents: &[Agent]) -> String {
    agents.iter().map(|agent| agent.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn print(explained: &Explained) {
    let protocol = match explained.port.protocol {
        1 => format!("ICMP type {}", explained.port.port),
        6 => format!("TCP port {}", explained.port.port),
        17 => format!("UDP port {}", explained.port.port),
        58 => format!("ICMPv6 type {}", explained.port.port),
        132 => format!("SCTP port {}", explained.port.port),
        other => format!("IP protocol {other}"),
    };
    say!("From  {}", describe(&explained.source));
    say!("to    {}", describe(&explained.destination));
    say!("with  {protocol}\n");
    print_side("Egress of the source", explained.egress.as_ref());
    print_side("Ingress of the destination", explained.ingress.as_ref());
    say!("{}", if explained.allowed { "It passes." } else { "It is denied." });
}

fn describe(party: &Party) -> String {
    let addresses: Vec<_> = party.addresses.iter().map(ToString::to_string).collect();
    let name = party.pod.clone().unwrap_or_else(|| match addresses.is_empty() {
        true => "anything with that identity".to_owned(),
        false => addresses.join(", "),
    });
    format!("{name} (identity {}; {})", party.identity, party.labels.join(", "))
}

fn print_side(what: &str, judged: Option<&Judged>) {
    let Some(Judged { node, side }) = judged else {
        say!("{what}: not asked, it is no pod of these nodes\n");
        return;
    };
    let verdict = if side.allowed { "allowed" } else { "denied" };
    match &side.rule {
        Some(rule) => say!("{what} (on {node}): {verdict} by {rule}"),
        None => say!("{what} (on {node}): {verdict}, {}", side.reason),
    }
    side.notes.iter().for_each(|note| say!("  note: {note}"));
    let others: Vec<_> = side.matching.iter().filter(|other| side.rule.as_ref() != Some(*other)).collect();
    if !others.is_empty() {
        say!("  also about it:");
        others.iter().for_each(|other| say!("    {other}"));
    }
    if !side.default_deny_by.is_empty() {
        say!("  what nothing allows is denied by:");
        side.default_deny_by.iter().for_each(|policy| say!("    {policy}"));
    }
    say!("");
}
