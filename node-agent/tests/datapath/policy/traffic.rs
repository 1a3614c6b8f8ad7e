//! Real sockets in pods behind veths, on a node that forwards between them.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};

use isthmus_bpf_abi::{Counter, Direction, IpcacheEntry, IpcacheKey, Protocol};
use isthmus_node_agent::datapath::{AtFirst, Datapath, EndpointSettings, Features, MapOp};

use super::{BOTH, EGRESS, INGRESS, NEITHER, all_of, allowed, port};
use crate::model::{Model, apply, socket_addr};
use crate::packet::TCP;
use crate::pods::{Pod, SERVICES, any, node};
use crate::sandbox::{DEADLINE, eventually, sandbox};
use crate::sockets::{ask_tcp, ask_udp, udp_socket};

/// Identity of the pod with this number.
fn identity(pod: &Pod) -> u32 {
    66_000 + pod.number
}

/// Makes the pods known, in the ipcache too.
fn know(datapath: &Datapath, pods: &[Pod], at_first: AtFirst) {
    for pod in pods {
        let mut settings = EndpointSettings { identity: identity(pod), ..EndpointSettings::default() };
        for service in SERVICES {
            let addr = socket_addr(&pod.addr(service, 0)).ip();
            match addr {
                std::net::IpAddr::V4(addr) => settings.ipv4 = Some(addr),
                std::net::IpAddr::V6(addr) => settings.ipv6 = Some(addr),
            }
            let entry = IpcacheEntry { identity: identity(pod), ..IpcacheEntry::default() };
            apply(datapath, &[MapOp::PutIpcache { key: IpcacheKey::host(addr), entry }]);
        }
        datapath.put_endpoint(pod.host_index, &settings, at_first).expect("an endpoint");
    }
}

fn dropped(datapath: &Datapath) -> u64 {
    let counters = datapath.counters().expect("counters").into_iter();
    let drops = [Counter::PolicyNoRule, Counter::PolicyDenied, Counter::PolicyWaiting];
    counters.filter(|(counter, _)| drops.contains(counter)).map(|(_, count)| count).sum()
}

/// A connection, both ends of it.
struct Connection {
    client: TcpStream,
    server: TcpStream,
}

impl Connection {
    fn new(client: &Pod, server: &Pod, addr: &str) -> Self {
        let listener = server.namespace.run(|| TcpListener::bind(addr).expect("a listener"));
        let client = client.namespace.run(|| TcpStream::connect(addr).expect("a connection"));
        let (server, _) = listener.accept().expect("a connection");
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        }
        Self { client, server }
    }

    fn speak_both_ways(&mut self) {
        speak(&mut self.client, &mut self.server);
        speak(&mut self.server, &mut self.client);
    }

    /// What both say is dropped, and the other hears nothing.
    fn is_cut_both_ways(&mut self, datapath: &Datapath) {
        loses(datapath, &mut self.client, &mut self.server);
        loses(datapath, &mut self.server, &mut self.client);
    }

    /// TCP sends again what was lost.
    fn goes_on(&mut self) {
        for stream in [&mut self.client, &mut self.server] {
            let mut lost = [0; 4];
            stream.read_exact(&mut lost).expect("what was lost");
            assert_eq!(&lost, b"lost");
        }
        self.speak_both_ways();
    }
}

fn speak(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"word").expect("send");
    let mut heard = [0; 4];
    to.read_exact(&mut heard).expect("it arrives");
    assert_eq!(&heard, b"word");
}

fn loses(datapath: &Datapath, from: &mut TcpStream, to: &mut TcpStream) {
    let before = dropped(datapath);
    from.write_all(b"lost").expect("it is not told");
    eventually("it is dropped", || dropped(datapath) > before);
    to.set_nonblocking(true).expect("an option");
    let error = to.read(&mut [0; 8]).expect_err("nothing comes");
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
    to.set_nonblocking(false).expect("an option");
}

fn connections_live_as_long_as_their_rule(features: Features) {
    sandbox(|sandbox| {
        let (datapath, pods) = node(sandbox, features);
        know(&datapath, &pods, AtFirst::Pass);
        let [client, server, other] = &pods;
        for service in SERVICES {
            datapath.replace_policy(server.host_index, NEITHER, &[]).expect("no policy");
            datapath.replace_policy(client.host_index, NEITHER, &[]).expect("no policy");
            let addr = server.addr(service, 9000);
            let mut connection = Connection::new(client, server, &addr);
            connection.speak_both_ways();
            // The first policies come while the connection lives.
            let from_client = (port(identity(client), Direction::Ingress, TCP, 9000), allowed());
            let to_server = (port(identity(server), Direction::Egress, TCP, 9000), allowed());
            datapath.replace_policy(server.host_index, BOTH, &[from_client]).expect("a policy");
            datapath.replace_policy(client.host_index, BOTH, &[to_server]).expect("a policy");
            connection.speak_both_ways();
            // A new one passes the same rules.
            Connection::new(client, server, &server.addr(service, 9000)).speak_both_ways();
            // Changes that are about others.
            let from_other = (all_of(identity(other), Direction::Ingress), allowed());
            datapath.update_policy(server.host_index, &[from_other], &[]).expect("an update");
            connection.speak_both_ways();
            datapath.replace_policy(server.host_index, INGRESS, &[from_client]).expect("a policy");
            connection.speak_both_ways();
            // The server's rule is revoked, then the client's.
            datapath.update_policy(server.host_index, &[], &[from_client.0]).expect("an update");
            connection.is_cut_both_ways(&datapath);
            datapath.update_policy(server.host_index, &[from_client], &[]).expect("an update");
            connection.goes_on();
            datapath.replace_policy(client.host_index, EGRESS, &[]).expect("a policy");
            connection.is_cut_both_ways(&datapath);
            datapath.replace_policy(client.host_index, EGRESS, &[to_server]).expect("a policy");
            connection.goes_on();
        }
    });
}

