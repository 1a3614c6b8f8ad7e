//! Encryption's way through the kernel: from a pod into the device, out of the other node's and to its pod.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use isthmus_bpf_abi::{Counter, Protocol};
use isthmus_node_agent::datapath::{EncryptionMode, Features, routing};

use crate::model::Model;
use crate::nodes::{MTU, Node, Pipe, pod_addrs, two_nodes};
use crate::packet::Frame;
use crate::pods::{any, never_fragment};
use crate::sandbox::{DEADLINE, eventually, sandbox};
use crate::sockets::{ask_tcp, ask_udp, udp_socket};

/// One address of each family, for those who choose by a service's.
const FAMILIES: [&str; 2] = ["10.96.0.10:80", "[fd00:96::10]:80"];

fn encrypted(nodes: &[Node; 2], strict: bool) -> Pipe {
    let devices = [nodes[0].device(), nodes[1].device()];
    for (node, (device, _)) in nodes.iter().zip(&devices) {
        node.encrypt(Some(*device), strict);
    }
    let [(_, first), (_, second)] = devices;
    Pipe::new(first, second)
}

fn pods_talk_through_the_device(features: Features) {
    sandbox(|sandbox| {
        let nodes = two_nodes(sandbox, features);
        let [here, there] = &nodes;
        let wire = here.sniff();
        for strict in [false, true] {
            let _pipe = encrypted(&nodes, strict);
            for (number, service) in FAMILIES.into_iter().enumerate() {
                let tcp = there.namespace.run(|| there.pod.serve(Protocol::Tcp, service));
                let udp = there.namespace.run(|| there.pod.serve(Protocol::Udp, service));
                let addr = there.pod.addr(service, 8080);
                let id = 1 + 2 * number as u32;
                Model::new(id, service, Protocol::Tcp).grow(&here.datapath, &[&addr]);
                Model::new(id + 1, service, Protocol::Udp).grow(&here.datapath, &[&addr]);
                here.pod.namespace.run(|| {
                    for to in [addr.as_str(), service] {
                        assert_eq!(ask_tcp(to).expect("an answer").to_string(), addr);
                        let (by, from) = ask_udp(&udp_socket(any(to)), to);
                        assert_eq!((by.to_string(), from.to_string()), (addr.clone(), to.to_owned()));
                    }
                });
                drop((tcp, udp));
            }
            assert_eq!(wire.plain(), 0, "nothing may be seen on the wire");
        }
        assert!(here.count(Counter::Encrypted) > 20);
        assert!(here.count(Counter::Decrypted) > 20);
        assert_eq!(here.count(Counter::TcError) + here.count(Counter::EncryptError), 0);

        for node in &nodes {
            node.set(EncryptionMode::Off);
        }
        let service = FAMILIES[0];
        let _tcp = there.namespace.run(|| there.pod.serve(Protocol::Tcp, service));
        here.pod.namespace.run(|| ask_tcp(&there.pod.addr(service, 8080)).expect("an answer"));
        assert!(wire.plain() > 0, "the wire is what is looked at");
    });
}

#[test]
fn pods_of_two_nodes_talk_through_the_device_and_nothing_is_on_the_wire() {
    pods_talk_through_the_device(Features::Detect);
}

#[test]
fn they_do_with_what_the_oldest_kernel_has() {
    pods_talk_through_the_device(Features::Floor);
}

