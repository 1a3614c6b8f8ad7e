//! What encryption costs: `iperf3` between two network namespaces over a plain veth pair, and over that pair through our
//! device, boringtun-cli and wireguard-go. As root.
//!
//! `cargo bench -p isthmus-wireguard --bench throughput` prints tables and, with `ISTHMUS_BENCH_DIR` set, writes
//! `wireguard.json` there. Rounds are interleaved, so that what else the machine does meets all alike; each figure is the
//! median of its rounds. `WIREGUARD_ROUNDS`, `WIREGUARD_SECONDS` and `WIREGUARD_ONLY=ours,boringtun-cli` say otherwise.
#![allow(clippy::print_stdout, clippy::expect_used, missing_docs)]

#[path = "../tests/support/mod.rs"]
#[expect(dead_code, reason = "shared with the tests, which use the rest")]
mod support;

use std::io::Read;
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use isthmus_wireguard::config::PrivateKey;
use serde_json::{Value, json};
use support::device::{Device, Make, PORT};
use support::netns::{Namespace, Process, join};
use support::wait_for;

const OUTER: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const INNER: [&str; 2] = ["10.200.0.1", "10.200.0.2"];
const IPERF_PORT: u16 = 5201;
/// A packet as large as the device's MTU.
const PACKET: usize = 1420;

fn main() {
    // `cargo test --benches` calls it with this; there is nothing to test.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let (rounds, seconds) = (setting("WIREGUARD_ROUNDS", 3), setting("WIREGUARD_SECONDS", 5));
    let only = std::env::var("WIREGUARD_ONLY").ok();
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only.split(',').any(|one| one == name));
    let tunn = tunn_alone();
    println!(
        "Tunn alone, {PACKET} B: encapsulate {:.0} ns, decapsulate {:.0} ns; one core that only did both ends: {:.2} Gbit/s\n",
        tunn.encapsulate_ns,
        tunn.decapsulate_ns,
        tunn.gbit_per_core()
    );
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("Load before: {}\n{rounds} rounds of {seconds} s each", load.trim());
    let tracks: Vec<Track> =
        TRACKS.iter().filter(|(name, _)| wanted(name)).map(|(n, m)| Track::new(n, *m)).collect();
    let mut runs: Vec<Run> = Vec::new();
    for round in 0..rounds {
        for load in LOADS {
            for track in &tracks {
                let run = track.measure(load, seconds);
                println!(
                    "· round {}: {:<13} {:<10} {:>7.2} Gbit/s",
                    round + 1,
                    track.name,
                    load.name(),
                    run.gbit
                );
                runs.push(run);
            }
        }
    }
    let rows = summarise(&tracks, &runs);
    print(&rows);
    write(&json!({
        "rounds": rounds, "seconds": seconds, "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "load_before": load.trim(), "packet_bytes": PACKET,
        "tunn": {
            "encapsulate_ns": tunn.encapsulate_ns, "decapsulate_ns": tunn.decapsulate_ns,
            "gbit_per_core_both_ends": tunn.gbit_per_core(),
        },
        "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
    }));
}

const TRACKS: [(&str, Option<Make>); 4] = [
    ("veth", None),
    ("ours", Some(Make::Ours)),
    ("boringtun-cli", Some(Make::Boringtun)),
    ("wireguard-go", Some(Make::WireguardGo)),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    Tcp(u32),
    Udp,
}

const LOADS: [Load; 3] = [Load::Tcp(1), Load::Tcp(4), Load::Udp];

impl Load {
    fn name(self) -> String {
        match self {
            Self::Tcp(1) => "TCP × 1".to_owned(),
            Self::Tcp(streams) => format!("TCP × {streams}"),
            Self::Udp => "UDP".to_owned(),
        }
    }

    fn arguments(self) -> Vec<String> {
        match self {
            Self::Tcp(streams) => vec!["-P".to_owned(), streams.to_string()],
            // As fast as it goes, in packets that fill the MTU.
            Self::Udp => ["-u", "-b", "0", "-l", &(PACKET - 28).to_string()].map(str::to_owned).to_vec(),
        }
    }
}

