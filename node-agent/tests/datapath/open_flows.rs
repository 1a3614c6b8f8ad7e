//! What is open goes on where it is while what is new goes elsewhere: pods behind veths, as in [`pods`](crate::pods), and the
//! agent's own decisions and plans between the mesh and the maps.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use isthmus_bpf_abi::{Backend, Protocol};
use isthmus_node_agent::datapath::{Datapath, Features};
use isthmus_node_agent::mesh::fact::{
    Affinity, Backend as Fact, ClusterConfig, Condition, LocalService, Moment, Port, Provenance,
    RemoteService, ServiceName,
};
use isthmus_node_agent::mesh::{MeshEvent, Own, Resource};
use isthmus_node_agent::reconcile::{Maps, Policy, Reconciler};

use crate::model::socket_addr;
use crate::pods::{Pod, SERVICES, any, node};
use crate::sandbox::{SIZES, Sandbox, sandbox};
use crate::sockets::{ask_tcp, ask_udp, backend_of, udp_socket};

/// What makes a backend one that takes nothing new.
#[derive(Clone, Copy, Debug)]
enum Reason {
    /// Its pod is on its way out.
    Terminating,
    /// Its cluster is being disconnected.
    Draining,
    /// Another cluster's backends are preferred.
    NotPreferred,
}

/// Before, the first pod is all that the service has. Then there is the second, and the first takes nothing new. At last it is
/// gone.
#[derive(Clone, Copy, PartialEq)]
enum Time {
    Before,
    Beside,
    Gone,
}

#[test]
fn a_connection_stays_with_a_backend_that_takes_nothing_new_until_that_is_gone() {
    for reason in [Reason::Terminating, Reason::Draining, Reason::NotPreferred] {
        sandbox(|sandbox| {
            let (datapath, [client, old, new]) = node(sandbox, Features::Detect);
            let mut agent = Agent::new(datapath);
            for service in SERVICES {
                let servers = [Protocol::Tcp, Protocol::Udp]
                    .map(|protocol| [old.serve(protocol, service), new.serve(protocol, service)]);
                let [old_addr, new_addr] = servers[0].each_ref().map(|server| socket_addr(&server.addr));
                agent.tell(story(service, reason, Time::Before, [&old, &new]));
                agent.is_told_all();
                let mut stream = client.namespace.run(|| TcpStream::connect(service).expect("connect"));
                assert_eq!(backend_of(&mut stream), old_addr);
                let socket = client.namespace.run(|| udp_socket(any(service)));
                assert_eq!(ask_udp(&socket, service).0, old_addr);

                agent.tell(story(service, reason, Time::Beside, [&old, &new]));
                let new_ones_go_to = |wanted| {
                    client.namespace.run(|| {
                        for _ in 0..20 {
                            assert_eq!(ask_tcp(service).expect("connect"), wanted, "{reason:?}");
                        }
                    });
                };
                let mut goes_on = || {
                    stream.write_all(b"x").expect("it lives");
                    assert_eq!(backend_of(&mut stream), old_addr, "{reason:?}");
                    assert_eq!(ask_udp(&socket, service), (old_addr, socket_addr(service)), "{reason:?}");
                };
                new_ones_go_to(new_addr);
                goes_on();
                assert_eq!(agent.open_only(service), [old_addr, old_addr], "TCP and UDP: {reason:?}");

                // The agent is replaced by another one, which reads everything anew.
                agent = agent.restarted(sandbox, &client, story(service, reason, Time::Beside, [&old, &new]));
                assert_eq!(agent.open_only(service), [old_addr, old_addr], "{reason:?}");
                goes_on();
                new_ones_go_to(new_addr);

                agent.tell(story(service, reason, Time::Gone, [&old, &new]));
                assert_eq!(agent.open_only(service), []);
                assert_eq!(agent.backends(service).len(), 2);
                // The one that is left knows nothing of the connection.
                stream.write_all(b"x").expect("nothing is known yet");
                let error = std::io::Read::read(&mut stream, &mut [0]).expect_err("it ends");
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
                assert_eq!(ask_udp(&socket, service).0, new_addr);
            }
        });
    }
}

#[test]
fn a_connection_stays_with_a_backend_that_is_chosen_again() {
    sandbox(|sandbox| {
        let (datapath, [client, old, new]) = node(sandbox, Features::Detect);
        let service = SERVICES[0];
        let _servers = [old.serve(Protocol::Tcp, service), new.serve(Protocol::Tcp, service)];
        let mut agent = Agent::new(datapath);
        agent.tell(story(service, Reason::Draining, Time::Before, [&old, &new]));
        agent.is_told_all();
        let mut stream = client.namespace.run(|| TcpStream::connect(service).expect("connect"));
        let backend = backend_of(&mut stream);
        for time in [Time::Beside, Time::Before, Time::Beside] {
            agent.tell(story(service, Reason::Draining, time, [&old, &new]));
            let retired = agent.open_only(service).len();
            assert_eq!(retired, if time == Time::Beside { 2 } else { 0 }, "TCP and UDP");
            stream.write_all(b"x").expect("it lives");
            assert_eq!(backend_of(&mut stream), backend);
        }
    });
}

