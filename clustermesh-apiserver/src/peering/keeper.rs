//! Writes ClusterPeers, one request at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::Utc;
use isthmus_crds::names::FIELD_MANAGER;
use isthmus_crds::{ClusterPeer, ClusterPeerSpec, PeerRelation, READY};
use isthmus_wire::ClusterName;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::core::Status;
use serde_json::json;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::events::{self, Queue, UNDER_WAY};
use super::object::{applied, news, spec, status};
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

/// What to do where the API does not know all of a ClusterPeer.
const OUTDATED: &str = "the definition of ClusterPeers in this cluster is older than this apiserver; apply \
                        crds/yaml/clusterpeers.isthmus.io.yaml of its version";

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
    /// What this leader has asked for; none before it has written. The API has less of it where its definition is older.
    asked: Option<ClusterPeerSpec>,
    /// Whether anybody was told that it has less.
    told: bool,
    pace: Pace,
    retry: RetryDelay,
    /// When it is tried again.
    blocked: Option<Instant>,
}

impl Known {
    fn new(object: Option<ClusterPeer>) -> Self {
        Self {
            object,
            asked: None,
            told: false,
            pace: Pace::new(Instant::now()),
            retry: RetryDelay::default(),
            blocked: None,
        }
    }

    /// When what is true of `peer` at `now` may be written. What was asked for counts and not what came of it, which an older
    /// definition makes another thing whenever it is asked for.
    fn due(&self, peer: &Subject, warning: Option<&str>, now: Instant) -> Instant {
        let (Some(object), Some(asked)) = (&self.object, &self.asked) else { return now };
        let old = object.status.clone().unwrap_or_default();
        let new = status(peer, warning, &old.conditions, object.metadata.generation, Utc::now());
        let moved = *asked != spec(peer, Some(asked));
        self.pace.due(if moved { News::Important } else { news(&old, &new) })
    }

    /// The object of which the API has not kept all that was asked for, if that is so.
    fn curtailed(&self) -> Option<&ClusterPeer> {
        self.object.as_ref().filter(|object| self.asked.as_ref().is_some_and(|asked| object.spec != *asked))
    }

    /// Tells once of what the API does not keep.
    fn tell_of_definition(&mut self, queue: &Queue) {
        let Some(object) = self.curtailed() else {
            self.told = false;
            return;
        };
        if !self.told {
            let name = object.metadata.name.as_deref().unwrap_or_default();
            tracing::warn!(peer = name, "ClusterPeer {name} has no `spec.relation`: {OUTDATED}");
            events::definition(queue, object, &format!("it has no `spec.relation`: {OUTDATED}"));
            self.told = true;
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
        if known.asked.is_none() && was_ready && under_way && now < self.began + TAKEOVER {
            return self.began + TAKEOVER;
        }
        let due = known.due(peer, warning, now);
        if due > now {
            return due;
        }
        match write(&self.api, known, peer, warning).await {
            Ok(before) => {
                known.blocked = None;
                known.pace.written(now);
                let written =
                    known.object.as_ref().and_then(|object| Some((object, object.status.as_ref()?)));
                if let Some((object, status)) = written {
                    events::peer(&self.events, object, before.as_ref(), status);
                }
                known.tell_of_definition(&self.events);
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

/// Writes what is to be written, and says what the status was before. What the API has not kept is asked for again each time:
/// so it is there soon after the definition is.
async fn write(
    api: &Api<ClusterPeer>,
    known: &mut Known,
    peer: &Subject,
    warning: Option<&str>,
) -> Result<Option<isthmus_crds::ClusterPeerStatus>, String> {
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let before = known.asked.as_ref().or(known.object.as_ref().map(|object| &object.spec));
    let wanted = spec(peer, before);
    let mut object = match known.object.take() {
        Some(object) if known.asked.as_ref() == Some(&wanted) && object.spec == wanted => object,
        _ => apply(api, &params, peer.name(), &wanted).await?,
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
    known.asked = Some(wanted);
    Ok(before)
}

/// Applies all but the status; without the relation, where the definition is of before there was one.
async fn apply(
    api: &Api<ClusterPeer>,
    params: &PatchParams,
    name: &str,
    wanted: &ClusterPeerSpec,
) -> Result<ClusterPeer, String> {
    let whole = async {
        match api.patch(name, params, &Patch::Apply(applied(name, wanted))).await {
            Err(kube::Error::Api(status)) if lacks_field(&status) => Ok(None),
            answer => answer.map(Some),
        }
    };
    if let Some(object) = request("patch", whole).await? {
        return Ok(object);
    }
    let rest = ClusterPeerSpec { relation: PeerRelation::default(), ..wanted.clone() };
    request("patch", api.patch(name, params, &Patch::Apply(applied(name, &rest)))).await
}

/// Whether the definition has no such field. The API server says so in no other way.
fn lacks_field(status: &Status) -> bool {
    status.message.contains("field not declared in schema")
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
        Ok(Err(kube::Error::Api(status))) if lacks_field(&status) => {
            Err(format!("{}: {OUTDATED}", status.message))
        }
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!("no answer from the Kubernetes API within {}s", TIMEOUT.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::subject::tests::admitted;
    use super::*;

    /// As it is after it was written, where the API has made `kept` of what was asked for.
    fn written(peer: &Subject, kept: PeerRelation, now: Instant) -> Known {
        let asked = spec(peer, None);
        let mut object = ClusterPeer::new(peer.name(), ClusterPeerSpec { relation: kept, ..asked.clone() });
        object.status = Some(status(peer, None, &[], None, Utc::now()));
        let mut known = Known::new(Some(object));
        known.asked = Some(asked);
        known.pace.written(now);
        known
    }

    #[test]
    fn what_the_api_does_not_keep_is_no_reason_to_write_it_again() {
        let now = Instant::now();
        let peer = Subject::Admitted(admitted(None));
        let whole = written(&peer, PeerRelation::Admitted, now);
        let curtailed = written(&peer, PeerRelation::Connected, now);
        assert!(whole.curtailed().is_none() && curtailed.curtailed().is_some());
        let due = whole.due(&peer, None, now);
        assert_eq!(curtailed.due(&peer, None, now), due);
        assert_eq!(due, whole.pace.due(News::None));
        // What is news is written as soon as ever.
        let broken = Subject::Admitted(admitted(Some("broken")));
        assert_eq!(curtailed.due(&broken, None, now), whole.pace.due(News::Important));
    }

    #[test]
    fn what_the_api_does_not_keep_is_told_once_and_again_only_if_it_was_kept_in_between() {
        let now = Instant::now();
        let peer = Subject::Admitted(admitted(None));
        let (queue, mut told) = events::channel();
        let mut known = written(&peer, PeerRelation::Connected, now);
        known.tell_of_definition(&queue);
        known.tell_of_definition(&queue);
        assert!(told.try_recv().is_ok() && told.try_recv().is_err());
        let curtailed =
            std::mem::replace(&mut known.object, written(&peer, PeerRelation::Admitted, now).object);
        known.tell_of_definition(&queue);
        assert!(told.try_recv().is_err());
        known.object = curtailed;
        known.tell_of_definition(&queue);
        assert!(told.try_recv().is_ok());
    }
}
