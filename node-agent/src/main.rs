//! Turns the mesh's state into eBPF maps on one node.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use isthmus_daemon::{LogFormat, LogLevel, LoopbackAddr, init_logging, shutdown_on_signal};
use isthmus_node_agent::daemon::{self, Config};
use isthmus_node_agent::datapath::MapSizes;
use isthmus_node_agent::datapath::bpf_fs;
use isthmus_node_agent::encryption::Settings;
use isthmus_node_agent::sources::mesh::OwnCluster;
use isthmus_policy::Enforcement;
use isthmus_wire::{ClusterId, ClusterName, MaxConnectedClusters};
use isthmus_wireguard::control::{Backend, Location};

const EXAMPLES: &str = "Examples:
  # On a node of cluster alpha, beside kube-proxy:
  node-agent --cluster-name alpha --cluster-id 1 --node-name node-1 \\
      --gateway-config /var/lib/isthmus/gateway.yaml

  # Instead of kube-proxy:
  node-agent --cluster-name alpha --cluster-id 1 --node-name node-1 \\
      --gateway-config /var/lib/isthmus/gateway.yaml --kube-proxy-replacement

  # How it is:
  curl --unix-socket /run/isthmus/agent.sock http://localhost/v1/status

  # Remove everything that it has attached and pinned, when uninstalling:
  node-agent cleanup --bpf-fs /sys/fs/bpf/isthmus";

/// Balances services of the mesh on this node.
///
/// Reads the mesh from the own cluster's gateway (the clustermesh-apiserver) and fills eBPF maps. What it has attached
/// serves on while it is not running; started again, it takes over.
#[derive(Parser)]
#[command(name = "node-agent", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Option<Run>,
}

#[derive(Subcommand)]
enum Command {
    /// Detach all programs and remove all maps, the routes to the encryption device, and the device.
    ///
    /// What pods say to other nodes is in the clear from then on. The key in --state-dir stays; so does the node's annotation
    /// network.cilium.io/wg-pub-key, which a run with --encryption=off withdraws.
    Cleanup {
        /// Pin directory that the agent was given
        #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/isthmus")]
        bpf_fs: PathBuf,
        /// Network interface of the WireGuard device that the agent was given
        #[arg(long, value_name = "NAME", default_value = "isthmus_wg0", value_parser = interface)]
        wireguard_interface: String,
    },
    /// Mount the BPF file system where it is missing, for nodes without systemd, which does it elsewhere.
    ///
    /// In a pod it needs a privileged container, and a mount with the propagation `Bidirectional`.
    MountBpfFs {
        /// Where
        #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf")]
        path: PathBuf,
    },
}

