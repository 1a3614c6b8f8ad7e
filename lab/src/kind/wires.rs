//! Cutting clusters off from each other on kind: routes into nowhere, on the nodes of one, for the nodes of the other.
//!
//! What pods of different clusters say to each other, and what apiservers do, crosses between nodes' addresses. So nothing
//! gets past such a route, and taking it away leaves the node as it was.

use std::net::IpAddr;

use futures::future::{join_all, try_join_all};
use k8s_openapi::api::core::v1::Node;

use super::{Kind, KindCluster, NAMESPACE};
use crate::error::{Doing, Result};
use crate::names::host_net;

/// A route into nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cut {
    /// On this node, which is a container of this name.
    node: String,
    to: IpAddr,
}

impl Kind {
    /// Cuts the way from one cluster to another; the way back stays.
    pub(crate) async fn cut(&self, from: &str, to: &str) -> Result<()> {
        let (near, far) = (self.cluster(from)?.node_addresses(), self.cluster(to)?.node_addresses());
        let (near, far) = futures::future::try_join(near, far).await?;
        let targets: Vec<IpAddr> = far.into_iter().flat_map(|(_, addresses)| addresses).collect();
        let cuts = near
            .into_iter()
            .flat_map(|(node, _)| targets.iter().map(move |to| Cut { node: node.clone(), to: *to }));
        let cuts: Vec<Cut> = cuts.collect();
        let mut all = self.cut.lock().await;
        // Written down first: what fails half-way is healed as well.
        all.extend(cuts.iter().cloned());
        try_join_all(cuts.iter().map(|cut| self.route(cut, &["replace", "blackhole"]))).await.map(drop)
    }

    /// Joins everything that was cut.
    pub(crate) async fn heal(&self) -> Result<()> {
        let cuts = std::mem::take(&mut *self.cut.lock().await);
        // All of them, whatever becomes of the others. One that was not made after all is no error.
        let healed =
            join_all(cuts.iter().map(|cut| self.route(cut, &["flush", "type", "blackhole", "exact"])));
        healed.await.into_iter().collect()
    }

    async fn route(&self, cut: &Cut, verb: &[&str]) -> Result<()> {
        let to = host_net(cut.to).to_string();
        let family = if cut.to.is_ipv4() { "-4" } else { "-6" };
        let command = [&["ip", family, "route"], verb, &[to.as_str()]].concat();
        self.on_node(&cut.node, &command).await.map(drop)
    }
}

impl KindCluster {
    /// All nodes, also those that take no pods, with their addresses.
    async fn node_addresses(&self) -> Result<Vec<(String, Vec<IpAddr>)>> {
        let nodes = self.kubectl.list("nodes", NAMESPACE, "--selector=").await?;
        let read = |node| -> Result<(String, Vec<IpAddr>)> {
            let node: Node =
                serde_json::from_value(node).map_err(std::io::Error::from).doing(|| "reading nodes")?;
            let addresses = node.status.and_then(|s| s.addresses).unwrap_or_default();
            let internal = addresses.iter().filter(|a| a.type_ == "InternalIP");
            let internal = internal.filter_map(|a| a.address.parse().ok()).collect();
            Ok((node.metadata.name.unwrap_or_default(), internal))
        };
        nodes.into_iter().map(read).collect()
    }
}
