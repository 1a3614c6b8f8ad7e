//! What the conditions of a ClusterPeer say.

use chrono::SecondsFormat;
use isthmus_crds::{ADMITTED, CONNECTED, READY, SYNCED};
use isthmus_wire::printable;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::subject::Subject;
use crate::status::{AdmittedPeer, PeerCause, PeerState, PeerStatus};

/// The longest text that is written, in bytes. Kubernetes takes 32 KiB of a message.
pub(super) const LONGEST_TEXT: usize = 1024;

/// The reason of the condition Admitted while it holds.
const MAY_READ: &str = "MayRead";

/// The conditions as they are at `now`. One that has the same status as `before` has changed when that one had.
pub(super) fn conditions(
    peer: &Subject,
    warning: Option<&str>,
    before: &[Condition],
    generation: Option<i64>,
    now: &Time,
) -> Vec<Condition> {
    let verdicts = match peer {
        Subject::Mirrored(peer) => vec![connected(peer), synced(peer), ready(peer, warning)],
        Subject::Admitted(peer) => vec![admitted(peer, warning)],
    };
    verdicts
        .into_iter()
        .map(|verdict| {
            let status = if verdict.holds { "True" } else { "False" };
            let same = before.iter().find(|old| old.type_ == verdict.type_ && old.status == status);
            Condition {
                type_: verdict.type_.to_owned(),
                status: status.to_owned(),
                reason: verdict.reason.to_owned(),
                message: bounded(&verdict.message),
                last_transition_time: same
                    .map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
                observed_generation: generation,
            }
        })
        .collect()
}

struct Verdict {
    type_: &'static str,
    holds: bool,
    reason: &'static str,
    message: String,
}

fn connected(peer: &PeerStatus) -> Verdict {
    let (reason, message) = match &peer.endpoint {
        Some(endpoint) if peer.connected => ("GatewayAnswers", format!("the gateway at {endpoint} answers")),
        _ if peer.connected => ("GatewayAnswers", "the gateway answers".to_owned()),
        _ => (peer.cause.as_str(), why(peer)),
    };
    Verdict { type_: CONNECTED, holds: peer.connected, reason, message }
}

fn synced(peer: &PeerStatus) -> Verdict {
    let holds = peer.state == PeerState::Ready;
    let message = match holds {
        true => format!("everything that {} shares is mirrored, and followed", peer.name),
        false => why(peer),
    };
    Verdict { type_: SYNCED, holds, reason: peer.cause.as_str(), message }
}

fn ready(peer: &PeerStatus, warning: Option<&str>) -> Verdict {
    let holds = peer.state == PeerState::Ready;
    let mut message = match holds {
        true => format!("{} takes part in the mesh", peer.name),
        false => why(peer),
    };
    // Nothing is taken away while a peer is out of reach.
    if let (PeerState::Connecting, Some(confirmed)) = (peer.state, peer.confirmed) {
        let confirmed = confirmed.to_rfc3339_opts(SecondsFormat::Secs, true);
        message = format!("{message}. What was mirrored stays, and was complete at {confirmed}");
    }
    Verdict { type_: READY, holds, reason: peer.cause.as_str(), message: warned(message, warning) }
}

/// Whether it makes use of it is not known here: it would be a client of any replica's gateway.
fn admitted(peer: &AdmittedPeer, warning: Option<&str>) -> Verdict {
    let name = &peer.name;
    let (holds, reason, message) = match &peer.problem {
        None => (true, MAY_READ, format!("{name} may read from this cluster; nothing is read from it")),
        Some(problem) => {
            let reason = PeerCause::InvalidSecret.as_str();
            (false, reason, format!("{name} may not read from this cluster: {problem}"))
        }
    };
    Verdict { type_: ADMITTED, holds, reason, message: warned(message, warning) }
}

/// A message with what is wrong with the present configuration, if an earlier one is in use.
fn warned(message: String, warning: Option<&str>) -> String {
    match warning {
        None => message,
        Some(warning) => {
            format!("{message}. Its configuration was changed, and cannot be used: {warning}")
        }
    }
}

fn why(peer: &PeerStatus) -> String {
    match (&peer.reason, peer.cause) {
        (Some(reason), _) => reason.clone(),
        (None, PeerCause::Connecting) => "no answer yet".to_owned(),
        (None, cause) => cause.as_str().to_owned(),
    }
}

/// A text that may have come from a peer, on one line and not too long.
pub(super) fn bounded(text: &str) -> String {
    printable(text, LONGEST_TEXT - '…'.len_utf8())
}

