//! The peers that this node should have, between the two that work on them: the reconciler, which follows the mesh, and
//! the task that keeps the device.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::peers::Peers;
use crate::mesh::{Changes, Mesh, NodeId};

/// [`Peers`] that can be waited for.
#[derive(Debug, Default)]
pub struct SharedPeers {
    peers: Mutex<Peers>,
    changed: Notify,
}

impl SharedPeers {
    /// Takes in what may have changed in the mesh, and whether it has been read for the first time.
    pub fn update(&self, mesh: &Mesh, changes: &Changes, settled: bool) {
        let news = {
            let mut peers = self.lock();
            peers.update(mesh, changes);
            if settled {
                peers.settle();
            }
            peers.take_news()
        };
        for refused in news {
            tracing::warn!(
                node = %refused.node,
                cluster = %refused.cluster,
                key = refused.key.map(tracing::field::display),
                "traffic to and from this node's pods cannot be encrypted: {}",
                refused.reason
            );
        }
        // One permit is enough: whoever takes it looks at everything.
        self.changed.notify_one();
    }

    /// Waits until there may be something new.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Nodes about which something else should hold than when this was last asked.
    pub fn take_dirty(&self) -> BTreeSet<NodeId> {
        self.lock().take_dirty()
    }

    /// The peers, for a moment: the reconciler waits meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, Peers> {
        // What a panic may have left half done is put right by the next comparison.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
