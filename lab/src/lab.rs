//! A lab: several clusters on this machine, up and joined, and what can be done to them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::{try_join, try_join_all};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster::Cluster;
use crate::error::{Doing, LabError, Result};
use crate::names::LabName;
use crate::netns::NetNs;
use crate::pki::{self, Authority};
use crate::process::{Launch, Process};
use crate::spec::{Encryption, LabSpec, Peering};
use crate::state::{ClusterState, LabState, ProcessId, StateDir};
use crate::topology::Wan;
use crate::{cgroup, cleanup, programs, scenario};

/// A running lab. Dropping it removes everything it made; [`Lab::down`] does so without blocking the runtime.
pub struct Lab {
    spec: LabSpec,
    wan: Wan,
    clusters: Vec<Cluster>,
    ground: Arc<Ground>,
}

/// What the parts of a lab share.
pub(crate) struct Ground {
    pub(crate) name: LabName,
    pub(crate) state: StateDir,
    /// `<cgroup2>/isthmus-<lab>`.
    pub(crate) cgroup: PathBuf,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
    daemons: Mutex<BTreeMap<String, Process>>,
    swept: AtomicBool,
}

impl Lab {
    /// Raises a lab and returns when every daemon says it is ready. `progress` is told of each stage.
    ///
    /// # Errors
    /// When something does not come up; what had come up is gone again by then.
    pub async fn up(spec: LabSpec, progress: &mut (dyn FnMut(&str) + Send)) -> Result<Self> {
        install_tls_provider();
        let ground = Arc::new(Ground::claim(&spec)?);
        // From here on, dropping removes what there is.
        let guard = Sweeper(Some(Arc::clone(&ground)));
        let lab = Self::raise(spec, &ground, progress).await?;
        guard.disarm();
        Ok(lab)
    }

    async fn raise(
        spec: LabSpec,
        ground: &Arc<Ground>,
        progress: &mut (dyn FnMut(&str) + Send),
    ) -> Result<Self> {
        progress("namespaces, bridges and the router between the clusters");
        let (wan, nets) = Wan::build(&ground.name, spec.families, &spec.clusters).await?;

        progress("a Kubernetes API for each cluster");
        let starting =
            nets.into_iter().zip(&spec.clusters).map(|(net, c)| Cluster::start(ground, &spec, c, net));
        let clusters = try_join_all(starting).await?;
        let kubeconfigs: Vec<_> = clusters.iter().map(|c| ground.state.kubeconfig(c.name())).collect();
        pki::merge_kubeconfigs(&ground.state.all_kubeconfig(), &kubeconfigs)?;

        progress("nodes, kubelets and controllers");
        try_join_all(clusters.iter().map(Cluster::start_roles)).await?;

        if spec.mesh {
            match spec.peering {
                Peering::Secrets => Self::raise_mesh(&spec, &clusters, progress).await?,
                Peering::Files => Self::raise_mesh_of_files(&spec, &clusters, ground, progress).await?,
            }
        }
        Ok(Self { spec, wan, clusters, ground: Arc::clone(ground) })
    }

    async fn raise_mesh(
        spec: &LabSpec,
        clusters: &[Cluster],
        progress: &mut (dyn FnMut(&str) + Send),
    ) -> Result<()> {
        progress("clustermesh-apiservers, and an authority of its own for each cluster");
        try_join_all(clusters.iter().map(async |cluster| {
            cluster.prepare_secrets().await?;
            cluster.start_apiservers(spec).await
        }))
        .await?;
        progress("a node-agent on each node, and a Secret for each peer");
        let agents = try_join_all(clusters.iter().map(async |cluster| {
            cluster.certificates_shown().await?;
            cluster.start_agents(spec).await
        }));
        let joined = async {
            try_join_all(clusters.iter().map(|cluster| cluster.join(spec, clusters))).await?;
            match spec.connected {
                true => try_join_all(clusters.iter().map(Cluster::joined)).await.map(drop),
                false => Ok(()),
            }
        };
        try_join(agents, joined).await.map(drop)
    }

