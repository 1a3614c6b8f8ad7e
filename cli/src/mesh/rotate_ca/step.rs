//! Which step of a rotation comes next. Pure: the state in, the step out.

use clustermesh_apiserver::certificates::rotation::{Request, Rotation};

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Ask the leader for this, and wait until it has reached that.
    Ask(Request, Rotation),
    /// The same, once the peers trust both CAs.
    TellPeersAndAsk(Request, Rotation),
    /// The peers are told what is trusted now, and it is done.
    TellPeers,
}

/// The next step from a state. `begun`: a rotation is under way, so that `steady` is its end.
pub(super) fn next(state: Rotation, begun: bool) -> Next {
    match state {
        Rotation::Steady if begun => Next::TellPeers,
        Rotation::Steady | Rotation::Preparing => Next::Ask(Request::Prepare, Rotation::Prepared),
        Rotation::Prepared => Next::TellPeersAndAsk(Request::Activate, Rotation::Activated),
        Rotation::Activating => Next::Ask(Request::Activate, Rotation::Activated),
        // Peers that were out of reach when it became active are told before the old one goes.
        Rotation::Activated => Next::TellPeersAndAsk(Request::Finish, Rotation::Steady),
    }
}

/// What a request brings, for people.
pub(super) fn says(request: Request) -> &'static str {
    match request {
        Request::Prepare => "making the next CA, and having it trusted in the cluster",
        Request::Activate => "having all certificates issued by the next CA",
        Request::Finish => "ceasing to trust the old CA",
        Request::Abort => "taking the next CA back",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_goes_on_from_every_state_and_ends() {
        for from in [Rotation::Preparing, Rotation::Prepared, Rotation::Activating, Rotation::Activated] {
            let mut state = from;
            let mut steps = 0;
            while let Next::Ask(_, until) | Next::TellPeersAndAsk(_, until) = next(state, true) {
                state = until;
                steps += 1;
                assert!(steps <= 3, "from {from}");
            }
            assert_eq!(state, Rotation::Steady);
        }
        assert_eq!(next(Rotation::Steady, false), Next::Ask(Request::Prepare, Rotation::Prepared));
    }

    #[test]
    fn nothing_is_issued_or_distrusted_before_the_peers_know() {
        for request in [Request::Activate, Request::Finish] {
            let before = if request == Request::Activate { Rotation::Prepared } else { Rotation::Activated };
            assert!(matches!(next(before, true), Next::TellPeersAndAsk(asked, _) if asked == request));
        }
    }
}
