//! Which packets the rules let through, one packet at a time.

use isthmus_bpf_abi::{Counter, Direction, PolicyEntry, PolicyKey, Protocol};
use isthmus_node_agent::datapath::{AtFirst, EndpointSettings, PacketContext, PacketProgram, PolicyError};

use super::*;
use crate::model::Model;
use crate::packet::{SYN, TCP, UDP};
use crate::sandbox::ip;

#[test]
fn without_a_rule_nothing_passes_that_is_enforced_and_all_that_is_not() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        for protocol in PROTOCOLS {
            let (out, into) = (frame(protocol, own, peer, SYN), frame(protocol, peer, own, SYN));
            for (enforcement, sends, gets) in
                [(NEITHER, PASS, PASS), (EGRESS, DROP, PASS), (INGRESS, PASS, DROP), (BOTH, DROP, DROP)]
            {
                // One direction at a time: each begins a flow of the same ports.
                pod.allow(enforcement, &[]);
                assert_eq!(pod.sends(&frame(protocol, own, &at_port(peer, 1000 + sends as u16), SYN)), sends);
                assert_eq!(pod.gets(&frame(protocol, &at_port(peer, 2000 + gets as u16), own, SYN)), gets);
            }
            pod.allow(BOTH, &[]);
            assert_eq!((pod.sends(&out), pod.gets(&into)), (DROP, DROP));
        }
        assert!(pod.counter(Counter::PolicyNoRule) > 0);
        assert_eq!(pod.counter(Counter::PolicyDenied), 0);
    });
}

#[test]
fn an_endpoint_that_nobody_has_made_known_is_not_asked_about() {
    each_family(|pod| {
        pod.allow(BOTH, &[]);
        pod.datapath.remove_endpoint(POD).expect("removed");
        let Family { pod: own, peer, .. } = pod.family;
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), PASS);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), PASS);
    });
}

#[test]
fn a_pod_for_which_there_is_no_room_gets_nothing_but_from_its_node() {
    each_family(|pod| {
        pod.datapath.remove_endpoint(POD).expect("removed");
        let mut others = (POD + 1)..;
        let no_room = loop {
            let interface = others.next().expect("an interface");
            let put = pod.datapath.put_endpoint(interface, &EndpointSettings::default(), AtFirst::Pass);
            if let Err(error) = put {
                break error;
            }
        };
        assert!(matches!(no_room, PolicyError::TooManyEndpoints { .. }), "{no_room}");
        let Family { pod: own, peer, .. } = pod.family;
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), DROP);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), DROP);
        assert_eq!(pod.gets_from_host(&frame(TCP, peer, own, SYN)), PASS);
        for (interface, _) in pod.datapath.endpoints().expect("endpoints") {
            pod.datapath.remove_endpoint(interface).expect("removed");
        }
    });
}

#[test]
fn a_rule_is_about_an_identity_whatever_its_addresses() {
    each_family(|pod| {
        let Family { pod: own, peer, other, stranger } = pod.family;
        for direction in [Direction::Ingress, Direction::Egress] {
            for (identity, passes) in [(PEER_IDENTITY, peer), (OTHER_IDENTITY, other), (WORLD, stranger)] {
                pod.allow(BOTH, &[(all_of(identity, direction), allowed())]);
                // Or what is sent would answer to what was got from there.
                pod.datapath.forget_flows().expect("no flows");
                for remote in [peer, other, stranger] {
                    let expected = if remote == passes { PASS } else { DROP };
                    for protocol in PROTOCOLS {
                        let verdict = match direction {
                            Direction::Ingress => pod.gets(&frame(protocol, remote, own, SYN)),
                            Direction::Egress => pod.sends(&frame(protocol, own, remote, SYN)),
                        };
                        assert_eq!(verdict, expected, "{direction:?} {remote} {protocol}");
                    }
                }
            }
        }
    });
}

#[test]
fn an_address_whose_identity_is_not_known_is_the_world() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        pod.allow(INGRESS, &[(all_of(WORLD, Direction::Ingress), allowed())]);
        assert_eq!(pod.gets(&frame(UDP, peer, own, 0)), DROP);
        pod.identify(peer, 0);
        assert_eq!(pod.gets(&frame(UDP, peer, own, 0)), PASS);
    });
}