    async fn raise_mesh_of_files(
        spec: &LabSpec,
        clusters: &[Cluster],
        ground: &Ground,
        progress: &mut (dyn FnMut(&str) + Send),
    ) -> Result<()> {
        progress("clustermesh-apiservers, joined by files and one authority");
        let pki = Authority::create("Isthmus lab CA", &ground.state.path().join("pki"))?;
        for cluster in clusters {
            cluster.write_files(&pki, clusters)?;
        }
        try_join_all(clusters.iter().map(|c| c.start_apiservers(spec))).await?;
        progress("a node-agent on each node");
        try_join_all(clusters.iter().map(|c| c.start_agents(spec))).await.map(drop)
    }

    /// Its name.
    pub fn name(&self) -> &LabName {
        &self.ground.name
    }

    /// What it was made from.
    pub fn spec(&self) -> &LabSpec {
        &self.spec
    }

    /// Where its files are.
    pub fn state(&self) -> &StateDir {
        &self.ground.state
    }

    /// All clusters, in the order of the specification.
    pub fn clusters(&self) -> &[Cluster] {
        &self.clusters
    }

    /// The cluster of this name.
    ///
    /// # Errors
    /// When there is none; the message lists those there are.
    pub fn cluster(&self, name: &str) -> Result<&Cluster> {
        self.clusters.iter().find(|c| c.name() == name).ok_or_else(|| {
            let all: Vec<&str> = self.clusters.iter().map(Cluster::name).collect();
            LabError::invalid(format!("there is no cluster {name}, only {}", all.join(", ")))
        })
    }

    /// Cuts the way from one cluster to another, silently, as a broken link does. The way back stays.
    ///
    /// # Errors
    /// When there is no such cluster, or it is cut already.
    pub async fn cut(&self, from: &str, to: &str) -> Result<()> {
        self.wan.cut(self.position(from)?, self.position(to)?).await
    }

    /// The namespace of the router between the clusters. The wires of all hosts end there: what crosses between nodes can be
    /// seen in it.
    pub fn wan(&self) -> &NetNs {
        self.wan.ns()
    }

