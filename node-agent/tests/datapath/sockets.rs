//! Load balancing at the socket, with real sockets. No service address is routed in these namespaces: a connection that
//! was not translated cannot even leave.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use isthmus_bpf_abi::{Counter, Protocol};
use isthmus_node_agent::datapath::Features;

use crate::model::{Model, socket_addr};
use crate::sandbox::{DEADLINE, Sandbox, ip, sandbox, until_local};

const SERVICE_V4: &str = "10.96.0.10:80";
const SERVICE_V6: &str = "[fd00:96::10]:80";
const BACKENDS_V4: [&str; 3] = ["127.0.0.11:8080", "127.0.0.12:8080", "127.0.0.13:8081"];
const BACKENDS_V6: [&str; 3] = ["[fd00:2::11]:8080", "[fd00:2::12]:8080", "[fd00:2::13]:8081"];

/// A backend: tells everyone who connects, or sends a datagram, its own address.
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    addr: SocketAddr,
    thread: Option<JoinHandle<()>>,
    protocol: Protocol,
}

impl Server {
    pub(crate) fn start(protocol: Protocol, addr: &str) -> Self {
        let addr = socket_addr(addr);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(addr).expect("a listener");
                thread::spawn(move || serve_tcp(&listener, addr, &stopped))
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(addr).expect("a socket");
                thread::spawn(move || serve_udp(&socket, addr, &stopped))
            }
        };
        Self { stop, addr, thread: Some(thread), protocol }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes it up.
        match self.protocol {
            Protocol::Tcp => drop(TcpStream::connect(self.addr)),
            Protocol::Udp => {
                let any: IpAddr =
                    if self.addr.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() };
                if let Ok(socket) = UdpSocket::bind((any, 0)) {
                    let _ = socket.send_to(b"stop", self.addr);
                }
            }
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(listener: &TcpListener, addr: SocketAddr, stop: &AtomicBool) {
    let mut open: Vec<Weak<TcpStream>> = Vec::new();
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let Ok(stream) = stream.map(Arc::new) else { continue };
        open.retain(|stream| stream.strong_count() > 0);
        open.push(Arc::downgrade(&stream));
        // One line per byte that the client sends; connections are few and short.
        thread::spawn(move || {
            let mut stream = stream.as_ref();
            let mut byte = [0];
            while stream.write_all(format!("{addr}\n").as_bytes()).is_ok()
                && matches!(stream.read(&mut byte), Ok(1))
            {}
        });
    }
    // Those whose client is gone without a word would wait for ever.
    for stream in open.iter().filter_map(Weak::upgrade) {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn serve_udp(socket: &UdpSocket, addr: SocketAddr, stop: &AtomicBool) {
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, client)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(addr.to_string().as_bytes(), client);
        }
    }
}

/// Reads which backend a connection leads to.
pub(crate) fn backend_of(stream: &mut TcpStream) -> SocketAddr {
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).expect("an answer") == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    socket_addr(&String::from_utf8(line).expect("text"))
}

/// Connects and asks.
pub(crate) fn ask_tcp(service: &str) -> std::io::Result<SocketAddr> {
    let mut stream = TcpStream::connect(service)?;
    Ok(backend_of(&mut stream))
}

pub(crate) fn udp_socket(local: &str) -> UdpSocket {
    let socket = UdpSocket::bind(local).expect("a socket");
    socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    socket
}

/// Sends a datagram with `sendmsg()`, and returns which backend answers, and from which address as the socket sees it.
pub(crate) fn ask_udp(socket: &UdpSocket, service: &str) -> (SocketAddr, SocketAddr) {
    socket.send_to(b"who", service).expect("send");
    let mut buffer = [0; 64];
    let (len, from) = socket.recv_from(&mut buffer).expect("an answer");
    (socket_addr(std::str::from_utf8(&buffer[..len]).expect("text")), from)
}

