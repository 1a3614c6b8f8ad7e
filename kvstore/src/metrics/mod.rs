//! What clients of a store count and time, under the names and labels that Cilium's `kvstore_*` metrics have, so that
//! dashboards made for those show it. Nothing here has a label that a peer can choose.

mod limiter;
mod scope;

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

pub use self::limiter::{Limiter, LimiterStatus, tell_limiters};
pub use self::scope::{Scope, cluster_of};

/// The bounds of Cilium's histogram of operations, which are the Prometheus client's defaults. Seconds.
const OPERATION_BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// The bounds of Cilium's histogram of waiting events. Seconds.
const EVENT_BOUNDS: [f64; 11] = [0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0];

/// Counters and histograms of one or more clients. Cheap to clone; clones count together. Those of nobody in particular
/// unless they are registered.
#[derive(Clone, Debug)]
pub struct ClientMetrics {
    operations: Family<OperationLabels, Histogram>,
    events: Family<EventLabels, Histogram>,
    quorum_errors: Family<ErrorLabel, Counter>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OperationLabels {
    scope: &'static str,
    kind: &'static str,
    action: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct EventLabels {
    scope: &'static str,
    action: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct ErrorLabel {
    error: &'static str,
}

/// What is asked of a store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Action {
    /// One key is read.
    Get,
    /// A page of a list is read.
    ListPrefix,
    /// A key is put.
    Update,
    /// A key is deleted.
    Delete,
}

impl Action {
    /// Cilium's names of its kind and of itself.
    fn labels(self) -> (&'static str, &'static str) {
        match self {
            Self::Get => ("read", "Get"),
            Self::ListPrefix => ("read", "ListPrefix"),
            Self::Update => ("set", "Update"),
            Self::Delete => ("delete", "Delete"),
        }
    }
}

/// What says that a store is not able to work, whatever the connection does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum QuorumError {
    /// The heartbeat is silent.
    NoEvent,
    /// No answer in time.
    Timeout,
    /// The store says that it has no leader.
    NoLeader,
}

impl QuorumError {
    const ALL: [Self; 3] = [Self::NoEvent, Self::Timeout, Self::NoLeader];

    fn label(self) -> ErrorLabel {
        let error = match self {
            Self::NoEvent => "no event received",
            Self::Timeout => "timeout",
            Self::NoLeader => "no leader",
        };
        ErrorLabel { error }
    }
}

/// How long events of a section wait for room, by what they say of their key.
#[derive(Clone, Debug)]
pub(crate) struct EventWaits {
    pub(crate) create: Histogram,
    pub(crate) modify: Histogram,
    pub(crate) delete: Histogram,
}

impl Default for ClientMetrics {
    fn default() -> Self {
        let metrics = Self {
            operations: Family::new_with_constructor(|| Histogram::new(OPERATION_BOUNDS)),
            events: Family::new_with_constructor(|| Histogram::new(EVENT_BOUNDS)),
            quorum_errors: Family::default(),
        };
        // There from the start: an alert on an increase sees the first one too.
        for error in QuorumError::ALL {
            drop(metrics.quorum_errors.get_or_create(&error.label()));
        }
        metrics
    }
}

impl ClientMetrics {
    /// Adds what concerns calls: `kvstore_operations_duration_seconds` and `kvstore_quorum_errors_total`.
    pub fn register_calls(&self, registry: &mut Registry) {
        registry.register(
            "kvstore_operations_duration_seconds",
            "Seconds until the store had answered, by what was asked of it",
            self.operations.clone(),
        );
        registry.register(
            "kvstore_quorum_errors",
            "How often the store was found unable to work",
            self.quorum_errors.clone(),
        );
    }

    /// Adds what concerns events that are read: `kvstore_events_queue_seconds`.
    pub fn register_events(&self, registry: &mut Registry) {
        registry.register(
            "kvstore_events_queue_seconds",
            "Seconds that a received event waited for its consumer to make room",
            self.events.clone(),
        );
    }

    /// The store has answered `times` operations of one kind at once, or has failed to.
    pub(crate) fn operation(&self, scope: Scope, action: Action, times: usize, took: Duration, done: bool) {
        let (kind, action) = action.labels();
        let outcome = if done { "success" } else { "fail" };
        let labels = OperationLabels { scope: scope.as_str(), kind, action, outcome };
        let histogram = self.operations.get_or_create_owned(&labels);
        for _ in 0..times {
            histogram.observe(took.as_secs_f64());
        }
    }

    pub(crate) fn quorum_error(&self, error: QuorumError) {
        self.quorum_errors.get_or_create(&error.label()).inc();
    }

    /// Looked up once per section, not once per event.
    pub(crate) fn event_waits(&self, scope: Scope) -> EventWaits {
        let of = |action| self.events.get_or_create_owned(&EventLabels { scope: scope.as_str(), action });
        EventWaits { create: of("create"), modify: of("modify"), delete: of("delete") }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn names_and_labels_are_ciliums() {
        let metrics = ClientMetrics::default();
        let mut registry = Registry::with_prefix("cilium");
        metrics.register_calls(&mut registry);
        metrics.register_events(&mut registry);
        let took = Duration::from_millis(7);
        metrics.operation(Scope::of(b"cilium/cache/nodes/v1/beta/n1"), Action::Update, 3, took, true);
        metrics.operation(Scope::of(b"cilium/.heartbeat"), Action::Get, 1, took, false);
        metrics.quorum_error(QuorumError::NoEvent);
        metrics.event_waits(Scope::of(b"cilium/state/ip/v1/default/")).delete.observe(0.0);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            r#"cilium_kvstore_operations_duration_seconds_bucket{le="0.005",scope="nodes/v1",kind="set",action="Update",outcome="success"} 0"#,
            r#"cilium_kvstore_operations_duration_seconds_bucket{le="0.01",scope="nodes/v1",kind="set",action="Update",outcome="success"} 3"#,
            r#"cilium_kvstore_operations_duration_seconds_count{scope="cilium/.hear",kind="read",action="Get",outcome="fail"} 1"#,
            r#"cilium_kvstore_quorum_errors_total{error="no event received"} 1"#,
            r#"cilium_kvstore_quorum_errors_total{error="no leader"} 0"#,
            r#"cilium_kvstore_events_queue_seconds_count{scope="ip/v1",action="delete"} 1"#,
            r#"cilium_kvstore_events_queue_seconds_count{scope="ip/v1",action="create"} 0"#,
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
