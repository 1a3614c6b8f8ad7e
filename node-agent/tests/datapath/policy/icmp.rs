//! ICMP: types as ports, echoes as flows, errors about flows, and what IPv6 cannot do without.

use isthmus_bpf_abi::{Direction, PolicyKey};

use super::*;
use crate::model::socket_addr;
use crate::packet::{Frame, SYN, TCP, UDP, checksum_of, icmp_error, icmp_error_quoting};

/// Lets the pod send or get a frame.
type Way<'a> = &'a dyn Fn(&[u8]) -> u32;

/// An ICMP or ICMPv6 message with a rest of header and some data.
fn message(source: &str, destination: &str, kind: u8, rest: [u8; 4]) -> Vec<u8> {
    hop_limited(source, destination, kind, rest, 64)
}

fn hop_limited(source: &str, destination: &str, kind: u8, rest: [u8; 4], hop_limit: u8) -> Vec<u8> {
    let v6 = source.starts_with('[');
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(rest);
    bytes.extend(*b"some data of an echo");
    let sum = !checksum_of(&[], &bytes);
    bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame =
        Frame { protocol: if v6 { 58 } else { 1 }, ..Frame::udp(source, destination) }.around(&bytes);
    if v6 {
        frame[14 + 7] = hop_limit;
    }
    frame
}

/// Numbers of request, reply and an error of the pod's family.
fn types(pod: &Pod) -> (u8, u8, u8, u8) {
    if pod.family.pod.starts_with('[') { (58, 128, 129, 1) } else { (1, 8, 0, 3) }
}

#[test]
fn an_echo_is_answered_if_it_may_be_asked() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        let (protocol, request, reply, _) = types(pod);
        let id = [0x12, 0x34, 0, 1];
        for (direction, enforcement) in [(Direction::Ingress, BOTH), (Direction::Egress, BOTH)] {
            let (asks, answers): (Way<'_>, Way<'_>) = match direction {
                Direction::Ingress => (&|frame| pod.gets(frame), &|frame| pod.sends(frame)),
                Direction::Egress => (&|frame| pod.sends(frame), &|frame| pod.gets(frame)),
            };
            let (from, to) = if direction == Direction::Ingress { (peer, own) } else { (own, peer) };
            pod.allow(enforcement, &[]);
            assert_eq!(asks(&message(from, to, request, id)), DROP);
            assert_eq!(answers(&message(to, from, reply, id)), DROP);
            pod.allow(enforcement, &[(port(PEER_IDENTITY, direction, protocol, request.into()), allowed())]);
            assert_eq!(asks(&message(from, to, request, id)), PASS);
            assert_eq!(answers(&message(to, from, reply, id)), PASS);
            // Another identifier was not asked with, and the other side may ask nothing.
            assert_eq!(answers(&message(to, from, reply, [9, 9, 0, 1])), DROP);
            assert_eq!(answers(&message(to, from, request, id)), DROP);
            // A rule about echoes is not one about other types.
            assert_eq!(asks(&message(from, to, if protocol == 1 { 13 } else { 139 }, id)), DROP);
            pod.allow(enforcement, &[]);
            assert_eq!(answers(&message(to, from, reply, id)), DROP);
        }
    });
}

