//! `isthmus rotate-ca`: gives a cluster another CA while everybody stays connected.
//!
//! The cluster's leading apiserver does the work, and writes into annotations of Secret `isthmus-ca` how far it is; see
//! [`clustermesh_apiserver::certificates::rotation`] for the protocol. What it cannot do is tell the peers: it sees no other
//! cluster. This command does, between the steps. Where it is interrupted it is given again: the annotations say where to
//! go on. It reads and writes the Secret's metadata alone, so that the keys in it stay where they are.

mod step;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use clustermesh_apiserver::certificates::rotation::{
    FINISHING, MESSAGE_ANNOTATION, REQUEST_ANNOTATION, Request, Rotation, STATE_ANNOTATION,
};
use isthmus_crds::peer::Relation;
use isthmus_crds::{ClusterInfo, ClusterPeer, PeerRelation, names};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams};
use serde::Serialize;
use serde_json::json;

use self::step::{Next, next};
use super::apply;
use super::connect::still_waiting;
use super::contexts::{Api, KubeArgs};
use super::error::MeshError;
use super::exchange::{self, Change, FIELD_MANAGER, Step, Wanted, about};
use super::facts::{self, Published};
use super::wait::{self, End, Goal, Wait};
use crate::output::{Format, duration, json, note};

/// How often the leader's progress is looked at.
const POLL: Duration = Duration::from_secs(1);
/// A refusal that is older than the request is not its answer.
const REFUSAL: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # Of a cluster that is connected to two others, in either direction
  isthmus rotate-ca --context kind-alpha --destination-context kind-beta,kind-gamma

  # One of the peers cannot be reached: it is cut off until `isthmus connect` tells it
  isthmus rotate-ca --context kind-alpha --destination-context kind-beta --without-peer gamma

  # Take a new CA back that has not issued anything yet
  isthmus rotate-ca --context kind-alpha --abort

The new CA is trusted everywhere before it issues anything, and the old one until nothing of it is in use. That takes \
minutes: files in pods change late. Interrupted, the command can be given again, and goes on where it was.")]
pub(crate) struct RotateCaArgs {
    /// The context of the cluster; the current one when left out
    #[arg(long)]
    context: Option<String>,
    /// Contexts of all clusters that are connected to it, separated by commas
    #[arg(long, value_delimiter = ',')]
    destination_context: Vec<String>,
    /// Names of peers that are not told, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    without_peer: Vec<String>,
    #[command(flatten)]
    kube: KubeArgs,
    /// Take the new CA back
    #[arg(long, conflicts_with_all = ["destination_context", "without_peer"])]
    abort: bool,
    /// Take over peers' Secrets that somebody else made
    #[arg(long)]
    force: bool,
    /// How long each step may take: 30s, 5m, 1h
    #[arg(long, default_value = "15m", value_parser = duration)]
    wait_duration: Duration,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

impl RotateCaArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        self.output == Format::Json
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    done: bool,
    cluster: String,
    /// How far the leader is.
    state: String,
    /// What was not reached, and why.
    waiting: Vec<String>,
}

/// A cluster that is told of the CA.
struct Peer {
    api: Api,
    name: String,
}

struct Rotating<'a> {
    args: &'a RotateCaArgs,
    api: Api,
    cluster: String,
    peers: Vec<Peer>,
}

