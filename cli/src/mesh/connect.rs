//! `isthmus connect`: checks clusters, tells them of each other, and waits until they are connected.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures::future::join_all;
use isthmus_crds::SecretVersion;
use isthmus_crds::peer::{PeerEndpoint, Relation};
use kube::ResourceExt;
use serde::Serialize;

use super::apply;
use super::checks::{self, Allowances, Finding};
use super::contexts::{self, Api, Contexts, KubeArgs};
use super::endpoints::{self, GivenEndpoint};
use super::error::MeshError;
use super::exchange::{self, Change, Step, Wanted};
use super::facts::Facts;
use super::peers::{PeerStatus, peer_table};
use super::reach;
use super::topology::{ConnectionMode, Link, links};
use super::wait::{self, End, Goal, Outcome, State, Wait};
use crate::output::{duration, json, note, signs, table};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # Two clusters
  isthmus connect --context kind-alpha --destination-context kind-beta

  # Every one of three clusters with every other one
  isthmus connect --context a --destination-context b,c --connection-mode mesh

  # a reads from b, and b lets it in without reading from a
  isthmus connect --context a --destination-context b --connection-mode unicast

  # See what would be written, and whether anything speaks against it
  isthmus connect --context a --destination-context b --dry-run

  # The same as manifests, to be kept in a repository; they hold no keys
  isthmus connect --context a --destination-context b --dry-run -o yaml

  # The gateways are reached at other addresses than their Services say
  isthmus connect --context a --destination-context b \\
    --source-endpoint 192.0.2.1:32379 --destination-endpoint gateway.b.example

Each cluster gets a Secret of type isthmus.io/peer that names the other one, its gateway and its CA certificates; no \
key leaves its cluster. What is as it should be is left alone, so the command can be given again at any time; nor does \
it end a connection: a cluster that reads from another goes on, also with --connection-mode unicast.
The exit status is 0 if all peers are Ready (or --wait=false), 1 if not, or if a check failed: then nothing was written.")]
pub(crate) struct ConnectArgs {
    /// The context of the source cluster; the current one when left out
    #[arg(long)]
    context: Option<String>,
    /// Contexts of the destination clusters, separated by commas
    #[arg(long, required = true, value_delimiter = ',')]
    destination_context: Vec<String>,
    /// Who reads from whom
    #[arg(long, value_enum, default_value_t = ConnectionMode::Bidirectional)]
    connection_mode: ConnectionMode,
    /// Where other clusters reach the source's gateway, HOST[:PORT]; as its Service says when left out
    #[arg(long, value_delimiter = ',', value_name = "ENDPOINT")]
    source_endpoint: Vec<GivenEndpoint>,
    /// Where other clusters reach a destination's gateway, HOST[:PORT], or CONTEXT=HOST[:PORT] with several destinations
    #[arg(long, value_delimiter = ',', value_name = "ENDPOINT")]
    destination_endpoint: Vec<GivenEndpoint>,
    #[command(flatten)]
    kube: KubeArgs,
    /// Wait until the peers are Ready
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
          action = clap::ArgAction::Set)]
    wait: bool,
    /// How long to wait: 30s, 5m, 1h
    #[arg(long, default_value = "5m", value_parser = duration)]
    wait_duration: Duration,
    /// Check, and print what would be written, but write nothing
    #[arg(long)]
    dry_run: bool,
    /// Take over Secrets that somebody else made
    #[arg(long)]
    force: bool,
    /// Accept that Services' addresses of two clusters overlap; pods' must never
    #[arg(long)]
    allow_overlapping_service_ranges: bool,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

impl ConnectArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        self.output == Output::Json
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Table,
    /// For programs
    Json,
    /// With --dry-run: the Secrets as manifests, to be kept in a repository and applied by whoever applies the rest
    Yaml,
}

/// What was done, and what came of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// Whether all peers are Ready; null if that was not waited for.
    ready: Option<bool>,
    dry_run: bool,
    findings: Vec<Finding>,
    secrets: Vec<Written>,
    peers: Vec<PeerStatus>,
    /// What is still waited for.
    waiting: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Written {
    context: String,
    namespace: String,
    name: String,
    peer: String,
    /// What the peer is to the cluster by it: `connected`, or `admitted` if the peer may read and is not read from.
    relation: String,
    change: Change,
}