#[test]
fn connections_live_as_long_as_their_rule_does() {
    connections_live_as_long_as_their_rule(Features::Detect);
}

#[test]
fn connections_live_as_long_as_their_rule_does_with_what_the_oldest_kernel_has() {
    connections_live_as_long_as_their_rule(Features::Floor);
}

fn a_closed_pod_reaches_itself(features: Features) {
    sandbox(|sandbox| {
        let (datapath, pods) = node(sandbox, features);
        know(&datapath, &pods, AtFirst::Wait);
        let [pod, ..] = &pods;
        datapath.replace_policy(pod.host_index, BOTH, &[]).expect("a policy");
        for (number, service) in SERVICES.into_iter().enumerate() {
            let _tcp = pod.serve(Protocol::Tcp, service);
            let _udp = pod.serve(Protocol::Udp, service);
            let own = pod.addr(service, 8080);
            Model::new(1 + 2 * number as u32, service, Protocol::Tcp).grow(&datapath, &[&own]);
            Model::new(2 + 2 * number as u32, service, Protocol::Udp).grow(&datapath, &[&own]);
            pod.namespace.run(|| {
                assert_eq!(ask_tcp(service).expect("connect"), socket_addr(&own));
                let (answered, from) = ask_udp(&udp_socket(any(service)), service);
                assert_eq!((answered, from), (socket_addr(&own), socket_addr(service)));
            });
        }
        assert_eq!(dropped(&datapath), 0);
    });
}

#[test]
fn a_pod_that_may_do_nothing_reaches_itself_through_a_service() {
    a_closed_pod_reaches_itself(Features::Detect);
}

#[test]
fn a_pod_that_may_do_nothing_reaches_itself_through_a_service_with_what_the_oldest_kernel_has() {
    a_closed_pod_reaches_itself(Features::Floor);
}

#[test]
fn the_node_reaches_a_pod_that_waits_and_other_pods_do_not() {
    sandbox(|sandbox| {
        let (datapath, pods) = node(sandbox, Features::Detect);
        know(&datapath, &pods, AtFirst::Pass);
        let [waiting, other, _] = &pods;
        datapath.remove_endpoint(waiting.host_index).expect("removed");
        know(&datapath, &pods[..1], AtFirst::Wait);
        for service in SERVICES {
            let server = waiting.serve(Protocol::Tcp, service);
            assert_eq!(ask_tcp(&server.addr).expect("connect"), socket_addr(&server.addr));
            let before = dropped(&datapath);
            let socket = other.namespace.run(|| udp_socket(any(service)));
            socket.send_to(b"who", &server.addr).expect("send");
            eventually("it is dropped", || dropped(&datapath) > before);
            // What the pod sends to the node is up to its policy, which nobody knows.
            let before = dropped(&datapath);
            let gateway = server.addr.replace(".2:8080", ".1:9").replace("::2]:8080", "::1]:9");
            let socket = waiting.namespace.run(|| udp_socket(any(service)));
            socket.send_to(b"who", &gateway).expect("send");
            eventually("it is dropped", || dropped(&datapath) > before);
        }
    });
}

#[test]
fn a_pod_learns_at_once_that_nobody_listens_where_it_may_go() {
    sandbox(|sandbox| {
        let (datapath, pods) = node(sandbox, Features::Detect);
        know(&datapath, &pods, AtFirst::Pass);
        let [client, server, _] = &pods;
        let to_server = (all_of(identity(server), Direction::Egress), allowed());
        datapath.replace_policy(client.host_index, BOTH, &[to_server]).expect("a policy");
        datapath
            .replace_policy(server.host_index, BOTH, &[(all_of(0, Direction::Ingress), allowed())])
            .expect("a policy");
        for service in SERVICES {
            let addr = server.addr(service, 9999);
            client.namespace.run(|| {
                // A reset, and "port unreachable" about a datagram: neither has a rule of its own.
                let refused = TcpStream::connect(&addr).expect_err("nobody listens");
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
                let socket = udp_socket(any(service));
                socket.connect(&addr).expect("connect");
                eventually("the error arrives", || {
                    socket.send(b"who").is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
                });
            });
        }
    });
}
