//! The agent as a process: opens the kernel's side, reads the mesh, keeps the two alike, and says how it is.
//!
//! What an earlier run left in the kernel serves on while this one reads the mesh, and while no agent runs at all.

mod encryption;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use isthmus_daemon::{Endpoints, HttpError, LoopbackAddr, Readiness};
use isthmus_kvstore::config::{ClientConfig, ConfigError};
use isthmus_kvstore::reader::{Probe, Reader, ReaderConfig};
use isthmus_wireguard::device::DeviceError;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::report::Reporter;
use crate::api::{self, Api};
use crate::datapath::routing::{self, RoutingError};
use crate::datapath::{Datapath, DatapathConfig, DatapathError, MapSizes};
use crate::encryption::key_file::KeyFileError;
use crate::encryption::{self as wireguard, Prober};
use crate::events::{self, Hub};
use crate::mesh::Own;
use crate::metrics::Metrics;
use crate::plan::Dump;
use crate::pods::{self, Attach, PodPaths, PodsStatus, Tell};
use crate::reconcile::{Looks, Maps, Policy, Reconciler, Task};
use crate::refusals;
use crate::sources::host as host_source;
use crate::sources::local as local_source;
use crate::sources::mesh::{self as mesh_source, OwnCluster};

/// How long a status waits for the gateway to say how far it is.
const PATIENCE: Duration = Duration::from_millis(500);
/// Events on their way to the reconciler. When it is busy, sections wait, and the gateway with them.
const EVENTS: usize = 8192;
/// Batches that a listener of `/v1/applied` may be behind.
const APPLIED: usize = 4096;
/// How often gauges are set.
const GAUGES: Duration = Duration::from_secs(5);

/// What the agent needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// The own cluster.
    pub own: OwnCluster,
    /// Name of the own node.
    pub node: String,
    /// How to reach the Kubernetes API; without it as a pod does.
    pub kubeconfig: Option<PathBuf>,
    /// Client configuration (YAML) for the own cluster's gateway.
    pub gateway_config: PathBuf,
    /// Pin directory, on a BPF file system.
    pub bpf_fs: PathBuf,
    /// cgroup2 directory for the socket programs, below which the kubelet makes pods' cgroups.
    pub cgroup_root: PathBuf,
    /// Where procfs is mounted.
    pub proc_root: PathBuf,
    /// Balance every service, not only the global ones.
    pub kube_proxy_replacement: bool,
    /// Sizes of the maps.
    pub sizes: MapSizes,
    /// How long peers have to be read after a start.
    pub sync_timeout: Duration,
    /// Which pods are restricted by network policies at all.
    pub policy_enforcement: isthmus_policy::Enforcement,
    /// Whether peers that a policy selects without naming a cluster are those of the own one.
    pub policy_default_local_cluster: bool,
    /// How long a new pod's packets are held back for its policy at most; none: until what decides has been read.
    pub endpoint_wait: Option<Duration>,
    /// How often the kernel's maps are compared with what they should hold.
    pub compare_every: Duration,
    /// Where `/healthz` and `/readyz` are.
    pub health: LoopbackAddr,
    /// Where `/metrics` is.
    pub metrics: LoopbackAddr,
    /// Where the API socket is.
    pub api_socket: PathBuf,
    /// Where this node's keys are.
    pub state_dir: PathBuf,
    /// How traffic between nodes is encrypted; none where it is not.
    pub encryption: Option<wireguard::Settings>,
}

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The gateway's client configuration cannot be used.
    #[error("--gateway-config: {0}")]
    GatewayConfig(#[from] ConfigError),
    /// The kernel's side.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// The way to the encryption device.
    #[error(transparent)]
    Routing(#[from] RoutingError),
    /// The encryption device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The encryption device still runs.
    #[error(
        "programs, maps and routes are removed, but isthmus-wireguard has interface {0} open; end it, then run cleanup again"
    )]
    DeviceInUse(String),
    /// This node's private key.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The kubeconfig cannot be used.
    #[error("--kubeconfig: {0}")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// Not in a pod, and no kubeconfig.
    #[error(
        "cannot tell how to reach the Kubernetes API: {0}; run as a pod with a service account, or give --kubeconfig"
    )]
    InCluster(#[from] kube::config::InClusterError),
    /// No client could be made.
    #[error("cannot make a client of the Kubernetes API: {0}")]
    Kubernetes(#[from] kube::Error),
    /// An endpoint cannot be opened.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// A thread or a runtime.
    #[error("the system refused a thread: {0}")]
    System(#[from] std::io::Error),
    /// The task that changes the maps is gone.
    #[error(
        "the task that changes the maps ended unexpectedly; the log says why. What is in the kernel serves on"
    )]
    ReconcilerEnded,
    /// The task that reads the gateway is gone.
    #[error(
        "the task that reads the gateway ended unexpectedly; the log says why. What is in the kernel serves on"
    )]
    SourceEnded,
}

