//! How a cluster gets another authority while everybody stays connected.
//!
//! The order is always the same: who has to trust the next authority does so before anything that it has issued is shown,
//! and nobody ceases to trust the old one before the last certificate of its own is out of use.
//!
//! ```text
//!            prepare                    trusted everywhere             activate
//!   steady ──────────▶ preparing ───────────────────────▶ prepared ──────────────▶ activating
//!     ▲ ▲                  │                                  │                         │
//!     │ └────── abort ─────┴──────────────────────────────────┘                         │ issued and
//!     │                                finish                                           │ taken up
//!     └──────────────────────────────────────────────────────── activated ◀─────────────┘
//! ```
//!
//! # The protocol
//!
//! All of it is in annotations of the Secret `isthmus-ca`, so that whoever operates it needs the Kubernetes API and the right
//! to patch this one Secret, and no more:
//!
//! | annotation | written by | values |
//! |---|---|---|
//! | `isthmus.io/ca-rotation` | the operator | what is wanted: `prepare`, `activate`, `finish`, `abort` |
//! | `isthmus.io/ca-rotation-state` | the leader | what has been reached: `steady` (also if absent), `preparing`, `prepared`, `activating`, `activated` |
//! | `isthmus.io/ca-rotation-message` | the leader | what it waits for, or why it does not do what is wanted |
//!
//! 1. Ask for **`prepare`**. The next authority is made (`next.crt`, `next.key`), and the bundle of both is written to `ca.crt`
//!    of this Secret, then of every certificate's Secret and of the ConfigMap `isthmus-cluster-info`. Certificates are still
//!    issued by the old one. When that has reached all of them, and the time has passed that a kubelet may take to bring it
//!    to the files of node agents, the state is `prepared`.
//! 2. **Give the bundle to the peers**: `ca.crt` of `isthmus-cluster-info` into the peer Secrets for this cluster, in every
//!    cluster that is connected to it. The leader cannot see these. (`isthmus connect` again does it.)
//! 3. Ask for **`activate`**. The next authority becomes the active one (`tls.crt`, `tls.key`; the old key is gone, its
//!    certificate is kept as `former.crt`), and every certificate is issued anew. When all are, and the kubelets' time has
//!    passed again, the state is `activated`.
//! 4. Ask for **`finish`**. The old authority leaves the bundle; another one that somebody has added to `ca.crt` stays. The
//!    state is `steady`, and the message is [`FINISHING`] until the bundle has gone everywhere, to `isthmus-cluster-info` last.
//!    Then the peers are given the bundle again, so that they trust the old one no longer.
//!
//! Until `activate`, **`abort`** takes the next authority back. Later there is nothing to go back to: rotate once more.
//!
//! What is wanted stays wanted: `activate` may be asked for while the state is `preparing`, and happens when it can. What
//! cannot follow from the state is refused in the message, and changes nothing. An authority that a user has put there
//! (its Secret is not of the type `isthmus.io/ca`) is not touched, but for the message that refuses: whoever keeps it adds the
//! next one to `ca.crt`, exchanges `tls.crt` and `tls.key` when that has spread, and takes the old one out of `ca.crt` at last.

use std::fmt;
use std::str::FromStr;

/// Annotation: what the operator wants.
pub const REQUEST_ANNOTATION: &str = "isthmus.io/ca-rotation";
/// Annotation: what the leader has reached.
pub const STATE_ANNOTATION: &str = "isthmus.io/ca-rotation-state";
/// Annotation: what the leader has to say about it.
pub const MESSAGE_ANNOTATION: &str = "isthmus.io/ca-rotation-message";

/// What is said of a rotation that has come to its end, while the bundle that is published may still be the one before.
pub const FINISHING: &str = "waiting until the old authority is trusted nowhere in this cluster";

/// Where the rotation of an authority stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rotation {
    /// One authority, trusted and issuing.
    #[default]
    Steady,
    /// The next one is made, and not trusted everywhere yet.
    Preparing,
    /// Both are trusted everywhere; the old one issues.
    Prepared,
    /// The new one issues; certificates of the old one may still be in use.
    Activating,
    /// Nothing that the old one has issued is in use; it is still trusted.
    Activated,
}

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Make the next authority and have it trusted.
    Prepare,
    /// Issue everything by it.
    Activate,
    /// Trust the old one no more.
    Finish,
    /// Take the next one back.
    Abort,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing, for this reason if there is one.
    Stay(Option<&'static str>),
    /// Make the next authority, and put it into the bundle.
    MakeNext,
    /// The next one is trusted everywhere: say so.
    IsPrepared,
    /// Make the next one the active one.
    Activate,
    /// Everything is issued by the new one: say so.
    IsActivated,
    /// Take the old one out of the bundle.
    Finish,
    /// Take the next one out of the bundle.
    Abort,
}