/// Two namespaces, and what is between them.
struct Track {
    name: &'static str,
    namespaces: [Namespace; 2],
    devices: Vec<Device>,
    /// Where the server listens.
    far: &'static str,
    _echo: Arc<Echo>,
}

/// What one run showed.
struct Run {
    track: &'static str,
    load: Load,
    gbit: f64,
    retransmits: Option<u64>,
    lost: Option<f64>,
    device_cpu: Option<f64>,
    machine_cpu: f64,
    rtt_us: Vec<f64>,
    rtt_lost: usize,
}

impl Track {
    fn new(name: &'static str, make: Option<Make>) -> Self {
        let namespaces = [Namespace::new(), Namespace::new()];
        let outer = OUTER.map(|address| format!("{address}/24"));
        join((&namespaces[0], &[&outer[0]]), (&namespaces[1], &[&outer[1]]));
        let start = |make, i: usize| Device::start(make, &namespaces[i], &[&format!("{}/24", INNER[i])]);
        let devices: Vec<Device> =
            make.into_iter().flat_map(|make| [start(make, 0), start(make, 1)]).collect();
        if let [one, other] = &devices[..] {
            one.peer(other.key(), &format!("allowed-ips {}/32 endpoint {}:{PORT}", INNER[1], OUTER[1]));
            other.peer(one.key(), &format!("allowed-ips {}/32 endpoint {}:{PORT}", INNER[0], OUTER[0]));
        }
        let far = if devices.is_empty() { OUTER[1] } else { INNER[1] };
        let echo = Arc::new(Echo::start(&namespaces[1], far));
        let track = Self { name, namespaces, devices, far, _echo: echo };
        track.wait_until_it_carries();
        track
    }

    fn wait_until_it_carries(&self) {
        let pinger = Pinger::new(&self.namespaces[0], self.far);
        wait_for("a first answer through the tunnel", || pinger.ping());
    }

    fn measure(&self, load: Load, seconds: u32) -> Run {
        let port = IPERF_PORT.to_string();
        let mut server = self.namespaces[1].command("iperf3");
        server.args(["-s", "-1", "-B", self.far, "-p", &port]).stdout(Stdio::null()).stderr(Stdio::null());
        let _server = Process(server.spawn().expect("iperf3: xtask/setup.sh bench installs it"));
        self.wait_until_iperf_listens();
        let pinging = Arc::new(AtomicBool::new(true));
        let pings = self.ping_while(pinging.clone());
        let before = (self.device_cpu(), machine_cpu());
        let mut client = self.namespaces[0].command("iperf3");
        client.args(["-c", self.far, "-p", &port, "-t", &seconds.to_string(), "-J"]).args(load.arguments());
        let output = client.output().expect("iperf3");
        let after = (self.device_cpu(), machine_cpu());
        pinging.store(false, Ordering::Relaxed);
        let (mut rtt_us, rtt_lost) = pings.join().expect("no panic");
        rtt_us.sort_by(f64::total_cmp);
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON of iperf3");
        let end = &report["end"];
        let received = match load {
            Load::Tcp(_) => end["sum_received"]["bytes"].as_f64(),
            // iperf3 says what was sent, and which share of the packets did not arrive.
            Load::Udp => end["sum"]["bytes"].as_f64().map(|sent| sent * (1.0 - lost_share(end))),
        };
        let received = received.unwrap_or_else(|| panic!("{}: {}", self.name, report["error"]));
        let gigabytes = received / 1e9;
        let per_gigabyte = |cpu: f64| cpu / gigabytes;
        Run {
            track: self.name,
            load,
            gbit: gigabytes * 8.0 / f64::from(seconds),
            retransmits: end["sum_sent"]["retransmits"].as_u64().filter(|_| load != Load::Udp),
            lost: (load == Load::Udp).then(|| lost_share(end)),
            device_cpu: (!self.devices.is_empty()).then(|| per_gigabyte(after.0 - before.0)),
            machine_cpu: per_gigabyte(after.1 - before.1),
            rtt_us,
            rtt_lost,
        }
    }

