//! Whom a ClusterPeer is about: a peer that is read from, or a cluster that may only read.

use std::collections::BTreeMap;

use isthmus_crds::peer::Relation;
use isthmus_wire::ClusterName;

use crate::relay::{Origin, Refused};
use crate::status::{AdmittedPeer, Counts, PeerCause, PeerState, PeerStatus};

/// Whom a ClusterPeer is about.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Subject {
    /// A peer that is read from; or was, and something of it is left.
    Mirrored(Box<PeerStatus>),
    /// A cluster that may read from this one, or would if its Secret could be used.
    Admitted(AdmittedPeer),
}

impl From<PeerStatus> for Subject {
    fn from(peer: PeerStatus) -> Self {
        Self::Mirrored(Box::new(peer))
    }
}

impl Subject {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Mirrored(peer) => &peer.name,
            Self::Admitted(peer) => &peer.name,
        }
    }

    /// What is wrong with the configuration that it should have by now, while an earlier one is in use.
    pub(super) fn warning<'a>(&self, refused: &'a BTreeMap<Origin, Refused>) -> Option<&'a str> {
        let source = match self {
            Self::Mirrored(peer) if peer.cause == PeerCause::InvalidSecret => None,
            Self::Mirrored(peer) => peer.source.as_ref(),
            Self::Admitted(peer) if peer.problem.is_some() => None,
            Self::Admitted(peer) => Some(&peer.source),
        };
        Some(&refused.get(source?)?.reason)
    }
}

/// All there are, and the clusters that would be if their Secret could be used.
pub(super) fn subjects(
    mirrored: Vec<PeerStatus>,
    admitted: Vec<AdmittedPeer>,
    refused: &BTreeMap<Origin, Refused>,
) -> BTreeMap<String, Subject> {
    // Of what is still to go, that is told; whom it is let in as, when it has gone.
    let all = admitted.into_iter().map(Subject::Admitted).chain(mirrored.into_iter().map(Subject::from));
    let mut all: BTreeMap<String, Subject> =
        all.map(|subject| (subject.name().to_owned(), subject)).collect();
    for (origin, refused) in refused {
        if let (Origin::Secret { .. }, Some(cluster)) = (origin, &refused.cluster) {
            all.entry(cluster.to_string()).or_insert_with(|| unusable(cluster, origin, refused));
        }
    }
    all
}

fn unusable(cluster: &ClusterName, origin: &Origin, refused: &Refused) -> Subject {
    let reason = format!("{origin}: {}", refused.reason);
    if refused.relation == Relation::Admitted {
        return Subject::Admitted(AdmittedPeer {
            name: cluster.to_string(),
            source: origin.clone(),
            observed_secret: None,
            problem: Some(reason),
        });
    }
    Subject::from(PeerStatus {
        name: cluster.to_string(),
        cluster_id: None,
        state: PeerState::Connecting,
        source: Some(origin.clone()),
        observed_secret: None,
        cause: PeerCause::InvalidSecret,
        reason: Some(reason),
        connected: false,
        endpoint: None,
        address: None,
        confirmed: None,
        data_age_seconds: None,
        revision: 0,
        revision_lag: 0,
        counts: Counts::default(),
        rejected: BTreeMap::new(),
        failures: 0,
        last_error: None,
        last_failure: None,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::conditions::tests::peer;
    use super::*;

    pub(in crate::peering) fn admitted(problem: Option<&str>) -> AdmittedPeer {
        AdmittedPeer {
            name: "beta".to_owned(),
            source: secret(),
            observed_secret: None,
            problem: problem.map(str::to_owned),
        }
    }

    fn secret() -> Origin {
        Origin::Secret { namespace: "system".to_owned(), name: "peer-beta".to_owned() }
    }

    fn refused(relation: Relation) -> BTreeMap<Origin, Refused> {
        let cluster = Some("beta".parse().unwrap());
        let refused = Refused { cluster, relation, reason: "broken".to_owned(), uid: None };
        BTreeMap::from([(secret(), refused)])
    }

    #[test]
    fn what_is_left_of_a_peer_is_told_before_that_it_may_read() {
        let draining = peer(PeerState::Draining, PeerCause::Draining);
        let none = BTreeMap::new();
        let both = subjects(vec![draining.clone()], vec![admitted(None)], &none);
        assert_eq!(both["beta"], Subject::from(draining));
        let after = subjects(Vec::new(), vec![admitted(None)], &none);
        assert_eq!(after["beta"], Subject::Admitted(admitted(None)));
    }

    #[test]
    fn a_secret_that_cannot_be_used_is_told_of_as_what_it_asks_for() {
        let connects = subjects(Vec::new(), Vec::new(), &refused(Relation::Connected));
        assert!(
            matches!(&connects["beta"], Subject::Mirrored(peer) if peer.cause == PeerCause::InvalidSecret)
        );
        let broken = refused(Relation::Admitted);
        let admits = subjects(Vec::new(), Vec::new(), &broken);
        assert_eq!(admits["beta"], Subject::Admitted(admitted(Some("Secret system/peer-beta: broken"))));
        assert_eq!(admits["beta"].warning(&broken), None, "it is said already");
        let edited = subjects(Vec::new(), vec![admitted(None)], &broken);
        assert_eq!(edited["beta"].warning(&broken), Some("broken"));
    }
}
