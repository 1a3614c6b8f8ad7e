//! How the agent is, put together from its parts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use isthmus_bpf_abi::maps;
use isthmus_daemon::Readiness;
use isthmus_kvstore::reader::{ReaderStatus, SectionPhase, SectionStatus};
use isthmus_wire::{ClusterName, Prefix, Resource as Kind};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Config, Started};
use crate::datapath::Datapath;
use crate::mesh::{ClusterSummary, Resource};
use crate::metrics::Metrics;
use crate::pods::PodsStatus;
use crate::policy::PolicySummary;
use crate::reconcile::{self, Looks};
use crate::status::{
    AgentStatus, ClusterState, ClusterStatus, DatapathStatus, EncryptionStatus, GatewayStatus, MapStatus,
};

/// A heartbeat older than this means that nobody fills the store.
const OLD_HEARTBEAT: chrono::TimeDelta = chrono::TimeDelta::minutes(3);

/// Everything that a report is made of.
pub(super) struct Reporter {
    pub(super) config: Config,
    pub(super) started: Started,
    pub(super) datapath: Arc<Datapath>,
    pub(super) looks: Looks,
    pub(super) reader: watch::Receiver<ReaderStatus>,
    pub(super) pods: watch::Receiver<PodsStatus>,
    pub(super) sockets: watch::Receiver<bool>,
    pub(super) encryption: watch::Receiver<EncryptionStatus>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) readiness: watch::Sender<Readiness>,
}

/// What the reconciler says.
struct Inside {
    clusters: Vec<ClusterSummary>,
    now: crate::mesh::fact::Moment,
    own_read: bool,
    filled: (usize, usize, usize),
    short: usize,
    progress: reconcile::Progress,
    policy: PolicySummary,
}

