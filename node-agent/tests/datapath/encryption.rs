//! What is encrypted, what is dropped and what is left alone, packet by packet.

use std::net::IpAddr;

use isthmus_bpf_abi::{Addr, Counter, IpcacheEntry, IpcacheKey, LocalPod, Protocol, ipcache_flags, mark};
use isthmus_node_agent::datapath::{
    Datapath, EncryptionDevice, EncryptionMode, Features, MapOp, PacketContext, PacketProgram, TestRun,
};

use crate::model::{Model, apply, socket_addr};
use crate::packet::{ACK, Frame, SYN, TCP, UDP, icmp_error};
use crate::sandbox::sandbox;

const PASS: u32 = 0;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// Test packets come in by the loopback interface.
const LOOPBACK: u32 = 1;
const MTU: u32 = 1420;
const POD: LocalPod = LocalPod { ifindex: LOOPBACK, pod_mac: [2; 6], host_mac: [4; 6] };
const WORLD: u32 = 2;
const REMOTE_NODE: u32 = 6;
const IDENTITY: u32 = 0x2_0123;

/// Who is who, from the pod's view.
struct Family {
    pod: &'static str,
    neighbour: &'static str,
    remote: &'static str,
    service: &'static str,
    other_in_range: &'static str,
    without_key: &'static str,
    node: &'static str,
    world: &'static str,
    node_addr: &'static str,
    remote_range: &'static str,
}

const V4: Family = Family {
    pod: "10.0.1.2:40000",
    neighbour: "10.0.1.3:80",
    remote: "10.0.2.3:80",
    service: "10.96.0.10:80",
    other_in_range: "10.0.2.99:80",
    without_key: "10.0.3.3:80",
    node: "172.20.0.2:80",
    world: "1.1.1.1:80",
    node_addr: "172.20.0.2",
    remote_range: "10.0.2.0/24",
};
const V6: Family = Family {
    pod: "[fd00:1::2]:40000",
    neighbour: "[fd00:1::3]:80",
    remote: "[fd00:2::3]:80",
    service: "[fd00:96::10]:80",
    other_in_range: "[fd00:2::99]:80",
    without_key: "[fd00:3::3]:80",
    node: "[fd00:20::2]:80",
    world: "[2606:4700::1]:80",
    node_addr: "fd00:20::2",
    remote_range: "fd00:2::/64",
};

/// The mesh around one pod: a neighbour on its node, a pod and its node's range elsewhere, a pod of a node without a key.
fn mesh(datapath: &Datapath, family: &Family) {
    let node: IpAddr = family.node_addr.parse().expect("an address");
    let entry = |identity, host: Option<IpAddr>, key| IpcacheEntry {
        identity,
        host: host.map_or(Addr::default(), Addr::from),
        cluster: 0,
        key,
        flags: if host.is_some() { ipcache_flags::HAS_HOST } else { 0 },
    };
    let host = |text: &str| IpcacheKey::host(socket_addr(text).ip());
    let (range, prefix) = family.remote_range.split_once('/').expect("a prefix");
    let range = IpcacheKey::new(range.parse().expect("an address"), prefix.parse().expect("a number"));
    let entries = [
        (host(family.pod), entry(IDENTITY, None, 255)),
        (host(family.neighbour), entry(IDENTITY, None, 255)),
        (host(family.remote), entry(IDENTITY, Some(node), 255)),
        (range, entry(WORLD, Some(node), 255)),
        (host(family.without_key), entry(IDENTITY, Some(node), 0)),
        (host(family.node), entry(REMOTE_NODE, None, 0)),
    ];
    apply(datapath, &entries.map(|(key, entry)| MapOp::PutIpcache { key, entry }));
    datapath.put_local_pod(socket_addr(family.pod).ip(), POD).expect("a pod");
    let neighbour = LocalPod { ifindex: LOOPBACK + 1, ..POD };
    datapath.put_local_pod(socket_addr(family.neighbour).ip(), neighbour).expect("a pod");
}

