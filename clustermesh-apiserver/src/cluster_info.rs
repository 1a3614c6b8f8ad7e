//! Publishes what other clusters must know of this one: the ConfigMap `isthmus-cluster-info`.
//!
//! The leader writes it, and again whenever somebody has changed or deleted it, or the cluster's authorities have changed.
//! Who connects clusters reads it, and needs no right to read Secrets.
//!
//! Needs get, list, watch, create and update on configmaps in the own namespace.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use isthmus_crds::names::{CLUSTER_INFO, default_server_name};
use isthmus_crds::{CaBundle, ClusterInfo};
use isthmus_wire::{ClusterId, ClusterName, MaxConnectedClusters};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::PostParams;
use kube::runtime::utils::StreamBackoff;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::watch;

use crate::certificates::Bundles;
use crate::election::Leadership;
use crate::exporter::chain;

/// How often it is looked at if nothing is heard of it.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// After a failure, and the least time between two answers to somebody else's change.
const PAUSE: Duration = Duration::from_secs(1);
/// A watch is renewed that often.
const WATCH_SECONDS: u32 = 60;

/// Keeps the ConfigMap right whenever this replica leads.
pub struct Publisher {
    api: Api<ConfigMap>,
    namespace: String,
    cluster: ClusterName,
    id: ClusterId,
    mesh: MaxConnectedClusters,
    /// The bundle that is published for sure.
    published: watch::Sender<Option<Arc<str>>>,
}

impl Publisher {
    /// One for this cluster. The second part of the answer is the bundle of authorities that is published for sure.
    pub fn new(
        client: Client,
        namespace: &str,
        cluster: ClusterName,
        id: ClusterId,
        mesh: MaxConnectedClusters,
    ) -> (Self, watch::Receiver<Option<Arc<str>>>) {
        let (published, seen) = watch::channel(None);
        let api = Api::namespaced(client, namespace);
        (Self { api, namespace: namespace.to_owned(), cluster, id, mesh, published }, seen)
    }

    /// Publishes these bundles as they change. Never ends.
    pub async fn run(self, bundles: Bundles, mut leadership: Leadership) {
        loop {
            leadership.gained().await;
            let mut lost = leadership.clone();
            tokio::select! {
                biased;
                () = lost.lost() => {}
                () = self.lead(bundles.clone(), &leadership) => {}
            }
            self.published.send_replace(None);
        }
    }

    async fn lead(&self, mut bundles: Bundles, leadership: &Leadership) {
        let config = watcher::Config::default()
            .fields(&format!("metadata.name={CLUSTER_INFO}"))
            .timeout(WATCH_SECONDS);
        let changes = watcher(self.api.clone(), config);
        let mut changes = StreamBackoff::new(changes, watcher::DefaultBackoff::default()).boxed();
        let mut trouble = None;
        loop {
            let bundle = bundles.present();
            let outcome = match &bundle {
                None => Ok(()),
                Some(bundle) => self.assert(bundle, leadership).await,
            };
            if let Err(error) = &outcome
                && trouble.as_ref() != Some(error)
            {
                tracing::warn!(config_map = CLUSTER_INFO, "cannot be published, trying again: {error}");
            }
            let wait = if outcome.is_ok() { LOOK_AGAIN } else { PAUSE };
            trouble = outcome.err();
            tokio::select! {
                () = bundles.changed_from(bundle.as_ref()) => {}
                // What the watch brings was written by us mostly; whose it is shows when it is looked at.
                Some(_) = changes.next() => tokio::time::sleep(PAUSE).await,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Writes it if it is not right.
    async fn assert(&self, bundle: &Arc<str>, leadership: &Leadership) -> Result<(), String> {
        let info = ClusterInfo {
            cluster: self.cluster.clone(),
            id: self.id,
            mesh: self.mesh,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ca: CaBundle::parse(bundle).map_err(|error| error.to_string())?,
            server_name: default_server_name(&self.cluster),
        };
        let wanted = info.to_config_map(&self.namespace);
        let found = self.api.get_opt(CLUSTER_INFO).await.map_err(|error| explain(&error))?;
        if found.as_ref().is_none_or(|found| found.data != wanted.data) {
            if !leadership.is_leading() {
                return Ok(());
            }
            let params = PostParams::default();
            let written = match found {
                None => self.api.create(&params, &wanted).await,
                Some(found) => {
                    // Other people's labels stay.
                    let mut mine = ConfigMap { data: wanted.data, binary_data: None, ..found };
                    let labels = mine.metadata.labels.get_or_insert_default();
                    labels.extend(wanted.metadata.labels.unwrap_or_default());
                    self.api.replace(CLUSTER_INFO, &params, &mine).await
                }
            };
            match written {
                Ok(_) => tracing::info!(config_map = CLUSTER_INFO, "published"),
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    return Err("somebody else has written it meanwhile".to_owned());
                }
                Err(error) => return Err(explain(&error)),
            }
        }
        self.published.send_if_modified(|known| {
            let news = known.as_ref() != Some(bundle);
            *known = Some(Arc::clone(bundle));
            news
        });
        Ok(())
    }
}

fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => format!(
            "{}: grant this account the verbs get, list, watch, create and update on configmaps in this namespace",
            status.message
        ),
        error => chain(error),
    }
}
