//! cgroup2 directories, laid out as a kubelet lays them out.
//!
//! ```text
//! <cgroup2>/isthmus-<lab>/<cluster>/<node>/kubepods/besteffort/pod<uid>/<container id>
//!                                         /system/<daemon>
//! ```
//! What is in a lab's cgroup is the lab's, whatever became of the process that started it: that is how a lab ends all
//! of its processes, and none but its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Doing, LabError, Result};

/// Where cgroup2 is mounted on this machine.
///
/// # Errors
/// When it is not.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").doing(|| "reading /proc/self/mounts")?;
    find_mount(&mounts).ok_or_else(|| {
        LabError::Missing(
            "  cgroup2 is not mounted: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
                .into(),
        )
    })
}

fn find_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (path, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Makes a cgroup and all above it.
///
/// # Errors
/// When the kernel refuses.
pub fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).doing(|| format!("making cgroup {}", path.display()))
}

/// Ends every process in the cgroup and below it at once, waits until they are gone, and removes the directories.
/// None there is fine.
///
/// # Errors
/// When processes do not go within ten seconds, or a directory cannot be removed.
pub async fn destroy(path: &Path) -> Result<()> {
    kill(path)?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match remove_tree(path) {
            Ok(()) => return Ok(()),
            // EBUSY: a killed process has not quite left.
            Err(e) if tokio::time::Instant::now() > deadline => {
                return Err(e).doing(|| format!("removing cgroup {}", path.display()));
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// [`destroy`] for where there is no runtime (a `Drop`).
///
/// # Errors
/// As [`destroy`].
#[expect(
    clippy::disallowed_methods,
    reason = "waits for processes to go, where nothing asynchronous can run"
)]
pub fn destroy_blocking(path: &Path) -> Result<()> {
    kill(path)?;
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match remove_tree(path) {
            Ok(()) => return Ok(()),
            Err(e) if std::time::Instant::now() > deadline => {
                return Err(e).doing(|| format!("removing cgroup {}", path.display()));
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);

/// Ends every process in the cgroup and below it.
///
/// # Errors
/// When the kernel refuses. No such cgroup is fine.
pub fn kill(path: &Path) -> Result<()> {
    match fs::write(path.join("cgroup.kill"), "1") {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).doing(|| format!("ending the processes in {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The processes directly in this cgroup.
pub fn processes(path: &Path) -> Vec<i32> {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(find_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0"), Some("/sys/fs/cgroup".into()));
        assert_eq!(find_mount("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0"), None);
    }
}
