//! A ClusterPeer as it should be, and what of it is news.

use chrono::{DateTime, Utc};
use isthmus_crds::{
    ClusterPeer, ClusterPeerSpec, ClusterPeerStatus, PeerCounts, PeerRelation, PeerSource, SecretName,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use super::conditions::{bounded, conditions};
use super::pace::News;
use super::subject::Subject;
use crate::status::{Counts, PeerOrigin, PeerStatus};

/// What configures a peer. One that nothing configures any more is being drained, and was configured by `before`.
pub(super) fn spec(peer: &Subject, before: Option<&ClusterPeerSpec>) -> ClusterPeerSpec {
    let (source, relation) = match peer {
        Subject::Mirrored(peer) => (peer.source.as_ref(), PeerRelation::Connected),
        Subject::Admitted(peer) => (Some(&peer.source), PeerRelation::Admitted),
    };
    let by = |source, secret| ClusterPeerSpec { source, secret, relation };
    match source {
        Some(PeerOrigin::Secret { namespace, name }) => {
            by(PeerSource::Secret, Some(SecretName { namespace: namespace.clone(), name: name.clone() }))
        }
        Some(PeerOrigin::File(_)) => by(PeerSource::Directory, None),
        None => before.cloned().unwrap_or(by(PeerSource::Directory, None)),
    }
}

/// How a peer is at `now`. `warning` is what is wrong with its present configuration, if an earlier one is in use.
pub(super) fn status(
    peer: &Subject,
    warning: Option<&str>,
    before: &[Condition],
    generation: Option<i64>,
    now: DateTime<Utc>,
) -> ClusterPeerStatus {
    let now = time(now);
    let conditions = conditions(peer, warning, before, generation, &now);
    match peer {
        Subject::Mirrored(peer) => mirrored(peer, conditions, now),
        Subject::Admitted(peer) => ClusterPeerStatus {
            observed_secret: peer.observed_secret.clone(),
            conditions,
            updated: Some(now),
            ..ClusterPeerStatus::default()
        },
    }
}

fn mirrored(peer: &PeerStatus, conditions: Vec<Condition>, now: Time) -> ClusterPeerStatus {
    ClusterPeerStatus {
        cluster_id: peer.cluster_id.map(i32::from),
        endpoint: peer.endpoint.as_deref().map(bounded),
        observed_secret: peer.observed_secret.clone(),
        conditions,
        confirmed: peer.confirmed.map(time),
        data_age_seconds: peer.data_age_seconds.map(|age| age as i64),
        revision: Some(peer.revision).filter(|revision| *revision > 0),
        revision_lag: peer.confirmed.map(|_| peer.revision_lag),
        counts: counts(&peer.counts),
        failures: i64::try_from(peer.failures).unwrap_or(i64::MAX),
        last_error: peer.last_error.as_deref().map(bounded),
        last_failure: peer.last_failure.map(time),
        updated: Some(now),
    }
}

/// What is news in `new` to who has read `old`.
pub(super) fn news(old: &ClusterPeerStatus, new: &ClusterPeerStatus) -> News {
    let verdicts = |status: &ClusterPeerStatus| -> Vec<[String; 3]> {
        let all = status.conditions.iter();
        all.map(|condition| [&condition.type_, &condition.status, &condition.reason].map(String::clone))
            .collect()
    };
    let place = |status: &ClusterPeerStatus| {
        (status.cluster_id, status.endpoint.clone(), status.observed_secret.clone())
    };
    if place(old) != place(new) || verdicts(old) != verdicts(new) {
        return News::Important;
    }
    let messages = |status: &ClusterPeerStatus| -> Vec<String> {
        status.conditions.iter().map(|condition| condition.message.clone()).collect()
    };
    if (old.counts, old.failures, &old.last_error) != (new.counts, new.failures, &new.last_error)
        || messages(old) != messages(new)
    {
        return News::Detail;
    }
    News::None
}

/// The object to apply, without its status. A relation that is the usual one is left out: the API adds it, and one whose definition
/// is of before there were others takes the rest.
pub(super) fn applied(name: &str, spec: &ClusterPeerSpec) -> Value {
    let mut peer = ClusterPeer::new(name, spec.clone());
    let labels = peer.metadata.labels.get_or_insert_default();
    labels.insert(isthmus_crds::MANAGED_BY_LABEL.to_owned(), isthmus_crds::MANAGED_BY.to_owned());
    let mut peer = json!(peer);
    if spec.relation == PeerRelation::default()
        && let Some(spec) = peer["spec"].as_object_mut()
    {
        spec.remove("relation");
    }
    peer
}

fn counts(counts: &Counts) -> PeerCounts {
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    PeerCounts {
        nodes: count(counts.nodes),
        identities: count(counts.identities),
        endpoints: count(counts.endpoints),
        services: count(counts.services),
        endpoint_slices: count(counts.endpoint_slices),
        service_exports: count(counts.service_exports),
    }
}

/// Times in Kubernetes are in seconds, from year -9999 to 9999, which no clock here is beyond.
fn time(time: DateTime<Utc>) -> Time {
    Time(Timestamp::from_second(time.timestamp()).unwrap_or(Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    use isthmus_crds::SecretVersion;

    use super::super::conditions::tests::peer;
    use super::super::subject::tests::admitted;
    use super::*;
    use crate::status::{PeerCause, PeerState};

    #[test]
    fn only_what_somebody_may_wait_for_is_important() {
        let now = DateTime::from_timestamp(100, 0).unwrap();
        let later = DateTime::from_timestamp(130, 0).unwrap();
        let mut beta = peer(PeerState::Ready, PeerCause::Mirrored);
        let mirrored = |beta: &PeerStatus| Subject::from(beta.clone());
        let first = status(&mirrored(&beta), None, &[], Some(1), now);
        beta.revision = 8;
        beta.confirmed = Some(later);
        let second = status(&mirrored(&beta), None, &first.conditions, Some(1), later);
        assert_eq!(news(&first, &second), News::None, "times and revisions move all the time");
        beta.counts.nodes = 3;
        let third = status(&mirrored(&beta), None, &second.conditions, Some(1), later);
        assert_eq!(news(&second, &third), News::Detail);
        assert_eq!(
            news(&third, &status(&mirrored(&beta), Some("broken"), &[], Some(1), later)),
            News::Detail
        );
        beta.endpoint = Some("https://other:1".to_owned());
        let fourth = status(&mirrored(&beta), None, &third.conditions, Some(1), later);
        assert_eq!(news(&third, &fourth), News::Important);
        beta.observed_secret = Some(SecretVersion { uid: "u".to_owned(), resource_version: "2".to_owned() });
        let fifth = status(&mirrored(&beta), None, &fourth.conditions, Some(1), later);
        assert_eq!(news(&fourth, &fifth), News::Important, "the command line waits for it");
        let lost = peer(PeerState::Connecting, PeerCause::Unreachable);
        assert_eq!(news(&fourth, &status(&mirrored(&lost), None, &[], Some(1), later)), News::Important);
    }

    #[test]
    fn what_configures_a_peer_is_remembered_while_it_drains() {
        let mut beta = peer(PeerState::Draining, PeerCause::Draining);
        beta.source =
            Some(PeerOrigin::Secret { namespace: "system".to_owned(), name: "peer-beta".to_owned() });
        let secret = spec(&Subject::from(beta.clone()), None);
        assert_eq!((secret.source, secret.relation), (PeerSource::Secret, PeerRelation::Connected));
        beta.source = None;
        assert_eq!(spec(&Subject::from(beta.clone()), Some(&secret)), secret);
        beta.source = Some(PeerOrigin::File("beta".to_owned()));
        let file = spec(&Subject::from(beta), Some(&secret));
        assert_eq!((file.source, file.secret), (PeerSource::Directory, None));
        let admitted = spec(&Subject::Admitted(admitted(None)), Some(&secret));
        assert_eq!(admitted, ClusterPeerSpec { relation: PeerRelation::Admitted, ..secret });
    }

    #[test]
    fn of_a_cluster_that_may_only_read_nothing_is_claimed_but_that() {
        let now = DateTime::from_timestamp(100, 0).unwrap();
        let mut beta = admitted(None);
        let version = SecretVersion { uid: "u".to_owned(), resource_version: "2".to_owned() };
        beta.observed_secret = Some(version.clone());
        let first = status(&Subject::Admitted(beta.clone()), None, &[], Some(1), now);
        let types: Vec<_> = first.conditions.iter().map(|condition| condition.type_.as_str()).collect();
        assert_eq!(types, ["Admitted"]);
        assert_eq!(first.observed_secret, Some(version));
        assert_eq!((first.endpoint.clone(), first.confirmed.clone(), first.revision_lag), (None, None, None));
        beta.problem = Some("broken".to_owned());
        let second = status(&Subject::Admitted(beta), None, &first.conditions, Some(1), now);
        assert_eq!(news(&first, &second), News::Important);
    }
}
