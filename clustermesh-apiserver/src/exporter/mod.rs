//! The exporter: Kubernetes objects in, wire keys out.
//!
//! ```text
//! Kubernetes API ──▶ watch ──▶ facts ──▶ translate ──▶ kvstore::Writer
//!        ▲                                   │
//!        └──────── identity_store ◀──────────┘
//! ```
//!
//! - `facts`: each object parsed once, where it arrives, into what the rest needs to know of it.
//! - `translate`: a pure state machine from events about facts to changes of keys.
//! - `watch`, `kinds`: the watches of the Kubernetes API.
//! - `identity_store`: identities as objects of the Kubernetes API.
//! - `policy_status`: what is said of a policy in its own status.
//! - `report`: what could not be used, told in logs, counters, Kubernetes Events and the status.
//!
//! There is no delay on the way: an event is translated when it arrives, together with those that have arrived
//! meanwhile. Keys are written once they differ, in sections whose canaries come last (wire format, section A.4).
//!
//! What it needs of the Kubernetes API: list and watch on services, endpointslices.discovery.k8s.io, namespaces,
//! networkpolicies.networking.k8s.io, ciliumnetworkpolicies, ciliumclusterwidenetworkpolicies and ciliumidentities.cilium.io;
//! get on customresourcedefinitions, to tell kinds that are not installed; patch on the status of the two kinds of Cilium's
//! policies, unless with `Source::Cilium`; with `Source::Kubernetes` also on pods and nodes, and get, create and delete on
//! ciliumidentities; with `Source::Cilium` also on ciliumnodes and ciliumendpoints; and create and patch on
//! events.events.k8s.io, which it can do without.

mod facts;
mod identity_store;
mod kinds;
mod metrics;
mod policy_status;
mod problem;
mod report;
mod status;
mod translate;
mod watch;

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_crds::{CiliumEndpoint, CiliumIdentity, CiliumNode};
use isthmus_kvstore::writer::{Kept, SectionWriter, Writer};
use isthmus_wire::value::Capabilities;
use isthmus_wire::{ClusterConfig, ClusterId, ClusterName, InvalidClusterId, Key, MaxConnectedClusters};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use tokio::sync::{mpsc, watch as notice};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::facts::{CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy, NetworkPolicy};
use self::identity_store::IdentityStore;
use self::problem::Subject;
use self::report::Reporter;
pub(crate) use self::report::chain;
use self::translate::{Input, Output, Section, Settings, Translator};

use crate::election::Leadership;

pub use self::metrics::ExporterMetrics;
pub use self::status::{ExportedCounts, ExporterStatus, WatchStatus};
pub(crate) use self::watch::RetryDelay;

/// Events that wait for the translation. Beyond it the watches wait too.
const WAITING_INPUTS: usize = 1024;
/// Events that are translated before what follows from them is written.
const LARGEST_BATCH: usize = 1024;

/// What to export, and as whom.
#[derive(Clone, Debug)]
pub struct ExporterConfig {
    /// Name of this cluster.
    pub cluster: ClusterName,
    /// Id of this cluster.
    pub cluster_id: ClusterId,
    /// What the mesh is set up for. All its clusters must agree.
    pub max_connected_clusters: MaxConnectedClusters,
    /// Where pods, nodes and identities come from.
    pub source: Source,
    /// Whether a namespace takes part in the mesh unless its annotation `clustermesh.cilium.io/global` says otherwise.
    pub namespaces_are_global: bool,
    /// How long an identity that no pod has is kept, in case one comes back. Long enough for every replica and peer to
    /// have noticed; [`ExporterConfig::DEFAULT_IDENTITY_RETENTION`] unless there is a reason.
    pub identity_retention: Duration,
}

impl ExporterConfig {
    /// 15 minutes: as long as leases, after which peers have forgotten the identity too.
    pub const DEFAULT_IDENTITY_RETENTION: Duration = Duration::from_secs(15 * 60);

