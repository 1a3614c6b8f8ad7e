//! Metrics of the exporter.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::problem::Reason;
use super::translate::{Counts, Section, Write};

/// Handles to the exporter's metrics. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExporterMetrics {
    problems: Family<ReasonLabel, Counter>,
    watch_errors: Family<KindLabel, Counter>,
    exported: Family<SectionLabel, Gauge>,
    writes: Family<WriteLabel, Counter>,
    identity_errors: Counter,
    pods_without_identity: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SectionLabel {
    section: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabel {
    section: &'static str,
    action: &'static str,
}

impl ExporterMetrics {
    /// Registers the metrics under `isthmus_exporter_`.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            problems: Family::default(),
            watch_errors: Family::default(),
            exported: Family::default(),
            writes: Family::default(),
            identity_errors: Counter::default(),
            pods_without_identity: Gauge::default(),
        };
        // Every reason is there from the start: an alert on an increase sees the first one too.
        for reason in Reason::ALL {
            drop(metrics.problems.get_or_create(&ReasonLabel { reason: reason.as_str() }));
        }
        let registry = registry.sub_registry_with_prefix("isthmus_exporter");
        registry.register(
            "problems",
            "Things in Kubernetes objects that could not be used",
            metrics.problems.clone(),
        );
        registry.register(
            "watch_errors",
            "Failed lists and watches of the Kubernetes API",
            metrics.watch_errors.clone(),
        );
        registry.register("exported", "Keys that are exported", metrics.exported.clone());
        registry.register("writes", "Keys handed to the store", metrics.writes.clone());
        registry.register(
            "identity_errors",
            "Failed requests to create or delete CiliumIdentity objects",
            metrics.identity_errors.clone(),
        );
        registry.register(
            "pods_without_identity",
            "Pods that wait for an identity or cannot get one, and are not exported",
            metrics.pods_without_identity.clone(),
        );
        metrics
    }

    pub(crate) fn problem(&self, reason: Reason) {
        self.problems.get_or_create(&ReasonLabel { reason: reason.as_str() }).inc();
    }

    pub(crate) fn watch_error(&self, kind: &'static str) {
        self.watch_errors.get_or_create(&KindLabel { kind }).inc();
    }

    pub(crate) fn identity_error(&self) {
        self.identity_errors.inc();
    }

    pub(crate) fn write(&self, write: &Write) {
        let action = if write.value.is_some() { "put" } else { "delete" };
        self.writes.get_or_create(&WriteLabel { section: write.section.as_str(), action }).inc();
    }

    pub(crate) fn counts(&self, counts: Counts) {
        let set = |section: Section, count: usize| {
            self.exported.get_or_create(&SectionLabel { section: section.as_str() }).set(count as i64);
        };
        set(Section::Nodes, counts.nodes);
        set(Section::Identities, counts.identities);
        set(Section::Addresses, counts.addresses);
        set(Section::Services, counts.services);
        set(Section::LocalServices, counts.local_services);
        set(Section::LocalPolicies, counts.policies);
        set(Section::LocalNamespaces, counts.namespaces);
        self.pods_without_identity.set(counts.pods_without_identity as i64);
    }
}
