//! Fragments: only the first has ports; the others share its fate.

use isthmus_bpf_abi::{Counter, Direction};

use super::*;
use crate::packet::{Frame, UDP};

/// A datagram in two fragments.
fn fragments(source: &str, destination: &str) -> [Vec<u8>; 2] {
    let whole = Frame { payload: vec![7; 64], ..Frame::udp(source, destination) };
    let transport = whole.transport();
    let (first, later) = transport.split_at(32);
    if source.starts_with('[') {
        let fragment = |offset: u16, more: u16| {
            let [high, low] = (offset | more).to_be_bytes();
            Frame { extensions: vec![(44, vec![0, 0, high, low, 1, 2, 3, 4])], ..whole.clone() }
        };
        [fragment(0, 1).around(first), fragment(32, 0).around(later)]
    } else {
        [whole.around_fragment(first, 0, true), whole.around_fragment(later, 32, false)]
    }
}

#[test]
fn later_fragments_follow_the_first_or_are_dropped() {
    each_family(|pod| {
        let Family { pod: own, peer, other, .. } = pod.family;
        let rule = |direction, to| (port(PEER_IDENTITY, direction, UDP, to), allowed());
        pod.allow(BOTH, &[rule(Direction::Ingress, 8080), rule(Direction::Egress, 40_000)]);
        for (number, (source, destination)) in [(peer, own), (own, peer)].into_iter().enumerate() {
            let sends = number == 1;
            let verdict = |frame: &[u8]| if sends { pod.sends(frame) } else { pod.gets(frame) };
            let [first, later] = fragments(source, destination);
            assert_eq!(verdict(&later), DROP, "it comes first");
            assert_eq!((verdict(&first), verdict(&later)), (PASS, PASS));
            // The same identification, of a datagram to a port that is closed.
            let closed = at_port(destination, 1);
            let [denied, _] = fragments(source, &closed);
            assert_eq!((verdict(&denied), verdict(&later)), (DROP, DROP));
        }
        let [first, later] = fragments(other, own);
        assert_eq!((pod.gets(&first), pod.gets(&later)), (DROP, DROP));
        assert!(pod.counter(Counter::PolicyFragment) >= 5);
        // What the node sends, and what is not enforced, is not held up.
        assert_eq!(pod.gets_from_host(&later), PASS);
        pod.allow(EGRESS, &[]);
        assert_eq!(pod.gets(&later), PASS);
    });
}

#[test]
fn a_change_in_the_middle_of_a_datagram_does_not_lose_it() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        pod.allow(INGRESS, &[(all_of(PEER_IDENTITY, Direction::Ingress), allowed())]);
        let [first, later] = fragments(peer, own);
        assert_eq!(pod.gets(&first), PASS);
        pod.datapath.bump_epoch().expect("an epoch");
        assert_eq!(pod.gets(&later), PASS);
    });
}
