//! Whether a peer may take part: its cluster configuration against the own one and those of the other peers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use isthmus_wire::{ClusterConfig, ClusterId, ClusterName, InvalidClusterId, MaxConnectedClusters, ValueError};

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
pub enum Refusal {
    /// Its configuration cannot be read.
    #[error("its cluster configuration cannot be used: {0}")]
    Malformed(#[from] ValueError),
    /// Its id does not fit this mesh.
    #[error("{0}; give the peer an id in range, or set --max-connected-clusters to 511 in every cluster")]
    Id(#[from] InvalidClusterId),
    /// It has the id of this cluster.
    #[error("it has this cluster's own id, {0}; give one of the two another")]
    OwnId(u16),
    /// Another peer has that id already.
    #[error("its id, {id}, is that of peer {other} already; give one of the two another")]
    IdTaken {
        /// The id.
        id: u16,
        /// The peer that has it.
        other: ClusterName,
    },
    /// The two meshes split identities differently.
    #[error("its mesh is set up for {peer} clusters and this one for {own}; set --max-connected-clusters alike in all")]
    MeshSize {
        /// What the peer's is.
        peer: MaxConnectedClusters,
        /// What the own one is.
        own: MaxConnectedClusters,
    },
}

/// Which cluster ids are taken, and by whom. Shared between the peers' tasks.
#[derive(Clone, Debug)]
pub struct Registry {
    own: OwnCluster,
    taken: Arc<Mutex<BTreeMap<ClusterId, ClusterName>>>,
}

/// A cluster id that no other peer can have while this exists.
#[derive(Debug)]
pub struct Reservation {
    id: ClusterId,
    taken: Arc<Mutex<BTreeMap<ClusterId, ClusterName>>>,
}

impl Registry {
    /// One in which only the own id is taken.
    pub fn new(own: OwnCluster) -> Self {
        Self { own, taken: Arc::default() }
    }

    /// The own cluster.
    pub fn own(&self) -> &OwnCluster {
        &self.own
    }

    /// Checks `config` of `peer` against the own cluster, and takes its id.
    ///
    /// # Errors
    /// A [`Refusal`] that says what to change.
    pub fn admit(&self, peer: &ClusterName, config: &ClusterConfig) -> Result<Reservation, Refusal> {
        self.own.mesh.admit(config.id)?;
        // A mesh of 255 takes peers of a larger one whose ids fit, as Cilium does; the reverse would misread identities.
        let size = config.capabilities.mesh_size();
        if self.own.mesh == MaxConnectedClusters::C511 && size != self.own.mesh {
            return Err(Refusal::MeshSize { peer: size, own: self.own.mesh });
        }
        if config.id == self.own.id {
            return Err(Refusal::OwnId(config.id.number()));
        }
        let mut taken = lock(&self.taken);
        match taken.get(&config.id) {
            Some(other) => Err(Refusal::IdTaken { id: config.id.number(), other: other.clone() }),
            None => {
                taken.insert(config.id, peer.clone());
                Ok(Reservation { id: config.id, taken: Arc::clone(&self.taken) })
            }
        }
    }
}

impl Reservation {
    /// The id.
    pub fn id(&self) -> ClusterId {
        self.id
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.taken).remove(&self.id);
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
        Registry::new(OwnCluster { name: "alpha".parse().unwrap(), id: ClusterId::try_from(1).unwrap(), mesh })
    }

    fn config(id: u32, mesh: u32) -> ClusterConfig {
        let text = format!(r#"{{"id":{id},"capabilities":{{"syncedCanaries":true,"maxConnectedClusters":{mesh}}}}}"#);
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
        let small = registry(MaxConnectedClusters::C255);
        assert_eq!(small.admit(&beta, &config(1, 255)).unwrap_err(), Refusal::OwnId(1));
        assert!(matches!(small.admit(&beta, &config(300, 511)).unwrap_err(), Refusal::Id(_)));
        small.admit(&beta, &config(2, 511)).expect("its id fits");
        let large = registry(MaxConnectedClusters::C511);
        assert!(matches!(large.admit(&beta, &config(2, 255)).unwrap_err(), Refusal::MeshSize { .. }));
        large.admit(&beta, &config(300, 511)).unwrap();
    }
}
