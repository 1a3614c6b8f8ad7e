//! A cluster for one test: the stand-in, or the real kube-apiserver where `KUBEBUILDER_ASSETS` names one, with
//! a PKI of its own. The tests do not know which.

#![allow(dead_code, reason = "each test file uses its part")]

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Once;
use std::time::Duration;

use isthmus_kube_api::real::{self, ClientTls, RealConfig, RealKubeApi};
use isthmus_kube_api::{Config, KubeApi, Tls};
use kube::config::{KubeConfigOptions, Kubeconfig};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;

/// No condition takes longer than this to come true.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Cluster {
    server: Server,
    address: SocketAddr,
    pki: Pki,
    folder: TempDir,
}

enum Server {
    StandIn(KubeApi),
    Real(Box<RealKubeApi>),
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_with(Config::default()).await
    }

    /// `config` is for the stand-in; of it the real server takes the Service ranges.
    pub(crate) async fn start_with(config: Config) -> Self {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            let _ = rustls::crypto::ring::default_provider().install_default();
        });
        let pki = Pki::new();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let tls = pki.server();
        let server = match real::assets() {
            None => {
                let config = Config { tls: Some(tls), ..config };
                Server::StandIn(KubeApi::serve(listener, config).expect("the stand-in starts"))
            }
            Some(assets) => {
                drop(listener);
                let config = RealConfig {
                    assets,
                    dir: folder.path().join("real"),
                    listen: address,
                    advertise: None,
                    tls,
                    service_cidrs: config.service_cidrs,
                    etcd_ports: None,
                    command_prefix: Vec::new(),
                };
                let mut real = RealKubeApi::start(config).await.expect("the real server starts");
                let admin = pki.client("admin", &["system:masters"]);
                let ready =
                    real.wait_ready(Duration::from_secs(60), async || real::is_ready(address, &admin).await);
                ready.await.expect("the real server gets ready");
                Server::Real(Box::new(real))
            }
        };
        Self { server, address, pki, folder }
    }

    /// What only the stand-in can be told to do; `None` on the real server.
    pub(crate) fn stand_in(&self) -> Option<&KubeApi> {
        match &self.server {
            Server::StandIn(server) => Some(server),
            Server::Real(_) => None,
        }
    }

    pub(crate) async fn stop(self) {
        match self.server {
            Server::StandIn(server) => server.stop().await,
            Server::Real(real) => real.stop().await,
        }
    }

    /// A client that may do everything.
    pub(crate) async fn admin(&self) -> kube::Client {
        self.client("admin", &["system:masters"]).await
    }

    pub(crate) async fn client(&self, user: &str, groups: &[&str]) -> kube::Client {
        let config: Kubeconfig = serde_json::from_value(self.kubeconfig(user, groups)).expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await;
        kube::Client::try_from(config.expect("a configuration")).expect("a client")
    }

    /// A client without a certificate.
    pub(crate) async fn anonymous(&self) -> kube::Client {
        let mut config = self.kubeconfig("nobody", &[]);
        config["users"][0]["user"] = json!({});
        let config: Kubeconfig = serde_json::from_value(config).expect("a kubeconfig");
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await;
        kube::Client::try_from(config.expect("a configuration")).expect("a client")
    }

    /// A kubeconfig file for `kubectl`.
    pub(crate) fn kubeconfig_file(&self) -> PathBuf {
        let path = self.folder.path().join("kubeconfig");
        std::fs::write(&path, self.kubeconfig("admin", &["system:masters"]).to_string()).expect("a file");
        path
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn kubeconfig(&self, user: &str, groups: &[&str]) -> serde_json::Value {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let client = self.pki.client(user, groups);
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": user } }],
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("https://{}", self.address),
                "certificate-authority-data": STANDARD.encode(client.ca_pem),
            } }],
            "users": [{ "name": user, "user": {
                "client-certificate-data": STANDARD.encode(client.cert_pem),
                "client-key-data": STANDARD.encode(client.key_pem),
            } }],
        })
    }
}

struct Pki {
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test CA");
        let key = KeyPair::generate().expect("a key");
        let ca_pem = params.self_signed(&key).expect("a CA").pem();
        Self { ca_pem, issuer: Issuer::new(params, key) }
    }

    fn server(&self) -> Tls {
        let mut params = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()]).expect("names");
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
        let (cert_pem, key_pem) = self.sign(params);
        Tls { cert_pem, key_pem, client_ca_pem: self.ca_pem.clone().into_bytes() }
    }

    fn client(&self, user: &str, groups: &[&str]) -> ClientTls {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ClientAuth);
        let (cert_pem, key_pem) = self.sign(params);
        ClientTls { ca_pem: self.ca_pem.clone().into_bytes(), cert_pem, key_pem }
    }

    fn sign(&self, params: CertificateParams) -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("a certificate");
        (cert.pem().into_bytes(), key.serialize_pem().into_bytes())
    }
}

/// The future's value, or a failed test that names what was waited for.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
}
