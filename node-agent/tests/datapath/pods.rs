//! The TC path: pods in namespaces of their own behind veths, a node that forwards between them, and no socket hooks.
//!
//! ```text
//! client 10.0.1.2 ── host1 ┐
//! backend 10.0.2.2 ─ host2 ┼─ the test's namespace: the node
//! backend 10.0.3.2 ─ host3 ┘
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use isthmus_bpf_abi::{Counter, Protocol};
use isthmus_node_agent::datapath::{Datapath, Features};

use crate::model::{Model, socket_addr};
use crate::sandbox::{DEADLINE, Namespace, Sandbox, ip, sandbox, until_local};
use crate::sockets::{Server, ask_tcp, ask_udp, backend_of, udp_socket};

pub(crate) const SERVICES: [&str; 2] = ["10.96.0.10:80", "[fd00:96::10]:80"];

pub(crate) struct Pod {
    pub(crate) namespace: Namespace,
    pub(crate) host_index: u32,
    pub(crate) number: u32,
}

impl Pod {
    /// A pod on the calling thread's node.
    pub(crate) fn new(number: u32) -> Self {
        let namespace = Namespace::new();
        ip(&format!("link add host{number} type veth peer name eth0 netns {}", namespace.path()));
        ip(&format!("addr add 10.0.{number}.1/24 dev host{number}"));
        ip(&format!("addr add fd00:{number}::1/64 dev host{number} nodad"));
        ip(&format!("link set host{number} up"));
        namespace.run(|| {
            ip(&format!("addr add 10.0.{number}.2/24 dev eth0"));
            ip(&format!("addr add fd00:{number}::2/64 dev eth0 nodad"));
            ip("link set eth0 up");
            until_local(&format!("fd00:{number}::2"));
            ip(&format!("route add default via 10.0.{number}.1"));
            ip(&format!("-6 route add default via fd00:{number}::1"));
        });
        until_local(&format!("fd00:{number}::1"));
        let host_index =
            nix::net::if_::if_nametoindex(format!("host{number}").as_str()).expect("the interface");
        Self { namespace, host_index, number }
    }

    /// Its address of the same family as `service`.
    pub(crate) fn addr(&self, service: &str, port: u16) -> String {
        if service.starts_with('[') {
            format!("[fd00:{}::2]:{port}", self.number)
        } else {
            format!("10.0.{}.2:{port}", self.number)
        }
    }

    pub(crate) fn serve(&self, protocol: Protocol, service: &str) -> Served<'_> {
        let addr = self.addr(service, 8080);
        let server = self.namespace.run(|| Server::start(protocol, &addr));
        Served { pod: self, server: Some(server), addr }
    }
}

pub(crate) struct Served<'a> {
    pod: &'a Pod,
    server: Option<Server>,
    pub(crate) addr: String,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        let server = self.server.take();
        // It is woken up by a connection, which must begin where it can arrive.
        self.pod.namespace.run(|| drop(server));
    }
}

/// A client and two other pods, on a node that forwards.
pub(crate) fn node(sandbox: &Sandbox, features: Features) -> (Datapath, [Pod; 3]) {
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        fs::write(format!("/proc/sys/net/{setting}"), "1").expect("forwarding");
    }
    let pods = [Pod::new(1), Pod::new(2), Pod::new(3)];
    let datapath = sandbox.datapath_with(|config| config.features = features);
    for pod in &pods {
        datapath.attach_pod(pod.host_index).expect("attach");
    }
    (datapath, pods)
}

fn count(datapath: &Datapath, wanted: Counter) -> u64 {
    let counters = datapath.counters().expect("counters");
    counters.into_iter().find(|(known, _)| *known == wanted).expect("every counter is there").1
}

pub(crate) fn any(service: &str) -> &'static str {
    if service.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" }
}

