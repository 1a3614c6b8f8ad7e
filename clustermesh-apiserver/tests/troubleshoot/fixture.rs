//! Peers as real gateways with certificates of any kind, and the side that probes them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use clustermesh_apiserver::relay::{NotReached, OwnCluster};
use clustermesh_apiserver::status::PeerStatus;
use clustermesh_apiserver::troubleshoot::{
    Limits, Origin, Outcome, PeerReport, Setup, Source, Step, Target, Troubleshooter,
};
use isthmus_kvstore::client::steps::{NameServers, Resolver};
use isthmus_kvstore::config::ClientConfig;
use isthmus_kvstore::gateway::{Gateway, Grants, TlsFiles};
use isthmus_kvstore::memory::{Limits as StoreLimits, MemoryStore, StoreId};
use isthmus_wire::{MaxConnectedClusters, Prefix, Resource};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use tempfile::TempDir;

/// The name that gateways are verified under where the test says nothing else.
pub(crate) const GATEWAY: &str = "127.0.0.1";

/// When a certificate is valid, in days from now.
#[derive(Clone, Copy)]
pub(crate) struct Days(pub(crate) i64, pub(crate) i64);

pub(crate) const NOW: Days = Days(-1, 365);
pub(crate) const PAST: Days = Days(-30, -1);
pub(crate) const FUTURE: Days = Days(1, 30);

/// An authority.
pub(crate) struct Ca {
    pub(crate) certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, PEM.
pub(crate) struct Leaf {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Ca {
    /// All are called alike, as Cilium's are.
    pub(crate) fn new() -> Self {
        let mut params = params("Cilium CA", Days(-1, 365));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn server(&self, name: &str, days: Days) -> Leaf {
        let mut params = params("clustermesh-apiserver.cilium.io", days);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = vec![match name.parse() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(name.try_into().unwrap()),
        }];
        self.issue(params)
    }

    pub(crate) fn client(&self, name: &str, days: Days) -> Leaf {
        let mut params = params(name, days);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params)
    }

    fn issue(&self, params: CertificateParams) -> Leaf {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Leaf { certificate, key: key.serialize_pem() }
    }
}

fn params(name: &str, Days(from, to): Days) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    let at = |days: i64| std::time::SystemTime::from(Utc::now() + TimeDelta::days(days));
    params.not_before = at(from).into();
    params.not_after = at(to).into();
    params
}

impl Leaf {
    pub(crate) fn write(&self, folder: &Path, name: &str) {
        std::fs::write(folder.join(format!("{name}.crt")), &self.certificate).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), &self.key).unwrap();
    }
}

/// The files of one test, and its authority.
pub(crate) struct World {
    pub(crate) folder: TempDir,
    pub(crate) ca: Ca,
}

impl World {
    pub(crate) fn new() -> Self {
        let (folder, ca) = (tempfile::tempdir().unwrap(), Ca::new());
        std::fs::write(folder.path().join("ca.crt"), &ca.certificate).unwrap();
        ca.client("remote-alpha", NOW).write(folder.path(), "remote");
        Self { folder, ca }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// A gateway that is beta's, with everything that an exporter writes.
    pub(crate) async fn beta(&self) -> Peer {
        self.beta_with(&self.ca.server(GATEWAY, NOW)).await
    }

    /// The same with another certificate.
    pub(crate) async fn beta_with(&self, leaf: &Leaf) -> Peer {
        let peer = self.serve(leaf, Grants::cluster_mesh("beta")).await;
        peer.tell("beta", 2);
        peer
    }

    pub(crate) async fn serve(&self, leaf: &Leaf, grants: Grants) -> Peer {
        self.serve_store(leaf, grants, MemoryStore::new(StoreId::random(), StoreLimits::default())).await
    }

    async fn serve_store(&self, leaf: &Leaf, grants: Grants, store: MemoryStore) -> Peer {
        leaf.write(self.folder.path(), "gateway");
        let tls = TlsFiles {
            certificate: self.folder.path().join("gateway.crt"),
            key: self.folder.path().join("gateway.key"),
            client_ca: self.folder.path().join("ca.crt"),
        };
        let gateway =
            Gateway::serve("127.0.0.1:0".parse().unwrap(), tls, store.clone(), grants).await.unwrap();
        Peer { address: gateway.local_addr(), store, _gateway: gateway }
    }

    /// The configuration of beta at these endpoints, as its file says it.
    pub(crate) fn target(&self, endpoints: &[String]) -> Target {
        let list: String = endpoints.iter().map(|endpoint| format!("- {endpoint}\n")).collect();
        let text = format!(
            "endpoints:\n{list}trusted-ca-file: {}\nkey-file: {}\ncert-file: {}\n",
            self.path("ca.crt"),
            self.path("remote.key"),
            self.path("remote.crt"),
        );
        let file = self.folder.path().join("beta");
        std::fs::write(&file, &text).unwrap();
        let client = ClientConfig::parse(&text).map_err(|error| NotReached::Unusable(error.to_string()));
        Target { name: "beta".parse().unwrap(), source: Source::File(file), client }
    }

    pub(crate) fn at(&self, address: SocketAddr) -> Target {
        self.target(&[format!("https://{address}")])
    }

    /// Probes beta where this address is.
    pub(crate) async fn probe(&self, address: SocketAddr) -> PeerReport {
        probe(self.at(address), Resolver::system()).await
    }
}

/// A peer's gateway, and the store behind it.
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) store: MemoryStore,
    _gateway: Gateway,
}