fn each_family(test: impl Fn(&Datapath, &Family) + Sync) {
    sandbox(|sandbox| {
        for features in [Features::Detect, Features::Floor] {
            let datapath = sandbox.datapath_with(|config| {
                config.pin_dir.set_file_name(format!("{features:?}"));
                config.features = features;
            });
            for family in [&V4, &V6] {
                mesh(&datapath, family);
                test(&datapath, family);
            }
        }
    });
}

/// The loopback interface stands for the device: it is there, and test packets do not really go to it.
fn on(datapath: &Datapath) {
    mode(datapath, true, false);
}

fn mode(datapath: &Datapath, device: bool, strict: bool) {
    let device = device.then_some(EncryptionDevice { ifindex: LOOPBACK, mtu: MTU });
    datapath.set_encryption(EncryptionMode::On { device, strict }).expect("set");
}

fn from_pod(datapath: &Datapath, frame: &[u8]) -> TestRun {
    datapath.test_run(PacketProgram::FromPod, frame, 1).expect("a test run")
}

fn to_pod(datapath: &Datapath, frame: &[u8], mark: u32) -> TestRun {
    let context = PacketContext { mark, ..PacketContext::default() };
    datapath.test_run_in(PacketProgram::ToPod, frame, context, 1).expect("a test run")
}

fn counted(datapath: &Datapath, counter: Counter, by: u64, during: impl FnOnce()) {
    let value = || {
        let counters = datapath.counters().expect("counters");
        counters.into_iter().find(|(known, _)| *known == counter).expect("every counter is there").1
    };
    let before = value();
    during();
    assert_eq!(value() - before, by, "{counter:?}");
}

/// Of every kind that a pod may send: with ports, without, and unreadable for the rest of the datapath.
fn packets(source: &str, destination: &str) -> Vec<Vec<u8>> {
    let tcp = Frame::tcp(source, destination, SYN);
    let udp = Frame::udp(source, destination);
    let about = Frame::udp(destination, source);
    let router = socket_addr(source).ip();
    let sctp = Frame { protocol: 132, ..tcp.clone() };
    let mut later = Frame { ..udp.clone() };
    let later = if source.starts_with('[') {
        later.extensions = vec![(44, vec![0, 0, 0, 24, 0, 0, 0, 7])];
        later.around(&[7; 32])
    } else {
        udp.around_fragment(&[7; 32], 24, false)
    };
    let kind = if router.is_ipv4() { 3 } else { 1 };
    vec![tcp.bytes(), udp.bytes(), icmp_error(router, kind, 3, &about), later, sctp.around(&[0; 40])]
}

#[test]
fn what_goes_to_a_pod_of_another_node_goes_into_the_device() {
    each_family(|datapath, family| {
        on(datapath);
        for destination in [family.remote, family.other_in_range] {
            let all = packets(family.pod, destination);
            counted(datapath, Counter::Encrypted, all.len() as u64, || {
                for packet in &all {
                    let run = from_pod(datapath, packet);
                    assert_eq!((run.retval, &run.packet), (REDIRECT, packet), "{destination}");
                }
            });
        }
    });
}

#[test]
fn what_goes_anywhere_else_goes_on_as_ever() {
    each_family(|datapath, family| {
        for strict in [false, true] {
            mode(datapath, true, strict);
            for destination in [family.neighbour, family.node, family.world] {
                for packet in packets(family.pod, destination) {
                    let run = from_pod(datapath, &packet);
                    assert_eq!((run.retval, run.packet, run.mark), (PASS, packet, 0), "{destination}");
                }
            }
        }
        let arp = [[0xff; 12].as_slice(), &[8, 6], &[0; 28]].concat();
        assert_eq!(from_pod(datapath, &arp).retval, PASS);
    });
}

