//! Kubernetes APIs, an etcd, and the daemon's program, all on loopback and all ended with the test.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command as StdCommand, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use clustermesh_apiserver::pki::{Authority, Client, DEFAULT_VALIDITY, Identity, IdentityFiles};
use clustermesh_apiserver::status::ApiserverStatus;
use isthmus_kube_api::{Config, KubeApi};
use k8s_openapi::api::core::v1::{Namespace, Node, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::process::{Child, Command};

/// How long anything may take. Only a failing test waits for it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Where the daemon's own objects are.
pub(crate) const NAMESPACE: &str = "isthmus-system";

/// A Secret's certificate, as files.
pub(crate) struct Mounted {
    pub(crate) identity: IdentityFiles,
    pub(crate) ca: PathBuf,
}

/// A folder's name that was not used before.
fn uuid_of(mesh: &Mesh) -> String {
    format!("mounted-{}", std::fs::read_dir(mesh.path()).unwrap().count())
}

/// Waits until `probe` has an answer; its error tells what it saw last when the deadline has passed.
pub(crate) async fn until<T>(what: &str, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match probe().await {
            Ok(answer) => return answer,
            Err(seen) if begun.elapsed() > DEADLINE => {
                panic!("not within {DEADLINE:?}: {what}\nlast seen: {seen}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A port that is left to whoever is told to listen there.
fn free_port() -> SocketAddr {
    isthmus_kube_api::ports::reserve().unwrap()
}

/// What all clusters share: the authority, and the folder for files.
pub(crate) struct Mesh {
    folder: TempDir,
    authority: Authority,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::generate("Cilium CA", DEFAULT_VALIDITY).unwrap();
        std::fs::write(folder.path().join("ca.crt"), authority.certificate()).unwrap();
        Self { folder, authority }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    pub(crate) fn client(&self, client: Client<'_>) -> IdentityFiles {
        let identity = self.authority.client(client, DEFAULT_VALIDITY).unwrap();
        identity.write(self.path(), &client.common_name()).unwrap()
    }

    fn file(&self, name: &str) -> String {
        self.path().join(name).display().to_string()
    }
}

/// A cluster's Kubernetes API, with a node and a namespace.
pub(crate) struct Cluster {
    pub(crate) name: &'static str,
    id: u16,
    address: SocketAddr,
    api: Mutex<Option<KubeApi>>,
    client: kube::Client,
}

impl Cluster {
    pub(crate) async fn start(name: &'static str, id: u16) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let address = free_port();
        let api = serve(address).await;
        let config = kube::Config::new(format!("http://{address}").parse().unwrap());
        let client = kube::Client::try_from(config).unwrap();
        let cluster = Self { name, id, address, api: Mutex::new(Some(api)), client };
        cluster.furnish().await;
        cluster
    }

    /// What every cluster has.
    async fn furnish(&self) {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        for definition in isthmus_crds::definitions() {
            definitions.create(&PostParams::default(), &definition).await.unwrap();
        }
        let node: Node = from(json!({
            "metadata": { "name": "node-1" },
            "spec": { "podCIDR": "10.1.0.0/24" },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }] },
        }));
        Api::all(self.client.clone()).create(&PostParams::default(), &node).await.unwrap();
        let namespace: Namespace = from(json!({ "metadata": { "name": NAMESPACE } }));
        Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its objects of a kind in the namespace of the daemon.
    pub(crate) fn own<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    pub(crate) fn namespaces(&self) -> Api<Namespace> {
        Api::all(self.client.clone())
    }

    /// Entry `key` of a Secret of the daemon, if there is any.
    pub(crate) async fn entry(&self, secret: &str, key: &str) -> Option<String> {
        let secret = self.own::<Secret>().get_opt(secret).await.unwrap()?;
        Some(String::from_utf8(secret.data?.get(key)?.0.clone()).unwrap())
    }

    /// What a pod that has this Secret mounted shows now, and whom it trusts.
    pub(crate) async fn mounted(&self, mesh: &Mesh, secret: &str) -> Mounted {
        let folder = mesh.path().join(uuid_of(mesh));
        std::fs::create_dir_all(&folder).unwrap();
        let mut paths = Vec::new();
        for key in ["tls.crt", "tls.key", "ca.crt"] {
            let path = folder.join(key);
            std::fs::write(&path, self.entry(secret, key).await.expect("there")).unwrap();
            paths.push(path);
        }
        let [certificate, key, ca] = paths.try_into().unwrap();
        Mounted { identity: IdentityFiles { certificate, key }, ca }
    }

    /// Puts entries into a Secret of the daemon that exists.
    pub(crate) async fn put(&self, secret: &str, entries: &[(&str, &str)]) {
        let entries: Value = entries.iter().map(|(key, text)| (key.to_string(), json!(text))).collect();
        let change = Patch::Merge(json!({ "stringData": entries }));
        self.own::<Secret>().patch(secret, &PatchParams::default(), &change).await.unwrap();
    }

    /// Makes a Secret with a certificate, as cert-manager does.
    pub(crate) async fn issue(&self, secret: &str, identity: &Identity, ca: &str) {
        let object: Secret = from(json!({
            "metadata": { "name": secret },
            "type": "kubernetes.io/tls",
            "stringData": { "tls.crt": identity.certificate, "tls.key": identity.key, "ca.crt": ca },
        }));
        self.own::<Secret>().create(&PostParams::default(), &object).await.unwrap();
    }

    pub(crate) async fn stop(&self) {
        let api = self.api.lock().unwrap().take();
        if let Some(api) = api {
            api.stop().await;
        }
    }

    /// An empty one at the same address, as after a disaster.
    pub(crate) async fn start_again(&self, address: SocketAddr) {
        let api = serve(address).await;
        *self.api.lock().unwrap() = Some(api);
        self.furnish().await;
    }

    pub(crate) async fn global_service(&self, namespace: &str, name: &str, backends: &[&str]) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        if namespaces.get_opt(namespace).await.unwrap().is_none() {
            let object = from(json!({ "metadata": { "name": namespace } }));
            namespaces.create(&PostParams::default(), &object).await.unwrap();
        }
        let service: Service = from(json!({
            "metadata": { "name": name, "annotations": { "io.cilium/global-service": "true" } },
            "spec": { "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
        }));
        Api::namespaced(self.client.clone(), namespace)
            .create(&PostParams::default(), &service)
            .await
            .unwrap();
        self.backends(namespace, name, backends).await;
    }

    /// Sets the backends of a service, as the EndpointSlice controller does.
    pub(crate) async fn backends(&self, namespace: &str, service: &str, backends: &[&str]) {
        let endpoint =
            |ip: &&str| json!({ "addresses": [ip], "conditions": { "ready": true }, "nodeName": "node-1" });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": { "name": format!("{service}-1"), "labels": { "kubernetes.io/service-name": service } },
            "addressType": "IPv4",
            "endpoints": backends.iter().map(endpoint).collect::<Vec<_>>(),
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        });
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), namespace);
        let params = PatchParams::apply("test").force();
        slices.patch(&format!("{service}-1"), &params, &Patch::Apply(slice)).await.unwrap();
    }

    pub(crate) async fn annotate(&self, namespace: &str, service: &str, annotations: &[(&str, &str)]) {
        let annotations: Value =
            annotations.iter().map(|(name, value)| (name.to_string(), json!(value))).collect();
        let services: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        let change = Patch::Merge(json!({ "metadata": { "annotations": annotations } }));
        services.patch(service, &PatchParams::default(), &change).await.unwrap();
    }

    pub(crate) async fn delete_service(&self, namespace: &str, service: &str) {
        let services: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        services.delete(service, &DeleteParams::default()).await.unwrap();
    }

    fn kubeconfig(&self, mesh: &Mesh) -> String {
        let path = mesh.path().join(format!("{}.kubeconfig", self.name));
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://{}", self.address) } }],
            "users": [{ "name": "u", "user": {} }],
        });
        std::fs::write(&path, text.to_string()).unwrap();
        path.display().to_string()
    }
}

