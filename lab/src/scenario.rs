//! A scenario: clusters, manifests, and steps with what is expected of them, read from `scenario.yaml`.
//!
//! The same files are meant for kind: every step is something `kubectl` does (apply, annotate, label, scale, delete,
//! wait, exec) or something done to a machine or a wire (partition, kill).

mod action;
mod parse;
mod reach;
mod step;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use self::action::{
    Annotate, Apply, Capture, Connect, ConnectionMode, Delete, EndTraffic, Exec, Family, Forge, Heal,
    NodeRef, ObjectCondition, Observe, Partition, Plaintext, PodRef, Request, RotateKey, Scale, Shows,
    Status, Target, Traffic, Until, Wait,
};
pub use self::reach::{Attempts, Connects, Cut, EndAttempts, Expect, Flow, GoesOn};
pub(crate) use self::step::{GATEWAY, LEADER};
pub use self::step::{Step, Verb};
use crate::error::{LabError, Result};
use crate::names::{Families, LabName, MAX_CLUSTERS, MAX_NODES, MAX_REPLICAS};
use crate::spec::{ClusterSpec, Encryption, LabSpec, Peering, Store};

/// The file in a scenario's folder.
pub const FILE: &str = "scenario.yaml";
/// Longest file that is read.
const MOST: u64 = 1 << 20;

/// A scenario, checked.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The folder it came from: manifests are beside it.
    pub dir: PathBuf,
    /// One line that says what it shows.
    pub title: String,
    /// Of all clusters.
    pub families: Families,
    /// Unless the command line says otherwise.
    pub store: Store,
    /// Of traffic between nodes.
    pub encryption: Encryption,
    /// 255 or 511.
    pub max_connected_clusters: u16,
    /// Whether Isthmus is installed in the clusters; without, they are plain clusters.
    pub mesh: bool,
    /// How clusters find and trust each other.
    pub peering: Peering,
    /// Whether the clusters are connected from the beginning; if not, they have the Secrets for it.
    pub connected: bool,
    /// How long what was mirrored of a peer is kept once it is disconnected.
    pub drain_grace: Option<Duration>,
    /// At least one.
    pub clusters: Vec<ClusterSpec>,
    /// Applied before the first step.
    pub manifests: Vec<Apply>,
    /// What happens.
    pub steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct File {
    title: String,
    #[serde(default)]
    families: Families,
    #[serde(default)]
    store: Store,
    #[serde(default)]
    encryption: Encryption,
    #[serde(default = "default_max_connected_clusters")]
    max_connected_clusters: u16,
    #[serde(default = "default_mesh")]
    mesh: bool,
    #[serde(default)]
    peering: Peering,
    #[serde(default = "default_connected")]
    connected: bool,
    #[serde(default, deserialize_with = "parse::some_duration")]
    drain_grace: Option<Duration>,
    clusters: Vec<FileCluster>,
    #[serde(default)]
    manifests: Vec<Apply>,
    #[serde(default)]
    steps: Vec<step::FileStep>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FileCluster {
    name: String,
    id: u16,
    #[serde(default = "default_nodes")]
    nodes: usize,
    #[serde(default = "default_replicas")]
    replicas: usize,
    /// All the others when left out.
    peers: Option<Vec<String>>,
}

/// Names those that are beside it: it may be a slip.
fn no_scenario(path: &Path) -> LabError {
    let siblings = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut names: Vec<String> = std::fs::read_dir(siblings)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().join(FILE).is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let there = match names.as_slice() {
        [] => String::new(),
        names => format!("; in {} there are {}", siblings.display(), names.join(", ")),
    };
    LabError::invalid(format!("{} is no scenario: that is a folder with a {FILE}{there}", path.display()))
}

fn default_max_connected_clusters() -> u16 {
    255
}

fn default_nodes() -> usize {
    1
}

fn default_mesh() -> bool {
    true
}

fn default_connected() -> bool {
    true
}

fn default_replicas() -> usize {
    1
}

impl Scenario {
    /// Reads a scenario's folder, or its file.
    ///
    /// # Errors
    /// When it cannot be read, or is not a scenario; the message names the file and the field and says what is allowed.
    pub fn load(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
        let refused = |what: &dyn std::fmt::Display| LabError::invalid(format!("{}: {what}", file.display()));
        let size = match std::fs::metadata(&file) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(no_scenario(path)),
            Err(error) => return Err(refused(&error)),
        };
        if size > MOST {
            return Err(refused(&format!("{size} bytes are too many; a scenario has at most {MOST}")));
        }
        let text = std::fs::read_to_string(&file).map_err(|e| refused(&e))?;
        let dir = file.parent().unwrap_or(Path::new(".")).to_owned();
        Self::parse(&text, dir).map_err(|e| refused(&e))
    }

    /// Reads a scenario's text; manifests are looked for in `dir`.
    ///
    /// # Errors
    /// As [`Scenario::load`], without the file's name.
    pub fn parse(text: &str, dir: PathBuf) -> Result<Self, String> {
        let file: File = serde_norway::from_str(text).map_err(|e| e.to_string())?;
        let names: Vec<&str> = file.clusters.iter().map(|c| c.name.as_str()).collect();
        check_clusters(&file, &names)?;
        if !file.connected && file.peering == Peering::Files {
            return Err(
                "connected: false is for peering by Secrets; without a peer's file there is no peer".into()
            );
        }
        let steps: Vec<Step> = file
            .steps
            .into_iter()
            .enumerate()
            .map(|(i, step)| Step::check(step, &names, &dir).map_err(|e| format!("steps[{i}]: {e}")))
            .collect::<Result<_, _>>()?;
        step::check_traffic(&steps)?;
        step::check_flows(&steps)?;
        for (i, manifest) in file.manifests.iter().enumerate() {
            manifest.check(&names, &dir).map_err(|e| format!("manifests[{i}]: {e}"))?;
        }
        let clusters = file.clusters.iter().map(|c| {
            let others = || names.iter().filter(|n| **n != c.name).map(|n| (*n).to_owned()).collect();
            ClusterSpec {
                name: c.name.clone(),
                id: c.id,
                nodes: (1..=c.nodes).map(|n| format!("{}-node{n}", c.name)).collect(),
                replicas: c.replicas,
                peers: c.peers.clone().unwrap_or_else(others),
            }
        });
        Ok(Self {
            dir,
            title: file.title,
            families: file.families,
            store: file.store,
            encryption: file.encryption,
            max_connected_clusters: file.max_connected_clusters,
            mesh: file.mesh,
            peering: file.peering,
            connected: file.connected,
            drain_grace: file.drain_grace,
            clusters: clusters.collect(),
            manifests: file.manifests,
            steps,
        })
    }

    /// The lab it wants.
    pub fn lab(&self, name: LabName, store: Option<Store>) -> LabSpec {
        LabSpec {
            name,
            scenario: self.dir.clone(),
            families: self.families,
            store: store.unwrap_or(self.store),
            encryption: self.encryption,
            max_connected_clusters: self.max_connected_clusters,
            peering: self.peering,
            connected: self.connected,
            drain_grace: self.drain_grace,
            mesh: self.mesh,
            clusters: self.clusters.clone(),
        }
    }

    /// What its lab is called unless the user says otherwise: after its folder.
    pub fn lab_name(&self) -> LabName {
        let folder = self.dir.canonicalize().unwrap_or_else(|_| self.dir.clone());
        let name = folder.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
        let mut name: String =
            name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(20).collect();
        name = name.trim_matches('-').to_owned();
        name.parse().unwrap_or_else(|_| LabName::fallback())
    }

    /// Whether any step sends requests, so that pods need `curl`.
    pub fn needs_curl(&self) -> bool {
        let asks = |verb: &Verb| {
            matches!(verb, Verb::Request(_) | Verb::Traffic(_) | Verb::Capture(_) | Verb::Connects(_))
        };
        self.steps.iter().any(|step| asks(&step.verb))
    }
}

