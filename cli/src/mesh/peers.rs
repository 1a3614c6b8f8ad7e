//! `isthmus peers`: the peers of clusters, and how the connections are.

use std::process::ExitCode;

use chrono::Utc;
use clap::{Args, ValueEnum};
use comfy_table::Table;
use futures::future::join_all;
use isthmus_crds::{ADMITTED, ClusterPeer, PeerCounts, PeerRelation, READY};
use kube::ResourceExt;
use serde::Serialize;

use super::contexts::KubeArgs;
use super::error::MeshError;
use super::wait::{peers, stale, why_not_ready};
use crate::output::{age, json, note, table, word};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  # The peers of the current context's cluster
  isthmus peers

  # Those of two clusters, with what failed last
  isthmus peers --context kind-alpha,kind-beta -o wide

  # The names of the peers that are not ready
  isthmus peers -o json | jq -r '.peers[] | select(.ready == false) | .peer'

AGE is the time since everything mirrored was last known to be complete; LAG counts the changes that are known of and \
not here yet. A peer with the relation Admitted may read from the cluster, which reads nothing from it: there is nothing \
that could be ready. The exit status is 0 if every other peer is ready.")]
pub(crate) struct PeersArgs {
    /// Contexts, separated by commas; the current one when left out
    #[arg(long, value_delimiter = ',')]
    context: Vec<String>,
    #[command(flatten)]
    kube: KubeArgs,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

impl PeersArgs {
    /// Whether a program reads what it prints.
    pub(crate) fn prints_json(&self) -> bool {
        self.output == Output::Json
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For people with a wide screen
    Wide,
    /// For programs
    Json,
}

/// A peer of a cluster, as it is printed.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PeerStatus {
    /// The context of the cluster whose peer it is.
    pub(crate) context: String,
    /// The peer's name.
    pub(crate) peer: String,
    /// Its id, once it is known.
    pub(crate) id: Option<i32>,
    /// Whether it is read from, or may only read.
    pub(crate) relation: PeerRelation,
    /// Whether everything it shares is here, and followed; null of one that may only read, and does not if its Secret cannot
    /// be used.
    pub(crate) ready: Option<bool>,
    /// One word that programs can compare.
    pub(crate) reason: String,
    /// Why it is not ready, or may not read; empty if nothing is wrong.
    pub(crate) message: String,
    /// Seconds since everything was last known to be complete.
    pub(crate) data_age_seconds: Option<f64>,
    /// Changes that are known of and not here.
    pub(crate) revision_lag: Option<i64>,
    /// What is mirrored.
    pub(crate) counts: PeerCounts,
    /// The gateway in use.
    pub(crate) endpoint: Option<String>,
    /// What configures it: `Secret isthmus-system/peer-beta`, say.
    pub(crate) source: String,
    /// How often the connection failed.
    pub(crate) failures: i64,
    /// The last failure, also after recovery.
    pub(crate) last_error: Option<String>,
}

impl PeerStatus {
    pub(crate) fn of(context: &str, peer: &ClusterPeer) -> Self {
        let status = peer.status.clone().unwrap_or_default();
        let confirmed = status.confirmed.as_ref().map(|time| time.0.as_second());
        let stale = stale(peer);
        let (type_, relation) = match peer.spec.relation {
            PeerRelation::Connected => (READY, PeerRelation::Connected),
            PeerRelation::Admitted => (ADMITTED, PeerRelation::Admitted),
        };
        let well = peer.is(type_) && stale.is_none();
        Self {
            context: context.to_owned(),
            peer: peer.name_any(),
            id: status.cluster_id,
            relation,
            ready: match relation {
                PeerRelation::Admitted if well => None,
                PeerRelation::Admitted | PeerRelation::Connected => Some(well),
            },
            reason: match (&stale, peer.condition(type_)) {
                (Some(_), _) => "Stale".into(),
                (None, Some(condition)) => condition.reason.clone(),
                (None, None) => "Unknown".into(),
            },
            message: if well { String::new() } else { stale.unwrap_or_else(|| why_not_ready(peer)) },
            data_age_seconds: confirmed.map(|at| (Utc::now().timestamp() - at).max(0) as f64),
            revision_lag: status.revision_lag,
            counts: status.counts,
            endpoint: status.endpoint,
            source: match &peer.spec.secret {
                Some(secret) => format!("Secret {}/{}", secret.namespace, secret.name),
                None => format!("{:?}", peer.spec.source),
            },
            failures: status.failures,
            last_error: status.last_error,
        }
    }
}

impl PeerStatus {
    /// Whether something is wrong with it.
    pub(crate) fn is_unwell(&self) -> bool {
        self.ready == Some(false)
    }
}

/// A table of peers.
pub(crate) fn peer_table(peers: &[PeerStatus], wide: bool) -> Table {
    let mut header = vec![
        "CONTEXT",
        "PEER",
        "RELATION",
        "ID",
        "READY",
        "REASON",
        "AGE",
        "LAG",
        "NODES",
        "IDENTITIES",
        "ENDPOINTS",
        "SERVICES",
        "GATEWAY",
    ];
    if wide {
        header.extend(["SOURCE", "FAILURES", "LAST ERROR"]);
    }
    let mut rows = table(&header);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    for peer in peers {
        let mut row = vec![
            peer.context.clone(),
            peer.peer.clone(),
            format!("{:?}", peer.relation),
            or_dash(peer.id.map(|id| id.to_string())),
            or_dash(peer.ready.map(|ready| word(ready, "yes", "no"))),
            peer.reason.clone(),
            age(peer.data_age_seconds),
            or_dash(peer.revision_lag.map(|lag| lag.to_string())),
            peer.counts.nodes.to_string(),
            peer.counts.identities.to_string(),
            peer.counts.endpoints.to_string(),
            peer.counts.services.to_string(),
            or_dash(peer.endpoint.clone()),
        ];
        if wide {
            row.extend([peer.source.clone(), peer.failures.to_string(), or_dash(peer.last_error.clone())]);
        }
        rows.add_row(row);
    }
    rows
}

#[derive(Serialize)]
struct Report {
    ready: bool,
    peers: Vec<PeerStatus>,
    errors: Vec<String>,
}

/// Asks every context, prints, and says by the exit status whether all are ready.
pub(crate) async fn run(args: PeersArgs) -> Result<ExitCode, MeshError> {
    let contexts = args.kube.contexts()?;
    let names = if args.context.is_empty() { vec![contexts.current()?] } else { args.context.clone() };
    let asked = names.iter().map(async |name| {
        let api = contexts.open(name).await?;
        let peers = peers(&api).await?;
        Ok::<_, MeshError>(peers.iter().map(|peer| PeerStatus::of(name, peer)).collect::<Vec<_>>())
    });
    let mut report = Report { ready: false, peers: Vec::new(), errors: Vec::new() };
    for answer in join_all(asked).await {
        match answer {
            Ok(peers) => report.peers.extend(peers),
            Err(error) => report.errors.push(error.to_string()),
        }
    }
    report.ready = report.errors.is_empty() && report.peers.iter().all(|peer| !peer.is_unwell());
    if args.output == Output::Json {
        json(&report);
    } else {
        if report.peers.is_empty() && report.errors.is_empty() {
            say!("No peers. `isthmus connect` makes some.");
        } else if !report.peers.is_empty() {
            say!("{}", peer_table(&report.peers, args.output == Output::Wide));
        }
        for peer in report.peers.iter().filter(|peer| peer.is_unwell() && !peer.message.is_empty()) {
            note(&format!("{}: {}: {}", peer.context, peer.peer, peer.message));
        }
        report.errors.iter().for_each(|error| note(&format!("isthmus: {error}")));
    }
    Ok(if report.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
