//! Taking in events: where each fact is kept, what it may change, and whether it counts.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::cluster::Cluster;
use super::event::MeshEvent;
use super::fact::{ClusterConfig, Endpoint, Fact, Node, Provenance, RemoteSlice, ServiceName};
use super::prefix::{Claim, Claimant, Kind};
use super::refusal::Refusal;
use super::{Changes, Mesh, NodeId, OWN, RemoteFacts, ServiceFacts, ranges, reserved};

impl Mesh {
    /// Takes in one event and adds to `changes` what it may have changed.
    ///
    /// # Errors
    /// Why the fact does not count. It is kept all the same, and counts once the reason is gone.
    pub fn apply(&mut self, event: MeshEvent, at: Provenance, changes: &mut Changes) -> Result<(), Refusal> {
        match event {
            MeshEvent::Cluster { cluster, config } => {
                if cluster == self.own.cluster {
                    return Ok(());
                }
                let number = self.number(&cluster, at);
                self.cluster_described(number, &cluster, Fact { value: config, provenance: at }, changes)
            }
            MeshEvent::ClusterRemoved { cluster } => {
                self.cluster_removed(&cluster, changes);
                Ok(())
            }
            MeshEvent::Node { cluster, name, node } => {
                let number = self.number(&cluster, at);
                self.node_stated(number, &cluster, name, node, at, changes)
            }
            MeshEvent::Endpoint { cluster, prefix, endpoint } => {
                let number = self.number(&cluster, at);
                self.endpoint(number, &cluster, prefix.trunc(), endpoint, at, changes)
            }
            MeshEvent::Identity { cluster, id, labels } => {
                let number = self.number(&cluster, at);
                changes.identities.insert(id);
                self.set_identity(number, cluster, id, labels)
            }
            MeshEvent::RemoteService { cluster, name, service } => {
                let number = self.number(&cluster, at);
                changes.services.insert(name.clone());
                let stated = service.as_ref().map(|service| service.cluster_id);
                let what = || format!("service {name}");
                let verdict = stated.map_or(Ok(()), |stated| self.check_id(number, &cluster, stated, what));
                let fact = service.map(|value| Fact { value, provenance: at });
                self.change_remote(number, name, |remote| remote.service = fact);
                verdict
            }
            MeshEvent::RemoteSlice { cluster, name, slice } => {
                let number = self.number(&cluster, at);
                let stated = slice.as_ref().map(|slice| slice.cluster_id);
                let what = || format!("endpoint slice {name}");
                let verdict = stated.map_or(Ok(()), |stated| self.check_id(number, &cluster, stated, what));
                self.slice(number, name, slice.map(|value| Fact { value, provenance: at }), changes);
                verdict
            }
            MeshEvent::LocalService { name, service } => {
                self.number(&self.own.cluster.clone(), at);
                changes.services.insert(name.clone());
                let fact = service.map(|value| Fact { value, provenance: at });
                if fact.is_some() {
                    self.clusters[usize::from(OWN)].services.insert(name.clone());
                } else {
                    self.clusters[usize::from(OWN)].services.remove(&name);
                }
                self.change_service(name, |facts| facts.local = fact);
                Ok(())
            }
            // Not of the mesh: `crate::policy` takes them in.
            MeshEvent::Policy { .. }
            | MeshEvent::Namespace { .. }
            | MeshEvent::HostAddresses { .. }
            | MeshEvent::LocalEndpoint { .. } => Ok(()),
            MeshEvent::Synced { cluster, resource } => {
                let number = self.number(&cluster, at);
                changes.synced |= self.clusters[usize::from(number)].synced.insert(resource);
                Ok(())
            }
        }
    }

    fn number(&mut self, cluster: &Arc<str>, at: Provenance) -> u16 {
        let number = match self.numbers.get(cluster) {
            Some(number) => *number,
            None => {
                // Names of peers come from the own gateway, which knows at most 511 of them at a time; numbers of
                // removed ones are kept for when they come back.
                let number = u16::try_from(self.clusters.len()).unwrap_or(u16::MAX);
                self.clusters.push(Cluster::default());
                self.numbers.insert(cluster.clone(), number);
                number
            }
        };
        self.clusters[usize::from(number)].latest = Some(at);
        number
    }