fn check_clusters(file: &File, names: &[&str]) -> Result<(), String> {
    if file.clusters.is_empty() || file.clusters.len() > MAX_CLUSTERS {
        return Err(format!("clusters: 1 to {MAX_CLUSTERS} are possible, not {}", file.clusters.len()));
    }
    let most = match file.max_connected_clusters {
        255 => 255,
        511 => 511,
        other => return Err(format!("maxConnectedClusters: 255 or 511, not {other}")),
    };
    for (i, cluster) in file.clusters.iter().enumerate() {
        let at = format!("clusters[{i}]");
        cluster.name.parse::<isthmus_wire::ClusterName>().map_err(|e| format!("{at}.name: {e}"))?;
        if !(1..=most).contains(&cluster.id) {
            return Err(format!("{at}.id: 1 to {most}, not {}", cluster.id));
        }
        if !(1..=MAX_NODES).contains(&cluster.nodes) {
            return Err(format!("{at}.nodes: 1 to {MAX_NODES}, not {}", cluster.nodes));
        }
        if !(1..=MAX_REPLICAS).contains(&cluster.replicas) {
            return Err(format!("{at}.replicas: 1 to {MAX_REPLICAS}, not {}", cluster.replicas));
        }
        let before = &file.clusters[..i];
        if before.iter().any(|c| c.name == cluster.name || c.id == cluster.id) {
            return Err(format!(
                "{at}: another cluster has the name {} or the id {}",
                cluster.name, cluster.id
            ));
        }
        for peer in cluster.peers.iter().flatten() {
            if *peer == cluster.name || !names.contains(&peer.as_str()) {
                return Err(format!(
                    "{at}.peers: {peer} is none of the other clusters ({})",
                    names.join(", ")
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