/// Runs until `shutdown`. Everything in the kernel stays as it is then.
///
/// # Errors
/// See [`DaemonError`]. What can only be a matter of time (an unreachable gateway or Kubernetes API) is none.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), DaemonError> {
    let started = Utc::now();
    let gateway = ClientConfig::load(&config.gateway_config)?;
    let client = client(&config).await?;
    let pods = kube::Api::all(client.clone());
    let served_before = serves(&config.bpf_fs);
    let mut datapath = Arc::new(open(&config)?);
    let dump = datapath.dump()?;
    check_cgroup(&config.cgroup_root)?;
    tracing::info!(
        frontends = dump.services.len(),
        backends = dump.backends.len(),
        addresses = dump.ipcache.len(),
        "found in the maps"
    );

    let encryption = encryption::start(&config, client.clone(), &datapath, &shutdown).await?;
    let metrics = Arc::new(Metrics::new(Some(datapath.clone()), encryption.status.clone()));
    let (events, arrivals) = mpsc::channel(EVENTS);
    let (applied, _) = broadcast::channel(APPLIED);
    let mut reconciler =
        Reconciler::new(own(&config), policy(&config), &dump).with_policies(policies(&config));
    if let Some(peers) = &encryption.peers {
        reconciler.keep_peers(peers.clone());
    }
    if let Some(encryption) = &config.encryption {
        reconciler.set_strict_ranges(&encryption.strict_cidrs);
    }
    let (task, looks) = Task::new(
        reconciler,
        datapath.clone(),
        arrivals,
        applied.clone(),
        metrics.clone(),
        config.compare_every,
    );
    let mut ended = spawn_reconciler(task, shutdown.clone())?;

    let reader = Reader::spawn(config.own.name.clone(), ReaderConfig::new(gateway));
    let reader_status = reader.status();
    let probe = reader.probe();
    let (tell, told) = mpsc::unbounded_channel();
    let tell =
        Tell { endpoints: tell, hold: config.policy_enforcement != isthmus_policy::Enforcement::Never };
    let local = tokio::spawn(local_source::run(told, events.clone()));
    let host = tokio::spawn(host_source::run(events.clone()));
    let mut source = tokio::spawn(mesh_source::run(config.own.clone(), reader, events, metrics.clone()));

    let (sockets, sockets_attached) = watch::channel(false);
    let (pods_sender, pods_status) = watch::channel(PodsStatus::default());
    let attacher = Attacher {
        datapath: datapath.clone(),
        looks: looks.clone(),
        cgroup: config.cgroup_root.clone(),
        // Empty maps beside programs that serve from older ones: those serve until the new maps are filled.
        wait: served_before && dump == Dump::default(),
        sockets,
        shutdown: shutdown.clone(),
    };
    let paths = PodPaths { cgroup_root: config.cgroup_root.clone(), proc_root: config.proc_root.clone() };
    let attach: Arc<dyn Attach> = datapath.clone();
    let (node, stop) = (config.node.clone(), shutdown.clone());
    let pods = tokio::spawn(async move {
        attacher.run().await;
        pods::run(pods, node, paths, attach, tell, pods_sender, stop).await;
    });

    let reporter = Arc::new(Reporter {
        config: config.clone(),
        started,
        datapath,
        looks: looks.clone(),
        reader: reader_status,
        pods: pods_status,
        sockets: sockets_attached,
        encryption: encryption.status.clone(),
        metrics: metrics.clone(),
        readiness: watch::Sender::new(Readiness::Waiting("starting".to_owned())),
    });
    let mut endpoints = Endpoints::new(shutdown.clone());
    let verdicts = Hub::new(&format!("{}/{}", config.own.name, config.node), shutdown.clone());
    let api = (looks.clone(), applied, verdicts.clone(), encryption.prober.clone());
    serve(&mut endpoints, &config, &reporter, probe, api, &metrics).await?;
    let refused_in = looks.clone();
    let told =
        tokio::spawn(events::reader::read(reporter.datapath.clone(), looks, verdicts, shutdown.clone()));

    let refusals = tokio::spawn(refusals::tell(client, config.node.clone(), refused_in, shutdown.clone()));
    let gauges = tokio::spawn(reporter.run(GAUGES, shutdown.clone()));
    let outcome = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        _ = &mut ended => if shutdown.is_cancelled() { Ok(()) } else { Err(DaemonError::ReconcilerEnded) },
        _ = &mut source => if shutdown.is_cancelled() { Ok(()) } else { Err(DaemonError::SourceEnded) },
    };
    shutdown.cancel();
    source.abort();
    pods.abort();
    local.abort();
    host.abort();
    gauges.abort();
    refusals.abort();
    told.abort();
    endpoints.finish().await;
    if !ended.is_terminated() {
        // A batch that it is about to make is made whole: from here on the maps are another run's.
        let _ = ended.await;
    }
    tracing::info!("stopped; what is in the kernel serves on");
    outcome
}

