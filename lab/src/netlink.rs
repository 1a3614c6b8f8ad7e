//! Links, addresses, routes and rules of one namespace, over rtnetlink.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::packet_route::rule::RuleAction;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::error::{Doing, LabError, Result};
use crate::netns::NetNs;

/// A hardware address.
pub type Mac = [u8; 6];

/// An rtnetlink connection into one namespace.
#[derive(Clone)]
pub struct Netlink {
    handle: Handle,
    within: String,
}

impl NetNs {
    /// Opens an rtnetlink connection into this namespace.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn netlink(&self) -> Result<Netlink> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = self.run(move || {
            let _reactor = runtime.enter();
            rtnetlink::new_connection()
        })?;
        tokio::spawn(connection);
        Ok(Netlink { handle, within: self.name().to_owned() })
    }
}

impl Netlink {
    /// The index of the link of this name.
    ///
    /// # Errors
    /// When there is none.
    pub async fn index(&self, name: &str) -> Result<u32> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        let link = found.doing(|| format!("looking for {name} in {}", self.within))?;
        link.map(|l| l.header.index)
            .ok_or_else(|| LabError::invalid(format!("there is no link {name} in {}", self.within)))
    }

    /// Sets a link up.
    ///
    /// # Errors
    /// When there is no such link.
    pub async fn up(&self, name: &str) -> Result<()> {
        let index = self.index(name).await?;
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().set(up).execute().await.doing(|| format!("setting {name} up in {}", self.within))
    }

    /// Adds a bridge, up.
    ///
    /// # Errors
    /// When the name is taken.
    pub async fn add_bridge(&self, name: &str) -> Result<()> {
        let bridge = LinkBridge::new(name).build();
        self.handle
            .link()
            .add(bridge)
            .execute()
            .await
            .doing(|| format!("adding bridge {name} in {}", self.within))
    }

    /// Adds a veth pair: `name` here, up, and `peer` inside `other`. Both MAC addresses are given, so that neighbours
    /// can be known without asking.
    ///
    /// # Errors
    /// When a name is taken.
    pub async fn add_veth(
        &self,
        name: &str,
        mac: Mac,
        peer: &str,
        peer_mac: Mac,
        other: &NetNs,
    ) -> Result<()> {
        let far = LinkUnspec::new_with_name(peer).setns_by_fd(other.fd()).address(peer_mac.to_vec()).build();
        let near = LinkVeth::new(name, peer)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far)))
            .address(mac.to_vec())
            .up()
            .build();
        let added = self.handle.link().add(near).execute().await;
        added.doing(|| format!("adding veth {name} in {} with {peer} in {}", self.within, other.name()))
    }

    /// Makes `port` a port of `bridge`.
    ///
    /// # Errors
    /// When either is missing.
    pub async fn enslave(&self, port: &str, bridge: &str) -> Result<()> {
        let controller = self.index(bridge).await?;
        let change = LinkUnspec::new_with_name(port).controller(controller).build();
        self.handle.link().set(change).execute().await.doing(|| format!("adding {port} to {bridge}"))
    }

    /// The indices of the ports of a bridge.
    ///
    /// # Errors
    /// When there is no such bridge.
    pub async fn ports(&self, bridge: &str) -> Result<BTreeSet<u32>> {
        let bridge_index = self.index(bridge).await?;
        let links: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .doing(|| format!("looking for the ports of {bridge} in {}", self.within))?;
        let is_port = |attribute: &LinkAttribute| *attribute == LinkAttribute::Controller(bridge_index);
        let ports = links.into_iter().filter(|link| link.attributes.iter().any(is_port));
        Ok(ports.map(|link| link.header.index).collect())
    }

    /// Deletes a link; none there is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn delete_link(&self, name: &str) -> Result<()> {
        match self.index(name).await {
            Ok(index) => {
                self.handle.link().del(index).execute().await.doing(|| format!("deleting link {name}"))
            }
            Err(_) => Ok(()),
        }
    }

    /// Gives a link an address.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn add_address(&self, link: &str, address: IpNet) -> Result<()> {
        let index = self.index(link).await?;
        let add = self.handle.address().add(index, address.addr(), address.prefix_len());
        add.execute().await.doing(|| format!("adding {address} to {link} in {}", self.within))
    }

    /// Routes `to` through `gateway`.
    ///
    /// # Errors
    /// When the gateway cannot be reached directly.
    pub async fn add_route(&self, to: IpNet, gateway: IpAddr) -> Result<()> {
        let message = match (to, gateway) {
            (IpNet::V4(to), IpAddr::V4(gateway)) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to.addr(), to.prefix_len())
                .gateway(gateway)
                .build(),
            (IpNet::V6(to), IpAddr::V6(gateway)) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to.addr(), to.prefix_len())
                .gateway(gateway)
                .build(),
            _ => return Err(LabError::invalid(format!("{to} and {gateway} are of different families"))),
        };
        let added = self.handle.route().add(message).replace().execute().await;
        added.doing(|| format!("routing {to} through {gateway} in {}", self.within))
    }

    /// Routes `to` straight out of `link`.
    ///
    /// # Errors
    /// When there is no such link.
    pub async fn add_link_route(&self, to: IpNet, link: &str) -> Result<()> {
        let index = self.index(link).await?;
        let message = match to {
            IpNet::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to.addr(), to.prefix_len())
                .output_interface(index)
                .scope(RouteScope::Link)
                .build(),
            IpNet::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to.addr(), to.prefix_len())
                .output_interface(index)
                .build(),
        };
        let added = self.handle.route().add(message).replace().execute().await;
        added.doing(|| format!("routing {to} to {link} in {}", self.within))
    }

    /// States for good who has `address` on `link`.
    ///
    /// # Errors
    /// When there is no such link.
    pub async fn add_neighbour(&self, link: &str, address: IpAddr, mac: Mac) -> Result<()> {
        let index = self.index(link).await?;
        let add = self.handle.neighbours().add(index, address).link_layer_address(&mac).replace();
        add.execute().await.doing(|| format!("adding neighbour {address} to {link} in {}", self.within))
    }

    /// From now on silently drops what comes in by `link` for `to`.
    ///
    /// # Errors
    /// When it is dropped already.
    pub async fn drop_traffic(&self, link: &str, to: IpNet) -> Result<()> {
        let add =
            self.handle.rule().add().action(RuleAction::Blackhole).input_interface(link).priority(PARTITION);
        let done = match to {
            IpNet::V4(to) => add.v4().destination_prefix(to.addr(), to.prefix_len()).execute().await,
            IpNet::V6(to) => add.v6().destination_prefix(to.addr(), to.prefix_len()).execute().await,
        };
        done.doing(|| format!("dropping {link} -> {to} in {}", self.within))
    }

    /// Forgets every [`Netlink::drop_traffic`].
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn let_traffic_through(&self) -> Result<()> {
        use rtnetlink::packet_route::rule::RuleAttribute;
        for version in [rtnetlink::IpVersion::V4, rtnetlink::IpVersion::V6] {
            let rules: Vec<_> = self
                .handle
                .rule()
                .get(version)
                .execute()
                .try_collect()
                .await
                .doing(|| "listing routing rules")?;
            for rule in rules {
                if rule.attributes.contains(&RuleAttribute::Priority(PARTITION)) {
                    self.handle.rule().del(rule).execute().await.doing(|| "deleting a routing rule")?;
                }
            }
        }
        Ok(())
    }
}

/// Priority of the rules that make a partition: looked at before the main table's.
const PARTITION: u32 = 100;
