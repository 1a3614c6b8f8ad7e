//! The BPF file system, in which what is pinned outlives the agent. On most nodes systemd has mounted it.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, FsType, statfs};

use super::DatapathError;

/// Whether `path` is on a BPF file system.
pub(super) fn is(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == FsType(BPF_FS_MAGIC.0))
}

/// Mounts it at `path`, which has to be a directory, unless `path` is on one already. Says whether it had to be mounted.
///
/// # Errors
/// There is no such directory, or the kernel refuses.
pub fn ensure_mounted(path: &Path) -> Result<bool, DatapathError> {
    if is(path).map_err(|source| DatapathError::File { path: path.to_owned(), source })? {
        return Ok(false);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RELATIME;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| {
        let (what, source) = (format!("mounting the BPF file system at {}", path.display()), errno.into());
        match errno {
            Errno::EPERM => DatapathError::Permission { what, source },
            _ => DatapathError::Kernel { what, source },
        }
    })?;
    Ok(true)
}