    fn wait_until_iperf_listens(&self) {
        let listening = format!("{}:{IPERF_PORT}", self.far);
        wait_for("iperf3 to listen", || {
            let sockets = self.namespaces[1].run("ss", &["-Hltn"]);
            sockets.contains(&listening).then_some(())
        });
    }

    /// CPU seconds that the devices of both ends have used.
    fn device_cpu(&self) -> f64 {
        self.devices.iter().map(|device| process_cpu(device.process.0.id())).sum()
    }

    /// Round trips of small packets, in microseconds, while the load runs; and how many did not come back.
    fn ping_while(&self, running: Arc<AtomicBool>) -> std::thread::JoinHandle<(Vec<f64>, usize)> {
        let pinger = Pinger::new(&self.namespaces[0], self.far);
        std::thread::spawn(move || {
            let (mut round_trips, mut lost) = (Vec::new(), 0);
            while running.load(Ordering::Relaxed) {
                let begun = Instant::now();
                match pinger.ping() {
                    Some(()) => round_trips.push(begun.elapsed().as_secs_f64() * 1e6),
                    None => lost += 1,
                }
                std::thread::park_timeout(Duration::from_millis(5));
            }
            (round_trips, lost)
        })
    }
}

const ECHO_PORT: u16 = 7;
/// After which a ping counts as lost.
const PING_TIMEOUT: Duration = Duration::from_millis(500);

/// Answers pings until it is dropped.
struct Echo {
    ended: Arc<AtomicBool>,
}

impl Echo {
    fn start(namespace: &Namespace, address: &str) -> Self {
        let address = SocketAddr::new(address.parse().expect("an address"), ECHO_PORT);
        let socket = namespace.enter(move || UdpSocket::bind(address)).expect("a UDP port");
        socket.set_read_timeout(Some(PING_TIMEOUT)).expect("a timeout");
        let ended = Arc::new(AtomicBool::new(false));
        let seen = ended.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while !seen.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..length], from);
                }
            }
        });
        Self { ended }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

struct Pinger {
    socket: UdpSocket,
    number: std::cell::Cell<u64>,
}

impl Pinger {
    fn new(namespace: &Namespace, far: &str) -> Self {
        let far = SocketAddr::new(far.parse().expect("an address"), ECHO_PORT);
        let socket = namespace.enter(move || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(far)?;
            Ok(socket)
        });
        let socket = socket.expect("a UDP socket");
        socket.set_read_timeout(Some(PING_TIMEOUT)).expect("a timeout");
        Self { socket, number: std::cell::Cell::new(0) }
    }

    /// `None` when no answer came in time.
    fn ping(&self) -> Option<()> {
        let number = self.number.get() + 1;
        self.number.set(number);
        self.socket.send(&number.to_be_bytes()).ok()?;
        let mut answer = [0; 8];
        // Late answers to earlier pings are passed over.
        while answer != number.to_be_bytes() {
            self.socket.recv(&mut answer).ok()?;
        }
        Some(())
    }
}

fn lost_share(end: &Value) -> f64 {
    end["sum"]["lost_percent"].as_f64().unwrap_or(0.0) / 100.0
}

/// User and system time of a process and all its threads, in seconds.
fn process_cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the device runs");
    // The name, which may have spaces in it, is in parentheses; user and system time are fields 14 and 15.
    let fields = stat.rsplit(") ").next().expect("a name").split(' ').skip(11).take(2);
    fields.map(|ticks| ticks.parse::<f64>().expect("a number")).sum::<f64>() / ticks_per_second()
}

