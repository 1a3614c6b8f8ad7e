//! What the resolver costs: a change of one identity, one policy or one endpoint among many, and everything at once.
//!
//! A node with 100 pods in a mesh of 5 clusters: 1,000 policies in 100 namespaces, 10,000 identities. Half of the policies
//! select peers of their own namespace, a quarter those of a namespace of another cluster, the rest whoever has a label
//! anywhere, addresses, or entities.
//!
//! `cargo bench -p isthmus-policy --bench resolve` prints a table and, with `ISTHMUS_BENCH_DIR` set, writes `resolve.json`
//! there.
#![allow(clippy::print_stdout, missing_docs)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_policy::parse;
use isthmus_policy::{
    Changes, EndpointChange, EndpointId, Engine, NamedPorts, PolicyKind, PolicyName, Settings, Subject,
};
use isthmus_wire::{Labels, NumericIdentity};
use serde_json::{Value, json};

const NAMESPACES: u32 = 100;
const POLICIES: u32 = 1_000;
const IDENTITIES: u32 = 10_000;
const CLUSTERS: u32 = 5;
const APPS: u32 = IDENTITIES / NAMESPACES / CLUSTERS;
const ENDPOINTS: u32 = 100;
const SAMPLES: usize = 201;

fn main() {
    // `cargo test --benches` calls it with this; there is nothing to test.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let mut report = Report::default();
    let mut whole = Vec::new();
    for _ in 0..5 {
        let mut engine = told();
        let started = Instant::now();
        black_box(engine.take_changes());
        whole.push(started.elapsed());
    }
    let started = Instant::now();
    let mut engine = told();
    let telling = started.elapsed();
    let changes = engine.take_changes();
    assert_eq!(changes.endpoints.len(), ENDPOINTS as usize);
    report.add("tell 1,000 policies and 10,000 identities", "ms", None, milliseconds(telling));
    report.add("resolve all of it for 100 endpoints", "ms", None, milliseconds(median(whole)));
    entries(&changes, &mut report);

    // A new version of an app: labels that nobody else has, selected by what selects its like.
    let version = Cell::new(0);
    let known = |engine: &mut Engine, on: bool| {
        let mut labels = labels(3, 1, 7);
        version.set(version.get() + u32::from(on));
        labels.insert_k8s("version", &version.get().to_string()).expect("valid");
        one_identity(engine, labels, on)
    };
    let (added, touched) =
        sample(&mut engine, |engine| known(engine, true), |engine| drop(known(engine, false)));
    report.add("one new identity", "us", Some(1000.0), microseconds(added));
    assert!(touched > 0.0 && touched < 10.0, "{touched} endpoints: those that select it, and no others");
    report.add("endpoints that it touches", "", None, touched);
    let (removed, _) = sample(&mut engine, |engine| known(engine, false), |engine| drop(known(engine, true)));
    report.add("one identity gone", "us", Some(1000.0), microseconds(removed));
    // Of another cluster, in a namespace that no policy is about.
    let mut strange = Labels::new();
    for (key, value) in [("role", "new"), (Labels::NAMESPACE, "elsewhere"), (Labels::CLUSTER, "cluster-4")] {
        strange.insert_k8s(key, value).expect("valid");
    }
    let stranger = |engine: &mut Engine, on: bool| one_identity(engine, strange.clone(), on);
    let (added, touched) =
        sample(&mut engine, |engine| stranger(engine, true), |engine| drop(stranger(engine, false)));
    report.add("one new identity that no rule selects", "us", Some(1000.0), microseconds(added));
    assert!(touched == 0.0, "what nothing selects touches nobody");

    let name = policy_name(0);
    let (one, other) = (parse::policy(&name, &[policy(0)]), parse::policy(&name, &[policy(3)]));
    let change = |engine: &mut Engine, on: bool| {
        engine.set_policy(name.clone(), Some(if on { other.clone() } else { one.clone() }));
        engine.take_changes()
    };
    let (changed, touched) =
        sample(&mut engine, |engine| change(engine, true), |engine| drop(change(engine, false)));
    report.add("one policy changed", "us", None, microseconds(changed));
    report.add("endpoints that it touches", "", None, touched);
    let endpoint = |engine: &mut Engine, on: bool| {
        engine.set_endpoint(EndpointId(9_999), on.then(|| subject(1)));
        engine.take_changes()
    };
    let (added, _) =
        sample(&mut engine, |engine| endpoint(engine, true), |engine| drop(endpoint(engine, false)));
    report.add("one new endpoint", "us", None, microseconds(added));
    report.print();
    report.write();
}