impl Rotation {
    /// What follows from this state. `spread`: every Secret and the cluster's information are as this state wants them,
    /// and have been for long enough.
    pub(super) fn step(self, request: Option<Request>, spread: bool) -> Step {
        use Request::{Abort, Activate, Finish, Prepare};
        match (self, request) {
            (Self::Steady, Some(Prepare)) => Step::MakeNext,
            (Self::Steady, Some(Activate)) => {
                Step::Stay(Some("refused: no next authority has been prepared; ask for prepare first"))
            }
            (Self::Steady, Some(Finish | Abort) | None) => Step::Stay(None),
            (Self::Preparing | Self::Prepared, Some(Abort)) => Step::Abort,
            (Self::Preparing | Self::Prepared, Some(Finish)) => Step::Stay(Some(
                "refused: the next authority has not issued anything yet; ask for activate first",
            )),
            (Self::Preparing, _) if spread => Step::IsPrepared,
            (Self::Preparing, _) => {
                Step::Stay(Some("waiting until the next authority is trusted by the gateway and all agents"))
            }
            (Self::Prepared, Some(Activate)) => Step::Activate,
            (Self::Prepared, Some(Prepare) | None) => Step::Stay(Some(
                "give the bundle (ca.crt of isthmus-cluster-info) to the peers, then ask for activate",
            )),
            (Self::Activating | Self::Activated, Some(Abort)) => {
                Step::Stay(Some("refused: the old authority's key is gone; finish, and rotate once more"))
            }
            (Self::Activating, _) if spread => Step::IsActivated,
            (Self::Activating, _) => {
                Step::Stay(Some("waiting until every certificate is issued anew and taken up by the agents"))
            }
            (Self::Activated, Some(Finish)) => Step::Finish,
            (Self::Activated, Some(Prepare)) => {
                Step::Stay(Some("refused: the rotation before is not finished; ask for finish first"))
            }
            (Self::Activated, Some(Activate) | None) => {
                Step::Stay(Some("ask for finish to trust the old authority no more"))
            }
        }
    }
}

impl fmt::Display for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Steady => "steady",
            Self::Preparing => "preparing",
            Self::Prepared => "prepared",
            Self::Activating => "activating",
            Self::Activated => "activated",
        })
    }
}

impl FromStr for Rotation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Steady, Self::Preparing, Self::Prepared, Self::Activating, Self::Activated];
        all.into_iter().find(|state| state.to_string() == text).ok_or_else(|| {
            format!("{STATE_ANNOTATION} is not one of steady, preparing, prepared, activating, activated")
        })
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Prepare => "prepare",
            Self::Activate => "activate",
            Self::Finish => "finish",
            Self::Abort => "abort",
        })
    }
}

impl FromStr for Request {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Prepare, Self::Activate, Self::Finish, Self::Abort];
        all.into_iter().find(|request| request.to_string() == text).ok_or_else(|| {
            format!("refused: {REQUEST_ANNOTATION} is not one of prepare, activate, finish, abort")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [Rotation; 5] = [
        Rotation::Steady,
        Rotation::Preparing,
        Rotation::Prepared,
        Rotation::Activating,
        Rotation::Activated,
    ];
    const REQUESTS: [Option<Request>; 5] =
        [None, Some(Request::Prepare), Some(Request::Activate), Some(Request::Finish), Some(Request::Abort)];

    #[test]
    fn a_whole_rotation_takes_these_steps_and_waits_where_it_must() {
        use Request::{Activate, Finish, Prepare};
        assert_eq!(Rotation::Steady.step(Some(Prepare), false), Step::MakeNext);
        assert!(matches!(Rotation::Preparing.step(Some(Prepare), false), Step::Stay(Some(_))));
        assert_eq!(Rotation::Preparing.step(Some(Prepare), true), Step::IsPrepared);
        assert!(matches!(Rotation::Prepared.step(Some(Prepare), true), Step::Stay(Some(_))));
        assert_eq!(Rotation::Prepared.step(Some(Activate), true), Step::Activate);
        assert!(matches!(Rotation::Activating.step(Some(Activate), false), Step::Stay(Some(_))));
        assert_eq!(Rotation::Activating.step(Some(Activate), true), Step::IsActivated);
        assert!(matches!(Rotation::Activated.step(Some(Activate), true), Step::Stay(Some(_))));
        assert_eq!(Rotation::Activated.step(Some(Finish), true), Step::Finish);
        assert_eq!(Rotation::Steady.step(Some(Finish), true), Step::Stay(None));
    }

    #[test]
    fn nothing_is_issued_or_distrusted_before_it_has_spread() {
        for state in STATES {
            for request in REQUESTS {
                for spread in [false, true] {
                    let step = state.step(request, spread);
                    assert!(step != Step::Activate || state == Rotation::Prepared, "{state} {request:?}");
                    assert!(step != Step::Finish || state == Rotation::Activated, "{state} {request:?}");
                    let says_so = matches!(step, Step::IsPrepared | Step::IsActivated);
                    assert!(!says_so || spread, "{state} {request:?}");
                }
            }
        }
    }

    #[test]
    fn the_old_key_being_gone_there_is_no_way_back() {
        for state in [Rotation::Activating, Rotation::Activated] {
            assert!(
                matches!(state.step(Some(Request::Abort), true), Step::Stay(Some(why)) if why.contains("refused"))
            );
        }
        for state in [Rotation::Preparing, Rotation::Prepared] {
            assert_eq!(state.step(Some(Request::Abort), false), Step::Abort);
        }
    }

    #[test]
    fn states_and_requests_read_back_what_they_are_written_as() {
        for state in STATES {
            assert_eq!(state.to_string().parse(), Ok(state));
        }
        for request in REQUESTS.into_iter().flatten() {
            assert_eq!(request.to_string().parse(), Ok(request));
        }
        assert!("Prepare".parse::<Request>().unwrap_err().contains("abort"));
    }
}
