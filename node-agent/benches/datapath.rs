//! What the datapath costs: nanoseconds per packet of each program, per `connect()`, and per map update.
//!
//! Prints a table and writes `bench/datapath.json` below the target directory, or below the folder named by
//! `ISTHMUS_BENCH_DIR`. Needs root.
//!
//! A program that rewrites its packet would find it rewritten in the next round of a test run. So two services point at
//! each other: the first one's backend is the second's address and the other way round, and every round is a hit.

#[path = "../tests/datapath/model.rs"]
#[expect(dead_code, reason = "shared with the tests, which use all of it")]
mod model;
#[path = "../tests/datapath/packet.rs"]
#[expect(dead_code, reason = "shared with the tests, which use all of it")]
mod packet;
#[path = "../tests/datapath/sandbox.rs"]
#[expect(dead_code, reason = "shared with the tests, which use all of it")]
mod sandbox;

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use isthmus_bpf_abi::{
    Backend, Counter, Direction, IpcacheEntry, IpcacheKey, LocalPod, PolicyEntry, PolicyKey, Protocol,
    SlotKey, ipcache_flags, mark, policy_flags,
};
use isthmus_node_agent::datapath::{
    AtFirst, Datapath, EncryptionDevice, EncryptionMode, EndpointSettings, Enforcement, MapOp, PacketContext,
    PacketProgram,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};

use model::Model;
use packet::{ACK, Frame, SYN};
use sandbox::sandbox;

const ROUNDS: u32 = 200_000;
const SAMPLES: usize = 15;
const SOCKETS: usize = 500;
const ENTRIES: u32 = 100_000;
/// Identities that the measured policy allows, each with an address.
const IDENTITIES: u32 = 10_000;

fn main() {
    // `cargo test --benches` calls it with this; there is nothing to test.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let report = Mutex::new(Report::default());
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| config.sizes.backends = 2048);
        packets(&datapath, &mut report.lock().expect("no panic before"));
    });
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| {
            config.sizes.ipcache = 2 * IDENTITIES;
            config.sizes.policy_entries = 2 * IDENTITIES;
        });
        policies(&datapath, &mut report.lock().expect("no panic before"));
    });
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| config.sizes.ipcache = 2 * IDENTITIES);
        encryption(&datapath, &mut report.lock().expect("no panic before"));
    });
    sandbox(|sandbox| connects(sandbox, &mut report.lock().expect("no panic before")));
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| config.sizes.backends = 2 * ENTRIES);
        updates(&datapath, &mut report.lock().expect("no panic before"));
    });
    let report = report.into_inner().expect("no panic before");
    report.print();
    report.write();
}

fn packets(datapath: &Datapath, report: &mut Report) {
    let client = "10.0.1.2:40000";
    let empty = Frame::tcp(client, "10.0.9.9:80", ACK);
    report.add("TC program, empty", "ns/packet", None, run(datapath, PacketProgram::Empty, &empty));
    let families = [
        ("IPv4", client, "10.96.0.10:80", "10.0.2.3:8080", "10.0.9.9:80"),
        ("IPv6", "[fd00:1::2]:40000", "[fd00:96::10]:80", "[fd00:2::3]:8080", "[fd00:9::9]:80"),
    ];
    let mut id = 0;
    for (family, client, service, backend, stranger) in families {
        for (kind, protocol) in [("TCP", Protocol::Tcp), ("UDP", Protocol::Udp)] {
            let frame = |source: &str, destination: &str| match protocol {
                Protocol::Tcp => Frame::tcp(source, destination, ACK),
                Protocol::Udp => Frame::udp(source, destination),
            };
            for (front, back) in [(service, backend), (backend, service)] {
                id += 1;
                Model::new(id, front, protocol).grow(datapath, &[back]);
            }
            let name = |what: &str| format!("TC {what}, {family} {kind}");
            let missed = run(datapath, PacketProgram::FromPod, &frame(client, stranger));
            report.add(&name("from pod, miss"), "ns/packet", None, missed);
            let before = count(datapath, Counter::TcForward);
            let hit = run(datapath, PacketProgram::FromPod, &frame(client, service));
            report.add(&name("from pod, hit"), "ns/packet", Some(150.0), hit);
            let rounds = SAMPLES as u64 * u64::from(ROUNDS);
            assert_eq!(count(datapath, Counter::TcForward) - before, rounds, "every round was a hit");
            let missed = run(datapath, PacketProgram::ToPod, &frame(stranger, client));
            report.add(&name("to pod, miss"), "ns/packet", None, missed);
            let before = count(datapath, Counter::TcReply);
            let hit = run(datapath, PacketProgram::ToPod, &frame(backend, client));
            report.add(&name("to pod, hit"), "ns/packet", Some(150.0), hit);
            assert_eq!(count(datapath, Counter::TcReply) - before, rounds, "every round was a hit");
        }
    }
}

