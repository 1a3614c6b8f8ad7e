//! Writes ClusterPeers, one request at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::Utc;
use isthmus_crds::names::FIELD_MANAGER;
use isthmus_crds::{ClusterPeer, READY};
use isthmus_wire::ClusterName;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use serde_json::json;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::events::{self, Queue, UNDER_WAY};
use super::object::{named, news, spec, status};
use super::pace::{News, Pace};
use super::subject::{Subject, subjects};
use crate::exporter::{RetryDelay, chain};
use crate::relay::{Origin, Refused, Relay};

/// Between two looks at the peers: what changes together is seen together.
const SETTLE: Duration = Duration::from_millis(250);
/// The longest time between two looks.
const LOOK: Duration = Duration::from_secs(60);
/// How long the API may take for a request.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a peer that was ready under an earlier leader may take to be ready again before anybody is told that it is not.
const TAKEOVER: Duration = Duration::from_secs(15);

/// Keeps the ClusterPeers right for as long as it exists.
pub(super) struct Keeper {
    api: Api<ClusterPeer>,
    relay: Relay,
    events: Queue,
    began: Instant,
    /// The ClusterPeers that there are, and those that are to be.
    known: BTreeMap<String, Known>,
    /// The Secrets that an Event has told of, and what it said.
    told: BTreeMap<Origin, String>,
    /// What failed last, so that it is logged once.
    failure: Option<String>,
}

/// A ClusterPeer.
struct Known {
    /// As the API has it, with the status that was written last.
    object: Option<ClusterPeer>,
    /// Whether its status was written by this leader.
    ours: bool,
    pace: Pace,
    retry: RetryDelay,
    /// When it is tried again.
    blocked: Option<Instant>,
}

impl Known {
    fn new(object: Option<ClusterPeer>) -> Self {
        Self {
            object,
            ours: false,
            pace: Pace::new(Instant::now()),
            retry: RetryDelay::default(),
            blocked: None,
        }
    }
}

impl Keeper {
    pub(super) fn new(api: Api<ClusterPeer>, relay: Relay, events: Queue) -> Self {
        Self {
            api,
            relay,
            events,
            began: Instant::now(),
            known: BTreeMap::new(),
            told: BTreeMap::new(),
            failure: None,
        }
    }

    /// Runs for ever.
    pub(super) async fn run(&mut self) {
        let mut retry = RetryDelay::default();
        while let Err(error) = self.adopt().await {
            self.failed(&error);
            sleep(retry.next().unwrap_or(RetryDelay::FIRST)).await;
        }
        loop {
            let next = self.look().await;
            sleep(SETTLE).await;
            tokio::select! {
                () = self.relay.changed() => {}
                () = sleep_until(next) => {}
            }
        }
    }

    /// Takes over what an earlier leader wrote.
    async fn adopt(&mut self) -> Result<(), String> {
        let list = request("list", self.api.list(&ListParams::default())).await?;
        for object in list {
            if let Some(name) = object.metadata.name.clone() {
                self.known.insert(name, Known::new(Some(object)));
            }
        }
        Ok(())
    }

    /// Writes what is due, and says when the next thing will be.
    async fn look(&mut self) -> Instant {
        let mut next = Instant::now() + LOOK;
        let refused = self.relay.refused();
        self.tell_of_secrets(&refused);
        let peers = subjects(self.relay.peers(), self.relay.admitted(), &refused);
        for peer in peers.values() {
            next = next.min(self.keep(peer, peer.warning(&refused)).await);
        }
        let others: Vec<String> =
            self.known.keys().filter(|name| !peers.contains_key(*name)).cloned().collect();
        for name in others {
            next = next.min(self.remove(&name).await);
        }
        next
    }

    /// Writes a ClusterPeer if it is due, and says when it will be again.
    async fn keep(&mut self, peer: &Subject, warning: Option<&str>) -> Instant {
        let known = self.known.entry(peer.name().to_owned()).or_insert_with(|| Known::new(None));
        let now = Instant::now();
        if let Some(blocked) = known.blocked.filter(|blocked| *blocked > now) {
            return blocked;
        }
        // An earlier leader's word stands while this one is finding out.
        let was_ready = known.object.as_ref().is_some_and(|object| object.is(READY));
        let under_way = matches!(peer, Subject::Mirrored(peer) if UNDER_WAY.contains(&peer.cause));
        if !known.ours && was_ready && under_way && now < self.began + TAKEOVER {
            return self.began + TAKEOVER;
        }
        let due = match &known.object {
            Some(object) if known.ours => {
                let old = object.status.clone().unwrap_or_default();
                let new = status(peer, warning, &old.conditions, object.metadata.generation, Utc::now());
                let moved = object.spec != spec(peer, Some(&object.spec));
                known.pace.due(if moved { News::Important } else { news(&old, &new) })
            }
            _ => now,
        };
        if due > now {
            return due;
        }
        match write(&self.api, known, peer, warning).await {
            Ok(before) => {
                known.ours = true;
                known.blocked = None;
                known.pace.written(now);
                let written =
                    known.object.as_ref().and_then(|object| Some((object, object.status.as_ref()?)));
                if let Some((object, status)) = written {
                    events::peer(&self.events, object, before.as_ref(), status);
                }
                self.failure = None;
                known.pace.due(News::None)
            }
            Err(error) => {
                let delay = known.retry.next().unwrap_or(RetryDelay::FIRST);
                let again = now + delay;
                known.blocked = Some(again);
                self.failed(&error);
                again
            }
        }
    }