#[test]
fn a_rule_about_any_identity_is_about_each() {
    each_family(|pod| {
        let Family { pod: own, peer, other, stranger } = pod.family;
        pod.allow(INGRESS, &[(port(0, Direction::Ingress, TCP, 8080), allowed())]);
        for remote in [peer, other, stranger] {
            assert_eq!(pod.gets(&frame(TCP, remote, own, SYN)), PASS);
            assert_eq!(pod.gets(&frame(TCP, remote, &at_port(own, 8081), SYN)), DROP);
            assert_eq!(pod.gets(&frame(UDP, remote, own, 0)), DROP);
        }
    });
}

#[test]
fn ports_and_ranges_of_ports_are_prefixes() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        for protocol in PROTOCOLS {
            // 8064 to 8095, and 443.
            let range = PolicyKey::ports(PEER_IDENTITY, Direction::Ingress, protocol, 8064, 11);
            let one = port(PEER_IDENTITY, Direction::Ingress, protocol, 443);
            pod.allow(INGRESS, &[(range, allowed()), (one, allowed())]);
            let cases = [
                (8063, DROP),
                (8064, PASS),
                (8080, PASS),
                (8095, PASS),
                (8096, DROP),
                (443, PASS),
                (444, DROP),
            ];
            for (to, expected) in cases {
                let sent = frame(protocol, peer, &at_port(own, to), SYN);
                assert_eq!(pod.gets(&sent), expected, "{protocol} {to}");
            }
            let all_ports = PolicyKey::ports(PEER_IDENTITY, Direction::Ingress, protocol, 0, 0);
            pod.allow(INGRESS, &[(all_ports, allowed())]);
            for other in PROTOCOLS {
                let expected = if other == protocol { PASS } else { DROP };
                assert_eq!(pod.gets(&frame(other, peer, &at_port(own, 7), SYN)), expected);
            }
        }
    });
}

#[test]
fn the_port_of_a_rule_is_the_destinations_in_both_directions() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        let rule = port(PEER_IDENTITY, Direction::Egress, TCP, 40_000);
        pod.allow(EGRESS, &[(rule, allowed())]);
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), PASS);
        assert_eq!(pod.sends(&frame(TCP, &at_port(own, 40_000), &at_port(peer, 8080), SYN)), DROP);
    });
}

#[test]
fn a_deny_wins_over_every_allow_whichever_is_more_specific() {
    each_family(|pod| {
        let Family { pod: own, peer, other, .. } = pod.family;
        let own_port = |entry: PolicyEntry| (port(PEER_IDENTITY, Direction::Ingress, TCP, 8080), entry);
        let any_port = |entry: PolicyEntry| (port(0, Direction::Ingress, TCP, 8080), entry);
        let own_all = |entry: PolicyEntry| (all_of(PEER_IDENTITY, Direction::Ingress), entry);
        let any_all = |entry: PolicyEntry| (all_of(0, Direction::Ingress), entry);
        let cases = [
            (vec![own_port(allowed()), any_port(denied())], DROP),
            (vec![own_port(denied()), any_port(allowed())], DROP),
            (vec![own_all(allowed()), any_port(denied())], DROP),
            (vec![own_port(allowed()), any_all(denied())], DROP),
            (vec![own_all(denied()), any_port(allowed())], DROP),
            (vec![own_port(denied()), any_all(allowed())], DROP),
            // Within one identity the longest prefix decides: user space has resolved what overlaps.
            (vec![own_port(allowed()), own_all(denied())], PASS),
            (vec![own_port(denied()), own_all(allowed())], DROP),
        ];
        for (number, (entries, expected)) in cases.into_iter().enumerate() {
            pod.allow(INGRESS, &entries);
            assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), expected, "case {number}");
        }
        pod.allow(INGRESS, &[own_port(denied()), any_all(allowed())]);
        assert_eq!(pod.gets(&frame(TCP, other, own, SYN)), PASS);
        assert!(pod.counter(Counter::PolicyDenied) > 0);
    });
}

