//! The rules of global services as data: what the own cluster has, what peers export, and who must answer. The same rows
//! are checked against the pure function and against the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use isthmus_bpf_abi::Protocol;
use isthmus_node_agent::mesh::fact::{
    Affinity, Backend, ClusterConfig, Condition, LocalService, Port, RemoteService, RemoteSlice, ServiceName,
};
use isthmus_node_agent::mesh::{MeshEvent, Resource};

/// Address of the service in the own cluster.
pub(crate) const VIP: &str = "10.96.0.1";
pub(crate) const VIP6: &str = "fd00:96::1";
/// This node.
pub(crate) const NODE: &str = "node-0";

/// Every address that a backend of any row has.
pub(crate) const ADDRESSES: [&str; 11] =
    [LOCAL, LOCAL_2, LEAVING, BETA, BETA_2, BETA_LEAVING, GAMMA, LOCAL6, BETA6, "10.2.0.8", "10.2.0.9"];

const LOCAL: &str = "10.1.0.1";
const LOCAL_2: &str = "10.1.0.2";
const LEAVING: &str = "10.1.0.3";
const LOCAL6: &str = "fd00:1::1";
const BETA: &str = "10.2.0.1";
const BETA_2: &str = "10.2.0.2";
const BETA_LEAVING: &str = "10.2.0.3";
const BETA6: &str = "fd00:2::1";
const GAMMA: &str = "10.3.0.1";

/// One row.
pub(crate) struct Row {
    pub(crate) name: String,
    /// Balance services that are not global as well.
    pub(crate) all_services: bool,
    pub(crate) events: Vec<MeshEvent>,
    /// Every frontend that there must be, with everyone who must answer. None must answer: refused.
    pub(crate) expected: BTreeMap<(SocketAddr, Protocol), BTreeSet<SocketAddr>>,
    /// A client keeps its backend.
    pub(crate) sticky: bool,
}

/// All rows.
pub(crate) fn rows() -> Vec<Row> {
    [who_takes_part(), affinity(), ports(), the_rest()].into_iter().flatten().collect()
}

/// Own backends always, a peer's exactly if it is global here, global there and shared there.
fn who_takes_part() -> Vec<Row> {
    let mut rows = Vec::new();
    for (global_here, global_there, shared_there, joined) in [
        (false, false, false, false),
        (false, false, true, false),
        (false, true, false, false),
        (false, true, true, false),
        (true, false, false, false),
        (true, false, true, false),
        (true, true, false, false),
        (true, true, true, true),
    ] {
        let name = format!("global here: {global_here}, there: {global_there}, shared there: {shared_there}");
        let own = LocalService { global: global_here, ..local([active(LOCAL)]) };
        let theirs =
            RemoteService { global: global_there, shared: shared_there, ..remote(2, [active(BETA)]) };
        let expected: &[&str] = if joined { &[LOCAL, BETA] } else { &[LOCAL] };
        rows.push(row(&name).own(own).peer("beta", 2, theirs).expect(80, expected));
    }
    rows
}

/// Which side answers. `A`: active in the own cluster, `T`: terminating there, `a` and `t`: in the peer.
fn affinity() -> Vec<Row> {
    use Affinity::{Local, None, Remote};
    const TABLE: [(Affinity, &str, &str, &str); 36] = [
        (None, "", "", ""),
        (None, "", "a", "a"),
        (None, "", "t", "t"),
        (None, "A", "", "A"),
        (None, "A", "a", "Aa"),
        (None, "A", "t", "A"),
        (None, "T", "", "T"),
        (None, "T", "a", "a"),
        (None, "T", "t", "Tt"),
        (None, "AT", "", "A"),
        (None, "AT", "a", "Aa"),
        (None, "AT", "t", "A"),
        (Local, "", "", ""),
        (Local, "", "a", "a"),
        (Local, "", "t", "t"),
        (Local, "A", "", "A"),
        (Local, "A", "a", "A"),
        (Local, "A", "t", "A"),
        (Local, "T", "", "T"),
        (Local, "T", "a", "a"),
        (Local, "T", "t", "Tt"),
        (Local, "AT", "", "A"),
        (Local, "AT", "a", "A"),
        (Local, "AT", "t", "A"),
        (Remote, "", "", ""),
        (Remote, "", "a", "a"),
        (Remote, "", "t", "t"),
        (Remote, "A", "", "A"),
        (Remote, "A", "a", "a"),
        (Remote, "A", "t", "A"),
        (Remote, "T", "", "T"),
        (Remote, "T", "a", "a"),
        (Remote, "T", "t", "Tt"),
        (Remote, "AT", "", "A"),
        (Remote, "AT", "a", "a"),
        (Remote, "AT", "t", "A"),
    ];
    let backend = |letter: char| match letter {
        'A' => active(LOCAL),
        'T' => terminating(LEAVING),
        'a' => active(BETA),
        't' => terminating(BETA_LEAVING),
        other => panic!("{other} is no backend"),
    };
    let one = |(affinity, here, there, answer): &(Affinity, &str, &str, &str)| {
        let own = LocalService { affinity: *affinity, ..local(here.chars().map(backend)) };
        // Only endpoint slices say of a remote backend that it is terminating.
        let slice = RemoteSlice {
            cluster_id: 2,
            service: service_name(),
            backends: there.chars().map(backend).collect(),
        };
        let answering: Vec<String> = answer.chars().map(|letter| backend(letter).addr.to_string()).collect();
        let answering: Vec<&str> = answering.iter().map(String::as_str).collect();
        row(&format!("affinity {affinity:?}, here {here:?}, there {there:?}"))
            .own(own)
            .slices("beta", 2, slice)
            .expect(80, &answering)
    };
    TABLE.iter().map(one).collect()
}

