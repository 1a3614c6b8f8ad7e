//! Each packet program with test packets: what comes out, and whether every checksum is right.

use std::net::SocketAddr;

use isthmus_bpf_abi::{Counter, Protocol};
use isthmus_node_agent::datapath::{Datapath, Features, PacketProgram, TestRun};

use crate::model::{Model, apply, socket_addr};
use crate::packet::{ACK, FIN, Frame, RST, SYN, TCP, UDP, icmp_error, read_icmp_error};
use crate::sandbox::sandbox;

const PASS: u32 = 0;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// A client, a service and its backend.
struct Family {
    client: &'static str,
    service: &'static str,
    backend: &'static str,
    other_backend: &'static str,
    router: &'static str,
}

const V4: Family = Family {
    client: "10.0.1.2:40000",
    service: "10.96.0.10:80",
    backend: "10.0.2.3:8080",
    other_backend: "10.0.3.4:8080",
    router: "10.0.1.1",
};
const V6: Family = Family {
    client: "[fd00:1::2]:40000",
    service: "[fd00:96::10]:80",
    backend: "[fd00:2::3]:8080",
    other_backend: "[fd00:3::4]:8080",
    router: "fd00:1::1",
};

fn each_family_and_protocol(test: impl Fn(&Datapath, &Family, u8, &mut Model) + Sync) {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        for (number, (family, protocol)) in
            [(&V4, TCP), (&V4, UDP), (&V6, TCP), (&V6, UDP)].into_iter().enumerate()
        {
            let kind = if protocol == TCP { Protocol::Tcp } else { Protocol::Udp };
            let mut service = Model::new(1 + number as u32, family.service, kind);
            test(&datapath, family, protocol, &mut service);
        }
    });
}

fn frame(protocol: u8, source: &str, destination: &str, flags: u8) -> Frame {
    if protocol == TCP { Frame::tcp(source, destination, flags) } else { Frame::udp(source, destination) }
}

fn from_pod(datapath: &Datapath, frame: &[u8]) -> TestRun {
    datapath.test_run(PacketProgram::FromPod, frame, 1).expect("a test run")
}

fn to_pod(datapath: &Datapath, frame: &[u8]) -> TestRun {
    datapath.test_run(PacketProgram::ToPod, frame, 1).expect("a test run")
}

fn counter(datapath: &Datapath, counter: Counter) -> u64 {
    let counters = datapath.counters().expect("counters");
    counters.into_iter().find(|(known, _)| *known == counter).expect("every counter is there").1
}

fn with_destination(frame: &Frame, destination: &str) -> Frame {
    Frame { destination: socket_addr(destination), ..frame.clone() }
}

#[test]
fn a_packet_to_a_service_goes_to_its_backend_and_the_answer_comes_from_the_service() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        let sent = frame(protocol, family.client, family.service, SYN);
        let run = from_pod(datapath, &sent.bytes());
        assert_eq!(run.retval, PASS);
        assert_eq!(Frame::read(&run.packet), with_destination(&sent, family.backend));
        // Again, as a packet of a known flow.
        let run = from_pod(datapath, &sent.bytes());
        assert_eq!(Frame::read(&run.packet), with_destination(&sent, family.backend));

        let answer = frame(protocol, family.backend, family.client, SYN | ACK);
        let run = to_pod(datapath, &answer.bytes());
        assert_eq!(run.retval, PASS);
        let expected = Frame { source: socket_addr(family.service), ..answer };
        assert_eq!(Frame::read(&run.packet), expected);
    });
}