impl Reporter {
    /// Whether the agent is ready, kept up to date by [`Reporter::run`].
    pub(super) fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.subscribe()
    }

    /// Keeps readiness and gauges up to date.
    pub(super) async fn run(self: Arc<Self>, gauges_every: Duration, shutdown: CancellationToken) {
        const READINESS_EVERY: Duration = Duration::from_millis(100);
        let mut gauges = tokio::time::interval(gauges_every);
        let mut readiness = tokio::time::interval(READINESS_EVERY);
        readiness.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = readiness.tick() => self.update_readiness().await,
                _ = gauges.tick() => {
                    if let Some(status) = self.status().await {
                        self.metrics.status(&status);
                        self.metrics.attached_pods(status.datapath.attached_pods);
                    }
                }
            }
        }
    }

    async fn update_readiness(&self) {
        let own_read = self.looks.at(|reconciler, _| reconciler.has_read_own()).await.unwrap_or(false);
        let now = match self.not_ready(own_read) {
            Some(reason) => Readiness::Waiting(reason),
            None => Readiness::Ready,
        };
        self.readiness.send_if_modified(|readiness| {
            let changed = *readiness != now;
            *readiness = now;
            changed
        });
    }

    fn not_ready(&self, own_read: bool) -> Option<String> {
        if !own_read {
            let reader = self.reader.borrow();
            let error = reader.last_error.as_deref().filter(|_| !reader.connected());
            return Some(match error {
                Some(error) => format!("the own cluster's gateway cannot be read: {error}"),
                None => "the own cluster has not been read whole yet".to_owned(),
            });
        }
        if !*self.sockets.borrow() {
            return Some("the socket programs are not attached yet".to_owned());
        }
        let encryption = self.encryption.borrow();
        let problem = || encryption.problem.as_deref().unwrap_or("the device is not set up yet");
        (encryption.enabled && !encryption.ready)
            .then(|| format!("traffic between nodes cannot be encrypted: {}", problem()))
    }

    /// The status; nothing once the agent is on its way out.
    pub(super) async fn status(&self) -> Option<AgentStatus> {
        let look = |reconciler: &reconcile::Reconciler, progress: &reconcile::Progress| Inside {
            clusters: reconciler.mesh().clusters(),
            now: progress.now,
            own_read: reconciler.has_read_own(),
            filled: reconciler.planner().filled(),
            short: reconciler.planner().short().len(),
            progress: progress.clone(),
            policy: reconciler.policies().summary(),
        };
        let inside = self.looks.at(look).await?;
        let reader = self.reader.borrow().clone();
        let pods = self.pods.borrow().clone();
        let now = Utc::now();
        let clusters: Vec<_> =
            inside.clusters.iter().map(|cluster| self.cluster(cluster, &reader, &inside, now)).collect();
        let not_ready = self.not_ready(inside.own_read);
        let problems = self.problems(not_ready.clone(), &reader, &pods, &inside, &clusters, now);
        Some(AgentStatus {
            node: self.config.node.clone(),
            cluster: self.config.own.name.to_string(),
            cluster_id: self.config.own.id.number(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: self.started,
            ready: not_ready.is_none(),
            problems,
            gateway: gateway(&reader, now),
            clusters,
            datapath: self.datapath_status(&pods),
            encryption: self.encryption.borrow().clone(),
            maps: self.maps(inside.filled),
            policy: inside.policy,
            applied: inside.progress.applied.iter().map(|(name, at)| (name.to_string(), *at)).collect(),
            rejected_entries: self.metrics.rejected_total(),
        })
    }

    fn cluster(
        &self,
        cluster: &ClusterSummary,
        reader: &ReaderStatus,
        inside: &Inside,
        now: DateTime<Utc>,
    ) -> ClusterStatus {
        let sections: Vec<(&'static str, Option<&SectionStatus>)> = sections(cluster)
            .into_iter()
            .map(|(name, prefix)| (name, reader.sections.get(&prefix)))
            .collect();
        // Of services and slices a peer has one.
        let followed = || sections.iter().filter_map(|(_, section)| *section);
        let missing: Vec<String> = sections
            .iter()
            .filter(|(_, section)| section.is_some_and(|section| !section.synced))
            .map(|(name, _)| (*name).to_owned())
            .collect();
        let following = followed().all(|section| section.phase == SectionPhase::Following);
        let any = followed().next().is_some();
        let state = match cluster.id {
            None => ClusterState::Unknown,
            Some(_) if cluster.draining => ClusterState::Draining,
            Some(_) if !any || !missing.is_empty() => ClusterState::Syncing,
            Some(_) if !reader.connected() || !following => ClusterState::Stale,
            Some(_) => ClusterState::Synced,
        };
        let confirmed: Option<Vec<_>> = followed().map(|section| section.confirmed).collect();
        let oldest = confirmed.and_then(|all| all.into_iter().min());
        ClusterStatus {
            name: cluster.name.to_string(),
            own: cluster.own,
            id: cluster.id,
            state,
            ready: state == ClusterState::Synced,
            nodes: cluster.nodes,
            endpoints: cluster.endpoints,
            identities: cluster.identities,
            services: cluster.services,
            data_age_seconds: oldest.map(|at| seconds(now - at)),
            last_change_seconds: cluster
                .latest
                .map(|latest| inside.now.0.saturating_sub(latest.arrived.0).as_secs_f64()),
            revision_lag: followed().map(|section| section.lag(reader.store_revision)).max(),
            missing,
        }
    }

    fn problems(
        &self,
        not_ready: Option<String>,
        reader: &ReaderStatus,
        pods: &PodsStatus,
        inside: &Inside,
        clusters: &[ClusterStatus],
        now: DateTime<Utc>,
    ) -> Vec<String> {
        let mut problems: Vec<String> = not_ready.into_iter().collect();
        if !reader.connected() && inside.own_read {
            let error = reader.last_error.as_deref().unwrap_or("no connection yet");
            problems.push(format!(
                "the own cluster's gateway has not been connected since {}: {error}; what is known stays in use",
                reader.since.format("%H:%M:%S UTC")
            ));
        }
        if reader.connected() && reader.last_heartbeat.is_some_and(|at| now - at > OLD_HEARTBEAT) {
            problems.push(
                "the gateway's heartbeat is old: nobody fills its store; look at the clustermesh-apiserver"
                    .to_owned(),
            );
        }
        for cluster in clusters.iter().filter(|cluster| !cluster.ready && reader.connected()) {
            problems.push(match cluster.state {
                ClusterState::Draining => {
                    format!(
                        "cluster {}: it is being disconnected; what is open has until its entries go",
                        cluster.name
                    )
                }
                ClusterState::Unknown => format!(
                    "cluster {}: it has not described itself, or claims an id that another cluster holds",
                    cluster.name
                ),
                _ => format!("cluster {}: not read whole yet: {}", cluster.name, cluster.missing.join(", ")),
            });
        }
        problems.extend(inside.progress.failing.iter().cloned());
        if inside.short > 0 {
            problems.push(format!(
                "{} frontends lack backends: the map of backends is full ({}); raise its size with --bpf-map-backends",
                inside.short, self.config.sizes.backends
            ));
        }
        problems.extend(pods.error.iter().cloned());
        problems.extend(encryption_problems(&self.encryption.borrow()));
        problems.extend(policy_problems(&inside.policy, inside.own_read));
        problems
    }

    fn datapath_status(&self, pods: &PodsStatus) -> DatapathStatus {
        let counters = self.datapath.counters().unwrap_or_default();
        DatapathStatus {
            kube_proxy_replacement: self.config.kube_proxy_replacement,
            sockets_attached: *self.sockets.borrow(),
            attached_pods: pods.attached,
            waiting_pods: pods.waiting.clone(),
            counters: counters
                .into_iter()
                .map(|(counter, value)| (counter.name().to_owned(), value))
                .collect::<BTreeMap<_, _>>(),
        }
    }

    fn maps(&self, (services, backends, ipcache): (usize, usize, usize)) -> Vec<MapStatus> {
        let sizes = self.config.sizes;
        [
            (maps::SERVICES, services, sizes.services),
            (maps::BACKENDS, backends, sizes.backends),
            (maps::IPCACHE, ipcache, sizes.ipcache),
        ]
        .map(|(name, entries, capacity)| MapStatus { name: name.to_owned(), entries, capacity })
        .into()
    }
}

/// While it is not ready, that is a problem of the agent as a whole.
fn encryption_problems(encryption: &EncryptionStatus) -> Vec<String> {
    let own = encryption.problem.iter().filter(|_| encryption.ready).cloned();
    let refused = encryption.refused_keys.iter().map(|refused| {
        format!(
            "the WireGuard key of node {} of cluster {} is not used: {}",
            refused.node, refused.cluster, refused.reason
        )
    });
    own.chain(refused).collect()
}

fn policy_problems(policy: &PolicySummary, own_read: bool) -> Vec<String> {
    let mut problems = Vec::new();
    if own_read && !policy.decided {
        problems.push(
            "not all that policies depend on has been read since the agent was started: pods of an earlier run keep the \
             policy that they had, new ones get what is known"
                .to_owned(),
        );
    }
    for (pod, reason) in &policy.closed {
        problems.push(format!("pod {pod} is allowed nothing that its policies are about: {reason}"));
    }
    problems
}

fn gateway(reader: &ReaderStatus, now: DateTime<Utc>) -> GatewayStatus {
    GatewayStatus {
        connected: reader.connected(),
        since: reader.since,
        endpoint: reader.endpoint.clone(),
        failures: reader.failures,
        last_error: reader.last_error.clone(),
        store_id: reader.cluster_id,
        revision: reader.store_revision,
        heartbeat_age_seconds: reader.last_heartbeat.map(|at| seconds(now - at)),
    }
}

/// The sections that a cluster is read from.
fn sections(cluster: &ClusterSummary) -> Vec<(&'static str, String)> {
    let Ok(name) = cluster.name.parse::<ClusterName>() else { return Vec::new() };
    let kinds = [
        (Resource::Nodes, Kind::Nodes),
        (Resource::Endpoints, Kind::Ip),
        (Resource::Identities, Kind::Identities),
        (Resource::Services, Kind::Services),
        (Resource::Slices, Kind::EndpointSlices),
    ];
    let shared = kinds.into_iter().map(|(resource, kind)| {
        let prefix = match (cluster.own, resource) {
            (true, Resource::Services) => Prefix::LocalServices,
            (true, _) => Prefix::State(kind),
            (false, _) => Prefix::Cache(kind),
        };
        (resource, prefix)
    });
    let own = [(Resource::Policies, Prefix::LocalPolicies), (Resource::Namespaces, Prefix::LocalNamespaces)];
    shared
        .chain(own.into_iter().filter(|_| cluster.own))
        .map(|(resource, prefix)| (resource.name(), prefix.range(&name).trim_end_matches('/').to_owned()))
        .collect()
}

fn seconds(delta: chrono::TimeDelta) -> f64 {
    delta.num_milliseconds() as f64 / 1000.0
}
