//! `isthmus disconnect`: tells clusters to stop reading from each other, and waits until nothing is left.

use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Args};
use clustermesh_apiserver::troubleshoot::Outcome;
use futures::future::join_all;
use isthmus_crds::peer::Relation;
use isthmus_crds::{ClusterPeer, PeerRelation, PeerSource, names};
use isthmus_wire::ClusterName;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use serde::Serialize;

use super::apply;
use super::connect::still_waiting;
use super::contexts::{self, Api, Contexts, KubeArgs};
use super::error::{MeshError, Refusal};
use super::exchange::{about, is_ours, maker};
use super::facts::{self, Published};
use super::topology::{ConnectionMode, links};
use super::wait::{self, End, Goal, Wait};
use crate::output::{Format, duration, json, note, signs};

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("destinations").required(true).multiple(true))]
#[command(after_help = "Examples:
  # Both clusters stop reading from each other
  isthmus disconnect --context kind-alpha --destination-context kind-beta

  # The source stops reading from the destination, which then lets it in no more
  isthmus disconnect --context a --destination-context b --connection-mode unicast

  # The other cluster is gone, or its API cannot be reached
  isthmus disconnect --context a --destination-cluster beta

  # Forget the peer altogether: its CA is trusted no longer
  isthmus disconnect --context a --destination-context b --delete

Clients of global services are given time to move to other backends before a peer's are removed, which takes minutes.
Without --delete the Secrets stay, annotated isthmus.io/connect: \"false\", and `isthmus connect` connects again. With \
--connection-mode unicast the other direction goes on as it was: a cluster that is still read from lets the reader in \
(isthmus.io/admit: \"true\"), also with --delete.
The exit status is 0 if nothing of the peers is left (or --wait=false).")]
pub(crate) struct DisconnectArgs {
    /// The context of the source cluster; the current one when left out
    #[arg(long)]
    context: Option<String>,
    /// Contexts of the destination clusters, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "CONTEXT", group = "destinations")]
    destination_context: Vec<String>,
    /// Names of destination clusters that need not be reachable: the source's side alone is changed
    #[arg(long, value_delimiter = ',', value_name = "NAME", group = "destinations")]
    destination_cluster: Vec<ClusterName>,
    /// Who is to stop reading from whom
    #[arg(long, value_enum, default_value_t = ConnectionMode::Bidirectional)]
    connection_mode: ConnectionMode,
    #[command(flatten)]
    kube: KubeArgs,
    /// Delete the Secrets, so that the peers' CAs are no longer trusted
    #[arg(long)]
    delete: bool,
    /// Wait until nothing of the peers is left
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
          action = clap::ArgAction::Set)]
    wait: bool,
    /// How long to wait: 30s, 5m, 1h
    #[arg(long, default_value = "10m", value_parser = duration)]
    wait_duration: Duration,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

impl DisconnectArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        self.output == Format::Json
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// Whether nothing is left; null if that was not waited for.
    gone: Option<bool>,
    /// Why not everything was changed, although all was to be; null if it was.
    problem: Option<String>,
    secrets: Vec<Written>,
    waiting: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Written {
    context: String,
    namespace: String,
    /// Null if the cluster knew nothing of the peer.
    name: Option<String>,
    peer: ClusterName,
    change: Change,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Change {
    Disconnected,
    /// Nothing is read from the peer any more; it goes on reading.
    Admitted,
    Deleted,
    Unchanged,
    /// It was to be changed, and was not: it was refused, or not tried after another one was.
    Kept,
    /// It was to be changed, and no answer came.
    Unknown,
}

impl Change {
    /// What comes of a step that is carried out.
    fn of(step: Step) -> Self {
        match step {
            Step::Nothing => Self::Unchanged,
            Step::Delete => Self::Deleted,
            Step::Relate(Relation::Admitted) => Self::Admitted,
            Step::Relate(_) => Self::Disconnected,
        }
    }
}

/// A cluster that is to be less to a peer than it was.
struct Task<'a> {
    api: &'a Api,
    peer: ClusterName,
    /// Those about the peer. There may be two of them, and both have to go.
    secrets: Vec<Secret>,
    /// Names of those about others, in case it is a slip.
    others: Vec<String>,
    ends: Ends,
}

/// What of two clusters' relation is to end, seen from one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// All of it.
    Everything,
    /// The cluster stops reading from the peer.
    Reading {
        /// Whether the peer goes on reading, and has to be let in.
        peer_reads: bool,
    },
    /// The peer stops reading from the cluster.
    Admitting,
}

