//! Waits until peers are as they are wanted to be, and says meanwhile what it waits for and why.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::Utc;
use futures::future::join_all;
use isthmus_crds::peer::{PeerEndpoint, PeerSecret, Relation};
use isthmus_crds::{ADMITTED, CONNECTED, ClusterPeer, PeerRelation, READY, SYNCED, SecretVersion};
use isthmus_wire::ClusterName;
use kube::ResourceExt;
use kube::api::ListParams;

use super::contexts::Api;
use super::error::Refusal;
use crate::output::note;

/// How often clusters are asked: changes take seconds, and a hundred waiting people are no load.
const POLL: Duration = Duration::from_millis(700);
/// After so long without news people are told that it still goes on.
const REMIND: Duration = Duration::from_secs(30);

/// A status is written once a minute at least. By this machine's clock, which may differ a little.
const STALE: Duration = Duration::from_secs(300);

/// What a peer is to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Goal {
    /// Everything it shares is mirrored and followed.
    Ready {
        /// The version of the Secret that it is to be connected by; any, if none is known.
        secret: Option<SecretVersion>,
        /// Where it is reached if the change has been taken note of; anywhere if there are none. This and `before` are what an
        /// apiserver that does not tell the Secret's version is judged by.
        endpoints: Vec<PeerEndpoint>,
        /// The ClusterPeer's resource version before the change: what it says then is no answer to the change.
        before: Option<String>,
    },
    /// It may read, and nothing is mirrored of it.
    Admitted {
        /// The version of the Secret that it is to be admitted by; any, if none is known.
        secret: Option<SecretVersion>,
    },
    /// Nothing is mirrored of it, whether or not it may read.
    Unread,
    /// Nothing of it is left.
    Gone,
}

impl Goal {
    /// What a Secret is written for; none if it asks for nothing. `secret` is its version, `before` the resource version of
    /// the ClusterPeer before it was written, if that changed anything.
    pub(crate) fn of(
        wanted: &PeerSecret,
        secret: Option<SecretVersion>,
        before: Option<String>,
    ) -> Option<Self> {
        match wanted.relation {
            Relation::Connected => Some(Self::Ready { secret, endpoints: wanted.endpoints.clone(), before }),
            Relation::Admitted => Some(Self::Admitted { secret }),
            Relation::Apart => None,
        }
    }
}

/// A peer of a cluster, and what it is to become.
#[derive(Clone)]
pub(crate) struct Wait<'a> {
    /// The cluster.
    pub(crate) api: &'a Api,
    /// The peer.
    pub(crate) peer: ClusterName,
    /// What it is to become.
    pub(crate) goal: Goal,
}

/// How it ended for one peer.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The cluster's context.
    pub(crate) context: String,
    /// The peer.
    pub(crate) peer: ClusterName,
    /// How it was when last seen.
    pub(crate) state: State,
    /// The object, if there was one.
    pub(crate) seen: Option<ClusterPeer>,
}

/// Where a wait stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// It is as wanted.
    Reached,
    /// It is not; why.
    Waiting(String),
}

/// How waiting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Everything is as wanted.
    Reached,
    /// The time is over.
    TimedOut,
    /// The user does not want to wait longer.
    Interrupted,
}

/// Waits for all of them, for so long.
pub(crate) async fn until(waits: &[Wait<'_>], within: Duration, quiet: bool) -> (End, Vec<Outcome>) {
    let begun = Instant::now();
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    let mut told: Vec<Option<State>> = vec![None; waits.len()];
    let mut last_news = begun;
    loop {
        let outcomes = look(waits).await;
        let elapsed = begun.elapsed();
        for (told, outcome) in told.iter_mut().zip(&outcomes) {
            if told.as_ref() != Some(&outcome.state) {
                *told = Some(outcome.state.clone());
                last_news = Instant::now();
                if !quiet {
                    note(&format!("{:>6.1}s  {}", elapsed.as_secs_f64(), line(outcome, waits)));
                }
            }
        }
        let left = outcomes.iter().filter(|outcome| outcome.state != State::Reached).count();
        if left == 0 {
            return (End::Reached, outcomes);
        }
        if elapsed >= within {
            return (End::TimedOut, outcomes);
        }
        if !quiet && last_news.elapsed() > REMIND {
            last_news = Instant::now();
            note(&format!("{:>6.1}s  still waiting for {left} of {}", elapsed.as_secs_f64(), waits.len()));
        }
        let pause = POLL.min(within.saturating_sub(elapsed));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = &mut interrupted => return (End::Interrupted, outcomes),
        }
    }
}

