//! A sandbox with a gateway in it, the entries of two clusters, and an agent.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use isthmus_bpf_abi::{Protocol, ServiceKey};
use isthmus_kvstore::gateway::{Gateway, Grants, TlsFiles};
use isthmus_kvstore::memory::{KeyRange, Limits, MemoryStore, RangeRequest, StoreId};
use isthmus_node_agent::daemon::{self, Config, DaemonError};
use isthmus_node_agent::datapath::{Datapath, MapOp};
use isthmus_node_agent::plan::Dump;
use isthmus_node_agent::reconcile::Maps;
use isthmus_node_agent::sources::mesh::OwnCluster;
use isthmus_node_agent::status::{AgentStatus, ClusterState};
use isthmus_wire::MaxConnectedClusters;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::pod::PodsApi;
use crate::sandbox::{DEADLINE, SIZES, sandbox};

const VIP: &str = "10.96.0.1:80";
const POLL: Duration = Duration::from_millis(5);

pub(crate) struct Place {
    folder: TempDir,
    cgroup: PathBuf,
    pin_dir: PathBuf,
    maps: Arc<Datapath>,
    store: MemoryStore,
    gateway: Option<Gateway>,
    address: SocketAddr,
    pods: PodsApi,
}

/// What the maps say, for people.
pub(crate) struct Readable {
    pub(crate) frontends: BTreeMap<SocketAddr, BTreeMap<SocketAddr, u16>>,
    /// Identity and cluster.
    pub(crate) ipcache: BTreeMap<String, (u32, u16)>,
}

impl Place {
    pub(crate) fn with(test: impl AsyncFnOnce(Place) + Send) {
        sandbox(|sandbox| {
            // Its threads are in the sandbox since this one is.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let folder = tempfile::tempdir().expect("a folder");
                write_certificates(folder.path());
                let store = MemoryStore::new(StoreId::random(), Limits::default());
                let gateway = serve(folder.path(), &store, "127.0.0.1:0".parse().expect("an address")).await;
                let address = gateway.local_addr();
                let pods = PodsApi::serve().await;
                write_client_files(folder.path(), address, pods.address());
                let place = Place {
                    folder,
                    cgroup: sandbox.cgroup.clone(),
                    pin_dir: sandbox.pin_dir.clone(),
                    maps: Arc::new(sandbox.datapath()),
                    store,
                    gateway: Some(gateway),
                    address,
                    pods,
                };
                test(place).await;
            });
        });
    }

    pub(crate) fn store(&self) -> MemoryStore {
        self.store.clone()
    }

    pub(crate) fn pods(&self) -> &PodsApi {
        &self.pods
    }

    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Interfaces with packet programs.
    pub(crate) fn attached(&self) -> Vec<u32> {
        self.maps.attached_pods().expect("the pins can be read")
    }

    pub(crate) fn fill(&self, store: &MemoryStore, local: &[&str], remote: &[&str]) {
        store.fill_own(local);
        store.fill_peer(remote);
    }

    pub(crate) async fn stop_gateway(&mut self) {
        self.gateway.take().expect("a gateway").shutdown().await;
    }

    /// The apiserver is started anew: another store, empty, at the same address.
    pub(crate) async fn exchange_store(&mut self) {
        self.stop_gateway().await;
        self.store = MemoryStore::new(StoreId::random(), Limits::default());
        self.gateway = Some(serve(self.folder.path(), &self.store, self.address).await);
    }

    pub(crate) fn dump(&self) -> Dump {
        let mut dump = self.maps.clone().dump().expect("the maps can be read");
        dump.services.sort_by_key(|(key, _)| *key);
        dump.slots.sort_by_key(|(key, _)| *key);
        dump.backends.sort_by_key(|(id, _)| *id);
        dump.ipcache.sort_by_key(|(key, _)| *key);
        dump
    }

    pub(crate) fn readable(&self) -> Readable {
        let dump = self.dump();
        let backends: BTreeMap<_, _> = dump.backends.into_iter().collect();
        let slots: BTreeMap<_, _> = dump.slots.into_iter().collect();
        let behind = |service: u32, slot| {
            let slot = slots.get(&isthmus_bpf_abi::SlotKey { service, slot })?;
            let backend = backends.get(&slot.backend)?;
            Some((SocketAddr::new(backend.addr.ip(), backend.port()), backend.cluster))
        };
        let frontends = dump.services.iter().map(|(key, service)| {
            let behind = (0..service.count).filter_map(|slot| behind(service.id, slot)).collect();
            (SocketAddr::new(key.addr.ip(), key.port()), behind)
        });
        let ipcache = dump.ipcache.iter().map(|(key, entry)| {
            (format!("{}/{}", key.addr.ip(), key.prefix()), (entry.identity, entry.cluster))
        });
        Readable { frontends: frontends.collect(), ipcache: ipcache.collect() }
    }

    pub(crate) async fn eventually(&self, what: &str, condition: impl Fn(&Readable) -> bool) {
        let started = Instant::now();
        loop {
            let readable = self.readable();
            if condition(&readable) {
                return;
            }
            assert!(
                started.elapsed() < DEADLINE,
                "not within {DEADLINE:?}: {what}; {:?} {:?}",
                readable.frontends,
                readable.ipcache
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until exactly these stand behind the service, each with its cluster.
    pub(crate) async fn eventually_answer(&self, backends: &[(&str, u16)]) {
        let wanted: BTreeMap<SocketAddr, u16> =
            backends.iter().map(|(addr, cluster)| (addr.parse().expect("an address"), *cluster)).collect();
        let vip = VIP.parse().expect("an address");
        self.eventually(&format!("{wanted:?}"), |maps| maps.frontends.get(&vip) == Some(&wanted)).await;
    }

    /// Looks at the maps all the time.
    pub(crate) fn watch(&self, wanted: Dump) -> Watched {
        let (stop, mut maps) = (Arc::new(AtomicBool::new(false)), self.maps.clone());
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let dump = Maps::dump(&mut maps).expect("the maps can be read");
                let same = dump.services.len() == wanted.services.len()
                    && dump.services.iter().all(|entry| wanted.services.contains(entry))
                    && dump.slots.len() == wanted.slots.len()
                    && dump.slots.iter().all(|entry| wanted.slots.contains(entry))
                    && dump.ipcache.len() == wanted.ipcache.len()
                    && dump.ipcache.iter().all(|entry| wanted.ipcache.contains(entry));
                if !same {
                    return Some(dump);
                }
            }
            None
        });
        Watched { stop, thread }
    }

    /// Somebody deletes a frontend and adds another.
    pub(crate) fn vandalise(&self) {
        let key = ServiceKey::new([10, 96, 0, 1].into(), 80, Protocol::Tcp);
        let (_, service) = self.dump().services[0];
        let stray = ServiceKey::new([10, 96, 0, 9].into(), 80, Protocol::Tcp);
        let ops = [
            MapOp::DeleteService { key, service: service.id },
            MapOp::PutService {
                key: stray,
                service: isthmus_bpf_abi::Service { id: 999, count: 0, ..service },
            },
        ];
        assert!(Datapath::apply(&self.maps, &ops).iter().all(Result::is_ok));
    }
}