fn with_addresses(test: impl Fn(&Sandbox, &str, [&str; 3]) + Sync) {
    for (service, backends) in [(SERVICE_V4, BACKENDS_V4), (SERVICE_V6, BACKENDS_V6)] {
        sandbox(|sandbox| {
            for backend in BACKENDS_V6 {
                let addr = socket_addr(backend).ip();
                ip(&format!("addr add {addr}/128 dev lo nodad"));
                until_local(&addr.to_string());
            }
            test(sandbox, service, backends);
        });
    }
}

fn any(service: &str) -> &'static str {
    if service.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" }
}

fn count(datapath: &isthmus_node_agent::datapath::Datapath, wanted: Counter) -> u64 {
    let counters = datapath.counters().expect("counters");
    counters.into_iter().find(|(known, _)| *known == wanted).expect("every counter is there").1
}

#[test]
fn tcp_reaches_every_backend_and_the_peer_is_the_service() {
    with_addresses(|sandbox, service, backends| {
        let _servers = backends.map(|addr| Server::start(Protocol::Tcp, addr));
        let datapath = sandbox.datapath();
        Model::new(1, service, Protocol::Tcp).grow(&datapath, &backends);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let mut seen = BTreeSet::new();
        for _ in 0..60 {
            let mut stream = TcpStream::connect(service).expect("connect");
            assert_eq!(stream.peer_addr().expect("a peer"), socket_addr(service));
            seen.insert(backend_of(&mut stream));
        }
        // Sixty throws at three: one in ten thousand million misses.
        assert_eq!(seen, backends.iter().map(|addr| socket_addr(addr)).collect());
        assert_eq!(count(&datapath, Counter::SocketTranslated), 60);
        let flows: u64 = datapath.cluster_flows().expect("counters").iter().map(|(_, count)| count).sum();
        assert_eq!(flows, 60);
    });
}

#[test]
fn without_the_hooks_a_service_address_leads_nowhere() {
    sandbox(|sandbox| {
        let _server = Server::start(Protocol::Tcp, BACKENDS_V4[0]);
        let datapath = sandbox.datapath();
        Model::new(1, SERVICE_V4, Protocol::Tcp).grow(&datapath, &BACKENDS_V4[..1]);
        assert!(TcpStream::connect(SERVICE_V4).is_err());
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        assert!(TcpStream::connect(SERVICE_V4).is_ok());
        datapath.detach_sockets().expect("detach");
        assert!(TcpStream::connect(SERVICE_V4).is_err());
    });
}

#[test]
fn an_ipv6_socket_reaches_an_ipv4_service_by_its_mapped_address() {
    sandbox(|sandbox| {
        let _tcp = Server::start(Protocol::Tcp, BACKENDS_V4[0]);
        let _udp = Server::start(Protocol::Udp, BACKENDS_V4[0]);
        let datapath = sandbox.datapath();
        Model::new(1, SERVICE_V4, Protocol::Tcp).grow(&datapath, &BACKENDS_V4[..1]);
        Model::new(2, SERVICE_V4, Protocol::Udp).grow(&datapath, &BACKENDS_V4[..1]);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let mapped = "[::ffff:10.96.0.10]:80";
        let mut stream = TcpStream::connect(mapped).expect("connect");
        assert_eq!(stream.peer_addr().expect("a peer"), socket_addr(mapped));
        assert_eq!(backend_of(&mut stream), socket_addr(BACKENDS_V4[0]));
        let socket = udp_socket("[::]:0");
        assert_eq!(ask_udp(&socket, mapped), (socket_addr(BACKENDS_V4[0]), socket_addr(mapped)));
    });
}

