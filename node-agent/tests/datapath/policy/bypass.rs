//! Ways around a policy, closed.

use isthmus_bpf_abi::{Counter, Direction};

use super::*;
use crate::packet::{Frame, SYN, TCP, UDP};

#[test]
fn what_cannot_be_read_does_not_pass_where_a_policy_is_enforced() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        pod.allow(
            BOTH,
            &[(all_of(0, Direction::Ingress), allowed()), (all_of(0, Direction::Egress), allowed())],
        );
        let sent = frame(TCP, own, peer, SYN);
        let ip_header = 14 + if own.starts_with('[') { 40 } else { 20 };
        let mut other_protocol = sent.clone();
        other_protocol[12..14].copy_from_slice(&[0x88, 0x47]);
        let mut tagged = sent.clone();
        tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        let truncated = sent[..ip_header + 8].to_vec();
        let before = pod.counter(Counter::PolicyUnreadable);
        for unreadable in [&other_protocol, &tagged, &truncated] {
            assert_eq!((pod.sends(unreadable), pod.gets(unreadable)), (DROP, DROP));
            // The node's own protocols on its own link.
            assert_eq!(pod.gets_from_host(unreadable), PASS);
        }
        assert_eq!(pod.counter(Counter::PolicyUnreadable), before + 6);
        pod.allow(NEITHER, &[]);
        for unreadable in [&other_protocol, &tagged, &truncated] {
            assert_eq!((pod.sends(unreadable), pod.gets(unreadable)), (PASS, PASS));
        }
    });
}

#[test]
fn extension_headers_hide_nothing() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        if !own.starts_with('[') {
            return;
        }
        let options = (60, vec![0, 0, 1, 4, 0, 0, 0, 0]);
        let behind = |count: usize| {
            Frame { extensions: vec![options.clone(); count], ..Frame::tcp(peer, own, SYN) }.bytes()
        };
        pod.allow(INGRESS, &[(port(PEER_IDENTITY, Direction::Ingress, TCP, 8080), allowed())]);
        assert_eq!(pod.gets(&behind(3)), PASS);
        assert_eq!(pod.gets(&behind(9)), DROP, "nobody reads as far");
        let routed = (43, vec![0, 2, 0, 1, 0, 0, 0, 0]);
        let routed = Frame { extensions: vec![routed], ..Frame::tcp(peer, own, SYN) }.bytes();
        assert_eq!(pod.gets(&routed), DROP, "its destination is not the last");
        pod.allow(INGRESS, &[]);
        assert_eq!(pod.gets(&behind(3)), DROP);
    });
}

#[test]
fn an_ipv6_packet_does_not_pass_for_one_of_an_ipv4_address() {
    each_family(|pod| {
        let ipv4 = "[::ffff:10.0.2.3]:40000";
        pod.identify("10.0.2.3:0", PEER_IDENTITY);
        pod.allow(
            BOTH,
            &[
                (all_of(PEER_IDENTITY, Direction::Ingress), allowed()),
                (all_of(PEER_IDENTITY, Direction::Egress), allowed()),
            ],
        );
        assert_eq!(pod.gets(&frame(UDP, ipv4, "[fd00:1::2]:8080", 0)), DROP);
        assert_eq!(pod.sends(&frame(UDP, "[fd00:1::2]:8080", ipv4, 0)), DROP);
    });
}

#[test]
fn a_pod_cannot_send_from_the_address_of_somebody_else() {
    each_family(|pod| {
        let Family { peer, other, stranger, pod: own } = pod.family;
        for enforcement in [NEITHER, BOTH] {
            pod.allow(enforcement, &[(all_of(0, Direction::Egress), allowed())]);
            let before = pod.counter(Counter::PolicyForgedSource);
            assert_eq!(pod.sends(&frame(UDP, peer, other, 0)), DROP);
            assert_eq!(pod.sends(&frame(TCP, peer, other, SYN)), DROP);
            assert_eq!(pod.counter(Counter::PolicyForgedSource), before + 2);
            // An address of nobody's is trusted by nobody.
            assert_eq!(pod.sends(&frame(UDP, stranger, other, 0)), PASS);
            assert_eq!(pod.sends(&frame(UDP, own, other, 0)), PASS);
        }
        // Also while nobody knows who it is, since its address is known.
        let waits = EndpointSettings { identity: 0, ..pod.settings() };
        pod.datapath.put_endpoint(POD, &waits, AtFirst::Pass).expect("an endpoint");
        assert_eq!(pod.sends(&frame(UDP, own, other, 0)), PASS);
        assert_eq!(pod.sends(&frame(UDP, peer, other, 0)), DROP);
        // As long as its addresses are not known, those of its identity are its own.
        let settings = EndpointSettings { identity: POD_IDENTITY, ..EndpointSettings::default() };
        pod.datapath.put_endpoint(POD, &settings, AtFirst::Pass).expect("an endpoint");
        assert_eq!(pod.sends(&frame(UDP, own, other, 0)), PASS);
        assert_eq!(pod.sends(&frame(UDP, peer, other, 0)), DROP);
    });
}