impl Peer {
    pub(crate) fn put(&self, key: &str, value: impl AsRef<[u8]>) {
        self.store.put(key.to_owned(), value.as_ref().to_vec());
    }

    pub(crate) fn delete(&self, key: &str) {
        self.store.delete(key.to_owned());
    }

    /// Writes what the exporter of this cluster does.
    pub(crate) fn tell(&self, name: &str, id: u32) {
        self.config(name, id, 255);
        let now = Utc::now().to_rfc3339();
        for resource in Resource::ALL {
            self.put(&format!("cilium/synced/{name}/{}", Prefix::State(resource)), &now);
        }
        let node = format!(r#"{{"Name":"n1","Cluster":"{name}","ClusterID":{id}}}"#);
        self.put(&format!("cilium/state/nodes/v1/{name}/n1"), node);
        self.put("cilium/.heartbeat", &now);
    }

    pub(crate) fn config(&self, name: &str, id: u32, mesh: u32) {
        let capabilities = format!(
            r#"{{"syncedCanaries":true,"maxConnectedClusters":{mesh},"serviceExportsEnabled":false}}"#
        );
        self.put(
            &format!("cilium/cluster-config/{name}"),
            format!(r#"{{"id":{id},"capabilities":{capabilities}}}"#),
        );
    }
}

/// The cluster that probes.
pub(crate) fn own() -> OwnCluster {
    OwnCluster { name: "alpha".parse().unwrap(), id: 1.try_into().unwrap(), mesh: MaxConnectedClusters::C255 }
}

pub(crate) fn troubleshooter(target: Target, resolver: Resolver) -> Troubleshooter {
    troubleshooter_of(own(), target, resolver, PATIENT)
}

/// Data of any age that a test can reach is young enough.
pub(crate) const PATIENT: Duration = Duration::from_secs(600);

pub(crate) fn troubleshooter_of(
    own: OwnCluster,
    target: Target,
    resolver: Resolver,
    data_age: Duration,
) -> Troubleshooter {
    let setup = Setup {
        cluster: own.name.to_string(),
        own: Some(own),
        namespace: "isthmus-system".to_owned(),
        origin: Origin::Apiserver,
        resolver,
        limits: Limits { patience: Duration::from_secs(4), data_age },
    };
    Troubleshooter::new(setup, move || Some(vec![target.clone()]))
}

pub(crate) async fn probe(target: Target, resolver: Resolver) -> PeerReport {
    only(troubleshooter(target, resolver)).await
}

/// The same beside a relay that says this of its peers.
pub(crate) async fn probe_beside(
    target: Target,
    data_age: Duration,
    relay: impl Fn() -> Vec<PeerStatus> + Send + Sync + 'static,
) -> PeerReport {
    only(troubleshooter_of(own(), target, Resolver::system(), data_age).beside(relay)).await
}

pub(crate) async fn only(troubleshooter: Troubleshooter) -> PeerReport {
    troubleshooter.report(&[]).await.unwrap().peers.remove(0)
}

/// A resolver that asks this name server alone.
pub(crate) fn asking(server: SocketAddr) -> Resolver {
    Resolver::new(NameServers::given([server]))
}

/// That the probe went well up to `step`, named what is wrong there by `kind`, and tells a cause and a command. Returns
/// what it says is wrong.
pub(crate) fn found(report: &PeerReport, step: Step, kind: &str) -> String {
    let told = serde_json::to_string_pretty(report).unwrap();
    for earlier in report.steps.iter().filter(|earlier| earlier.step < step) {
        assert!(earlier.holds(), "{} went wrong before {step}: {told}", earlier.step);
    }
    let findings = &report.step(step).unwrap_or_else(|| panic!("no {step}: {told}")).findings;
    let Some(finding) = findings.iter().find(|finding| finding.kind == kind) else {
        panic!("no {kind} in {step}: {told}")
    };
    assert!(!finding.cause.is_empty() && !finding.next.command.is_empty(), "{finding:?}");
    assert!(["alpha", "beta"].contains(&finding.next.cluster.as_str()), "{finding:?}");
    finding.problem.clone()
}

/// The same for something that ends the probe: what comes after it was not tried.
pub(crate) fn ends(report: &PeerReport, step: Step, kind: &str) -> String {
    let problem = found(report, step, kind);
    assert_eq!(report.outcome(), Outcome::Failed);
    // Which store answers, and what the relay makes of it, is asked all the same.
    let not_tried = |later: Step| later > step && !matches!(later, Step::Store | Step::Relay);
    for later in report.steps.iter().filter(|later| not_tried(later.step)) {
        assert_eq!(later.outcome, Outcome::Skipped, "{} after {step}: {later:?}", later.step);
        assert!(later.seen[0].contains(&step.to_string()), "why it was not tried: {later:?}");
    }
    problem
}

/// Waits until `probe` has an answer.
pub(crate) async fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a client needs to talk to a gateway directly.
pub(crate) fn tls_client(world: &World) -> Arc<rustls::ClientConfig> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(world.ca.certificate.as_bytes()).unwrap()).unwrap();
    let leaf = world.ca.client("remote-alpha", NOW);
    let chain = vec![CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap();
    let mut config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// What a server needs to be taken for a gateway, as far as TLS goes.
pub(crate) fn tls_server(leaf: &Leaf) -> Arc<rustls::ServerConfig> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let chain = vec![CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap();
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
    Arc::new(config)
}
