//! Network namespaces with a name under `/run/netns`, where `ip netns` finds them too.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Doing, Result};

/// Where named network namespaces are mounted.
pub const NETNS_DIR: &str = "/run/netns";

/// A network namespace, in most cases a named one. Dropping it does not remove it: [`NetNs::remove`] does, and so does
/// [`cleanup::sweep`](crate::cleanup::sweep) for a whole lab.
#[derive(Debug, Clone)]
pub struct NetNs {
    name: Arc<str>,
    path: Arc<Path>,
    file: Arc<File>,
}

impl NetNs {
    /// Makes a new namespace of this name, with `lo` up.
    ///
    /// # Errors
    /// When the name is taken, or without the right to do so.
    pub async fn create(name: &str) -> Result<Self> {
        let path = path_of(name);
        fs::create_dir_all(NETNS_DIR).doing(|| format!("creating {NETNS_DIR}"))?;
        File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .doing(|| format!("creating {}", path.display()))?;
        let target = path.clone();
        let made = in_new_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        });
        if let Err(source) = made {
            // An empty file left there would look like a namespace to `ip netns`.
            let _ = fs::remove_file(&path);
            return Err(source).doing(|| format!("making network namespace {name}"));
        }
        let ns = Self::open(name)?;
        ns.netlink()?.up("lo").await?;
        Ok(ns)
    }

    /// The existing namespace of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(name: &str) -> Result<Self> {
        Self::at(&path_of(name), name)
    }

    /// The namespace behind a file, such as `/proc/<pid>/ns/net`; messages call it `name`.
    ///
    /// # Errors
    /// When there is none, or it may not be entered.
    pub fn at(path: &Path, name: &str) -> Result<Self> {
        let file = File::open(path).doing(|| format!("opening network namespace {}", path.display()))?;
        Ok(Self { name: name.into(), path: path.into(), file: Arc::new(file) })
    }

    /// The namespace that the calling thread is in.
    ///
    /// # Errors
    /// When procfs is not mounted.
    pub fn own() -> Result<Self> {
        Self::at(Path::new("/proc/thread-self/ns/net"), "this machine")
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is mounted: what `nsenter --net=` takes.
    pub fn path(&self) -> PathBuf {
        self.path.to_path_buf()
    }

    /// For netlink messages that name a namespace by descriptor.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Runs `f` on a thread of its own that has entered this namespace. For what is quick: opening a socket,
    /// writing a sysctl. A socket belongs for ever to the namespace in which it was opened.
    ///
    /// # Errors
    /// What `f` answers, or that the namespace cannot be entered.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T> {
        let file = Arc::clone(&self.file);
        in_new_thread(move || {
            setns(&*file, CloneFlags::CLONE_NEWNET)?;
            f()
        })
        .doing(|| format!("working in network namespace {}", self.name))
    }

    /// A TCP connection opened inside this namespace.
    ///
    /// # Errors
    /// As `connect(2)`.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<tokio::net::TcpStream> {
        let socket =
            self.run(move || {
                if to.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() }
            })
            .map_err(io::Error::other)?;
        let stream = socket.connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Sets `/proc/sys/net/<key>` in this namespace.
    ///
    /// # Errors
    /// When the kernel has no such setting or refuses the value.
    pub fn sysctl(&self, settings: &'static [(&'static str, &'static str)]) -> Result<()> {
        self.run(move || {
            for (key, value) in settings {
                let path = format!("/proc/sys/net/{key}");
                fs::write(&path, value).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?;
            }
            Ok(())
        })
    }

    /// Takes the name away. The namespace itself lives until its last process and socket are gone.
    ///
    /// # Errors
    /// When it cannot be unmounted. That it is gone already is none.
    pub fn remove(&self) -> Result<()> {
        remove_path(&self.path())
    }
}

/// Unmounts and unlinks a namespace's name. None there is fine.
///
/// # Errors
/// When the kernel refuses.
pub fn remove_path(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: a file that never became a mount (killed between the two steps).
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(e) => return Err(e).doing(|| format!("unmounting {}", path.display())),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).doing(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn path_of(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// A thread's namespace is its own, so whatever is done in another one happens on a thread that then ends.
fn in_new_thread<T: Send + 'static>(f: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(f)?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}
