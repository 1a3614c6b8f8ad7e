//! What the agent counts and measures, under the names that users of Cilium know where there are such.

mod reading;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use isthmus_kvstore::metrics::ClientMetrics;
use isthmus_kvstore::reader::Reader;
use isthmus_wire::ClusterName;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use self::reading::{Reading, ReadingMetrics};
use crate::datapath::Datapath;
use crate::encryption::EncryptionStatus;
use crate::encryption::metrics::EncryptionMetrics;
use crate::status::AgentStatus;

/// Counters, gauges and histograms of one agent. Shared by its tasks.
#[derive(Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    rejected: Family<Rejected, Counter>,
    rejected_total: AtomicU64,
    operations: Family<Outcome, Counter>,
    stages: Family<Stage, Histogram>,
    clusters: Gauge,
    client: ClientMetrics,
    reading: Reading,
    cluster_ready: Family<Cluster, Gauge>,
    cluster_failures: Family<Cluster, Gauge>,
    cluster_last_failure: Family<Cluster, Gauge<f64, AtomicU64>>,
    cluster_nodes: Family<Cluster, Gauge>,
    cluster_services: Family<Cluster, Gauge>,
    cluster_endpoints: Family<Cluster, Gauge>,
    cluster_lag: Family<Cluster, Gauge>,
    map_entries: Family<Map, Gauge>,
    map_capacity: Family<Map, Gauge>,
    pods: Gauge,
    healed: Counter,
    policies: Gauge,
    enforced: Family<Direction, Gauge>,
    closed: Gauge,
    policy_entries: Gauge,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Direction {
    direction: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Rejected {
    resource: &'static str,
    reason: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Cluster {
    target_cluster: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Map {
    map: &'static str,
}

impl Metrics {
    /// All at zero; `datapath` is asked for its own counters whenever the metrics are read, and `encryption` for how it
    /// is.
    pub fn new(datapath: Option<Arc<Datapath>>, encryption: watch::Receiver<EncryptionStatus>) -> Self {
        let mut registry = Registry::default();
        let stages = Family::<Stage, Histogram>::new_with_constructor(|| {
            // 16 µs to 4 s.
            Histogram::new(exponential_buckets(16e-6, 2.0, 19))
        });
        let agent = registry.sub_registry_with_prefix("isthmus_agent");
        let (rejected, operations, healed, pods) =
            (Family::default(), Family::default(), Counter::default(), Gauge::default());
        agent.register(
            "rejected_entries",
            "Entries of the store left out, by kind and reason",
            rejected.clone(),
        );
        agent.register("map_operations", "Changes made to eBPF maps", operations.clone());
        agent.register(
            "event_to_map_seconds",
            "Time from an event's arrival to the map, by stage",
            stages.clone(),
        );
        agent.register(
            "healed_operations",
            "Changes made since a map was not as the agent had left it",
            healed.clone(),
        );
        agent.register("attached_pods", "Pods with packet programs on their interface", pods.clone());
        let (policies, enforced) = (Gauge::default(), Family::<Direction, Gauge>::default());
        let (closed, policy_entries) = (Gauge::default(), Gauge::default());
        agent.register("policies", "Network policies of the cluster", policies.clone());
        agent.register(
            "policy_endpoints_enforced",
            "Pods' interfaces on which policy is enforced",
            enforced.clone(),
        );
        agent.register(
            "policy_endpoints_closed",
            "Pods' interfaces whose policy could not be put in force, so that nothing is allowed",
            closed.clone(),
        );
        agent.register("policy_entries", "Entries in all policy maps", policy_entries.clone());
        let (map_entries, map_capacity) = (Family::default(), Family::default());
        agent.register("map_entries", "Entries in use", map_entries.clone());
        agent.register("map_capacity", "Entries that a map has room for", map_capacity.clone());
        let cluster_lag = Family::default();
        agent.register(
            "cluster_revision_lag",
            "Revisions of the store not yet seen of a cluster",
            cluster_lag.clone(),
        );
        let mesh = registry.sub_registry_with_prefix("cilium_clustermesh");
        let (clusters, cluster_ready) = (Gauge::default(), Family::default());
        let (cluster_nodes, cluster_services, cluster_endpoints) =
            (Family::default(), Family::default(), Family::default());
        mesh.register("remote_clusters", "Peers", clusters.clone());
        mesh.register(
            "remote_cluster_readiness_status",
            "1 when all of a peer is known and followed",
            cluster_ready.clone(),
        );
        let (cluster_failures, cluster_last_failure) = (Family::default(), Family::default());
        mesh.register(
            "remote_cluster_failures",
            "How often the connection failed over which a peer is read, which is one for all peers",
            cluster_failures.clone(),
        );
        mesh.register(
            "remote_cluster_last_failure_ts",
            "When the connection last failed over which a peer is read, in seconds since 1970",
            cluster_last_failure.clone(),
        );
        mesh.register("remote_cluster_nodes", "Nodes of a peer", cluster_nodes.clone());
        mesh.register("remote_cluster_services", "Services of a peer", cluster_services.clone());
        mesh.register("remote_cluster_endpoints", "Addresses of a peer", cluster_endpoints.clone());
        let (client, reading) = (ClientMetrics::default(), Reading::default());
        let cilium = registry.sub_registry_with_prefix("cilium");
        client.register_calls(cilium);
        client.register_events(cilium);
        registry.register_collector(Box::new(ReadingMetrics(reading.clone())));
        registry.register_collector(Box::new(EncryptionMetrics(encryption)));
        if let Some(datapath) = datapath {
            registry.register_collector(Box::new(DatapathCounters(datapath)));
        }
        Self {
            registry: Arc::new(registry),
            rejected,
            rejected_total: AtomicU64::new(0),
            operations,
            stages,
            clusters,
            client,
            reading,
            cluster_ready,
            cluster_failures,
            cluster_last_failure,
            cluster_nodes,
            cluster_services,
            cluster_endpoints,
            cluster_lag,
            map_entries,
            map_capacity,
            pods,
            healed,
            policies,
            enforced,
            closed,
            policy_entries,
        }
    }

    /// What an HTTP endpoint serves.
    pub fn registry(&self) -> Arc<Registry> {
        self.registry.clone()
    }

    /// Where it is counted how the gateway answers.
    pub fn client(&self) -> &ClientMetrics {
        &self.client
    }

    /// The own cluster's gateway is read by this reader from now on. Once only.
    pub fn reads(&self, own: &ClusterName, reader: &Reader) {
        self.reading.begin(own, reader);
    }

    /// An entry was left out.
    pub fn rejected(&self, resource: &'static str, reason: &'static str) {
        self.rejected.get_or_create(&Rejected { resource, reason }).inc();
        self.rejected_total.fetch_add(1, Ordering::Relaxed);
    }

    /// Entries left out so far.
    pub fn rejected_total(&self) -> u64 {
        self.rejected_total.load(Ordering::Relaxed)
    }

    /// Map operations were made, or not.
    pub fn operations(&self, made: usize, failed: usize) {
        self.operations.get_or_create(&Outcome { outcome: "made" }).inc_by(made as u64);
        self.operations.get_or_create(&Outcome { outcome: "failed" }).inc_by(failed as u64);
    }

    /// Operations that a comparison with the kernel's maps made necessary.
    pub fn healed(&self, operations: usize) {
        self.healed.inc_by(operations as u64);
    }

    /// An event took so long in a stage: `queue` until it was taken up, `resolve` (policies) and `enforce`
    /// (with putting them in force), `plan`, `apply`, or `total`.
    pub fn stage(&self, stage: &'static str, took: Duration) {
        self.stages.get_or_create(&Stage { stage }).observe(took.as_secs_f64());
    }

    /// Pods that have packet programs now.
    pub fn attached_pods(&self, pods: usize) {
        self.pods.set(pods as i64);
    }

    /// Sets the gauges to what a status says.
    pub fn status(&self, status: &AgentStatus) {
        for gauges in [
            &self.cluster_ready,
            &self.cluster_failures,
            &self.cluster_nodes,
            &self.cluster_services,
            &self.cluster_endpoints,
            &self.cluster_lag,
        ] {
            gauges.clear();
        }
        self.cluster_last_failure.clear();
        let last_failure = self.reading.last_failure();
        let peers = || status.clusters.iter().filter(|cluster| !cluster.own);
        self.clusters.set(peers().count() as i64);
        for cluster in &status.clusters {
            let label = Cluster { target_cluster: cluster.name.clone() };
            self.cluster_lag.get_or_create(&label).set(cluster.revision_lag.unwrap_or(0));
            if cluster.own {
                continue;
            }
            self.cluster_ready.get_or_create(&label).set(i64::from(cluster.ready));
            let failures = i64::try_from(status.gateway.failures).unwrap_or(i64::MAX);
            self.cluster_failures.get_or_create(&label).set(failures);
            if let Some(at) = last_failure {
                self.cluster_last_failure.get_or_create(&label).set(at.timestamp_millis() as f64 / 1000.0);
            }
            self.cluster_nodes.get_or_create(&label).set(cluster.nodes as i64);
            self.cluster_services.get_or_create(&label).set(cluster.services as i64);
            self.cluster_endpoints.get_or_create(&label).set(cluster.endpoints as i64);
        }
        let policy = &status.policy;
        self.policies.set(policy.policies as i64);
        for (direction, count) in [("ingress", policy.ingress_enforced), ("egress", policy.egress_enforced)] {
            self.enforced.get_or_create(&Direction { direction }).set(count as i64);
        }
        self.closed.set(policy.closed.len() as i64);
        self.policy_entries.set(policy.entries as i64);
        for map in &status.maps {
            let label = Map { map: map_label(&map.name) };
            self.map_entries.get_or_create(&label).set(map.entries as i64);
            self.map_capacity.get_or_create(&label).set(i64::from(map.capacity));
        }
    }
}

fn map_label(name: &str) -> &'static str {
    use isthmus_bpf_abi::maps::{BACKENDS, IPCACHE, SERVICES};
    [SERVICES, BACKENDS, IPCACHE].into_iter().find(|known| *known == name).unwrap_or("other")
}

/// Counters of the eBPF programs, read from the kernel when somebody asks.
#[derive(Debug)]
struct DatapathCounters(Arc<Datapath>);

impl Collector for DatapathCounters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (counter, value) in self.0.counters().unwrap_or_default() {
            let metric = ConstCounter::new(value);
            let name = format!("isthmus_datapath_{}", counter.name());
            let encoder = encoder.encode_descriptor(
                &name,
                "Counted by the eBPF programs",
                None,
                metric.metric_type(),
            )?;
            metric.encode(encoder)?;
        }
        Ok(())
    }
}