/// What is to be decided about a packet's encryption, among ten thousand pods of other nodes. The loopback interface, by
/// which test packets come in, stands for the pod's veth and for the device.
fn encryption(datapath: &Datapath, report: &mut Report) {
    const LOOPBACK: u32 = 1;
    let node = IpAddr::from(Ipv4Addr::new(172, 20, 0, 2));
    let peer = |number: u32| Ipv4Addr::from(0x0a10_0000 + number);
    let entry = IpcacheEntry {
        identity: 131_072,
        host: node.into(),
        key: 255,
        flags: ipcache_flags::HAS_HOST,
        ..IpcacheEntry::default()
    };
    let known: Vec<_> = (0..IDENTITIES)
        .map(|number| MapOp::PutIpcache { key: IpcacheKey::host(peer(number).into()), entry })
        .collect();
    assert!(datapath.apply(&known).iter().all(Result::is_ok));
    let own = Ipv4Addr::new(10, 0, 1, 2);
    let pod = LocalPod { ifindex: LOOPBACK, ..LocalPod::default() };
    datapath.put_local_pod(own.into(), pod).expect("a pod");
    let (own, remote) = (format!("{own}:8080"), format!("{}:40000", peer(77)));
    let to_remote = Frame::tcp(&own, &remote, ACK);
    let to_world = Frame::tcp(&own, "1.1.1.1:443", ACK);
    let from_remote = Frame::tcp(&remote, &own, ACK);
    let context = PacketContext { mark: mark::DECRYPTED, ..PacketContext::default() };
    let mut row = |what: &str, value| report.add(&format!("encryption: {what}"), "ns/packet", None, value);
    row("off, to another node's pod", run(datapath, PacketProgram::FromPod, &to_remote));
    row("off, to a pod", run_in(datapath, PacketProgram::ToPod, context, &from_remote));
    let device = Some(EncryptionDevice { ifindex: LOOPBACK, mtu: 1420 });
    datapath.set_encryption(EncryptionMode::On { device, strict: true }).expect("on");
    row("on, to the world", run(datapath, PacketProgram::FromPod, &to_world));
    let before = count(datapath, Counter::Encrypted);
    row("on, to another node's pod: redirected", run(datapath, PacketProgram::FromPod, &to_remote));
    assert_eq!(count(datapath, Counter::Encrypted) - before, SAMPLES as u64 * u64::from(ROUNDS));
    row("strict, to a pod, decrypted", run_in(datapath, PacketProgram::ToPod, context, &from_remote));
    row("strict, to a pod, in the clear: dropped", run(datapath, PacketProgram::ToPod, &from_remote));
}

