//! Flows: what follows from the verdict about their first packet, and how long.

use isthmus_bpf_abi::{Counter, Direction};

use super::*;
use crate::packet::{ACK, FIN, RST, SYN, TCP, UDP};

#[test]
fn answers_to_what_was_let_through_pass_and_nothing_else_does() {
    each_family(|pod| {
        let Family { pod: own, peer, other, .. } = pod.family;
        for protocol in PROTOCOLS {
            pod.allow(BOTH, &[(port(PEER_IDENTITY, Direction::Ingress, protocol, 8080), allowed())]);
            // Nothing is an answer before there was a question.
            assert_eq!(pod.sends(&frame(protocol, own, peer, SYN | ACK)), DROP);
            assert_eq!(pod.gets(&frame(protocol, peer, own, SYN)), PASS);
            assert_eq!(pod.sends(&frame(protocol, own, peer, SYN | ACK)), PASS);
            assert_eq!(pod.gets(&frame(protocol, peer, own, ACK)), PASS);
            assert_eq!(pod.sends(&frame(protocol, own, peer, ACK)), PASS);
            // Other ends, other ports.
            assert_eq!(pod.sends(&frame(protocol, own, other, ACK)), DROP);
            assert_eq!(pod.sends(&frame(protocol, own, &at_port(peer, 40_001), ACK)), DROP);
            assert_eq!(pod.sends(&frame(protocol, &at_port(own, 8081), peer, ACK)), DROP);
        }
    });
}

#[test]
fn answers_to_what_a_pod_asks_pass_although_it_may_be_asked_nothing() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        for protocol in PROTOCOLS {
            pod.allow(INGRESS, &[]);
            assert_eq!(pod.gets(&frame(protocol, peer, own, SYN | ACK)), DROP);
            assert_eq!(pod.sends(&frame(protocol, own, peer, SYN)), PASS);
            assert_eq!(pod.gets(&frame(protocol, peer, own, SYN | ACK)), PASS);
            assert_eq!(pod.gets(&frame(protocol, peer, own, ACK)), PASS);
        }
    });
}

#[test]
fn a_connection_the_other_way_round_is_no_answer() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        pod.allow(INGRESS, &[]);
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), PASS);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), DROP);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN | ACK)), PASS);
    });
}

#[test]
fn what_is_revoked_is_cut_in_both_directions_and_what_is_not_goes_on() {
    each_family(|pod| {
        let Family { pod: own, peer, other, .. } = pod.family;
        for protocol in PROTOCOLS {
            let rules = |identities: &[u32]| -> Vec<_> {
                identities
                    .iter()
                    .map(|&identity| (port(identity, Direction::Ingress, protocol, 8080), allowed()))
                    .collect()
            };
            pod.allow(INGRESS, &rules(&[PEER_IDENTITY, OTHER_IDENTITY]));
            for remote in [peer, other] {
                assert_eq!(pod.gets(&frame(protocol, remote, own, SYN)), PASS);
                assert_eq!(pod.sends(&frame(protocol, own, remote, SYN | ACK)), PASS);
            }
            pod.allow(INGRESS, &rules(&[OTHER_IDENTITY]));
            // The pod may send whatever it likes, but not on with that.
            assert_eq!(pod.sends(&frame(protocol, own, peer, ACK)), DROP);
            assert_eq!(pod.gets(&frame(protocol, peer, own, ACK)), DROP);
            assert_eq!(pod.sends(&frame(protocol, own, peer, ACK)), DROP);
            assert_eq!(pod.gets(&frame(protocol, peer, own, ACK)), DROP);
            assert_eq!(pod.sends(&frame(protocol, own, other, ACK)), PASS);
            assert_eq!(pod.gets(&frame(protocol, other, own, ACK)), PASS);
            // And on again as it was, when it may.
            pod.allow(INGRESS, &rules(&[PEER_IDENTITY]));
            assert_eq!(pod.sends(&frame(protocol, own, peer, ACK)), PASS);
            assert_eq!(pod.gets(&frame(protocol, peer, own, ACK)), PASS);
            assert_eq!(pod.gets(&frame(protocol, other, own, ACK)), DROP);
        }
    });
}

#[test]
fn what_a_pod_may_no_longer_send_is_cut_in_both_directions_too() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        for protocol in PROTOCOLS {
            let rule = port(PEER_IDENTITY, Direction::Egress, protocol, 40_000);
            pod.allow(EGRESS, &[(rule, allowed())]);
            assert_eq!(pod.sends(&frame(protocol, own, peer, SYN)), PASS);
            assert_eq!(pod.gets(&frame(protocol, peer, own, SYN | ACK)), PASS);
            pod.datapath.update_policy(POD, &[], &[rule]).expect("an update");
            assert_eq!(pod.gets(&frame(protocol, peer, own, ACK)), DROP);
            assert_eq!(pod.sends(&frame(protocol, own, peer, ACK)), DROP);
            pod.datapath.update_policy(POD, &[(rule, allowed())], &[]).expect("an update");
            assert_eq!(pod.gets(&frame(protocol, peer, own, ACK)), PASS);
        }
    });
}