async fn serve(address: SocketAddr) -> KubeApi {
    let listener =
        until("the port is free", async || TcpListener::bind(address).await.map_err(|e| e.to_string())).await;
    KubeApi::serve(listener, Config::default()).unwrap()
}

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// The program, running.
pub(crate) struct Daemon {
    name: &'static str,
    child: Child,
    pub(crate) gateway: SocketAddr,
    pub(crate) health: SocketAddr,
    metrics: SocketAddr,
    socket: PathBuf,
    peers: PathBuf,
    log: PathBuf,
    ca: PathBuf,
}

impl Daemon {
    /// Starts it for a cluster; it may be started again after it has ended.
    pub(crate) async fn start(mesh: &Mesh, cluster: &Cluster, more: &[&str]) -> Self {
        let [gateway, health, metrics] = [free_port(), free_port(), free_port()];
        let peers = mesh.path().join(format!("{}-peers", cluster.name));
        std::fs::create_dir_all(&peers).unwrap();
        let socket = mesh.path().join(format!("{}.sock", cluster.name));
        let log = mesh.path().join(format!("{}.log", cluster.name));
        let errors = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut command = command(mesh, cluster, more);
        command.arg("--listen").arg(gateway.to_string());
        command.arg("--health-address").arg(health.to_string());
        command.arg("--metrics-address").arg(metrics.to_string());
        command.arg("--api-socket").arg(&socket);
        command.arg("--peers-dir").arg(&peers);
        let child = command.stderr(errors).spawn().unwrap();
        let ca = mesh.path().join("ca.crt");
        let daemon = Self { name: cluster.name, child, gateway, health, metrics, socket, peers, log, ca };
        until("the health endpoint answers", async || {
            TcpStream::connect(health).await.map(drop).map_err(|error| format!("{error}\n{}", daemon.log()))
        })
        .await;
        daemon
    }

