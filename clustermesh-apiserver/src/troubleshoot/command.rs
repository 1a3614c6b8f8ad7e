//! Without a running apiserver and without Kubernetes: on client configuration files alone, from wherever it is run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use isthmus_crds::names::DEFAULT_NAMESPACE;
use isthmus_kvstore::client::steps::Resolver;
use isthmus_wire::{ClusterId, ClusterName, MaxConnectedClusters};

use super::{
    HERE, Limits, Origin, Outcome, Report, Setup, Signs, Target, Troubleshooter, in_directory, text,
};
use crate::relay::OwnCluster;

const EXAMPLES: &str = "\
Examples:
  # All peers of a directory as Cilium mounts it
  clustermesh-apiserver troubleshoot --peers-dir /var/lib/cilium/clustermesh

  # One of them, and whether its id and size fit ours
  clustermesh-apiserver troubleshoot --peers-dir /var/lib/cilium/clustermesh --cluster-name alpha --cluster-id 1 beta

  # One client configuration, wherever it is
  clustermesh-apiserver troubleshoot --config ./beta.yaml beta

The exit status is 0 if nothing failed, 1 if something did, 2 if the question makes no sense.";

/// Why a peer is not connected, step by step, from here.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct Flags {
    /// The peers; all in the directory when none is named
    #[arg(value_name = "PEER")]
    pub peers: Vec<ClusterName>,
    /// The directory with one client configuration per peer, named like the peer
    #[arg(long, value_name = "DIR", conflicts_with = "config", required_unless_present = "config")]
    pub peers_dir: Option<PathBuf>,
    /// One client configuration; its peer is the one that is named, or else named like the file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of the own cluster, whose file in the directory is ignored
    #[arg(long, value_name = "NAME")]
    pub cluster_name: Option<ClusterName>,
    /// Id of the own cluster, which no peer may have
    #[arg(long, value_name = "ID", requires = "cluster_name")]
    pub cluster_id: Option<ClusterId>,
    /// What the own mesh is set up for
    #[arg(long, value_name = "255|511", default_value = "255")]
    pub max_connected_clusters: MaxConnectedClusters,
    /// Letters instead of signs, as where the terminal is not in UTF-8
    #[arg(long)]
    pub ascii: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Probes, prints, and says by its exit status what was found.
pub async fn run(flags: &Flags) -> ExitCode {
    match from_files(flags).await {
        Ok(report) => {
            print(&report, flags);
            match report.outcome() {
                Outcome::Failed => ExitCode::FAILURE,
                _ => ExitCode::SUCCESS,
            }
        }
        Err(reason) => {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "{reason}");
            ExitCode::from(2)
        }
    }
}

/// Probes, and does not print.
///
/// # Errors
/// There is nothing to probe.
pub async fn from_files(flags: &Flags) -> Result<Report, String> {
    let targets = targets(flags)?;
    let cluster = flags.cluster_name.as_ref().map_or_else(|| HERE.to_owned(), ToString::to_string);
    let own = flags.cluster_name.clone().zip(flags.cluster_id);
    let setup = Setup {
        cluster,
        own: own.map(|(name, id)| OwnCluster { name, id, mesh: flags.max_connected_clusters }),
        namespace: DEFAULT_NAMESPACE.to_owned(),
        origin: Origin::Command,
        resolver: Resolver::system(),
        limits: Limits::default(),
    };
    let names: Vec<String> = match flags.config {
        // The file is the peer, whatever it is called.
        Some(_) => Vec::new(),
        None => flags.peers.iter().map(ToString::to_string).collect(),
    };
    Troubleshooter::new(setup, move || Some(targets.clone()))
        .report(&names)
        .await
        .map_err(|refusal| refusal.to_string())
}

fn targets(flags: &Flags) -> Result<Vec<Target>, String> {
    if let Some(path) = &flags.config {
        let name = match flags.peers.as_slice() {
            [name] => name.clone(),
            [] => named_like(path)?,
            _ => return Err("--config FILE is about one peer; name one".to_owned()),
        };
        return Ok(vec![Target::in_file(name, path)]);
    }
    let Some(directory) = &flags.peers_dir else {
        return Err("give --peers-dir DIR or --config FILE".to_owned());
    };
    in_directory(directory, flags.cluster_name.as_ref())
        .map_err(|error| format!("--peers-dir {}: {error}", directory.display()))
}

fn named_like(path: &Path) -> Result<ClusterName, String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    stem.parse().map_err(|_| {
        format!("{}: the file is not named like a cluster; name the peer after it", path.display())
    })
}

fn print(report: &Report, flags: &Flags) {
    use std::io::Write as _;
    let text = match flags.json {
        true => serde_json::to_string_pretty(report).unwrap_or_default() + "\n",
        false => {
            let variables = ["LC_ALL", "LC_CTYPE", "LANG"].map(|name| std::env::var(name).ok());
            let signs = match flags.ascii {
                true => Signs::Ascii,
                false => Signs::of_locale(variables.iter().map(Option::as_deref)),
            };
            text(report, signs)
        }
    };
    // Nobody reads (`| head`) is no error.
    let _ = std::io::stdout().write_all(text.as_bytes());
}