#[test]
fn a_flow_is_cut_when_its_other_side_becomes_somebody_else() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        pod.allow(INGRESS, &[(all_of(PEER_IDENTITY, Direction::Ingress), allowed())]);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), PASS);
        pod.identify(peer, OTHER_IDENTITY);
        assert_eq!(pod.sends(&frame(TCP, own, peer, ACK)), DROP);
        assert_eq!(pod.gets(&frame(TCP, peer, own, ACK)), DROP);
        pod.identify(peer, PEER_IDENTITY);
        assert_eq!(pod.gets(&frame(TCP, peer, own, ACK)), PASS);
    });
}

#[test]
fn connections_from_before_the_first_policy_are_known_by_who_began_them() {
    each_family(|pod| {
        let Family { pod: own, peer, other, stranger } = pod.family;
        pod.allow(NEITHER, &[]);
        // The pod has dialled one, and another has dialled the pod.
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), PASS);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN | ACK)), PASS);
        assert_eq!(pod.sends(&frame(TCP, own, peer, ACK)), PASS);
        assert_eq!(pod.gets(&frame(TCP, other, own, SYN)), PASS);
        assert_eq!(pod.sends(&frame(TCP, own, other, SYN | ACK)), PASS);
        pod.allow(INGRESS, &[]);
        assert_eq!(pod.gets(&frame(TCP, peer, own, ACK)), PASS);
        assert_eq!(pod.sends(&frame(TCP, own, other, ACK)), DROP);
        assert_eq!(pod.gets(&frame(TCP, other, own, ACK)), DROP);
        // The node has dialled too, while answers were free.
        assert_eq!(pod.gets_from_host(&frame(TCP, stranger, own, SYN)), PASS);
        pod.allow(BOTH, &[]);
        assert_eq!(pod.sends(&frame(TCP, own, stranger, SYN | ACK)), PASS);
        assert_eq!(pod.sends(&frame(TCP, own, peer, ACK)), DROP);
    });
}

#[test]
fn the_node_reaches_its_pods_whatever_their_policy_and_gets_answers() {
    each_family(|pod| {
        let Family { pod: own, stranger, other, .. } = pod.family;
        for protocol in PROTOCOLS {
            pod.allow(BOTH, &[(all_of(0, Direction::Ingress), denied())]);
            assert_eq!(pod.gets_from_host(&frame(protocol, stranger, own, SYN)), PASS);
            assert_eq!(pod.sends(&frame(protocol, own, stranger, SYN | ACK)), PASS);
            // Also after a change, which nothing about the node can be.
            pod.datapath.bump_epoch().expect("an epoch");
            assert_eq!(pod.sends(&frame(protocol, own, stranger, ACK)), PASS);
            // By its address, where its packets come by way of somebody else.
            pod.identify(other, 1);
            assert_eq!(pod.gets(&frame(protocol, other, own, SYN)), PASS);
            assert_eq!(pod.sends(&frame(protocol, own, other, SYN | ACK)), PASS);
            pod.identify(other, OTHER_IDENTITY);
            // The pod reaches the node only if it may.
            assert_eq!(pod.sends(&frame(protocol, &at_port(own, 999), stranger, SYN)), DROP);
        }
    });
}

#[test]
fn a_port_that_is_used_again_after_a_close_begins_another_flow() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        let rule = (all_of(PEER_IDENTITY, Direction::Ingress), allowed());
        for last in [FIN | ACK, RST] {
            pod.allow(BOTH, &[rule]);
            assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), PASS);
            assert_eq!(pod.gets(&frame(TCP, peer, own, last)), PASS);
            assert_eq!(pod.sends(&frame(TCP, own, peer, last)), PASS);
            let before = pod.counter(Counter::PolicyForwarded);
            assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), PASS);
            assert_eq!(pod.counter(Counter::PolicyForwarded), before + 1);
            assert_eq!(pod.sends(&frame(TCP, own, peer, SYN | ACK)), PASS);
        }
    });
}

#[test]
fn a_flow_that_goes_on_is_not_decided_again() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        pod.allow(INGRESS, &[(all_of(PEER_IDENTITY, Direction::Ingress), allowed())]);
        let before = pod.counter(Counter::PolicyForwarded);
        for _ in 0..100 {
            assert_eq!(pod.gets(&frame(UDP, peer, own, 0)), PASS);
            assert_eq!(pod.sends(&frame(UDP, own, peer, 0)), PASS);
        }
        assert_eq!(pod.counter(Counter::PolicyForwarded), before + 1);
    });
}