/// A pod with a policy of many identities. What begins no flow and belongs to none (SYN and ACK of a connection that nobody
/// has begun) is looked up every time; the rows are of whole programs, with a miss in the services.
fn policies(datapath: &Datapath, report: &mut Report) {
    const POD: u32 = 1;
    const FIRST: u32 = 131_072;
    let ingress = Enforcement { ingress: true, egress: false };
    let entry = |flags| PolicyEntry { flags, rule: 16, ..PolicyEntry::default() };
    let peer = |number: u32| Ipv4Addr::from(0x0a10_0000 + number);
    let known: Vec<_> = (0..IDENTITIES)
        .map(|number| MapOp::PutIpcache {
            key: IpcacheKey::host(peer(number).into()),
            entry: IpcacheEntry { identity: FIRST + number, ..IpcacheEntry::default() },
        })
        .collect();
    assert!(datapath.apply(&known).iter().all(Result::is_ok));
    let (own, remote) = ("10.0.1.2:8080", SocketAddr::from((peer(77), 40_000)).to_string());
    let [established, alone] = [ACK, SYN | ACK].map(|flags| Frame::tcp(&remote, own, flags));
    let sent = Frame::tcp(own, &remote, ACK);
    let to_pod = |frame| {
        let context = PacketContext { ingress_ifindex: 77, ..PacketContext::default() };
        run_in(datapath, PacketProgram::ToPod, context, frame)
    };
    let mut row = |what: &str, value| report.add(&format!("policy: {what}"), "ns/packet", None, value);
    row("no endpoint known, to pod", to_pod(&established));
    row("no endpoint known, from pod", run(datapath, PacketProgram::FromPod, &sent));
    let settings = EndpointSettings {
        identity: 66_000,
        ipv4: Some(Ipv4Addr::new(10, 0, 1, 2)),
        ..EndpointSettings::default()
    };
    datapath.put_endpoint(POD, &settings, AtFirst::Pass).expect("an endpoint");
    row("endpoint without a policy, to pod", to_pod(&established));
    row("endpoint without a policy, from pod", run(datapath, PacketProgram::FromPod, &sent));
    let mut entries: Vec<_> = (0..IDENTITIES)
        .map(|number| (PolicyKey::ports(FIRST + number, Direction::Ingress, 6, 8080, 16), entry(0)))
        .collect();
    let started = Instant::now();
    datapath.replace_policy(POD, ingress, &entries).expect("a policy");
    let replaced = started.elapsed();
    row("established, to pod", to_pod(&established));
    row("established, answer from pod", run(datapath, PacketProgram::FromPod, &sent));
    datapath.forget_flows().expect("no flows");
    row("10,000 identities, allow", to_pod(&alone));
    entries[77].1 = entry(policy_flags::DENY);
    datapath.replace_policy(POD, ingress, &entries).expect("a policy");
    row("10,000 identities, deny", to_pod(&alone));
    entries.remove(77);
    datapath.replace_policy(POD, ingress, &entries).expect("a policy");
    row("10,000 identities, miss", to_pod(&alone));
    let started = Instant::now();
    const UPDATES: u32 = 1000;
    for number in 0..UPDATES {
        let key = PolicyKey::any(1 + number, Direction::Ingress);
        datapath.update_policy(POD, &[(key, entry(0))], &[]).expect("an update");
    }
    let updated = started.elapsed() / UPDATES;
    report.add("policy: replace 10,000 entries", "ms", None, replaced.as_secs_f64() * 1e3);
    report.add("policy: one more identity in place", "µs", None, updated.as_secs_f64() * 1e6);
}

fn run(datapath: &Datapath, program: PacketProgram, frame: &Frame) -> f64 {
    run_in(datapath, program, PacketContext::default(), frame)
}

fn run_in(datapath: &Datapath, program: PacketProgram, context: PacketContext, frame: &Frame) -> f64 {
    let mut frame = frame.clone();
    frame.payload = vec![0; 64];
    let bytes = frame.bytes();
    let once = || datapath.test_run_in(program, &bytes, context, ROUNDS).expect("a test run");
    median((0..SAMPLES).map(|_| f64::from(once().nanoseconds)))
}

/// Fresh sockets connect one after the other; only `connect()` is timed. A round is the mean of many.
fn connects(sandbox: &sandbox::Sandbox, report: &mut Report) {
    let backend: SocketAddr = "127.0.0.11:8080".parse().expect("an address");
    let service: SocketAddr = "10.96.0.10:80".parse().expect("an address");
    let _udp = UdpSocket::bind(backend).expect("a socket");
    let listener = TcpListener::bind(backend).expect("a listener");
    nix::sys::socket::listen(&listener, Backlog::new(4096).expect("a backlog")).expect("listen");
    listener.set_nonblocking(true).expect("a listener");
    let datapath = sandbox.datapath_with(|config| config.sizes.sockets = 65_536);
    let backend_text = backend.to_string();
    Model::new(1, &service.to_string(), Protocol::Udp).grow(&datapath, &[&backend_text]);
    Model::new(2, &service.to_string(), Protocol::Tcp).grow(&datapath, &[&backend_text]);
    for (kind, socket_type) in [("UDP", SockType::Datagram), ("TCP", SockType::Stream)] {
        let once = |to| {
            let nanoseconds = time_connects(socket_type, to);
            while listener.accept().is_ok() {}
            nanoseconds
        };
        let (mut plain, mut passing, mut translated) = (Vec::new(), Vec::new(), Vec::new());
        // In turn, so that what the machine does besides hits all alike.
        for _ in 0..4 * SAMPLES {
            datapath.detach_sockets().expect("detach");
            plain.push(once(backend));
            datapath.attach_sockets(&sandbox.cgroup).expect("attach");
            passing.push(once(backend));
            translated.push(once(service));
        }
        // A handshake is long enough for others to come between: the best round is the one without.
        let [plain, passing, translated] = [plain, passing, translated].map(best);
        report.add(&format!("connect(), {kind}, no hooks"), "ns", None, plain);
        report.add(&format!("connect(), {kind}, hooks, no service"), "ns", None, passing);
        report.add(&format!("connect(), {kind}, hooks, service"), "ns", None, translated);
        report.add(&format!("hook adds, {kind}, no service"), "ns", Some(1000.0), passing - plain);
        report.add(&format!("hook adds, {kind}, service"), "ns", Some(1000.0), translated - plain);
        report.add(&format!("ratio, {kind}, service to no hooks"), "", None, translated / plain);
    }
}

