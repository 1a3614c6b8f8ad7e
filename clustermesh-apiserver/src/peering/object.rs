//! A ClusterPeer as it should be, and what of it is news.

use chrono::{DateTime, Utc};
use isthmus_crds::{ClusterPeer, ClusterPeerSpec, ClusterPeerStatus, PeerCounts, PeerSource, SecretName};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use super::conditions::{bounded, conditions};
use super::pace::News;
use crate::status::{Counts, PeerOrigin, PeerStatus};

/// What configures a peer. One that nothing configures any more is being drained, and was configured by `before`.
pub(super) fn spec(peer: &PeerStatus, before: Option<&ClusterPeerSpec>) -> ClusterPeerSpec {
    match &peer.source {
        Some(PeerOrigin::Secret { namespace, name }) => ClusterPeerSpec {
            source: PeerSource::Secret,
            secret: Some(SecretName { namespace: namespace.clone(), name: name.clone() }),
        },
        Some(PeerOrigin::File(_)) => ClusterPeerSpec { source: PeerSource::Directory, secret: None },
        None => before.cloned().unwrap_or(ClusterPeerSpec { source: PeerSource::Directory, secret: None }),
    }
}

/// How a peer is at `now`. `warning` is what is wrong with its present configuration, if it is connected by an earlier one.
pub(super) fn status(
    peer: &PeerStatus,
    warning: Option<&str>,
    before: &[Condition],
    generation: Option<i64>,
    now: DateTime<Utc>,
) -> ClusterPeerStatus {
    let now = time(now);
    ClusterPeerStatus {
        cluster_id: peer.cluster_id.map(i32::from),
        endpoint: peer.endpoint.as_deref().map(bounded),
        observed_secret: peer.observed_secret.clone(),
        conditions: conditions(peer, warning, before, generation, &now),
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

/// The object to apply, without its status.
pub(super) fn named(name: &str, spec: ClusterPeerSpec) -> ClusterPeer {
    let mut peer = ClusterPeer::new(name, spec);
    let labels = peer.metadata.labels.get_or_insert_default();
    labels.insert(isthmus_crds::MANAGED_BY_LABEL.to_owned(), isthmus_crds::MANAGED_BY.to_owned());
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
    use super::super::conditions::tests::peer;
    use isthmus_crds::SecretVersion;

    use super::*;
    use crate::status::{PeerCause, PeerState};

    #[test]
    fn only_what_somebody_may_wait_for_is_important() {
        let now = DateTime::from_timestamp(100, 0).unwrap();
        let later = DateTime::from_timestamp(130, 0).unwrap();
        let mut beta = peer(PeerState::Ready, PeerCause::Mirrored);
        let first = status(&beta, None, &[], Some(1), now);
        beta.revision = 8;
        beta.confirmed = Some(later);
        let second = status(&beta, None, &first.conditions, Some(1), later);
        assert_eq!(news(&first, &second), News::None, "times and revisions move all the time");
        beta.counts.nodes = 3;
        let third = status(&beta, None, &second.conditions, Some(1), later);
        assert_eq!(news(&second, &third), News::Detail);
        assert_eq!(news(&third, &status(&beta, Some("broken"), &[], Some(1), later)), News::Detail);
        beta.endpoint = Some("https://other:1".to_owned());
        let fourth = status(&beta, None, &third.conditions, Some(1), later);
        assert_eq!(news(&third, &fourth), News::Important);
        beta.observed_secret = Some(SecretVersion { uid: "u".to_owned(), resource_version: "2".to_owned() });
        let fifth = status(&beta, None, &fourth.conditions, Some(1), later);
        assert_eq!(news(&fourth, &fifth), News::Important, "the command line waits for it");
        let lost = peer(PeerState::Connecting, PeerCause::Unreachable);
        assert_eq!(news(&fourth, &status(&lost, None, &[], Some(1), later)), News::Important);
    }

    #[test]
    fn what_configures_a_peer_is_remembered_while_it_drains() {
        let mut beta = peer(PeerState::Draining, PeerCause::Draining);
        beta.source =
            Some(PeerOrigin::Secret { namespace: "system".to_owned(), name: "peer-beta".to_owned() });
        let secret = spec(&beta, None);
        assert_eq!(secret.source, PeerSource::Secret);
        beta.source = None;
        assert_eq!(spec(&beta, Some(&secret)), secret);
        beta.source = Some(PeerOrigin::File("beta".to_owned()));
        assert_eq!(
            spec(&beta, Some(&secret)),
            ClusterPeerSpec { source: PeerSource::Directory, secret: None }
        );
    }
}
