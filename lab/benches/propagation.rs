//! How long a change takes from one cluster's Kubernetes API to the eBPF maps of another cluster's node, by stage:
//! the API's answer, the exporter's put, the peer relay's put, the maps. As root; raises a lab of two clusters.
//!
//! `cargo bench -p isthmus-lab --bench propagation` prints a table and, with `ISTHMUS_BENCH_DIR` set, writes
//! `propagation.json` there. 1,000 changes at 50 a second; `PROPAGATION_CHANGES` and `PROPAGATION_RATE` say otherwise.
//!
//! Each change gives one endpoint of a global service of ten an address that says which change it is. Stages are seen
//! by watches on both gateways, through a forwarder, and by the agent's own report of what it has applied.
#![allow(clippy::print_stdout, clippy::expect_used, missing_docs)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isthmus_kvstore::Section;
use isthmus_kvstore::config::ClientConfig;
use isthmus_kvstore::reader::{Reader, ReaderConfig, SectionEvent};
use isthmus_lab::names::{Families, LabName};
use isthmus_lab::spec::{ClusterSpec, Encryption, LabSpec, Peering, Store};
use isthmus_lab::{Lab, cleanup};
use isthmus_node_agent::status::Applied;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

/// Nanoseconds since 1970 at which each change was first seen at each stage; 0: not yet.
type Seen = Arc<Mutex<Vec<[u64; 4]>>>;
const STAGES: [&str; 4] = [
    "Kubernetes API answers",
    "exporter has put it",
    "peer's relay has put it",
    "remote node's maps hold it",
];

#[tokio::main]
async fn main() {
    let number =
        |name: &str, default: usize| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (changes, rate) = (number("PROPAGATION_CHANGES", 1000), number("PROPAGATION_RATE", 50));
    let name: LabName = "bench-propagation".parse().expect("a lab name");
    cleanup::down(&name).await.expect("remove what an earlier run left");
    let lab = Lab::up(spec(name), &mut |stage| println!("· {stage}")).await.expect("a lab");
    println!("· {changes} changes, {rate} a second");
    let rows = measure(&lab, changes, rate).await;
    let engine = lab.spec().store.as_str();
    report(&rows, changes, rate, engine);
    lab.down().await.expect("remove the lab");
}

fn spec(name: LabName) -> LabSpec {
    let cluster = |name: &str, id, peer: &str| ClusterSpec {
        name: name.into(),
        id,
        nodes: vec![format!("{name}-node1")],
        replicas: 1,
        peers: vec![peer.into()],
    };
    LabSpec {
        name,
        scenario: "bench".into(),
        families: Families::V4,
        store: if std::env::var("STORE").is_ok_and(|s| s == "etcd") { Store::Etcd } else { Store::Memory },
        max_connected_clusters: 255,
        encryption: Encryption::default(),
        peering: Peering::default(),
        connected: true,
        drain_grace: None,
        mesh: true,
        clusters: vec![cluster("alpha", 1, "beta"), cluster("beta", 2, "alpha")],
    }
}

async fn measure(lab: &Lab, changes: usize, rate: usize) -> Vec<[Option<f64>; 4]> {
    let (alpha, beta) = (lab.cluster("alpha").expect("alpha"), lab.cluster("beta").expect("beta"));
    for cluster in [alpha, beta] {
        let services: Api<k8s_openapi::api::core::v1::Service> = Api::namespaced(cluster.client(), "default");
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "bench", "annotations": {"service.cilium.io/global": "true"}},
            "spec": {"ports": [{"name": "http", "port": 80}]},
        });
        services
            .patch("bench", &PatchParams::apply("bench"), &Patch::Apply(service))
            .await
            .expect("a service");
    }
    let slices: Api<EndpointSlice> = Api::namespaced(alpha.client(), "default");
    let apply = PatchParams::apply("bench").force();
    slices.patch("bench", &apply, &Patch::Apply(slice(0))).await.expect("a slice");

    let seen: Seen = Arc::new(Mutex::new(vec![[0; 4]; changes + 1]));
    // The revision in beta's store that holds each change.
    let revisions: Arc<Mutex<Vec<u64>>> = Arc::new(Mutex::new(vec![0; changes + 1]));
    let exported = follow(alpha, "cilium/state/services/v1", Arc::clone(&seen), 1, None).await;
    let relayed =
        follow(beta, "cilium/cache/services/v1/alpha", Arc::clone(&seen), 2, Some(Arc::clone(&revisions)))
            .await;
    let applied =
        tokio::spawn(listen(beta.agent_socket("beta-node1"), Arc::clone(&seen), Arc::clone(&revisions)));
    wait_for(&seen, 0, 2).await;

    let mut begun = vec![0; changes + 1];
    let mut tick = tokio::time::interval(Duration::from_secs(1) / rate as u32);
    for (i, begun) in begun.iter_mut().enumerate().skip(1) {
        tick.tick().await;
        let patch = Patch::Merge(json!({"endpoints": slice(i)["endpoints"]}));
        *begun = now();
        slices.patch("bench", &PatchParams::default(), &patch).await.expect("a change");
        note(&seen, i, 0, now());
    }
    wait_for(&seen, changes, 3).await;
    drop((exported, relayed));
    applied.abort();
    let seen = seen.lock().expect("no panic");
    let since = |from: u64, to: u64| (to > 0).then(|| to.saturating_sub(from) as f64 / 1e6);
    (1..=changes).map(|i| std::array::from_fn(|stage| since(begun[i], seen[i][stage]))).collect()
}