pub(crate) struct Watched {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Option<Dump>>,
}

impl Watched {
    pub(crate) fn saw_no_change(self) {
        self.stop.store(true, Ordering::Relaxed);
        let changed = self.thread.join().expect("the watching thread");
        assert!(changed.is_none(), "the maps have changed for a moment: {changed:#?}");
    }
}

/// What exporter and relay write.
pub(crate) trait Stored {
    fn put_text(&self, key: &str, value: &str);
    fn remove(&self, key: &str);
    fn keys(&self, prefix: &str) -> Vec<String>;

    fn delete_prefix(&self, prefix: &str) {
        for key in self.keys(prefix) {
            self.remove(&key);
        }
    }

    fn put_local(&self, backends: &[&str], global: bool) {
        let backends: BTreeMap<String, Value> = backends
            .iter()
            .map(|addr| {
                let addr: SocketAddr = addr.parse().expect("an address");
                let ports = json!({"http": {"Protocol": "TCP", "Port": addr.port()}});
                (addr.ip().to_string(), json!({"ports": ports, "node": "node-0", "forZones": null}))
            })
            .collect();
        let value = json!({
            "namespace": "default", "name": "rebel-base", "clusterIPs": ["10.96.0.1"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80}], "backends": backends, "global": global,
            "shared": true, "affinity": "none", "sessionAffinity": null, "internalTrafficPolicy": "Cluster",
        });
        self.put_text("isthmus/services/v1/default/rebel-base", &value.to_string());
    }

    fn put_remote(&self, backends: &[&str]) {
        let backends: BTreeMap<String, Value> = backends
            .iter()
            .map(|addr| {
                let addr: SocketAddr = addr.parse().expect("an address");
                (addr.ip().to_string(), json!({"http": {"Protocol": "TCP", "Port": addr.port()}}))
            })
            .collect();
        let value = json!({
            "cluster": "beta", "namespace": "default", "name": "rebel-base", "frontends": {}, "backends": backends,
            "labels": {}, "selector": {}, "includeExternal": true, "shared": true, "clusterID": 2,
        });
        self.put_text("cilium/cache/services/v1/beta/default/rebel-base", &value.to_string());
    }

    fn put_node(&self, tree: &str, cluster: &str, id: u16) {
        let value = json!({
            "Name": "node-0", "Cluster": cluster,
            "IPAddresses": [{"Type": "InternalIP", "IP": format!("172.18.{id}.1")}],
            "IPv4AllocCIDR": {"IP": format!("10.{id}.0.0"), "Mask": "////AA=="}, "IPv4SecondaryAllocCIDRs": null,
            "IPv6AllocCIDR": null, "IPv6SecondaryAllocCIDRs": null, "IPv4HealthIP": "", "IPv6HealthIP": "",
            "IPv4IngressIP": "", "IPv6IngressIP": "", "ClusterID": id, "Source": "custom-resource",
            "EncryptionKey": 0, "Labels": {}, "Annotations": {}, "NodeIdentity": 0, "WireguardPubKey": "", "BootID": "",
        });
        self.put_text(&format!("cilium/{tree}/nodes/v1/{cluster}/node-0"), &value.to_string());
    }

    fn put_pod(&self, key: &str, id: u16, identity: u32) {
        let value = json!({
            "IP": format!("10.{id}.0.1"), "Mask": null, "HostIP": format!("172.18.{id}.1"), "ID": identity,
            "Key": 0, "Metadata": "",
        });
        self.put_text(key, &value.to_string());
    }

    fn fill_own(&self, backends: &[&str]) {
        self.put_text("cilium/.heartbeat", "2026-11-21T00:00:00Z");
        self.put_node("state", "alpha", 1);
        self.put_pod("cilium/state/ip/v1/default/10.1.0.1", 1, 65_600);
        self.put_text(
            "cilium/state/identities/v1/id/65600",
            "k8s:app=a;k8s:io.cilium.k8s.policy.cluster=alpha;",
        );
        self.put_local(backends, true);
        for prefix in [
            "cilium/state/nodes/v1",
            "cilium/state/ip/v1",
            "cilium/state/identities/v1",
            "isthmus/services/v1",
            "isthmus/policies/v1",
            "isthmus/namespaces/v1",
        ] {
            self.put_text(&format!("cilium/synced/alpha/{prefix}"), "2026-11-21T00:00:00Z");
        }
        let config = json!({"id": 1, "capabilities": {"syncedCanaries": true, "maxConnectedClusters": 255}});
        self.put_text("cilium/cluster-config/alpha", &config.to_string());
    }

    fn fill_peer(&self, backends: &[&str]) {
        let config = json!({"id": 2, "capabilities": {"syncedCanaries": true, "cached": true, "maxConnectedClusters": 255}});
        self.put_text("cilium/cluster-config/beta", &config.to_string());
        self.put_node("cache", "beta", 2);
        self.put_pod("cilium/cache/ip/v1/beta/10.2.0.1", 2, 131_100);
        self.put_text(
            "cilium/cache/identities/v1/beta/id/131100",
            "k8s:app=b;k8s:io.cilium.k8s.policy.cluster=beta;",
        );
        self.put_remote(backends);
        for resource in ["nodes", "ip", "identities", "services"] {
            self.put_text(&format!("cilium/synced/beta/cilium/cache/{resource}/v1"), "2026-11-21T00:00:00Z");
        }
    }
}

