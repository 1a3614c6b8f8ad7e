//! Which peers there are: a directory of files (wire format, section A.8) and Secrets in the Kubernetes API, merged.
//!
//! ```text
//!   directory ──┐
//!               ├──▶ Peers ──▶ relay, and whom the gateway trusts
//!   Secrets ────┘
//! ```
//!
//! A peer that both configure is connected as its Secret says, so that one moves from the directory to Secrets without a gap:
//! create the Secret, then remove the file. The file is named as refused meanwhile; it counts again should the Secret go first.
//! A Secret that only admits a cluster says nothing of a connection, and stands beside a file that does.
//!
//! Nothing here forgets a peer because a source cannot be read: only a source that says so removes one.

mod directory;
mod secrets;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use isthmus_crds::SecretVersion;
use isthmus_crds::peer::Relation;
use isthmus_kvstore::config::ClientConfig;
use isthmus_wire::ClusterName;
use tokio::sync::watch;

pub use self::secrets::SecretSource;
pub(crate) use crate::status::PeerOrigin as Origin;
use crate::tasks::Tasks;

/// Where configurations of peers are looked for.
#[derive(Clone, Debug)]
pub struct SourcesConfig {
    /// Name of the own cluster, which is nobody's peer.
    pub own: ClusterName,
    /// The directory with one client configuration per peer.
    pub directory: Option<PathBuf>,
    /// The Secrets.
    pub secrets: Option<SecretSource>,
}

/// The authorities that vouch for peers, each for its own cluster alone.
pub type Authorities = Vec<(ClusterName, Arc<str>)>;

/// The peers that are configured now. Cheap to clone; follows its sources for as long as the tasks it was given run.
#[derive(Clone, Debug)]
pub struct Sources {
    pub(super) peers: watch::Receiver<Peers>,
    authorities: watch::Receiver<Authorities>,
}

impl Sources {
    /// Follows the sources. The directory has been read once when this returns; Secrets come later, and
    /// [`Relay::waiting_for`](super::Relay::waiting_for) tells of it. Must be called within a tokio runtime.
    pub fn follow(config: SourcesConfig, tasks: &Tasks) -> Self {
        let SourcesConfig { own, directory, secrets } = config;
        let mut found = Both {
            directory: directory.map(|path| directory::follow(path, own.clone(), tasks)),
            secrets: secrets.map(|source| secrets::follow(source, own, tasks)),
        };
        let (send_peers, peers) = watch::channel(found.merged());
        let (send_authorities, authorities) = watch::channel(peers.borrow().authorities());
        tasks.spawn("the following of peers", async move {
            loop {
                found.changed().await;
                let now = found.merged();
                send_authorities.send_if_modified(|authorities| replace(authorities, now.authorities()));
                send_peers.send_if_modified(|peers| replace(peers, now));
            }
        });
        Self { peers, authorities }
    }

    /// The authorities of the clusters that Secrets connect or admit. One of which neither is asked any more is not vouched for.
    pub fn authorities(&self) -> watch::Receiver<Authorities> {
        self.authorities.clone()
    }
}

fn replace<T: PartialEq>(old: &mut T, new: T) -> bool {
    let changed = *old != new;
    *old = new;
    changed
}

/// What all sources say together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Peers {
    /// The usable configurations.
    pub(super) configured: BTreeMap<ClusterName, PeerConfig>,
    /// Whose clients are let in beside those of the configured peers.
    pub(super) admitted: BTreeMap<ClusterName, Admission>,
    /// What looks like a configuration and is not used, and why.
    pub(super) refused: BTreeMap<Origin, Refused>,
    /// Why the directory cannot be read.
    pub(super) directory_unread: Option<String>,
    /// Why the Secrets have not been read, or cannot be at present.
    pub(super) secrets_unread: Option<Unread>,
}

impl Peers {
    /// Whether a cluster that nothing connects is certainly no peer to be read from: everything was read, and nothing that
    /// cannot be understood stands for it.
    pub(super) fn removed(&self, cluster: &ClusterName) -> bool {
        let mut doubtful = self.refused.iter().filter(|(_, refused)| refused.relation == Relation::Connected);
        self.known()
            && !self.configured.contains_key(cluster)
            && !doubtful.any(|(origin, refused)| match &refused.cluster {
                Some(name) => name == cluster,
                // A file that is not named like a cluster never was one; a Secret may be anybody's.
                None => matches!(origin, Origin::Secret { .. }),
            })
    }