fn time_connects(kind: SockType, to: SocketAddr) -> f64 {
    let to = SockaddrStorage::from(to);
    let sockets: Vec<OwnedFd> = (0..SOCKETS)
        .map(|_| {
            let socket = socket(AddressFamily::Inet, kind, SockFlag::empty(), None).expect("a socket");
            // Closing leaves no TIME_WAIT behind.
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&socket, sockopt::Linger, &linger).expect("an option");
            socket
        })
        .collect();
    let started = Instant::now();
    for socket in &sockets {
        black_box(connect(socket.as_raw_fd(), &to)).expect("connect");
    }
    started.elapsed().as_nanos() as f64 / SOCKETS as f64
}

fn updates(datapath: &Datapath, report: &mut Report) {
    let backend = Backend::new(1, Ipv4Addr::new(10, 0, 0, 1).into(), 80, Protocol::Tcp, 0);
    let puts: Vec<_> = (0..ENTRIES)
        .map(|slot| MapOp::PutSlot { key: SlotKey { service: 1, slot }, slot: backend.slot(slot) })
        .collect();
    let deletes: Vec<_> =
        (0..ENTRIES).map(|slot| MapOp::DeleteSlot { key: SlotKey { service: 1, slot } }).collect();
    let rate = |work: &mut dyn FnMut()| {
        let started = Instant::now();
        work();
        f64::from(ENTRIES) / started.elapsed().as_secs_f64() / 1e6
    };
    let all_at_once = |ops: &[MapOp]| assert!(datapath.apply(ops).iter().all(Result::is_ok));
    let one_by_one = |ops: &[MapOp]| {
        for op in ops {
            assert!(datapath.apply(std::slice::from_ref(op))[0].is_ok());
        }
    };
    let mut samples: [Vec<f64>; 5] = Default::default();
    for _ in 0..5 {
        samples[0].push(rate(&mut || one_by_one(&puts)));
        samples[1].push(rate(&mut || one_by_one(&deletes)));
        samples[2].push(rate(&mut || all_at_once(&puts)));
        samples[3].push(rate(&mut || assert_eq!(datapath.slots().expect("slots").len(), ENTRIES as usize)));
        samples[4].push(rate(&mut || all_at_once(&deletes)));
    }
    let names =
        ["insert, one by one", "delete, one by one", "insert, batches", "dump, batches", "delete, batches"];
    for (name, samples) in names.into_iter().zip(samples) {
        report.add(&format!("slots: {name}"), "M/s", None, median(samples.into_iter()));
    }
}

fn count(datapath: &Datapath, wanted: Counter) -> u64 {
    let counters = datapath.counters().expect("counters");
    counters.into_iter().find(|(known, _)| *known == wanted).expect("every counter is there").1
}

fn median(samples: impl Iterator<Item = f64>) -> f64 {
    let mut samples: Vec<f64> = samples.collect();
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn best(samples: Vec<f64>) -> f64 {
    samples.into_iter().fold(f64::INFINITY, f64::min)
}

#[derive(Default)]
struct Report {
    rows: Vec<Row>,
}

struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    /// At most this.
    target: Option<f64>,
}

impl Report {
    fn add(&mut self, name: &str, unit: &'static str, target: Option<f64>, value: f64) {
        self.rows.push(Row { name: name.to_owned(), value, unit, target });
    }

    #[expect(clippy::print_stdout, reason = "what a benchmark is for")]
    fn print(&self) {
        println!("| datapath (median; connect(): best) | figure | target |\n|---|---|---|");
        for Row { name, value, unit, target } in &self.rows {
            let target = target.map_or(String::new(), |target| format!("<= {target} {unit}"));
            let digits = if *value < 10.0 { 2 } else { 0 };
            println!("| {name} | {value:.digits$} {unit} | {target} |");
        }
    }

    fn write(&self) {
        let dir = std::env::var_os("ISTHMUS_BENCH_DIR").map_or_else(
            || {
                let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
                let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
                workspace.join(target).join("bench")
            },
            PathBuf::from,
        );
        std::fs::create_dir_all(&dir).expect("the folder for the report");
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| serde_json::json!({"name": row.name, "value": row.value, "unit": row.unit, "target": row.target}))
            .collect();
        let text = serde_json::to_string_pretty(&rows).expect("plain values");
        std::fs::write(dir.join("datapath.json"), text).expect("write the report");
    }
}
