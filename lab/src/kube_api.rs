//! The Kubernetes API of a cluster: the stand-in, or with `KUBEBUILDER_ASSETS` the real one.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::error::{LabError, Result};
use crate::lab::Ground;
use crate::netns::NetNs;
use crate::pki::{self, Authority, CertFiles};
use crate::process::Launch;
use crate::topology::CONTROL_PLANE;
use crate::{forwarder, programs, wait};

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
        let mut names: Vec<IpAddr> = addresses.iter().map(IpNet::addr).collect();
        names.push([127, 0, 0, 1].into());
        // The `kubernetes` service has the first address of the range.
        names.extend(services.iter().filter_map(|range| range.hosts().next()));
        let dns = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        let server = authority.server("server", &dns, &names)?;
        let admin = authority.client("admin", "isthmus:admin", &["system:masters"])?;

        let listen = SocketAddr::new(addresses[0].addr(), PORT);
        let process = format!("{cluster}/kubernetes");
        let launch = Launch {
            name: process.clone(),
            program: programs::ours(programs::KUBE_API)?,
            args: stand_in(listen, &server, &authority.ca(), services),
            env: Default::default(),
            netns: ns.path(),
            cgroup: ground.cgroup.join(cluster).join(CONTROL_PLANE).join("kubernetes"),
            hostname: None,
            log: ground.state.log(&process),
        };
        let running = ground.run(launch).await?;

        let door = forwarder::forward(ns.clone(), listen, ground.stop.clone()).await?;
        let kubeconfig = ground.state.kubeconfig(cluster);
        pki::write_kubeconfig(&kubeconfig, cluster, &format!("https://{door}"), &authority.ca(), &admin)?;
        let client = client(&kubeconfig).await?;
        wait::until(format!("the Kubernetes API of {cluster} to be ready"), READY, || async {
            if !running.running() {
                return Ok(Err(running.died()));
            }
            let request = http::Request::get("/readyz").body(Vec::new()).map_err(|e| e.to_string())?;
            client.request_text(request).await.map(|_| Ok(())).map_err(|e| e.to_string())
        })
        .await??;
        Ok(Self { client, authority, inside: format!("https://{listen}") })
    }

    /// A kubeconfig for a program in the cluster's own network.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn kubeconfig(&self, path: &Path, cluster: &str, user: &str, groups: &[&str]) -> Result<()> {
        let file = path.file_stem().unwrap_or_default().to_string_lossy();
        let client = self.authority.client(&file, user, groups)?;
        pki::write_kubeconfig(path, cluster, &self.inside, &self.authority.ca(), &client)
    }
}

fn stand_in(
    listen: SocketAddr,
    server: &CertFiles,
    ca: &Path,
    services: &[IpNet],
) -> Vec<std::ffi::OsString> {
    let mut args: Vec<std::ffi::OsString> = vec![
        "--listen".into(),
        listen.to_string().into(),
        "--tls-cert".into(),
        (&server.cert).into(),
        "--tls-key".into(),
        (&server.key).into(),
        "--client-ca".into(),
        ca.into(),
    ];
    for range in services {
        args.push("--service-cidr".into());
        args.push(range.to_string().into());
    }
    args
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
