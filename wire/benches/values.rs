//! What reading and writing costs a relay or an agent, per entry of a peer.
//!
//! `cargo bench -p isthmus-wire --bench values` prints a table and, with `ISTHMUS_BENCH_DIR` set, writes `values.json` there.
#![allow(clippy::print_stdout, missing_docs)]

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use isthmus_wire::validate::{self, RemoteCluster};
use isthmus_wire::value::{AddressType, Endpoint, EndpointPort, Protocol, ServicePort};
use isthmus_wire::{
    ClusterEndpointSlice, ClusterService, IpIdentityPair, Key, Labels, MaxConnectedClusters, Node,
    NumericIdentity,
};

/// How long each row is measured.
const MEASURED: Duration = Duration::from_millis(500);

fn main() {
    let remote = RemoteCluster {
        name: "beta".parse().expect("valid"),
        id: 2.try_into().expect("valid"),
        max_connected_clusters: MaxConnectedClusters::C255,
    };
    let ip = IpIdentityPair {
        namespace: "app".to_owned(),
        pod_name: "echo-7d4b9c-x2x1z".to_owned(),
        service_account: "default".to_owned(),
        host_ip: Some([172, 18, 0, 2].into()),
        ..IpIdentityPair::new([10, 2, 0, 7].into(), NumericIdentity(131_079))
    };
    let mut labels = Labels::new();
    for (key, value) in [("app", "echo"), (Labels::CLUSTER, "beta"), (Labels::NAMESPACE, "app")] {
        labels.insert_k8s(key, value).expect("valid");
    }
    let node = Node::new(remote.name.clone(), remote.id, "node-1".parse().expect("valid"));
    let (small, large) = (service(&remote, 10), service(&remote, 10_000));
    let slice = slice(&remote, 1_000);

    let mut rows: Vec<(String, f64)> = Vec::new();
    let mut row =
        |what: &str, size: usize, nanoseconds: f64| rows.push((format!("{what}, {size} B"), nanoseconds));
    let entries: [(&str, &str, Bytes); 6] = [
        ("check an address", "cilium/state/ip/v1/default/10.2.0.7", ip.encode()),
        ("check an identity", "cilium/state/identities/v1/id/131079", labels.encode()),
        ("check a node", "cilium/state/nodes/v1/beta/node-1", node.encode()),
        ("check a service of 10 backends", "cilium/state/services/v1/beta/app/echo", small.encode()),
        ("check a service of 10,000 backends", "cilium/state/services/v1/beta/app/echo", large.encode()),
        (
            "check a slice of 1,000 endpoints",
            "cilium/state/endpointslices/v1/beta/app/echo-1",
            slice.encode(),
        ),
    ];
    for (what, key, value) in &entries {
        let nanoseconds = time(|| {
            let key = Key::parse(black_box(key.as_bytes())).expect("valid");
            validate::entry(&key, black_box(value), &remote).expect("honest");
        });
        row(what, value.len(), nanoseconds);
    }
    row("write a service of 10 backends", small.encode().len(), time(|| drop(black_box(small.encode()))));
    row("write a service of 10,000 backends", large.encode().len(), time(|| drop(black_box(large.encode()))));
    row("write a slice of 1,000 endpoints", slice.encode().len(), time(|| drop(black_box(slice.encode()))));

    if let Some(dir) = std::env::var_os("ISTHMUS_BENCH_DIR") {
        let fields = rows.iter().cloned().map(|(what, nanoseconds)| (what, serde_json::json!(nanoseconds)));
        let report = serde_json::Value::Object(fields.collect());
        let dir = std::path::PathBuf::from(dir);
        std::fs::create_dir_all(&dir).expect("the folder for the report");
        std::fs::write(dir.join("values.json"), format!("{report:#}\n")).expect("the report");
    }
    for (what, nanoseconds) in rows {
        println!("{what:<68} {:>14.2} µs", nanoseconds / 1e3);
    }
}

/// Nanoseconds per call.
fn time(mut call: impl FnMut()) -> f64 {
    call();
    let begun = Instant::now();
    let mut calls = 0;
    while begun.elapsed() < MEASURED {
        call();
        calls += 1;
    }
    begun.elapsed().as_nanos() as f64 / f64::from(calls)
}

fn pod(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from_be_bytes([10, 2, 0, 0]) + number)
}

fn service(remote: &RemoteCluster, backends: u32) -> ClusterService {
    let (namespace, name) = ("app".parse().expect("valid"), "echo".parse().expect("valid"));
    let mut service = ClusterService::new(remote.name.clone(), remote.id, namespace, name);
    for number in 0..backends {
        let ports =
            [("http".into(), ServicePort { protocol: Protocol::Tcp, port: 8080 })].into_iter().collect();
        service.backends.insert(pod(number).into(), ports);
    }
    service
}

fn slice(remote: &RemoteCluster, endpoints: u32) -> ClusterEndpointSlice {
    let endpoint = |number| Endpoint {
        addresses: vec![pod(number).into()],
        node_name: Some(format!("node-{}", number % 50)),
        ..Endpoint::default()
    };
    ClusterEndpointSlice {
        cluster: remote.name.clone(),
        cluster_id: remote.id,
        namespace: "app".parse().expect("valid"),
        name: "echo-1".parse().expect("valid"),
        labels: [(ClusterEndpointSlice::SERVICE_NAME.to_owned(), "echo".to_owned())].into(),
        annotations: [].into(),
        address_type: AddressType::IPv4,
        endpoints: (0..endpoints).map(endpoint).collect(),
        ports: vec![EndpointPort {
            name: Some("http".to_owned()),
            protocol: Protocol::Tcp,
            port: Some(8080),
            app_protocol: None,
        }],
    }
}
