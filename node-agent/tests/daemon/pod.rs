//! A pod: an object in a small Kubernetes API, and a process in a cgroup and a network namespace of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;

use crate::place::Place;
use crate::sandbox::{Namespace, ip};

/// Lists and watches of pods, and nothing else.
#[derive(Clone)]
pub(crate) struct PodsApi {
    address: SocketAddr,
    state: Arc<ApiState>,
}

struct ApiState {
    pods: Mutex<BTreeMap<String, Value>>,
    changes: broadcast::Sender<Bytes>,
}

impl PodsApi {
    pub(crate) async fn serve() -> Self {
        let state = Arc::new(ApiState { pods: Mutex::default(), changes: broadcast::channel(64).0 });
        let router = Router::new().route("/api/v1/pods", get(pods)).with_state(state.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, state }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn put(&self, name: &str, uid: &str) {
        self.change("ADDED", name, uid, false);
    }

    pub(crate) fn put_on_host_network(&self, name: &str, uid: &str) {
        self.change("ADDED", name, uid, true);
    }

    pub(crate) fn delete(&self, name: &str, uid: &str) {
        self.change("DELETED", name, uid, false);
    }

    fn change(&self, kind: &str, name: &str, uid: &str, host_network: bool) {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "default", "name": name, "uid": uid, "resourceVersion": "2"},
            "spec": {"nodeName": "node-0", "hostNetwork": host_network, "containers": []},
            "status": {"phase": "Running"},
        });
        let mut pods = self.state.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if kind == "DELETED" {
            pods.remove(uid);
        } else {
            pods.insert(uid.to_owned(), pod.clone());
        }
        // Nobody may be watching yet; the list will show it.
        let _ = self.state.changes.send(line(kind, &pod));
    }
}

fn line(kind: &str, pod: &Value) -> Bytes {
    format!("{}\n", json!({"type": kind, "object": pod})).into()
}

async fn pods(State(state): State<Arc<ApiState>>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    assert_eq!(query.get("fieldSelector").map(String::as_str), Some("spec.nodeName=node-0"));
    if query.contains_key("watch") {
        let changes = BroadcastStream::new(state.changes.subscribe());
        // What has come between the list and the watch must not be missed; twice is no harm.
        let known: Vec<_> = {
            let pods = state.pods.lock().unwrap_or_else(PoisonError::into_inner);
            pods.values().map(|pod| line("ADDED", pod)).collect()
        };
        let lines = tokio_stream::iter(known).chain(changes.filter_map(Result::ok)).map(Ok::<_, Infallible>);
        return Body::from_stream(lines).into_response();
    }
    let items: Vec<Value> =
        state.pods.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
    let list =
        json!({"apiVersion": "v1", "kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": items});
    Json(list).into_response()
}

/// What the kubelet and the CNI make of a pod.
pub(crate) struct PodProcess {
    process: Child,
    directories: Vec<PathBuf>,
    _namespace: Namespace,
}

impl PodProcess {
    pub(crate) fn start(place: &Place, uid: &str) -> Self {
        let namespace = Namespace::new();
        ip("link add name host0 type veth peer name pod0");
        ip("link set host0 up");
        ip(&format!("link set pod0 netns {}", namespace.path()));
        let process = namespace
            .run(|| Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().expect("a process"));
        let mut directories = Vec::new();
        let mut directory = place.cgroup().to_owned();
        for name in ["kubepods", "besteffort", &format!("pod{uid}"), "container"] {
            directory.push(name);
            fs::create_dir(&directory).expect("a cgroup");
            // Below the test's cgroup, which is threaded, everything is.
            fs::write(directory.join("cgroup.type"), "threaded").expect("a threaded cgroup");
            directories.push(directory.clone());
        }
        fs::write(directory.join("cgroup.threads"), process.id().to_string()).expect("move the process");
        Self { process, directories, _namespace: namespace }
    }

    /// Index of the host's side of its interface.
    pub(crate) fn interface(&self) -> u32 {
        nix::net::if_::if_nametoindex("host0").expect("the interface")
    }
}

impl Drop for PodProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The kernel takes its time to remove what was in a namespace.
        ip("link delete host0");
        for directory in self.directories.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}
