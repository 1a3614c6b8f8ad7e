//! The programs a lab runs: ours, found beside the running one, and the machine's.

use std::path::{Path, PathBuf};

use crate::error::{LabError, Result};

/// Names the folder with our programs where they are not beside the running one.
pub const BIN_DIR_ENV: &str = "ISTHMUS_BIN_DIR";

/// The shim through which every process of a lab starts, and what the lab's images contain.
pub const LAB_POD: &str = "lab-pod";
/// The Kubernetes API stand-in.
pub const KUBE_API: &str = "lab-kube-api";
/// The command line that users have.
pub const CLI: &str = "isthmus";
/// Exporter, relay and gateway.
pub const APISERVER: &str = "clustermesh-apiserver";
/// One on every node.
pub const NODE_AGENT: &str = "node-agent";

/// The WireGuard device of a node.
pub const WIREGUARD: &str = "isthmus-wireguard";

/// One of our programs.
///
/// # Errors
/// When it has not been built; the message says how to.
pub fn ours(name: &str) -> Result<PathBuf> {
    let dir = bin_dir()?;
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(LabError::Missing(format!(
        "  {name} is not in {}: build all programs first (`cargo build --workspace --bins`), or name their folder in {BIN_DIR_ENV}",
        dir.display()
    )))
}

/// One of the machine's programs.
///
/// # Errors
/// When it is not installed; the message names the Debian package.
pub fn machines(name: &str, package: &str) -> Result<PathBuf> {
    // A plain user's PATH lacks the folders of system programs.
    on_path(name)
        .or_else(|| find(name, ["/usr/sbin", "/sbin", "/usr/local/bin"].map(PathBuf::from)))
        .ok_or_else(|| LabError::Missing(format!("  {name} is not installed: apt-get install -y {package}")))
}

/// A program as the shell finds it.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    find(name, std::env::split_paths(&path))
}

fn find(name: &str, folders: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    folders.into_iter().map(|dir| dir.join(name)).find(|p| p.is_file())
}

fn bin_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(BIN_DIR_ENV) {
        return Ok(dir.into());
    }
    let exe = std::env::current_exe()
        .map_err(|e| LabError::invalid(format!("finding the running program: {e}")))?;
    let dir = exe.parent().unwrap_or(Path::new("/"));
    // Cargo puts tests and benchmarks one folder below the programs.
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() })
}