    /// Whether every source has been read.
    pub(super) fn known(&self) -> bool {
        self.directory_unread.is_none() && !self.secrets_unread.as_ref().is_some_and(|unread| unread.first)
    }

    fn authorities(&self) -> Authorities {
        let connected =
            self.configured.iter().filter_map(|(name, peer)| Some((name, peer.authorities.as_ref()?)));
        let admitted = self.admitted.iter().map(|(name, admission)| (name, &admission.authorities));
        connected.chain(admitted).map(|(name, pem)| (name.clone(), Arc::clone(pem))).collect()
    }
}

/// Why a source cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Unread {
    /// Whether it never was.
    pub(super) first: bool,
    /// Why, and what to do.
    pub(super) reason: String,
}

/// One peer's configuration.
#[derive(Clone, Debug)]
pub(super) struct PeerConfig {
    /// SHA-256 of what matters to the connection: another one means another connection.
    pub(super) digest: [u8; 32],
    /// Where the peer is and who to be towards it.
    pub(super) client: ClientConfig,
    /// What says so.
    pub(super) origin: Origin,
    /// Which version of a Secret says so. Another one that says the same needs no other connection.
    pub(super) version: Option<SecretVersion>,
    /// The authorities that vouch for the peer towards the own gateway, PEM. A file names none.
    pub(super) authorities: Option<Arc<str>>,
}

impl PeerConfig {
    /// Whether what is connected as `other` says is connected as this one says, too. Certificates renew themselves within
    /// an identity; what differs otherwise has another digest.
    pub(super) fn connects_like(&self, other: &Self) -> bool {
        // A Secret that was made anew has another identity, also if all of its text is the same.
        self.digest == other.digest && self.client.identity == other.client.identity
    }
}

impl PartialEq for PeerConfig {
    fn eq(&self, other: &Self) -> bool {
        self.connects_like(other) && self.origin == other.origin && self.version == other.version
    }
}

impl Eq for PeerConfig {}

/// A cluster whose clients are let in, and from which nothing is read for that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Admission {
    /// What says so.
    pub(crate) origin: Origin,
    /// Which version of it.
    pub(crate) version: Option<SecretVersion>,
    /// The authorities that vouch for the cluster, PEM.
    pub(crate) authorities: Arc<str>,
}

/// Why something that looks like a configuration is not used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Refused {
    /// The cluster that it stands for, as far as that can be told.
    pub(crate) cluster: Option<ClusterName>,
    /// What it asks for.
    pub(crate) relation: Relation,
    /// What is wrong, and what to do.
    pub(crate) reason: String,
    /// The uid of a Secret.
    pub(crate) uid: Option<String>,
}

/// What one source says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Found {
    configured: BTreeMap<ClusterName, PeerConfig>,
    admitted: BTreeMap<ClusterName, Admission>,
    refused: BTreeMap<Origin, Refused>,
    unread: Option<Unread>,
}

/// Both sources, if there are both.
struct Both {
    directory: Option<watch::Receiver<Found>>,
    secrets: Option<watch::Receiver<Found>>,
}

impl Both {
    async fn changed(&mut self) {
        async fn of(source: &mut Option<watch::Receiver<Found>>) {
            if let Some(source) = source
                && source.changed().await.is_ok()
            {
                return;
            }
            // One that has ended, as it does with the shutdown, never changes again.
            std::future::pending().await
        }
        tokio::select! {
            () = of(&mut self.directory) => {}
            () = of(&mut self.secrets) => {}
        }
    }

    fn merged(&mut self) -> Peers {
        let now = |source: &mut Option<watch::Receiver<Found>>| match source {
            Some(source) => source.borrow_and_update().clone(),
            None => Found::default(),
        };
        merge(now(&mut self.directory), now(&mut self.secrets))
    }
}