#[test]
fn an_error_about_a_flow_that_was_let_through_passes_and_no_other() {
    each_family(|pod| {
        let Family { pod: own, peer, other, stranger } = pod.family;
        let (_, request, _, unreachable) = types(pod);
        let router = socket_addr(stranger).ip();
        let error = |about: &Frame| icmp_error(router, unreachable, 1, about);
        pod.allow(BOTH, &[(all_of(PEER_IDENTITY, Direction::Egress), allowed())]);
        for sent in [
            Frame::udp(own, peer),
            Frame::tcp(own, peer, SYN),
            Frame { protocol: SCTP, ..Frame::udp(own, peer) },
        ] {
            assert_eq!(pod.gets(&error(&sent)), DROP, "nothing was sent");
            assert_eq!(pod.sends(&sent.bytes()), PASS);
            assert_eq!(pod.gets(&error(&sent)), PASS);
        }
        assert_eq!(pod.gets(&error(&Frame::udp(own, other))), DROP);
        assert_eq!(pod.gets(&error(&Frame::udp(peer, own))), DROP, "about nothing of this pod's");
        // About an echo.
        let asked = message(own, peer, request, [1, 2, 0, 1]);
        assert_eq!(pod.sends(&asked), PASS);
        let to = socket_addr(own);
        assert_eq!(pod.gets(&icmp_error_quoting(router, unreachable, 1, to, &asked[14..], 64)), PASS);
        let never_asked = message(own, peer, request, [3, 4, 0, 1]);
        assert_eq!(pod.gets(&icmp_error_quoting(router, unreachable, 1, to, &never_asked[14..], 64)), DROP);
        // When the flow is cut, so are the errors about it.
        pod.allow(BOTH, &[]);
        assert_eq!(pod.gets(&error(&Frame::udp(own, peer))), DROP);
    });
}

#[test]
fn a_pod_may_say_that_what_it_was_let_have_does_not_reach_anybody() {
    each_family(|pod| {
        let Family { pod: own, peer, other, .. } = pod.family;
        let (_, _, _, unreachable) = types(pod);
        let from = socket_addr(own).ip();
        let error = |about: &Frame| icmp_error(from, unreachable, 3, about);
        pod.allow(BOTH, &[(all_of(PEER_IDENTITY, Direction::Ingress), allowed())]);
        assert_eq!(pod.gets(&frame(UDP, peer, own, 0)), PASS);
        assert_eq!(pod.sends(&error(&Frame::udp(peer, own))), PASS);
        assert_eq!(pod.sends(&error(&Frame::udp(other, own))), DROP);
    });
}

#[test]
fn a_rule_may_allow_errors_by_their_type() {
    each_family(|pod| {
        let Family { pod: own, stranger, peer, .. } = pod.family;
        let (protocol, _, _, unreachable) = types(pod);
        let router = socket_addr(stranger).ip();
        pod.allow(
            INGRESS,
            &[(PolicyKey::ports(WORLD, Direction::Ingress, protocol, unreachable.into(), 16), allowed())],
        );
        assert_eq!(pod.gets(&icmp_error(router, unreachable, 1, &Frame::udp(own, peer))), PASS);
    });
}

#[test]
fn neighbours_are_discovered_whatever_the_policy() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        if !own.starts_with('[') {
            return;
        }
        for waiting in [true, false] {
            if !waiting {
                pod.allow(BOTH, &[(all_of(0, Direction::Ingress), denied())]);
            }
            for (kind, sends, gets) in [
                (133, PASS, DROP),
                (134, DROP, PASS),
                (135, PASS, PASS),
                (136, PASS, PASS),
                (137, DROP, PASS),
                (128, DROP, DROP),
            ] {
                assert_eq!(pod.sends(&hop_limited(own, peer, kind, [0; 4], 255)), sends, "{kind}");
                assert_eq!(pod.gets(&hop_limited(peer, own, kind, [0; 4], 255)), gets, "{kind}");
                // It has come from another link, which neighbours do not.
                assert_eq!(pod.gets(&hop_limited(peer, own, kind, [0; 4], 254)), DROP, "{kind}");
            }
            assert_eq!(pod.sends(&hop_limited("[fe80::2]:0", "[ff02::16]:0", 143, [0; 4], 1)), PASS);
        }
    });
}

#[test]
fn arp_is_not_asked_about() {
    each_family(|pod| {
        pod.allow(BOTH, &[]);
        let mut arp = frame(TCP, pod.family.pod, pod.family.peer, 0);
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        assert_eq!((pod.sends(&arp), pod.gets(&arp)), (PASS, PASS));
    });
}
