//! The table through the kernel: real maps, real programs, real sockets. Each row starts where the one before has left the
//! maps, as a restarted agent would.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use isthmus_bpf_abi::Protocol;
use isthmus_node_agent::datapath::Datapath;
use isthmus_node_agent::mesh::fact::Moment;
use isthmus_node_agent::reconcile::Maps;

use crate::sandbox::{DEADLINE, ip, sandbox, until_local};
use crate::table::{ADDRESSES, Row, VIP, VIP6, rows};

/// So often a client calls before everyone who may answer must have: with four backends the chance that one was never
/// chosen is below 1e-9.
const CALLS: usize = 75;
const PATIENCE: Duration = DEADLINE;

#[test]
fn every_row_holds_through_the_kernel() {
    sandbox(|place| {
        for addr in ADDRESSES {
            let length = if addr.contains(':') { "128 nodad" } else { "32" };
            ip(&format!("addr add {addr}/{length} dev lo"));
        }
        ADDRESSES.iter().filter(|addr| addr.contains(':')).for_each(|addr| until_local(addr));
        // Without a route a call to a service that is not in the maps fails at once, and differently from a refusal.
        let rows = rows();
        let _servers = Servers::start(&rows);
        let datapath = Arc::new(place.datapath());
        datapath.attach_sockets(&place.cgroup).unwrap_or_else(|error| panic!("{error}"));
        let mut maps = datapath.clone();
        for row in &rows {
            bring(&mut maps, row);
            check(row, &datapath);
        }
    });
}

fn bring(maps: &mut Arc<Datapath>, row: &Row) {
    let dump = maps.dump().unwrap_or_else(|error| panic!("{error}"));
    let mut agent = super::agent(row, &dump);
    super::tell(&mut agent, row);
    // Once with what an earlier row has left in place of unread clusters, once when the time for reading is over.
    for now in [Moment::default(), Moment(Duration::from_secs(61))] {
        let (ops, _) = agent.plan(now, true);
        let results = Maps::apply(maps, &ops);
        let failures = agent.confirm(&ops, &results);
        assert!(failures.is_empty(), "{}: {failures:?}", row.name);
    }
    assert!(agent.is_started(), "{}", row.name);
}

fn check(row: &Row, datapath: &Datapath) {
    let frontends = datapath.services().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(frontends.len(), row.expected.len(), "{}: {frontends:?}", row.name);
    for ((vip, protocol), expected) in &row.expected {
        let mut answered: BTreeMap<SocketAddr, usize> = BTreeMap::new();
        for _ in 0..CALLS {
            match call(*vip, *protocol) {
                Ok(who) => *answered.entry(who).or_default() += 1,
                Err(error) => {
                    assert!(expected.is_empty(), "{}: {vip} answers {error}", row.name);
                    assert_eq!(
                        error.kind(),
                        ErrorKind::ConnectionRefused,
                        "{}: {vip} answers {error}",
                        row.name
                    );
                }
            }
        }
        let who: BTreeSet<_> = answered.keys().copied().collect();
        if row.sticky {
            assert_eq!(who.len(), 1, "{}: {answered:?}", row.name);
            assert!(who.is_subset(expected), "{}: {answered:?}", row.name);
        } else {
            assert_eq!(who, *expected, "{}: {answered:?}", row.name);
        }
    }
    // Whoever has a record without a slot is among those who may still have something open.
    for (key, service) in &frontends {
        let may = row.open_only.get(&super::frontend(key)).cloned().unwrap_or_default();
        let backends = datapath.backends().unwrap_or_else(|error| panic!("{error}"));
        let open_only: BTreeSet<_> = backends
            .into_iter()
            .filter(|(_, backend)| backend.service == service.id && !backend.takes_new())
            .map(|(_, backend)| SocketAddr::new(backend.addr.ip(), backend.port()))
            .collect();
        assert!(open_only.is_subset(&may), "{}: {open_only:?} but {may:?}", row.name);
    }
    // What is no frontend of the row leads nowhere.
    for vip in [VIP, VIP6] {
        let vip = SocketAddr::new(vip.parse().expect("an address"), 80);
        if !row.expected.contains_key(&(vip, Protocol::Tcp)) {
            let outcome = call(vip, Protocol::Tcp);
            assert!(outcome.is_err(), "{}: {vip} is answered by {outcome:?}", row.name);
        }
    }
}

/// Who answers at an address.
fn call(vip: SocketAddr, protocol: Protocol) -> std::io::Result<SocketAddr> {
    let mut text = [0; 64];
    let length = match protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::connect_timeout(&vip, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut length = 0;
            loop {
                match stream.read(&mut text[length..])? {
                    0 => break length,
                    more => length += more,
                }
            }
        }
        Protocol::Udp => {
            let any: IpAddr =
                if vip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.connect(vip)?;
            socket.send(b"who")?;
            socket.recv(&mut text)?
        }
    };
    let text = std::str::from_utf8(&text[..length]).expect("text");
    Ok(text.parse().expect("the server's address"))
}

/// One server per backend of any row, on a thread each.
struct Servers {
    stop: Arc<AtomicBool>,
    listening: Vec<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    fn start(rows: &[Row]) -> Self {
        let mut servers = Self { stop: Arc::default(), listening: Vec::new(), threads: Vec::new() };
        let all = rows.iter().flat_map(|row| &row.expected);
        let addresses: BTreeSet<_> = all
            .flat_map(|((_, protocol), backends)| backends.iter().map(|addr| (*protocol, *addr)))
            .collect();
        for (protocol, addr) in addresses {
            let stop = servers.stop.clone();
            servers.threads.push(match protocol {
                Protocol::Tcp => {
                    let listener = TcpListener::bind(addr).expect("a listener");
                    servers.listening.push(addr);
                    thread::spawn(move || serve_tcp(&listener, addr, &stop))
                }
                Protocol::Udp => {
                    let socket = UdpSocket::bind(addr).expect("a socket");
                    thread::spawn(move || serve_udp(&socket, addr, &stop))
                }
            });
        }
        servers
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for addr in &self.listening {
            // Wakes it up.
            drop(TcpStream::connect(addr));
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve_tcp(listener: &TcpListener, addr: SocketAddr, stop: &AtomicBool) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(mut stream) = stream {
            // A client that has gone is the client's affair.
            let _ = stream.write_all(addr.to_string().as_bytes());
        }
    }
}

fn serve_udp(socket: &UdpSocket, addr: SocketAddr, stop: &AtomicBool) {
    let mut request = [0; 16];
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    while !stop.load(Ordering::Relaxed) {
        if let Ok((_, client)) = socket.recv_from(&mut request) {
            let _ = socket.send_to(addr.to_string().as_bytes(), client);
        }
    }
}