#[derive(Args)]
struct Run {
    /// Name of this cluster
    #[arg(long, value_name = "NAME")]
    cluster_name: ClusterName,
    /// Id of this cluster in the mesh, 1 to 255 (or 511)
    #[arg(long, value_name = "ID")]
    cluster_id: ClusterId,
    /// How many clusters the mesh is set up for: 255 or 511, the same in every cluster
    #[arg(long, value_name = "N", default_value = "255", value_parser = mesh_size)]
    max_connected_clusters: MaxConnectedClusters,
    /// Name of this node, as Kubernetes knows it
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: String,
    /// How to reach the Kubernetes API; as a pod's service account does if not given
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Client configuration (etcd's YAML) for this cluster's gateway, with a certificate of `agent-<cluster>`
    #[arg(long, value_name = "FILE")]
    gateway_config: PathBuf,
    /// Directory on a BPF file system for maps and programs; one agent per directory
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/isthmus")]
    bpf_fs: PathBuf,
    /// cgroup2 directory to balance sockets in, below which the kubelet makes the cgroups of pods
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup")]
    cgroup_root: PathBuf,
    /// Where the node's procfs is mounted
    #[arg(long, value_name = "DIR", default_value = "/proc")]
    proc_root: PathBuf,
    /// Balance every ClusterIP service, not only the global ones; they are in any case unless --policy-enforcement=never, since
    /// policies judge the pod behind a service
    #[arg(long)]
    kube_proxy_replacement: bool,
    /// Whether traffic between the pods of different nodes is encrypted (WireGuard)
    #[arg(long, value_enum, value_name = "ON|OFF", default_value_t = Switch::On)]
    encryption: Switch,
    /// Which WireGuard device: the kernel's where it has one and `isthmus-wireguard` elsewhere, or one of them
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t)]
    wireguard: Backend,
    /// Drop what should be encrypted and cannot be, and what comes unencrypted from pods of other nodes
    #[arg(long)]
    encryption_strict: bool,
    /// In strict mode, a range of pods: nothing goes unencrypted to an address in it of which nothing is known; may be
    /// given several times
    #[arg(long, value_name = "CIDR", requires = "encryption_strict")]
    encryption_strict_cidr: Vec<IpNet>,
    /// Network interface of the WireGuard device
    #[arg(long, value_name = "NAME", default_value = "isthmus_wg0", value_parser = interface)]
    wireguard_interface: String,
    /// UDP port of the WireGuard device, the same on every node of the mesh
    #[arg(long, value_name = "PORT", default_value_t = 51871, value_parser = clap::value_parser!(u16).range(1..))]
    wireguard_port: u16,
    /// Where the network's sysctls can be written; a pod's own /proc/sys is read-only
    #[arg(long, value_name = "DIR", default_value = "/proc/sys/net")]
    sysctl_root: PathBuf,
    /// Where `isthmus-wireguard` has its configuration socket
    #[arg(long, value_name = "DIR", default_value = "/var/run/wireguard")]
    wireguard_uapi_dir: PathBuf,
    /// Where this node's private key is kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/isthmus")]
    state_dir: PathBuf,
    /// Entries of the map of frontends
    #[arg(long, value_name = "N", default_value_t = MapSizes::default().services)]
    bpf_map_services: u32,
    /// Entries of the map of backends
    #[arg(long, value_name = "N", default_value_t = MapSizes::default().backends)]
    bpf_map_backends: u32,
    /// Entries of the map of addresses and identities
    #[arg(long, value_name = "N", default_value_t = MapSizes::default().ipcache)]
    bpf_map_ipcache: u32,
    /// Seconds that peers have to be read after a start before what an earlier run knew of them is dropped
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    clustermesh_sync_timeout: u64,
    /// Whose traffic network policies restrict: that of pods which a policy selects, of all pods, or of none
    #[arg(long, value_name = "MODE", default_value_t)]
    policy_enforcement: Enforcement,
    /// Take peers that a policy selects by labels, without the label io.cilium.k8s.policy.cluster, for those of this cluster
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    policy_default_local_cluster: bool,
    /// Entries that the policy of one pod may need; a pod whose policy needs more is allowed nothing
    #[arg(long, value_name = "N", default_value_t = MapSizes::default().policy_entries, value_parser = clap::value_parser!(u32).range(1..))]
    policy_map_max: u32,
    /// Pods on this node that policies can be about
    #[arg(long, value_name = "N", default_value_t = MapSizes::default().endpoints, value_parser = clap::value_parser!(u32).range(1..))]
    bpf_map_endpoints: u32,
    /// Flows of restricted pods that are remembered; the least recently used give way
    #[arg(long, value_name = "N", default_value_t = MapSizes::default().policy_flows, value_parser = clap::value_parser!(u32).range(1..))]
    bpf_map_policy_flows: u32,
    /// Seconds that the packets of a new pod are held back (dropped) while what its policy depends on has not been read.
    /// Then it gets what is known: policies that have not been read by then do not restrict it until they are, unless
    /// --policy-enforcement=always. 0 holds it back for as long as it takes
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    endpoint_wait: u64,
    /// Seconds between two comparisons of the kernel's maps with what they should hold
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    map_compare_interval: u64,
    /// Where /healthz and /readyz are served, in plain text and therefore on loopback only
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9879")]
    health_address: LoopbackAddr,
    /// Where /metrics is served, in plain text and therefore on loopback only
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9963")]
    metrics_address: LoopbackAddr,
    /// Unix socket for `isthmus status`
    #[arg(long, value_name = "PATH", default_value = "/run/isthmus/agent.sock")]
    api_socket: PathBuf,
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
    /// What is logged: a level, or a list of target=level
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = "info")]
    log_level: LogLevel,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match (cli.command, cli.run) {
        (Some(Command::Cleanup { bpf_fs, wireguard_interface }), _) => {
            daemon::cleanup(&bpf_fs, &wireguard_interface).map_err(anyhow::Error::from)
        }
        (Some(Command::MountBpfFs { path }), _) => {
            bpf_fs::ensure_mounted(&path).map(drop).map_err(anyhow::Error::from)
        }
        (None, Some(run)) => serve(run),
        (None, None) => Err(anyhow::anyhow!("nothing to do; see node-agent --help")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("node-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(run: Run) -> anyhow::Result<()> {
    init_logging(run.log_format, &run.log_level)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let shutdown = shutdown_on_signal()?;
        Ok(daemon::run(config(run), shutdown).await?)
    })
}