/// An engine that has been told everything and asked nothing.
fn told() -> Engine {
    let mut engine = Engine::new(Settings::new("cluster-0".parse().expect("valid")));
    for namespace in 0..NAMESPACES {
        let labels = BTreeMap::from([("team".to_owned(), format!("team-{}", namespace % 10))]);
        engine.set_namespace(&namespace_name(namespace), Some(labels));
    }
    for number in 0..POLICIES {
        let name = policy_name(number);
        let parsed = parse::policy(&name, &[policy(number)]);
        assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
        engine.set_policy(name, Some(parsed));
    }
    for namespace in 0..NAMESPACES {
        for cluster in 0..CLUSTERS {
            for app in 0..APPS {
                let local = 256 + namespace * APPS + app;
                let id = NumericIdentity(((cluster + 1) << 16) | local);
                engine.set_identity(id, Some(Arc::new(labels(namespace, cluster, app))));
            }
        }
    }
    for number in 0..ENDPOINTS {
        engine.set_endpoint(EndpointId(number.into()), Some(subject(number)));
    }
    engine
}

/// Ten policies per namespace.
fn policy(number: u32) -> Value {
    let namespace = number % NAMESPACES;
    let kind = number / NAMESPACES;
    let app = |number: u32| format!("app-{}", number % APPS);
    let port = json!([{"ports": [{"port": (8000 + number % 7).to_string(), "protocol": "TCP"}]}]);
    let subject = json!({"matchLabels": {"app": app(kind)}});
    match kind {
        0..=4 => json!({"endpointSelector": subject,
            "ingress": [{"fromEndpoints": [{"matchLabels": {"app": app(kind + 1)}}, {}], "toPorts": port}]}),
        5 | 6 => json!({"endpointSelector": {}, "egress": [{"toEndpoints": [{"matchLabels": {
                "app": app(number),
                "k8s:io.kubernetes.pod.namespace": namespace_name(namespace + 1),
                "io.cilium.k8s.policy.cluster": format!("cluster-{}", number % CLUSTERS),
            }}], "toPorts": port}]}),
        7 => json!({"endpointSelector": subject, "ingress": [{"fromEndpoints": [{
            "matchLabels": {"app": app(number)},
            "matchExpressions": [
                {"key": "k8s:io.kubernetes.pod.namespace", "operator": "Exists"},
                {"key": "io.cilium.k8s.policy.cluster", "operator": "Exists"},
            ],
        }]}]}),
        8 => json!({"endpointSelector": {}, "egress": [
            {"toCIDRSet": [{"cidr": format!("10.{}.0.0/16", 100 + namespace), "except": [format!("10.{}.9.0/24", 100 + namespace)]}]},
            {"toEntities": ["cluster"], "toPorts": [{"ports": [{"port": "53", "protocol": "UDP"}]}]},
        ]}),
        _ => {
            json!({"endpointSelector": subject, "ingressDeny": [{"fromEntities": ["world"]}], "ingress": [{"fromEntities": ["cluster"]}]})
        }
    }
}

fn policy_name(number: u32) -> PolicyName {
    PolicyName {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: Some(namespace_name(number % NAMESPACES).parse().expect("valid")),
        name: format!("policy-{number}").parse().expect("valid"),
    }
}

fn namespace_name(namespace: u32) -> String {
    format!("namespace-{}", namespace % NAMESPACES)
}