/// Checks, writes, waits, prints.
pub(crate) async fn run(args: ConnectArgs) -> Result<ExitCode, MeshError> {
    if args.output == Output::Yaml && !args.dry_run {
        return Err(MeshError::Usage("-o yaml prints what would be written: give --dry-run, too".into()));
    }
    let contexts = args.kube.contexts()?;
    let mut names = vec![contexts.or_current(args.context.as_deref())?];
    names.extend(args.destination_context.iter().cloned());
    contexts::distinct(&names)?;
    let given = given_endpoints(&names, &args)?;
    let links = links(names.len(), args.connection_mode);
    let quiet = args.output == Output::Json;
    // What is piped into a file still says on the terminal what speaks against it.
    if !quiet {
        note(&format!("Checking {} ...", names.join(", ")));
    }
    let (clusters, mut findings) = read(&contexts, &names).await;
    let steps = plan(&clusters, &links, &given, &args, &mut findings);
    findings.extend(rehearse(&clusters, &steps, &findings).await);
    let mut report = Report {
        ready: None,
        dry_run: args.dry_run,
        findings,
        secrets: steps.iter().map(|step| written(step, &args.kube.namespace)).collect(),
        peers: Vec::new(),
        waiting: Vec::new(),
    };
    if !quiet {
        report.findings.iter().for_each(tell);
    }
    let errors = report.findings.iter().filter(|finding| finding.is_error()).count();
    if errors > 0 {
        // A check failed: what would be written is nobody's business.
        report.secrets.clear();
        if quiet {
            json(&report);
        } else {
            note(&format!("isthmus: nothing was written; {errors} of the above must be mended first"));
        }
        return Ok(ExitCode::FAILURE);
    }
    if args.dry_run {
        match args.output {
            Output::Yaml => say!("{}", manifests(&steps)?),
            Output::Table | Output::Json => print(&report, quiet),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let versions = match write(&clusters, &steps, quiet).await {
        Ok(versions) => versions,
        Err(Stopped { written, finding }) => {
            report.secrets.truncate(written);
            if quiet {
                report.findings.push(finding);
                json(&report);
            } else {
                tell(&finding);
                note("isthmus: what was written before stays; give the command again to go on");
            }
            return Ok(ExitCode::FAILURE);
        }
    };
    if !args.wait {
        print(&report, quiet);
        return Ok(ExitCode::SUCCESS);
    }
    let (end, outcomes) = wait::until(&waits(&clusters, &steps, versions), args.wait_duration, quiet).await;
    report.ready = Some(end == End::Reached);
    report.peers = outcomes.iter().filter_map(peer_status).collect();
    report.waiting = outcomes.iter().filter_map(still_waiting).collect();
    print(&report, quiet);
    if end != End::Reached && !quiet {
        unfinished(end, &report, &names, args.wait_duration);
    }
    Ok(if end == End::Reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A cluster that answered.
pub(crate) struct Cluster {
    pub(crate) api: Api,
    pub(crate) facts: Facts,
}

/// What the user says of each context's gateway.
fn given_endpoints(names: &[String], args: &ConnectArgs) -> Result<Vec<Vec<PeerEndpoint>>, MeshError> {
    let mut given: Vec<Vec<PeerEndpoint>> = vec![Vec::new(); names.len()];
    for source in &args.source_endpoint {
        if source.context.as_ref().is_some_and(|context| *context != names[0]) {
            return Err(MeshError::Usage(
                "--source-endpoint is of the source cluster: leave out CONTEXT=".into(),
            ));
        }
        given[0].push(source.endpoint.clone());
    }
    for destination in &args.destination_endpoint {
        let at = match &destination.context {
            Some(context) => names[1..].iter().position(|name| name == context).map(|at| at + 1),
            None if names.len() == 2 => Some(1),
            None => None,
        };
        let Some(at) = at else {
            return Err(MeshError::Usage(format!(
                "--destination-endpoint {}: with several destinations, say which one it is of, \
                 CONTEXT=HOST:PORT; destinations are {}",
                destination.endpoint,
                names[1..].join(", ")
            )));
        };
        given[at].push(destination.endpoint.clone());
    }
    Ok(given)
}

/// Reads all clusters at once. Those that do not answer are findings.
pub(crate) async fn read(contexts: &Contexts, names: &[String]) -> (Vec<Option<Cluster>>, Vec<Finding>) {
    let reading = names.iter().map(async |name| {
        let api = contexts.open(name).await?;
        let facts = Facts::read(&api).await?;
        Ok::<_, MeshError>(Cluster { api, facts })
    });
    let mut findings = Vec::new();
    let mut clusters = Vec::new();
    for (name, read) in names.iter().zip(join_all(reading).await) {
        match read {
            Ok(cluster) => {
                findings.extend(checks::of_cluster(&cluster.facts));
                clusters.push(Some(cluster));
            }
            Err(error) => {
                let (problem, advice) = error.in_context();
                findings.push(Finding::error(&[name], problem, advice));
                clusters.push(None);
            }
        }
    }
    (clusters, findings)
}

/// Checks clusters against each other, and decides about each Secret.
fn plan(
    clusters: &[Option<Cluster>],
    links: &[Link],
    given: &[Vec<PeerEndpoint>],
    args: &ConnectArgs,
    findings: &mut Vec<Finding>,
) -> Vec<Step> {
    let allowed = Allowances { overlapping_services: args.allow_overlapping_service_ranges };
    let there = || clusters.iter().flatten().map(|cluster| &cluster.facts);
    for (at, one) in there().enumerate() {
        findings.extend(there().skip(at + 1).flat_map(|other| checks::of_pair(one, other, allowed)));
    }
    let mut steps = Vec::new();
    for link in links {
        let (Some(told), Some(of)) = (&clusters[link.told], &clusters[link.of]) else { continue };
        let Some(identity) = of.facts.identity() else { continue };
        findings.extend(checks::of_known_peers(&told.facts, identity));
        let endpoints = match given[link.of].as_slice() {
            [] => endpoints::of(&of.facts),
            given => Ok(given.to_vec()),
        };
        let wanted = Wanted {
            context: &told.facts.context,
            namespace: &told.facts.namespace,
            present: told.facts.peer_secrets.as_ref(),
            peer: &identity.info,
            endpoints,
            at_least: link.at_least,
        };
        match exchange::plan(wanted, args.force) {
            Ok(step) => {
                if !reads(&step) {
                    findings.extend(checks::of_one_way(&of.facts, &told.facts));
                }
                steps.push(step);
            }
            Err(finding) => findings.push(finding),
        }
    }
    // Who is let in when it first asks need not ask again.
    steps.sort_by_key(|step| step.wanted.relation);
    steps
}

/// What the API servers and the gateways say to what is about to be done. Asked only if nothing else speaks against it.
async fn rehearse(clusters: &[Option<Cluster>], steps: &[Step], so_far: &[Finding]) -> Vec<Finding> {
    if so_far.iter().any(Finding::is_error) {
        return Vec::new();
    }
    let writes = join_all(steps.iter().map(async |step| match api_of(clusters, step) {
        Some(api) => apply::rehearse(api, step).await.err(),
        None => None,
    }));
    let hints = join_all(steps.iter().filter(|step| reads(step)).map(reach::hint));
    let (writes, hints) = tokio::join!(writes, hints);
    let mut hints: Vec<Finding> = hints.into_iter().flatten().collect();
    hints.dedup();
    writes.into_iter().flatten().chain(hints).collect()
}

fn api_of<'a>(clusters: &'a [Option<Cluster>], step: &Step) -> Option<&'a Api> {
    clusters.iter().flatten().map(|cluster| &cluster.api).find(|api| api.context == step.context)
}

/// Where writing ended.
struct Stopped {
    /// So many steps are done.
    written: usize,
    /// Why the next one is not.
    finding: Finding,
}

/// Writes the Secrets. The versions that say what they are to say, in the order of the steps.
async fn write(
    clusters: &[Option<Cluster>],
    steps: &[Step],
    quiet: bool,
) -> Result<Vec<Option<SecretVersion>>, Stopped> {
    let mut versions = Vec::new();
    for step in steps {
        let Some(api) = api_of(clusters, step) else {
            versions.push(None);
            continue;
        };
        let version = apply::apply(api, step).await.map_err(|refusal| Stopped {
            written: versions.len(),
            finding: apply::finding(api, step, &refusal),
        })?;
        if !quiet {
            let (context, namespace, change) = (&step.context, &api.namespace, step.change);
            note(&format!("{context}: Secret {namespace}/{} {change}", step.name()));
        }
        versions.push(version);
    }
    Ok(versions)
}

/// Whether the cluster that is told reads from the peer.
fn reads(step: &Step) -> bool {
    step.wanted.relation == Relation::Connected
}

/// What is to be waited for.
fn waits<'a>(
    clusters: &'a [Option<Cluster>],
    steps: &[Step],
    versions: Vec<Option<SecretVersion>>,
) -> Vec<Wait<'a>> {
    let wait = |(step, secret): (&Step, Option<SecretVersion>)| {
        let cluster = clusters.iter().flatten().find(|cluster| cluster.api.context == step.context)?;
        let known = cluster.facts.peers.iter().find(|peer| peer.name_any() == step.peer.as_str());
        // What it says before a change is no answer to the change. An apiserver that names the Secret's version says it better.
        let before = match step.change {
            Change::Unchanged | Change::Unknown => None,
            Change::Created | Change::Updated => known.and_then(|peer| peer.resource_version()),
        };
        let goal = Goal::of(&step.wanted, secret, before)?;
        Some(Wait { api: &cluster.api, peer: step.peer.clone(), goal })
    };
    steps.iter().zip(versions).filter_map(wait).collect()
}