fn line(outcome: &Outcome, waits: &[Wait<'_>]) -> String {
    let Outcome { context, peer, state, .. } = outcome;
    let of_it = |wait: &&Wait<'_>| wait.peer == *peer && wait.api.context == *context;
    let goal = waits.iter().find(of_it).map(|wait| &wait.goal);
    match (state, goal) {
        (State::Waiting(why), _) => format!("{context}: {why}"),
        (State::Reached, Some(Goal::Gone)) => format!("{context}: nothing of {peer} is left"),
        (State::Reached, Some(Goal::Unread)) => format!("{context}: nothing is read from {peer}"),
        (State::Reached, Some(Goal::Admitted { .. })) => format!("{context}: {peer} is let in"),
        (State::Reached, Some(Goal::Ready { .. }) | None) => format!("{context}: {peer} is Ready"),
    }
}

/// One look at all of them; each cluster is asked once.
async fn look(waits: &[Wait<'_>]) -> Vec<Outcome> {
    let mut apis: BTreeMap<&str, &Api> = BTreeMap::new();
    for wait in waits {
        apis.insert(&wait.api.context, wait.api);
    }
    let answers = join_all(apis.values().map(|api| peers(api))).await;
    let answers: BTreeMap<&str, _> = apis.keys().copied().zip(answers).collect();
    let outcome = |wait: &Wait<'_>| {
        let (state, seen) = match &answers[wait.api.context.as_str()] {
            Err(refusal) => (State::Waiting(format!("{}; {}", refusal.problem(), refusal.advice())), None),
            Ok(peers) => {
                let seen = peers.iter().find(|peer| peer.name_any() == wait.peer.as_str()).cloned();
                (judge(&wait.peer, &wait.goal, seen.as_ref()), seen)
            }
        };
        Outcome { context: wait.api.context.clone(), peer: wait.peer.clone(), state, seen }
    };
    waits.iter().map(outcome).collect()
}

/// All ClusterPeers of a cluster, in the order of their names.
pub(crate) async fn peers(api: &Api) -> Result<Vec<ClusterPeer>, Refusal> {
    let found = api.global::<ClusterPeer>().list(&ListParams::default()).await;
    let mut found =
        found.map_err(|error| api.refused("list ClusterPeers (clusterpeers.isthmus.io)", error))?.items;
    found.sort_by_key(ResourceExt::name_any);
    Ok(found)
}

fn judge(peer: &ClusterName, goal: &Goal, seen: Option<&ClusterPeer>) -> State {
    match (goal, seen) {
        (Goal::Gone | Goal::Unread, None) => State::Reached,
        (Goal::Unread, Some(seen)) if seen.spec.relation == PeerRelation::Admitted => State::Reached,
        (Goal::Gone | Goal::Unread, Some(seen)) => {
            State::Waiting(format!("{peer} is still being removed{}", because(&why_not_ready(seen))))
        }
        (Goal::Ready { .. } | Goal::Admitted { .. }, None) => State::Waiting(format!(
            "there is no ClusterPeer {peer} yet: its clustermesh-apiserver has not taken note of the Secret"
        )),
        (Goal::Admitted { secret }, Some(seen)) => {
            let includes = |secret| observed(seen).is_some_and(|observed| observed.includes(secret));
            if let Some(stale) = stale(seen) {
                State::Waiting(format!("{peer} may be let in or not: {stale}"))
            } else if !seen.is(ADMITTED) {
                State::Waiting(format!("{peer} is not let in{}", because(&why_not_ready(seen))))
            } else if secret.as_ref().is_none_or(includes) {
                State::Reached
            } else {
                let says = seen.condition(ADMITTED).map(|admitted| admitted.message.clone());
                State::Waiting(format!(
                    "{peer} is let in as before its Secret was changed{}",
                    because(&says.unwrap_or_default())
                ))
            }
        }
        (Goal::Ready { secret, endpoints, before }, Some(seen)) => {
            let observed = observed(seen);
            let in_use = seen.status.as_ref().and_then(|status| status.endpoint.as_deref());
            let elsewhere = in_use
                .filter(|used| !endpoints.is_empty() && endpoints.iter().all(|e| e.to_string() != *used));
            if let Some(stale) = stale(seen) {
                State::Waiting(format!("{peer} may be Ready or not: {stale}"))
            } else if !seen.is(READY) {
                State::Waiting(format!("{peer} is not Ready{}", because(&why_not_ready(seen))))
            } else if let (Some(observed), Some(secret)) = (observed, secret) {
                match observed.includes(secret) {
                    true => State::Reached,
                    false => State::Waiting(format!(
                        "{peer} is Ready as before its Secret was changed{}",
                        because(&in_its_words(seen))
                    )),
                }
            } else if before.is_some() && *before == seen.resource_version() {
                State::Waiting(format!("{peer} is Ready as before; the change has not been taken note of"))
            } else if let Some(used) = elsewhere {
                State::Waiting(format!("{peer} is still read from {used}"))
            } else {
                State::Reached
            }
        }
    }
}

fn observed(seen: &ClusterPeer) -> Option<&SecretVersion> {
    seen.status.as_ref()?.observed_secret.as_ref()
}

/// What it says of being Ready: also that its Secret cannot be used as it is now.
fn in_its_words(seen: &ClusterPeer) -> String {
    seen.condition(READY).map(|ready| ready.message.clone()).unwrap_or_default()
}

fn because(why: &str) -> String {
    if why.is_empty() { String::new() } else { format!(": {why}") }
}

/// Why what a ClusterPeer says is out of date, if it is: nobody may have written it since it was true.
pub(crate) fn stale(peer: &ClusterPeer) -> Option<String> {
    let updated = peer.status.as_ref()?.updated.as_ref()?.0.as_second();
    let age = Utc::now().timestamp() - updated;
    (age > STALE.as_secs().cast_signed()).then(|| {
        format!(
            "its status was written {} ago for the last time: does a clustermesh-apiserver lead?",
            crate::output::age(Some(age as f64))
        )
    })
}

/// The first of its conditions that does not hold, in its own words; empty if it says nothing.
pub(crate) fn why_not_ready(peer: &ClusterPeer) -> String {
    let conditions = [CONNECTED, SYNCED, READY, ADMITTED].into_iter().filter_map(|kind| peer.condition(kind));
    let Some(first) = conditions.into_iter().find(|condition| condition.status != "True") else {
        return String::new();
    };
    match (first.reason.is_empty(), first.message.is_empty()) {
        (true, true) => format!("not {}", first.type_),
        (false, true) => first.reason.clone(),
        (true, false) => first.message.clone(),
        (false, false) => format!("{} ({})", first.message, first.reason),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn peer(ready: &str, endpoint: &str, updated: i64) -> ClusterPeer {
        let updated = chrono::DateTime::from_timestamp(updated, 0).expect("a moment");
        let condition = |kind: &str, message: &str| {
            json!({"type": kind, "status": ready, "reason": "Because", "message": message,
                   "lastTransitionTime": "2030-01-01T00:00:00Z"})
        };
        serde_json::from_value(json!({
            "apiVersion": "isthmus.io/v1alpha1", "kind": "ClusterPeer",
            "metadata": {"name": "beta", "resourceVersion": "7"}, "spec": {"source": "Secret"},
            "status": {
                "endpoint": endpoint, "updated": updated.to_rfc3339(),
                "conditions": [condition("Ready", "for all"), condition("Connected", "no answer")],
            },
        }))
        .expect("a ClusterPeer")
    }

    fn judged(goal: &Goal, seen: Option<&ClusterPeer>) -> String {
        match judge(&"beta".parse().expect("a name"), goal, seen) {
            State::Reached => "reached".into(),
            State::Waiting(why) => why,
        }
    }

    #[test]
    fn a_peer_is_ready_when_it_says_so_of_the_present_configuration() {
        let now = Utc::now().timestamp();
        let goal = |before: Option<&str>| Goal::Ready {
            secret: None,
            endpoints: vec!["https://b:1".parse().expect("an endpoint")],
            before: before.map(str::to_owned),
        };
        let ready = peer("True", "https://b:1", now);
        assert_eq!(judged(&goal(None), Some(&ready)), "reached");
        assert_eq!(judged(&goal(Some("6")), Some(&ready)), "reached");
        for (goal, seen, says) in [
            (goal(None), None, "no ClusterPeer beta yet"),
            (goal(Some("7")), Some(ready), "Ready as before"),
            (goal(None), Some(peer("True", "https://a:1", now)), "still read from https://a:1"),
            (goal(None), Some(peer("False", "https://b:1", now)), "beta is not Ready: no answer (Because)"),
            (goal(None), Some(peer("True", "https://b:1", now - 3600)), "60m ago for the last time"),
        ] {
            let told = judged(&goal, seen.as_ref());
            assert!(told.contains(says), "{told:?} says {says:?}");
        }
    }

    #[test]
    fn a_peer_is_ready_by_the_secret_that_was_written_or_a_later_one() {
        let version =
            |version: &str| SecretVersion { uid: "u".to_owned(), resource_version: version.to_owned() };
        let goal = Goal::Ready {
            secret: Some(version("9")),
            endpoints: vec!["https://b:1".parse().expect("an endpoint")],
            before: Some("7".to_owned()),
        };
        let observing = |observed: Option<&str>, ready: &str| {
            let mut seen = peer(ready, "https://b:1", Utc::now().timestamp());
            seen.status.as_mut().expect("a status").observed_secret = observed.map(version);
            seen
        };
        for (observed, ready, says) in [
            (Some("9"), "True", "reached"),
            (Some("10"), "True", "reached"),
            (Some("8"), "True", "beta is Ready as before its Secret was changed: for all"),
            (Some("9"), "False", "not Ready"),
            (None, "True", "the change has not been taken note of"),
        ] {
            let told = judged(&goal, Some(&observing(observed, ready)));
            assert!(told.contains(says), "{observed:?}: {told:?} says {says:?}");
        }
    }

    #[test]
    fn a_peer_is_let_in_by_the_secret_that_was_written_or_a_later_one() {
        let version =
            |version: &str| SecretVersion { uid: "u".to_owned(), resource_version: version.to_owned() };
        let goal = Goal::Admitted { secret: Some(version("9")) };
        let seen = |status: &str, observed: &str| {
            let mut seen = admitted(status);
            seen.status.as_mut().expect("a status").observed_secret = Some(version(observed));
            seen
        };
        let draining = peer("False", "https://b:1", Utc::now().timestamp());
        for (seen, says) in [
            (None, "no ClusterPeer beta yet"),
            (Some(seen("True", "9")), "reached"),
            (Some(seen("True", "8")), "let in as before its Secret was changed: it may read"),
            (Some(seen("False", "9")), "beta is not let in: it may read (MayRead)"),
            (Some(draining), "beta is not let in: no answer"),
        ] {
            let told = judged(&goal, seen.as_ref());
            assert!(told.contains(says), "{told:?} says {says:?}");
        }
    }

    fn admitted(status: &str) -> ClusterPeer {
        let mut seen = peer("True", "", Utc::now().timestamp());
        seen.spec.relation = PeerRelation::Admitted;
        let conditions = &mut seen.status.as_mut().expect("a status").conditions;
        conditions.truncate(1);
        conditions[0].type_ = ADMITTED.to_owned();
        conditions[0].status = status.to_owned();
        conditions[0].reason = "MayRead".to_owned();
        conditions[0].message = "it may read".to_owned();
        seen
    }

    #[test]
    fn who_may_only_read_is_not_read_from_and_is_not_gone() {
        assert_eq!(judged(&Goal::Unread, None), "reached");
        assert_eq!(judged(&Goal::Unread, Some(&admitted("True"))), "reached");
        assert!(judged(&Goal::Gone, Some(&admitted("True"))).contains("still being removed"));
        let draining = peer("False", "https://b:1", Utc::now().timestamp());
        assert!(judged(&Goal::Unread, Some(&draining)).contains("still being removed: no answer"));
        let ready = Goal::Ready { secret: None, endpoints: Vec::new(), before: None };
        assert!(judged(&ready, Some(&admitted("True"))).contains("beta is not Ready"));
    }

    #[test]
    fn a_peer_is_gone_when_nothing_of_it_is_left() {
        assert_eq!(judged(&Goal::Gone, None), "reached");
        let draining = peer("False", "https://b:1", Utc::now().timestamp());
        assert!(judged(&Goal::Gone, Some(&draining)).contains("still being removed: no answer"));
    }
}
