//! Which backends a service's frontends have: the rules of global services, as one pure function.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use isthmus_bpf_abi::{Protocol, ServiceKey};

use crate::mesh::ServiceView;
use crate::mesh::fact::{Affinity, Backend, Condition, LocalService, Port};

/// What the agent takes into its hands, and where it stands.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// Balance every service, not only the global ones.
    pub all_services: bool,
    /// Name of this node, for `internalTrafficPolicy: Local`.
    pub node: &'a str,
}

/// What should stand behind one frontend. No backends means: refuse connections.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Frontend {
    /// Backends and the id of the cluster they run in (0 is the own one).
    pub backends: BTreeMap<SocketAddr, u16>,
    /// `sessionAffinity: ClientIP` timeout in seconds; 0 is none.
    pub affinity_seconds: u32,
    /// The service prefers a side that has no active backend: these are what is left.
    pub fallback: bool,
}

/// The frontends of a service, each with its backends.
///
/// A service without an address (headless) has none. Neither has one that is left to kube-proxy.
pub fn frontends(service: &ServiceView<'_>, rules: Rules<'_>) -> BTreeMap<ServiceKey, Frontend> {
    let local = service.local;
    if !local.global && !rules.all_services {
        return BTreeMap::new();
    }
    let mut all: BTreeMap<ServiceKey, Frontend> = BTreeMap::new();
    for ip in &local.cluster_ips {
        for port in &local.ports {
            let candidates = candidates(service, port, ip.is_ipv4(), rules);
            let frontend = all.entry(ServiceKey::new(*ip, port.number, port.protocol)).or_default();
            frontend.affinity_seconds = local.session_affinity_seconds.unwrap_or(0);
            let (chosen, fallback) = choose(&candidates, local.affinity);
            frontend.backends.extend(chosen);
            frontend.fallback = fallback;
        }
    }
    all
}

/// Health of a backend as the rules see it, and where it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Candidate {
    condition: Condition,
    cluster: u16,
}

/// Every backend that serves the port. Of two statements about one address the own cluster's stands, then that of the
/// lowest cluster id.
fn candidates(
    service: &ServiceView<'_>,
    port: &Port,
    ipv4: bool,
    rules: Rules<'_>,
) -> BTreeMap<SocketAddr, Candidate> {
    let local = service.local;
    let mut all = BTreeMap::new();
    let mut add = |backend: &Backend, condition: Condition, cluster: u16| {
        if backend.addr.is_ipv4() != ipv4 {
            return;
        }
        for target in backend.ports.iter().filter(|target| port.is_served_by(target)) {
            all.entry(SocketAddr::new(backend.addr, target.number))
                .or_insert(Candidate { condition, cluster });
        }
    };
    for backend in &local.backends {
        if !local.node_local || backend.node.as_deref() == Some(rules.node) {
            add(backend, backend.condition, 0);
        }
    }
    if !local.node_local {
        for remote in &service.remotes {
            for backend in remote.backends.iter().filter(|backend| may_be_remote(backend.addr)) {
                // As good as terminating: what is open goes on, and nothing new comes while there are others.
                let condition = if remote.draining { Condition::Terminating } else { backend.condition };
                add(backend, condition, remote.cluster_id);
            }
        }
    }
    all
}

/// Affinity first, then: terminating backends only where no active one is left. Says also whether the preferred side
/// had no active one.
fn choose(
    candidates: &BTreeMap<SocketAddr, Candidate>,
    affinity: Affinity,
) -> (BTreeMap<SocketAddr, u16>, bool) {
    let any = |test: &dyn Fn(&Candidate) -> bool| candidates.values().any(test);
    let active = |candidate: &Candidate| candidate.condition == Condition::Active;
    let remote = |candidate: &Candidate| candidate.cluster != 0;

    let (use_local, use_remote) = match affinity {
        Affinity::None => (true, true),
        Affinity::Local => (true, !any(&|candidate| active(candidate) && !remote(candidate))),
        Affinity::Remote => (!any(&|candidate| active(candidate) && remote(candidate)), true),
    };
    let allowed = |candidate: &Candidate| if remote(candidate) { use_remote } else { use_local };
    let any_active = any(&|candidate| allowed(candidate) && active(candidate));
    let chosen = candidates
        .iter()
        .filter(|(_, candidate)| allowed(candidate) && (!any_active || active(candidate)))
        .map(|(addr, candidate)| (*addr, candidate.cluster))
        .collect();
    (chosen, affinity != Affinity::None && use_local && use_remote)
}

/// Whether a peer may name this address as a backend. What only this machine or this link can mean is no pod of a
/// peer, and would let a peer point the pods of this cluster at services that trust the local machine.
fn may_be_remote(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            !(ip.is_loopback()
                || ip.is_link_local()
                || ip.is_multicast()
                || ip.is_broadcast()
                || ip.is_unspecified()
                || ip.octets()[0] == 0)
        }
        IpAddr::V6(ip) => {
            !(ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_multicast()
                || is_link_local_v6(ip)
                || ip.to_ipv4_mapped().is_some())
        }
    }
}

fn is_link_local_v6(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
}

/// All frontends that a service could have: what it claims of the cluster's addresses.
pub fn keys(service: &LocalService) -> impl Iterator<Item = ServiceKey> + '_ {
    service.cluster_ips.iter().flat_map(|ip| {
        service.ports.iter().map(|port: &Port| ServiceKey::new(*ip, port.number, port.protocol))
    })
}

/// The protocol of a frontend. Keys are only ever made from one.
pub fn protocol(key: &ServiceKey) -> Protocol {
    Protocol::from_number(key.protocol).unwrap_or(Protocol::Tcp)
}
