//! Which peers there are to ask, and how each is configured.

use std::collections::BTreeSet;
use std::path::Path;

use isthmus_kvstore::config::ClientConfig;
use isthmus_wire::ClusterName;

use super::fault::Source;
use crate::relay::{NotReached, Relay};
use crate::status::PeerOrigin;

/// What makes a file a peer, as for the relay.
const MARK: &str = "endpoints:";
/// The most entries of a directory that are looked at.
const MAX_ENTRIES: usize = 4096;

/// A peer as it is configured.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its cluster name.
    pub name: ClusterName,
    /// Where its configuration is.
    pub source: Source,
    /// How to reach it; or why it is not reached.
    pub client: Result<ClientConfig, NotReached>,
}

impl Target {
    /// A peer whose client configuration is in a file.
    pub fn in_file(name: ClusterName, path: &Path) -> Self {
        let client = ClientConfig::load(path).map_err(|error| NotReached::Unusable(error.to_string()));
        Self { name, source: Source::File(path.to_owned()), client }
    }
}

/// The peers of a running relay, the files among them in `directory`.
pub(super) fn of_relay(relay: &Relay, directory: &Path) -> Vec<Target> {
    let source = |origin| match origin {
        PeerOrigin::Secret { namespace, name } => Source::Secret { namespace, name },
        PeerOrigin::File(name) => Source::File(directory.join(name)),
    };
    let all = relay.configurations().into_iter();
    all.map(|(name, origin, client)| Target { name, source: source(origin), client }).collect()
}

/// The peers in a directory with one client configuration per file, named like the peer (wire format, section A.8). The
/// file of `own` is none.
///
/// # Errors
/// The directory cannot be read.
pub fn in_directory(path: &Path, own: Option<&ClusterName>) -> std::io::Result<Vec<Target>> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path)?.take(MAX_ENTRIES) {
        let name = entry?.file_name();
        // Hidden ones are Kubernetes' own, and certificates are not named like clusters.
        if let Some(name) = name.to_str().filter(|name| !name.starts_with('.'))
            && let Ok(name) = name.parse::<ClusterName>()
            && own != Some(&name)
        {
            names.insert(name);
        }
    }
    Ok(names.into_iter().filter_map(|name| configured(&path.join(name.as_str()), name)).collect())
}

/// None for what is no configuration.
fn configured(path: &Path, name: ClusterName) -> Option<Target> {
    if !path.is_file() {
        return None;
    }
    let target = Target::in_file(name, path);
    // One that cannot be parsed is a peer if it was meant to be one.
    let meant = || {
        let mut text = Vec::new();
        let read = std::fs::File::open(path).and_then(|file| {
            let most = isthmus_kvstore::config::MAX_FILE_BYTES;
            std::io::Read::read_to_end(&mut std::io::Read::take(file, most), &mut text)
        });
        read.is_err() || String::from_utf8_lossy(&text).contains(MARK)
    };
    (target.client.is_ok() || meant()).then_some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_meant_as_peers_are_peers_also_when_they_cannot_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("alpha", "endpoints:\n- http://127.0.0.1:2379\n");
        write("beta", "endpoints:\n- http://127.0.0.1:2379\n");
        write("gamma", "endpoints: [https://127.0.0.1:2379]\n");
        write("notes", "nothing of the kind\n");
        write("common-etcd-client.crt", "endpoints: is in here by chance\n");
        let own: ClusterName = "alpha".parse().unwrap();
        let found = in_directory(folder.path(), Some(&own)).unwrap();
        let names: Vec<_> = found.iter().map(|target| target.name.as_str()).collect();
        assert_eq!(names, ["beta", "gamma"]);
        let refused = found[1].client.as_ref().unwrap_err();
        assert!(matches!(refused, NotReached::Unusable(why) if why.contains("trusted-ca-file")), "{found:?}");
    }
}