/// Detaches everything, removes the pins, the rule and routes to the encryption device, and the device: what uninstalling
/// does.
///
/// # Errors
/// Something cannot be removed, or the device is in use.
pub fn cleanup(bpf_fs: &Path, interface: &str) -> Result<(), DaemonError> {
    Datapath::remove_pins(bpf_fs)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        routing::remove().await?;
        // The kernel's device, or what isthmus-wireguard has left.
        match isthmus_wireguard::device::delete_interface(interface).await {
            Err(DeviceError::InUse { name }) => Err(DaemonError::DeviceInUse(name)),
            other => Ok(other?),
        }
    })
}

fn open(config: &Config) -> Result<Datapath, DatapathError> {
    Datapath::open(DatapathConfig { sizes: config.sizes, ..DatapathConfig::new(&config.bpf_fs) })
}

fn own(config: &Config) -> Own {
    Own {
        cluster: config.own.name.as_str().into(),
        id: config.own.id.number(),
        node: config.node.as_str().into(),
        identity_shift: config.own.mesh_size.shift(),
    }
}

fn policy(config: &Config) -> Policy {
    Policy {
        all_services: takes_all_services(config.kube_proxy_replacement, config.policy_enforcement),
        sync_timeout: config.sync_timeout,
        backend_capacity: config.sizes.backends,
    }
}

/// What kube-proxy translates is judged by the service's address rather than the pod's behind it, which is nobody's: where
/// policies are enforced, all services are translated here, before they are judged.
fn takes_all_services(kube_proxy_replacement: bool, enforcement: isthmus_policy::Enforcement) -> bool {
    kube_proxy_replacement || enforcement != isthmus_policy::Enforcement::Never
}

fn policies(config: &Config) -> crate::policy::Settings {
    crate::policy::Settings {
        enforcement: config.policy_enforcement,
        default_local_cluster: config.policy_default_local_cluster,
        endpoint_wait: config.endpoint_wait,
        sync_timeout: config.sync_timeout,
        ..crate::policy::Settings::new(&config.own.name)
    }
}