fn written(step: &Step, namespace: &str) -> Written {
    Written {
        context: step.context.clone(),
        namespace: namespace.to_owned(),
        name: step.name(),
        peer: step.peer.to_string(),
        relation: step.wanted.relation.to_string(),
        change: step.change,
    }
}

pub(crate) fn peer_status(outcome: &Outcome) -> Option<PeerStatus> {
    outcome.seen.as_ref().map(|peer| PeerStatus::of(&outcome.context, peer))
}

pub(crate) fn still_waiting(outcome: &Outcome) -> Option<String> {
    match &outcome.state {
        State::Waiting(why) => Some(format!("{}: {why}", outcome.context)),
        State::Reached => None,
    }
}

/// A finding, for people.
pub(crate) fn tell(finding: &Finding) {
    let (signs, contexts) = (signs(), finding.contexts.join(", "));
    let (sign, arrow) = (signs.sign(finding.level.into()), signs.arrow());
    note(&format!("{sign} {contexts}: {}\n    {arrow} {}", finding.problem, finding.advice));
}

fn print(report: &Report, quiet: bool) {
    if quiet {
        return json(report);
    }
    if report.dry_run || report.ready.is_none() {
        let mut rows = table(&["CONTEXT", "SECRET", "PEER", "RELATION", "CHANGE"]);
        for secret in &report.secrets {
            rows.add_row([
                secret.context.clone(),
                format!("{}/{}", secret.namespace, secret.name),
                secret.peer.clone(),
                secret.relation.clone(),
                if report.dry_run { would(secret.change).to_owned() } else { secret.change.to_string() },
            ]);
        }
        say!("{rows}");
    } else if !report.peers.is_empty() {
        say!("{}", peer_table(&report.peers, false));
    }
}