#[test]
fn the_ways_of_the_oldest_kernel_give_the_same_packets() {
    sandbox(|sandbox| {
        let newest = sandbox.datapath();
        let oldest = sandbox.datapath_with(|config| {
            config.pin_dir.set_file_name("oldest");
            config.features = Features::Floor;
        });
        for (number, family) in [&V4, &V6].into_iter().enumerate() {
            let own = SocketAddr::new(socket_addr(family.client).ip(), 8080).to_string();
            for (service, backend) in [(family.service, family.backend), (family.other_backend, &own)] {
                for (protocol, kind) in [(TCP, Protocol::Tcp), (UDP, Protocol::Udp)] {
                    let id = 1 + number as u32 * 2 + u32::from(protocol == UDP);
                    let zero_checksum = frame(protocol, family.client, service, ACK);
                    let zero_checksum = Frame { zero_checksum: protocol == UDP, ..zero_checksum };
                    let frames = [frame(protocol, family.client, service, ACK), zero_checksum];
                    for datapath in [&newest, &oldest] {
                        Model::new(id, service, kind).grow(datapath, &[backend]);
                    }
                    for frame in frames.map(|frame| frame.bytes()) {
                        let (new, old) = (from_pod(&newest, &frame), from_pod(&oldest, &frame));
                        assert_ne!(new.packet, frame);
                        assert_eq!((new.retval, new.packet), (old.retval, old.packet));
                    }
                }
            }
        }
    });
}

#[test]
fn the_checksum_stays_right_whatever_the_payload() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        for fill in 0..=255u8 {
            let mut sent = frame(protocol, family.client, family.service, ACK);
            sent.payload = vec![fill; usize::from(fill)];
            let run = from_pod(datapath, &sent.bytes());
            assert_eq!(Frame::read(&run.packet), with_destination(&sent, family.backend));
        }
    });
}

#[test]
fn a_udp_packet_without_a_checksum_stays_without() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        for (id, family) in [(1, &V4), (2, &V6)] {
            let mut service = Model::new(id, family.service, Protocol::Udp);
            service.grow(&datapath, &[family.backend]);
            let sent = Frame { zero_checksum: true, ..Frame::udp(family.client, family.service) };
            let run = from_pod(&datapath, &sent.bytes());
            assert_eq!(Frame::read(&run.packet), with_destination(&sent, family.backend));
        }
    });
}

#[test]
fn what_is_not_for_a_service_passes_untouched() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        let other_port = socket_addr(family.service).port() + 1;
        let other = SocketAddr::new(socket_addr(family.service).ip(), other_port).to_string();
        for destination in [other.as_str(), family.other_backend, family.backend] {
            let sent = frame(protocol, family.client, destination, SYN).bytes();
            let run = from_pod(datapath, &sent);
            assert_eq!((run.retval, run.packet), (PASS, sent));
        }
        let other_protocol = if protocol == TCP { UDP } else { TCP };
        if service.id == 1 {
            let sent = frame(other_protocol, family.client, family.service, SYN).bytes();
            assert_eq!(from_pod(datapath, &sent).packet, sent);
        }
        let stranger = frame(protocol, family.other_backend, family.client, ACK).bytes();
        assert_eq!(to_pod(datapath, &stranger).packet, stranger);
    });
}

#[test]
fn every_truncation_of_a_packet_is_survived_and_passes_untouched_or_right() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        let whole = frame(protocol, family.client, family.service, SYN).bytes();
        // The kernel itself refuses test packets that are shorter than their IP header.
        let header = 14 + if family.client.starts_with('[') { 40 } else { 20 };
        let needed = header + if protocol == TCP { 20 } else { 8 };
        for len in header..needed {
            let run = from_pod(datapath, &whole[..len]);
            assert_eq!((run.retval, run.packet.as_slice()), (PASS, &whole[..len]), "cut to {len} bytes");
            let run = to_pod(datapath, &whole[..len]);
            assert_eq!((run.retval, run.packet.as_slice()), (PASS, &whole[..len]), "cut to {len} bytes");
        }
    });
}

#[test]
fn ipv4_options_and_ipv6_extension_headers_are_kept() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        let mut sent = frame(protocol, family.client, family.service, SYN);
        if family.client.starts_with('[') {
            // Hop-by-hop options, then destination options of two units.
            sent.extensions =
                vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0]), (60, [vec![0, 1, 1, 12], vec![0; 12]].concat())];
        } else {
            // No-operation thirty-nine times, then the end of the list: as long as a header can be.
            sent.options = [vec![1; 39], vec![0]].concat();
        }
        let run = from_pod(datapath, &sent.bytes());
        let mut expected = with_destination(&sent, family.backend);
        let mut read = Frame::read(&run.packet);
        // The first byte of each header is the type of the next one, which the builder fills in.
        for (_, header) in read.extensions.iter_mut().chain(&mut expected.extensions) {
            header[0] = 0;
        }
        assert_eq!(read, expected);
    });
}

