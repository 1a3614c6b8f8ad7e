//! How the gateway is read, made of the reader's state whenever somebody asks.

use std::fmt;
use std::sync::{Arc, OnceLock};

use chrono::{DateTime, Utc};
use isthmus_kvstore::metrics::{Limiter, Scope, cluster_of, tell_limiters};
use isthmus_kvstore::reader::{Reader, ReaderStatus, SectionPhase};
use isthmus_wire::ClusterName;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::sync::watch;

/// The reader, once there is one. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading(Arc<OnceLock<Begun>>);

#[derive(Debug)]
struct Begun {
    own: ClusterName,
    status: watch::Receiver<ReaderStatus>,
    limiter: Limiter,
}

impl Reading {
    /// Only the first one counts.
    pub(super) fn begin(&self, own: &ClusterName, reader: &Reader) {
        let begun = Begun { own: own.clone(), status: reader.status(), limiter: reader.limiter() };
        let _ = self.0.set(begun);
    }

    /// When the connection last failed.
    pub(super) fn last_failure(&self) -> Option<DateTime<Utc>> {
        self.0.get()?.status.borrow().last_failure
    }
}

/// Reads the reader's state.
#[derive(Debug)]
pub(super) struct ReadingMetrics(pub(super) Reading);

impl Collector for ReadingMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "The program's version";
        let mut version = encoder.encode_descriptor("cilium_version", help, None, MetricType::Gauge)?;
        let labels = [("version", env!("CARGO_PKG_VERSION")), ("arch", isthmus_daemon::ARCH)];
        ConstGauge::new(1.0).encode(version.encode_family(&labels)?)?;

        let begun = self.0.0.get();
        let mut completed = encoder.encode_descriptor(
            "cilium_kvstore_initial_sync_completed",
            "1 once everything there was at the start is read over the present connection, and followed",
            None,
            MetricType::Gauge,
        )?;
        if let Some(begun) = begun {
            for (prefix, section) in &begun.status.borrow().sections {
                let prefix = format!("{prefix}/");
                let named = cluster_of(prefix.as_bytes()).and_then(|name| std::str::from_utf8(name).ok());
                let labels = [
                    ("scope", Scope::of(prefix.as_bytes()).as_str()),
                    ("source_cluster", named.unwrap_or(begun.own.as_str())),
                    ("action", "read"),
                ];
                let following = section.phase == SectionPhase::Following;
                ConstGauge::new(f64::from(u8::from(following))).encode(completed.encode_family(&labels)?)?;
            }
        }
        let limiters: Vec<_> =
            begun.map(|begun| ("etcd".to_owned(), begun.limiter.status())).into_iter().collect();
        tell_limiters(&mut encoder, "cilium", &limiters)
    }
}