    fn cluster_described(
        &mut self,
        number: u16,
        name: &Arc<str>,
        config: Fact<ClusterConfig>,
        changes: &mut Changes,
    ) -> Result<(), Refusal> {
        let cluster = &mut self.clusters[usize::from(number)];
        let id = config.value.id;
        let before = (cluster.id, cluster.slices_only());
        let drained = cluster.draining();
        cluster.config = Some(config);
        if cluster.id != Some(id)
            && let Some(old) = cluster.id.take()
        {
            self.ids.release(old, name);
        }
        let held = self.ids.take(id, name);
        cluster.id = held.then_some(id);
        if before != (cluster.id, cluster.slices_only()) {
            self.everything_of(number, changes);
            // The id that was let go may be the one that another cluster waits for.
            self.settle_waiting(changes);
            changes.synced = true;
        } else if drained != self.clusters[usize::from(number)].draining() {
            changes.services.extend(self.clusters[usize::from(number)].services.iter().cloned());
        }
        if held {
            return Ok(());
        }
        let holder = self.ids.holder(id).cloned().unwrap_or_else(|| Arc::from(""));
        Err(Refusal::IdTaken { cluster: name.clone(), id, holder })
    }

    /// Gives ids that have come free to the clusters that claim them, by name.
    fn settle_waiting(&mut self, changes: &mut Changes) {
        let mut waiting: Vec<_> = self
            .numbers
            .iter()
            .filter_map(|(name, number)| {
                let cluster = &self.clusters[usize::from(*number)];
                let id = cluster.config.as_ref()?.value.id;
                cluster.id.is_none().then(|| (name.clone(), *number, id))
            })
            .collect();
        waiting.sort();
        for (name, number, id) in waiting {
            if self.ids.take(id, &name) {
                self.clusters[usize::from(number)].id = Some(id);
                self.everything_of(number, changes);
            }
        }
    }

    fn cluster_removed(&mut self, name: &Arc<str>, changes: &mut Changes) {
        let Some(&number) = self.numbers.get(name) else { return };
        if number == OWN {
            return;
        }
        self.everything_of(number, changes);
        let cluster = std::mem::take(&mut self.clusters[usize::from(number)]);
        for service in cluster.services {
            self.change_service(service, |facts| {
                facts.remote.remove(&number);
            });
        }
        let gone: Vec<_> = self
            .prefixes
            .all()
            .filter(|(_, by, _)| by.cluster == number)
            .map(|(prefix, by, _)| (prefix, by.clone()))
            .collect();
        for (prefix, by) in gone {
            self.named_ports.state(number, prefix, None, |id| {
                changes.identities.insert(id);
            });
            self.prefixes.remove(prefix, by);
        }
        for (name, node) in &cluster.nodes {
            self.ranges.exchange(number, Some(stated(&node.value)), None);
            self.exchange_hosts(number, name, Some(&node.value), None);
        }
        if let Some(id) = cluster.id {
            self.ids.release(id, name);
            self.settle_waiting(changes);
        }
        changes.synced = true;
    }

    /// Marks everything that a cluster has said as changed. Looks through the world, but only when there is something.
    fn everything_of(&self, number: u16, changes: &mut Changes) {
        let cluster = &self.clusters[usize::from(number)];
        changes.services.extend(cluster.services.iter().cloned());
        changes.identities.extend(cluster.identities.keys());
        if cluster.endpoints + cluster.nodes.len() > 0 {
            let of_cluster = self.prefixes.all().filter(|(_, by, _)| by.cluster == number);
            changes.prefixes.extend(of_cluster.map(|(prefix, ..)| prefix));
        }
        for (name, node) in &cluster.nodes {
            changes.nodes.insert(NodeId { cluster: number, name: name.clone() });
            for range in stated(&node.value).1 {
                changes.prefixes.extend(self.prefixes.within(range));
            }
        }
    }

