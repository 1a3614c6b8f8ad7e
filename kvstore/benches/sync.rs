//! What synchronizing costs with a real etcd: 130,000 leased keys written through the writer, followed by the store,
//! and read back through the reader.
//!
//! `cargo bench -p isthmus-kvstore --bench sync` prints a table and, with `ISTHMUS_BENCH_DIR` set, writes `sync.json`
//! there. It needs `etcd`
//! (`apt-get install etcd-server`), whose data it keeps in RAM where there is a /dev/shm.
#![allow(clippy::print_stdout, missing_docs)]

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use isthmus_kvstore::{
    Section,
    config::ClientConfig,
    etcd::{EtcdConfig, EtcdEngine},
    memory::{Limits, MemoryStore, StoreId},
    reader::{Reader, ReaderConfig, SectionEvent},
    writer::Writer,
};
use tempfile::TempDir;
use tokio::{sync::mpsc, time::sleep};

const KEYS: usize = 130_000;
const CHANGES: usize = 1_000;
const PREFIX: &str = "cilium/state/ip/v1/default";

#[tokio::main]
async fn main() {
    let mut rows: Vec<(&str, f64, &str)> = Vec::new();
    let etcd = Etcd::start();
    let engine = EtcdEngine::start(EtcdConfig::new(etcd.config())).await;
    let term = engine.begin_term();
    let (writer, store) = (term.writer(), engine.store());

    let before = etcd.cpu_seconds();
    let start = Instant::now();
    for index in 0..KEYS {
        writer.put(key(index), value(index, 0));
    }
    rows.push(("130,000 keys handed to the writer", millis(start), "ms"));
    writer.flush().await;
    rows.push(("130,000 keys written to etcd under leases", millis(start), "ms"));
    while store.stats().keys < KEYS {
        sleep(Duration::from_millis(1)).await;
    }
    rows.push(("... and followed by the store", millis(start), "ms"));
    rows.push(("etcd's processor time meanwhile", (etcd.cpu_seconds() - before) * 1e3, "ms"));

    let start = Instant::now();
    for index in 0..KEYS {
        writer.put(key(index), value(index, 0));
    }
    writer.flush().await;
    rows.push(("the same values again, none of them written", millis(start), "ms"));

    let mut config = ReaderConfig::new(etcd.config());
    config.cluster_config_required = false;
    let reader = Reader::spawn("beta".parse().expect("a valid name"), config);
    let start = Instant::now();
    let mut events = reader.follow(Section::new(PREFIX, None::<&str>));
    let mut puts = 0;
    loop {
        match events.recv().await.expect("the reader lives") {
            SectionEvent::Put { .. } => puts += 1,
            SectionEvent::Delete { .. } => {}
            SectionEvent::Synced { .. } => break,
        }
    }
    assert_eq!(puts, KEYS);
    rows.push(("130,000 keys read back from etcd", millis(start), "ms"));

    let (p50, p99) = latencies(writer, &mut events).await;
    rows.push(("one change, from the writer through etcd to a reader, p50", p50.as_secs_f64() * 1e6, "us"));
    rows.push(("one change, from the writer through etcd to a reader, p99", p99.as_secs_f64() * 1e6, "us"));

    let writer = Writer::memory(MemoryStore::new(StoreId::random(), Limits::default()));
    let start = Instant::now();
    for index in 0..KEYS {
        writer.put(key(index), value(index, 0));
    }
    rows.push(("130,000 keys written to the memory engine", millis(start), "ms"));

    if let Some(dir) = std::env::var_os("ISTHMUS_BENCH_DIR") {
        let fields = rows.iter().map(|(what, figure, unit)| (format!("{what} ({unit})"), (*figure).into()));
        let report = serde_json::Value::Object(fields.collect());
        let dir = std::path::PathBuf::from(dir);
        std::fs::create_dir_all(&dir).expect("the folder for the report");
        std::fs::write(dir.join("sync.json"), format!("{report:#}\n")).expect("the report");
    }
    for (what, figure, unit) in rows {
        println!("{what:<68} {figure:>14.1} {unit}");
    }
}

/// Changes one key at a time and waits until the reader's consumer sees it.
async fn latencies(writer: &Writer, events: &mut mpsc::Receiver<SectionEvent>) -> (Duration, Duration) {
    let mut took = Vec::with_capacity(CHANGES);
    for round in 0..CHANGES {
        let start = Instant::now();
        writer.put(key(round), value(round, 1));
        while !matches!(events.recv().await, Some(SectionEvent::Put { .. })) {}
        took.push(start.elapsed());
    }
    took.sort_unstable();
    (took[CHANGES / 2], took[CHANGES * 99 / 100])
}

fn millis(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn key(index: usize) -> String {
    format!("{PREFIX}/10.{}.{}.{}", index >> 16, (index >> 8) & 255, index & 255)
}

/// An address as exporters write them, in size.
fn value(index: usize, round: usize) -> String {
    format!(
        r#"{{"IP":"10.{}.{}.{}","Mask":null,"HostIP":"172.18.0.3","ID":199472,"Key":{round},"Metadata":"","K8sNamespace":"foo","K8sPodName":"cep-001"}}"#,
        index >> 16,
        (index >> 8) & 255,
        index & 255
    )
}

/// A real etcd in plain text on loopback, ended with the benchmark.
struct Etcd {
    process: Child,
    port: u16,
    _data: TempDir,
}

impl Etcd {
    fn start() -> Self {
        let ram = Path::new("/dev/shm");
        let data = if ram.is_dir() { TempDir::new_in(ram) } else { TempDir::new() };
        let data = data.expect("a directory for etcd's data");
        let listeners = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let [port, peer] = listeners.map(|listener| listener.local_addr().expect("it is bound").port());
        let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer}"));
        let process = Command::new("etcd")
            .arg(format!("--data-dir={}", data.path().join("data").display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=default={peer}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd starts; apt-get install etcd-server");
        Self { process, port, _data: data }
    }

    fn config(&self) -> ClientConfig {
        let text = format!("endpoints: ['http://127.0.0.1:{}']\ninsecure-transport: true\n", self.port);
        ClientConfig::parse(&text).expect("a valid configuration")
    }

    /// What the process has used so far, by the kernel's clock of 100 ticks a second.
    fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: f64 = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<f64>().ok())
            .sum();
        ticks / 100.0
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