fn a_pod_reaches_services(features: Features) {
    sandbox(|sandbox| {
        let (datapath, [client, first, second]) = node(sandbox, features);
        for (number, service) in SERVICES.into_iter().enumerate() {
            let _tcp = [first.serve(Protocol::Tcp, service), second.serve(Protocol::Tcp, service)];
            let _udp = [first.serve(Protocol::Udp, service), second.serve(Protocol::Udp, service)];
            let backends = [first.addr(service, 8080), second.addr(service, 8080)];
            let backends = [backends[0].as_str(), backends[1].as_str()];
            Model::new(1 + 2 * number as u32, service, Protocol::Tcp).grow(&datapath, &backends);
            Model::new(2 + 2 * number as u32, service, Protocol::Udp).grow(&datapath, &backends);
            let all: BTreeSet<SocketAddr> = backends.iter().map(|addr| socket_addr(addr)).collect();
            client.namespace.run(|| {
                let seen: BTreeSet<_> = (0..40).map(|_| ask_tcp(service).expect("connect")).collect();
                assert_eq!(seen, all);
                // All are kept: a port that is given to a second socket would go on with the first one's flow.
                let sockets: Vec<_> = (0..40).map(|_| udp_socket(any(service))).collect();
                let seen: BTreeSet<_> = sockets
                    .iter()
                    .map(|socket| {
                        let (backend, from) = ask_udp(socket, service);
                        assert_eq!(from, socket_addr(service));
                        for _ in 0..3 {
                            assert_eq!(ask_udp(socket, service), (backend, from));
                        }
                        backend
                    })
                    .collect();
                assert_eq!(seen, all);
                assert_eq!(ask_tcp(backends[0]).expect("without the service"), socket_addr(backends[0]));
            });
        }
        assert_eq!(count(&datapath, Counter::TcError), 0);
        assert_eq!(count(&datapath, Counter::TcNewFlow), 160);
    });
}

#[test]
fn a_pod_reaches_services_by_tcp_and_udp_over_ipv4_and_ipv6() {
    a_pod_reaches_services(Features::Detect);
}

#[test]
fn a_pod_reaches_services_with_what_the_oldest_kernel_has() {
    a_pod_reaches_services(Features::Floor);
}

#[test]
fn a_megabyte_each_way_arrives_whole() {
    sandbox(|sandbox| {
        let (datapath, [client, server, _]) = node(sandbox, Features::Detect);
        for (number, service) in SERVICES.into_iter().enumerate() {
            let backend = server.addr(service, 9000);
            Model::new(1 + number as u32, service, Protocol::Tcp).grow(&datapath, &[&backend]);
            let data: Vec<u8> = (0..1 << 20).map(|number: u32| (number * 31 / 7) as u8).collect();
            let listener = server.namespace.run(|| TcpListener::bind(&backend).expect("a listener"));
            thread::scope(|scope| {
                // An echo that first takes everything: segments are as large as offloading makes them.
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().expect("a connection");
                    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
                    let mut taken = vec![0; data.len()];
                    stream.read_exact(&mut taken).expect("all of it");
                    stream.write_all(&taken).expect("all of it");
                });
                client.namespace.run(|| {
                    let mut stream = TcpStream::connect(service).expect("connect");
                    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
                    stream.write_all(&data).expect("all of it");
                    let mut back = vec![0; data.len()];
                    stream.read_exact(&mut back).expect("all of it");
                    assert!(back == data, "{service}: it came back changed");
                });
            });
        }
    });
}

#[test]
fn large_datagrams_arrive_in_fragments_both_ways() {
    sandbox(|sandbox| {
        let (datapath, [client, server, _]) = node(sandbox, Features::Detect);
        for (number, service) in SERVICES.into_iter().enumerate() {
            let backend = server.addr(service, 9000);
            Model::new(1 + number as u32, service, Protocol::Udp).grow(&datapath, &[&backend]);
            let data: Vec<u8> = (0..5000u32).map(|number| (number * 31 / 7) as u8).collect();
            let echo = server.namespace.run(|| udp_socket(&backend));
            let socket = client.namespace.run(|| udp_socket(any(service)));
            socket.send_to(&data, service).expect("send");
            let mut buffer = [0; 8000];
            let (len, from) = echo.recv_from(&mut buffer).expect("all fragments");
            assert!(buffer[..len] == data, "{service}: it arrived changed");
            echo.send_to(&buffer[..len], from).expect("send back");
            let (len, from) = socket.recv_from(&mut buffer).expect("all fragments");
            assert!(buffer[..len] == data, "{service}: it came back changed");
            assert_eq!(from, socket_addr(service));
        }
        // Four fragments each way, the first of which is a packet like any other; veths may carry IPv6 whole.
        assert!(count(&datapath, Counter::TcFragment) >= 6);
    });
}

