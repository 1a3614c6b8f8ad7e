//! What the reconciler knows, for those who explain.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_policy::{Engine, NamedPorts, PolicyName, RuleId, RuleOrigin};
use isthmus_wire::{Labels, NumericIdentity};

use super::{Behind, Knowledge, LocalPod, has_all};
use crate::datapath::Enforcement;
use crate::desired::ipcache;
use crate::events::{Directory, PodName};
use crate::mesh::reserved;
use crate::pods::ClosedPod;
use crate::policy::Standing;
use crate::reconcile::Reconciler;

/// The reconciler, looked at by those who explain.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    reconciler: &'a Reconciler,
    closed: &'a [ClosedPod],
}

impl<'a> Known<'a> {
    /// What this reconciler knows.
    pub fn new(reconciler: &'a Reconciler) -> Self {
        Self { reconciler, closed: &[] }
    }

    /// And of pods that it has not been told of, since there is no room for them.
    pub fn beside(self, closed: &'a [ClosedPod]) -> Self {
        Self { closed, ..self }
    }
}

impl Directory for Known<'_> {
    fn labels(&self, identity: u32) -> Option<Arc<Labels>> {
        self.engine_itself().labels(NumericIdentity(identity)).cloned()
    }

    fn cluster(&self, identity: u32) -> Option<Arc<str>> {
        let mesh = self.reconciler.mesh();
        let id = u16::try_from(identity >> mesh.own().identity_shift).ok().filter(|id| *id != 0)?;
        mesh.cluster_name(if id == mesh.own().id { 0 } else { id }).cloned()
    }

    fn pod(&self, address: IpAddr) -> Option<PodName> {
        let (_, endpoint) = self.reconciler.policies().endpoint_at(address)?;
        pod_name(&endpoint.pod)
    }

    fn rule(&self, rule: u32) -> Option<RuleOrigin> {
        self.engine_itself().origin(RuleId(rule)).cloned()
    }
}

impl Knowledge for Known<'_> {
    fn own_cluster(&self) -> &str {
        &self.reconciler.mesh().own().cluster
    }

    fn engine(&self) -> &Engine {
        self.engine_itself()
    }

    fn has_problems(&self, policy: &PolicyName) -> bool {
        self.reconciler.policies().has_problems(policy)
    }

    fn local_pods(&self) -> Vec<LocalPod> {
        let policies = self.reconciler.policies();
        let closed = self.closed.iter().filter_map(|closed| {
            let PodName { namespace, name } = pod_name(&closed.pod)?;
            Some(LocalPod {
                id: None,
                namespace,
                name,
                identity: closed.addresses.first().map_or(0, |address| self.identity_at(*address)),
                addresses: closed.addresses.clone(),
                named_ports: NamedPorts::new(),
                standing: Standing::Closed {
                    directions: Enforcement { ingress: true, egress: true },
                    reason: closed.reason.clone(),
                },
            })
        });
        let told = policies.local_endpoints().filter_map(|(id, endpoint)| {
            let PodName { namespace, name } = pod_name(&endpoint.pod)?;
            let identity = endpoint.addresses.iter().find_map(|address| {
                let resolved = self.reconciler.mesh().resolve(IpNet::from(*address))?;
                (resolved.cluster == 0).then_some(resolved.identity)
            });
            Some(LocalPod {
                id: Some(id),
                namespace,
                name,
                addresses: endpoint.addresses.clone(),
                identity: identity.unwrap_or(0),
                named_ports: endpoint.subject.named_ports.clone(),
                standing: policies.standing(id),
            })
        });
        closed.chain(told).collect()
    }

    fn identity_at(&self, address: IpAddr) -> u32 {
        let widest = IpNet::from(address).max_prefix_len();
        (0..=widest)
            .rev()
            .filter_map(|len| IpNet::new(address, len).ok())
            .find_map(|prefix| {
                ipcache::wanted(self.reconciler.mesh(), self.reconciler.policies(), prefix.trunc())
            })
            .map_or(reserved::WORLD, |entry| entry.identity)
    }

    fn service_at(&self, address: IpAddr) -> Option<Behind> {
        let mesh = self.reconciler.mesh();
        mesh.local_services().find_map(|name| {
            let view = mesh.service(name)?;
            view.local.cluster_ips.contains(&address).then(|| {
                let remote = view.remotes.iter().flat_map(|remote| remote.backends.iter().copied());
                let mut backends: Vec<_> =
                    view.local.backends.iter().chain(remote).map(|backend| backend.addr).collect();
                backends.sort_unstable();
                Behind { service: name.to_string(), backends }
            })
        })
    }

    fn identity_with(&self, wanted: &[(String, String)]) -> Option<u32> {
        let all = self.engine_itself().identities();
        all.filter(|(_, labels)| has_all(labels, wanted)).map(|(id, _)| id.0).min()
    }
}

impl<'a> Known<'a> {
    fn engine_itself(&self) -> &'a Engine {
        self.reconciler.policies().engine()
    }
}

fn pod_name(pod: &str) -> Option<PodName> {
    let (namespace, name) = pod.split_once('/')?;
    Some(PodName { namespace: namespace.into(), name: name.into() })
}
