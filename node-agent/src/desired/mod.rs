//! What the maps should hold, as a function of the mesh's state. Nothing is stored but who claims which frontend.

pub mod ipcache;
pub mod service;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use ipnet::IpNet;
use isthmus_bpf_abi::{IpcacheEntry, IpcacheKey, ServiceKey};

pub use self::service::{Frontend, Rules};
use crate::mesh::fact::ServiceName;
use crate::mesh::{Changes, Mesh};

/// What should hold about some keys from now on; `None` is nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Delta {
    /// Frontends.
    pub frontends: BTreeMap<ServiceKey, Option<Frontend>>,
    /// Addresses and prefixes.
    pub ipcache: BTreeMap<IpcacheKey, Option<IpcacheEntry>>,
}

impl Delta {
    /// Nothing to look at.
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.ipcache.is_empty()
    }
}

/// Who claims which frontend. While a service is exchanged for another with the same address, two may for a moment.
#[derive(Debug, Default)]
pub struct Frontends {
    claims: HashMap<ServiceName, BTreeSet<ServiceKey>>,
    claimants: HashMap<ServiceKey, BTreeSet<ServiceName>>,
}

impl Frontends {
    /// What should hold now about everything that `changes` touches.
    pub fn delta(&mut self, mesh: &Mesh, rules: Rules<'_>, changes: &Changes) -> Delta {
        Delta {
            frontends: self.services(mesh, rules, &changes.services),
            ipcache: changes.prefixes.iter().map(|prefix| ipcache_entry(mesh, *prefix)).collect(),
        }
    }

    /// What should hold about everything that is known. Grows with the world.
    pub fn everything(&mut self, mesh: &Mesh, rules: Rules<'_>) -> Delta {
        let mut services: HashSet<ServiceName> = mesh.local_services().cloned().collect();
        services.extend(self.claims.keys().cloned());
        Delta {
            frontends: self.services(mesh, rules, &services),
            ipcache: mesh.prefixes().map(|prefix| ipcache_entry(mesh, prefix)).collect(),
        }
    }

    /// The service whose frontend this is: of several claimants the first by name.
    pub fn owner(&self, key: &ServiceKey) -> Option<&ServiceName> {
        self.claimants.get(key)?.first()
    }

    /// What one frontend should hold.
    pub fn frontend(&self, mesh: &Mesh, rules: Rules<'_>, key: &ServiceKey) -> Option<Frontend> {
        let view = mesh.service(self.owner(key)?)?;
        service::frontends(&view, rules).remove(key)
    }

    fn services(
        &mut self,
        mesh: &Mesh,
        rules: Rules<'_>,
        names: &HashSet<ServiceName>,
    ) -> BTreeMap<ServiceKey, Option<Frontend>> {
        let mut delta = BTreeMap::new();
        let mut others = BTreeSet::new();
        for name in names {
            let mut now = match mesh.service(name) {
                Some(view) => service::frontends(&view, rules),
                None => BTreeMap::new(),
            };
            let keys: BTreeSet<_> = now.keys().copied().collect();
            let before = if keys.is_empty() {
                self.claims.remove(name)
            } else {
                self.claims.insert(name.clone(), keys.clone())
            }
            .unwrap_or_default();
            for key in keys.difference(&before) {
                self.claimants.entry(*key).or_default().insert(name.clone());
            }
            for key in before.difference(&keys) {
                if let Some(claimants) = self.claimants.get_mut(key) {
                    claimants.remove(name);
                    if claimants.is_empty() {
                        self.claimants.remove(key);
                    }
                }
            }
            for key in keys.union(&before) {
                match self.owner(key) {
                    None => {
                        delta.insert(*key, None);
                    }
                    Some(owner) if owner == name => {
                        delta.insert(*key, now.remove(key));
                    }
                    Some(_) => {
                        others.insert(*key);
                    }
                }
            }
        }
        for key in others {
            delta.insert(key, self.frontend(mesh, rules, &key));
        }
        delta
    }
}

fn ipcache_entry(mesh: &Mesh, prefix: IpNet) -> (IpcacheKey, Option<IpcacheEntry>) {
    (ipcache::key(prefix), mesh.resolve(prefix).map(ipcache::entry))
}