/// Time in which the machine's cores were not idle, in seconds.
fn machine_cpu() -> f64 {
    let mut stat = String::new();
    std::fs::File::open("/proc/stat")
        .and_then(|mut file| file.read_to_string(&mut stat))
        .expect("/proc/stat");
    let fields: Vec<f64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|f| f.parse().ok())
        .collect();
    // All but the fourth and fifth (idle and waiting for disks), and guests, which are counted in the first already.
    fields.iter().take(8).enumerate().filter(|(i, _)| *i != 3 && *i != 4).map(|(_, t)| t).sum::<f64>()
        / ticks_per_second()
}

fn ticks_per_second() -> f64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    ticks.expect("the kernel's clock ticks") as f64
}

/// What the cryptography alone costs: nothing can be faster than this per core.
struct TunnCost {
    encapsulate_ns: f64,
    decapsulate_ns: f64,
}

impl TunnCost {
    fn gbit_per_core(&self) -> f64 {
        PACKET as f64 * 8.0 / (self.encapsulate_ns + self.decapsulate_ns)
    }
}

fn tunn_alone() -> TunnCost {
    const BATCH: usize = 1000;
    const BATCHES: usize = 100;
    let (mut one, mut other) = tunnels();
    let mut packet = vec![0u8; PACKET];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(PACKET as u16).to_be_bytes());
    let mut datagrams = vec![vec![0u8; PACKET + 32]; BATCH];
    let mut plain = vec![0u8; PACKET + 32];
    let (mut encapsulating, mut decapsulating) = (Vec::new(), Vec::new());
    for _ in 0..BATCHES {
        let begun = Instant::now();
        for datagram in &mut datagrams {
            assert!(matches!(one.encapsulate(&packet, datagram), TunnResult::WriteToNetwork(_)));
        }
        encapsulating.push(begun.elapsed().as_nanos() as f64 / BATCH as f64);
        let begun = Instant::now();
        for datagram in &datagrams {
            assert!(matches!(other.decapsulate(None, datagram, &mut plain), TunnResult::WriteToTunnelV4(..)));
        }
        decapsulating.push(begun.elapsed().as_nanos() as f64 / BATCH as f64);
    }
    TunnCost { encapsulate_ns: median(encapsulating), decapsulate_ns: median(decapsulating) }
}

/// Two ends with a session between them.
fn tunnels() -> (Tunn, Tunn) {
    let keys = [PrivateKey::generate(), PrivateKey::generate()];
    let end = |i: usize| {
        let public = keys[1 - i].public_key().into();
        Tunn::new(keys[i].secret().clone(), public, None, None, i as u32, None)
    };
    let (mut one, mut other) = (end(0), end(1));
    let mut buffers = [vec![0u8; 2048], vec![0u8; 2048]];
    let mut message = match one.format_handshake_initiation(&mut buffers[0], false) {
        TunnResult::WriteToNetwork(message) => message.to_vec(),
        other => panic!("no initiation: {other:?}"),
    };
    for i in 0..3 {
        let (receiver, buffer) =
            if i % 2 == 0 { (&mut other, &mut buffers[1]) } else { (&mut one, &mut buffers[0]) };
        match receiver.decapsulate(None, &message, buffer) {
            TunnResult::WriteToNetwork(answer) => message = answer.to_vec(),
            TunnResult::Done => break,
            result => panic!("no handshake: {result:?}"),
        }
    }
    (one, other)
}

/// The medians of the runs of one track under one load.
struct Row {
    track: &'static str,
    load: Load,
    gbit: f64,
    /// How often as fast as boringtun-cli under the same load.
    speed_ratio: Option<f64>,
    retransmits: Option<f64>,
    lost: Option<f64>,
    device_cpu: Option<f64>,
    /// How many times less CPU than boringtun-cli.
    cpu_ratio: Option<f64>,
    machine_cpu: f64,
    rtt_p50: f64,
    rtt_p99: f64,
    rtt_lost: f64,
}