    /// Deletes the ClusterPeer of a peer that is gone, as soon as that is certain.
    async fn remove(&mut self, name: &str) -> Instant {
        let later = Instant::now() + LOOK;
        let gone = match name.parse::<ClusterName>() {
            Ok(cluster) => self.relay.is_gone(&cluster),
            // Nobody's name.
            Err(_) => true,
        };
        if !gone {
            return later;
        }
        let Some(known) = self.known.get_mut(name) else { return later };
        let now = Instant::now();
        if let Some(blocked) = known.blocked.filter(|blocked| *blocked > now) {
            return blocked;
        }
        let uid = known.object.as_ref().and_then(|object| object.metadata.uid.clone());
        let params = DeleteParams {
            preconditions: Some(Preconditions { uid, resource_version: None }),
            ..DeleteParams::default()
        };
        let deleted = async {
            match self.api.delete(name, &params).await {
                // Gone already, or another one of the same name, which is not ours to delete.
                Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
                answer => answer.map(drop),
            }
        };
        match request("delete", deleted).await {
            Ok(()) => drop(self.known.remove(name)),
            Err(error) => {
                let again = now + known.retry.next().unwrap_or(RetryDelay::FIRST);
                known.blocked = Some(again);
                self.failed(&error);
                return again;
            }
        }
        later
    }

    fn tell_of_secrets(&mut self, refused: &BTreeMap<Origin, Refused>) {
        self.told.retain(|origin, _| refused.contains_key(origin));
        for (origin, refused) in refused {
            if self.told.get(origin) != Some(&refused.reason) {
                events::secret(&self.events, origin, refused);
                self.told.insert(origin.clone(), refused.reason.clone());
            }
        }
    }

    fn failed(&mut self, error: &str) {
        if self.failure.as_deref() != Some(error) {
            tracing::warn!("cannot keep the ClusterPeers, trying again: {error}");
            self.failure = Some(error.to_owned());
        }
    }
}

/// Writes what is to be written, and says what the status was before.
async fn write(
    api: &Api<ClusterPeer>,
    known: &mut Known,
    peer: &Subject,
    warning: Option<&str>,
) -> Result<Option<isthmus_crds::ClusterPeerStatus>, String> {
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let wanted = spec(peer, known.object.as_ref().map(|object| &object.spec));
    let mut object = match known.object.take() {
        Some(object) if known.ours && object.spec == wanted => object,
        _ => {
            let patch = Patch::Apply(named(peer.name(), wanted));
            request("patch", api.patch(peer.name(), &params, &patch)).await?
        }
    };
    let before = object.status.take();
    let conditions = before.as_ref().map(|before| before.conditions.as_slice()).unwrap_or_default();
    let now = status(peer, warning, conditions, object.metadata.generation, Utc::now());
    let patch = json!({
        "apiVersion": "isthmus.io/v1alpha1", "kind": "ClusterPeer", "metadata": {"name": peer.name()}, "status": now,
    });
    // An object that was deleted meanwhile is made again, since nothing is known of it while this fails.
    request("patch the status of", api.patch_status(peer.name(), &params, &Patch::Apply(patch))).await?;
    object.status = Some(now);
    known.object = Some(object);
    Ok(before)
}

/// Makes a request, and says what to do if it fails.
async fn request<T>(verb: &str, request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match timeout(TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) if status.is_forbidden() => {
            Err(format!("{}: grant this account the right to {verb} clusterpeers", status.message))
        }
        Ok(Err(kube::Error::Api(status))) if status.is_not_found() => Err(format!(
            "{}: was crds/yaml/clusterpeers.isthmus.io.yaml applied to the cluster?",
            status.message
        )),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!("no answer from the Kubernetes API within {}s", TIMEOUT.as_secs())),
    }
}