fn labels(namespace: u32, cluster: u32, app: u32) -> Labels {
    let mut labels = Labels::new();
    let team = format!("{}team", Labels::NAMESPACE_LABEL_PREFIX);
    for (key, value) in [
        ("app", format!("app-{app}")),
        ("tier", (if app.is_multiple_of(2) { "front" } else { "back" }).to_owned()),
        (Labels::NAMESPACE, namespace_name(namespace)),
        (Labels::CLUSTER, format!("cluster-{cluster}")),
        (&team, format!("team-{}", namespace % 10)),
    ] {
        labels.insert_k8s(key, &value).expect("valid");
    }
    labels
}

fn subject(number: u32) -> Subject {
    Subject {
        namespace: namespace_name(number % NAMESPACES).into(),
        labels: BTreeMap::from([
            ("app".to_owned(), format!("app-{}", number % 10)),
            ("tier".to_owned(), (if number.is_multiple_of(2) { "front" } else { "back" }).to_owned()),
        ]),
        service_account: "default".into(),
        named_ports: NamedPorts::new(),
    }
}

fn one_identity(engine: &mut Engine, labels: Labels, on: bool) -> Changes {
    let labels = on.then(|| Arc::new(labels));
    engine.set_identity(NumericIdentity((2 << 16) | 60_000), labels);
    engine.take_changes()
}

/// Median time of `what`, which `undo` undoes, and how many endpoints it touches. No endpoint may come whole because of a
/// single identity.
fn sample(
    engine: &mut Engine,
    what: impl Fn(&mut Engine) -> Changes,
    undo: impl Fn(&mut Engine),
) -> (Duration, f64) {
    undo(engine);
    let mut times = Vec::with_capacity(SAMPLES);
    let mut touched = 0;
    for _ in 0..SAMPLES {
        let started = Instant::now();
        let changes = black_box(what(engine));
        times.push(started.elapsed());
        touched = changes.endpoints.len();
        undo(engine);
    }
    what(engine);
    (median(times), touched as f64)
}

fn entries(changes: &Changes, report: &mut Report) {
    let mut sizes: Vec<usize> = changes
        .endpoints
        .iter()
        .map(|(_, change)| match change {
            EndpointChange::Replace(resolved) => resolved.entries.len(),
            EndpointChange::Update { .. } | EndpointChange::Remove => panic!("a first change is whole"),
        })
        .collect();
    sizes.sort_unstable();
    report.add("map entries per endpoint, median", "", None, sizes[sizes.len() / 2] as f64);
    report.add("map entries per endpoint, most", "", Some(16_384.0), sizes[sizes.len() - 1] as f64);
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[derive(Default)]
struct Report(Vec<Row>);

struct Row {
    name: String,
    value: f64,
    unit: &'static str,
    /// At most this.
    target: Option<f64>,
}

impl Report {
    fn add(&mut self, name: &str, unit: &'static str, target: Option<f64>, value: f64) {
        self.0.push(Row { name: name.to_owned(), value, unit, target });
    }

    fn print(&self) {
        println!("| resolver (median) | figure | target |\n|---|---|---|");
        for Row { name, value, unit, target } in &self.0 {
            let target = target.map_or(String::new(), |target| format!("<= {target} {unit}"));
            let digits = if *value < 10.0 && !unit.is_empty() { 2 } else { 0 };
            println!("| {name} | {value:.digits$} {unit} | {target} |");
        }
    }

    fn write(&self) {
        let Some(dir) = std::env::var_os("ISTHMUS_BENCH_DIR") else { return };
        std::fs::create_dir_all(&dir).expect("the folder for the report");
        let row = |Row { name, value, unit, target }: &Row| json!({"name": name, "value": value, "unit": unit, "target": target});
        let text =
            serde_json::to_string_pretty(&self.0.iter().map(row).collect::<Vec<_>>()).expect("plain values");
        std::fs::write(std::path::Path::new(&dir).join("resolve.json"), text).expect("write the report");
    }
}