#[test]
fn a_source_routed_ipv6_packet_passes_untouched() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut service = Model::new(1, V6.service, Protocol::Tcp);
        service.grow(&datapath, &[V6.backend]);
        let mut sent = Frame::tcp(V6.client, V6.service, SYN);
        // One segment is left: the service's address is only the next hop.
        sent.extensions = vec![(43, [vec![0, 2, 4, 1], vec![0; 20]].concat())];
        let sent = sent.bytes();
        assert_eq!(from_pod(&datapath, &sent).packet, sent);
    });
}

#[test]
fn frames_of_a_vlan_and_of_other_protocols_pass_untouched() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut service = Model::new(1, V4.service, Protocol::Tcp);
        service.grow(&datapath, &[V4.backend]);
        let plain = Frame::tcp(V4.client, V4.service, SYN).bytes();
        let mut tagged = plain.clone();
        tagged.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        let mut arp = plain.clone();
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        let mut sctp = Frame::tcp(V4.client, V4.service, SYN);
        sctp.protocol = 132;
        for sent in [tagged, arp, sctp.around(&[0; 32])] {
            assert_eq!(from_pod(&datapath, &sent).packet, sent);
            assert_eq!(to_pod(&datapath, &sent).packet, sent);
        }
    });
}

#[test]
fn later_fragments_follow_the_first() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        let mut sent = frame(protocol, family.client, family.service, ACK);
        sent.payload = (0..200u8).collect();
        let answer = Frame { source: socket_addr(family.backend), destination: sent.source, ..sent.clone() };
        type Run = fn(&Datapath, &[u8]) -> TestRun;
        let ways: [(Run, &Frame, Frame); 2] = [
            (from_pod, &sent, with_destination(&sent, family.backend)),
            (to_pod, &answer, Frame { source: socket_addr(family.service), ..answer.clone() }),
        ];
        for (run, frame, expected) in ways {
            let transport = frame.transport();
            let mut reassembled = Vec::new();
            let mut template = frame.clone();
            for (offset, len, more) in [(0, 64, true), (64, 64, true), (128, transport.len() - 128, false)] {
                let piece = &transport[offset..offset + len];
                let (fragment, header) = if family.client.starts_with('[') {
                    let [high, low] = (offset as u16 | u16::from(more)).to_be_bytes();
                    template.extensions = vec![(44, vec![0, 0, high, low, 1, 2, 3, protocol])];
                    (template.around(piece), 14 + 40 + 8)
                } else {
                    (frame.around_fragment(piece, offset as u16, more), 14 + 20)
                };
                let out = run(datapath, &fragment);
                assert_eq!(out.retval, PASS);
                let whole_again = &out.packet[header..];
                reassembled.extend_from_slice(whole_again);
                let addresses =
                    if header == 14 + 20 { out.packet[26..34].to_vec() } else { out.packet[22..54].to_vec() };
                let plain = expected.bytes();
                let wanted = if header == 14 + 20 { plain[26..34].to_vec() } else { plain[22..54].to_vec() };
                assert_eq!(addresses, wanted, "fragment at {offset}");
            }
            assert_eq!(Frame::read(&expected.around(&reassembled)), expected);
        }
    });
}

#[test]
fn fragments_of_a_datagram_that_is_not_translated_do_not_follow_an_older_one_that_was() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut service = Model::new(1, V4.service, Protocol::Udp);
        service.grow(&datapath, &[V4.backend]);
        let mut sent = Frame::udp(V4.client, V4.service);
        sent.payload = vec![1; 100];
        let first = |frame: &Frame| frame.around_fragment(&frame.transport()[..64], 0, true);
        let later = sent.around_fragment(&sent.transport()[64..], 64, false);
        from_pod(&datapath, &first(&sent));
        assert_ne!(from_pod(&datapath, &later).packet, later);
        // The same identification and addresses, to a port that is no service's.
        let other = with_destination(&sent, "10.96.0.10:81");
        assert_eq!(from_pod(&datapath, &first(&other)).packet, first(&other));
        assert_eq!(from_pod(&datapath, &later).packet, later);
    });
}

