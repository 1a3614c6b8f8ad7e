//! What writes to the store, put together: heartbeat, exporter and relay, and what tells of them. Started and stopped as one, since with a shared
//! store only the leader runs them.

use std::sync::Arc;
use std::time::Duration;

use isthmus_kvstore::writer::Kept;
use isthmus_wire::Key;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::store::Pen;
use super::view::Writing;
use super::{DaemonConfig, DaemonError, Shared};
use crate::exporter::{Exporter, ExporterConfig, ExporterError};
use crate::peering;
use crate::relay::{Relay, RelayConfig, Sources};

/// How long a shutdown waits for what was written to reach etcd.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Parts {
    pen: Pen,
    heartbeat: Kept,
    exporting: JoinHandle<Result<(), ExporterError>>,
    relaying: JoinHandle<()>,
    /// Tells in the Kubernetes API how the peers are.
    telling: Option<JoinHandle<()>>,
    stop: CancellationToken,
}

impl Parts {
    /// Starts them all.
    pub(super) fn start(
        config: &DaemonConfig,
        shared: &Shared,
        sources: &Sources,
        pen: Pen,
        shutdown: &CancellationToken,
    ) -> Result<(Self, Writing), DaemonError> {
        let stop = shutdown.child_token();
        let writer = pen.writer().clone();
        let (exporter, handle) = Exporter::new(
            shared.kubernetes.clone(),
            exporter_config(config),
            writer.clone(),
            shared.exporter_metrics.clone(),
        )?;
        let heartbeat = writer.keep_heartbeat();
        // Tells readers up to Cilium 1.16 to wait for the cluster configuration.
        writer.put(Key::HasClusterConfig.to_bytes(), "true");
        let exporter = exporter.led_by(shared.leadership.clone());
        let exporting = tokio::spawn(exporter.run(stop.clone()));
        let relay = RelayConfig { own: config.own(), sources: sources.clone(), timing: config.timing };
        let metrics = Arc::clone(&shared.relay_metrics);
        let (relay, relaying) = Relay::spawn(relay, writer.clone(), metrics, stop.clone());
        let telling = config.namespace.is_some().then(|| {
            let (client, leading) = (shared.kubernetes.clone(), shared.leadership.followed());
            tokio::spawn(peering::keep(client, relay.clone(), leading, stop.clone()))
        });
        let writing = Writing { writer, exporter: handle, relay };
        Ok((Self { pen, heartbeat, exporting, relaying, telling, stop }, writing))
    }

    /// Completes when one of them has ended by itself.
    pub(super) async fn ended(&mut self) -> DaemonError {
        tokio::select! {
            ended = &mut self.exporting => match ended {
                Ok(Err(error)) => error.into(),
                Ok(Ok(())) | Err(_) => DaemonError::Stopped("the exporter"),
            },
            _ = &mut self.relaying => DaemonError::Stopped("the relay"),
            () = self.heartbeat.ended() => DaemonError::Stopped("the heartbeat"),
            () = ended(&mut self.telling) => DaemonError::Stopped("the keeping of ClusterPeers"),
        }
    }

    /// Ends them at once, with whatever they were about to write: somebody else writes from now on.
    pub(super) async fn drop_everything(self) {
        let Self { pen, heartbeat, exporting, relaying, telling, stop } = self;
        // First what writes; then those who would have more to write.
        drop(pen);
        drop(heartbeat);
        stop.cancel();
        exporting.abort();
        relaying.abort();
        let _ = exporting.await;
        let _ = relaying.await;
        if let Some(telling) = telling {
            let _ = telling.await;
        }
    }

    /// Ends them, and waits a little until what they have written is in the store.
    pub(super) async fn finish(self) {
        let Self { pen, heartbeat, exporting, relaying, telling, stop } = self;
        stop.cancel();
        drop(heartbeat);
        if !exporting.is_finished() {
            let _ = exporting.await;
        }
        if !relaying.is_finished() {
            let _ = relaying.await;
        }
        if let Some(telling) = telling
            && !telling.is_finished()
        {
            let _ = telling.await;
        }
        if tokio::time::timeout(FLUSH_TIMEOUT, pen.writer().flush()).await.is_err() {
            tracing::warn!(
                "etcd did not take the last changes; its leases and the next start put that right"
            );
        }
    }
}

/// Completes when the task has ended, if there is one.
async fn ended(task: &mut Option<JoinHandle<()>>) {
    match task {
        Some(task) => drop(task.await),
        None => std::future::pending().await,
    }
}

fn exporter_config(config: &DaemonConfig) -> ExporterConfig {
    ExporterConfig {
        max_connected_clusters: config.max_connected_clusters,
        source: config.source,
        namespaces_are_global: config.namespaces_are_global,
        ..ExporterConfig::new(config.cluster.clone(), config.cluster_id)
    }
}

#[cfg(test)]
mod tests {
    use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
    use isthmus_kvstore::writer::Writer;

    use super::*;

    /// Parts that run until they are stopped.
    fn parts() -> Parts {
        let writer = Writer::memory(MemoryStore::new(StoreId::random(), Limits::default()));
        let stop = CancellationToken::new();
        let until_stopped = || stop.clone().cancelled_owned();
        let (exporting, relaying, telling) = (until_stopped(), until_stopped(), until_stopped());
        Parts {
            heartbeat: writer.keep_heartbeat(),
            pen: Pen::Memory(writer),
            exporting: tokio::spawn(async move {
                exporting.await;
                Ok(())
            }),
            relaying: tokio::spawn(relaying),
            telling: Some(tokio::spawn(telling)),
            stop,
        }
    }

    #[tokio::test]
    async fn the_parts_end_with_what_they_cannot_do_without_and_can_still_be_finished() {
        let telling = Some(tokio::spawn(async { panic!("on purpose") }));
        let heartbeat = Kept::spawn(async { panic!("on purpose") });
        let faults = [
            ("the keeping of ClusterPeers", Parts { telling, ..parts() }),
            ("the heartbeat", Parts { heartbeat, ..parts() }),
        ];
        for (what, mut parts) in faults {
            let ended = tokio::time::timeout(Duration::from_secs(30), parts.ended()).await;
            let Ok(DaemonError::Stopped(named)) = ended else { panic!("{ended:?}") };
            assert_eq!(named, what);
            parts.finish().await;
        }
    }
}
