//! A gateway with certificates for every kind of client, and the programs to reach it with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use isthmus_kvstore::gateway::{Gateway, GatewayOptions, Grants, TlsFiles};
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use tempfile::TempDir;

/// However slow the machine: later than this something hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Served {
    pub(crate) store: MemoryStore,
    pub(crate) gateway: Gateway,
    pub(crate) pki: Pki,
}

impl Served {
    pub(crate) async fn start() -> Self {
        Self::with(Limits::default(), GatewayOptions::default()).await
    }

    pub(crate) async fn with(limits: Limits, options: GatewayOptions) -> Self {
        let pki = Pki::new();
        let store = MemoryStore::new(StoreId::random(), limits);
        let listen = "127.0.0.1:0".parse().unwrap();
        let grants = Grants::cluster_mesh("alpha");
        let gateway =
            Gateway::serve_with(listen, pki.server(), store.clone(), grants, options).await.unwrap();
        Self { store, gateway, pki }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("https://{}", self.gateway.local_addr())
    }

    pub(crate) async fn client(&self, common_name: &str) -> etcd_client::Client {
        self.try_client(&self.pki.client(common_name)).await.expect("the gateway lets the client in")
    }

    pub(crate) async fn try_client(
        &self,
        files: &ClientFiles,
    ) -> Result<etcd_client::Client, etcd_client::Error> {
        let read = |path: &Path| fs::read(path).unwrap();
        let tls = etcd_client::TlsOptions::new()
            .ca_certificate(etcd_client::Certificate::from_pem(read(&files.ca)))
            .identity(etcd_client::Identity::from_pem(read(&files.certificate), read(&files.key)))
            .domain_name("127.0.0.1");
        let options = etcd_client::ConnectOptions::new().with_tls(tls).with_require_leader(true);
        etcd_client::Client::connect([self.endpoint()], Some(options)).await
    }

    /// `etcdctl` as this client.
    pub(crate) fn etcdctl(&self, common_name: &str, arguments: &[&str]) -> Command {
        let files = self.pki.client(common_name);
        let mut command = etcdctl(&self.endpoint());
        command
            .arg("--cacert")
            .arg(&files.ca)
            .arg("--cert")
            .arg(&files.certificate)
            .arg("--key")
            .arg(&files.key);
        command.args(arguments);
        command
    }
}

pub(crate) fn etcdctl(endpoint: &str) -> Command {
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").arg("--endpoints").arg(endpoint).stdin(Stdio::null());
    command
}

/// Runs a command without blocking the runtime that the gateway runs on.
pub(crate) async fn output(mut command: Command) -> Output {
    let run = tokio::task::spawn_blocking(move || {
        command.output().unwrap_or_else(|error| {
            panic!("{} does not run ({error}): apt-get install etcd-client etcd-server", display(&command))
        })
    });
    tokio::time::timeout(DEADLINE, run).await.expect("the command ends").unwrap()
}

/// What a command prints, which must succeed.
pub(crate) async fn stdout(command: Command) -> String {
    let name = display(&command);
    let output = output(command).await;
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a command complains about, which must fail.
pub(crate) async fn failure(command: Command) -> String {
    let name = display(&command);
    let output = output(command).await;
    assert!(!output.status.success(), "{name} succeeds: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

fn display(command: &Command) -> String {
    format!("{command:?}")
}

/// A process that does not outlive its test.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let spawned = command.spawn();
        Self(spawned.unwrap_or_else(|error| {
            panic!("{} does not run ({error}): apt-get install etcd-client etcd-server", display(command))
        }))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `condition` gives something.
pub(crate) async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} does not come about");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An authority, and a folder for what it signs.
pub(crate) struct Pki {
    folder: TempDir,
    authority: Authority,
}

struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

#[derive(Clone, Debug)]
pub(crate) struct ClientFiles {
    pub(crate) ca: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Pki {
    pub(crate) fn new() -> Self {
        Self { folder: TempDir::new().unwrap(), authority: Authority::new() }
    }

    /// The gateway's files; written anew, by the present authority, with every call.
    pub(crate) fn server(&self) -> TlsFiles {
        let names = ["127.0.0.1", "localhost", "clustermesh-apiserver.cilium.io"];
        let files = self.issue("server", names, ExtendedKeyUsagePurpose::ServerAuth);
        TlsFiles { certificate: files.certificate, key: files.key, client_ca: files.ca }
    }

    pub(crate) fn client(&self, common_name: &str) -> ClientFiles {
        self.issue(common_name, [], ExtendedKeyUsagePurpose::ClientAuth)
    }

    /// A new authority takes over: what the old one signed is no longer trusted, once the files are read again.
    pub(crate) fn replace_authority(&mut self) {
        self.authority = Authority::new();
    }

    fn issue<const N: usize>(
        &self,
        name: &str,
        names: [&str; N],
        usage: ExtendedKeyUsagePurpose,
    ) -> ClientFiles {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names.map(String::from)).unwrap();
        params.distinguished_name = named(name);
        params.extended_key_usages = vec![usage];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.authority.issuer).unwrap();
        let write = |file: String, content: String| {
            let path = self.folder.path().join(file);
            fs::write(&path, content).unwrap();
            path
        };
        ClientFiles {
            ca: write("ca.crt".into(), self.authority.certificate.clone()),
            certificate: write(format!("{name}.crt"), certificate.pem()),
            key: write(format!("{name}.key"), key.serialize_pem()),
        }
    }
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = named("Test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}