impl Ends {
    /// What the peer is to the cluster afterwards.
    fn leaves(self, present: Relation) -> Relation {
        match (self, present) {
            (Self::Everything | Self::Reading { peer_reads: false }, _) => Relation::Apart,
            (Self::Reading { peer_reads: true }, present) => present.min(Relation::Admitted),
            // It reads, too; that it is read from by nobody is for the peer to say.
            (Self::Admitting, Relation::Connected) => Relation::Connected,
            (Self::Admitting, Relation::Admitted | Relation::Apart) => Relation::Apart,
        }
    }
}

/// What is to be done to a Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    Relate(Relation),
    Delete,
}

impl Task<'_> {
    fn step(&self, secret: &Secret, delete: bool) -> Step {
        let present = Relation::of(secret);
        match self.ends.leaves(present) {
            Relation::Apart if delete => Step::Delete,
            left if left == present => Step::Nothing,
            left => Step::Relate(left),
        }
    }

    /// What the peer is to the cluster when it is done.
    fn leaves(&self) -> Relation {
        let all = self.secrets.iter().map(|secret| self.ends.leaves(Relation::of(secret)));
        all.max().unwrap_or(Relation::Apart)
    }

    /// Its Secrets; or once none, where nothing is known of the peer.
    fn each(&self) -> impl Iterator<Item = Option<&Secret>> {
        let none = self.secrets.is_empty().then_some(None);
        none.into_iter().chain(self.secrets.iter().map(Some))
    }

    async fn carry_out(&self, secret: &Secret, step: Step) -> Result<(), Refusal> {
        match step {
            Step::Nothing => Ok(()),
            Step::Relate(left) => apply::relate(self.api, secret, left, false).await,
            Step::Delete => apply::delete(self.api, secret, false).await,
        }
    }

    fn written(&self, secret: Option<&Secret>, change: Change) -> Written {
        Written {
            context: self.api.context.clone(),
            namespace: self.api.namespace.clone(),
            name: secret.map(ResourceExt::name_any),
            peer: self.peer.clone(),
            change,
        }
    }

    fn goal(&self) -> Option<Goal> {
        match self.leaves() {
            Relation::Apart => Some(Goal::Gone),
            Relation::Admitted => Some(Goal::Unread),
            Relation::Connected => None,
        }
    }
}

