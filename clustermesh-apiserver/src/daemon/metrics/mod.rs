//! Metrics that are read off the state when they are asked for, so that nothing has to keep them up to date.

mod out;
mod sync;

use std::fmt;
use std::sync::Arc;

use isthmus_crds::names::LEASE;
use isthmus_kvstore::metrics::{Limiter, LimiterStatus, tell_limiters};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;

use self::out::Out;
use super::view::{Running, View, Writing};
use crate::relay::{PeerSync, Relay};
use crate::status::PeerStatus;

/// Cilium's name of its apiserver's metrics.
pub(super) const APISERVER: &str = "cilium_clustermesh_apiserver";
/// Cilium's name of its relay's metrics.
const KVSTOREMESH: &str = "cilium_kvstoremesh";

/// The daemon's state as metrics.
#[derive(Debug)]
pub(super) struct StateMetrics(pub(super) Arc<View>);

impl Collector for StateMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let view = &self.0;
        let mut out = Out(&mut encoder);
        start(&mut out, view)?;
        leader(&mut out, view)?;
        certificates(&mut out, view)?;
        if let Some(running) = view.running() {
            store(&mut out, running)?;
        }
        // Who stands by writes nothing, and has no peers.
        let writing = view.writing();
        let writing = writing.as_deref();
        let peers = writing.map(|writing| writing.relay.sync()).unwrap_or_default();
        if let Some(writing) = writing {
            sync::tell(&mut out, writing, view.cluster.as_str(), &peers)?;
            mirrored(&mut out, &writing.relay)?;
        }
        limiters(&mut out, view.running(), writing, &peers)
    }
}

fn start(out: &mut Out<'_, '_>, view: &View) -> fmt::Result {
    for (namespace, help, seconds) in [
        (
            APISERVER,
            "Seconds from the start until everything there was had been exported",
            view.exported_after(),
        ),
        (
            KVSTOREMESH,
            "Seconds from the start until every peer in reach had been mirrored",
            view.mirrored_after(),
        ),
    ] {
        let version = [("version", env!("CARGO_PKG_VERSION")), ("arch", isthmus_daemon::ARCH)];
        out.gauges(&format!("{namespace}_version"), "The program's version", [(version, 1.0)])?;
        if let Some(seconds) = seconds {
            out.gauge(&format!("{namespace}_bootstrap_seconds"), help, seconds.as_secs_f64())?;
        }
    }
    Ok(())
}

fn leader(out: &mut Out<'_, '_>, view: &View) -> fmt::Result {
    out.gauges(
        &format!("{KVSTOREMESH}_leader_election_master_status"),
        "1 while this replica mirrors the peers, 0 while another one does for it",
        [([("name", "kvstoremesh")], f64::from(u8::from(view.writing().is_some())))],
    )?;
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

fn mirrored(out: &mut Out<'_, '_>, relay: &Relay) -> fmt::Result {
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

fn limiters(
    out: &mut Out<'_, '_>,
    running: Option<&Running>,
    writing: Option<&Writing>,
    peers: &[PeerSync],
) -> fmt::Result {
    let named = |name: &str, limiter: &Limiter| (name.to_owned(), limiter.status());
    let following = running.and_then(|running| running.limiter.as_ref());
    let writer = writing.and_then(|writing| writing.writer.limiter());
    let own: Vec<(String, LimiterStatus)> = writer
        .iter()
        .map(|limiter| named("etcd", limiter))
        .chain(following.map(|limiter| named("etcd-follow", limiter)))
        .collect();
    tell_limiters(out.0, APISERVER, &own)?;
    let theirs: Vec<(String, LimiterStatus)> = peers
        .iter()
        .filter_map(|peer| Some(named(&format!("etcd-{}", peer.name), peer.limiter.as_ref()?)))
        .collect();
    tell_limiters(out.0, KVSTOREMESH, &theirs)
}
