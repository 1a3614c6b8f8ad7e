//! The few controllers a lab needs, played through the Kubernetes API: the scheduler, pods from Deployments, and
//! EndpointSlices from Services.
//!
//! One task per cluster does all of it, one step after the other, from caches that watches fill. After each write it
//! waits until its own cache shows it, so that it never acts twice on the same want.

mod deployment;
mod endpoints;
mod scheduler;

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use isthmus_node_agent::kubernetes;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::Result;
use crate::wait;

/// Caches of what the controllers look at.
struct World {
    client: Client,
    nodes: Store<Node>,
    pods: Store<Pod>,
    deployments: Store<Deployment>,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
}

/// Time a write has to show up in the cache.
const ECHO: Duration = Duration::from_secs(10);
/// A step that failed is tried again after this long, unless something changes before.
const RETRY: Duration = Duration::from_millis(500);

/// Starts them; they run until `stop`.
pub(crate) fn start(client: &Client, stop: &CancellationToken, tasks: &TaskTracker) {
    let changed = Arc::new(Notify::new());
    let world = World {
        client: client.clone(),
        nodes: cache(client, &changed, stop, tasks),
        pods: cache(client, &changed, stop, tasks),
        deployments: cache(client, &changed, stop, tasks),
        services: cache(client, &changed, stop, tasks),
        slices: cache(client, &changed, stop, tasks),
    };
    tasks.spawn(stop.clone().run_until_cancelled_owned(async move { world.run(&changed).await }));
}

impl World {
    async fn run(&self, changed: &Notify) {
        if self.ready().await.is_err() {
            return;
        }
        loop {
            // Taken before looking, so that a change during the steps is not lost.
            let change = changed.notified();
            let mut failed = false;
            let steps = [
                ("endpoint slices", self.endpoint_slices().await),
                ("deployments", self.deployments().await),
                ("scheduling", self.schedule().await),
            ];
            for (what, outcome) in steps {
                if let Err(e) = outcome {
                    tracing::debug!(what, error = %e, "a controller's step failed");
                    failed = true;
                }
            }
            tokio::select! {
                () = change => {}
                () = tokio::time::sleep(RETRY), if failed => {}
            }
        }
    }

    async fn ready(&self) -> Result<(), reflector::store::WriterDropped> {
        self.nodes.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        self.deployments.wait_until_ready().await?;
        self.services.wait_until_ready().await?;
        self.slices.wait_until_ready().await
    }
}

/// Waits until `seen` holds of an object in a cache (`None`: it is not there).
async fn echo<K>(store: &Store<K>, object: &ObjectRef<K>, seen: impl Fn(Option<&K>) -> bool) -> Result<()>
where
    K: Resource + Clone + 'static,
    K::DynamicType: Eq + Hash + Clone + Default,
{
    let what = "a write to show up in the watch".to_owned();
    wait::until(what, ECHO, || {
        let now = store.get(object);
        std::future::ready(if seen(now.as_deref()) { Ok(()) } else { Err("not yet") })
    })
    .await
}

fn cache<K>(client: &Client, changed: &Arc<Notify>, stop: &CancellationToken, tasks: &TaskTracker) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let all: Api<K> = Api::all(client.clone());
    let changed = Arc::clone(changed);
    let fill = async move {
        let mut events = std::pin::pin!(kubernetes::watch(all, watcher::Config::default()).reflect(writer));
        while let Some(event) = events.next().await {
            match event {
                Ok(_) => changed.notify_one(),
                Err(e) => tracing::debug!(error = %e, "watching {}", K::kind(&())),
            }
        }
    };
    tasks.spawn(stop.clone().run_until_cancelled_owned(fill));
    store
}
