use std::io;
use std::path::PathBuf;

use super::ops::Target;

/// Why the kernel's side could not be set up or read. The messages say what to do.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// Loading or attaching needs privileges.
    #[error(
        "the kernel refused {what}: {source}; run the agent as root, or with CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and \
         CAP_SYS_ADMIN (before 5.11 a low `ulimit -l` gives the same error: raise it to unlimited)"
    )]
    Permission {
        /// What was asked of it.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// The pin directory is not on a BPF file system.
    #[error(
        "{path} is not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf, and put the pin directory below it"
    )]
    NotBpffs {
        /// The pin directory.
        path: PathBuf,
    },
    /// The pin directory cannot be made with this name.
    #[error("{path} cannot be made: names on a BPF file system hold no dots; choose another pin directory")]
    DottedName {
        /// The pin directory.
        path: PathBuf,
    },
    /// The directory to attach to is not a cgroup2.
    #[error(
        "{path} is not a cgroup2 directory; mount it with: mount -t cgroup2 none {path} (on a hybrid host it is /sys/fs/cgroup/unified)"
    )]
    NotCgroup2 {
        /// The directory.
        path: PathBuf,
    },
    /// Something else is pinned where a map of ours belongs.
    #[error(
        "{path} is pinned by another program or another version; remove it, or choose another pin directory"
    )]
    Foreign {
        /// What is pinned.
        path: PathBuf,
    },
    /// A file or directory could not be used.
    #[error("cannot use {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel lacks something.
    #[error(
        "this kernel ({release}) cannot do {what}: {source}; Isthmus needs Linux 5.10 or later with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_NET_CLS_BPF"
    )]
    Unsupported {
        /// What was asked of it.
        what: String,
        /// `uname -r`.
        release: String,
        /// Its answer.
        source: io::Error,
    },
    /// The object could not be loaded.
    #[error("cannot load the eBPF programs{}: {message}", origin.as_ref().map(|path| format!(" from {}", path.display())).unwrap_or_default())]
    Load {
        /// The file named by `ISTHMUS_BPF_OBJECT`, when it replaces the object that is built in.
        origin: Option<PathBuf>,
        /// The loader's or the verifier's words.
        message: String,
    },
    /// Any other system call.
    #[error("{what} failed: {source}")]
    Kernel {
        /// What was asked of the kernel.
        what: String,
        /// Its answer.
        source: io::Error,
    },
}

/// Why one map operation was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// The map has no room.
    #[error("map {map} is full ({capacity} entries); raise its size with {flag} and restart the agent")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Entries that it has room for.
        capacity: u32,
        /// The agent's flag that sets the size.
        flag: &'static str,
    },
    /// The kernel refused it for another reason.
    #[error("the kernel refused an entry of map {map}: {}", io::Error::from_raw_os_error(*errno))]
    Refused {
        /// Name of the map.
        map: &'static str,
        /// Its errno.
        errno: i32,
    },
    /// Left out, since an earlier operation of the same service failed.
    #[error("left out, since the change of {cause:?} failed")]
    Withheld {
        /// What failed first.
        cause: Target,
    },
}