/// The Secrets as documents, each under the context that it is for.
fn manifests(steps: &[Step]) -> Result<String, MeshError> {
    let documents = steps.iter().map(|step| {
        let text = serde_norway::to_string(&apply::manifest_to_keep(step))
            .map_err(|error| MeshError::Invalid(format!("{}: {error}", step.name())))?;
        let (context, peer) = (&step.context, &step.peer);
        let says = match reads(step) {
            true => format!("how to reach {peer}, and the certificates of its authority"),
            false => format!("the certificates of {peer}'s authority, to let it in; nothing is read from it"),
        };
        Ok(format!("# For {context}: {says}.\n{text}"))
    });
    Ok(documents.collect::<Result<Vec<_>, MeshError>>()?.join("---\n"))
}

fn would(change: Change) -> &'static str {
    match change {
        Change::Created => "would be created",
        Change::Updated => "would be updated",
        Change::Unchanged => "unchanged",
        Change::Unknown => "would be written",
    }
}

fn unfinished(end: End, report: &Report, contexts: &[String], within: Duration) {
    match end {
        End::TimedOut => note(&format!("isthmus: not connected within {} s:", within.as_secs())),
        _ => note("isthmus: interrupted; not connected yet:"),
    }
    report.waiting.iter().for_each(|why| note(&format!("  - {why}")));
    note(&format!(
        "The Secrets stay, and the clusters go on trying. Give the command again to wait on; `isthmus disconnect` takes \
         them apart; `isthmus troubleshoot --context {}` looks for the cause.",
        contexts.join(",")
    ));
}
