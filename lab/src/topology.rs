//! The wires: a namespace per host, a bridge per cluster, and a router between the clusters ("the WAN").
//!
//! ```text
//!  alpha.node1 ─┐                      ┌─ beta.node1
//!  alpha.node2 ─┼─ br-1 [ wan ] br-2 ──┼─ beta.node2
//!  alpha.cp ────┘                      └─ beta.cp
//! ```
//! Within a cluster nodes route pod ranges to each other directly over the bridge; everything else goes through the
//! router, which is where clusters are cut off from one another.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::error::Result;
use crate::names::{ClusterPlan, Families, LabName, MAX_NODES, default_net, host_net};
use crate::netlink::{Mac, Netlink};
use crate::netns::NetNs;
use crate::spec::ClusterSpec;

/// The name of the control plane's host.
pub const CONTROL_PLANE: &str = "control-plane";

/// The router between the clusters.
pub struct Wan {
    ns: NetNs,
    netlink: Netlink,
    plans: Vec<ClusterPlan>,
}

/// The hosts of one cluster.
pub struct ClusterNet {
    /// Where the Kubernetes API runs, and the first clustermesh-apiserver.
    pub control_plane: NetNs,
    /// Where each clustermesh-apiserver runs: the first one beside the Kubernetes API.
    pub apiservers: Vec<NetNs>,
    /// The nodes, in order.
    pub nodes: Vec<NetNs>,
    /// Its addresses.
    pub plan: ClusterPlan,
}

impl Wan {
    /// Makes the router and, for each cluster, its bridge and hosts.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn build(
        lab: &LabName,
        families: Families,
        clusters: &[ClusterSpec],
    ) -> Result<(Self, Vec<ClusterNet>)> {
        let plans = (0..clusters.len()).map(|i| ClusterPlan::new(i, families)).collect();
        let ns = NetNs::create(&lab.wan_netns()).await?;
        ns.sysctl(ROUTER)?;
        let wan = Self { netlink: ns.netlink()?, ns, plans };
        let mut nets = Vec::with_capacity(clusters.len());
        for (ClusterSpec { name, nodes, replicas, .. }, plan) in clusters.iter().zip(&wan.plans) {
            let bridge = bridge(plan);
            wan.netlink.add_bridge(&bridge).await?;
            for address in plan.gateway() {
                wan.netlink.add_address(&bridge, address).await?;
            }
            let control_plane = wan.host(lab, name, CONTROL_PLANE, plan, plan.control_plane(), 0).await?;
            let mut apiservers = vec![control_plane.clone()];
            for replica in 1..*replicas {
                let (host, port) = (format!("apiserver-{replica}"), MAX_NODES + replica);
                apiservers.push(wan.host(lab, name, &host, plan, plan.apiserver(replica), port).await?);
            }
            let mut hosts = Vec::with_capacity(nodes.len());
            for (i, node) in nodes.iter().enumerate() {
                hosts.push(wan.host(lab, name, node, plan, plan.node(i), i + 1).await?);
                wan.route_pods(plan, i, &wan.netlink).await?;
            }
            for (i, ns) in hosts.iter().chain([&control_plane]).enumerate() {
                let netlink = ns.netlink()?;
                for other in (0..hosts.len()).filter(|other| *other != i) {
                    wan.route_pods(plan, other, &netlink).await?;
                }
            }
            nets.push(ClusterNet { control_plane, apiservers, nodes: hosts, plan: *plan });
        }
        Ok((wan, nets))
    }

    /// The router's namespace, which every wire between hosts ends in.
    pub fn ns(&self) -> &NetNs {
        &self.ns
    }

    /// Cuts the way from cluster number `from` to cluster number `to` (positions from 0); the way back stays.
    ///
    /// # Errors
    /// When it is cut already.
    pub async fn cut(&self, from: usize, to: usize) -> Result<()> {
        for range in self.plans[to].everything() {
            self.netlink.drop_traffic(&bridge(&self.plans[from]), range).await?;
        }
        Ok(())
    }

    /// Joins everything that was cut.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn heal(&self) -> Result<()> {
        self.netlink.let_traffic_through().await
    }

    async fn host(
        &self,
        lab: &LabName,
        cluster: &str,
        name: &str,
        plan: &ClusterPlan,
        addresses: Vec<IpNet>,
        port: usize,
    ) -> Result<NetNs> {
        let ns = NetNs::create(&lab.host_netns(cluster, name)).await?;
        ns.sysctl(ROUTER)?;
        let link = format!("c{}-h{port}", plan.number());
        let (near, far) = (mac(0, plan.number(), port as u8), mac(1, plan.number(), port as u8));
        self.netlink.add_veth(&link, near, "eth0", far, &ns).await?;
        self.netlink.enslave(&link, &bridge(plan)).await?;
        let netlink = ns.netlink()?;
        netlink.up("eth0").await?;
        for address in addresses {
            netlink.add_address("eth0", address).await?;
        }
        for gateway in plan.gateway() {
            netlink.add_route(default_net(gateway.addr()), gateway.addr()).await?;
        }
        Ok(ns)
    }

    async fn route_pods(&self, plan: &ClusterPlan, node: usize, within: &Netlink) -> Result<()> {
        for (range, via) in plan.pod_ranges(node).into_iter().zip(plan.node(node)) {
            within.add_route(range, via.addr()).await?;
        }
        Ok(())
    }
}

/// Wires a pod to its node: `eth0` in the pod, a veth named after it in the node, a host route, and neighbours that
/// are known from the start, so that the first packet waits for nobody. `key` distinguishes the pod on its node.
/// Returns the name of the node's end.
///
/// # Errors
/// When the kernel refuses.
pub async fn wire_pod(node: &NetNs, pod: &NetNs, addresses: &[IpAddr], key: u32) -> Result<String> {
    pod.sysctl(POD)?;
    let link = format!("veth{key:08x}");
    let [a, b, c, d] = key.to_be_bytes();
    let (host_mac, pod_mac): (Mac, Mac) = ([0x02, 0x10, a, b, c, d], [0x02, 0x11, a, b, c, d]);
    let (outside, inside) = (node.netlink()?, pod.netlink()?);
    outside.add_veth(&link, host_mac, "eth0", pod_mac, pod).await?;
    inside.up("eth0").await?;
    for address in addresses {
        let gateway = pod_gateway(*address);
        inside.add_address("eth0", host_net(*address)).await?;
        inside.add_neighbour("eth0", gateway, host_mac).await?;
        inside.add_link_route(host_net(gateway), "eth0").await?;
        inside.add_route(default_net(gateway), gateway).await?;
        outside.add_neighbour(&link, *address, pod_mac).await?;
        outside.add_link_route(host_net(*address), &link).await?;
    }
    Ok(link)
}

/// The pod's next hop: an address that exists nowhere but in the pod's neighbour table.
fn pod_gateway(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::new(169, 254, 1, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 0x169, 0, 0, 0, 0, 0, 1).into(),
    }
}

fn bridge(plan: &ClusterPlan) -> String {
    format!("br-{}", plan.number())
}

/// Locally administered, and different for each end of each wire.
fn mac(end: u8, cluster: u8, port: u8) -> Mac {
    [0x02, 0, 0, end, cluster, port]
}

/// Addresses are usable at once (no duplicate address detection), and packets are forwarded.
const ROUTER: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/default/forwarding", "1"),
];

const POD: &[(&str, &str)] = &[
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
];