fn config(run: Run) -> Config {
    Config {
        own: OwnCluster { name: run.cluster_name, id: run.cluster_id, mesh_size: run.max_connected_clusters },
        node: run.node_name,
        kubeconfig: run.kubeconfig,
        gateway_config: run.gateway_config,
        bpf_fs: run.bpf_fs,
        cgroup_root: run.cgroup_root,
        proc_root: run.proc_root,
        kube_proxy_replacement: run.kube_proxy_replacement,
        sizes: MapSizes {
            services: run.bpf_map_services,
            backends: run.bpf_map_backends,
            ipcache: run.bpf_map_ipcache,
            endpoints: run.bpf_map_endpoints,
            policy_entries: run.policy_map_max,
            policy_flows: run.bpf_map_policy_flows,
            ..MapSizes::default()
        },
        sync_timeout: Duration::from_secs(run.clustermesh_sync_timeout),
        policy_enforcement: run.policy_enforcement,
        policy_default_local_cluster: run.policy_default_local_cluster,
        endpoint_wait: (run.endpoint_wait > 0).then(|| Duration::from_secs(run.endpoint_wait)),
        compare_every: Duration::from_secs(run.map_compare_interval),
        health: run.health_address,
        metrics: run.metrics_address,
        api_socket: run.api_socket,
        state_dir: run.state_dir,
        encryption: (run.encryption == Switch::On).then_some(Settings {
            backend: run.wireguard,
            location: Location { interface: run.wireguard_interface, uapi_dir: run.wireguard_uapi_dir },
            port: run.wireguard_port,
            strict: run.encryption_strict,
            strict_cidrs: run.encryption_strict_cidr,
            sysctl_root: run.sysctl_root,
        }),
    }
}

/// The kernel's rules for names of interfaces.
fn interface(text: &str) -> Result<String, String> {
    let plain = text.chars().all(|letter| letter.is_ascii_graphic() && letter != '/' && letter != ':');
    if (1..=15).contains(&text.len()) && plain && !matches!(text, "." | "..") {
        Ok(text.to_owned())
    } else {
        Err("a network interface has 1 to 15 letters, without spaces, '/' and ':'".to_owned())
    }
}

fn mesh_size(text: &str) -> Result<MaxConnectedClusters, String> {
    let number: u32 = text.parse().map_err(|_| format!("{text} is neither 255 nor 511"))?;
    MaxConnectedClusters::try_from(number).map_err(|error| error.to_string())
}