#[test]
fn a_smaller_mtu_behind_the_service_is_found() {
    sandbox(|sandbox| {
        let (datapath, [client, server, _]) = node(sandbox, Features::Detect);
        ip("link set host2 mtu 1300");
        for (number, service) in SERVICES.into_iter().enumerate() {
            let backend = server.addr(service, 9000);
            Model::new(1 + number as u32, service, Protocol::Udp).grow(&datapath, &[&backend]);
            let _listening = server.namespace.run(|| udp_socket(&backend));
            client.namespace.run(|| {
                let socket = udp_socket(any(service));
                socket.connect(service).expect("connect");
                never_fragment(&socket, service.starts_with('['));
                // The first is lost on the way; the error about it reaches the socket, and with it the path's MTU.
                crate::sandbox::eventually("the kernel refuses what does not fit", || {
                    match socket.send(&[0; 1400]) {
                        Ok(_) => false,
                        Err(error) => {
                            assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{error}");
                            true
                        }
                    }
                });
                // The error was also left at the socket, for whoever sends next.
                let _ = socket.take_error();
                socket.send(&[0; 1200]).expect("what fits");
                let error = socket.send(&[0; 1400]).expect_err("known by now");
                assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{error}");
            });
        }
        assert!(count(&datapath, Counter::TcIcmp) >= 2);
    });
}

pub(crate) fn never_fragment(socket: &std::net::UdpSocket, v6: bool) {
    use std::os::fd::AsRawFd;
    let (level, option, value) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
    };
    let value: libc::c_int = value;
    // SAFETY: an int of the socket's own option.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_pod_that_is_its_own_only_backend_reaches_itself() {
    sandbox(|sandbox| {
        let (datapath, [pod, _, _]) = node(sandbox, Features::Detect);
        for (number, service) in SERVICES.into_iter().enumerate() {
            let _tcp = pod.serve(Protocol::Tcp, service);
            let udp = pod.serve(Protocol::Udp, service);
            Model::new(1 + 2 * number as u32, service, Protocol::Tcp).grow(&datapath, &[&udp.addr]);
            Model::new(2 + 2 * number as u32, service, Protocol::Udp).grow(&datapath, &[&udp.addr]);
            pod.namespace.run(|| {
                assert_eq!(ask_tcp(service).expect("connect"), socket_addr(&udp.addr));
                let asked = ask_udp(&udp_socket(any(service)), service);
                assert_eq!(asked, (socket_addr(&udp.addr), socket_addr(service)));
            });
        }
        assert!(count(&datapath, Counter::TcHairpin) > 0);
    });
}

#[test]
fn a_service_without_backends_refuses_connections_and_datagrams() {
    sandbox(|sandbox| {
        let (datapath, [client, ..]) = node(sandbox, Features::Detect);
        for (number, service) in SERVICES.into_iter().enumerate() {
            Model::new(1 + 2 * number as u32, service, Protocol::Tcp).grow(&datapath, &[]);
            Model::new(2 + 2 * number as u32, service, Protocol::Udp).grow(&datapath, &[]);
            client.namespace.run(|| {
                let error = TcpStream::connect(service).expect_err("no backend");
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                // Shorter and longer than the error that comes back.
                for len in [0, 1000] {
                    let socket = udp_socket(any(service));
                    socket.connect(service).expect("connect");
                    socket.send(&vec![0; len]).expect("send");
                    let error = socket.recv(&mut [0; 8]).expect_err("no backend");
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                }
            });
        }
        assert_eq!(count(&datapath, Counter::TcNoBackend), 6);
    });
}

#[test]
fn an_open_connection_survives_a_change_of_agents_and_other_backends() {
    sandbox(|sandbox| {
        let (first_agent, [client, one, two]) = node(sandbox, Features::Detect);
        let service = SERVICES[0];
        let _servers = [one.serve(Protocol::Tcp, service), two.serve(Protocol::Tcp, service)];
        let mut model = Model::new(1, service, Protocol::Tcp);
        model.grow(&first_agent, &[&one.addr(service, 8080)]);
        let mut stream = client.namespace.run(|| TcpStream::connect(service).expect("connect"));
        let backend = backend_of(&mut stream);
        drop(first_agent);
        stream.write_all(b"x").expect("nobody is there");
        assert_eq!(backend_of(&mut stream), backend);
        let second_agent = sandbox.datapath();
        second_agent.attach_pod(client.host_index).expect("take over");
        model.grow(&second_agent, &[&two.addr(service, 8080)]);
        for _ in 0..20 {
            stream.write_all(b"x").expect("it lives");
            assert_eq!(backend_of(&mut stream), backend);
        }
    });
}
