//! Names and addresses of everything in a lab. All of it lives in namespaces, so every lab has the same addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::error::LabError;

/// Where labs keep their state.
pub const STATE_ROOT: &str = "/run/isthmus/lab";

/// A lab's name: 1 to 20 of `[a-z0-9-]`, alphanumeric at both ends. It prefixes all that the lab makes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Kubeconfigs, certificates, logs, sockets: `/run/isthmus/lab/<name>`.
    pub fn state_dir(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.0)
    }

    /// What every network namespace of this lab begins with. The dot cannot be part of a lab's name, so one
    /// lab's prefix never begins another's.
    pub fn netns_prefix(&self) -> String {
        format!("isthmus-{}.", self.0)
    }

    /// The name of its cgroup, directly below the root of the cgroup2 hierarchy.
    pub fn cgroup(&self) -> String {
        format!("isthmus-{}", self.0)
    }

    /// The router between the clusters.
    pub fn wan_netns(&self) -> String {
        format!("{}wan", self.netns_prefix())
    }

    /// A node, or the control plane, of a cluster.
    pub fn host_netns(&self, cluster: &str, host: &str) -> String {
        format!("{}{cluster}.{host}", self.netns_prefix())
    }

    /// A pod.
    pub fn pod_netns(&self, cluster: &str, namespace: &str, pod: &str) -> String {
        format!("{}{cluster}.pod.{namespace}.{pod}", self.netns_prefix())
    }
}

impl LabName {
    /// For what has no usable name of its own.
    pub fn fallback() -> Self {
        Self("lab".into())
    }
}

impl FromStr for LabName {
    type Err = LabError;
    fn from_str(s: &str) -> Result<Self, LabError> {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let ok = (1..=20).contains(&s.len())
            && s.chars().all(|c| inner(c) || c == '-')
            && s.starts_with(inner)
            && s.ends_with(inner);
        if ok {
            Ok(Self(s.to_owned()))
        } else {
            Err(LabError::invalid(format!(
                "lab name {s:?} is not usable: 1 to 20 lower-case letters, digits and dashes, beginning and ending with a letter or digit"
            )))
        }
    }
}

impl TryFrom<String> for LabName {
    type Error = LabError;
    fn try_from(s: String) -> Result<Self, LabError> {
        s.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> String {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which address families pods, nodes and services have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Families {
    /// IPv4 alone.
    #[default]
    #[serde(rename = "ipv4")]
    V4,
    /// IPv6 alone.
    #[serde(rename = "ipv6")]
    V6,
    /// Both; IPv4 comes first.
    #[serde(rename = "dual")]
    Dual,
}

impl Families {
    /// Whether IPv4 is among them.
    pub fn v4(self) -> bool {
        self != Self::V6
    }

    /// Whether IPv6 is among them.
    pub fn v6(self) -> bool {
        self != Self::V4
    }

    fn pick<T>(self, v4: T, v6: T) -> Vec<T> {
        match self {
            Self::V4 => vec![v4],
            Self::V6 => vec![v6],
            Self::Dual => vec![v4, v6],
        }
    }
}

/// The control plane's host number; nodes begin at [`FIRST_NODE`].
const CONTROL_PLANE: u8 = 2;
const FIRST_NODE: u8 = 10;
/// Most clusters and most nodes in one: what the address plan has room for.
pub const MAX_CLUSTERS: usize = 50;
/// See [`MAX_CLUSTERS`].
pub const MAX_NODES: usize = 200;
/// Most clustermesh-apiservers of one cluster.
pub const MAX_REPLICAS: usize = (FIRST_NODE - CONTROL_PLANE) as usize;

/// The addresses of one cluster: `172.20.<n>.0/24` and `fd00:20:<n>::/64` for hosts, `10.<n>.0.0/16` and
/// `fd00:10:<n>::/48` for pods, `10.<100+n>.0.0/16` and `fd00:96:<n>::/112` for services.
#[derive(Debug, Clone, Copy)]
pub struct ClusterPlan {
    /// 1 for the first cluster of the lab.
    number: u8,
    families: Families,
}

impl ClusterPlan {
    /// The plan of the `position`th cluster, from 0.
    pub fn new(position: usize, families: Families) -> Self {
        debug_assert!(position < MAX_CLUSTERS, "scenarios are checked for this");
        Self { number: position as u8 + 1, families }
    }

    /// 1 for the first cluster.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Its address families.
    pub fn families(&self) -> Families {
        self.families
    }

    /// The router's addresses on the cluster's bridge.
    pub fn gateway(&self) -> Vec<IpNet> {
        self.host(1)
    }

    /// Where the Kubernetes API and the first clustermesh-apiserver listen.
    pub fn control_plane(&self) -> Vec<IpNet> {
        self.host(CONTROL_PLANE)
    }

    /// Where the `replica`th clustermesh-apiserver is, from 0: the first beside the Kubernetes API, each other on a host of
    /// its own.
    pub fn apiserver(&self, replica: usize) -> Vec<IpNet> {
        debug_assert!(replica < MAX_REPLICAS, "scenarios are checked for this");
        self.host(CONTROL_PLANE + replica as u8)
    }

    /// The addresses of the `node`th node, from 0.
    pub fn node(&self, node: usize) -> Vec<IpNet> {
        self.host(FIRST_NODE + node as u8)
    }

    /// The pod ranges of the `node`th node, from 0.
    pub fn pod_ranges(&self, node: usize) -> Vec<IpNet> {
        let n = u16::from(self.number);
        self.families.pick(
            v4([10, self.number, node as u8, 0], 24),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, n, node as u16, 0, 0, 0, 0), 64)),
        )
    }