    fn node_stated(
        &mut self,
        number: u16,
        cluster: &Arc<str>,
        name: Arc<str>,
        node: Option<Node>,
        at: Provenance,
        changes: &mut Changes,
    ) -> Result<(), Refusal> {
        let own_node = number == OWN && name == self.own.node;
        let verdict = node.as_ref().map_or(Ok(()), |node| {
            self.check_id(number, cluster, node.cluster_id, || format!("node {name}"))
        });
        let nodes = &mut self.clusters[usize::from(number)].nodes;
        let old = match &node {
            Some(node) => nodes.insert(name.clone(), Fact { value: node.clone(), provenance: at }),
            None => nodes.remove(&name),
        };
        let claimant = |kind| Claimant { cluster: number, kind, node: name.clone() };
        for (prefix, kind, _) in old.iter().flat_map(|old| node_claims(&old.value, old.provenance)) {
            changes.prefixes.insert(prefix);
            self.prefixes.remove(prefix, claimant(kind));
        }
        for (prefix, kind, claim) in node.iter().flat_map(|node| node_claims(node, at)) {
            changes.prefixes.insert(prefix);
            self.prefixes.put(prefix, claimant(kind), claim);
        }
        changes.nodes.insert(NodeId { cluster: number, name: name.clone() });
        let old = old.as_ref().map(|old| &old.value);
        self.exchange_hosts(number, &name, old, node.as_ref());
        for range in self.ranges.exchange(number, old.map(stated), node.as_ref().map(stated)) {
            changes.prefixes.extend(self.prefixes.within(range));
        }
        if own_node {
            let counts = node.as_ref().filter(|node| node.cluster_id == self.own.id);
            let addresses: BTreeSet<_> = counts.into_iter().flat_map(Node::ips).collect();
            if self.own_addresses != addresses {
                self.own_addresses = addresses;
                self.everything_of(OWN, changes);
            }
        }
        verdict.and_then(|()| match node {
            Some(node) => self.check_ranges(number, cluster, &name, &node),
            None => Ok(()),
        })
    }

    fn exchange_hosts(&mut self, number: u16, name: &Arc<str>, old: Option<&Node>, new: Option<&Node>) {
        for ip in old.into_iter().flat_map(Node::ips) {
            if let Some(names) = self.hosts.get_mut(&(number, ip)) {
                names.remove(name);
                if names.is_empty() {
                    self.hosts.remove(&(number, ip));
                }
            }
        }
        for ip in new.into_iter().flat_map(Node::ips) {
            self.hosts.entry((number, ip)).or_default().insert(name.clone());
        }
    }

    fn endpoint(
        &mut self,
        number: u16,
        cluster: &Arc<str>,
        prefix: IpNet,
        endpoint: Option<Endpoint>,
        at: Provenance,
        changes: &mut Changes,
    ) -> Result<(), Refusal> {
        changes.prefixes.insert(prefix);
        let by = Claimant { cluster: number, kind: Kind::Endpoint, node: Arc::from("") };
        let ports = endpoint.as_ref().and_then(|it| Some((it.identity, it.named_ports.clone()?)));
        self.named_ports.state(number, prefix, ports, |id| {
            changes.identities.insert(id);
        });
        let Some(endpoint) = endpoint else {
            if self.prefixes.remove(prefix, by).is_some() {
                self.clusters[usize::from(number)].endpoints -= 1;
            }
            return Ok(());
        };
        let claim = Claim {
            identity: endpoint.identity,
            host: endpoint.host,
            encryption_key: endpoint.encryption_key,
            cluster_id: 0,
            provenance: at,
        };
        if self.prefixes.put(prefix, by, claim).is_none() {
            self.clusters[usize::from(number)].endpoints += 1;
        }
        self.check_holder(number, cluster, prefix, || format!("address {prefix}"))?;
        self.check_identity(number, cluster, endpoint.identity, || format!("address {prefix}"))
    }

    fn set_identity(
        &mut self,
        number: u16,
        cluster: Arc<str>,
        id: u32,
        labels: Option<Arc<str>>,
    ) -> Result<(), Refusal> {
        let identities = &mut self.clusters[usize::from(number)].identities;
        let Some(labels) = labels else {
            identities.remove(&id);
            return Ok(());
        };
        identities.insert(id, labels);
        self.check_identity(number, &cluster, id, || format!("identity {id}"))
    }

    fn slice(
        &mut self,
        number: u16,
        name: ServiceName,
        slice: Option<Fact<RemoteSlice>>,
        changes: &mut Changes,
    ) {
        let slices = &mut self.clusters[usize::from(number)].slices;
        let old = match &slice {
            Some(slice) => slices.insert(name.clone(), slice.value.service.clone()),
            None => slices.remove(&name),
        };
        if let Some(old) = old {
            changes.services.insert(old.clone());
            self.change_remote(number, old, |remote| {
                remote.slices.remove(&name);
            });
        }
        if let Some(slice) = slice {
            let service = slice.value.service.clone();
            changes.services.insert(service.clone());
            self.change_remote(number, service, |remote| {
                remote.slices.insert(name, slice);
            });
        }
    }