#[test]
fn a_bulk_transfer_finds_the_devices_mtu_and_nothing_of_it_is_fragmented() {
    sandbox(|sandbox| {
        let nodes = two_nodes(sandbox, Features::Detect);
        let [here, there] = &nodes;
        let pipe = encrypted(&nodes, true);
        for service in FAMILIES {
            let addr = there.pod.addr(service, 9000);
            let data: Vec<u8> = (0..4 << 20).map(|number: u32| (number * 31 / 7) as u8).collect();
            let listener = there.pod.namespace.run(|| TcpListener::bind(&addr).expect("a listener"));
            thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().expect("a connection");
                    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
                    let mut taken = vec![0; data.len()];
                    stream.read_exact(&mut taken).expect("all of it");
                    stream.write_all(&taken).expect("all of it");
                });
                here.pod.namespace.run(|| {
                    let mut stream = TcpStream::connect(&addr).expect("connect");
                    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
                    stream.write_all(&data).expect("all of it");
                    let mut back = vec![0; data.len()];
                    stream.read_exact(&mut back).expect("all of it");
                    assert!(back == data, "{service}: it came back changed");
                });
            });
        }
        let seen = pipe.seen();
        assert_eq!(seen.iter().map(Vec::len).max(), Some(MTU as usize), "segments are as large as can be");
        assert_eq!(seen.iter().filter(|packet| is_fragment(packet)).count(), 0);
        // The first segments of each direction are too large, and the pod is told so.
        assert!(here.count(Counter::EncryptTooBig) > 0);
    });
}

#[test]
fn a_datagram_of_every_size_around_the_limit_gets_through_or_is_refused_with_the_right_size() {
    sandbox(|sandbox| {
        let nodes = two_nodes(sandbox, Features::Detect);
        let [here, there] = &nodes;
        let pipe = encrypted(&nodes, true);
        for service in FAMILIES {
            let addr = there.pod.addr(service, 9000);
            let headers = if service.starts_with('[') { 48 } else { 28 };
            let echo = there.pod.namespace.run(|| udp_socket(&addr));
            let arrives = |socket: &UdpSocket, size: u32| {
                let mut buffer = [0; 4000];
                let data = vec![size as u8; (size - headers) as usize];
                eventually("the datagram gets through", || {
                    // Until the path's MTU is known by the sender, one may be lost.
                    if socket.send(&data).is_err() {
                        return false;
                    }
                    echo.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
                    echo.recv(&mut buffer).is_ok_and(|len| buffer[..len] == data)
                });
            };
            // Fragments are allowed: every size gets through, the large ones in fragments that fit.
            let socket = here.pod.namespace.run(|| udp_socket(any(service)));
            socket.connect(&addr).expect("connect");
            for size in (MTU - 12..=MTU + 12).chain([1499, 1500, 1501, 2841, 3000]) {
                arrives(&socket, size);
            }
            // They are not: what fits gets through, what does not is refused with the size that would.
            let socket = here.pod.namespace.run(|| udp_socket(any(service)));
            socket.connect(&addr).expect("connect");
            never_fragment(&socket, service.starts_with('['));
            for size in MTU - 12..=MTU {
                arrives(&socket, size);
            }
            for size in [MTU + 1, MTU + 2, MTU + 12, 1500] {
                eventually("it is refused", || socket.send(&vec![0; (size - headers) as usize]).is_err());
            }
            assert_eq!(known_mtu(&socket, service.starts_with('[')), MTU);
            while echo.recv(&mut [0; 4000]).is_ok() {}
        }
        assert!(pipe.seen().iter().all(|packet| packet.len() <= MTU as usize));
        assert!(pipe.seen().iter().any(|packet| is_fragment(packet)));
    });
}