#[test]
fn protocols_without_ports_are_decided_by_their_number() {
    const GRE: u8 = 47;
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        let sent = frame(GRE, peer, own, 0);
        for (key, expected) in [
            (all_of(PEER_IDENTITY, Direction::Ingress), PASS),
            (PolicyKey::ports(PEER_IDENTITY, Direction::Ingress, GRE, 0, 0), PASS),
            (PolicyKey::ports(PEER_IDENTITY, Direction::Ingress, UDP, 0, 0), DROP),
        ] {
            pod.allow(INGRESS, &[(key, allowed())]);
            assert_eq!(pod.gets(&sent), expected);
        }
    });
}

#[test]
fn egress_is_decided_by_the_backend_that_a_service_was_translated_to() {
    each_family(|pod| {
        let Family { pod: own, peer, other, .. } = pod.family;
        let client = at_port(own, 50_000);
        let service = if peer.starts_with('[') { "[fd00:96::10]:80" } else { "10.96.0.10:80" };
        for (id, protocol, kind) in [(1, TCP, Protocol::Tcp), (2, UDP, Protocol::Udp)] {
            Model::new(id, service, kind).grow(&pod.datapath, &[peer]);
            pod.allow(EGRESS, &[(port(PEER_IDENTITY, Direction::Egress, protocol, 40_000), allowed())]);
            assert_eq!(pod.sends(&frame(protocol, &client, service, SYN)), PASS);
            // The answer comes from the backend when the policy is asked, and from the service for the pod.
            pod.allow(BOTH, &[(port(PEER_IDENTITY, Direction::Egress, protocol, 40_000), allowed())]);
            assert_eq!(pod.gets(&frame(protocol, peer, &client, SYN | crate::packet::ACK)), PASS);
            pod.allow(BOTH, &[(all_of(OTHER_IDENTITY, Direction::Egress), allowed())]);
            assert_eq!(pod.sends(&frame(protocol, &client, service, SYN)), DROP);
            assert_eq!(pod.sends(&frame(protocol, &client, other, SYN)), PASS);
        }
    });
}

#[test]
fn a_waiting_endpoint_gets_nothing_but_from_its_node() {
    each_family(|pod| {
        let Family { pod: own, peer, stranger, .. } = pod.family;
        let before = pod.counter(Counter::PolicyWaiting);
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), DROP);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), DROP);
        assert_eq!(pod.counter(Counter::PolicyWaiting), before + 2);
        // A probe of the kubelet's, and the answer to it.
        assert_eq!(pod.gets_from_host(&frame(TCP, stranger, own, SYN)), PASS);
        assert_eq!(pod.sends(&frame(TCP, own, stranger, SYN | crate::packet::ACK)), PASS);
        pod.allow(NEITHER, &[]);
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), PASS);
    });
}

#[test]
fn an_endpoint_that_does_not_wait_passes_until_its_policy_is_known() {
    each_family(|pod| {
        pod.datapath.remove_endpoint(POD).expect("removed");
        pod.datapath.put_endpoint(POD, &pod.settings(), AtFirst::Pass).expect("an endpoint");
        let Family { pod: own, peer, .. } = pod.family;
        assert_eq!(pod.sends(&frame(TCP, own, peer, SYN)), PASS);
        assert_eq!(pod.gets(&frame(TCP, peer, own, SYN)), PASS);
    });
}

#[test]
fn each_interface_has_a_policy_of_its_own() {
    each_family(|pod| {
        let Family { pod: own, peer, .. } = pod.family;
        ip("link add policy0 type veth");
        let second = nix::net::if_::if_nametoindex("policy0").expect("an index");
        let gets = |ifindex| {
            let context = PacketContext { ifindex, ingress_ifindex: 77, ..PacketContext::default() };
            let sent = frame(TCP, peer, own, SYN);
            pod.datapath.test_run_in(PacketProgram::ToPod, &sent, context, 1).expect("a test run").retval
        };
        pod.allow(INGRESS, &[(all_of(PEER_IDENTITY, Direction::Ingress), allowed())]);
        pod.datapath.put_endpoint(second, &EndpointSettings::default(), AtFirst::Wait).expect("an endpoint");
        pod.datapath.replace_policy(second, INGRESS, &[]).expect("a policy");
        // What the first may get is no leave for the second.
        assert_eq!((gets(POD), gets(second)), (PASS, DROP));
        ip("link del policy0");
    });
}