fn merge(directory: Found, secrets: Found) -> Peers {
    let mut peers = Peers {
        configured: secrets.configured,
        admitted: secrets.admitted,
        refused: secrets.refused,
        directory_unread: directory.unread.map(|unread| unread.reason),
        secrets_unread: secrets.unread,
    };
    peers.refused.extend(directory.refused);
    for (cluster, file) in directory.configured {
        match peers.configured.get(&cluster) {
            None => drop(peers.configured.insert(cluster, file)),
            Some(secret) => {
                let reason = format!(
                    "peer {cluster} is connected as {} says, not this {}; remove one of the two",
                    secret.origin, file.origin
                );
                let relation = Relation::Connected;
                let refused = Refused { cluster: Some(cluster), relation, reason, uid: None };
                peers.refused.insert(file.origin, refused);
            }
        }
    }
    peers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(name: &str) -> ClusterName {
        name.parse().unwrap()
    }

    fn config(origin: Origin) -> PeerConfig {
        let client = ClientConfig::parse("endpoints: ['http://127.0.0.1:1']").unwrap();
        let authorities = matches!(origin, Origin::Secret { .. }).then(|| "PEM".into());
        PeerConfig { digest: [0; 32], client, origin, version: None, authorities }
    }

    fn file(name: &str) -> (ClusterName, PeerConfig) {
        (cluster(name), config(Origin::File(name.to_owned())))
    }

    fn secret(name: &str) -> Origin {
        Origin::Secret { namespace: "system".to_owned(), name: name.to_owned() }
    }

    #[test]
    fn a_secret_wins_over_a_file_and_the_file_is_told_which() {
        let directory = Found { configured: [file("beta"), file("gamma")].into(), ..Found::default() };
        let secrets =
            Found { configured: [(cluster("beta"), config(secret("peer-beta")))].into(), ..Found::default() };
        let peers = merge(directory.clone(), secrets);
        assert_eq!(peers.configured["beta"].origin, secret("peer-beta"));
        assert_eq!(peers.configured["gamma"].origin, Origin::File("gamma".to_owned()));
        let reason = &peers.refused[&Origin::File("beta".to_owned())].reason;
        assert!(reason.contains("Secret system/peer-beta") && reason.contains("file beta"), "{reason}");
        assert_eq!(peers.authorities(), [(cluster("beta"), "PEM".into())], "a file vouches for nobody");

        let peers = merge(directory, Found::default());
        assert_eq!(peers.configured["beta"].origin, Origin::File("beta".to_owned()), "it counts again");
        assert!(peers.refused.is_empty());
    }

    #[test]
    fn a_secret_that_admits_stands_beside_a_file_that_connects() {
        let directory = Found { configured: [file("beta")].into(), ..Found::default() };
        let admission = Admission { origin: secret("peer-beta"), version: None, authorities: "PEM".into() };
        let secrets = Found { admitted: [(cluster("beta"), admission)].into(), ..Found::default() };
        let peers = merge(directory, secrets.clone());
        assert_eq!(peers.configured["beta"].origin, Origin::File("beta".to_owned()));
        assert!(peers.refused.is_empty(), "they do not speak of the same thing");
        assert_eq!(peers.authorities(), [(cluster("beta"), "PEM".into())]);

        let alone = merge(Found::default(), secrets);
        assert_eq!(alone.authorities(), [(cluster("beta"), "PEM".into())]);
        assert!(alone.removed(&cluster("beta")), "nothing is mirrored of it, and what was has to go");
    }

    #[test]
    fn nobody_is_taken_for_removed_before_everything_is_known() {
        let unread = |first| Some(Unread { first, reason: "no answer".to_owned() });
        let early = merge(Found::default(), Found { unread: unread(true), ..Found::default() });
        assert!(!early.removed(&cluster("beta")));
        let later = merge(Found::default(), Found { unread: unread(false), ..Found::default() });
        assert!(
            later.removed(&cluster("beta")),
            "what was read is known, also while the API is out of reach"
        );
        let directory = merge(Found { unread: unread(false), ..Found::default() }, Found::default());
        assert!(!directory.removed(&cluster("beta")));

        let relation = Relation::Connected;
        let refused = |cluster| Refused { cluster, relation, reason: "broken".to_owned(), uid: None };
        let mut peers = Peers::default();
        peers.refused.insert(secret("peer-beta"), refused(Some(cluster("beta"))));
        assert!(!peers.removed(&cluster("beta")));
        assert!(peers.removed(&cluster("gamma")));
        peers.refused.insert(secret("other"), refused(None));
        assert!(!peers.removed(&cluster("gamma")), "a Secret that cannot be read may be anybody's");
        peers.refused.values_mut().for_each(|refused| refused.relation = Relation::Admitted);
        assert!(peers.removed(&cluster("gamma")), "and connects nobody if it does not ask for that");
    }
}