    /// All hosts and pods of the cluster: what a partition cuts off.
    pub fn everything(&self) -> Vec<IpNet> {
        let n = u16::from(self.number);
        let mut all = self.families.pick(
            v4([172, 20, self.number, 0], 24),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x20, n, 0, 0, 0, 0, 0), 64)),
        );
        all.extend(self.cluster_pods());
        all
    }

    /// The range that holds the pod ranges of all nodes, for each family.
    pub fn cluster_pods(&self) -> Vec<IpNet> {
        let n = u16::from(self.number);
        self.families.pick(
            v4([10, self.number, 0, 0], 16),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, n, 0, 0, 0, 0, 0), 48)),
        )
    }

    /// The service ranges, for the Kubernetes API.
    pub fn service_ranges(&self) -> Vec<IpNet> {
        let n = u16::from(self.number);
        self.families.pick(
            v4([10, 100 + self.number, 0, 0], 16),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x96, n, 0, 0, 0, 0, 0), 112)),
        )
    }

    fn host(&self, host: u8) -> Vec<IpNet> {
        let n = u16::from(self.number);
        self.families.pick(
            v4([172, 20, self.number, host], 24),
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x20, n, 0, 0, 0, 0, u16::from(host)), 64)),
        )
    }
}

fn v4(octets: [u8; 4], prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(octets), prefix))
}

/// The network that holds exactly this address.
pub fn host_net(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// `0.0.0.0/0` or `::/0`, as the address is.
pub fn default_net(like: IpAddr) -> IpNet {
    match like {
        IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_name_that_could_escape_its_prefix_is_refused() {
        for bad in ["", "a.b", "../x", "A", "-a", "a-", "a/b", "aaaaaaaaaaaaaaaaaaaaa", "ä"] {
            assert!(bad.parse::<LabName>().is_err(), "{bad:?}");
        }
        let (a, ab) = ("a".parse::<LabName>().unwrap(), "a-b".parse::<LabName>().unwrap());
        assert!(!ab.wan_netns().starts_with(&a.netns_prefix()));
    }

    #[test]
    fn no_two_ranges_of_a_lab_overlap() {
        let mut all = Vec::new();
        for position in 0..MAX_CLUSTERS {
            let plan = ClusterPlan::new(position, Families::Dual);
            all.extend(plan.everything());
            all.extend(plan.service_ranges());
        }
        for (i, a) in all.iter().enumerate() {
            for b in &all[i + 1..] {
                assert!(!a.contains(&b.network()) && !b.contains(&a.network()), "{a} and {b}");
            }
        }
    }

    #[test]
    fn nodes_and_pods_lie_within_their_cluster() {
        let plan = ClusterPlan::new(2, Families::Dual);
        let everything = plan.everything();
        let within = |net: &IpNet| everything.iter().any(|e| e.contains(&net.addr()));
        assert!(plan.node(MAX_NODES - 1).iter().all(within));
        assert!(plan.apiserver(MAX_REPLICAS - 1).iter().all(within));
        assert_ne!(plan.apiserver(MAX_REPLICAS - 1), plan.node(0));
        assert!(plan.pod_ranges(MAX_NODES - 1).iter().all(within));
        assert_eq!(plan.pod_ranges(1)[0].to_string(), "10.3.1.0/24");
    }
}
