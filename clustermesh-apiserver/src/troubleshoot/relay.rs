//! The last step of an apiserver: what its own relay, whose connection is another one, makes of the peer.

use std::time::Duration;

use super::data::Found;
use super::fault::Fault;
use super::report::Step;
use crate::status::{PeerState, PeerStatus};

/// Judges the relay's view of a peer, whose store was found at `theirs`, after the probe `ran_into` a failure or did not.
/// The first part is why there is nothing to judge.
pub(super) fn judge(
    peer: Option<&PeerStatus>,
    theirs: Option<i64>,
    ran_into: Option<Step>,
    data_age: Duration,
) -> (Option<String>, Found) {
    let mut found = Found::default();
    let Some(peer) = peer else {
        if ran_into == Some(Step::Configuration) {
            return (Some("it is not connected, because of: configuration".to_owned()), found);
        }
        found.faults.push(Fault::RelayUnaware);
        return (None, found);
    };
    let counts = &peer.counts;
    let age = match peer.data_age_seconds {
        Some(age) => format!("last complete {age:.0}s ago"),
        None => "never complete yet".to_owned(),
    };
    found.seen.push(format!(
        "{}: {age}; {} nodes, {} identities, {} endpoints, {} services",
        peer.state, counts.nodes, counts.identities, counts.endpoints, counts.services
    ));
    if peer.failures > 0 {
        let last = peer.last_error.as_deref().unwrap_or("unknown");
        found.seen.push(format!("its connection has failed {} times, last: {last}", peer.failures));
    }
    if peer.state != PeerState::Ready {
        let reason = peer.reason.clone().unwrap_or_else(|| "no reason known yet".to_owned());
        if let Some(step) = ran_into {
            return (Some(format!("{}, because of: {step}", peer.state)), found);
        }
        found.faults.push(Fault::RelayNotReady { state: peer.state.to_string(), reason });
        return (None, found);
    }
    let theirs = theirs.unwrap_or(0).max(peer.revision + peer.revision_lag);
    let lag = (theirs - peer.revision).max(0);
    found.seen.push(format!("revision {} of {theirs}", peer.revision));
    let old = peer.data_age_seconds.is_none_or(|age| age > data_age.as_secs_f64());
    // A quiet relay knows only every 30 s how far it is: behind is who has not heard for longer.
    if old && (lag > 0 || ran_into.is_none()) {
        found.faults.push(Fault::RelayLags { revision: peer.revision, theirs, age: peer.data_age_seconds });
    }
    if !peer.rejected.is_empty() {
        let count = peer.rejected.values().sum();
        let reasons = peer.rejected.iter().map(|(reason, count)| format!("{reason} ({count})")).collect();
        found.faults.push(Fault::Rejected { count, reasons });
    }
    (None, found)
}