impl Stored for MemoryStore {
    fn put_text(&self, key: &str, value: &str) {
        MemoryStore::put(self, key.to_owned(), value.to_owned());
    }

    fn remove(&self, key: &str) {
        MemoryStore::delete(self, key.to_owned());
    }

    fn keys(&self, prefix: &str) -> Vec<String> {
        let range = RangeRequest::new(KeyRange::prefix(prefix.to_owned()));
        let found = self.range(&range).expect("the store's present revision is there");
        found.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect()
    }
}

/// A running agent.
pub(crate) struct Agent {
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), DaemonError>>,
    socket: PathBuf,
}

impl Agent {
    pub(crate) async fn start(place: &Place) -> Self {
        let folder = place.folder.path();
        let socket = folder.join("agent.sock");
        let any = "127.0.0.1:0".parse().expect("a loopback address");
        let config = Config {
            own: OwnCluster {
                name: "alpha".parse().expect("a name"),
                id: 1_u32.try_into().expect("an id"),
                mesh_size: MaxConnectedClusters::C255,
            },
            node: "node-0".to_owned(),
            kubeconfig: Some(folder.join("kubeconfig")),
            gateway_config: folder.join("gateway.yaml"),
            bpf_fs: place.pin_dir.clone(),
            cgroup_root: place.cgroup.clone(),
            proc_root: "/proc".into(),
            kube_proxy_replacement: true,
            sizes: SIZES,
            sync_timeout: Duration::from_secs(60),
            policy_enforcement: isthmus_policy::Enforcement::Default,
            policy_default_local_cluster: true,
            endpoint_wait: Some(Duration::from_secs(10)),
            compare_every: Duration::from_millis(500),
            health: any,
            metrics: any,
            api_socket: socket.clone(),
            state_dir: folder.join("state"),
            encryption: None,
        };
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(daemon::run(config, shutdown.clone()));
        let agent = Self { shutdown, task, socket };
        let started = Instant::now();
        while agent.ask().await.is_none() {
            assert!(!agent.task.is_finished(), "the agent has ended: {:?}", agent.task.await);
            assert!(started.elapsed() < DEADLINE, "the agent's API does not come up");
            tokio::time::sleep(POLL).await;
        }
        agent
    }