/// Goes on from wherever the rotation is.
pub(crate) async fn run(args: RotateCaArgs) -> Result<ExitCode, MeshError> {
    let contexts = args.kube.contexts()?;
    let api = contexts.open(&contexts.or_current(args.context.as_deref())?).await?;
    let cluster = info(&api).await?.cluster.to_string();
    let mut peers = Vec::new();
    for name in &args.destination_context {
        let api = contexts.open(name).await?;
        let name = info(&api).await?.cluster.to_string();
        peers.push(Peer { api, name });
    }
    let rotating = Rotating { args: &args, api, cluster, peers };
    if !args.abort {
        rotating.all_peers_are_named().await?;
    }
    let stopped = tokio::select! {
        done = rotating.go_on() => done?,
        _ = tokio::signal::ctrl_c() => Some(vec!["interrupted".to_owned()]),
    };
    let state = rotating.read().await.map_or_else(|_| "unknown".to_owned(), |seen| seen.state.to_string());
    let report = Report {
        done: stopped.is_none(),
        cluster: rotating.cluster.clone(),
        state,
        waiting: stopped.unwrap_or_default(),
    };
    print(&report, &args);
    Ok(if report.done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the annotations say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    state: Rotation,
    request: Option<Request>,
    message: String,
}

impl Seen {
    /// Whether the state has been reached, and what is published with it.
    fn has_reached(&self, state: Rotation) -> bool {
        self.state == state && !(state == Rotation::Steady && self.is_ending())
    }

    /// What is published may still be what was trusted before the end.
    fn is_ending(&self) -> bool {
        self.message == FINISHING
    }
}

impl Rotating<'_> {
    /// A peer that is not told would be cut off in the end, so leaving one out is to be said.
    async fn all_peers_are_named(&self) -> Result<(), MeshError> {
        let known = wait::peers(&self.api).await?;
        let missing: Vec<String> = known
            .iter()
            .map(ResourceExt::name_any)
            .filter(|peer| self.peers.iter().all(|told| told.name != *peer))
            .filter(|peer| !self.args.without_peer.contains(peer))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(MeshError::Invalid(format!(
            "context {}: cluster {} is connected to {} too, which must be told of the new CA: add its context to \
             --destination-context, or leave it out with --without-peer, which cuts it off until `isthmus connect` is \
             given again; nothing was changed",
            self.api.context,
            self.cluster,
            missing.join(" and ")
        )))
    }

    /// Step by step to the end. What was not reached in time, if anything.
    async fn go_on(&self) -> Result<Option<Vec<String>>, MeshError> {
        let mut seen = self.read().await?;
        if self.args.abort {
            if seen.state == Rotation::Steady {
                self.tell("there is nothing to take back");
                return Ok(None);
            }
            self.tell("taking the next CA back");
            return self.ask_and_wait(Request::Abort, Rotation::Steady).await;
        }
        // A rotation that was interrupted at its very end is ended, and no other one begun.
        let mut begun = seen.state != Rotation::Steady
            || seen.is_ending()
            || seen.request == Some(Request::Finish) && !self.peers_know().await?;
        loop {
            let stopped = match next(seen.state, begun) {
                Next::Ask(request, until) => {
                    begun = true;
                    self.tell(step::says(request));
                    self.ask_and_wait(request, until).await?
                }
                Next::TellPeersAndAsk(request, until) => {
                    self.tell("telling the peers of both CAs, if they do not know yet");
                    match self.tell_peers().await? {
                        Some(stopped) => Some(stopped),
                        None => {
                            self.tell(step::says(request));
                            self.ask_and_wait(request, until).await?
                        }
                    }
                }
                Next::TellPeers => {
                    let stopped = self.wait_for(Rotation::Steady).await?;
                    if stopped.is_some() {
                        return Ok(stopped);
                    }
                    self.tell("telling the peers that the old CA is gone");
                    return self.tell_peers().await;
                }
            };
            if stopped.is_some() {
                return Ok(stopped);
            }
            seen = self.read().await?;
        }
    }

    fn tell(&self, what: &str) {
        if self.args.output == Format::Table {
            note(&format!("{}: {what} ...", self.cluster));
        }
    }

    async fn read(&self) -> Result<Seen, MeshError> {
        let name = names::CA_SECRET;
        let found = self.api.namespaced::<Secret>().get_metadata_opt(name).await;
        let doing = format!("read the metadata of Secret {}/{name}", self.api.namespace);
        let Some(found) = found.map_err(|error| self.api.refused(doing, error))? else {
            return Err(MeshError::Invalid(format!(
                "context {}: there is no Secret {}/{name}: this cluster's certificates are not issued by Isthmus \
                 (--certificates=external, or files); renew its CA where it is kept",
                self.api.context, self.api.namespace
            )));
        };
        let text = |key: &str| found.annotations().get(key).map(String::as_str);
        let state = text(STATE_ANNOTATION).map_or(Ok(Rotation::Steady), str::parse);
        Ok(Seen {
            state: state.map_err(|error: String| {
                MeshError::Invalid(format!("context {}: Secret {name}: {error}", self.api.context))
            })?,
            request: text(REQUEST_ANNOTATION).and_then(|request| request.parse().ok()),
            message: text(MESSAGE_ANNOTATION).unwrap_or_default().to_owned(),
        })
    }

    /// Asks the leader, and waits for it.
    async fn ask_and_wait(
        &self,
        request: Request,
        until: Rotation,
    ) -> Result<Option<Vec<String>>, MeshError> {
        let name = names::CA_SECRET;
        let patch = json!({"metadata": {"annotations": {REQUEST_ANNOTATION: request.to_string()}}});
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        let asked = self.api.namespaced::<Secret>().patch_metadata(name, &params, &Patch::Merge(patch)).await;
        let doing = format!("annotate Secret {}/{name}", self.api.namespace);
        asked.map_err(|error| self.api.refused(doing, error))?;
        self.wait_for(until).await
    }

    /// Waits for the leader. What was not reached in time, if anything.
    async fn wait_for(&self, until: Rotation) -> Result<Option<Vec<String>>, MeshError> {
        let begun = Instant::now();
        let mut told = String::new();
        loop {
            // An API server that is away for a moment changes nothing.
            match self.read().await {
                Ok(seen) if seen.has_reached(until) => return Ok(None),
                Ok(seen) => {
                    if seen.message.starts_with("refused") && begun.elapsed() > REFUSAL {
                        return Err(MeshError::Invalid(format!(
                            "context {}: the clustermesh-apiserver of {}: {}",
                            self.api.context, self.cluster, seen.message
                        )));
                    }
                    let line = format!("{}: {}", seen.state, seen.message);
                    // What it said before it was asked is of no interest.
                    let news = !seen.message.is_empty() && begun.elapsed() > POLL / 2 && line != told;
                    if news && self.args.output == Format::Table {
                        note(&format!("{:>6.1}s  {line}", begun.elapsed().as_secs_f64()));
                        told = line;
                    }
                }
                Err(error) if begun.elapsed() > self.args.wait_duration => return Err(error),
                Err(_) => {}
            }
            if begun.elapsed() > self.args.wait_duration {
                let why = match self.read().await {
                    Ok(seen) if !seen.message.is_empty() => format!("it is {}: {}", seen.state, seen.message),
                    _ => "no answer: does a clustermesh-apiserver lead?".to_owned(),
                };
                return Ok(Some(vec![format!("{} is not {until}: {why}", self.cluster)]));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Whether all peers have been told what the cluster publishes now.
    async fn peers_know(&self) -> Result<bool, MeshError> {
        let steps = self.steps(&info(&self.api).await?).await?;
        Ok(steps.iter().all(|(_, step)| step.change == Change::Unchanged))
    }

    /// Brings the bundle that the cluster publishes into the peers' Secrets, and waits until they have reconnected.
    async fn tell_peers(&self) -> Result<Option<Vec<String>>, MeshError> {
        let steps = self.steps(&info(&self.api).await?).await?;
        for (peer, step) in &steps {
            apply::rehearse(&peer.api, step).await.map_err(|finding| {
                MeshError::Invalid(format!(
                    "context {}: {}; {}",
                    peer.api.context, finding.problem, finding.advice
                ))
            })?;
        }
        // Their gateways end what was connected with a certificate that they trust no longer: it is connected anew.
        let own = wait::peers(&self.api).await?;
        let told = |peer: &ClusterPeer| self.peers.iter().any(|told| told.name == peer.name_any());
        let read = |peer: &ClusterPeer| peer.spec.relation == PeerRelation::Connected;
        let own = own
            .iter()
            .filter(|peer| told(peer) && read(peer))
            .filter_map(|peer| peer.name_any().parse().ok());
        let anywhere = Goal::Ready { secret: None, endpoints: Vec::new(), before: None };
        let mut waits: Vec<Wait<'_>> =
            own.map(|peer| Wait { api: &self.api, peer, goal: anywhere.clone() }).collect();
        for (peer, step) in &steps {
            let known = wait::peers(&peer.api).await?;
            let known = known.iter().find(|known| known.name_any() == self.cluster);
            let secret = apply::apply(&peer.api, step).await?;
            if self.args.output == Format::Table {
                note(&format!(
                    "{}: Secret {}/{} {}",
                    peer.api.context,
                    peer.api.namespace,
                    step.name(),
                    step.change
                ));
            }
            let before =
                known.and_then(ResourceExt::resource_version).filter(|_| step.change != Change::Unchanged);
            // Who only lets us in must have taken note as well, before anything of the next CA is shown to it.
            if let Some(goal) = Goal::of(&step.wanted, secret, before) {
                waits.push(Wait { api: &peer.api, peer: step.peer.clone(), goal });
            }
        }
        let quiet = self.args.output == Format::Json;
        let (end, outcomes) = wait::until(&waits, self.args.wait_duration, quiet).await;
        let left: Vec<String> = outcomes.iter().filter_map(still_waiting).collect();
        Ok((end != End::Reached).then_some(left))
    }

    /// What the peers' Secrets about this cluster are to become. Those that know nothing of it are told nothing.
    async fn steps(&self, own: &ClusterInfo) -> Result<Vec<(&Peer, Step)>, MeshError> {
        let mut steps = Vec::new();
        for peer in &self.peers {
            let present = facts::peer_secrets(&peer.api).await?;
            if about(&present, &own.cluster).is_empty() {
                continue;
            }
            let wanted = Wanted {
                context: &peer.api.context,
                namespace: &peer.api.namespace,
                present: Some(&present),
                peer: own,
                endpoints: Err("it was told before".into()),
                at_least: Relation::Apart,
            };
            let step = exchange::plan(wanted, self.args.force).map_err(|finding| {
                MeshError::Invalid(format!(
                    "context {}: {}; {}",
                    peer.api.context, finding.problem, finding.advice
                ))
            })?;
            steps.push((peer, step));
        }
        Ok(steps)
    }
}

async fn info(api: &Api) -> Result<ClusterInfo, MeshError> {
    let map = format!("ConfigMap {}/{}", api.namespace, names::CLUSTER_INFO);
    let context = &api.context;
    match facts::published(api).await? {
        Published::Is(identity) => Ok(identity.info.clone()),
        Published::Broken(why) => Err(MeshError::Invalid(format!("context {context}: {map}: {why}"))),
        Published::Missing | Published::Unknown => Err(MeshError::Invalid(format!(
            "context {context}: there is no {map}: is Isthmus installed there, and has a clustermesh-apiserver led yet?"
        ))),
    }
}

fn print(report: &Report, args: &RotateCaArgs) {
    if args.output == Format::Json {
        return json(report);
    }
    let Report { cluster, state, .. } = report;
    match (report.done, args.abort) {
        (true, true) => say!("Cluster {cluster} keeps its CA."),
        (true, false) => say!("Cluster {cluster} has a new CA; the old one is trusted nowhere any more."),
        (false, _) => {
            note(&format!("isthmus: the rotation of {cluster}'s CA is not done; it is {state}:"));
            report.waiting.iter().for_each(|why| note(&format!("  - {why}")));
            note("Everybody stays connected as things are. Give the command again to go on.");
        }
    }
}
