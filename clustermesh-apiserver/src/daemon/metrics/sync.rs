//! How far writing and mirroring are, for the own cluster under the apiserver's names and for each peer under the relay's.

use std::collections::BTreeMap;
use std::fmt;

use isthmus_kvstore::metrics::Scope;
use isthmus_kvstore::writer::Backlog;
use isthmus_wire::Resource;

use super::out::Out;
use super::{APISERVER, KVSTOREMESH, Writing};
use crate::relay::PeerSync;

/// What waits, and how often writing was in vain, by cluster and part. Every part is there, also one in which nothing waits.
type Queues<'a> = BTreeMap<(&'a str, Scope), (usize, u64)>;

pub(super) fn tell(
    out: &mut Out<'_, '_>,
    writing: &Writing,
    cluster: &str,
    peers: &[PeerSync],
) -> fmt::Result {
    let status = writing.exporter.status.borrow().clone();
    let sections: Vec<(Scope, bool)> =
        status.sections.iter().map(|(prefix, complete)| (Scope::of(prefix.as_bytes()), *complete)).collect();
    let backlogs = writing.writer.backlogs();

    let own = sections.iter().map(|(scope, _)| (cluster, *scope));
    queues(out, APISERVER, &backlogs, cluster, own.collect())?;
    let completed = sections.iter().map(|(scope, complete)| (cluster, *scope, "write", *complete));
    initial(out, APISERVER, completed)?;

    let parts = |peer| Resource::ALL.into_iter().map(move |resource| (peer, Scope::Shared(resource)));
    let theirs = peers.iter().flat_map(|peer| parts(peer.name.as_str()));
    queues(out, KVSTOREMESH, &backlogs, cluster, theirs.collect())?;
    let completed = peers.iter().flat_map(|peer| {
        let name = peer.name.as_str();
        let read = peer.read.iter().map(move |(scope, complete)| (name, *scope, "read", *complete));
        let written = parts(name).map(|(name, scope)| (name, scope, "write", peer.written.contains(&scope)));
        read.chain(written)
    });
    initial(out, KVSTOREMESH, completed)?;

    let status = writing.writer.status();
    out.counter(
        "isthmus_writer_failures",
        "Attempts to write to etcd that failed, for the want of a connection too",
        status.failures,
    )?;
    out.gauge(
        "isthmus_writer_rejected_keys",
        "Keys that etcd refuses for what they are, such as a value that is too large",
        status.rejected as f64,
    )
}

/// The queues of `parts`, and of what else is known of the same clusters.
fn queues(
    out: &mut Out<'_, '_>,
    namespace: &str,
    backlogs: &[Backlog],
    own: &str,
    parts: Vec<(&str, Scope)>,
) -> fmt::Result {
    let mut queues: Queues<'_> = parts.iter().map(|part| (*part, (0, 0))).collect();
    for backlog in backlogs {
        let cluster = backlog.cluster.as_deref().unwrap_or(own);
        if parts.iter().any(|(known, _)| *known == cluster) {
            let queue = queues.entry((cluster, backlog.scope)).or_default();
            queue.0 += backlog.pending;
            queue.1 += backlog.failures;
        }
    }
    let labels = |cluster, scope: Scope| [("scope", scope.as_str()), ("source_cluster", cluster)];
    out.gauges(
        &format!("{namespace}_kvstore_sync_queue_size"),
        "Changes that wait to be written",
        queues.iter().map(|((cluster, scope), queue)| (labels(*cluster, *scope), queue.0 as f64)),
    )?;
    out.counters(
        &format!("{namespace}_kvstore_sync_errors"),
        "Changes that could not be written in an attempt, and were tried again or refused",
        queues.iter().map(|((cluster, scope), queue)| (labels(*cluster, *scope), queue.1)),
    )
}

fn initial<'c>(
    out: &mut Out<'_, '_>,
    namespace: &str,
    completed: impl IntoIterator<Item = (&'c str, Scope, &'static str, bool)>,
) -> fmt::Result {
    out.gauges(
        &format!("{namespace}_kvstore_initial_sync_completed"),
        "1 once everything there was at the start is written, or read over the present connection",
        completed.into_iter().map(|(cluster, scope, action, complete)| {
            let labels = [("scope", scope.as_str()), ("source_cluster", cluster), ("action", action)];
            (labels, f64::from(u8::from(complete)))
        }),
    )
}