#[test]
fn nothing_goes_into_the_device_while_encryption_is_off() {
    each_family(|datapath, family| {
        datapath.set_encryption(EncryptionMode::Off).expect("set");
        for packet in packets(family.pod, family.remote) {
            assert_eq!(from_pod(datapath, &packet).retval, PASS);
        }
    });
}

#[test]
fn a_service_with_a_remote_backend_is_encrypted_and_its_fragments_are() {
    each_family(|datapath, family| {
        on(datapath);
        for (id, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
            let id = if family.pod.starts_with('[') { id + 2 } else { id };
            Model::new(id, family.service, protocol).grow(datapath, &[family.remote]);
        }
        let sent = Frame::tcp(family.pod, family.service, SYN);
        let run = from_pod(datapath, &sent.bytes());
        assert_eq!(run.retval, REDIRECT);
        assert_eq!(Frame::read(&run.packet).destination, socket_addr(family.remote));

        let mut sent = Frame::udp(family.pod, family.service);
        let transport = sent.transport();
        let fragments = if family.pod.starts_with('[') {
            [(0, 1), (24, 0)].map(|(offset, more): (u8, u8)| {
                sent.extensions = vec![(44, vec![0, 0, 0, offset | more, 0, 0, 0, 9])];
                let from = usize::from(offset);
                sent.around(&transport[from..transport.len().min(from + 24)])
            })
        } else {
            [
                sent.around_fragment(&transport[..24], 0, true),
                sent.around_fragment(&transport[24..], 24, false),
            ]
        };
        for fragment in fragments {
            let run = from_pod(datapath, &fragment);
            assert_eq!(run.retval, REDIRECT);
            assert_ne!(run.packet, fragment, "it goes to the backend");
        }
    });
}

#[test]
fn without_a_device_nothing_leaves_and_it_is_counted() {
    each_family(|datapath, family| {
        mode(datapath, false, false);
        let all = packets(family.pod, family.remote);
        counted(datapath, Counter::EncryptNoDevice, all.len() as u64, || {
            for packet in &all {
                assert_eq!(from_pod(datapath, packet).retval, DROP);
            }
        });
        for destination in [family.neighbour, family.node, family.world, family.without_key] {
            let packet = Frame::udp(family.pod, destination).bytes();
            assert_eq!(from_pod(datapath, &packet).retval, PASS, "{destination}");
        }
    });
}

#[test]
fn a_pod_cannot_speak_as_another_one_or_as_a_node() {
    each_family(|datapath, family| {
        on(datapath);
        for source in [family.neighbour, family.node, family.world, family.other_in_range] {
            let packet = Frame::udp(source, family.remote).bytes();
            counted(datapath, Counter::EncryptForged, 1, || {
                assert_eq!(from_pod(datapath, &packet).retval, DROP, "{source}");
            });
        }
        datapath.remove_local_pod(socket_addr(family.pod).ip()).expect("remove");
        let packet = Frame::udp(family.pod, family.remote).bytes();
        assert_eq!(from_pod(datapath, &packet).retval, DROP, "not known to be the pod's");
    });
}

#[test]
fn what_is_too_big_for_the_device_is_routed_there_by_the_stack() {
    each_family(|datapath, family| {
        on(datapath);
        let mut sent = Frame::udp(family.pod, family.remote);
        let headers = sent.bytes().len() - sent.payload.len() - 14;
        for (len, retval, mark) in [
            (MTU - 1, REDIRECT, 0),
            (MTU, REDIRECT, 0),
            (MTU + 1, PASS, mark::ENCRYPT),
            (3000, PASS, mark::ENCRYPT),
        ] {
            sent.payload = vec![1; len as usize - headers];
            let run = from_pod(datapath, &sent.bytes());
            assert_eq!((run.retval, run.mark), (retval, mark), "{len} bytes");
        }
        // Other bits are another's.
        let context = PacketContext { mark: 0x4000_4121, ..PacketContext::default() };
        let run = datapath.test_run_in(PacketProgram::FromPod, &sent.bytes(), context, 1).expect("a run");
        assert_eq!(run.mark, 0x4000_4e21);
    });
}

