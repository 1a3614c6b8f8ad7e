//! The real kube-apiserver and its etcd, from the folder that `KUBEBUILDER_ASSETS` names (the envtest
//! convention), set up as the stand-in is: client certificates, RBAC, no anonymous requests, no controllers.
//!
//! The flags are those of Kubernetes 1.36. The ServiceAccount admission is off, because the controller that
//! makes accounts and their tokens does not run; so pods keep the `serviceAccountName` they came with, also
//! none.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use crate::config::Tls;
use crate::ports;

/// The folder with `kube-apiserver` and `etcd`, if `KUBEBUILDER_ASSETS` names one.
pub fn assets() -> Option<PathBuf> {
    std::env::var_os("KUBEBUILDER_ASSETS").filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// How to run the real server.
#[derive(Debug, Clone)]
pub struct RealConfig {
    /// The folder with `kube-apiserver` and `etcd`; see [`assets`].
    pub assets: PathBuf,
    /// For data, keys and logs; made if missing. Removing it afterwards is the caller's part.
    pub dir: PathBuf,
    /// Where kube-apiserver listens.
    pub listen: SocketAddr,
    /// Where clients inside the cluster reach it; by default where it listens.
    pub advertise: Option<IpAddr>,
    /// The server's certificate, and who signs those of its clients.
    pub tls: Tls,
    /// One range, or one per family.
    pub service_cidrs: Vec<IpNet>,
    /// Loopback ports for etcd's clients and peers. `None`: free ones. Inside a network namespace of its own
    /// (see `command_prefix`) any will do.
    pub etcd_ports: Option<(u16, u16)>,
    /// Put before both commands, for instance `nsenter --net=/run/netns/x --`. It has to exec the command,
    /// so that signals reach it.
    pub command_prefix: Vec<OsString>,
}

/// A running kube-apiserver with its etcd. Dropping it kills both.
#[derive(Debug)]
pub struct RealKubeApi {
    apiserver: Process,
    etcd: Process,
    address: SocketAddr,
}

/// What a client needs to talk to the server, all PEM.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct ClientTls {
    pub ca_pem: Vec<u8>,
    pub cert_pem: Vec<u8>,
    pub key_pem: Vec<u8>,
}

/// Why the real server does not run.
#[derive(Debug, thiserror::Error)]
pub enum RealError {
    /// A program is not in the folder.
    #[error("{0} is not there: KUBEBUILDER_ASSETS must name a folder with kube-apiserver and etcd")]
    Missing(PathBuf),
    /// A file or socket is unusable.
    #[error("cannot prepare {what}: {source}")]
    Prepare {
        /// What was to be done.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The key for service account tokens cannot be made.
    #[error("cannot make the service account key: {0}")]
    Key(#[from] rcgen::Error),
    /// It ended by itself.
    #[error("{program} ended with {status}; the end of {log}:\n{tail}")]
    Ended {
        /// Which program.
        program: &'static str,
        /// How.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// It does not answer.
    #[error("kube-apiserver is not ready after {0:?}; the end of {1}:\n{2}")]
    NotReady(Duration, PathBuf, String),
}

#[derive(Debug)]
struct Process {
    program: &'static str,
    child: Child,
    log: PathBuf,
}

/// Time for a program to end by itself before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
const PROBE_INTERVAL: Duration = Duration::from_millis(100);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

impl RealKubeApi {
    /// Starts both programs. They are not ready yet: see [`wait_ready`](Self::wait_ready).
    pub async fn start(config: RealConfig) -> Result<Self, RealError> {
        let files = Files::write(&config)?;
        let (client_port, peer_port) = match config.etcd_ports {
            Some(ports) => ports,
            None => (free_port()?, free_port()?),
        };
        let etcd_url = format!("http://127.0.0.1:{client_port}");
        let etcd = spawn(&config, "etcd", etcd_arguments(&config, &etcd_url, peer_port))?;
        let apiserver = spawn(&config, "kube-apiserver", apiserver_arguments(&config, &files, &etcd_url))?;
        Ok(Self { apiserver, etcd, address: config.listen })
    }

    /// Where kube-apiserver listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The process ids, kube-apiserver first, for whoever keeps a list of what to clean up.
    pub fn pids(&self) -> Vec<u32> {
        [&self.apiserver, &self.etcd].into_iter().filter_map(|process| process.child.id()).collect()
    }

    /// Waits until `probe` says yes, for instance [`is_ready`]; from another network namespace the caller
    /// has to bring its own. Fails at once when one of the programs ends.
    pub async fn wait_ready(
        &mut self,
        timeout: Duration,
        mut probe: impl AsyncFnMut() -> bool,
    ) -> Result<(), RealError> {
        let deadline = Instant::now() + timeout;
        loop {
            for process in [&mut self.etcd, &mut self.apiserver] {
                process.check()?;
            }
            if probe().await {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(RealError::NotReady(timeout, self.apiserver.log.clone(), self.apiserver.tail()));
            }
            tokio::time::sleep(PROBE_INTERVAL).await;
        }
    }

    /// Ends both programs, kube-apiserver first, and waits for them.
    pub async fn stop(mut self) {
        self.apiserver.stop().await;
        self.etcd.stop().await;
    }
}

/// Whether the server at this address answers `/readyz` with 200.
pub async fn is_ready(address: SocketAddr, tls: &ClientTls) -> bool {
    matches!(tokio::time::timeout(PROBE_TIMEOUT, readyz(address, tls)).await, Ok(Ok(true)))
}

async fn readyz(
    address: SocketAddr,
    tls: &ClientTls,
) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&tls.ca_pem) {
        roots.add(certificate?)?;
    }
    let chain = CertificateDer::pem_slice_iter(&tls.cert_pem).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&tls.key_pem)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(address).await?;
    let mut stream = connector.connect(ServerName::from(address.ip()), stream).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await?;
    Ok(&head == b"HTTP/1.1 200")
}

