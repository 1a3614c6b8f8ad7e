//! Which daemon a step means: the names that the lab has for them, read for kind.

use crate::error::LabError;
use crate::programs;
use crate::scenario::{GATEWAY, LEADER};
use crate::spec::ClusterSpec;

/// A daemon of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Daemon<'a> {
    /// `CLUSTER/clustermesh-apiserver`: every replica.
    Apiservers,
    /// `CLUSTER/clustermesh-apiserver-1`: one of several, counted from 0 in the order of their pods' names.
    Apiserver(usize),
    /// `CLUSTER/clustermesh-apiserver-5d9c7-x2x4z`: the one in this pod.
    ApiserverPod(&'a str),
    /// `CLUSTER/leader`: the clustermesh-apiserver that leads.
    Leader,
    /// `CLUSTER/NODE/gateway`: the clustermesh-apiserver that the agent of a node reads from.
    Gateway(Node),
    /// `CLUSTER/NODE/node-agent`.
    Agent(Node),
    /// `CLUSTER/NODE/isthmus-wireguard`.
    Wireguard(Node),
}

/// A node that takes pods, by its position in the scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node(pub(super) usize);

/// Reads a daemon's name.
///
/// # Errors
/// When there is no such cluster, node or daemon on kind; the message says which daemons there are.
pub(super) fn read<'a, 'c>(
    name: &'a str,
    clusters: impl IntoIterator<Item = &'c ClusterSpec>,
) -> Result<(&'c ClusterSpec, Daemon<'a>), LabError> {
    let unknown = || {
        LabError::invalid(format!(
            "on kind {name} is no daemon: there are CLUSTER/{apiserver} (-0, -1... behind it where there are several), \
             CLUSTER/{LEADER}, CLUSTER/NODE/{GATEWAY}, CLUSTER/NODE/{agent} and CLUSTER/NODE/{wireguard}",
            apiserver = programs::APISERVER,
            agent = programs::NODE_AGENT,
            wireguard = programs::WIREGUARD,
        ))
    };
    let mut parts = name.split('/');
    let cluster = parts.next().unwrap_or_default();
    let cluster = clusters.into_iter().find(|spec| spec.name == cluster).ok_or_else(unknown)?;
    let node = |node: &str| cluster.nodes.iter().position(|n| n == node).map(Node).ok_or_else(unknown);
    let daemon = match (parts.next(), parts.next(), parts.next()) {
        (Some(LEADER), None, None) => Daemon::Leader,
        (Some(programs::APISERVER), None, None) => Daemon::Apiservers,
        (Some(one), None, None) => apiserver(one, cluster).ok_or_else(unknown)?,
        (Some(on), Some(GATEWAY), None) => Daemon::Gateway(node(on)?),
        (Some(on), Some(programs::NODE_AGENT), None) => Daemon::Agent(node(on)?),
        (Some(on), Some(programs::WIREGUARD), None) => Daemon::Wireguard(node(on)?),
        _ => return Err(unknown()),
    };
    Ok((cluster, daemon))
}

fn apiserver<'a>(name: &'a str, cluster: &ClusterSpec) -> Option<Daemon<'a>> {
    let rest = name.strip_prefix(programs::APISERVER)?.strip_prefix('-')?;
    match rest.parse::<usize>() {
        Ok(replica) => (replica < cluster.replicas).then_some(Daemon::Apiserver(replica)),
        Err(_) => Some(Daemon::ApiserverPod(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_are_known_by_the_lab_s_names_and_others_are_refused_with_those_there_are() {
        let alpha = ClusterSpec {
            name: "alpha".into(),
            id: 1,
            nodes: vec!["alpha-node1".into(), "alpha-node2".into()],
            replicas: 3,
            peers: Vec::new(),
        };
        let of = |name| read(name, [&alpha]).map(|(_, daemon)| daemon);
        for (name, daemon) in [
            ("alpha/clustermesh-apiserver", Daemon::Apiservers),
            ("alpha/clustermesh-apiserver-2", Daemon::Apiserver(2)),
            (
                "alpha/clustermesh-apiserver-5d9c7-x2x4z",
                Daemon::ApiserverPod("clustermesh-apiserver-5d9c7-x2x4z"),
            ),
            ("alpha/leader", Daemon::Leader),
            ("alpha/alpha-node1/gateway", Daemon::Gateway(Node(0))),
            ("alpha/alpha-node2/node-agent", Daemon::Agent(Node(1))),
            ("alpha/alpha-node2/isthmus-wireguard", Daemon::Wireguard(Node(1))),
        ] {
            assert_eq!(of(name).unwrap(), daemon);
        }
        for name in [
            "alpha",
            "beta/leader",
            "alpha/etcd",
            "alpha/kubernetes",
            "alpha/clustermesh-apiserver-3",
            "alpha/alpha-node3/node-agent",
            "alpha/alpha-node1/node-agent/x",
        ] {
            let refused = of(name).unwrap_err().to_string();
            assert!(refused.contains(name) && refused.contains("CLUSTER/NODE/node-agent"), "{refused}");
        }
    }
}
