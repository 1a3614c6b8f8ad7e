//! Kubernetes Events: what happened to a peer, and which Secret cannot be used. Seen by `kubectl describe` and `kubectl events`.

use std::time::Duration;

use isthmus_crds::{ADMITTED, CONNECTED, ClusterPeer, ClusterPeerStatus, READY};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::{Event, EventType};
use kube::{Client, Resource};
use tokio::sync::mpsc;

use super::conditions::bounded;
use crate::exporter::chain;
use crate::recorder::Notes;
use crate::relay::{Origin, Refused};
use crate::status::PeerCause;

/// Events that wait to be sent. What is more is left out: the status says how things are.
const WAITING: usize = 64;
/// Between two Events.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long the API may take for one.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An Event, and what it is about.
pub(super) struct Told {
    event: Event,
    about: ObjectReference,
}

/// Where Events wait.
pub(super) type Queue = mpsc::Sender<Told>;

pub(super) fn channel() -> (Queue, mpsc::Receiver<Told>) {
    mpsc::channel(WAITING)
}

/// Sends Events one by one, for ever. Failures do not matter.
pub(super) async fn send(client: Client, mut queue: mpsc::Receiver<Told>) {
    let mut notes = Notes::new(client, None);
    while let Some(Told { event, about }) = queue.recv().await {
        match tokio::time::timeout(TIMEOUT, notes.publish(&event, &about)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!("cannot record a Kubernetes Event: {}", chain(&error)),
            Err(_) => tracing::debug!("cannot record a Kubernetes Event: no answer"),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Tells what has happened to a peer between two statuses.
pub(super) fn peer(
    queue: &Queue,
    about: &ClusterPeer,
    old: Option<&ClusterPeerStatus>,
    new: &ClusterPeerStatus,
) {
    for (type_, reason, note) in happened(old, new) {
        tell(queue, type_, reason, note, about.object_ref(&()));
    }
}

/// Tells that the API does not know all that there is to say of a peer.
pub(super) fn definition(queue: &Queue, about: &ClusterPeer, note: &str) {
    tell(queue, EventType::Warning, "DefinitionOutdated".to_owned(), note.to_owned(), about.object_ref(&()));
}

/// Tells that a Secret is not used.
pub(super) fn secret(queue: &Queue, origin: &Origin, refused: &Refused) {
    let Origin::Secret { namespace, name } = origin else { return };
    let about = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Secret".to_owned()),
        namespace: Some(namespace.clone()),
        name: Some(name.clone()),
        uid: refused.uid.clone(),
        ..ObjectReference::default()
    };
    let reason = PeerCause::InvalidSecret.as_str().to_owned();
    tell(queue, EventType::Warning, reason, bounded(&refused.reason), about);
}

fn tell(queue: &Queue, type_: EventType, reason: String, note: String, about: ObjectReference) {
    let event = Event { type_, reason, note: Some(note), action: "Connect".to_owned(), secondary: None };
    let _ = queue.try_send(Told { event, about });
}

fn happened(old: Option<&ClusterPeerStatus>, new: &ClusterPeerStatus) -> Vec<(EventType, String, String)> {
    let find = |status: &ClusterPeerStatus, type_: &str| -> Option<Condition> {
        status.conditions.iter().find(|condition| condition.type_ == type_).cloned()
    };
    let before = |type_: &str| old.and_then(|old| find(old, type_));
    let held = |type_: &str| before(type_).is_some_and(|condition| condition.status == "True");
    let mut events = Vec::new();
    let mut add = |type_, reason: &str, condition: &Condition| {
        events.push((type_, reason.to_owned(), condition.message.clone()));
    };
    if let Some(admitted) = find(new, ADMITTED) {
        match admitted.status == "True" {
            true if !held(ADMITTED) => add(EventType::Normal, "Admitted", &admitted),
            false if before(ADMITTED).is_none_or(|before| before.status == "True") => {
                add(EventType::Warning, &admitted.reason, &admitted);
            }
            true | false => {}
        }
    }
    let (Some(connected), Some(ready)) = (find(new, CONNECTED), find(new, READY)) else { return events };
    let is_news = before(READY).is_none_or(|before| before.reason != ready.reason);
    if ready.reason == PeerCause::Draining.as_str() {
        if is_news {
            add(EventType::Normal, "Disconnected", &ready);
        }
        return events;
    }
    if connected.status == "True" && !held(CONNECTED) {
        add(EventType::Normal, "Connected", &connected);
    }
    match (ready.status == "True", connected.status == "True") {
        (true, _) if !held(READY) => add(EventType::Normal, "Ready", &ready),
        (true, _) => {}
        (false, false) if held(CONNECTED) => add(EventType::Warning, "ConnectionLost", &ready),
        // Under way: nothing has happened yet.
        (false, _) if UNDER_WAY.iter().any(|cause| cause.as_str() == ready.reason) => {
            if held(READY) {
                add(EventType::Warning, "NotReady", &ready);
            }
        }
        (false, _) if is_news => add(EventType::Warning, &ready.reason, &ready),
        (false, _) => {}
    }
    events
}

/// What every connection goes through.
pub(super) const UNDER_WAY: [PeerCause; 3] =
    [PeerCause::Connecting, PeerCause::AwaitingConfiguration, PeerCause::Synchronizing];

#[cfg(test)]
mod tests {
    use super::super::conditions::tests::peer;
    use super::*;
    use crate::peering::object::status;
    use crate::peering::subject::Subject;
    use crate::peering::subject::tests::admitted;
    use crate::status::PeerState;

    #[test]
    fn each_change_is_told_once_and_nothing_is_told_while_nothing_changes() {
        use PeerState::{Connecting, Draining, Ready, Refused, Synchronizing};
        let mut old = None;
        for (state, cause, told) in [
            (Connecting, PeerCause::Connecting, &[][..]),
            (Connecting, PeerCause::CertificateExpired, &["CertificateExpired"]),
            (Connecting, PeerCause::CertificateExpired, &[]),
            (Connecting, PeerCause::Unreachable, &["Unreachable"]),
            (Synchronizing, PeerCause::Synchronizing, &["Connected"]),
            (Ready, PeerCause::Mirrored, &["Ready"]),
            (Ready, PeerCause::Mirrored, &[]),
            (Synchronizing, PeerCause::Synchronizing, &["NotReady"]),
            (Ready, PeerCause::Mirrored, &["Ready"]),
            (Connecting, PeerCause::Unreachable, &["ConnectionLost"]),
            (Ready, PeerCause::Mirrored, &["Connected", "Ready"]),
            (Refused, PeerCause::IdConflict, &["IdConflict"]),
            (Draining, PeerCause::Draining, &["Disconnected"]),
            (Draining, PeerCause::Draining, &[]),
        ] {
            let peer = Subject::from(peer(state, cause));
            let new = status(&peer, None, &[], None, chrono::Utc::now());
            let reasons: Vec<_> =
                happened(old.as_ref(), &new).into_iter().map(|(_, reason, _)| reason).collect();
            assert_eq!(reasons, told, "{state} {cause:?}");
            old = Some(new);
        }
    }

    #[test]
    fn that_a_cluster_may_read_is_told_when_it_begins_and_when_it_cannot() {
        let mut old = None;
        for (problem, told) in [
            (Some("broken"), &["InvalidSecret"][..]),
            (Some("still broken"), &[]),
            (None, &["Admitted"]),
            (None, &[]),
        ] {
            let new = status(&Subject::Admitted(admitted(problem)), None, &[], None, chrono::Utc::now());
            let reasons: Vec<_> =
                happened(old.as_ref(), &new).into_iter().map(|(_, reason, _)| reason).collect();
            assert_eq!(reasons, told, "{problem:?}");
            old = Some(new);
        }
    }
}
