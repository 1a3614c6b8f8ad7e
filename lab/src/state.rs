//! What a lab writes down under `/run/isthmus/lab/<name>`, so that other processes find it and can clear it away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Doing, LabError, Result};
use crate::names::{Families, LabName, STATE_ROOT};

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ProcessId {
    /// The pid.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
}

impl ProcessId {
    /// The running process.
    pub fn own() -> Self {
        let pid = std::process::id() as i32;
        Self { pid, start_time: start_time(pid).unwrap_or_default() }
    }

    /// Whether it still runs.
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, is in parentheses and may hold anything.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    // A zombie runs no more.
    if state == "Z" { None } else { fields.nth(18)?.parse().ok() }
}

/// `lab.json`: what there is to know about a lab from outside.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct LabState {
    /// Its name.
    pub name: LabName,
    /// The process that plays kubelets and controllers.
    pub supervisor: ProcessId,
    /// Whether it was left running on purpose.
    pub kept: bool,
    /// The scenario it came from.
    pub scenario: PathBuf,
    /// Address families of all clusters.
    pub families: Families,
    /// Where its cgroups are.
    pub cgroup: PathBuf,
    /// Its clusters, in the scenario's order.
    pub clusters: Vec<ClusterState>,
}

/// One cluster of a [`LabState`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClusterState {
    /// Its name.
    pub name: String,
    /// Its id in the mesh.
    pub id: u16,
    /// Its nodes.
    pub nodes: Vec<String>,
    /// How many clustermesh-apiservers it has.
    pub replicas: usize,
}

/// Where things are in a lab's state folder.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// Of this lab.
    pub fn of(name: &LabName) -> Self {
        Self(name.state_dir())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the folder; it being there means another lab has the name.
    ///
    /// # Errors
    /// When the name is taken, or the folder cannot be made.
    pub fn claim(&self) -> Result<()> {
        let make = || fs::create_dir_all(STATE_ROOT).and_then(|()| fs::create_dir(&self.0));
        let mut made = make();
        // The last lab to go takes the folder of all labs with it, perhaps between our two steps.
        for _ in 0..100 {
            if !made.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
                break;
            }
            made = make();
        }
        match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(LabError::invalid(format!(
                "there is a lab of this name already ({}): `isthmus lab down {}` removes it, `--name` makes another beside it",
                self.0.display(),
                self.0.file_name().unwrap_or_default().to_string_lossy(),
            ))),
            made => made.doing(|| format!("making {}", self.0.display())),
        }
    }

    /// The cluster's folder.
    pub fn cluster(&self, cluster: &str) -> PathBuf {
        self.0.join(cluster)
    }

    /// The node's folder.
    pub fn node(&self, cluster: &str, node: &str) -> PathBuf {
        self.0.join(cluster).join(node)
    }

    /// For `kubectl` in the root namespace.
    pub fn kubeconfig(&self, cluster: &str) -> PathBuf {
        self.cluster(cluster).join("kubeconfig")
    }

    /// For `kubectl` and `isthmus` in the root namespace: a context for each cluster, called like it.
    pub fn all_kubeconfig(&self) -> PathBuf {
        self.0.join("all.kubeconfig")
    }

    /// The status sockets of a cluster's clustermesh-apiservers.
    pub fn apiserver_sockets(&self, cluster: &ClusterState) -> Vec<PathBuf> {
        (0..cluster.replicas).map(|replica| self.apiserver_socket(&cluster.name, replica)).collect()
    }

    /// A clustermesh-apiserver's status socket.
    pub fn apiserver_socket(&self, cluster: &str, replica: usize) -> PathBuf {
        self.cluster(cluster).join(format!("apiserver-{replica}.sock"))
    }

    /// A client certificate of a cluster's administrator, and the authority of its gateways: `tls.crt`, `tls.key`, `ca.crt`.
    pub fn admin_certificate(&self, cluster: &str) -> PathBuf {
        self.0.join("pki").join(format!("{cluster}-admin"))
    }

    /// A node-agent's client certificate, as a kubelet would mount it.
    pub fn agent_certificate(&self, cluster: &str, node: &str) -> PathBuf {
        self.node(cluster, node).join("certificate")
    }

    /// A node-agent's status socket.
    pub fn agent_socket(&self, cluster: &str, node: &str) -> PathBuf {
        self.node(cluster, node).join("agent.sock")
    }

    /// Where a node-agent keeps its key.
    pub fn agent_state(&self, cluster: &str, node: &str) -> PathBuf {
        self.node(cluster, node).join("state")
    }

    /// Where a node's WireGuard device has its socket: for `wg`, in the node's network namespace.
    pub fn wireguard(&self, cluster: &str, node: &str) -> PathBuf {
        self.node(cluster, node).join("wg")
    }

    /// The log of a process.
    pub fn log(&self, process: &str) -> PathBuf {
        self.0.join("logs").join(format!("{}.log", process.replace('/', ".")))
    }

    /// The lab's own bpf file system: what is pinned there goes with it.
    pub fn bpf(&self) -> PathBuf {
        self.0.join("bpf")
    }

    /// What is known of a running pod, for `isthmus lab exec`.
    pub fn pod(&self, cluster: &str, namespace: &str, pod: &str) -> PathBuf {
        self.cluster(cluster).join("pods").join(format!("{namespace}_{pod}.json"))
    }

    /// Writes `lab.json`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, state: &LabState) -> Result<()> {
        write_json(&self.0.join("lab.json"), state)
    }

    /// Reads `lab.json`.
    ///
    /// # Errors
    /// When there is none, or it is not one.
    pub fn read(&self) -> Result<LabState> {
        read_json(&self.0.join("lab.json"))
    }
}

/// Whether this process may make and remove labs.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The names of all labs that have a state folder.
pub fn labs() -> Vec<LabName> {
    let Ok(entries) = fs::read_dir(STATE_ROOT) else { return Vec::new() };
    let mut names: Vec<LabName> =
        entries.flatten().filter_map(|e| e.file_name().to_str().and_then(|n| n.parse().ok())).collect();
    names.sort();
    names
}

/// Writes a file at once: readers see the old one or the new one.
///
/// # Errors
/// When it cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(io::Error::from)
        .doing(|| format!("writing {}", path.display()))?;
    write_whole(path, &text)
}

/// As [`write_json`], of bytes.
///
/// # Errors
/// When it cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    // A leading dot, because programs that watch a folder skip such files.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .doing(|| format!("writing {}", path.display()))
}

/// Reads what [`write_json`] wrote.
///
/// # Errors
/// When it is missing or damaged.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read(path).doing(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).map_err(io::Error::from).doing(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_not_by_its_pid_alone() {
        let own = ProcessId::own();
        assert!(own.alive());
        assert!(!ProcessId { start_time: own.start_time + 1, ..own }.alive());
    }
}
