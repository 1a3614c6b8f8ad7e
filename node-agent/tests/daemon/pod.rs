//! A pod: an object in a small Kubernetes API, and a process in a cgroup and a network namespace of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, patch, post};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;

use crate::place::Place;
use crate::sandbox::{Namespace, ip};

/// Lists and watches of pods; policies of the namespace `default`, with their status; and Events.
#[derive(Clone)]
pub(crate) struct PodsApi {
    address: SocketAddr,
    state: Arc<ApiState>,
}

struct ApiState {
    pods: Mutex<BTreeMap<String, Value>>,
    changes: broadcast::Sender<Bytes>,
    policies: Mutex<BTreeMap<String, Value>>,
    events: Mutex<Vec<Value>>,
}

impl PodsApi {
    pub(crate) async fn serve() -> Self {
        let state = Arc::new(ApiState {
            pods: Mutex::default(),
            changes: broadcast::channel(64).0,
            policies: Mutex::default(),
            events: Mutex::default(),
        });
        let of_namespace = "/apis/cilium.io/v2/namespaces/default/ciliumnetworkpolicies/{name}";
        let router = Router::new()
            .route("/api/v1/pods", get(pods))
            .route("/apis/cilium.io/v2/ciliumnetworkpolicies", get(policies))
            .route(of_namespace, get(policy))
            .route(&format!("{of_namespace}/status"), patch(policy_status))
            .route("/apis/events.k8s.io/v1/namespaces/default/events", post(event))
            .with_state(state.clone());
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

    /// A policy with a condition of somebody else.
    pub(crate) fn put_policy(&self, name: &str, conditions: Value) {
        let policy = json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
            "metadata": {"namespace": "default", "name": name, "resourceVersion": "1"},
            "spec": {}, "status": {"conditions": conditions},
        });
        self.policies().insert(name.to_owned(), policy);
    }

    /// The conditions of a policy: status and reason by type.
    pub(crate) fn conditions(&self, name: &str) -> BTreeMap<String, Value> {
        let policies = self.policies();
        let conditions = policies[name]["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        conditions.into_iter().map(|condition| (text(&condition["type"]), condition)).collect()
    }

    pub(crate) fn events(&self) -> Vec<Value> {
        self.state.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn policies(&self) -> MutexGuard<'_, BTreeMap<String, Value>> {
        self.state.policies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, kind: &str, name: &str, uid: &str, host_network: bool) {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "default", "name": name, "uid": uid, "resourceVersion": "2", "labels": {"app": name}},
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

fn failure(code: StatusCode, reason: &str) -> Response {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code.as_u16(),
        "reason": reason, "message": reason,
    });
    (code, Json(status)).into_response()
}

async fn policies(State(state): State<Arc<ApiState>>) -> Response {
    let policies = state.policies.lock().unwrap_or_else(PoisonError::into_inner);
    let items: Vec<Value> = policies.values().cloned().collect();
    Json(json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicyList", "metadata": {"resourceVersion": "1"},
        "items": items,
    }))
    .into_response()
}

/// After the first look at a policy somebody else changes it.
async fn policy(State(state): State<Arc<ApiState>>, Path(name): Path<String>) -> Response {
    let mut policies = state.policies.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(policy) = policies.get_mut(&name) else { return failure(StatusCode::NOT_FOUND, "NotFound") };
    let answer = Json(policy.clone()).into_response();
    if policy["metadata"]["resourceVersion"] == "1" {
        policy["metadata"]["resourceVersion"] = "2".into();
    }
    answer
}

async fn policy_status(
    State(state): State<Arc<ApiState>>,
    Path(name): Path<String>,
    Json(patch): Json<Value>,
) -> Response {
    let mut policies = state.policies.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(policy) = policies.get_mut(&name) else { return failure(StatusCode::NOT_FOUND, "NotFound") };
    let version = policy["metadata"]["resourceVersion"].clone();
    if patch["metadata"]["resourceVersion"] != version {
        return failure(StatusCode::CONFLICT, "Conflict");
    }
    policy["status"]["conditions"] = patch["status"]["conditions"].clone();
    policy["metadata"]["resourceVersion"] = format!("{}0", version.as_str().unwrap_or_default()).into();
    Json(policy.clone()).into_response()
}

async fn event(State(state): State<Arc<ApiState>>, Json(event): Json<Value>) -> Response {
    state.events.lock().unwrap_or_else(PoisonError::into_inner).push(event.clone());
    (StatusCode::CREATED, Json(event)).into_response()
}

/// What the kubelet and the CNI make of a pod.
pub(crate) struct PodProcess {
    process: Child,
    directories: Vec<PathBuf>,
    link: &'static str,
    _namespace: Namespace,
}

impl PodProcess {
    pub(crate) fn start(place: &Place, uid: &str) -> Self {
        Self::start_at(place, uid, "host0")
    }

    /// With a name for the host's side of its interface.
    pub(crate) fn start_at(place: &Place, uid: &str, link: &'static str) -> Self {
        let namespace = Namespace::new();
        ip(&format!("link add name {link} type veth peer name pod0"));
        ip(&format!("link set {link} up"));
        ip(&format!("link set pod0 netns {}", namespace.path()));
        let process = namespace
            .run(|| Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().expect("a process"));
        let mut directories = Vec::new();
        let mut directory = place.cgroup().to_owned();
        for name in ["kubepods", "besteffort", &format!("pod{uid}"), "container"] {
            directory.push(name);
            // Another pod may have made those above its own.
            fs::create_dir_all(&directory).expect("a cgroup");
            // Below the test's cgroup, which is threaded, everything is.
            fs::write(directory.join("cgroup.type"), "threaded").expect("a threaded cgroup");
            directories.push(directory.clone());
        }
        fs::write(directory.join("cgroup.threads"), process.id().to_string()).expect("move the process");
        Self { process, directories, link, _namespace: namespace }
    }

    /// Index of the host's side of its interface.
    pub(crate) fn interface(&self) -> u32 {
        nix::net::if_::if_nametoindex(self.link).expect("the interface")
    }
}

impl Drop for PodProcess {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The kernel takes its time to remove what was in a namespace.
        ip(&format!("link delete {}", self.link));
        for directory in self.directories.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}