    pub(crate) async fn status(&self) -> AgentStatus {
        self.ask().await.expect("the agent's status")
    }

    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&AgentStatus) -> bool) {
        let started = Instant::now();
        loop {
            let status = self.status().await;
            if condition(&status) {
                return;
            }
            assert!(started.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}; {status:#?}");
            tokio::time::sleep(POLL).await;
        }
    }

    pub(crate) async fn until_synced(&self) {
        self.until("both clusters are synced", |status| {
            let synced = |name: &str| {
                status
                    .clusters
                    .iter()
                    .any(|cluster| cluster.name == name && cluster.state == ClusterState::Synced)
            };
            status.ready && synced("alpha") && synced("beta")
        })
        .await;
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(DEADLINE, self.task).await.expect("the agent ends");
        ended.expect("the agent does not panic").expect("the agent ends well");
    }

    async fn ask(&self) -> Option<AgentStatus> {
        let mut stream = tokio::net::UnixStream::connect(&self.socket).await.ok()?;
        stream.write_all(b"GET /v1/status HTTP/1.0\r\nHost: agent\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        Some(serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}")))
    }
}

async fn serve(folder: &Path, store: &MemoryStore, address: SocketAddr) -> Gateway {
    let tls = TlsFiles {
        certificate: folder.join("server.crt"),
        key: folder.join("server.key"),
        client_ca: folder.join("ca.crt"),
    };
    Gateway::serve(address, tls, store.clone(), Grants::cluster_mesh("alpha")).await.expect("a gateway")
}

fn write_certificates(folder: &Path) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Test CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    fs::write(folder.join("ca.crt"), params.self_signed(&key).expect("a certificate").pem()).expect("a file");
    let authority = Issuer::new(params, key);
    for (file, name, usage) in [
        ("server", "clustermesh-apiserver.cilium.io", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", "agent-alpha", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &authority).expect("a certificate");
        fs::write(folder.join(format!("{file}.crt")), certificate.pem()).expect("a file");
        fs::write(folder.join(format!("{file}.key")), key.serialize_pem()).expect("a file");
    }
}

/// How to reach the gateway and the Kubernetes API.
fn write_client_files(folder: &Path, gateway: SocketAddr, kubernetes: SocketAddr) {
    let path = folder.display();
    let client = format!(
        "endpoints:\n- https://{gateway}\ntrusted-ca-file: {path}/ca.crt\nkey-file: {path}/client.key\ncert-file: {path}/client.crt\n"
    );
    fs::write(folder.join("gateway.yaml"), client).expect("a file");
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: none\nclusters: [{{name: none, cluster: {{server: 'http://{kubernetes}'}}}}]\nusers: [{{name: none, user: {{}}}}]\ncontexts: [{{name: none, context: {{cluster: none, user: none}}}}]\n"
    );
    fs::write(folder.join("kubeconfig"), kubeconfig).expect("a file");
}
