//! This node's private keys, as files of the agent's state directory: `wireguard.key`, and `wireguard.key.next` while it
//! is being replaced.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use isthmus_wireguard::config::PrivateKey;
use zeroize::Zeroizing;

const KEY: &str = "wireguard.key";
const NEXT: &str = "wireguard.key.next";
/// Longest file that is read: a key, the name of a rotation, and line ends.
const MOST: u64 = 1024;

/// Why the keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// Reading or writing failed.
    #[error("{path}: {source}; --state-dir must be a directory that the agent may write to", path = path.display())]
    Io {
        /// The file or its directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others may read it.
    #[error(
        "{path} holds this node's private key, but its mode is {mode:04o}; others may have read it. `chmod 600` it if they have not; else delete it, and the agent makes another key", path = path.display()
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is no key.
    #[error(
        "{path} holds no WireGuard private key (44 characters of base64); restore it, or delete it, and the agent makes another key", path = path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
}

/// The directory with the keys.
#[derive(Clone, Debug)]
pub struct KeyFiles {
    dir: PathBuf,
}

/// A key of this node, and why it was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeKey {
    /// The key.
    pub key: PrivateKey,
    /// The name of the rotation that made it; empty for the first.
    pub rotation: String,
}

impl KeyFiles {
    /// Keys in this directory; nothing is touched.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The present key; none if none was ever made.
    ///
    /// # Errors
    /// See [`KeyFileError`].
    pub fn current(&self) -> Result<Option<NodeKey>, KeyFileError> {
        read(&self.dir.join(KEY))
    }

    /// The present key, made if there is none.
    ///
    /// # Errors
    /// See [`KeyFileError`].
    pub fn current_or_new(&self) -> Result<NodeKey, KeyFileError> {
        if let Some(key) = self.current()? {
            return Ok(key);
        }
        let key = NodeKey { key: PrivateKey::generate(), rotation: String::new() };
        self.write(KEY, &key)?;
        Ok(key)
    }

    /// The key that is about to replace the present one.
    ///
    /// # Errors
    /// See [`KeyFileError`].
    pub fn next(&self) -> Result<Option<NodeKey>, KeyFileError> {
        read(&self.dir.join(NEXT))
    }

    /// Writes the key that is to replace the present one.
    ///
    /// # Errors
    /// See [`KeyFileError`].
    pub fn write_next(&self, next: &NodeKey) -> Result<(), KeyFileError> {
        self.write(NEXT, next)
    }

    /// Makes the next key the present one.
    ///
    /// # Errors
    /// See [`KeyFileError`].
    pub fn promote(&self) -> Result<(), KeyFileError> {
        let (next, current) = (self.dir.join(NEXT), self.dir.join(KEY));
        fs::rename(&next, &current).map_err(|source| KeyFileError::Io { path: next, source })?;
        self.sync_directory()
    }

    /// The file is whole or not there, whenever the machine stops.
    fn write(&self, name: &str, key: &NodeKey) -> Result<(), KeyFileError> {
        let path = self.dir.join(name);
        let temporary = self.dir.join(format!(".{name}.new"));
        let write = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            // One that was left there may have had another mode.
            file.set_permissions(Permissions::from_mode(0o600))?;
            writeln!(file, "{}", key.key.to_base64().as_str())?;
            writeln!(file, "{}", key.rotation)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source| KeyFileError::Io { path: path.clone(), source })?;
        self.sync_directory()
    }

    fn sync_directory(&self) -> Result<(), KeyFileError> {
        let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
        synced.map_err(|source| KeyFileError::Io { path: self.dir.clone(), source })
    }
}

/// The key on the first line; on the second, if there is one, what made it.
fn read(path: &Path) -> Result<Option<NodeKey>, KeyFileError> {
    let Some(text) = read_private(path)? else { return Ok(None) };
    let mut lines = text.lines().map(str::trim);
    let key = lines.next().unwrap_or_default().parse();
    let key = key.map_err(|_| KeyFileError::Corrupt { path: path.to_owned() })?;
    Ok(Some(NodeKey { key, rotation: lines.next().unwrap_or_default().to_owned() }))
}

fn read_private(path: &Path) -> Result<Option<Zeroizing<String>>, KeyFileError> {
    let failed = |source| KeyFileError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Mode { path: path.to_owned(), mode });
    }
    // Room for all of it at once: growing would leave copies behind.
    let mut text = Zeroizing::new(String::with_capacity(MOST as usize));
    match file.take(MOST).read_to_string(&mut text) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(KeyFileError::Corrupt { path: path.to_owned() })
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("a file").mode() & 0o7777
    }

    #[test]
    fn a_key_is_made_once_and_readable_by_its_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = KeyFiles::new(folder.path().join("state"));
        assert_eq!(files.current().expect("none is no error"), None);
        let key = files.current_or_new().expect("made");
        assert_eq!(files.current_or_new().expect("read"), key);
        assert_eq!(mode(&folder.path().join("state/wireguard.key")), 0o600);
        assert_eq!(mode(&folder.path().join("state")), 0o700);
        assert_eq!(fs::read_dir(folder.path().join("state")).expect("a folder").count(), 1);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = KeyFiles::new(folder.path());
        files.current_or_new().expect("made");
        let path = folder.path().join(KEY);
        fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("root or owner");
        let error = files.current_or_new().expect_err("too wide").to_string();
        assert!(error.contains("0640") && error.contains("chmod 600") && error.contains("delete"), "{error}");
    }

    #[test]
    fn what_is_no_key_is_refused_and_never_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = KeyFiles::new(folder.path());
        let path = folder.path().join(KEY);
        for content in [&b""[..], b"\n", b"AAAA", &[0xff; 44], &[b'A'; 5000]] {
            fs::write(&path, content).expect("written");
            fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("owner");
            let error = files.current_or_new().expect_err("no key");
            assert!(matches!(error, KeyFileError::Corrupt { .. }), "{error}");
            assert_eq!(fs::read(&path).expect("still there"), content);
        }
    }

    #[test]
    fn the_next_key_waits_beside_the_present_one_and_takes_its_place() {
        let folder = tempfile::tempdir().expect("a folder");
        let files = KeyFiles::new(folder.path());
        let present = files.current_or_new().expect("made");
        assert_eq!(files.next().expect("none is no error"), None);
        let next = NodeKey { key: PrivateKey::generate(), rotation: "2026-01-01".to_owned() };
        files.write_next(&next).expect("written");
        assert_eq!(mode(&folder.path().join(NEXT)), 0o600);
        assert_eq!(files.next().expect("read"), Some(next.clone()));
        assert_eq!(files.current().expect("read"), Some(present));
        files.promote().expect("renamed");
        assert_eq!(files.current().expect("read"), Some(next));
        assert_eq!(files.next().expect("none is no error"), None);
    }
}