#[test]
fn while_there_is_no_device_nothing_leaves_and_then_it_flows_again() {
    sandbox(|sandbox| {
        let nodes = two_nodes(sandbox, Features::Detect);
        let [here, there] = &nodes;
        let wire = here.sniff();
        for node in &nodes {
            node.encrypt(None, false);
        }
        let service = FAMILIES[0];
        let _tcp = there.namespace.run(|| there.pod.serve(Protocol::Tcp, service));
        let addr: SocketAddr = there.pod.addr(service, 8080).parse().expect("an address");
        let connect = |within| here.pod.namespace.run(|| TcpStream::connect_timeout(&addr, within));
        // What is dropped is waited for in vain, and not for long.
        let briefly = Duration::from_millis(300);
        connect(briefly).expect_err("nothing can leave");
        assert!(here.count(Counter::EncryptNoDevice) > 0);
        // A device that vanishes before the agent knows takes what is sent to it along.
        let _later;
        let pipe = encrypted(&nodes, false);
        connect(DEADLINE).expect("through the device");
        drop(pipe);
        connect(briefly).expect_err("the device is gone");
        // And what is too big for it: its routes are gone too.
        let socket = here.pod.namespace.run(|| udp_socket("0.0.0.0:0"));
        socket.send_to(&[0; 1460], addr).expect("send");
        assert_eq!(wire.plain(), 0);
        _later = encrypted(&nodes, false);
        connect(DEADLINE).expect("through the new device");
        assert_eq!(wire.plain(), 0);
    });
}

#[test]
fn a_new_agent_takes_over_the_device_and_a_connection_lives_on() {
    sandbox(|sandbox| {
        let [mut here, there] = two_nodes(sandbox, Features::Detect);
        let ((first, first_file), (second, second_file)) = (here.device(), there.device());
        here.encrypt(Some(first), true);
        there.encrypt(Some(second), true);
        let _pipe = Pipe::new(first_file, second_file);
        let service = FAMILIES[1];
        let _tcp = there.namespace.run(|| there.pod.serve(Protocol::Tcp, service));
        let addr = there.pod.addr(service, 8080);
        let mut stream = here.pod.namespace.run(|| TcpStream::connect(&addr).expect("connect"));
        let answers = |stream: &mut TcpStream| {
            assert_eq!(crate::sockets::backend_of(stream).to_string(), addr);
            stream.write_all(b"x").expect("it lives");
        };
        answers(&mut stream);
        let (mode, pods) = (here.datapath.encryption().expect("a mode"), here.datapath.local_pods());
        let pods = pods.expect("pods");
        // Nobody is there.
        here.datapath = sandbox.datapath_with(|config| {
            config.pin_dir.set_file_name("node1");
        });
        answers(&mut stream);
        assert_eq!(here.datapath.encryption().expect("a mode"), mode);
        assert_eq!(here.datapath.local_pods().expect("pods"), pods);
        here.set(mode);
        let before = here.count(Counter::Decrypted);
        answers(&mut stream);
        eventually("it is counted", || here.count(Counter::Decrypted) > before);
        assert!(here.namespace.run(|| here.datapath.attached_pods()).expect("pods") == [here.pod.host_index]);
    });
}

#[test]
fn what_comes_out_of_the_device_reaches_this_node_and_a_pod_that_is_not_known_yet_but_no_other_node() {
    sandbox(|sandbox| {
        let [here, there] = two_nodes(sandbox, Features::Detect);
        let (device, mut file) = here.device();
        here.encrypt(Some(device), true);
        let wire = here.sniff();
        for family in [0, 1] {
            let remote = SocketAddr::new(pod_addrs(2)[family], 9000).to_string();
            let elsewhere = SocketAddr::new(pod_addrs(2)[family], 9001).to_string();
            let mut inject = |to: &str, counter: Counter| {
                let before = here.count(counter);
                file.write_all(&Frame::udp(&remote, to).bytes()[14..]).expect("the device takes it");
                eventually("it is counted", || here.count(counter) == before + 1);
            };
            inject(&elsewhere, Counter::DecryptedElsewhere);
            assert_eq!(wire.plain(), 0, "this node is nobody's router");

            let node = if family == 0 { "172.20.0.1:7000" } else { "[fd00:20::1]:7000" };
            let listener = here.namespace.run(|| udp_socket(node));
            inject(node, Counter::DecryptedToStack);
            listener.recv(&mut [0; 100]).expect("the node gets it");

            let pod = SocketAddr::new(pod_addrs(1)[family], 7000);
            let listener = here.pod.namespace.run(|| udp_socket(&pod.to_string()));
            inject(&pod.to_string(), Counter::Decrypted);
            listener.recv(&mut [0; 100]).expect("the pod gets it");
            let places = here.datapath.local_pods().expect("pods");
            here.datapath.remove_local_pod(pod.ip()).expect("remove");
            inject(&pod.to_string(), Counter::DecryptedToStack);
            listener.recv(&mut [0; 100]).expect("the pod gets it by the stack, in strict mode too");
            for (addr, place) in places {
                here.datapath.put_local_pod(addr, place).expect("a pod");
            }
        }
        drop(there);
    });
}