    /// A cluster without Cilium, all of whose namespaces take part in the mesh.
    pub fn new(cluster: ClusterName, cluster_id: ClusterId) -> Self {
        Self {
            cluster,
            cluster_id,
            max_connected_clusters: MaxConnectedClusters::default(),
            source: Source::Kubernetes,
            namespaces_are_global: true,
            identity_retention: Self::DEFAULT_IDENTITY_RETENTION,
        }
    }
}

/// Where pods, nodes and identities come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// Pods and Nodes; identities are allocated.
    #[default]
    Kubernetes,
    /// Cilium's CiliumEndpoints, CiliumNodes and CiliumIdentities; nothing is allocated.
    Cilium,
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "kubernetes" => Ok(Self::Kubernetes),
            "cilium" => Ok(Self::Cilium),
            other => Err(format!("{other:?} is not one of kubernetes, cilium")),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kubernetes => "kubernetes",
            Self::Cilium => "cilium",
        })
    }
}

/// Why the exporter cannot run, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum ExporterError {
    /// The cluster's id does not fit to the mesh.
    #[error(transparent)]
    ClusterId(#[from] InvalidClusterId),
    /// The cluster has the name that stands for no cluster.
    #[error("a cluster in a mesh cannot be named \"default\": give it a name of its own with --cluster-name")]
    DefaultName,
    /// A part of the exporter has ended that never should. A fault of the program.
    #[error("a part of the exporter has stopped unexpectedly: {0}; restart it and report the fault")]
    Stopped(String),
}

/// The keys that tell readers that a section of this cluster is complete (wire format, section A.4).
pub(crate) fn canaries(cluster: &ClusterName) -> Vec<bytes::Bytes> {
    Section::ALL.map(|section| Key::canary(cluster, section.prefix()).to_bytes()).into()
}

/// An exporter that is ready to run.
pub struct Exporter {
    client: Client,
    leadership: Leadership,
    config: ExporterConfig,
    writer: Writer,
    metrics: ExporterMetrics,
    ready: notice::Sender<bool>,
    status: notice::Sender<ExporterStatus>,
}

/// What others may know of a running exporter.
#[derive(Clone, Debug)]
pub struct ExporterHandle {
    /// True once everything that there was at the start is exported and announced to readers. It stays true.
    pub ready: notice::Receiver<bool>,
    /// State and counts.
    pub status: notice::Receiver<ExporterStatus>,
}

impl Exporter {
    /// An exporter of the cluster behind `client` into the store behind `writer`.
    ///
    /// # Errors
    /// The cluster's id is beyond what the mesh is set up for, or its name is `default`.
    pub fn new(
        client: Client,
        config: ExporterConfig,
        writer: Writer,
        metrics: ExporterMetrics,
    ) -> Result<(Self, ExporterHandle), ExporterError> {
        config.max_connected_clusters.admit(config.cluster_id)?;
        if config.cluster.is_default() {
            return Err(ExporterError::DefaultName);
        }
        let (ready, is_ready) = notice::channel(false);
        let (status, statuses) = notice::channel(ExporterStatus::default());
        let handle = ExporterHandle { ready: is_ready, status: statuses };
        let leadership = Leadership::alone();
        Ok((Self { client, leadership, config, writer, metrics, ready, status }, handle))
    }

    /// One of several exporters of the same cluster, each into a store of its own: what people read, the status of
    /// policies and Kubernetes Events, only the leader writes.
    #[must_use]
    pub fn led_by(self, leadership: Leadership) -> Self {
        Self { leadership, ..self }
    }

