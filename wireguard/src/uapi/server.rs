//! The device's side: a socket that its owner alone may open.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::unistd::geteuid;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::outgoing::Outgoing;
use super::{Lines, Request, read_request, write_state};
use crate::config::Configurable;

/// Clients that are talked to at once; more wait.
const MAX_CLIENTS: usize = 16;
/// How long a client may say nothing, or take nothing, before its connection is closed.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two attempts to accept when the process has no descriptor left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A device's socket. Its file goes when this is dropped.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that a successor's is not removed.
    file: (u64, u64),
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another device has it.
    #[error("a WireGuard device listens at {path} already: end it first, or choose another interface name")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is where the socket goes.
    #[error("{path} is there already and is no socket: remove it, or choose another folder with --uapi-dir")]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The file could not be made.
    #[error("{path} cannot be made: {source}")]
    Io {
        /// The socket or its folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Server {
    /// Makes the socket `<dir>/<interface>.sock`, mode 0600, and its folder, mode 0700, when that is missing. A socket
    /// that a device which ended badly left behind is replaced.
    ///
    /// # Errors
    /// When another device listens there, or the files cannot be made.
    pub fn bind(dir: &Path, interface: &str) -> Result<Self, ServerError> {
        let path = dir.join(format!("{interface}.sock"));
        let failed = |at: &Path| {
            let path = at.to_owned();
            move |source| ServerError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
        refuse_to_replace(&path)?;
        // Complete under another name before it shows under its own: no one meets it with other permissions.
        let unfinished = dir.join(format!(".{interface}.{}", std::process::id()));
        let _ = fs::remove_file(&unfinished);
        let listener = UnixListener::bind(&unfinished).map_err(failed(&unfinished))?;
        let finished = fs::set_permissions(&unfinished, Permissions::from_mode(0o600))
            .and_then(|()| fs::metadata(&unfinished))
            .and_then(|file| fs::rename(&unfinished, &path).map(|()| (file.dev(), file.ino())));
        if finished.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        let file = finished.map_err(failed(&path))?;
        Ok(Self { listener, path, file })
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Answers clients until cancelled. Updates are applied one at a time.
    pub async fn serve(self, device: Arc<dyn Configurable>, shutdown: CancellationToken) {
        let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
        let updates = Arc::new(Mutex::new(()));
        loop {
            let accepted = tokio::select! {
                accepted = accept(&self.listener, &clients) => accepted,
                () = shutdown.cancelled() => return,
            };
            let (stream, permit) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!("{}: no client can be accepted: {error}", self.path.display());
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let (device, updates) = (device.clone(), updates.clone());
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                if let Err(error) = converse(&stream, &*device, &updates) {
                    debug!("a UAPI client was left: {error}");
                }
            });
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if fs::metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn refuse_to_replace(path: &Path) -> Result<(), ServerError> {
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => Err(ServerError::NotASocket { path: path.to_owned() }),
        Ok(_) if BlockingStream::connect(path).is_ok() => Err(ServerError::InUse { path: path.to_owned() }),
        _ => Ok(()),
    }
}

/// The next client whose credentials are right. Its permit is there before it is accepted: those beyond the bound wait
/// in the kernel's queue.
async fn accept(
    listener: &UnixListener,
    clients: &Arc<Semaphore>,
) -> io::Result<(BlockingStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = clients.clone().acquire_owned().await.map_err(io::Error::other)?;
    loop {
        let (stream, _) = listener.accept().await?;
        if is_owner(&stream)? {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(CLIENT_TIMEOUT))?;
            stream.set_write_timeout(Some(CLIENT_TIMEOUT))?;
            return Ok((stream, permit));
        }
        warn!("a process of another user opened the UAPI socket and was turned away");
    }
}

/// The file's mode says the same, but a descriptor can be handed on.
fn is_owner(stream: &UnixStream) -> io::Result<bool> {
    let uid = stream.peer_cred()?.uid();
    Ok(uid == 0 || uid == geteuid().as_raw())
}

fn converse(stream: &BlockingStream, device: &dyn Configurable, updates: &Mutex<()>) -> io::Result<()> {
    let mut lines = Lines::new(stream);
    let mut out = Outgoing::new(stream);
    loop {
        let answered = match read_request(&mut lines) {
            Ok(None) => return Ok(()),
            Ok(Some(request)) => answer(request, device, updates, &mut out),
            Err(error) if error.is_fatal() => {
                let _ = finish(&mut out, -error.errno());
                return Err(io::Error::other(error));
            }
            Err(error) => {
                warn!("a UAPI request was refused, and nothing of it applied: {error}");
                finish(&mut out, -error.errno())
            }
        };
        answered?;
    }
}

fn answer(
    request: Request,
    device: &dyn Configurable,
    updates: &Mutex<()>,
    out: &mut impl Write,
) -> io::Result<()> {
    match request {
        Request::Get { extended } => {
            let counters = extended.then(|| device.counters());
            write_state(&device.state(), counters.as_deref(), out)?;
            finish(out, 0)
        }
        Request::Set(update) => {
            let result = {
                let _one_at_a_time = updates.lock().unwrap_or_else(PoisonError::into_inner);
                device.apply(update)
            };
            match result {
                Ok(()) => finish(out, 0),
                Err(error) => {
                    warn!("a UAPI update was not applied to its end: {error}");
                    finish(out, -error.errno())
                }
            }
        }
    }
}

/// `errno` is negative for errors, as wireguard-go has it: `wg` prints the right text only then.
fn finish(out: &mut impl Write, errno: i32) -> io::Result<()> {
    write!(out, "errno={errno}\n\n")?;
    out.flush()
}
