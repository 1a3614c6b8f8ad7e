//! The directory of peers: one etcd client configuration per file, named like the peer (wire format, section A.8).
//!
//! The directory and every file in it are watched, files behind symbolic links too, since Kubernetes mounts a Secret
//! as links into a folder that is exchanged whole. Events only wake the reader up; what counts is the content's digest.
//! A slow poll stands behind them for file systems that send none.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventStream, Inotify, WatchMask, Watches};
use isthmus_crds::peer::Relation;
use isthmus_kvstore::config::{ClientConfig, MAX_FILE_BYTES};
use isthmus_wire::ClusterName;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Found, Origin, PeerConfig, Refused, Unread};
use crate::tasks::Tasks;

/// How long after an event the directory is read: writers make several changes in a row.
const SETTLE: Duration = Duration::from_millis(50);
/// How often it is read without any event.
const POLL: Duration = Duration::from_secs(30);
/// How often it is looked for while it is not there.
const RETRY: Duration = Duration::from_secs(5);
/// The most entries that are looked at; a mesh has at most 511 clusters, and each may bring three certificate files.
const MAX_ENTRIES: usize = 4096;
/// What makes a file a peer: the same text that Cilium looks for.
const MARK: &[u8] = b"endpoints:";

/// Follows the directory. `own` is the name of the own cluster, whose file is ignored.
///
/// The first reading is done when this returns. A file that turns unusable keeps its last usable configuration, so that
/// a half-written file cuts no peer off; one that is gone, or no longer looks like a configuration, is removed.
pub(super) fn follow(path: PathBuf, own: ClusterName, tasks: &Tasks) -> watch::Receiver<Found> {
    let (send, receive) = watch::channel(Found::default());
    let mut directory = Directory { path, own, send };
    directory.reread();
    tasks.spawn("the watch of the directory of peers", async move { directory.run().await });
    receive
}

struct Directory {
    path: PathBuf,
    own: ClusterName,
    send: watch::Sender<Found>,
}

impl Directory {
    async fn run(&mut self) {
        loop {
            match Notifier::new(&self.path) {
                Ok(mut notifier) => {
                    // Read only once watched, so that no change falls between the two.
                    loop {
                        self.reread();
                        if self.send.borrow().unread.is_some() {
                            break;
                        }
                        notifier.watch_files();
                        notifier.changed().await;
                    }
                }
                Err(error) => {
                    self.reread();
                    tracing::debug!(path = %self.path.display(), %error, "peer directory cannot be watched");
                }
            }
            sleep_until(Instant::now() + RETRY).await;
        }
    }

    fn reread(&mut self) {
        let before = self.send.borrow().clone();
        let now = read(&self.path, &self.own, &before);
        for (file, refused) in
            now.refused.iter().filter(|(file, refused)| before.refused.get(*file) != Some(refused))
        {
            tracing::error!(reason = refused.reason, "peer configuration refused: {file}");
        }
        if let Some(Unread { reason, .. }) =
            now.unread.as_ref().filter(|unread| before.unread.as_ref() != Some(unread))
        {
            tracing::error!(reason, "peer directory cannot be read; the peers known so far stay connected");
        }
        self.send.send_if_modified(|peers| {
            let changed = *peers != now;
            *peers = now;
            changed
        });
    }
}

fn read(path: &Path, own: &ClusterName, before: &Found) -> Found {
    let names = match file_names(path) {
        Ok(names) => names,
        Err(error) => {
            let reason =
                format!("{}: {error}; create it, or name another one with --peers-dir", path.display());
            return Found { unread: Some(Unread { first: false, reason }), ..before.clone() };
        }
    };
    let mut peers = Found::default();
    for name in names {
        match read_file(&path.join(&name), &name, own) {
            Ok(None) => {}
            Ok(Some((cluster, file))) => {
                peers.configured.insert(cluster, file);
            }
            Err(reason) => {
                if let Some((cluster, file)) = before.configured.get_key_value(name.as_str()) {
                    peers.configured.insert(cluster.clone(), file.clone());
                }
                let relation = Relation::Connected;
                let refused = Refused { cluster: name.parse().ok(), relation, reason, uid: None };
                peers.refused.insert(Origin::File(name), refused);
            }
        }
    }
    peers
}