    /// Exports until `shutdown`. What has been written stays in the store.
    ///
    /// # Errors
    /// Only faults of the program. Whatever the Kubernetes API does, it is waited for.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ExporterError> {
        // Whatever way this ends, everything it started ends with it.
        let shutdown = shutdown.child_token();
        let _guard = shutdown.clone().drop_guard();
        let (reporter, findings) = Reporter::new(self.metrics.clone(), self.status);
        let (inputs, received) = mpsc::channel(WAITING_INPUTS);
        let identities =
            IdentityStore::new(self.client.clone(), inputs.clone(), self.metrics.clone(), shutdown.clone());
        let mut tasks = JoinSet::new();
        let (policies, judged) = mpsc::unbounded_channel();
        // Where Cilium runs, its operator says what it thinks of a policy.
        if self.config.source == Source::Kubernetes {
            let leadership = self.leadership.clone();
            tasks.spawn(policy_status::keep(self.client.clone(), judged, leadership, shutdown.clone()));
        }
        tasks.spawn(report::send_events(self.client.clone(), findings, self.leadership, shutdown.clone()));
        start_watches(&mut tasks, &self.client, self.config.source, &inputs, &reporter, &shutdown);

        let mut cluster_config =
            self.writer.keep_cluster_config(&self.config.cluster, cluster_config(&self.config).encode());
        let work = Work {
            translator: Translator::new(settings(&self.config)),
            retention: self.config.identity_retention,
            sections: Sections::new(&self.writer, &self.config.cluster),
            identities: identities.clone(),
            policies,
            reporter,
            metrics: self.metrics,
            ready: self.ready,
            started: Instant::now(),
        };
        let outcome = tokio::select! {
            // First, since it ends the others too.
            biased;
            () = shutdown.cancelled() => Ok(()),
            outcome = work.run(received) => outcome,
            error = part_ended(&mut tasks, &mut cluster_config) => Err(error),
        };
        shutdown.cancel();
        identities.finish().await;
        tasks.shutdown().await;
        outcome
    }
}

/// Completes when something has ended that the exporter cannot do without, and that never should.
async fn part_ended(tasks: &mut JoinSet<()>, cluster_config: &mut Kept) -> ExporterError {
    let what = tokio::select! {
        Some(ended) = tasks.join_next() => match ended {
            Ok(()) => "a watch".to_owned(),
            Err(error) => error.to_string(),
        },
        () = cluster_config.ended() => "the keeping of the cluster configuration".to_owned(),
    };
    ExporterError::Stopped(what)
}

fn start_watches(
    tasks: &mut JoinSet<()>,
    client: &Client,
    source: Source,
    inputs: &mpsc::Sender<Input>,
    reporter: &Reporter,
    shutdown: &CancellationToken,
) {
    macro_rules! watch {
        ($($kind:ty),+) => {{$({
            let watch = watch::watch::<$kind>(client.clone(), inputs.clone(), reporter.clone());
            let shutdown = shutdown.clone();
            tasks.spawn(async move {
                shutdown.run_until_cancelled(watch).await;
            });
        })+}};
    }
    watch!(Namespace, Service, EndpointSlice, CiliumIdentity);
    watch!(NetworkPolicy, CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy);
    match source {
        Source::Kubernetes => watch!(Node, Pod),
        Source::Cilium => watch!(CiliumNode, CiliumEndpoint),
    }
}

fn settings(config: &ExporterConfig) -> Settings {
    Settings {
        cluster: config.cluster.clone(),
        cluster_id: config.cluster_id,
        max_connected_clusters: config.max_connected_clusters,
        namespaces_are_global: config.namespaces_are_global,
        allocates: config.source == Source::Kubernetes,
    }
}

/// Service exports are left out rather than off: a relay waits for their canary once they are mentioned at all.
fn cluster_config(config: &ExporterConfig) -> ClusterConfig {
    ClusterConfig {
        id: config.cluster_id,
        capabilities: Capabilities {
            synced_canaries: true,
            max_connected_clusters: Some(config.max_connected_clusters),
            ..Capabilities::default()
        },
    }
}

/// The loop between the translation and the world.
struct Work {
    translator: Translator,
    retention: Duration,
    sections: Sections,
    identities: IdentityStore,
    /// Unbounded, but for what the translation knows anyway: each policy is in it about as often as it changes.
    policies: mpsc::UnboundedSender<policy_status::Seen>,
    reporter: Reporter,
    metrics: ExporterMetrics,
    ready: notice::Sender<bool>,
    started: Instant,
}