#[cfg(test)]
pub(super) mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::super::subject::tests::admitted;
    use super::*;
    use crate::status::Counts;

    pub(in crate::peering) fn peer(state: PeerState, cause: PeerCause) -> PeerStatus {
        PeerStatus {
            name: "beta".to_owned(),
            cluster_id: Some(2),
            state,
            source: None,
            observed_secret: None,
            cause,
            reason: (state != PeerState::Ready).then(|| "because".to_owned()),
            connected: !matches!(state, PeerState::Connecting | PeerState::Draining),
            endpoint: None,
            address: None,
            confirmed: None,
            data_age_seconds: None,
            revision: 7,
            revision_lag: 0,
            counts: Counts::default(),
            rejected: Default::default(),
            failures: 0,
            last_error: None,
            last_failure: None,
        }
    }

    pub(in crate::peering) fn time(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn mirrored(peer: &PeerStatus) -> Subject {
        Subject::from(peer.clone())
    }

    fn told(peer: &Subject) -> Vec<(String, String)> {
        let all = conditions(peer, None, &[], Some(1), &time(1));
        all.into_iter().map(|condition| (condition.status, condition.reason)).collect()
    }

    #[test]
    fn every_state_has_its_conditions_and_a_reason() {
        use PeerState::{AwaitingConfiguration, Connecting, Draining, Ready, Refused, Synchronizing};
        for (state, cause, says) in [
            (Connecting, PeerCause::WrongName, ["False WrongName", "False WrongName", "False WrongName"]),
            (
                AwaitingConfiguration,
                PeerCause::AwaitingConfiguration,
                ["True GatewayAnswers", "False AwaitingConfiguration", "False AwaitingConfiguration"],
            ),
            (Refused, PeerCause::IdConflict, ["True GatewayAnswers", "False IdConflict", "False IdConflict"]),
            (
                Synchronizing,
                PeerCause::Synchronizing,
                ["True GatewayAnswers", "False Synchronizing", "False Synchronizing"],
            ),
            (Ready, PeerCause::Mirrored, ["True GatewayAnswers", "True Mirrored", "True Mirrored"]),
            (Draining, PeerCause::Draining, ["False Draining", "False Draining", "False Draining"]),
        ] {
            let told = told(&mirrored(&peer(state, cause)))
                .into_iter()
                .map(|(status, reason)| format!("{status} {reason}"));
            assert_eq!(told.collect::<Vec<_>>(), says, "{state}");
        }
    }

    #[test]
    fn who_may_only_read_is_admitted_and_nothing_else() {
        let beta = |problem| Subject::Admitted(admitted(problem));
        assert_eq!(told(&beta(None)), [("True".to_owned(), "MayRead".to_owned())]);
        assert_eq!(told(&beta(Some("broken"))), [("False".to_owned(), "InvalidSecret".to_owned())]);
        let edited = conditions(&beta(None), Some("`ca.crt` is empty"), &[], None, &time(1));
        assert!(edited[0].message.contains("nothing is read from it. Its configuration was changed"));
        assert!(edited[0].message.contains("`ca.crt` is empty"), "{}", edited[0].message);
    }

    #[test]
    fn the_time_of_the_last_change_moves_only_with_the_status() {
        let connecting = peer(PeerState::Connecting, PeerCause::Connecting);
        let first = conditions(&mirrored(&connecting), None, &[], Some(1), &time(1));
        let unreachable = peer(PeerState::Connecting, PeerCause::Unreachable);
        let second = conditions(&mirrored(&unreachable), None, &first, Some(1), &time(2));
        assert!(second.iter().all(|condition| condition.last_transition_time == time(1)), "{second:?}");
        let synchronizing = peer(PeerState::Synchronizing, PeerCause::Synchronizing);
        let third = conditions(&mirrored(&synchronizing), None, &second, Some(1), &time(3));
        let times: Vec<_> = third.iter().map(|condition| condition.last_transition_time.clone()).collect();
        assert_eq!(times, [time(3), time(1), time(1)]);
    }

    #[test]
    fn a_lost_peer_is_told_how_old_its_data_is_and_a_bad_edit_is_told() {
        let mut lost = peer(PeerState::Connecting, PeerCause::Unreachable);
        lost.confirmed = chrono::DateTime::from_timestamp(0, 0);
        let all = conditions(&mirrored(&lost), Some("`endpoints` is missing"), &[], None, &time(1));
        assert!(all[2].message.contains("complete at 1970-01-01T00:00:00Z"), "{}", all[2].message);
        assert!(all[2].message.contains("`endpoints` is missing"), "{}", all[2].message);
        assert!(!all[0].message.contains("1970"));
    }

    #[test]
    fn what_a_peer_says_is_bounded_and_on_one_line() {
        let mut hostile = peer(PeerState::Connecting, PeerCause::Unreachable);
        hostile.reason = Some(format!("\u{1b}[31m\n{}", "é".repeat(10_000)));
        for condition in conditions(&mirrored(&hostile), None, &[], None, &time(1)) {
            assert!(condition.message.len() <= LONGEST_TEXT);
            assert!(!condition.message.contains(|c: char| c.is_control()));
        }
    }
}