fn file_names(path: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(path)?.take(MAX_ENTRIES) {
        // Hidden ones are Kubernetes' own (`..data`) or an editor's.
        if let Some(name) = entry?.file_name().to_str().filter(|name| !name.starts_with('.')) {
            names.insert(name.to_owned());
        }
    }
    Ok(names)
}

/// None for what is no configuration: certificates and keys lie in the same directory.
fn read_file(
    path: &Path,
    name: &str,
    own: &ClusterName,
) -> Result<Option<(ClusterName, PeerConfig)>, String> {
    let bytes = match bounded(path) {
        Ok(Some(bytes)) => bytes,
        // Vanished or unreadable: removed, as A.8 says.
        Ok(None) | Err(_) => return Ok(None),
    };
    if name == own.as_str() || !bytes.windows(MARK.len()).any(|window| window == MARK) {
        return Ok(None);
    }
    let cluster = name.parse::<ClusterName>().map_err(|error| {
        format!("the file's name must be the peer's cluster name, and {error}; rename or remove it")
    })?;
    let text = std::str::from_utf8(&bytes).map_err(|_| "the file is not UTF-8 text".to_owned())?;
    let client = ClientConfig::parse(text).map_err(|error| error.to_string())?;
    let (digest, origin) = (Sha256::digest(&bytes).into(), Origin::File(name.to_owned()));
    Ok(Some((cluster, PeerConfig { digest, client, origin, version: None, authorities: None })))
}

/// The content of a regular file, or nothing where something else has the name; one byte beyond the bound at most, so
/// that the parser refuses what is too long.
fn bounded(path: &Path) -> io::Result<Option<Vec<u8>>> {
    if !fs::metadata(path)?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(fs::File::open(path)?, MAX_FILE_BYTES + 1), &mut bytes)?;
    Ok(Some(bytes))
}

struct Notifier {
    path: PathBuf,
    watches: Watches,
    events: EventStream<Vec<u8>>,
}

impl Notifier {
    fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let mut watches = inotify.watches();
        watches.add(path, directory_mask())?;
        Ok(Self { path: path.to_owned(), watches, events: inotify.into_event_stream(vec![0; 4096])? })
    }

    /// Watches what the entries lead to now. Adding the same file again changes nothing, and the kernel drops the watch
    /// of a file that is gone.
    fn watch_files(&mut self) {
        for name in file_names(&self.path).unwrap_or_default() {
            let path = self.path.join(name);
            if let Err(error) =
                self.watches.add(&path, WatchMask::MODIFY | WatchMask::CLOSE_WRITE | WatchMask::ATTRIB)
            {
                tracing::debug!(path = %path.display(), %error, "peer file cannot be watched");
            }
        }
    }

    async fn changed(&mut self) {
        if timeout(POLL, self.events.next()).await.is_err() {
            return;
        }
        // What else happens until it has settled is read at once with it.
        let settled = Instant::now() + SETTLE;
        while let Ok(Some(_)) = tokio::time::timeout_at(settled, self.events.next()).await {}
    }
}