    /// Joins everything that was cut.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn heal(&self) -> Result<()> {
        self.wan.heal().await
    }

    /// A daemon by name: `<cluster>/kubernetes`, `<cluster>/clustermesh-apiserver`
    /// (`-0`, `-1`... behind it where there are several), `<cluster>/etcd`,
    /// `<cluster>/<node>/node-agent`.
    ///
    /// # Errors
    /// When there is none; the message lists those there are.
    pub fn daemon(&self, name: &str) -> Result<Process> {
        self.ground.daemon(name)
    }

    /// A daemon's own name, given that or one of these: `<cluster>/leader`, the clustermesh-apiserver that leads, and
    /// `<cluster>/<node>/gateway`, the one that the node's agent reads from.
    ///
    /// # Errors
    /// When nobody leads, or the agent reads from none.
    pub async fn resolve(&self, name: &str) -> Result<String> {
        match name.split('/').collect::<Vec<_>>().as_slice() {
            [cluster, scenario::LEADER] => self.cluster(cluster)?.leader().await,
            [cluster, node, scenario::GATEWAY] => self.cluster(cluster)?.gateway_of(node).await,
            _ => Ok(name.to_owned()),
        }
    }

    /// Ends a daemon at once, as a crash does.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn kill(&self, name: &str) -> Result<()> {
        let daemon = self.daemon(name)?;
        daemon.signal(Signal::SIGKILL);
        daemon.ended().await;
        Ok(())
    }

    /// Stops a daemon where it stands; [`Lab::resume`] lets it go on.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn pause(&self, name: &str) -> Result<()> {
        self.daemon(name).map(|d| d.signal(Signal::SIGSTOP))
    }

    /// Lets a paused daemon go on.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn resume(&self, name: &str) -> Result<()> {
        self.daemon(name).map(|d| d.signal(Signal::SIGCONT))
    }

    /// Ends a daemon in good order (if it runs), starts it again, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart(&self, name: &str) -> Result<()> {
        let daemon = self.daemon(name)?;
        daemon.stop(GRACE).await;
        let cluster = self.cluster(name.split('/').next().unwrap_or_default())?;
        self.ground.run(daemon.launch().clone()).await?;
        cluster.wait_ready(name).await
    }

    /// Starts every agent again with encryption on, off or strict, and a WireGuard device beside it or none.
    ///
    /// # Errors
    /// When they do not become ready.
    pub async fn encrypt(&self, mode: Encryption) -> Result<()> {
        for name in self.daemons() {
            if name.ends_with(programs::NODE_AGENT) || name.ends_with(programs::WIREGUARD) {
                self.daemon(&name)?.stop(GRACE).await;
                self.ground.daemons.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
            }
        }
        let spec = LabSpec { encryption: mode, ..self.spec.clone() };
        try_join_all(self.clusters.iter().map(|c| c.start_agents(&spec))).await?;
        Ok(())
    }

    /// Daemons that have ended though nobody asked.
    pub fn fallen(&self) -> Vec<Process> {
        let daemons = self.ground.daemons.lock().unwrap_or_else(PoisonError::into_inner);
        daemons.values().filter(|d| !d.running()).cloned().collect()
    }

    /// Which Kubernetes API the clusters have: `stand-in` or `kube-apiserver`.
    pub fn kubernetes(&self) -> &'static str {
        if self.clusters.iter().any(Cluster::real_kubernetes) { "kube-apiserver" } else { "stand-in" }
    }

    /// The names of all daemons.
    pub fn daemons(&self) -> Vec<String> {
        self.ground.daemons.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// A pod and a service address to try, if the pods named `client` and a service are there.
    pub async fn example(&self) -> Option<(String, String)> {
        let cluster = self.clusters.first()?;
        cluster.pod("default", "client").ok()?;
        let services: kube::Api<k8s_openapi::api::core::v1::Service> =
            kube::Api::namespaced(cluster.client(), "default");
        let services = services.list(&kube::api::ListParams::default()).await.ok()?;
        let service = services.into_iter().find(|s| s.metadata.name.as_deref() != Some("kubernetes"))?;
        let address: std::net::IpAddr = service.spec?.cluster_ip?.parse().ok()?;
        let address = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        Some((format!("{}/client", cluster.name()), address))
    }

    /// Writes down that this lab stays, and who plays its kubelets.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn mark_kept(&self) -> Result<()> {
        self.ground.state.write(&LabState { kept: true, ..self.ground.describe(&self.spec) })
    }

    /// Is done when the lab has been told to end.
    pub async fn stopped(&self) {
        self.ground.stop.cancelled().await;
    }

    /// Ends and removes everything.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub async fn down(self) -> Result<()> {
        self.ground.end_tasks().await;
        let name = self.ground.name.clone();
        // Dropping `self` must not sweep again: by then the name may be another lab's.
        self.ground.swept.store(true, Ordering::Relaxed);
        tokio::task::spawn_blocking(move || cleanup::sweep(&name)).await.unwrap_or(Ok(()))
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.cluster(name)?;
        Ok(self.clusters.iter().position(|c| c.name() == name).unwrap_or_default())
    }
}

/// Time a daemon is given to end in good order.
const GRACE: Duration = Duration::from_secs(5);

impl Drop for Lab {
    fn drop(&mut self) {
        self.ground.sweep();
    }
}

/// Removes a half-made lab.
struct Sweeper(Option<Arc<Ground>>);

impl Sweeper {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        if let Some(ground) = &self.0 {
            ground.sweep();
        }
    }
}