#[test]
fn a_service_without_backends_refuses_tcp_with_a_reset_and_udp_with_an_icmp_error() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[]);
        let sent = frame(protocol, family.client, family.service, SYN);
        let run = from_pod(datapath, &sent.bytes());
        assert_eq!(run.retval, REDIRECT);
        assert_eq!(run.packet[..6], sent.bytes()[6..12], "back to the sender's MAC address");
        if protocol == UDP {
            assert_eq!(read_icmp_error(&run.packet), (sent.source, sent.destination));
        } else {
            let reset = Frame::read(&run.packet);
            assert_eq!((reset.source, reset.destination), (sent.destination, sent.source));
            assert_eq!((reset.tcp_flags, reset.payload.len()), (RST | ACK, 0));
            // It acknowledges the SYN and what came with it.
            let l4 = run.packet.len() - 20;
            let acknowledged =
                u32::from_be_bytes(run.packet[l4 + 8..l4 + 12].try_into().expect("four bytes"));
            assert_eq!(acknowledged, 7 + 1 + sent.payload.len() as u32);
        }
        let reset = frame(TCP, family.client, family.service, RST).bytes();
        if protocol == TCP {
            assert_eq!(from_pod(datapath, &reset).retval, DROP, "a reset is not answered");
        }
    });
}

#[test]
fn a_flow_keeps_its_backend_until_that_leaves_and_then_chooses_anew() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        let sent = frame(protocol, family.client, family.service, SYN);
        from_pod(datapath, &sent.bytes());
        service.grow(datapath, &[family.other_backend]);
        let next = frame(protocol, family.client, family.service, ACK);
        for _ in 0..50 {
            let run = from_pod(datapath, &next.bytes());
            assert_eq!(Frame::read(&run.packet), with_destination(&next, family.backend));
        }
        service.shrink(datapath, family.backend);
        let run = from_pod(datapath, &next.bytes());
        assert_eq!(Frame::read(&run.packet), with_destination(&next, family.other_backend));
    });
}

#[test]
fn a_client_port_that_is_used_again_after_a_close_chooses_anew() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut service = Model::new(1, V4.service, Protocol::Tcp);
        service.grow(&datapath, &[V4.backend, V4.other_backend]);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..64 {
            let first = from_pod(&datapath, &Frame::tcp(V4.client, V4.service, SYN).bytes());
            let backend = Frame::read(&first.packet).destination;
            seen.insert(backend);
            let last = from_pod(&datapath, &Frame::tcp(V4.client, V4.service, FIN | ACK).bytes());
            assert_eq!(Frame::read(&last.packet).destination, backend);
        }
        assert_eq!(seen.len(), 2);
        assert_eq!(counter(&datapath, Counter::TcNewFlow), 64);
    });
}

#[test]
fn new_flows_are_spread_over_all_backends() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend, family.other_backend]);
        let mut counts = std::collections::BTreeMap::new();
        let client = socket_addr(family.client);
        for port in 0..400 {
            let client = SocketAddr::new(client.ip(), 20_000 + port).to_string();
            let run = from_pod(datapath, &frame(protocol, &client, family.service, SYN).bytes());
            *counts.entry(Frame::read(&run.packet).destination).or_insert(0) += 1;
        }
        // 400 throws of a coin: ten standard deviations.
        assert!(counts.values().all(|count| (100..=300).contains(count)), "{counts:?}");
    });
}

#[test]
fn session_affinity_sends_a_client_to_the_same_backend_while_that_is_there() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        let id = service.id;
        let kind = if protocol == TCP { Protocol::Tcp } else { Protocol::Udp };
        *service = Model::new(id, family.service, kind).with_affinity(3600);
        service.grow(datapath, &[family.backend, family.other_backend]);
        let client = socket_addr(family.client).ip();
        let backend_of = |port: u16| {
            let client = SocketAddr::new(client, port).to_string();
            let run = from_pod(datapath, &frame(protocol, &client, family.service, SYN).bytes());
            Frame::read(&run.packet).destination
        };
        let first = backend_of(1000);
        assert!((1001..1050).all(|port| backend_of(port) == first));
        service.shrink(datapath, &first.to_string());
        let second = backend_of(2000);
        assert_ne!(second, first);
        service.grow(datapath, &[&first.to_string()]);
        assert!((2001..2050).all(|port| backend_of(port) == second));
    });
}