/// Whether programs of an earlier run are attached.
fn serves(pin_dir: &Path) -> bool {
    fs::read_dir(pin_dir.join("links")).is_ok_and(|mut links| links.next().is_some())
}

fn check_cgroup(path: &Path) -> Result<(), DatapathError> {
    if path.join("cgroup.procs").exists() {
        Ok(())
    } else {
        Err(DatapathError::NotCgroup2 { path: path.to_owned() })
    }
}

async fn client(config: &Config) -> Result<kube::Client, DaemonError> {
    let kube_config = match &config.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path)?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?
        }
        None => kube::Config::incluster()?,
    };
    Ok(kube::Client::try_from(kube_config)?)
}

/// On a thread of its own: it makes system calls all the time, and nothing else may delay a change.
fn spawn_reconciler(
    task: Task<Arc<Datapath>>,
    shutdown: CancellationToken,
) -> Result<tokio::sync::oneshot::Receiver<()>, std::io::Error> {
    let (alive, ended) = tokio::sync::oneshot::channel::<()>();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    std::thread::Builder::new().name("reconciler".to_owned()).spawn(move || {
        runtime.block_on(task.run(shutdown));
        drop(alive);
    })?;
    Ok(ended)
}

async fn serve(
    endpoints: &mut Endpoints,
    config: &Config,
    reporter: &Arc<Reporter>,
    probe: Probe,
    (looks, applied, verdicts, prober): (Looks, broadcast::Sender<crate::status::Applied>, Hub, Prober),
    metrics: &Metrics,
) -> Result<(), DaemonError> {
    let ready = reporter.readiness();
    let readiness = move || ready.borrow().clone();
    let (reporter, pods) = (reporter.clone(), reporter.pods.clone());
    let status = Arc::new(move || {
        let (reporter, probe) = (reporter.clone(), probe.clone());
        let status = async move {
            // Who looks is told the lag of this moment, not that of the last message.
            probe.status(PATIENCE).await;
            reporter.status().await
        };
        Box::pin(status) as futures::future::BoxFuture<'static, _>
    });
    let api = Api { status, looks, applied, verdicts, pods, prober };
    // Also where a port can be forwarded to, which a socket in the pod cannot.
    endpoints.health(config.health, readiness, api::of_whole_node(api.clone())).await?;
    endpoints.metrics(config.metrics, metrics.registry()).await?;
    endpoints.api(&config.api_socket, api::router(api))?;
    Ok(())
}

/// Attaches the socket programs once, when their maps are fit for it.
struct Attacher {
    datapath: Arc<Datapath>,
    looks: Looks,
    cgroup: PathBuf,
    wait: bool,
    sockets: watch::Sender<bool>,
    shutdown: CancellationToken,
}

impl Attacher {
    async fn run(self) {
        const POLL: Duration = Duration::from_millis(100);
        const RETRY: Duration = Duration::from_secs(5);
        while self.wait && self.looks.at(|reconciler, _| reconciler.is_started()).await == Some(false) {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = tokio::time::sleep(POLL) => {}
            }
        }
        while let Err(error) = self.datapath.attach_sockets(&self.cgroup) {
            tracing::error!(%error, "cannot attach the socket programs; trying again");
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
        tracing::info!(cgroup = %self.cgroup.display(), "socket programs attached");
        self.sockets.send_replace(true);
        if let Err(error) = self.datapath.remove_older_maps() {
            tracing::warn!(%error, "maps of an older version stay");
        }
    }
}

/// When the agent was started, for reports.
pub(crate) type Started = DateTime<Utc>;

#[cfg(test)]
mod tests {
    use isthmus_policy::Enforcement;

    use super::*;

    #[test]
    fn where_policies_are_enforced_no_service_is_left_to_kube_proxy() {
        assert!(takes_all_services(false, Enforcement::Default));
        assert!(takes_all_services(false, Enforcement::Always));
        assert!(!takes_all_services(false, Enforcement::Never));
        assert!(takes_all_services(true, Enforcement::Never));
    }
}