    fn change_remote(&mut self, number: u16, name: ServiceName, change: impl FnOnce(&mut RemoteFacts)) {
        let facts = self.services.entry(name.clone()).or_default();
        let remote = facts.remote.entry(number).or_default();
        change(remote);
        let empty = remote.service.is_none() && remote.slices.is_empty();
        if empty {
            facts.remote.remove(&number);
            self.clusters[usize::from(number)].services.remove(&name);
        } else {
            self.clusters[usize::from(number)].services.insert(name.clone());
        }
        if facts.local.is_none() && facts.remote.is_empty() {
            self.services.remove(&name);
        }
    }

    fn change_service(&mut self, name: ServiceName, change: impl FnOnce(&mut ServiceFacts)) {
        let facts = self.services.entry(name.clone()).or_default();
        change(facts);
        if facts.local.is_none() && facts.remote.is_empty() {
            self.services.remove(&name);
        }
    }

    /// The first of a node's addresses and ranges that is another cluster's.
    fn check_ranges(
        &self,
        number: u16,
        cluster: &Arc<str>,
        name: &Arc<str>,
        node: &Node,
    ) -> Result<(), Refusal> {
        for range in stated(node).1 {
            self.check_holder(number, cluster, range, || format!("{range} of node {name}"))?;
        }
        Ok(())
    }

    fn check_holder(
        &self,
        number: u16,
        cluster: &Arc<str>,
        prefix: IpNet,
        what: impl FnOnce() -> String,
    ) -> Result<(), Refusal> {
        if number == OWN {
            return Ok(());
        }
        let Some(holder) = self.holder(prefix).filter(|holder| *holder != number) else { return Ok(()) };
        let holder = self.clusters[usize::from(holder)].id.and_then(|id| self.cluster_name(id));
        Err(Refusal::ForeignPrefix {
            cluster: cluster.clone(),
            what: what(),
            holder: holder.cloned().unwrap_or_else(|| Arc::from("")),
        })
    }

    fn check_id(
        &self,
        number: u16,
        cluster: &Arc<str>,
        stated: u16,
        what: impl FnOnce() -> String,
    ) -> Result<(), Refusal> {
        match self.clusters[usize::from(number)].id {
            Some(id) if id != stated => {
                Err(Refusal::WrongClusterId { cluster: cluster.clone(), what: what(), stated, id })
            }
            _ => Ok(()),
        }
    }

    fn check_identity(
        &self,
        number: u16,
        cluster: &Arc<str>,
        identity: u32,
        what: impl FnOnce() -> String,
    ) -> Result<(), Refusal> {
        match self.clusters[usize::from(number)].id {
            Some(id) if !self.owns_identity(id, identity) => {
                Err(Refusal::ForeignIdentity { cluster: cluster.clone(), what: what(), identity })
            }
            _ => Ok(()),
        }
    }
}

/// The ranges that a node states, and the cluster id under which.
fn stated(node: &Node) -> (u16, Vec<IpNet>) {
    (node.cluster_id, ranges::of_node(&node.pod_cidrs, node.ips()))
}

/// What a node says about prefixes.
fn node_claims(node: &Node, at: Provenance) -> impl Iterator<Item = (IpNet, Kind, Claim)> + '_ {
    let claim = move |identity, host, encryption_key| Claim {
        identity,
        host,
        encryption_key,
        cluster_id: node.cluster_id,
        provenance: at,
    };
    let endpoint = |ip: IpAddr| node.tunnel_endpoint(ip.is_ipv4());
    let addresses = node.addresses.iter().map(move |address| {
        (IpNet::from(address.ip), Kind::NodeAddress, claim(reserved::REMOTE_NODE, None, 0))
    });
    let key = node.encryption_key;
    let health = node
        .health
        .iter()
        .map(move |ip| (IpNet::from(*ip), Kind::Health, claim(reserved::HEALTH, endpoint(*ip), key)));
    let ingress = node
        .ingress
        .iter()
        .map(move |ip| (IpNet::from(*ip), Kind::Ingress, claim(reserved::INGRESS, endpoint(*ip), key)));
    let ranges = node.pod_cidrs.iter().map(move |range| {
        (range.trunc(), Kind::PodCidr, claim(reserved::WORLD, endpoint(range.addr()), key))
    });
    addresses.chain(health).chain(ingress).chain(ranges)
}