impl Work {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>) -> Result<(), ExporterError> {
        // Ten looks per retention: an identity is deleted at most a tenth late.
        let period = (self.retention / 10).clamp(Duration::from_millis(100), Duration::from_secs(60));
        let mut collection = tokio::time::interval(period);
        let mut watch_check = tokio::time::interval(Duration::from_secs(5));
        let mut batch = Vec::with_capacity(LARGEST_BATCH);
        let mut announcements: JoinSet<Section> = JoinSet::new();
        let mut announced = BTreeSet::new();
        loop {
            tokio::select! {
                // An event and whatever else has arrived by then. The sender that `identities` holds keeps it open.
                _ = inputs.recv_many(&mut batch, LARGEST_BATCH) => {
                    batch.drain(..).for_each(|input| self.translator.apply(input));
                }
                _ = collection.tick() => {
                    self.translator.collect_garbage(self.started.elapsed(), self.retention);
                }
                _ = watch_check.tick() => {
                    self.reporter.forgive_watches();
                    continue;
                }
                Some(section) = announcements.join_next() => {
                    let section = section.map_err(|error| ExporterError::Stopped(error.to_string()))?;
                    announced.insert(section);
                    let ready = announced.len() == Section::ALL.len();
                    tracing::info!(section = section.as_str(), "everything that there was is exported");
                    self.reporter.section_complete(&section.prefix().to_string(), ready);
                    self.ready.send_replace(ready);
                    continue;
                }
            }
            let output = self.translator.drain();
            self.carry_out(output, &mut announcements);
        }
    }

    fn carry_out(&self, output: Output, announcements: &mut JoinSet<Section>) {
        for write in output.writes {
            self.metrics.write(&write);
            let section = self.sections.get(write.section);
            match write.value {
                Some(value) => section.put(write.key, value),
                None => section.delete(write.key),
            }
        }
        for action in output.identities {
            self.identities.carry_out(action);
        }
        for (kind, name, policy) in output.policies {
            let key = (kind, name);
            let idle = output.idle_policies.contains(&key);
            self.reporter.policy(kind, &key.1, policy.as_ref());
            self.reporter.idle_policy(kind, &key.1, idle);
            // Without a receiver somebody else writes the status.
            let _ = self.policies.send((key, policy.map(|policy| (policy, idle))));
        }
        for (kind, name, finding) in output.findings {
            let api_version = if kind == "CiliumIdentity" { "cilium.io/v2" } else { "v1" };
            // Without a UID it is a subject of its own, beside what the watch said about the object.
            self.reporter.findings(Subject { api_version, kind, name, uid: String::new() }, vec![finding]);
        }
        for section in output.completed {
            let writer = Arc::clone(self.sections.get(section));
            announcements.spawn(async move {
                writer.finish_initial().await;
                section
            });
        }
        self.reporter.counts(self.translator.counts());
    }
}

/// The writer of each section.
struct Sections([Arc<SectionWriter>; Section::ALL.len()]);

impl Sections {
    fn new(writer: &Writer, cluster: &ClusterName) -> Self {
        Self(Section::ALL.map(|section| {
            let prefix = section.prefix();
            let canary = Key::canary(cluster, prefix).to_bytes();
            Arc::new(writer.section(isthmus_kvstore::Section::new(prefix.range(cluster), Some(canary))))
        }))
    }

    fn get(&self, section: Section) -> &Arc<SectionWriter> {
        &self.0[section as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_panics_ends_the_exporter_by_name() {
        let mut watches = JoinSet::new();
        watches.spawn(std::future::pending());
        let error = part_ended(&mut watches, &mut Kept::spawn(async { panic!("on purpose") })).await;
        let ExporterError::Stopped(what) = &error else { panic!("{error}") };
        assert_eq!(what, "the keeping of the cluster configuration");

        watches.spawn(async { panic!("on purpose") });
        let error = part_ended(&mut watches, &mut Kept::spawn(std::future::pending())).await;
        assert!(matches!(&error, ExporterError::Stopped(what) if what.contains("panicked")), "{error}");
    }
}