/// The agent without its sources.
struct Agent {
    reconciler: Reconciler,
    maps: Arc<Datapath>,
}

impl Agent {
    fn new(datapath: Datapath) -> Self {
        let mut maps = Arc::new(datapath);
        let own = Own { cluster: "alpha".into(), id: 1, node: "node-0".into(), identity_shift: 16 };
        let policy = Policy {
            all_services: false,
            sync_timeout: Duration::from_secs(60),
            backend_capacity: SIZES.backends,
        };
        let dump = Maps::dump(&mut maps).expect("a dump");
        Self { reconciler: Reconciler::new(own, policy, &dump), maps }
    }

    /// The next agent. It hears of its own cluster first, and of the peer when that was planned.
    fn restarted(self, sandbox: &Sandbox, client: &Pod, story: Vec<MeshEvent>) -> Self {
        drop(self);
        let datapath = sandbox.datapath();
        datapath.attach_pod(client.host_index).expect("take over");
        let mut next = Self::new(datapath);
        let (own, peers) =
            story.into_iter().partition(|event| matches!(event, MeshEvent::LocalService { .. }));
        next.tell(own);
        next.tell([synced("alpha"), peers].concat());
        next.is_told_all();
        next
    }

    /// Hears that there is nothing more to be read.
    fn is_told_all(&mut self) {
        self.tell([synced("alpha"), synced("beta")].concat());
        assert!(self.reconciler.is_started());
    }

    /// Takes the events in, and changes the maps.
    fn tell(&mut self, story: Vec<MeshEvent>) {
        for event in story {
            self.reconciler.event(event, Provenance::default()).expect("it counts");
        }
        let (ops, _) = self.reconciler.plan(Moment::default(), false);
        let results = Maps::apply(&mut self.maps, &ops);
        assert!(self.reconciler.confirm(&ops, &results).is_empty(), "{results:?}");
    }

    /// The service's records, of both protocols.
    fn backends(&self, service: &str) -> Vec<Backend> {
        let service = socket_addr(service);
        let frontends = self.maps.services().expect("services");
        let ids: Vec<_> = frontends
            .into_iter()
            .filter(|(key, _)| SocketAddr::new(key.addr.ip(), key.port()) == service)
            .map(|(_, service)| service.id)
            .collect();
        let backends = self.maps.backends().expect("backends").into_iter().map(|(_, backend)| backend);
        backends.filter(|backend| ids.contains(&backend.service)).collect()
    }

    /// Those that take nothing new.
    fn open_only(&self, service: &str) -> Vec<SocketAddr> {
        let backends = self.backends(service).into_iter().filter(|backend| !backend.takes_new());
        backends.map(|backend| SocketAddr::new(backend.addr.ip(), backend.port())).collect()
    }
}

/// What the mesh says of the service at that time.
fn story(service: &str, reason: Reason, time: Time, [old, new]: [&Pod; 2]) -> Vec<MeshEvent> {
    let name = ServiceName::new("default", if service.starts_with('[') { "six" } else { "four" });
    let ports: Vec<_> = [Protocol::Tcp, Protocol::Udp].map(|protocol| Port::new("", protocol, 80)).into();
    let fact = |pod: &Pod, condition| Fact {
        addr: socket_addr(&pod.addr(service, 0)).ip(),
        ports: [Protocol::Tcp, Protocol::Udp].map(|protocol| Port::new("", protocol, 8080)).into(),
        condition,
        node: None,
    };
    let (mut own, mut peers) = (Vec::new(), Vec::new());
    let old_condition = match (reason, time) {
        (Reason::Terminating, Time::Beside) => Condition::Terminating,
        _ => Condition::Active,
    };
    if time != Time::Gone {
        let side = if matches!(reason, Reason::Draining) { &mut peers } else { &mut own };
        side.push(fact(old, old_condition));
    }
    if time != Time::Before {
        let side = if matches!(reason, Reason::NotPreferred) { &mut peers } else { &mut own };
        side.push(fact(new, Condition::Active));
    }
    let draining = matches!(reason, Reason::Draining) && time == Time::Beside;
    vec![
        MeshEvent::LocalService {
            name: name.clone(),
            service: Some(LocalService {
                cluster_ips: vec![socket_addr(service).ip()],
                ports,
                backends: own,
                global: true,
                affinity: if matches!(reason, Reason::NotPreferred) {
                    Affinity::Remote
                } else {
                    Affinity::None
                },
                ..LocalService::default()
            }),
        },
        MeshEvent::Cluster {
            cluster: "beta".into(),
            config: ClusterConfig { id: 2, slices_only: false, draining },
        },
        MeshEvent::RemoteService {
            cluster: "beta".into(),
            name,
            service: Some(RemoteService { cluster_id: 2, shared: true, global: true, backends: peers }),
        },
    ]
}

/// All of a cluster has been read.
fn synced(cluster: &str) -> Vec<MeshEvent> {
    [Resource::ClusterConfigs, Resource::Nodes, Resource::Endpoints, Resource::Services, Resource::Slices]
        .map(|resource| MeshEvent::Synced { cluster: cluster.into(), resource })
        .into()
}
