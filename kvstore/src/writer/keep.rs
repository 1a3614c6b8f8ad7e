//! Keys that are written for as long as somebody stands behind them: the heartbeat and the cluster configuration.

use std::{convert::Infallible, ops::ControlFlow, time::Duration};

use bytes::Bytes;
use chrono::{SecondsFormat, Utc};
use isthmus_wire::ClusterName;
use tokio::time::{Instant, interval, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::Writer;
use crate::memory::{KeyRange, WatchRequest};

/// How often the heartbeat is written. Readers tear their connection down after two minutes without.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(60);
/// How often the cluster configuration is looked after if nothing is heard of it.
const REASSERT_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// The least time between two answers to somebody else's change, so that two who disagree do not race.
const REASSERT_PAUSE: Duration = Duration::from_secs(1);

/// Something that is kept up until this is dropped.
#[derive(Debug)]
pub struct Kept {
    task: AbortOnDropHandle<Infallible>,
}

impl Kept {
    /// Kept up by `task`, which cannot end but by a fault of ours. Must be called within a tokio runtime.
    pub fn spawn(task: impl Future<Output = Infallible> + Send + 'static) -> Self {
        Self { task: AbortOnDropHandle::new(tokio::spawn(task)) }
    }

    /// Completes when it is kept up no more, since its task has panicked: the log says why. Whoever stands behind the key has to
    /// ask, for readers go by what is kept, and a task that is merely spawned ends in silence.
    pub async fn ended(&mut self) {
        if !self.task.is_finished() {
            let _ = (&mut self.task).await;
        }
    }
}

impl Writer {
    /// Writes `cilium/.heartbeat` now and every 60 seconds. Must be called within a tokio runtime.
    pub fn keep_heartbeat(&self) -> Kept {
        let writer = self.clone();
        Kept::spawn(async move {
            let mut beat = interval(HEARTBEAT_INTERVAL);
            loop {
                beat.tick().await;
                writer.put("cilium/.heartbeat", Utc::now().to_rfc3339_opts(SecondsFormat::AutoSi, true));
            }
        })
    }

    /// Writes `cilium/cluster-config/<cluster>`, and again whenever somebody else changed or deleted it, and looks
    /// after it every 5 minutes. Must be called within a tokio runtime. Dropping the result leaves the key as it is.
    pub fn keep_cluster_config(&self, cluster: &ClusterName, value: impl Into<Bytes>) -> Kept {
        let (writer, value) = (self.clone(), value.into());
        let key = Bytes::from(format!("cilium/cluster-config/{cluster}"));
        Kept::spawn(async move {
            loop {
                let watcher = writer.store.watch(WatchRequest::new(KeyRange::key(key.clone())));
                writer.reassert(&key, &value);
                // A watch from now on cannot be refused as compacted; should the store do so, the next round heals it.
                let Ok(mut watcher) = watcher else { continue };
                while changed(&mut watcher, &value).await.is_continue() {
                    writer.reassert(&key, &value);
                }
            }
        })
    }
}

/// Waits until somebody else has changed the key, or it is time to look after it. Breaks if the watch has to be made
/// anew.
async fn changed(watcher: &mut crate::memory::Watcher, value: &Bytes) -> ControlFlow<()> {
    let begun = Instant::now();
    let by_others = async {
        loop {
            let Ok(batch) = watcher.next().await else { return ControlFlow::Break(()) };
            let last = batch.events.last();
            if last.is_some_and(|event| event.is_delete() || event.kv.value != *value) {
                return ControlFlow::Continue(());
            }
        }
    };
    let flow = tokio::select! {
        flow = by_others => flow,
        () = sleep_until(begun + REASSERT_INTERVAL) => ControlFlow::Continue(()),
    };
    sleep_until(begun + REASSERT_PAUSE).await;
    flow
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::memory::{Limits, MemoryStore, StoreId};

    #[tokio::test]
    async fn what_is_kept_up_no_more_is_told_to_who_asks_also_later() {
        let writer = Writer::memory(MemoryStore::new(StoreId::random(), Limits::default()));
        let mut heartbeat = writer.keep_heartbeat();
        let mut config = writer.keep_cluster_config(&"alpha".parse().unwrap(), "{}");
        let mut failing = Kept::spawn(async { panic!("on purpose") });
        failing.ended().await;
        failing.ended().await;
        assert_eq!(heartbeat.ended().now_or_never(), None);
        assert_eq!(config.ended().now_or_never(), None);
    }
}
