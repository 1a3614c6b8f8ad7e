//! How the pods of an identity call their ports, which is what egress rules mean by a port's name.

use std::collections::HashMap;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_policy::NamedPorts;

/// What is stated, by address and by identity. A cluster's statements are kept apart from the others': it names the ports of
/// its own identities alone.
#[derive(Debug, Default)]
pub(super) struct NamedPortTable {
    by_address: HashMap<(u16, IpNet), (u32, Arc<NamedPorts>)>,
    /// How many addresses of an identity have the same ports. Nearly always all of them have.
    by_identity: HashMap<(u16, u32), HashMap<Arc<NamedPorts>, usize>>,
}

impl NamedPortTable {
    /// What a cluster, by number, states of an address now. Calls `changed` with the identities whose ports are others now.
    pub(super) fn state(
        &mut self,
        cluster: u16,
        prefix: IpNet,
        stated: Option<(u32, Arc<NamedPorts>)>,
        mut changed: impl FnMut(u32),
    ) {
        if self.by_address.get(&(cluster, prefix)) == stated.as_ref() {
            return;
        }
        if let Some((identity, ports)) = self.by_address.remove(&(cluster, prefix))
            && let Some(sets) = self.by_identity.get_mut(&(cluster, identity))
        {
            if let Some(users) = sets.get_mut(&ports) {
                *users -= 1;
                if *users == 0 {
                    sets.remove(&ports);
                    changed(identity);
                }
            }
            if sets.is_empty() {
                self.by_identity.remove(&(cluster, identity));
            }
        }
        if let Some((identity, ports)) = stated {
            let sets = self.by_identity.entry((cluster, identity)).or_default();
            // One copy for all pods that are alike.
            let ports = sets.get_key_value(&ports).map_or(ports, |(known, _)| Arc::clone(known));
            let users = sets.entry(Arc::clone(&ports)).or_default();
            *users += 1;
            if *users == 1 {
                changed(identity);
            }
            self.by_address.insert((cluster, prefix), (identity, ports));
        }
    }

    /// The ports of an identity, as that cluster states them.
    pub(super) fn of(&self, cluster: u16, identity: u32) -> NamedPorts {
        let mut all = NamedPorts::new();
        for port in
            self.by_identity.get(&(cluster, identity)).into_iter().flatten().flat_map(|(set, _)| set.iter())
        {
            all.insert(&port.name, port.protocol, port.port);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use isthmus_policy::model::Transport;

    use super::*;

    fn http(port: u16) -> Arc<NamedPorts> {
        let mut ports = NamedPorts::new();
        ports.insert("http", Transport::Tcp, port);
        Arc::new(ports)
    }

    #[test]
    fn an_identity_has_the_ports_of_all_its_pods_until_the_last_of_them_goes() {
        let mut table = NamedPortTable::default();
        let net = |last: u8| IpNet::from(std::net::IpAddr::from([10, 0, 0, last]));
        let state = |table: &mut NamedPortTable, cluster, last, stated| {
            let mut changed = BTreeSet::new();
            table.state(cluster, net(last), stated, |id| {
                changed.insert(id);
            });
            changed
        };
        let numbers = |table: &NamedPortTable, cluster| -> Vec<u16> {
            table.of(cluster, 7).iter().map(|port| port.port).collect()
        };
        assert_eq!(state(&mut table, 0, 1, Some((7, http(80)))), BTreeSet::from([7]));
        assert!(state(&mut table, 0, 2, Some((7, http(80)))).is_empty(), "as the first one");
        assert_eq!(state(&mut table, 0, 3, Some((7, http(8080)))), BTreeSet::from([7]));
        assert_eq!(state(&mut table, 1, 1, Some((7, http(22)))), BTreeSet::from([7]));
        assert_eq!((numbers(&table, 0), numbers(&table, 1)), (vec![80, 8080], vec![22]));
        assert!(state(&mut table, 0, 1, None).is_empty());
        assert_eq!(state(&mut table, 0, 2, Some((8, http(80)))), BTreeSet::from([7, 8]));
        assert_eq!(numbers(&table, 0), [8080]);
        for (cluster, last) in [(0, 2), (0, 3), (1, 1)] {
            state(&mut table, cluster, last, None);
        }
        assert!(table.by_address.is_empty() && table.by_identity.is_empty());
    }
}
