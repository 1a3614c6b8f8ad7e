//! Whether a peer may take part: its cluster configuration against the own one and those of the other peers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use isthmus_wire::validate::{self, Incompatible, RemoteCluster};
use isthmus_wire::{ClusterConfig, ClusterId, ClusterName, MaxConnectedClusters, ValueError};

/// The own cluster, as far as a peer must fit it.
#[derive(Clone, Debug)]
pub struct OwnCluster {
    /// Its name.
    pub name: ClusterName,
    /// Its id.
    pub id: ClusterId,
    /// What its mesh is set up for.
    pub mesh: MaxConnectedClusters,
}

/// Why a peer is not mirrored.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// Its configuration cannot be read.
    #[error("its cluster configuration cannot be used: {0}")]
    Malformed(#[from] ValueError),
    /// It does not fit the own cluster.
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    /// Another peer has that id already.
    #[error("its id, {id}, is that of peer {other} already; give one of the two another")]
    IdTaken {
        /// The id.
        id: u16,
        /// The peer that has it.
        other: ClusterName,
    },
}

/// Which cluster ids are taken, and by whom. Shared between the peers' tasks.
#[derive(Clone, Debug)]
pub(super) struct Registry {
    own: OwnCluster,
    taken: Arc<Mutex<BTreeMap<ClusterId, ClusterName>>>,
}

/// A cluster id that no other peer can have while this exists.
#[derive(Debug)]
pub(super) struct Reservation {
    remote: RemoteCluster,
    taken: Arc<Mutex<BTreeMap<ClusterId, ClusterName>>>,
}

impl Registry {
    /// One in which only the own id is taken.
    pub(super) fn new(own: OwnCluster) -> Self {
        Self { own, taken: Arc::default() }
    }

    /// Checks `config` of `peer` against the own cluster, and takes its id.
    ///
    /// # Errors
    /// A [`Refusal`] that says what to change.
    pub(super) fn admit(&self, peer: &ClusterName, config: &ClusterConfig) -> Result<Reservation, Refusal> {
        let remote = validate::cluster_config(peer, config, self.own.id, self.own.mesh)?;
        let mut taken = lock(&self.taken);
        match taken.get(&remote.id) {
            Some(other) => Err(Refusal::IdTaken { id: remote.id.number(), other: other.clone() }),
            None => {
                taken.insert(remote.id, peer.clone());
                Ok(Reservation { remote, taken: Arc::clone(&self.taken) })
            }
        }
    }
}

impl Reservation {
    /// The peer that it was made for: what its entries are checked against.
    pub(super) fn remote(&self) -> &RemoteCluster {
        &self.remote
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.taken).remove(&self.remote.id);
    }
}

/// A map that a panicking task left behind is still whole: every change of it is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(mesh: MaxConnectedClusters) -> Registry {
        Registry::new(OwnCluster {
            name: "alpha".parse().unwrap(),
            id: ClusterId::try_from(1).unwrap(),
            mesh,
        })
    }

    fn config(id: u32, mesh: u32) -> ClusterConfig {
        let text = format!(
            r#"{{"id":{id},"capabilities":{{"syncedCanaries":true,"maxConnectedClusters":{mesh}}}}}"#
        );
        ClusterConfig::decode(text.as_bytes()).unwrap()
    }

    #[test]
    fn an_id_has_one_owner_until_it_is_given_back() {
        let registry = registry(MaxConnectedClusters::C255);
        let (beta, gamma) = ("beta".parse().unwrap(), "gamma".parse().unwrap());
        let held = registry.admit(&beta, &config(2, 255)).unwrap();
        let refusal = registry.admit(&gamma, &config(2, 255)).unwrap_err();
        assert_eq!(refusal, Refusal::IdTaken { id: 2, other: beta });
        drop(held);
        registry.admit(&gamma, &config(2, 255)).unwrap();
    }

    #[test]
    fn what_does_not_fit_the_mesh_is_refused_as_cilium_does() {
        let beta = "beta".parse().unwrap();
        let own = ClusterId::try_from(1).unwrap();
        let small = registry(MaxConnectedClusters::C255);
        assert_eq!(
            small.admit(&beta, &config(1, 255)).unwrap_err(),
            Refusal::Incompatible(Incompatible::OwnId(own))
        );
        assert!(matches!(
            small.admit(&beta, &config(300, 511)).unwrap_err(),
            Refusal::Incompatible(Incompatible::Id(_))
        ));
        small.admit(&beta, &config(2, 511)).expect("its id fits");
        let large = registry(MaxConnectedClusters::C511);
        assert!(matches!(
            large.admit(&beta, &config(2, 255)).unwrap_err(),
            Refusal::Incompatible(Incompatible::MeshSize { .. })
        ));
        large.admit(&beta, &config(300, 511)).unwrap();
    }
}
