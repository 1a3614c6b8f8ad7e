//! The relay's metrics, under the names that Cilium's users know from its KVStoreMesh.

use std::sync::atomic::AtomicU64;

use isthmus_kvstore::metrics::ClientMetrics;
use isthmus_kvstore::reader::ReaderStatus;
use isthmus_wire::ClusterName;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Target {
    target_cluster: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Rejected {
    target_cluster: String,
    reason: &'static str,
}

/// Counters and gauges per peer.
#[derive(Debug, Default)]
pub struct Metrics {
    clusters: Gauge,
    failures: Family<Target, Gauge>,
    last_failure: Family<Target, Gauge<f64, AtomicU64>>,
    ready: Family<Target, Gauge>,
    revocations: Family<Target, Gauge>,
    rejected: Family<Rejected, Counter>,
    client: ClientMetrics,
}

impl Metrics {
    /// Adds them to a registry.
    pub fn register(&self, registry: &mut Registry) {
        let mesh = registry.sub_registry_with_prefix("cilium_kvstoremesh");
        mesh.register("remote_clusters", "Peers that are configured", self.clusters.clone());
        mesh.register(
            "remote_cluster_failures",
            "How often the connection to the peer failed",
            self.failures.clone(),
        );
        mesh.register(
            "remote_cluster_last_failure_ts",
            "When the connection to the peer last failed, in seconds since 1970",
            self.last_failure.clone(),
        );
        mesh.register(
            "remote_cluster_readiness_status",
            "1 while everything of the peer is mirrored and followed",
            self.ready.clone(),
        );
        mesh.register(
            "remote_cluster_cache_revocations",
            "How often the peer's services were withdrawn since it was out of reach for too long",
            self.revocations.clone(),
        );
        self.client.register_calls(mesh);
        self.client.register_events(mesh);
        registry.sub_registry_with_prefix("isthmus_relay").register(
            "rejected_entries",
            "Entries of the peer that were not mirrored, by reason",
            self.rejected.clone(),
        );
    }

    /// Nothing is mirrored here any more: another replica tells of the peers. What they were refused stays, as a counter does.
    pub fn stand_by(&self) {
        self.clusters.set(0);
        self.failures.clear();
        self.last_failure.clear();
        self.ready.clear();
        self.revocations.clear();
    }

    /// What is asked of the peers' stores, all together.
    pub(super) fn client(&self) -> &ClientMetrics {
        &self.client
    }

    pub(super) fn peers(&self, count: usize) {
        self.clusters.set(count.try_into().unwrap_or(i64::MAX));
    }

    pub(super) fn connection(&self, peer: &ClusterName, status: &ReaderStatus) {
        let target = target(peer);
        self.failures.get_or_create(&target).set(status.failures.try_into().unwrap_or(i64::MAX));
        if let Some(at) = status.last_failure {
            self.last_failure.get_or_create(&target).set(at.timestamp_millis() as f64 / 1000.0);
        }
        self.ready.get_or_create(&target).set(status.ready().into());
    }

    pub(super) fn revoked(&self, peer: &ClusterName) {
        self.revocations.get_or_create(&target(peer)).inc();
    }

    pub(super) fn rejected(&self, peer: &ClusterName, reason: &'static str) {
        self.rejected.get_or_create(&Rejected { target_cluster: peer.to_string(), reason }).inc();
    }

    /// A removed peer leaves no series behind, but for what it was refused.
    pub(super) fn forget(&self, peer: &ClusterName) {
        let target = target(peer);
        self.failures.remove(&target);
        self.last_failure.remove(&target);
        self.ready.remove(&target);
        self.revocations.remove(&target);
    }
}

fn target(peer: &ClusterName) -> Target {
    Target { target_cluster: peer.to_string() }
}