    /// Starts a replica of it, with certificates and the Lease in the Kubernetes API.
    pub(crate) async fn replica(
        mesh: &Mesh,
        cluster: &Cluster,
        replica: &'static str,
        more: &[&str],
    ) -> Self {
        let [gateway, health, metrics] = [free_port(), free_port(), free_port()];
        let path = |suffix: &str| mesh.path().join(format!("{replica}{suffix}"));
        let (socket, log, peers) = (path(".sock"), path(".log"), path("-peers"));
        let errors = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_clustermesh-apiserver"));
        command.args(["--cluster-name", cluster.name, "--cluster-id", &cluster.id.to_string()]);
        command.args(["--kubeconfig", &cluster.kubeconfig(mesh), "--namespace", NAMESPACE]);
        command.args(["--replica-name", replica]);
        command.arg("--listen").arg(gateway.to_string());
        command.arg("--health-address").arg(health.to_string());
        command.arg("--metrics-address").arg(metrics.to_string());
        command.arg("--api-socket").arg(&socket);
        command.args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).kill_on_drop(true);
        let child = command.spawn().unwrap();
        let ca = mesh.path().join("ca.crt");
        let daemon = Self { name: replica, child, gateway, health, metrics, socket, peers, log, ca };
        until("the health endpoint answers", async || {
            TcpStream::connect(health).await.map(drop).map_err(|error| format!("{error}\n{}", daemon.log()))
        })
        .await;
        daemon
    }

    /// Starts it with flags that it cannot use: exit code, and what it said.
    pub(crate) async fn fails(mesh: &Mesh, cluster: &Cluster, flags: &[&str]) -> (i32, String) {
        let [gateway, health, metrics] = [free_port(), free_port(), free_port()];
        let mut command = command(mesh, cluster, flags);
        for (flag, address) in
            [("--listen", gateway), ("--health-address", health), ("--metrics-address", metrics)]
        {
            if !flags.contains(&flag) {
                command.arg(flag).arg(address.to_string());
            }
        }
        let output =
            tokio::time::timeout(DEADLINE, command.output()).await.expect("it ends by itself").unwrap();
        (output.status.code().expect("no signal"), String::from_utf8(output.stderr).unwrap())
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Makes `peer` known to it, as a mounted Secret would.
    pub(crate) fn connect(&self, mesh: &Mesh, peer: &Self) {
        let identity = mesh.client(Client::Remote(self.name));
        let text = format!(
            "endpoints:\n- https://{}\ntrusted-ca-file: {}\nkey-file: {}\ncert-file: {}\n",
            peer.gateway,
            mesh.file("ca.crt"),
            identity.key.display(),
            identity.certificate.display(),
        );
        std::fs::write(self.peers.join(peer.name), text).unwrap();
    }

    pub(crate) async fn ready_within_deadline(&self) {
        until("it is ready", async || match self.http(self.health, "/readyz").await {
            (200, _) => Ok(()),
            (_, reason) => Err(format!("{reason}\n{}", self.log())),
        })
        .await;
    }

    /// The value of a key, read with etcdctl.
    pub(crate) fn get(&self, client: &IdentityFiles, key: &str) -> Option<String> {
        let output = self.etcdctl(client, &["get", key, "--print-value-only"]).unwrap();
        let value = output.trim_end_matches('\n');
        (!value.is_empty()).then(|| value.to_owned())
    }

    /// What etcdctl says; its errors if it fails.
    pub(crate) fn etcdctl(&self, client: &IdentityFiles, arguments: &[&str]) -> Result<String, String> {
        self.etcdctl_trusting(&self.ca, client, arguments)
    }

    /// The value of a key, read by a pod with this Secret mounted.
    pub(crate) fn read(&self, pod: &Mounted, key: &str) -> Result<String, String> {
        self.etcdctl_trusting(&pod.ca, &pod.identity, &["get", key, "--print-value-only"])
            .map(|value| value.trim_end_matches('\n').to_owned())
    }

    /// A client of a pod with this Secret mounted, which does not connect again by itself once its connection is lost.
    pub(crate) async fn connection(&self, pod: &Mounted) -> etcd_client::Client {
        let pem = |path: &Path| std::fs::read(path).unwrap();
        let identity =
            etcd_client::Identity::from_pem(pem(&pod.identity.certificate), pem(&pod.identity.key));
        let tls = etcd_client::TlsOptions::new()
            .ca_certificate(etcd_client::Certificate::from_pem(pem(&pod.ca)))
            .identity(identity);
        let options = etcd_client::ConnectOptions::new().with_tls(tls);
        let endpoint = format!("https://{}", self.gateway);
        until("it takes the connection", async || {
            let client = etcd_client::Client::connect([&endpoint], Some(options.clone())).await;
            client.map_err(|error| format!("{error}\n{}", self.log()))
        })
        .await
    }

    fn etcdctl_trusting(
        &self,
        ca: &Path,
        client: &IdentityFiles,
        arguments: &[&str],
    ) -> Result<String, String> {
        let output = StdCommand::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg("--command-timeout=5s")
            .arg(format!("--endpoints=https://{}", self.gateway))
            .arg(format!("--cacert={}", ca.display()))
            .arg(format!("--cert={}", client.certificate.display()))
            .arg(format!("--key={}", client.key.display()))
            .args(arguments)
            .output()
            .expect("etcdctl (Debian: etcd-client) is installed");
        if output.status.success() {
            return Ok(String::from_utf8(output.stdout).unwrap());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// What the API socket says.
    pub(crate) async fn status(&self) -> ApiserverStatus {
        let (code, text) = ask(UnixStream::connect(&self.socket).await.unwrap(), "/v1/status").await;
        assert_eq!(code, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    pub(crate) async fn metrics(&self) -> String {
        self.http(self.metrics, "/metrics").await.1
    }

    pub(crate) async fn http(&self, address: SocketAddr, path: &str) -> (u16, String) {
        ask(TcpStream::connect(address).await.unwrap(), path).await
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Ends it as Kubernetes does, and expects a clean end.
    pub(crate) async fn terminate(mut self) {
        let pid = self.child.id().expect("running").to_string();
        assert!(StdCommand::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let ended =
            tokio::time::timeout(DEADLINE, self.child.wait()).await.expect("it ends in time").unwrap();
        assert!(ended.success(), "{ended}\n{}", self.log());
        assert!(!self.socket.exists(), "the socket goes with it");
    }

    /// Lets it stand still, as a node that has no time for it does; and go on.
    pub(crate) fn pause(&self, paused: bool) {
        let pid = self.child.id().expect("running").to_string();
        let signal = if paused { "-STOP" } else { "-CONT" };
        assert!(StdCommand::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Ends it as a power failure does.
    pub(crate) async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

fn command(mesh: &Mesh, cluster: &Cluster, more: &[&str]) -> Command {
    let gateway = mesh.authority.gateway("kube-system", &[], DEFAULT_VALIDITY).unwrap();
    let gateway = gateway.write(mesh.path(), &format!("{}-gateway", cluster.name)).unwrap();
    let defaults = [
        ("--cluster-name", cluster.name.to_owned()),
        ("--cluster-id", cluster.id.to_string()),
        ("--kubeconfig", cluster.kubeconfig(mesh)),
        ("--tls-cert", gateway.certificate.display().to_string()),
        ("--tls-key", gateway.key.display().to_string()),
        ("--tls-client-ca", mesh.file("ca.crt")),
        ("--log-level", "info".to_owned()),
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_clustermesh-apiserver"));
    for (flag, value) in defaults {
        if !more.contains(&flag) {
            command.arg(flag).arg(value);
        }
    }
    command.args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn ask(stream: impl AsyncRead + AsyncWrite, path: &str) -> (u16, String) {
    let mut stream = Box::pin(stream);
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
    (code, body.to_owned())
}

/// A real etcd, in memory as far as the system lets it, on loopback.
pub(crate) struct Etcd {
    child: Child,
    address: SocketAddr,
    _folder: TempDir,
}

impl Etcd {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [client, peer] = [free_port(), free_port()];
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path())
            .arg(format!("--listen-client-urls=http://{client}"))
            .arg(format!("--advertise-client-urls=http://{client}"))
            .arg(format!("--listen-peer-urls=http://{peer}"))
            .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
            .arg(format!("--initial-cluster=default=http://{peer}"))
            // The data goes with the test: nobody should wait for a slow disk.
            .arg("--unsafe-no-fsync")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("etcd (Debian: etcd-server) is installed");
        until("etcd listens", async || TcpStream::connect(client).await.map(drop).map_err(|e| e.to_string()))
            .await;
        Self { child, address: client, _folder: folder }
    }

    pub(crate) fn client_config(&self, mesh: &Mesh) -> String {
        let path = mesh.path().join("etcd.yaml");
        std::fs::write(&path, format!("endpoints:\n- http://{}\n", self.address)).unwrap();
        path.display().to_string()
    }

    /// The lease that a key is held by; none if it is not there.
    pub(crate) async fn lease_of(&self, key: &str) -> Option<i64> {
        let endpoint = format!("http://{}", self.address);
        let client = etcd_client::Client::connect([endpoint], None).await.unwrap();
        let found = client.kv_client().get(key, None).await.unwrap();
        found.kvs().first().map(etcd_client::KeyValue::lease)
    }

    /// Lets it stand still for ever, as one that has lost its disk does.
    pub(crate) fn stop(&self) {
        let pid = self.child.id().expect("running").to_string();
        assert!(StdCommand::new("kill").args(["-STOP", &pid]).status().unwrap().success());
    }
}
