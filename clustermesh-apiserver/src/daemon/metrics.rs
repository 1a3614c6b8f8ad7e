//! Metrics that are read off the state when they are asked for, so that nothing has to keep them up to date.

use std::fmt;
use std::sync::Arc;

use isthmus_crds::names::LEASE;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::view::{Running, View, Writing};
use crate::relay::Relay;
use crate::status::PeerStatus;

/// Cilium's name of its apiserver's metrics.
const APISERVER: &str = "cilium_clustermesh_apiserver";
/// Cilium's name of its relay's metrics.
const KVSTOREMESH: &str = "cilium_kvstoremesh";

/// The daemon's state as metrics.
#[derive(Debug)]
pub(super) struct StateMetrics(pub(super) Arc<View>);

impl Collector for StateMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(&mut encoder);
        out.gauges(
            &format!("{APISERVER}_version"),
            "The program's version",
            [([("version", env!("CARGO_PKG_VERSION"))], 1.0)],
        )?;
        if let Some(seconds) = self.0.bootstrap_seconds() {
            out.gauge(
                &format!("{APISERVER}_bootstrap_seconds"),
                "Seconds from the start until it was ready for the first time",
                seconds,
            )?;
        }
        leader(&mut out, &self.0)?;
        certificates(&mut out, &self.0)?;
        let Some(running) = self.0.running() else { return Ok(()) };
        store(&mut out, running)?;
        // Who stands by writes nothing.
        let Some(writing) = self.0.writing() else { return Ok(()) };
        writer(&mut out, &writing, self.0.cluster.as_str())?;
        exporter(&mut out, &writing, self.0.cluster.as_str())?;
        peers(&mut out, &writing.relay)
    }
}

fn leader(out: &mut Out<'_, '_>, view: &View) -> fmt::Result {
    let Some(role) = view.role() else { return Ok(()) };
    out.gauges(
        &format!("{APISERVER}_leader_election_master_status"),
        "1 while this replica leads, 0 while it stands by",
        [([("name", LEASE)], f64::from(u8::from(role.is_leading())))],
    )
}

fn certificates(out: &mut Out<'_, '_>, view: &View) -> fmt::Result {
    let certificates = view.certificates();
    out.gauges(
        "isthmus_certificate_expiry_timestamp_seconds",
        "Until when the certificate in the Secret is valid, in seconds since 1970",
        certificates.iter().filter_map(|certificate| {
            Some(([("secret", certificate.name.as_str())], certificate.not_after?.timestamp() as f64))
        }),
    )?;
    out.gauges(
        "isthmus_certificate_problem",
        "1 while what is in the Secret cannot be used as it is",
        certificates.iter().map(|certificate| {
            ([("secret", certificate.name.as_str())], f64::from(u8::from(certificate.problem.is_some())))
        }),
    )
}

fn store(out: &mut Out<'_, '_>, running: &Running) -> fmt::Result {
    let stats = running.store.stats();
    out.gauge("isthmus_store_revision", "The newest revision", stats.revision.0 as f64)?;
    out.gauge("isthmus_store_keys", "Keys in the store", stats.keys as f64)?;
    out.gauge_of(
        "isthmus_store_live",
        "Bytes of present keys and values",
        Unit::Bytes,
        stats.live_bytes as f64,
    )?;
    out.gauge_of(
        "isthmus_store_history",
        "Bytes kept of the past, for watchers to catch up",
        Unit::Bytes,
        stats.history_bytes as f64,
    )?;
    out.gauge("isthmus_store_watchers", "Watches that are open", stats.watchers as f64)?;
    if let Some(etcd) = &running.etcd {
        let etcd = etcd.borrow();
        out.gauge("isthmus_etcd_following", "1 while etcd is followed", f64::from(u8::from(etcd.following)))?;
        out.counter("isthmus_etcd_failures", "How often following etcd had to begin anew", etcd.failures)?;
    }
    Ok(())
}

fn writer(out: &mut Out<'_, '_>, writing: &Writing, cluster: &str) -> fmt::Result {
    let status = writing.writer.status();
    out.gauges(
        &format!("{APISERVER}_kvstore_sync_queue_size"),
        "Keys that wait to be written",
        [([("scope", "all"), ("source_cluster", cluster)], status.pending as f64)],
    )?;
    out.counter(
        &format!("{APISERVER}_kvstore_sync_errors"),
        "Writes that failed and were made again",
        status.failures,
    )?;
    out.gauge(
        "isthmus_writer_rejected_keys",
        "Keys that etcd refuses for what they are, such as a value that is too large",
        status.rejected as f64,
    )
}

fn exporter(out: &mut Out<'_, '_>, writing: &Writing, cluster: &str) -> fmt::Result {
    let status = writing.exporter.status.borrow();
    let sections: Vec<_> = status
        .sections
        .iter()
        .map(|(prefix, complete)| (scope(prefix), f64::from(u8::from(*complete))))
        .collect();
    out.gauges(
        &format!("{APISERVER}_kvstore_initial_sync_completed"),
        "1 once everything there was at the start is written",
        sections.iter().map(|(scope, complete)| {
            ([("scope", scope.as_str()), ("source_cluster", cluster), ("action", "write")], *complete)
        }),
    )
}

/// Cilium's name of a prefix in labels: `nodes/v1` of `cilium/state/nodes/v1`.
fn scope(prefix: &str) -> String {
    prefix.strip_prefix("cilium/state/").unwrap_or(prefix).to_owned()
}

fn peers(out: &mut Out<'_, '_>, relay: &Relay) -> fmt::Result {
    let peers = relay.peers();
    let each = |value: fn(&PeerStatus) -> f64| {
        peers.iter().map(move |peer| ([("target_cluster", peer.name.as_str())], value(peer)))
    };
    for (name, help, value) in [
        ("nodes", "Nodes mirrored of the peer", (|peer| peer.counts.nodes as f64) as fn(&PeerStatus) -> f64),
        ("endpoints", "Addresses mirrored of the peer", |peer| peer.counts.endpoints as f64),
        ("services", "Global services mirrored of the peer", |peer| peer.counts.services as f64),
        ("identities", "Identities mirrored of the peer", |peer| peer.counts.identities as f64),
    ] {
        out.gauges(&format!("{KVSTOREMESH}_remote_cluster_{name}"), help, each(value))?;
    }
    out.gauges(
        "isthmus_relay_revision_lag",
        "Revisions of the peer's store that are not mirrored yet, at most",
        each(|peer| peer.revision_lag as f64),
    )?;
    let ages = peers
        .iter()
        .filter_map(|peer| Some(([("target_cluster", peer.name.as_str())], peer.data_age_seconds?)));
    out.gauges(
        "isthmus_relay_data_age_seconds",
        "Seconds since what is mirrored was last known to be complete",
        ages,
    )
}

/// Writes metrics one by one.
struct Out<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl Out<'_, '_> {
    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(metric)
    }

    fn gauge_of(&mut self, name: &str, help: &str, unit: Unit, value: f64) -> fmt::Result {
        let metric = self.0.encode_descriptor(name, help, Some(&unit), MetricType::Gauge)?;
        ConstGauge::new(value).encode(metric)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(metric)
    }

    fn gauges<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = ([(&'l str, &'l str); N], f64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in values {
            ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