#[test]
fn a_flow_stays_with_a_backend_that_takes_nothing_new_and_other_flows_of_its_client_do_not() {
    for affinity in [0, 3600] {
        each_family_and_protocol(|datapath, family, protocol, service| {
            let kind = if protocol == TCP { Protocol::Tcp } else { Protocol::Udp };
            *service = Model::new(service.id, family.service, kind).with_affinity(affinity);
            let (old, new) = (socket_addr(family.backend), socket_addr(family.other_backend));
            let client = |port| SocketAddr::new(socket_addr(family.client).ip(), port).to_string();
            let sent = |port, flags| {
                from_pod(datapath, &frame(protocol, &client(port), family.service, flags).bytes())
            };
            let backend_of = |port, flags| {
                let run = sent(port, flags);
                assert_eq!(run.retval, PASS);
                Frame::read(&run.packet).destination
            };
            service.grow(datapath, &[family.backend]);
            assert_eq!(backend_of(1000, SYN), old);
            service.grow(datapath, &[family.other_backend]);
            service.retire(datapath, family.backend);
            for port in 1001..1030 {
                assert_eq!(backend_of(port, SYN), new);
                assert_eq!(backend_of(1000, ACK), old, "what is open goes on");
            }
            let answer = frame(protocol, family.backend, &client(1000), ACK);
            let answer = Frame::read(&to_pod(datapath, &answer.bytes()).packet);
            assert_eq!(answer.source, socket_addr(family.service));
            // Nobody else is left: what is open goes on even so, and everything else is refused.
            service.shrink(datapath, family.other_backend);
            assert_eq!(backend_of(1000, ACK), old);
            assert_eq!(sent(1001, ACK).retval, REDIRECT);

            service.grow(datapath, &[family.other_backend]);
            service.forget(datapath, family.backend);
            assert_eq!(backend_of(1000, ACK), new);
        });
    }
}

#[test]
fn a_pod_reaches_itself_through_a_service() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        let own = SocketAddr::new(socket_addr(family.client).ip(), 8080).to_string();
        service.grow(datapath, &[&own]);
        let loopback =
            if family.client.starts_with('[') { "[100::a9fe:2a01]:40000" } else { "169.254.42.1:40000" };
        let sent = frame(protocol, family.client, family.service, SYN);
        let run = from_pod(datapath, &sent.bytes());
        assert_eq!(run.retval, REDIRECT);
        let expected = Frame { source: socket_addr(loopback), ..with_destination(&sent, &own) };
        assert_eq!(Frame::read(&run.packet), expected);
        assert_eq!(run.packet[..6], sent.bytes()[6..12], "back to the sender's MAC address");

        let answer = frame(protocol, &own, loopback, SYN | ACK);
        let run = from_pod(datapath, &answer.bytes());
        assert_eq!(run.retval, REDIRECT);
        let expected =
            Frame { source: socket_addr(family.service), ..with_destination(&answer, family.client) };
        assert_eq!(Frame::read(&run.packet), expected);
    });
}

#[test]
fn an_icmp_error_about_a_translated_packet_names_the_service() {
    each_family_and_protocol(|datapath, family, protocol, service| {
        service.grow(datapath, &[family.backend]);
        let sent = frame(protocol, family.client, family.service, SYN);
        let translated = Frame::read(&from_pod(datapath, &sent.bytes()).packet);
        let router = family.router.parse().expect("an address");
        // "Fragmentation needed" and "packet too big".
        let (kind, code) = if family.client.starts_with('[') { (2, 0) } else { (3, 4) };
        let run = to_pod(datapath, &icmp_error(router, kind, code, &translated));
        assert_eq!(run.retval, PASS);
        assert_eq!(read_icmp_error(&run.packet), (sent.source, sent.destination));

        let direct = frame(protocol, family.client, family.other_backend, SYN);
        let error = icmp_error(router, kind, code, &direct);
        assert_eq!(to_pod(datapath, &error).packet, error, "about another packet");
        let error = icmp_error(router, kind, code, &translated);
        let header = 14 + if family.client.starts_with('[') { 40 } else { 20 };
        for len in header..error.len() {
            assert_eq!(to_pod(datapath, &error[..len]).retval, PASS, "cut to {len} bytes");
        }
    });
}