impl Ground {
    fn claim(spec: &LabSpec) -> Result<Self> {
        let state = StateDir::of(&spec.name);
        let cgroup = cgroup::mount_point()?.join(spec.name.cgroup());
        state.claim()?;
        let ground = Self {
            name: spec.name.clone(),
            state,
            cgroup,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            daemons: Mutex::default(),
            swept: AtomicBool::new(false),
        };
        match ground.prepare(spec) {
            Ok(()) => Ok(ground),
            Err(e) => {
                ground.sweep();
                Err(e)
            }
        }
    }

    fn prepare(&self, spec: &LabSpec) -> Result<()> {
        self.state.write(&self.describe(spec))?;
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        let make = |dir: &Path| private.create(dir).doing(|| format!("making {}", dir.display()));
        make(&self.state.path().join("logs"))?;
        make(&self.state.path().join("pki"))?;
        for cluster in &spec.clusters {
            make(&self.state.cluster(&cluster.name).join("pods"))?;
            make(&self.state.cluster(&cluster.name).join("peers"))?;
            for node in &cluster.nodes {
                make(&self.state.node(&cluster.name, node))?;
            }
        }
        let bpf = self.state.bpf();
        make(&bpf)?;
        mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>)
            .doing(|| format!("mounting a bpf file system on {}", bpf.display()))?;
        for cluster in &spec.clusters {
            for node in &cluster.nodes {
                make(&bpf.join(&cluster.name).join(node))?;
            }
        }
        cgroup::create(&self.cgroup)
    }

    fn describe(&self, spec: &LabSpec) -> LabState {
        LabState {
            name: self.name.clone(),
            supervisor: ProcessId::own(),
            kept: false,
            scenario: spec.scenario.clone(),
            families: spec.families,
            cgroup: self.cgroup.clone(),
            clusters: spec
                .clusters
                .iter()
                .map(|c| ClusterState {
                    name: c.name.clone(),
                    id: c.id,
                    nodes: c.nodes.clone(),
                    replicas: c.replicas,
                })
                .collect(),
        }
    }

    /// Starts a daemon and remembers it under its name.
    pub(crate) async fn run(&self, launch: Launch) -> Result<Process> {
        let process = launch.start().await?;
        let mut daemons = self.daemons.lock().unwrap_or_else(PoisonError::into_inner);
        daemons.insert(process.name().to_owned(), process.clone());
        Ok(process)
    }

    pub(crate) fn daemon(&self, name: &str) -> Result<Process> {
        let daemons = self.daemons.lock().unwrap_or_else(PoisonError::into_inner);
        daemons.get(name).cloned().ok_or_else(|| {
            let all: Vec<&str> = daemons.keys().map(String::as_str).collect();
            LabError::invalid(format!("there is no daemon {name}, only {}", all.join(", ")))
        })
    }

    /// Kubelets and controllers end before their processes and cgroups go, so that nothing is made anew meanwhile.
    async fn end_tasks(&self) {
        self.stop.cancel();
        self.tasks.close();
        // A task that hangs only delays: what it makes later fails, for its folder is gone.
        let _ = tokio::time::timeout(TASKS_END, self.tasks.wait()).await;
    }

    /// The runtime's other threads end them meanwhile.
    #[expect(
        clippy::disallowed_methods,
        reason = "waits for tasks to end, where nothing asynchronous can run"
    )]
    fn wait_for_tasks(&self) {
        let begun = std::time::Instant::now();
        while !self.tasks.is_empty() && begun.elapsed() < TASKS_END {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// As [`Self::end_tasks`] and what comes after it, for where nothing can be awaited (a `Drop`).
    fn sweep(&self) {
        self.stop.cancel();
        if self.swept.swap(true, Ordering::Relaxed) {
            return;
        }
        self.tasks.close();
        self.wait_for_tasks();
        if let Err(e) = cleanup::sweep(&self.name) {
            tracing::error!(lab = %self.name, error = %e, "not everything could be removed; `isthmus lab down` tries again");
        }
    }
}

/// Time for kubelets and controllers to end what they are in the midst of.
const TASKS_END: Duration = Duration::from_secs(10);

fn install_tls_provider() {
    // An error only says that one was installed before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