fn summarise(tracks: &[Track], runs: &[Run]) -> Vec<Row> {
    let of = |track: &'static str, load: Load| {
        runs.iter().filter(move |run| run.track == track && run.load == load)
    };
    let gbit = |track, load| median(of(track, load).map(|run| run.gbit).collect());
    let cpu = |track, load| optional(of(track, load).map(|run| run.device_cpu));
    let base = "boringtun-cli";
    let mut rows = Vec::new();
    for load in LOADS {
        let has_base = of(base, load).next().is_some();
        for track in tracks.iter().map(|track| track.name) {
            let percentile =
                |share| median(of(track, load).map(|run| percentile(&run.rtt_us, share)).collect());
            rows.push(Row {
                track,
                load,
                gbit: gbit(track, load),
                speed_ratio: has_base.then(|| gbit(track, load) / gbit(base, load)),
                retransmits: optional(of(track, load).map(|run| run.retransmits.map(|count| count as f64))),
                lost: optional(of(track, load).map(|run| run.lost)),
                device_cpu: cpu(track, load),
                cpu_ratio: cpu(base, load).zip(cpu(track, load)).map(|(base, own)| base / own),
                machine_cpu: median(of(track, load).map(|run| run.machine_cpu).collect()),
                rtt_p50: percentile(0.5),
                rtt_p99: percentile(0.99),
                rtt_lost: median(of(track, load).map(|run| run.rtt_lost as f64).collect()),
            });
        }
    }
    rows
}

impl Row {
    fn json(&self) -> Value {
        json!({
            "device": self.track, "load": self.load.name(), "gbit_per_second": self.gbit,
            "times_boringtun_cli": self.speed_ratio, "retransmits": self.retransmits, "lost_share": self.lost,
            "device_cpu_seconds_per_gb": self.device_cpu, "times_less_cpu_than_boringtun_cli": self.cpu_ratio,
            "machine_cpu_seconds_per_gb": self.machine_cpu,
            "ping_p50_us": self.rtt_p50, "ping_p99_us": self.rtt_p99, "pings_lost": self.rtt_lost,
        })
    }
}

fn print(rows: &[Row]) {
    let cell =
        |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    println!(
        "\n{:<9} {:<13} {:>7} {:>6} {:>7} {:>6} {:>10} {:>6} {:>10} {:>9} {:>9}",
        "load",
        "device",
        "Gbit/s",
        "times",
        "retrans",
        "lost",
        "CPU s/GB",
        "times",
        "all s/GB",
        "p50 µs",
        "p99 µs"
    );
    for row in rows {
        println!(
            "{:<9} {:<13} {:>7.2} {:>6} {:>7} {:>6} {:>10} {:>6} {:>10.2} {:>9.0} {:>9.0}",
            row.load.name(),
            row.track,
            row.gbit,
            cell(row.speed_ratio, 1),
            cell(row.retransmits, 0),
            cell(row.lost.map(|share| share * 100.0), 0),
            cell(row.device_cpu, 2),
            cell(row.cpu_ratio, 1),
            row.machine_cpu,
            row.rtt_p50,
            row.rtt_p99,
        );
    }
    println!(
        "\ntimes: as fast as boringtun-cli, and less CPU than it. CPU s/GB: of the device's processes at both ends; all s/GB: \
         of the whole machine, iperf3 and kernel included. lost: % of UDP packets, sent as fast as they can be. p50, p99: \
         round trip of a small packet meanwhile."
    );
}

fn write(report: &Value) {
    if let Some(folder) = std::env::var_os("ISTHMUS_BENCH_DIR") {
        let path = std::path::Path::new(&folder).join("wireguard.json");
        std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&path, format!("{report:#}\n")))
            .expect("the report");
        println!("\n{}", path.display());
    }
}

fn setting(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// `None` when any is missing.
fn optional(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.collect::<Option<Vec<f64>>>().filter(|values| !values.is_empty()).map(median)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Of sorted values.
fn percentile(values: &[f64], share: f64) -> f64 {
    let index = (values.len() as f64 * share).ceil() as usize;
    values.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