#[test]
fn a_connected_udp_socket_sees_the_service_as_its_peer_and_as_the_source() {
    with_addresses(|sandbox, service, backends| {
        let _servers = backends.map(|addr| Server::start(Protocol::Udp, addr));
        let datapath = sandbox.datapath();
        Model::new(1, service, Protocol::Udp).grow(&datapath, &backends);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let mut seen = BTreeSet::new();
        for _ in 0..60 {
            let socket = udp_socket(any(service));
            socket.connect(service).expect("connect");
            assert_eq!(socket.peer_addr().expect("a peer"), socket_addr(service));
            socket.send(b"who").expect("send");
            let mut buffer = [0; 64];
            let (len, from) = socket.recv_from(&mut buffer).expect("an answer");
            assert_eq!(from, socket_addr(service));
            seen.insert(socket_addr(std::str::from_utf8(&buffer[..len]).expect("text")));
        }
        assert_eq!(seen.len(), 3);
    });
}

#[test]
fn an_unconnected_udp_socket_keeps_its_backend_until_that_leaves() {
    with_addresses(|sandbox, service, backends| {
        let _servers = backends.map(|addr| Server::start(Protocol::Udp, addr));
        let datapath = sandbox.datapath();
        let mut model = Model::new(1, service, Protocol::Udp);
        model.grow(&datapath, &backends);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let socket = udp_socket(any(service));
        let (first, from) = ask_udp(&socket, service);
        assert_eq!(from, socket_addr(service));
        for _ in 0..30 {
            assert_eq!(ask_udp(&socket, service), (first, socket_addr(service)));
        }
        model.shrink(&datapath, &first.to_string());
        let (second, from) = ask_udp(&socket, service);
        assert_ne!(second, first);
        assert_eq!(from, socket_addr(service));
        // Other sockets choose for themselves.
        let seen: BTreeSet<_> = (0..40).map(|_| ask_udp(&udp_socket(any(service)), service).0).collect();
        assert_eq!(seen.len(), 2);
    });
}

#[test]
fn an_unconnected_udp_socket_stays_with_a_backend_that_takes_nothing_new_and_others_of_its_pod_do_not() {
    with_addresses(|sandbox, service, backends| {
        let _servers = backends.map(|addr| Server::start(Protocol::Udp, addr));
        let datapath = sandbox.datapath();
        for affinity in [0, 3600] {
            let mut model = Model::new(1 + affinity / 3600, service, Protocol::Udp).with_affinity(affinity);
            model.grow(&datapath, &backends[..1]);
            datapath.attach_sockets(&sandbox.cgroup).expect("attach");
            let socket = udp_socket(any(service));
            assert_eq!(ask_udp(&socket, service).0, socket_addr(backends[0]));
            model.grow(&datapath, &backends[1..]);
            model.retire(&datapath, backends[0]);
            for _ in 0..30 {
                assert_ne!(ask_udp(&udp_socket(any(service)), service).0, socket_addr(backends[0]));
                assert_eq!(ask_udp(&socket, service), (socket_addr(backends[0]), socket_addr(service)));
            }
            model.forget(&datapath, backends[0]);
            assert_ne!(ask_udp(&socket, service).0, socket_addr(backends[0]));
        }
    });
}

#[test]
fn session_affinity_brings_nothing_new_to_a_backend_that_takes_nothing_new() {
    with_addresses(|sandbox, service, backends| {
        let _servers = backends.map(|addr| Server::start(Protocol::Tcp, addr));
        let datapath = sandbox.datapath();
        let mut model = Model::new(1, service, Protocol::Tcp).with_affinity(3600);
        model.grow(&datapath, &backends[..1]);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        assert_eq!(ask_tcp(service).expect("connect"), socket_addr(backends[0]));
        model.grow(&datapath, &backends[1..]);
        assert_eq!(ask_tcp(service).expect("connect"), socket_addr(backends[0]));
        model.retire(&datapath, backends[0]);
        let second = ask_tcp(service).expect("connect");
        assert_ne!(second, socket_addr(backends[0]));
        for _ in 0..30 {
            assert_eq!(ask_tcp(service).expect("connect"), second);
        }
    });
}