/// Names, protocols and numbers of ports.
fn ports() -> Vec<Row> {
    let named =
        |ports: &[Port], backends: Vec<Backend>| LocalService { ports: ports.to_vec(), ..local(backends) };
    let http = Port::new("http", Protocol::Tcp, 80);
    let admin = Port::new("admin", Protocol::Tcp, 81);
    let dns = Port::new("dns", Protocol::Udp, 53);
    let unnamed = Port::new("", Protocol::Tcp, 80);
    vec![
        row("a named port takes remote targets of that name alone")
            .own(named(std::slice::from_ref(&http), vec![on(LOCAL, &[("http", 8080)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("http", 8081), ("admin", 9000)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8081"]),
        row("a peer whose port has another name adds nothing")
            .own(named(std::slice::from_ref(&http), vec![on(LOCAL, &[("http", 8080)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("web", 8080)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080"]),
        row("an unnamed port takes remote targets of any name")
            .own(named(std::slice::from_ref(&unnamed), vec![on(LOCAL, &[("", 8080)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("web", 8081)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8081"]),
        row("a remote target without a name serves a port of any name")
            .own(named(std::slice::from_ref(&http), vec![on(LOCAL, &[("http", 8080)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("", 8081)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8081"]),
        row("several ports, each with its own targets")
            .own(named(&[http.clone(), admin.clone()], vec![on(LOCAL, &[("http", 8080), ("admin", 9000)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("http", 8081), ("admin", 9000)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8081"])
            .expect_at(81, Protocol::Tcp, &["10.1.0.1:9000", "10.2.0.1:9000"]),
        row("two ports with different names and the same target number shadow neither")
            .own(named(&[http.clone(), admin.clone()], vec![on(LOCAL, &[("http", 8080), ("admin", 8080)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("http", 8080), ("admin", 8080)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8080"])
            .expect_at(81, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8080"]),
        row("a port that only the peer has is no port here")
            .own(named(std::slice::from_ref(&http), vec![on(LOCAL, &[("http", 8080)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("http", 8080), ("extra", 9000)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8080"]),
        row("a port that the peer lacks has own backends alone")
            .own(named(&[http.clone(), admin], vec![on(LOCAL, &[("http", 8080), ("admin", 9000)])]))
            .peer("beta", 2, remote(2, [on(BETA, &[("http", 8080)])]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080", "10.2.0.1:8080"])
            .expect_at(81, Protocol::Tcp, &["10.1.0.1:9000"]),
        row("protocols must be the same")
            .own(named(&[http, dns], vec![on(LOCAL, &[("http", 8080)]), udp(LOCAL_2, "dns", 5353)]))
            .peer("beta", 2, remote(2, [udp(BETA, "http", 8080), udp(BETA_2, "dns", 5353)]))
            .expect_at(80, Protocol::Tcp, &["10.1.0.1:8080"])
            .expect_at(53, Protocol::Udp, &["10.1.0.2:5353", "10.2.0.2:5353"]),
    ]
}

fn the_rest() -> Vec<Row> {
    let beta = || remote(2, [active(BETA)]);
    let name = service_name;
    let gone = || MeshEvent::RemoteService { cluster: "beta".into(), name: name(), service: None };
    let unshared = || RemoteService { shared: false, ..beta() };
    vec![
        row("a service of one peer alone is none here").peer("beta", 2, beta()),
        row("a service without any backend refuses").own(local([])).expect(80, &[]),
        row("own backends alone, when no peer has it").own(local([active(LOCAL)])).expect(80, &[LOCAL]),
        row("no own backends: the peers' answer").own(local([])).peer("beta", 2, beta()).expect(80, &[BETA]),
        row("two peers")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, remote(2, [active(BETA), active(BETA_2)]))
            .peer("gamma", 3, remote(3, [active(GAMMA)]))
            .expect(80, &[LOCAL, BETA, BETA_2, GAMMA]),
        row("a service that is no longer shared is gone")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .peer("beta", 2, unshared())
            .expect(80, &[LOCAL]),
        row("a service deleted in the peer is gone")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .event(gone())
            .expect(80, &[LOCAL]),
        row("a service deleted here is gone, whatever the peer has")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .event(MeshEvent::LocalService { name: name(), service: None }),
        row("a peer that has left the mesh takes its backends along")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .event(MeshEvent::ClusterRemoved { cluster: "beta".into() })
            .expect(80, &[LOCAL]),
        row("a peer that is being disconnected gets nothing new")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .event(draining("beta", 2))
            .expect(80, &[LOCAL]),
        row("nor does one that is preferred")
            .own(LocalService { affinity: Affinity::Remote, ..local([active(LOCAL)]) })
            .peer("beta", 2, beta())
            .event(draining("beta", 2))
            .expect(80, &[LOCAL]),
        row("unless nobody else has the service")
            .own(local([]))
            .peer("beta", 2, beta())
            .event(draining("beta", 2))
            .expect(80, &[BETA]),
        row("another peer is somebody else")
            .own(local([]))
            .peer("beta", 2, beta())
            .peer("gamma", 3, remote(3, [active(GAMMA)]))
            .event(draining("beta", 2))
            .expect(80, &[GAMMA]),
        row("one that is connected again serves again")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .event(draining("beta", 2))
            .event(config("beta", 2, false))
            .expect(80, &[LOCAL, BETA]),
        row("a peer that got another cluster id has what it exports under that id")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .event(config("beta", 12, false))
            .expect(80, &[LOCAL]),
        row("a value with another cluster's id does not count")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, remote(3, [active(BETA)]))
            .expect(80, &[LOCAL]),
        row("of two peers with one id the second has no say")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .peer("gamma", 2, remote(2, [active(GAMMA)]))
            .expect(80, &[LOCAL, BETA]),
        row("an address that two clusters name is one backend")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, remote(2, [active(LOCAL), active(BETA)]))
            .expect(80, &[LOCAL, BETA]),
        row("a peer cannot point at this machine or this link")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, remote(2, ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"].map(active)))
            .expect(80, &[LOCAL]),
        row("internalTrafficPolicy Local: backends of this node alone")
            .own(LocalService {
                node_local: true,
                ..local([Backend { node: Some(NODE.into()), ..active(LOCAL) }, active(LOCAL_2)])
            })
            .peer("beta", 2, beta())
            .expect(80, &[LOCAL]),
        row("internalTrafficPolicy Local without a backend on this node refuses")
            .own(LocalService { node_local: true, ..local([active(LOCAL_2)]) })
            .peer("beta", 2, beta())
            .expect(80, &[]),
        row("sessionAffinity keeps a client with its backend")
            .own(LocalService { session_affinity_seconds: Some(10_800), ..local([active(LOCAL)]) })
            .peer("beta", 2, beta())
            .expect(80, &[LOCAL, BETA])
            .sticky(),
        row("a headless service is left alone")
            .own(LocalService { cluster_ips: Vec::new(), ..local([active(LOCAL)]) })
            .peer("beta", 2, beta()),
        row("both address families, each with its own backends")
            .own(LocalService {
                cluster_ips: vec![ip(VIP), ip(VIP6)],
                ..local([active(LOCAL), active(LOCAL6)])
            })
            .peer("beta", 2, remote(2, [active(BETA), active(BETA6)]))
            .expect(80, &[LOCAL, BETA])
            .expect_v6(80, &[LOCAL6, BETA6]),
        row("beside kube-proxy a service that is not global is left alone")
            .beside_kube_proxy()
            .own(LocalService { global: false, ..local([active(LOCAL)]) })
            .peer("beta", 2, beta()),
        row("beside kube-proxy a global service is balanced")
            .beside_kube_proxy()
            .own(local([active(LOCAL)]))
            .peer("beta", 2, beta())
            .expect(80, &[LOCAL, BETA]),
        row("a peer that exports slices alone: its services do not count, all of its slices do")
            .own(local([active(LOCAL)]))
            .peer("beta", 2, remote(2, [active("10.2.0.9")]))
            .slices("beta", 2, RemoteSlice { cluster_id: 2, service: name(), backends: vec![active(BETA)] })
            .event(MeshEvent::RemoteSlice {
                cluster: "beta".into(),
                name: ServiceName::new("default", "another"),
                slice: Some(RemoteSlice { cluster_id: 2, service: name(), backends: vec![active(BETA_2)] }),
            })
            .expect(80, &[LOCAL, BETA, BETA_2]),
    ]
}

fn row(name: &str) -> Row {
    Row {
        name: name.to_owned(),
        all_services: true,
        events: Vec::new(),
        expected: BTreeMap::new(),
        sticky: false,
    }
}

impl Row {
    fn own(self, service: LocalService) -> Self {
        self.event(MeshEvent::LocalService { name: service_name(), service: Some(service) })
    }

    fn peer(self, cluster: &str, id: u16, service: RemoteService) -> Self {
        self.event(config(cluster, id, false)).event(MeshEvent::RemoteService {
            cluster: cluster.into(),
            name: service_name(),
            service: Some(service),
        })
    }

    fn slices(self, cluster: &str, id: u16, slice: RemoteSlice) -> Self {
        self.event(config(cluster, id, true)).event(MeshEvent::RemoteSlice {
            cluster: cluster.into(),
            name: ServiceName::new("default", "slice"),
            slice: Some(slice),
        })
    }

    fn event(mut self, event: MeshEvent) -> Self {
        self.events.push(event);
        self
    }

    fn beside_kube_proxy(self) -> Self {
        Self { all_services: false, ..self }
    }

    fn sticky(self) -> Self {
        Self { sticky: true, ..self }
    }

    fn expect(self, port: u16, backends: &[&str]) -> Self {
        self.expect_of(VIP, port, Protocol::Tcp, backends.iter().map(|addr| SocketAddr::new(ip(addr), 8080)))
    }

    fn expect_v6(self, port: u16, backends: &[&str]) -> Self {
        self.expect_of(VIP6, port, Protocol::Tcp, backends.iter().map(|addr| SocketAddr::new(ip(addr), 8080)))
    }

    fn expect_at(self, port: u16, protocol: Protocol, backends: &[&str]) -> Self {
        self.expect_of(
            VIP,
            port,
            protocol,
            backends.iter().map(|addr| addr.parse().expect("an address and a port")),
        )
    }

    fn expect_of(
        mut self,
        vip: &str,
        port: u16,
        protocol: Protocol,
        backends: impl Iterator<Item = SocketAddr>,
    ) -> Self {
        self.expected.insert((SocketAddr::new(ip(vip), port), protocol), backends.collect());
        self
    }

    /// The row's events, and that everything has been read.
    pub(crate) fn all_events(&self) -> Vec<MeshEvent> {
        let mut events = self.events.clone();
        for cluster in ["alpha", "beta", "gamma"] {
            for resource in [
                Resource::ClusterConfigs,
                Resource::Nodes,
                Resource::Endpoints,
                Resource::Services,
                Resource::Slices,
            ] {
                events.push(MeshEvent::Synced { cluster: cluster.into(), resource });
            }
        }
        events
    }
}

fn service_name() -> ServiceName {
    ServiceName::new("default", "rebel-base")
}

fn config(cluster: &str, id: u16, slices_only: bool) -> MeshEvent {
    MeshEvent::Cluster { cluster: cluster.into(), config: ClusterConfig { id, slices_only, draining: false } }
}

fn draining(cluster: &str, id: u16) -> MeshEvent {
    MeshEvent::Cluster {
        cluster: cluster.into(),
        config: ClusterConfig { id, slices_only: false, draining: true },
    }
}

fn local(backends: impl IntoIterator<Item = Backend>) -> LocalService {
    LocalService {
        cluster_ips: vec![ip(VIP)],
        ports: vec![Port::new("http", Protocol::Tcp, 80)],
        backends: backends.into_iter().collect(),
        global: true,
        ..LocalService::default()
    }
}

fn remote(cluster_id: u16, backends: impl IntoIterator<Item = Backend>) -> RemoteService {
    RemoteService { cluster_id, shared: true, global: true, backends: backends.into_iter().collect() }
}

fn active(addr: &str) -> Backend {
    on(addr, &[("http", 8080)])
}

fn terminating(addr: &str) -> Backend {
    Backend { condition: Condition::Terminating, ..active(addr) }
}

fn on(addr: &str, ports: &[(&str, u16)]) -> Backend {
    let ports = ports.iter().map(|(name, number)| Port::new(name, Protocol::Tcp, *number)).collect();
    Backend { addr: ip(addr), ports, condition: Condition::Active, node: None }
}

fn udp(addr: &str, name: &str, number: u16) -> Backend {
    Backend { ports: [Port::new(name, Protocol::Udp, number)].into(), ..on(addr, &[]) }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}