/// What the programs read from disk.
struct Files {
    cert: PathBuf,
    key: PathBuf,
    client_ca: PathBuf,
    account_key: PathBuf,
    account_public_key: PathBuf,
}

impl Files {
    fn write(config: &RealConfig) -> Result<Self, RealError> {
        std::fs::create_dir_all(&config.dir).map_err(|source| prepare(&config.dir, source))?;
        let account = rcgen::KeyPair::generate()?;
        let put = |name: &str, content: &[u8]| {
            let path = config.dir.join(name);
            let mut options = std::fs::OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
            file.and_then(|mut file| std::io::Write::write_all(&mut file, content))
                .map_err(|source| prepare(&path, source))?;
            Ok::<_, RealError>(path)
        };
        Ok(Self {
            cert: put("apiserver.crt", &config.tls.cert_pem)?,
            key: put("apiserver.key", &config.tls.key_pem)?,
            client_ca: put("client-ca.crt", &config.tls.client_ca_pem)?,
            account_key: put("service-account.key", account.serialize_pem().as_bytes())?,
            account_public_key: put("service-account.pub", account.public_key_pem().as_bytes())?,
        })
    }
}

fn etcd_arguments(config: &RealConfig, client_url: &str, peer_port: u16) -> Vec<OsString> {
    let peer_url = format!("http://127.0.0.1:{peer_port}");
    vec![
        flag("data-dir", config.dir.join("etcd")),
        flag("listen-client-urls", client_url),
        flag("advertise-client-urls", client_url),
        flag("listen-peer-urls", &peer_url),
        flag("initial-advertise-peer-urls", &peer_url),
        flag("initial-cluster", format!("default={peer_url}")),
        // Nothing here has to outlive the machine.
        "--unsafe-no-fsync".into(),
    ]
}

fn apiserver_arguments(config: &RealConfig, files: &Files, etcd_url: &str) -> Vec<OsString> {
    let advertise = config.advertise.unwrap_or(config.listen.ip());
    let ranges: Vec<String> = config.service_cidrs.iter().map(IpNet::to_string).collect();
    let mut arguments = vec![
        flag("etcd-servers", etcd_url),
        flag("bind-address", config.listen.ip().to_string()),
        flag("secure-port", config.listen.port().to_string()),
        flag("tls-cert-file", &files.cert),
        flag("tls-private-key-file", &files.key),
        flag("client-ca-file", &files.client_ca),
        flag("cert-dir", config.dir.join("certs")),
        flag("anonymous-auth", "false"),
        flag("authorization-mode", "RBAC"),
        flag("service-cluster-ip-range", ranges.join(",")),
        flag("service-account-issuer", "https://kubernetes.default.svc"),
        flag("service-account-key-file", &files.account_public_key),
        flag("service-account-signing-key-file", &files.account_key),
        flag("disable-admission-plugins", "ServiceAccount"),
        flag("allow-privileged", "true"),
        flag("shutdown-delay-duration", "0s"),
    ];
    if !advertise.is_unspecified() {
        arguments.push(flag("advertise-address", advertise.to_string()));
    }
    if advertise.is_loopback() {
        // An endpoint may not be a loopback address, so Service `kubernetes` goes without.
        arguments.push(flag("endpoint-reconciler-type", "none"));
    }
    arguments
}

fn flag(name: &str, value: impl Into<OsString>) -> OsString {
    let mut flag = OsString::from(format!("--{name}="));
    flag.push(value.into());
    flag
}

fn spawn(config: &RealConfig, program: &'static str, arguments: Vec<OsString>) -> Result<Process, RealError> {
    let binary = config.assets.join(program);
    if !binary.is_file() {
        return Err(RealError::Missing(binary));
    }
    let log = config.dir.join(format!("{program}.log"));
    let file = std::fs::File::create(&log).map_err(|source| prepare(&log, source))?;
    let output = file.try_clone().map_err(|source| prepare(&log, source))?;
    let mut words =
        config.command_prefix.iter().cloned().chain([binary.clone().into_os_string()]).chain(arguments);
    let mut command = Command::new(words.next().expect("at least the program"));
    let child = command
        .args(words)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(file)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| prepare(&binary, source))?;
    Ok(Process { program, child, log })
}

impl Process {
    fn check(&mut self) -> Result<(), RealError> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(RealError::Ended {
                program: self.program,
                status,
                log: self.log.clone(),
                tail: self.tail(),
            }),
            Ok(None) => Ok(()),
            Err(source) => Err(RealError::Prepare { what: self.program.to_owned(), source }),
        }
    }

    fn tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    async fn stop(&mut self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGTERM);
        }
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

fn free_port() -> Result<u16, RealError> {
    let address = ports::reserve();
    let address =
        address.map_err(|source| RealError::Prepare { what: "a loopback port for etcd".into(), source })?;
    Ok(address.port())
}

fn prepare(path: &Path, source: std::io::Error) -> RealError {
    RealError::Prepare { what: path.display().to_string(), source }
}