#[test]
fn answers_of_two_services_with_one_backend_come_from_the_one_that_was_asked_last() {
    sandbox(|sandbox| {
        let _server = Server::start(Protocol::Udp, BACKENDS_V4[0]);
        let datapath = sandbox.datapath();
        Model::new(1, SERVICE_V4, Protocol::Udp).grow(&datapath, &BACKENDS_V4[..1]);
        Model::new(2, "10.96.0.11:53", Protocol::Udp).grow(&datapath, &BACKENDS_V4[..1]);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let socket = udp_socket("0.0.0.0:0");
        for _ in 0..3 {
            assert_eq!(ask_udp(&socket, SERVICE_V4).1, socket_addr(SERVICE_V4));
            assert_eq!(ask_udp(&socket, "10.96.0.11:53").1, socket_addr("10.96.0.11:53"));
        }
    });
}

#[test]
fn a_service_without_backends_refuses_at_once() {
    with_addresses(|sandbox, service, _| {
        let datapath = sandbox.datapath();
        Model::new(1, service, Protocol::Tcp).grow(&datapath, &[]);
        Model::new(2, service, Protocol::Udp).grow(&datapath, &[]);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        // Before 5.18 the kernel can only say EPERM.
        let refused = |error: std::io::Error| {
            assert!(
                matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied),
                "{error}"
            );
        };
        refused(TcpStream::connect(service).expect_err("no backend"));
        refused(udp_socket(any(service)).connect(service).expect_err("no backend"));
        refused(udp_socket(any(service)).send_to(b"who", service).expect_err("no backend"));
        assert_eq!(count(&datapath, Counter::SocketNoBackend), 3);
    });
}

#[test]
fn the_oldest_kernel_refuses_with_another_error() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| config.features = Features::Floor);
        Model::new(1, SERVICE_V4, Protocol::Tcp).grow(&datapath, &[]);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let error = TcpStream::connect(SERVICE_V4).expect_err("no backend");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    });
}

#[test]
fn addresses_that_are_no_services_are_left_alone() {
    with_addresses(|sandbox, service, backends| {
        let _tcp = Server::start(Protocol::Tcp, backends[0]);
        let _udp = Server::start(Protocol::Udp, backends[0]);
        let datapath = sandbox.datapath();
        Model::new(1, service, Protocol::Tcp).grow(&datapath, &[backends[1]]);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let mut stream = TcpStream::connect(backends[0]).expect("connect");
        assert_eq!(stream.peer_addr().expect("a peer"), socket_addr(backends[0]));
        assert_eq!(backend_of(&mut stream), socket_addr(backends[0]));
        let asked = ask_udp(&udp_socket(any(service)), backends[0]);
        assert_eq!(asked, (socket_addr(backends[0]), socket_addr(backends[0])));
        assert_eq!(count(&datapath, Counter::SocketTranslated), 0);
    });
}

#[test]
fn session_affinity_keeps_a_pod_with_its_backend_until_the_timeout() {
    with_addresses(|sandbox, service, backends| {
        let _servers = backends.map(|addr| Server::start(Protocol::Tcp, addr));
        let datapath = sandbox.datapath();
        let mut model = Model::new(1, service, Protocol::Tcp).with_affinity(3600);
        model.grow(&datapath, &backends);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let first = ask_tcp(service).expect("connect");
        for _ in 0..30 {
            assert_eq!(ask_tcp(service).expect("connect"), first);
        }
        model.shrink(&datapath, &first.to_string());
        let second = ask_tcp(service).expect("connect");
        assert_ne!(second, first);
        for _ in 0..30 {
            assert_eq!(ask_tcp(service).expect("connect"), second);
        }
        // With a timeout of a second the choice is free again after it.
        let mut model = Model::new(2, &service.replace(":80", ":81"), Protocol::Tcp).with_affinity(1);
        model.grow(&datapath, &backends);
        let service = model.addr().to_string();
        let first = ask_tcp(&service).expect("connect");
        crate::sandbox::eventually("another backend after the timeout", || {
            // Every connection begins the timeout anew.
            let asked = Instant::now();
            crate::sandbox::eventually("the timeout", || asked.elapsed() > Duration::from_millis(1100));
            ask_tcp(&service).expect("connect") != first
        });
    });
}
