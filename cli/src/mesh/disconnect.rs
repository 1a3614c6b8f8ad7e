//! `isthmus disconnect`: tells clusters to stop reading from each other, and waits until nothing is left.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use isthmus_crds::peer::wants_connection;
use isthmus_wire::ClusterName;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use serde::Serialize;

use super::apply;
use super::connect::still_waiting;
use super::contexts::{Api, Contexts, KubeArgs};
use super::error::MeshError;
use super::exchange::{about, is_ours, maker};
use super::facts::{self, Published};
use super::topology::{ConnectionMode, links};
use super::wait::{self, End, Goal, Wait};
use crate::output::{Format, duration, json, note};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # Both clusters stop reading from each other
  isthmus disconnect --context kind-alpha --destination-context kind-beta

  # The source alone stops reading from the destination
  isthmus disconnect --context a --destination-context b --connection-mode unicast

  # The other cluster is gone, or its API cannot be reached
  isthmus disconnect --context a --destination-cluster beta

  # Forget the peer altogether: its CA is trusted no longer
  isthmus disconnect --context a --destination-context b --delete

Clients of global services are given time to move to other backends before a peer's are removed, which takes minutes.
Without --delete the Secrets stay, annotated isthmus.io/connect: \"false\", and `isthmus connect` connects again.
The exit status is 0 if nothing of the peers is left (or --wait=false).")]
pub(crate) struct DisconnectArgs {
    /// The context of the source cluster; the current one when left out
    #[arg(long)]
    context: Option<String>,
    /// Contexts of the destination clusters, separated by commas
    #[arg(long, value_delimiter = ',', required_unless_present = "destination_cluster")]
    destination_context: Vec<String>,
    /// Names of destination clusters that need not be reachable: the source's side alone is changed
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
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

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// Whether nothing is left; null if that was not waited for.
    gone: Option<bool>,
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
    Deleted,
    Unchanged,
}

/// A cluster that is to stop reading from a peer.
struct Task<'a> {
    api: &'a Api,
    peer: ClusterName,
    /// Those about the peer. There may be two of them, and both have to go.
    secrets: Vec<Secret>,
}

/// Finds the Secrets, changes them, waits, prints.
pub(crate) async fn run(args: DisconnectArgs) -> Result<ExitCode, MeshError> {
    let contexts = args.kube.contexts()?;
    let mut names = vec![contexts.or_current(args.context.as_deref())?];
    names.extend(args.destination_context.iter().cloned());
    let clusters = open(&contexts, &names).await?;
    let quiet = args.output == Format::Json;
    let tasks = tasks(&clusters, &args).await?;
    if args.connection_mode == ConnectionMode::Unicast && !quiet {
        warn_of_readers(&clusters).await;
    }
    let mut report = Report { gone: None, secrets: Vec::new(), waiting: Vec::new() };
    for task in &tasks {
        carry_out(task, args.delete, quiet, &mut report).await?;
    }
    if !args.wait {
        print(&report, quiet);
        return Ok(ExitCode::SUCCESS);
    }
    let waits: Vec<Wait<'_>> =
        tasks.iter().map(|task| Wait { api: task.api, peer: task.peer.clone(), goal: Goal::Gone }).collect();
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
    let opened = join_all(names.iter().map(async |context| {
        let api = contexts.open(context).await?;
        let published = facts::published(&api).await.map_err(|refusal| {
            MeshError::Invalid(format!(
                "{refusal}\nIf that cluster is gone for good, name it with --destination-cluster NAME instead; nothing \
                 was changed"
            ))
        })?;
        let name = match published {
            Published::Is(identity) => Some(identity.info.cluster.clone()),
            _ => None,
        };
        Ok(Cluster { api, name })
    }));
    opened.await.into_iter().collect()
}

/// A gateway takes certificates only of clusters that it is connected to itself, unless they share a CA.
async fn warn_of_readers(clusters: &[Cluster]) {
    let Some((Cluster { name: Some(source), .. }, destinations)) = clusters.split_first() else { return };
    for destination in destinations {
        let Ok(secrets) = facts::peer_secrets(&destination.api).await else { continue };
        if about(&secrets, source).into_iter().any(wants_connection) {
            note(&format!(
                "‼ {}: goes on reading from {source}, and is refused there from now on unless both share a CA; leave out \
                 --connection-mode unicast to disconnect both",
                destination.api.context
            ));
        }
    }
}

async fn tasks<'a>(clusters: &'a [Cluster], args: &DisconnectArgs) -> Result<Vec<Task<'a>>, MeshError> {
    let mut wanted: Vec<(&Api, ClusterName)> = Vec::new();
    for link in links(clusters.len(), args.connection_mode) {
        if args.connection_mode == ConnectionMode::Unicast && link.told != 0 {
            continue;
        }
        let of = &clusters[link.of];
        let Some(name) = &of.name else {
            return Err(MeshError::Invalid(format!(
                "context {}: its ConfigMap isthmus-cluster-info does not tell the cluster's name; name it with \
                 --destination-cluster NAME instead; nothing was changed",
                of.api.context
            )));
        };
        wanted.push((&clusters[link.told].api, name.clone()));
    }
    wanted.extend(args.destination_cluster.iter().map(|name| (&clusters[0].api, name.clone())));
    let mut tasks = Vec::new();
    for (api, peer) in wanted {
        let secrets = facts::peer_secrets(api).await?;
        let secrets = about(&secrets, &peer).into_iter().cloned().collect();
        tasks.push(Task { api, peer, secrets });
    }
    Ok(tasks)
}

async fn carry_out(task: &Task<'_>, delete: bool, quiet: bool, report: &mut Report) -> Result<(), MeshError> {
    let Task { api, peer, secrets } = task;
    let mut done = |name: Option<String>, change: Change| {
        if !quiet {
            note(&match (&name, change) {
                (None, _) => format!("{}: has no Secret about {peer}", api.context),
                (Some(name), Change::Unchanged) => {
                    format!("{}: Secret {}/{name} unchanged", api.context, api.namespace)
                }
                (Some(name), Change::Disconnected) => {
                    format!("{}: Secret {}/{name} disconnected", api.context, api.namespace)
                }
                (Some(name), Change::Deleted) => {
                    format!("{}: Secret {}/{name} deleted", api.context, api.namespace)
                }
            });
        }
        let (context, namespace) = (api.context.clone(), api.namespace.clone());
        report.secrets.push(Written { context, namespace, name, peer: peer.clone(), change });
    };
    if secrets.is_empty() {
        done(None, Change::Unchanged);
    }
    for secret in secrets {
        let change = match (delete, wants_connection(secret)) {
            (true, _) => {
                apply::delete(api, secret).await?;
                Change::Deleted
            }
            (false, true) => {
                apply::disconnect(api, secret).await?;
                Change::Disconnected
            }
            (false, false) => Change::Unchanged,
        };
        done(Some(secret.name_any()), change);
        if change != Change::Unchanged && !is_ours(secret) && !quiet {
            note(&format!(
                "‼ {}: Secret {} was made by {}, which may put it back: change it where it is kept, too",
                api.context,
                secret.name_any(),
                maker(secret)
            ));
        }
    }
    Ok(())
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
