//! The way to the encryption device for packets that the eBPF programs leave to the stack: those too big for it, which the
//! stack fragments, or about which it tells the pod the path's MTU.
//!
//! One rule and two routes per family, however many peers there are: what carries the mark goes to the device, or, where
//! that is gone, nowhere:
//!
//! ```text
//! ip rule  add pref 120 fwmark 0xe00/0xf00 lookup 51871
//! ip route add default dev isthmus_wg0 table 51871 metric 1
//! ip route add blackhole default table 51871 metric 4096
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use isthmus_bpf_abi::mark;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressScope;
use rtnetlink::packet_route::link::LinkLayerType;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

/// The mark, in [`isthmus_bpf_abi::mark::MASK`], of what goes to the device.
pub const MARK: u32 = mark::ENCRYPT;
/// The table of the routes.
pub const TABLE: u32 = 51_871;
/// Place of the rule: before the main table's (32766), behind those that drop or pin for good reason.
pub const PRIORITY: u32 = 120;

/// For interfaces that need an address and have none (RFC 7600). With the scope of a host it is never chosen as
/// a source.
const DUMMY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);

const TO_DEVICE: u32 = 1;
const TO_NOWHERE: u32 = 4096;

/// Why the rule or the routes could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum RoutingError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refuses.
    #[error(
        "cannot {what}: {source}; packets too big for the encryption device are dropped until this works (the agent needs CAP_NET_ADMIN)"
    )]
    Netlink {
        /// What was asked of it.
        what: String,
        /// Its answer.
        source: rtnetlink::Error,
    },
}

/// Makes the rule and the routes to the device with this index in the calling process' network namespace, where they are
/// not there yet, and lets the device take packets back from any direction. Anything that is there already is no error.
///
/// # Errors
/// The kernel refuses; what could be made stays.
pub async fn ensure(ifindex: u32, sysctl_root: &Path) -> Result<(), RoutingError> {
    let netlink = Netlink::open()?;
    loosen_source_check(sysctl_root, ifindex);
    netlink.give_address(ifindex).await?;
    netlink.ensure::<Ipv4Addr>(ifindex, IpVersion::V4).await?;
    if has_ipv6(sysctl_root, ifindex) {
        netlink.ensure::<Ipv6Addr>(ifindex, IpVersion::V6).await?;
    }
    Ok(())
}

/// Removes the rule and the routes; that there are none is no error.
///
/// # Errors
/// The kernel refuses.
pub async fn remove() -> Result<(), RoutingError> {
    let netlink = Netlink::open()?;
    for version in [IpVersion::V4, IpVersion::V6] {
        netlink.remove(version).await?;
    }
    Ok(())
}

/// The interfaces by which packets leave this node for others: those that a route leads through a gateway by, as far as they
/// speak Ethernet.
///
/// # Errors
/// Routes or interfaces cannot be listed.
pub async fn outward() -> Result<Vec<u32>, RoutingError> {
    let netlink = Netlink::open()?;
    let mut interfaces = BTreeSet::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family(&version);
        let mut routes = netlink.0.route().get(wanted).execute();
        let listing = |source| refused("list routes".to_owned(), source);
        while let Some(route) = routes.try_next().await.map_err(listing)? {
            interfaces.extend(gateways(&route.attributes));
        }
    }
    let listing = |source| refused("list network interfaces".to_owned(), source);
    let mut links = netlink.0.link().get().execute();
    let mut ethernet = Vec::new();
    while let Some(link) = links.try_next().await.map_err(listing)? {
        if link.header.link_layer_type == LinkLayerType::Ether && interfaces.contains(&link.header.index) {
            ethernet.push(link.header.index);
        }
    }
    Ok(ethernet)
}

