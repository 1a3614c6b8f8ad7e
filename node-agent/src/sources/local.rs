//! The pods of this node as events: they go the same way as those of the mesh, so that nothing needs a lock.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::mesh::Arrival;
use crate::mesh::MeshEvent;
use crate::policy::LocalEndpoint;

/// Hands on what is told of interfaces and their pods until nobody listens any more.
pub async fn run(
    mut told: mpsc::UnboundedReceiver<(u32, Option<LocalEndpoint>)>,
    events: mpsc::Sender<Arrival>,
) {
    let section: Arc<str> = "pods".into();
    while let Some((interface, pod)) = told.recv().await {
        let event = MeshEvent::LocalEndpoint { interface, pod };
        let arrival = Arrival { event, section: section.clone(), revision: 0, received: Instant::now() };
        if events.send(arrival).await.is_err() {
            return;
        }
    }
}