#[test]
fn strict_drops_what_comes_by_the_wire_and_without_it_that_arrives() {
    sandbox(|sandbox| {
        let [here, there] = two_nodes(sandbox, Features::Detect);
        let (device, _file) = here.device();
        for service in FAMILIES {
            let to = here.pod.addr(service, 7000);
            let listener = here.pod.namespace.run(|| udp_socket(&to));
            let speaker = there.pod.namespace.run(|| udp_socket(any(service)));
            here.encrypt(Some(device), false);
            speaker.send_to(b"in the clear", &to).expect("send");
            listener.recv(&mut [0; 100]).expect("the peer may not encrypt yet");
            here.encrypt(Some(device), true);
            let before = here.count(Counter::PlainRefused);
            speaker.send_to(b"in the clear", &to).expect("send");
            eventually("it is dropped", || here.count(Counter::PlainRefused) > before);
            listener.set_nonblocking(true).expect("a socket");
            listener.recv(&mut [0; 100]).expect_err("nothing has arrived");
        }
    });
}

fn a_pod_without_programs_is_not_heard_in_the_clear(features: Features) {
    sandbox(|sandbox| {
        let nodes = two_nodes(sandbox, features);
        let [here, there] = &nodes;
        let wire = here.sniff();
        here.watch_over();
        here.namespace.run(|| here.datapath.detach_pod(here.pod.host_index).expect("detach"));
        for service in FAMILIES {
            for node in &nodes {
                node.encrypt(None, false);
            }
            let addr = there.pod.addr(service, 7000);
            let listener = there.pod.namespace.run(|| udp_socket(&addr));
            let socket = here.pod.namespace.run(|| udp_socket(any(service)));
            let before = here.count(Counter::EncryptWithheld);
            socket.send_to(b"early", &addr).expect("send");
            eventually("it is withheld", || here.count(Counter::EncryptWithheld) == before + 1);
            let pipe = encrypted(&nodes, true);
            socket.send_to(b"early", &addr).expect("send");
            let (_, from) = listener.recv_from(&mut [0; 100]).expect("through the device");
            listener.send_to(b"answer", from).expect("send");
            socket.recv(&mut [0; 100]).expect("an answer");
            drop(pipe);
        }
        assert_eq!(wire.plain(), 0);
        // The node itself may speak, and so may a pod to those who have no part in this.
        let _later = encrypted(&nodes, true);
        let node = here.namespace.run(|| udp_socket("172.20.0.1:0"));
        let peer = there.namespace.run(|| udp_socket("172.20.0.2:7000"));
        node.send_to(b"x", "172.20.0.2:7000").expect("send");
        peer.recv(&mut [0; 100]).expect("in the clear");
        let pod = here.pod.namespace.run(|| udp_socket("0.0.0.0:0"));
        pod.send_to(b"x", "172.20.0.2:7000").expect("send");
        peer.recv(&mut [0; 100]).expect("in the clear");
        assert!(wire.plain() > 0);
    });
}

#[test]
fn a_pod_whose_programs_are_not_attached_yet_is_not_heard_in_the_clear() {
    a_pod_without_programs_is_not_heard_in_the_clear(Features::Detect);
}

#[test]
fn nor_is_it_with_what_the_oldest_kernel_has() {
    a_pod_without_programs_is_not_heard_in_the_clear(Features::Floor);
}