fn directory_mask() -> WatchMask {
    WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_TO
        | WatchMask::MOVED_FROM
        | WatchMask::CLOSE_WRITE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tokio_util::sync::CancellationToken;

    use super::*;

    const CONFIG: &str = "endpoints:\n- http://127.0.0.1:2379\n";
    const OTHER: &str = "endpoints:\n- http://127.0.0.1:2380\n";

    fn cluster(name: &str) -> ClusterName {
        name.parse().unwrap()
    }

    fn refusal<'a>(peers: &'a Found, file: &str) -> Option<&'a str> {
        Some(&peers.refused.get(&Origin::File(file.to_owned()))?.reason)
    }

    async fn until(peers: &mut watch::Receiver<Found>, condition: impl FnMut(&Found) -> bool) -> Found {
        timeout(Duration::from_secs(20), peers.wait_for(condition)).await.expect("in time").unwrap().clone()
    }

    #[tokio::test]
    async fn files_come_change_and_go_without_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::write(path.join("beta"), CONFIG).unwrap();
        fs::write(path.join("alpha"), CONFIG).unwrap();
        fs::write(path.join("common-etcd-client.crt"), "a certificate").unwrap();
        let shutdown = CancellationToken::new();
        let mut peers = follow(path.to_owned(), cluster("alpha"), &Tasks::until(shutdown.clone()));
        let first = peers.borrow().clone();
        assert_eq!(first.configured.keys().map(|name| name.as_str()).collect::<Vec<_>>(), ["beta"]);
        assert!(first.refused.is_empty());

        fs::write(path.join("gamma"), CONFIG).unwrap();
        until(&mut peers, |peers| peers.configured.contains_key("gamma")).await;
        let digest = first.configured["beta"].digest;
        fs::write(path.join("beta"), OTHER).unwrap();
        until(&mut peers, |peers| peers.configured["beta"].digest != digest).await;
        fs::remove_file(path.join("beta")).unwrap();
        until(&mut peers, |peers| !peers.configured.contains_key("beta")).await;
        shutdown.cancel();
    }

    #[tokio::test]
    async fn a_mounted_secret_is_exchanged_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        for (version, text) in [("..1", CONFIG), ("..2", OTHER)] {
            fs::create_dir(path.join(version)).unwrap();
            fs::write(path.join(version).join("beta"), text).unwrap();
        }
        symlink("..1", path.join("..data")).unwrap();
        symlink("..data/beta", path.join("beta")).unwrap();
        let shutdown = CancellationToken::new();
        let mut peers = follow(path.to_owned(), cluster("alpha"), &Tasks::until(shutdown.clone()));
        let digest = peers.borrow().configured["beta"].digest;
        symlink("..2", path.join("..data_tmp")).unwrap();
        fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
        until(&mut peers, |peers| peers.configured["beta"].digest != digest).await;
        shutdown.cancel();
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_named_and_cuts_nobody_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::write(path.join("beta"), CONFIG).unwrap();
        fs::write(path.join("Not_A_Name"), CONFIG).unwrap();
        let shutdown = CancellationToken::new();
        let mut peers = follow(path.to_owned(), cluster("alpha"), &Tasks::until(shutdown.clone()));
        assert!(refusal(&peers.borrow(), "Not_A_Name").unwrap().contains("cluster name"));
        fs::write(path.join("beta"), "endpoints: [\"ftp://x\"]\n").unwrap();
        let now = until(&mut peers, |peers| refusal(peers, "beta").is_some()).await;
        assert!(refusal(&now, "beta").unwrap().contains("endpoints[0]"), "{:?}", now.refused);
        assert!(now.configured.contains_key("beta"), "the last usable configuration stays");
        fs::write(path.join("beta"), CONFIG).unwrap();
        until(&mut peers, |peers| refusal(peers, "beta").is_none()).await;
        shutdown.cancel();
    }

    #[tokio::test]
    async fn a_directory_may_come_later() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("later");
        let shutdown = CancellationToken::new();
        let mut peers = follow(path.clone(), cluster("alpha"), &Tasks::until(shutdown.clone()));
        assert!(peers.borrow().unread.as_ref().unwrap().reason.contains("--peers-dir"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("beta"), CONFIG).unwrap();
        until(&mut peers, |peers| peers.unread.is_none() && peers.configured.contains_key("beta")).await;
        shutdown.cancel();
    }
}