#[test]
fn two_services_with_one_backend_do_not_mix_up_the_answers_of_one_client_port() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut first = Model::new(1, V4.service, Protocol::Tcp);
        let mut second = Model::new(2, "10.96.0.11:80", Protocol::Tcp);
        first.grow(&datapath, &[V4.backend]);
        second.grow(&datapath, &[V4.backend]);
        from_pod(&datapath, &Frame::tcp(V4.client, V4.service, SYN).bytes());
        let run = from_pod(&datapath, &Frame::tcp(V4.client, "10.96.0.11:80", SYN).bytes());
        assert_eq!(run.retval, REDIRECT, "refused: the backend could not tell the two apart");
        assert_eq!(counter(&datapath, Counter::TcClash), 1);
        // With another backend there is a way.
        second.grow(&datapath, &[V4.other_backend]);
        let mut passed = 0;
        for _ in 0..10 {
            let run = from_pod(&datapath, &Frame::tcp(V4.client, "10.96.0.11:80", SYN).bytes());
            if run.retval == PASS {
                assert_eq!(Frame::read(&run.packet).destination, socket_addr(V4.other_backend));
                passed += 1;
            }
        }
        assert!(passed > 0);
        let answer = to_pod(&datapath, &Frame::tcp(V4.backend, V4.client, ACK).bytes());
        assert_eq!(Frame::read(&answer.packet).source, socket_addr(V4.service));
    });
}

#[test]
fn a_port_that_has_dialled_a_service_can_dial_its_backend_once_that_is_over() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut service = Model::new(1, V4.service, Protocol::Tcp);
        service.grow(&datapath, &[V4.backend]);
        let answer = |flags| {
            let run = to_pod(&datapath, &Frame::tcp(V4.backend, V4.client, flags).bytes());
            Frame::read(&run.packet).source
        };
        let direct = Frame::tcp(V4.client, V4.backend, SYN).bytes();
        from_pod(&datapath, &Frame::tcp(V4.client, V4.service, SYN).bytes());
        from_pod(&datapath, &Frame::tcp(V4.client, V4.service, ACK).bytes());
        assert_eq!(from_pod(&datapath, &direct).packet, direct);
        assert_eq!(answer(ACK), socket_addr(V4.service), "the first connection lives");

        from_pod(&datapath, &Frame::tcp(V4.client, V4.service, FIN | ACK).bytes());
        assert_eq!(answer(FIN | ACK), socket_addr(V4.service));
        from_pod(&datapath, &Frame::tcp(V4.client, V4.service, ACK).bytes());
        assert_eq!(from_pod(&datapath, &direct).packet, direct);
        assert_eq!(answer(SYN | ACK), socket_addr(V4.backend));
    });
}

#[test]
fn flows_are_counted_by_the_cluster_of_their_backend() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut service = Model::new(1, V4.service, Protocol::Udp);
        service.grow(&datapath, &[V4.backend]);
        for _ in 0..3 {
            from_pod(&datapath, &Frame::udp(V4.client, V4.service).bytes());
        }
        // The model takes the cluster from the address's last byte.
        assert_eq!(datapath.cluster_flows().expect("counters"), [(3, 1)]);
        assert_eq!(counter(&datapath, Counter::TcForward), 3);
        assert_eq!(counter(&datapath, Counter::TcNewFlow), 1);
    });
}

#[test]
fn a_service_that_is_gone_is_not_translated_any_more() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut service = Model::new(1, V4.service, Protocol::Tcp);
        service.grow(&datapath, &[V4.backend]);
        let sent = Frame::tcp(V4.client, V4.service, SYN).bytes();
        assert_ne!(from_pod(&datapath, &sent).packet, sent);
        let mut ops = service.remove(socket_addr(V4.backend));
        ops.retain(|op| op.target() != service.count().target());
        ops.push(isthmus_node_agent::datapath::MapOp::DeleteService { key: service.key, service: 1 });
        apply(&datapath, &ops);
        assert_eq!(from_pod(&datapath, &sent).packet, sent);
    });
}