/// Finds the Secrets, changes them, waits, prints.
pub(crate) async fn run(args: DisconnectArgs) -> Result<ExitCode, MeshError> {
    let contexts = args.kube.contexts()?;
    let mut names = vec![contexts.or_current(args.context.as_deref())?];
    names.extend(args.destination_context.iter().cloned());
    contexts::distinct(&names)?;
    let clusters = open(&contexts, &names).await?;
    let quiet = args.output == Format::Json;
    let tasks = tasks(&clusters, &args).await?;
    rehearse(&tasks, args.delete).await?;
    let (secrets, refused) = carry_out(&tasks, args.delete, quiet).await;
    let mut report = Report { gone: None, problem: None, secrets, waiting: Vec::new() };
    if let Some(refusal) = refused {
        report.problem = Some(refusal.to_string());
        halfway(&report, &refusal, quiet);
        return Ok(ExitCode::FAILURE);
    }
    if !args.wait {
        print(&report, quiet);
        return Ok(ExitCode::SUCCESS);
    }
    let wait = |task: &Task<'_>| Some((task.peer.clone(), task.goal()?));
    let waits: Vec<Wait<'_>> = tasks
        .iter()
        .filter_map(|task| wait(task).map(|(peer, goal)| Wait { api: task.api, peer, goal }))
        .collect();
    let (end, outcomes) = wait::until(&waits, args.wait_duration, quiet).await;
    report.gone = Some(end == End::Reached);
    report.waiting = outcomes.iter().filter_map(still_waiting).collect();
    print(&report, quiet);
    if end != End::Reached && !quiet {
        unfinished(end, &report, args.wait_duration);
    }
    Ok(if end == End::Reached { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A cluster, and its name in the mesh.
struct Cluster {
    api: Api,
    name: Option<ClusterName>,
}

/// All must answer: half a disconnection would surprise.
async fn open(contexts: &Contexts, names: &[String]) -> Result<Vec<Cluster>, MeshError> {
    let opened = join_all(names.iter().enumerate().map(async |(at, context)| {
        let api = contexts.open(context).await?;
        let published = facts::published(&api).await.map_err(|refusal| match at {
            0 => MeshError::Invalid(format!("{refusal}\nNothing was changed")),
            _ => MeshError::Invalid(format!(
                "{refusal}\nIf that cluster is gone for good, name it with --destination-cluster NAME instead; nothing \
                 was changed"
            )),
        })?;
        let name = match published {
            Published::Is(identity) => Some(identity.info.cluster.clone()),
            _ => None,
        };
        Ok(Cluster { api, name })
    }));
    opened.await.into_iter().collect()
}

async fn tasks<'a>(clusters: &'a [Cluster], args: &DisconnectArgs) -> Result<Vec<Task<'a>>, MeshError> {
    let mut known = Vec::new();
    for cluster in clusters {
        known.push(facts::peer_secrets(&cluster.api).await?);
    }
    let secrets =
        |at: usize, peer: &ClusterName| about(&known[at], peer).into_iter().cloned().collect::<Vec<_>>();
    let others = |at: usize, peer: &ClusterName| {
        let about = about(&known[at], peer);
        let others = known[at].values().filter(|secret| !about.contains(secret));
        others.map(ResourceExt::name_any).collect::<Vec<_>>()
    };
    let one_way = args.connection_mode == ConnectionMode::Unicast;
    let mut tasks = Vec::new();
    for link in links(clusters.len(), args.connection_mode) {
        let (told, peer) = (&clusters[link.told], name(&clusters[link.of])?);
        let ends = match link.told {
            _ if !one_way => Ends::Everything,
            0 => {
                let theirs = secrets(link.of, name(told)?);
                let reads = |secret: &Secret| Relation::of(secret) == Relation::Connected;
                Ends::Reading { peer_reads: theirs.iter().any(reads) }
            }
            _ => Ends::Admitting,
        };
        let (secrets, others) = (secrets(link.told, peer), others(link.told, peer));
        tasks.push(Task { api: &told.api, peer: peer.clone(), secrets, others, ends });
    }
    for peer in &args.destination_cluster {
        let (secrets, others, ends) = (secrets(0, peer), others(0, peer), Ends::Everything);
        tasks.push(Task { api: &clusters[0].api, peer: peer.clone(), secrets, others, ends });
    }
    Ok(tasks)
}

fn name(cluster: &Cluster) -> Result<&ClusterName, MeshError> {
    cluster.name.as_ref().ok_or_else(|| {
        MeshError::Invalid(format!(
            "context {}: no ConfigMap {}/{} tells the cluster's name: give --namespace if Isthmus is in another one, or name the \
             cluster with --destination-cluster NAME instead; nothing was changed",
            cluster.api.context,
            cluster.api.namespace,
            names::CLUSTER_INFO
        ))
    })
}

/// Whether everything can be done: what no Secret configures, none ends, and all API servers are asked.
async fn rehearse(tasks: &[Task<'_>], delete: bool) -> Result<(), MeshError> {
    let asked = join_all(tasks.iter().map(async |task| {
        if task.secrets.is_empty() && is_from_a_file(task).await? {
            return Err(MeshError::Invalid(format!(
                "context {}: {} is configured by the file {} in the apiserver's --peers-dir, and by no Secret: remove \
                 the file; nothing was changed",
                task.api.context, task.peer, task.peer
            )));
        }
        for secret in &task.secrets {
            match task.step(secret, delete) {
                Step::Delete => apply::delete(task.api, secret, true).await?,
                Step::Relate(left) => apply::relate(task.api, secret, left, true).await?,
                Step::Nothing => {}
            }
        }
        Ok(())
    }));
    let refused = asked.await.into_iter().find_map(Result::err);
    match refused {
        None => Ok(()),
        Some(MeshError::Api(refusal)) => Err(MeshError::Invalid(format!(
            "{refusal}\nNothing was changed: half a disconnection would surprise"
        ))),
        Some(other) => Err(other),
    }
}

async fn is_from_a_file(task: &Task<'_>) -> Result<bool, MeshError> {
    let peer = task.api.global::<ClusterPeer>().get_opt(task.peer.as_str()).await;
    let peer = peer.map_err(|error| task.api.refused(format!("read ClusterPeer {}", task.peer), error))?;
    Ok(peer.is_some_and(|peer| {
        peer.spec.source == PeerSource::Directory && peer.spec.relation == PeerRelation::Connected
    }))
}

/// Changes one Secret after the other, up to the first that is refused. What became of each, and why that one was.
async fn carry_out(tasks: &[Task<'_>], delete: bool, quiet: bool) -> (Vec<Written>, Option<Refusal>) {
    let (mut all, mut refused) = (Vec::new(), None);
    for (task, secret) in tasks.iter().flat_map(|task| task.each().map(move |secret| (task, secret))) {
        let change = match secret.map(|secret| (secret, task.step(secret, delete))) {
            None | Some((_, Step::Nothing)) => Change::Unchanged,
            Some(_) if refused.is_some() => Change::Kept,
            Some((secret, step)) => match task.carry_out(secret, step).await {
                Ok(()) => Change::of(step),
                Err(refusal) => {
                    let answered = refusal.status().is_some();
                    refused = Some(refusal);
                    if answered { Change::Kept } else { Change::Unknown }
                }
            },
        };
        let written = task.written(secret, change);
        if !quiet {
            tell(&written, secret, &task.others);
        }
        all.push(written);
    }
    (all, refused)
}

/// What became of a Secret, for people.
fn tell(written: &Written, secret: Option<&Secret>, others: &[String]) {
    let Written { context, namespace, peer, change, .. } = written;
    let Some(name) = &written.name else {
        let others = match others {
            [] => "nor about any other peer".to_owned(),
            others => format!("there are {}", others.join(", ")),
        };
        return note(&format!("{context}: has no Secret about {peer}; {others}"));
    };
    let says = match change {
        Change::Unchanged => "unchanged".to_owned(),
        Change::Disconnected => "disconnected".to_owned(),
        Change::Admitted => format!("lets {peer} in, which reads from here, and connects no more"),
        Change::Deleted => "deleted".to_owned(),
        Change::Kept => "is as it was".to_owned(),
        Change::Unknown => "may have been changed or not: there was no answer".to_owned(),
    };
    note(&format!("{context}: Secret {namespace}/{name} {says}"));
    let changed = matches!(change, Change::Disconnected | Change::Admitted | Change::Deleted);
    if let Some(secret) = secret.filter(|secret| changed && !is_ours(secret)) {
        note(&format!(
            "{} {context}: Secret {name} was made by {}, which may put it back: change it where it is kept, too",
            signs().sign(Outcome::Warning),
            maker(secret)
        ));
    }
}

/// Some of the Secrets say what they are to say, and others do not.
fn halfway(report: &Report, refusal: &Refusal, quiet: bool) {
    if quiet {
        return json(report);
    }
    let done = |written: &&Written| !matches!(written.change, Change::Kept | Change::Unknown);
    note(&format!("isthmus: {refusal}"));
    note(&format!(
        "isthmus: disconnected in part: {} of {} Secrets are as they are to be. Nothing of that is taken back. Give the same \
         command again when this is mended: it does the rest, and can be given as often as it takes",
        report.secrets.iter().filter(done).count(),
        report.secrets.len()
    ));
}

fn print(report: &Report, quiet: bool) {
    if quiet {
        json(report);
    } else if report.gone == Some(true) {
        say!("Disconnected.");
    }
}

fn unfinished(end: End, report: &Report, within: Duration) {
    match end {
        End::TimedOut => note(&format!("isthmus: not disconnected within {} s:", within.as_secs())),
        _ => note("isthmus: interrupted; not disconnected yet:"),
    }
    report.waiting.iter().for_each(|why| note(&format!("  - {why}")));
    note(
        "The clusters go on by themselves; `isthmus peers` shows what is left. Give the command again to wait on.",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_direction_needs_stays_when_the_other_ends() {
        use Relation::{Admitted, Apart, Connected};
        let reading = |peer_reads| Ends::Reading { peer_reads };
        for (ends, present, left) in [
            (Ends::Everything, Connected, Apart),
            (Ends::Everything, Admitted, Apart),
            (reading(false), Connected, Apart),
            (reading(false), Admitted, Apart),
            (reading(true), Connected, Admitted),
            (reading(true), Admitted, Admitted),
            (reading(true), Apart, Apart),
            (Ends::Admitting, Connected, Connected),
            (Ends::Admitting, Admitted, Apart),
            (Ends::Admitting, Apart, Apart),
        ] {
            assert_eq!(ends.leaves(present), left, "{ends:?} of {present}");
        }
    }
}
