//! The Kubernetes API of a cluster: the stand-in, or with `KUBEBUILDER_ASSETS` the real one.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use isthmus_kube_api::Tls;
use isthmus_kube_api::real::{RealConfig, RealKubeApi};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::error::{Doing, LabError, Result};
use crate::lab::Ground;
use crate::netns::NetNs;
use crate::pki::{self, Authority, CertFiles};
use crate::process::{Launch, Process};
use crate::topology::CONTROL_PLANE;
use crate::{cgroup, forwarder, programs, wait};

/// Where the API listens, in its control plane's namespace.
pub(crate) const PORT: u16 = 6443;

/// Time the API has to come up. The real one takes several seconds on a busy machine.
const READY: Duration = Duration::from_secs(90);

/// A running API.
pub(crate) struct KubeApi {
    /// The lab's own client, with every right.
    pub(crate) client: Client,
    authority: Authority,
    inside: String,
    running: Running,
}

enum Running {
    StandIn(Box<Process>),
    /// Ends when dropped.
    Real(Box<RealKubeApi>),
}

impl KubeApi {
    /// Starts it, and writes the administrator's kubeconfig for the root namespace.
    pub(crate) async fn start(
        ground: &Arc<Ground>,
        cluster: &str,
        ns: &NetNs,
        addresses: &[IpNet],
        services: &[IpNet],
    ) -> Result<Self> {
        let dir = ground.state.cluster(cluster).join("kubernetes");
        let authority = Authority::create(&format!("{cluster} Kubernetes CA"), &dir)?;
        let mut names: Vec<String> = addresses.iter().map(|a| a.addr().to_string()).collect();
        // The `kubernetes` service has the first address of the range.
        names.extend(services.iter().filter_map(|range| range.hosts().next()).map(|first| first.to_string()));
        let fixed = ["127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        names.extend(fixed.map(str::to_owned));
        let server = authority.server("server", &names)?;
        let admin = authority.user("admin", "isthmus:admin", &["system:masters"])?;

        let listen = SocketAddr::new(addresses[0].addr(), PORT);
        let place = Place { ground, cluster, ns, listen, services };
        let running = match isthmus_kube_api::real::assets() {
            Some(assets) => Running::Real(Box::new(place.real(assets, &server, &authority).await?)),
            None => Running::StandIn(Box::new(place.stand_in(&server, &authority).await?)),
        };

        let door = forwarder::forward(ns.clone(), listen, ground.stop.clone()).await?;
        let kubeconfig = ground.state.kubeconfig(cluster);
        pki::write_kubeconfig(&kubeconfig, cluster, &format!("https://{door}"), &authority.ca(), &admin)?;
        let client = client(&kubeconfig).await?;
        let mut api = Self { client, authority, inside: format!("https://{listen}"), running };
        api.wait_ready(cluster).await?;
        Ok(api)
    }

    /// Whether the real one runs.
    pub(crate) fn real(&self) -> bool {
        matches!(self.running, Running::Real(_))
    }

    async fn wait_ready(&mut self, cluster: &str) -> Result<()> {
        let client = self.client.clone();
        let ask = async || {
            let request = http::Request::get("/readyz").body(Vec::new()).map_err(|e| e.to_string())?;
            client.request_text(request).await.map(drop).map_err(|e| e.to_string())
        };
        match &mut self.running {
            Running::StandIn(process) => {
                wait::until(format!("the Kubernetes API of {cluster} to be ready"), READY, || async {
                    if !process.running() {
                        return Ok(Err(process.died()));
                    }
                    ask().await.map(Ok)
                })
                .await?
            }
            Running::Real(api) => {
                let ready = api.wait_ready(READY, async || ask().await.is_ok()).await;
                ready.map_err(|e| LabError::invalid(format!("the Kubernetes API of {cluster}: {e}")))
            }
        }
    }

    /// A kubeconfig for a program in the cluster's own network.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn kubeconfig(&self, path: &Path, cluster: &str, user: &str, groups: &[&str]) -> Result<()> {
        let file = path.file_stem().unwrap_or_default().to_string_lossy();
        let client = self.authority.user(&file, user, groups)?;
        pki::write_kubeconfig(path, cluster, &self.inside, &self.authority.ca(), &client)
    }
}

/// What is known before it starts.
struct Place<'a> {
    ground: &'a Arc<Ground>,
    cluster: &'a str,
    ns: &'a NetNs,
    listen: SocketAddr,
    services: &'a [IpNet],
}

impl Place<'_> {
    fn cgroup(&self) -> PathBuf {
        self.ground.cgroup.join(self.cluster).join(CONTROL_PLANE).join("kubernetes")
    }

    async fn stand_in(&self, server: &CertFiles, authority: &Authority) -> Result<Process> {
        let name = format!("{}/kubernetes", self.cluster);
        let services: Vec<String> = self.services.iter().map(ToString::to_string).collect();
        let args: Vec<OsString> = vec![
            "--listen".into(),
            self.listen.to_string().into(),
            "--tls-cert".into(),
            (&server.certificate).into(),
            "--tls-key".into(),
            (&server.key).into(),
            "--client-ca".into(),
            authority.ca().into(),
            "--service-cidr".into(),
            services.join(",").into(),
        ];
        let launch = Launch {
            program: programs::ours(programs::KUBE_API)?,
            args,
            env: Default::default(),
            netns: self.ns.path(),
            cgroup: self.cgroup(),
            hostname: None,
            log: self.ground.state.log(&name),
            name,
        };
        self.ground.run(launch).await
    }

    async fn real(&self, assets: PathBuf, server: &CertFiles, authority: &Authority) -> Result<RealKubeApi> {
        let read = |path: &Path| std::fs::read(path).doing(|| format!("reading {}", path.display()));
        let tls = Tls {
            cert_pem: read(&server.certificate)?,
            key_pem: read(&server.key)?,
            client_ca_pem: read(&authority.ca())?,
        };
        cgroup::create(&self.cgroup())?;
        let config = RealConfig {
            assets,
            dir: self.ground.state.cluster(self.cluster).join("kubernetes"),
            listen: self.listen,
            advertise: None,
            tls,
            service_cidrs: self.services.to_vec(),
            // Apart from the store's etcd, which has the namespace's 12379 and 12380.
            etcd_ports: Some((22379, 22380)),
            command_prefix: vec![
                programs::ours(programs::LAB_POD)?.into(),
                "run".into(),
                "--netns".into(),
                self.ns.path().into(),
                "--cgroup".into(),
                self.cgroup().into(),
                "--".into(),
            ],
        };
        let started = RealKubeApi::start(config).await;
        started.map_err(|e| LabError::invalid(format!("the Kubernetes API of {}: {e}", self.cluster)))
    }
}

/// A client from a kubeconfig file.
///
/// # Errors
/// When the file is not one.
pub(crate) async fn client(kubeconfig: &Path) -> Result<Client> {
    let bad = |e: &dyn std::fmt::Display| LabError::invalid(format!("reading {}: {e}", kubeconfig.display()));
    let config = Kubeconfig::read_from(kubeconfig).map_err(|e| bad(&e))?;
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default())
        .await
        .map_err(|e| bad(&e))?;
    Client::try_from(config).map_err(|e| bad(&e))
}