fn slice(change: usize) -> serde_json::Value {
    let fixed = (1..10).map(|n| format!("10.1.0.{}", 100 + n));
    let moving = format!("10.1.{}.{}", 1 + change / 250, 1 + change % 250);
    let endpoints: Vec<_> =
        fixed.chain([moving]).map(|a| json!({"addresses": [a], "conditions": {"ready": true}})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "bench", "labels": {"kubernetes.io/service-name": "bench"}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
    })
}

/// Which change a value shows.
fn change_in(value: &[u8]) -> Option<usize> {
    let value: serde_json::Value = serde_json::from_slice(value).ok()?;
    let backends = value["backends"].as_object()?;
    backends.keys().find_map(|address| {
        let octets: Vec<usize> = address.split('.').filter_map(|o| o.parse().ok()).collect();
        (octets.len() == 4 && octets[2] > 0).then(|| (octets[2] - 1) * 250 + octets[3] - 1)
    })
}

/// A value that shows a change shows all before it: the newest state is what counts, and some are never seen alone.
fn note(seen: &Seen, change: usize, stage: usize, at: u64) {
    let mut seen = seen.lock().expect("no panic");
    for i in (0..=change.min(seen.len() - 1)).rev() {
        if seen[i][stage] != 0 {
            break;
        }
        seen[i][stage] = at;
    }
}

async fn follow(
    cluster: &isthmus_lab::Cluster,
    prefix: &'static str,
    seen: Seen,
    stage: usize,
    revisions: Option<Arc<Mutex<Vec<u64>>>>,
) -> Reader {
    let config =
        ClientConfig::parse(&cluster.gateway_door().await.expect("a door")).expect("a client configuration");
    let reader = Reader::spawn(cluster.name().parse().expect("a name"), ReaderConfig::new(config));
    let mut events = reader.follow(Section { prefix: prefix.into(), canary: None });
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            let SectionEvent::Put { value, revision, .. } = event else { continue };
            let Some(change) = change_in(&value) else { continue };
            note(&seen, change, stage, now());
            if let Some(revisions) = &revisions {
                let mut revisions = revisions.lock().expect("no panic");
                for i in (0..=change.min(revisions.len() - 1)).rev() {
                    if revisions[i] != 0 {
                        break;
                    }
                    revisions[i] = revision as u64;
                }
            }
        }
    });
    reader
}

/// Reads what the agent applies, line by line.
async fn listen(socket: std::path::PathBuf, seen: Seen, revisions: Arc<Mutex<Vec<u64>>>) {
    let mut stream = tokio::net::UnixStream::connect(&socket).await.expect("the agent's socket");
    stream.write_all(b"GET /v1/applied HTTP/1.0\r\nHost: localhost\r\n\r\n").await.expect("a request");
    let mut lines = BufReader::new(stream).lines();
    // Batches may be reported before the relay's watch has told which change they hold.
    let mut reached: Vec<(u64, u64)> = Vec::new();
    loop {
        let line = tokio::time::timeout(Duration::from_millis(5), lines.next_line()).await;
        if let Ok(Ok(Some(line))) = &line
            && let Ok(applied) = serde_json::from_str::<Applied>(line)
        {
            let of_alpha = applied.sections.iter().filter(|(s, _)| s.contains("cache/services/v1/alpha"));
            reached.extend(of_alpha.map(|(_, revision)| (*revision, applied.applied_unix_nanos)));
        }
        if matches!(line, Ok(Ok(None) | Err(_))) {
            return;
        }
        reached.retain(|(revision, at)| {
            let known = revisions.lock().expect("no panic").clone();
            let newest = known.iter().rposition(|r| *r != 0 && r <= revision);
            if let Some(change) = newest {
                note(&seen, change, 3, *at);
            }
            // Kept until the watch has caught up with it.
            known.iter().max().is_none_or(|newest| newest < revision)
        });
    }
}

async fn wait_for(seen: &Seen, change: usize, stage: usize) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while seen.lock().expect("no panic")[change][stage] == 0 {
        assert!(tokio::time::Instant::now() < deadline, "change {change} has not reached: {}", STAGES[stage]);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

fn report(rows: &[[Option<f64>; 4]], changes: usize, rate: usize, store: &str) {
    println!("\n{:<28} {:>9} {:>9} {:>9} {:>9}", "ms after the change", "p50", "p95", "p99", "most");
    let mut stages = Vec::new();
    for (stage, name) in STAGES.iter().enumerate() {
        let mut times: Vec<f64> = rows.iter().filter_map(|row| row[stage]).collect();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            times
                .get(((times.len() as f64 * share).ceil() as usize).saturating_sub(1))
                .copied()
                .unwrap_or(f64::NAN)
        };
        let (p50, p95, p99, most) = (at(0.5), at(0.95), at(0.99), at(1.0));
        println!("{name:<28} {p50:>9.2} {p95:>9.2} {p99:>9.2} {most:>9.2}");
        stages.push(json!({"stage": name, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "max_ms": most, "seen": times.len()}));
    }
    let report = json!({"changes": changes, "rate_per_second": rate, "store": store, "stages": stages});
    if let Some(dir) = std::env::var_os("ISTHMUS_BENCH_DIR") {
        let path = std::path::Path::new(&dir).join("propagation.json");
        std::fs::create_dir_all(&dir)
            .and_then(|()| std::fs::write(&path, format!("{report:#}\n")))
            .expect("the report");
        println!("\n{}", path.display());
    }
}