#[test]
fn what_is_to_be_segmented_fits_if_its_segments_do() {
    each_family(|datapath, family| {
        on(datapath);
        for protocol in [TCP, UDP] {
            let mut sent = match protocol {
                TCP => Frame::tcp(family.pod, family.remote, ACK),
                _ => Frame::udp(family.pod, family.remote),
            };
            let headers = (sent.bytes().len() - sent.payload.len() - 14) as u32;
            sent.payload = vec![1; 2900];
            for (gso_size, retval) in [(MTU - headers, REDIRECT), (MTU - headers + 1, PASS), (100, REDIRECT)]
            {
                let context = PacketContext { gso_size, ..PacketContext::default() };
                let run = datapath
                    .test_run_in(PacketProgram::FromPod, &sent.bytes(), context, 1)
                    .expect("a test run");
                assert_eq!(run.retval, retval, "segments of {gso_size} bytes of payload");
            }
        }
    });
}

#[test]
fn strict_drops_what_goes_to_a_pod_without_a_key_or_to_nobody_in_a_strict_range() {
    each_family(|datapath, family| {
        let unknown = if family.pod.starts_with('[') { "[fd00:77::1]:80" } else { "10.77.0.1:80" };
        let key = match socket_addr(unknown).ip() {
            IpAddr::V4(_) => IpcacheKey::new("10.77.0.0".parse().expect("an address"), 16),
            IpAddr::V6(_) => IpcacheKey::new("fd00:77::".parse().expect("an address"), 32),
        };
        let entry =
            IpcacheEntry { identity: WORLD, flags: ipcache_flags::STRICT_RANGE, ..Default::default() };
        apply(datapath, &[MapOp::PutIpcache { key, entry }]);
        for destination in [family.without_key, unknown] {
            let packet = Frame::udp(family.pod, destination).bytes();
            on(datapath);
            assert_eq!(from_pod(datapath, &packet).retval, PASS, "{destination}");
            mode(datapath, true, true);
            counted(datapath, Counter::EncryptNoKey, 1, || {
                assert_eq!(from_pod(datapath, &packet).retval, DROP, "{destination}");
            });
        }
    });
}

#[test]
fn strict_takes_nothing_in_the_clear_from_pods_of_other_nodes() {
    each_family(|datapath, family| {
        for source in [family.remote, family.other_in_range, family.without_key] {
            let packet = Frame::udp(source, family.pod).bytes();
            on(datapath);
            assert_eq!(to_pod(datapath, &packet, 0).retval, PASS);
            mode(datapath, true, true);
            counted(datapath, Counter::PlainRefused, 1, || {
                assert_eq!(to_pod(datapath, &packet, 0).retval, DROP, "{source}");
            });
            assert_eq!(to_pod(datapath, &packet, mark::ENCRYPT).retval, DROP, "another mark is no leave");
            assert_eq!(to_pod(datapath, &packet, mark::DECRYPTED | 0x4001).retval, PASS, "{source}");
        }
        for source in [family.neighbour, family.node, family.world] {
            let packet = Frame::udp(source, family.pod).bytes();
            assert_eq!(to_pod(datapath, &packet, 0).retval, PASS, "{source}");
        }
    });
}

#[test]
fn an_answer_through_the_device_comes_from_the_service() {
    each_family(|datapath, family| {
        mode(datapath, true, true);
        let id = if family.pod.starts_with('[') { 6 } else { 5 };
        Model::new(id, family.service, Protocol::Tcp).grow(datapath, &[family.remote]);
        from_pod(datapath, &Frame::tcp(family.pod, family.service, SYN).bytes());
        let answer = Frame::tcp(family.remote, family.pod, SYN | ACK);
        let run = to_pod(datapath, &answer.bytes(), mark::DECRYPTED);
        assert_eq!(run.retval, PASS);
        assert_eq!(Frame::read(&run.packet).source, socket_addr(family.service));
    });
}