/// Interfaces by which a route reaches gateways.
fn gateways(attributes: &[RouteAttribute]) -> Vec<u32> {
    let leads = |attributes: &[RouteAttribute]| {
        attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)))
    };
    let mut interfaces = Vec::new();
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) if leads(attributes) => interfaces.push(*index),
            RouteAttribute::MultiPath(hops) => {
                let hops = hops.iter().filter(|hop| leads(&hop.attributes));
                interfaces.extend(hops.map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    interfaces
}

struct Netlink(Handle);

impl Netlink {
    fn open() -> Result<Self, RoutingError> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        // Ends with the last handle.
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// To the loose check, nothing may come in by an interface that has no address at all.
    async fn give_address(&self, ifindex: u32) -> Result<(), RoutingError> {
        let mut add = self.0.address().add(ifindex, DUMMY.into(), 32);
        add.message_mut().header.scope = AddressScope::Host;
        match add.execute().await {
            Err(error) if !is(&error, libc::EEXIST) => {
                Err(refused("give the encryption device an address".to_owned(), error))
            }
            _ => Ok(()),
        }
    }

    async fn ensure<F: Family>(&self, ifindex: u32, version: IpVersion) -> Result<(), RoutingError> {
        // The last way first: between the rule and the routes nothing goes by the main table.
        for route in [F::nowhere(), F::device(ifindex)] {
            let made = self.0.route().add(route).replace().execute().await;
            made.map_err(|source| refused(format!("add a route to table {TABLE}"), source))?;
        }
        let mut rule = self.0.rule().add().priority(PRIORITY).action(RuleAction::ToTable);
        rule = rule.table_id(TABLE).fw_mark(MARK);
        rule.message_mut().attributes.push(RuleAttribute::FwMask(mark::MASK));
        rule.message_mut().header.family = family(&version);
        match rule.execute().await {
            Err(error) if !is(&error, libc::EEXIST) => {
                Err(refused(format!("add a rule for table {TABLE}"), error))
            }
            _ => Ok(()),
        }
    }

    async fn remove(&self, version: IpVersion) -> Result<(), RoutingError> {
        let listing = |source| refused("list routing rules".to_owned(), source);
        let mut rules = self.0.rule().get(version.clone()).execute();
        while let Some(rule) = rules.try_next().await.map_err(listing)? {
            let ours = [RuleAttribute::Priority(PRIORITY), RuleAttribute::Table(TABLE)];
            if ours.iter().all(|attribute| rule.attributes.contains(attribute)) {
                let removed = self.0.rule().del(rule).execute().await;
                removed.map_err(|source| refused("remove a routing rule".to_owned(), source))?;
            }
        }
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family(&version);
        let mut routes = self.0.route().get(wanted).execute();
        while let Some(route) = routes
            .try_next()
            .await
            .map_err(|source| refused(format!("list the routes of table {TABLE}"), source))?
        {
            if route.attributes.contains(&RouteAttribute::Table(TABLE)) {
                match self.0.route().del(route).execute().await {
                    // Gone with its device meanwhile.
                    Err(error) if !is(&error, libc::ESRCH) => {
                        return Err(refused(format!("remove a route of table {TABLE}"), error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The routes of an address family.
trait Family {
    fn device(ifindex: u32) -> RouteMessage;

    fn nowhere() -> RouteMessage;
}

impl Family for Ipv4Addr {
    fn device(ifindex: u32) -> RouteMessage {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().table_id(TABLE).scope(RouteScope::Link);
        route.output_interface(ifindex).priority(TO_DEVICE).build()
    }

    fn nowhere() -> RouteMessage {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().table_id(TABLE);
        route.kind(RouteType::BlackHole).priority(TO_NOWHERE).build()
    }
}

impl Family for Ipv6Addr {
    fn device(ifindex: u32) -> RouteMessage {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().table_id(TABLE);
        route.output_interface(ifindex).priority(TO_DEVICE).build()
    }

    fn nowhere() -> RouteMessage {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().table_id(TABLE);
        route.kind(RouteType::BlackHole).priority(TO_NOWHERE).build()
    }
}

fn family(version: &IpVersion) -> AddressFamily {
    match version {
        IpVersion::V4 => AddressFamily::Inet,
        IpVersion::V6 => AddressFamily::Inet6,
    }
}

/// What comes out of the device has no route back through it, and a strict reverse path check would drop it. The kernel takes
/// the larger of this and the setting for all interfaces, in which 2 is "loose".
fn loosen_source_check(sysctl_root: &Path, ifindex: u32) {
    let Some(setting) = setting(sysctl_root, ifindex, "ipv4", "rp_filter") else { return };
    if let Err(error) = fs::write(&setting, "2") {
        tracing::warn!(
            %error,
            "cannot write {}; where net.ipv4.conf.all.rp_filter is 1, set it to 2, or packets for pods that have \
             just started and for this node are dropped",
            setting.display()
        );
    }
}

fn has_ipv6(sysctl_root: &Path, ifindex: u32) -> bool {
    setting(sysctl_root, ifindex, "ipv6", "disable_ipv6")
        .and_then(|path| fs::read_to_string(path).ok())
        .is_some_and(|disabled| disabled.trim() == "0")
}

/// A setting of the interface, if the kernel has it.
fn setting(sysctl_root: &Path, ifindex: u32, family: &str, name: &str) -> Option<PathBuf> {
    let interface = nix::net::if_::if_indextoname(ifindex).ok()?.into_string().ok()?;
    let path = sysctl_root.join(family).join("conf").join(interface).join(name);
    path.exists().then_some(path)
}

fn is(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -errno)
}

fn refused(what: String, source: rtnetlink::Error) -> RoutingError {
    RoutingError::Netlink { what, source }
}