/// A tag that names no network is none to the kernel: it must not lead past the device.
#[test]
fn a_priority_tag_leads_nowhere_else() {
    sandbox(|sandbox| {
        let nodes = two_nodes(sandbox, Features::Detect);
        let [here, there] = &nodes;
        let _pipe = encrypted(&nodes, false);
        let wire = here.sniff();
        let to = there.pod.addr(FAMILIES[0], 7000);
        let listener = there.pod.namespace.run(|| udp_socket(&to));
        let plain = Frame::udp(&here.pod.addr(FAMILIES[0], 7001), &to).bytes();
        let tagged = |tags: &[u16]| {
            let mut frame = [[2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 2]].concat();
            for tag in tags {
                frame.extend([0x81, 0]);
                frame.extend(tag.to_be_bytes());
            }
            frame.extend(&plain[12..]);
            frame
        };
        here.pod.namespace.run(|| send_frame("eth0", &tagged(&[7 << 13])));
        listener.recv(&mut [0; 100]).expect("the pod gets it");
        let before = here.count(Counter::TcError);
        here.pod.namespace.run(|| send_frame("eth0", &tagged(&[0, 0])));
        eventually("two tags are dropped", || here.count(Counter::TcError) == before + 1);
        assert_eq!(wire.plain(), 0);
    });
}

#[test]
fn the_way_to_the_device_is_removed_without_a_trace() {
    sandbox(|sandbox| {
        let [here, _there] = two_nodes(sandbox, Features::Detect);
        let (_, _file) = here.device();
        let state = || {
            here.namespace.run(|| {
                let output = |arguments: &str| {
                    let mut ip = std::process::Command::new("ip");
                    ip.args(arguments.split(' ')).output().expect("ip").stdout
                };
                let table = routing::TABLE;
                let all = ["rule show", "-6 rule show"].map(str::to_owned).into_iter();
                let all =
                    all.chain([format!("route show table {table}"), format!("-6 route show table {table}")]);
                all.map(|arguments| String::from_utf8_lossy(&output(&arguments)).into_owned())
                    .collect::<Vec<_>>()
                    .join("")
            })
        };
        let made = state();
        let rule = format!("{}:\tfrom all fwmark 0xe00/0xf00 lookup {}", routing::PRIORITY, routing::TABLE);
        assert_eq!(made.matches(&rule).count(), 2, "{made}");
        assert_eq!(made.matches("default dev isthmus_wg0").count(), 2, "{made}");
        assert_eq!(made.matches("blackhole default").count(), 2, "{made}");
        here.namespace.run(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            for _ in 0..2 {
                runtime.block_on(routing::remove()).expect("removed");
            }
        });
        let left = state();
        assert!(!left.contains(&routing::TABLE.to_string()) && !left.contains("isthmus_wg0"), "{left}");
        assert!(!left.contains("blackhole"), "{left}");
    });
}

fn is_fragment(packet: &[u8]) -> bool {
    match packet[0] >> 4 {
        4 => u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0,
        _ => packet[6] == 44,
    }
}

/// The path's MTU as the socket knows it.
fn known_mtu(socket: &UdpSocket, v6: bool) -> u32 {
    use std::os::fd::AsRawFd;
    let (level, option) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_MTU) } else { (libc::IPPROTO_IP, libc::IP_MTU) };
    let mut mtu: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: an int, and its length.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut mtu).cast(), &raw mut len) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    mtu as u32
}

/// Sends a whole frame by an interface of the calling thread's namespace.
fn send_frame(interface: &str, frame: &[u8]) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;
    let packet = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).expect("a socket");
    let ifindex = nix::net::if_::if_nametoindex(interface).expect("the interface");
    // SAFETY: all zero is a valid address.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = ifindex as i32;
    // SAFETY: a live buffer and a live address of these lengths.
    let sent = unsafe {
        libc::sendto(
            packet.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
}
