//! What the reconciler knows, for those who explain.

use std::net::IpAddr;
use std::sync::Arc;

use isthmus_policy::{Engine, RuleOrigin};
use isthmus_wire::Labels;

use super::{Knowledge, LocalPod};
use crate::events::{Directory, PodName};
use crate::mesh::reserved;
use crate::reconcile::Reconciler;

/// The reconciler, looked at by those who explain.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    reconciler: &'a Reconciler,
}

impl<'a> Known<'a> {
    /// What this reconciler knows.
    pub fn new(reconciler: &'a Reconciler) -> Self {
        Self { reconciler }
    }
}

impl Directory for Known<'_> {
    fn labels(&self, identity: u32) -> Option<Arc<Labels>> {
        reserved_labels(identity)
    }

    fn cluster(&self, identity: u32) -> Option<Arc<str>> {
        let mesh = self.reconciler.mesh();
        let id = u16::try_from(identity >> mesh.own().identity_shift).ok().filter(|id| *id != 0)?;
        mesh.cluster_name(if id == mesh.own().id { 0 } else { id }).cloned()
    }

    fn pod(&self, _address: IpAddr) -> Option<PodName> {
        None
    }

    fn rule(&self, _rule: u32) -> Option<RuleOrigin> {
        None
    }
}

impl Knowledge for Known<'_> {
    fn own_cluster(&self) -> &str {
        &self.reconciler.mesh().own().cluster
    }

    fn engine(&self) -> Option<&Engine> {
        None
    }

    fn local_pods(&self) -> Vec<LocalPod> {
        Vec::new()
    }

    fn identity_at(&self, _address: IpAddr) -> u32 {
        reserved::WORLD
    }

    fn identity_with(&self, _labels: &[(String, String)]) -> Option<u32> {
        None
    }
}

/// Labels of identities that are the same in every cluster. A node with the Kubernetes API is a node all the same.
fn reserved_labels(identity: u32) -> Option<Arc<Labels>> {
    let names: &[&str] = match identity {
        1 => &["host"],
        2 => &["world"],
        3 => &["unmanaged"],
        4 => &["health"],
        5 => &["init"],
        6 => &["remote-node"],
        7 => &["kube-apiserver", "remote-node"],
        8 => &["ingress"],
        9 => &["world-ipv4"],
        10 => &["world-ipv6"],
        _ => return None,
    };
    let mut labels = Labels::new();
    names.iter().try_for_each(|name| labels.insert("reserved", name, "")).ok()?;
    Some(Arc::new(labels))
}
