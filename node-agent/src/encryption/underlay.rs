//! The network below the encryption device: how large its packets may be.

use std::collections::HashMap;
use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;

/// What WireGuard adds to a packet at most, in bytes: IPv6 40, UDP 8, header 16, tag 16.
pub const OVERHEAD: u32 = 80;
/// What is taken for the underlay's MTU as long as no interface is found.
pub const DEFAULT_MTU: u32 = 1500;
/// IPv6 needs this much.
const SMALLEST_DEVICE_MTU: u32 = 1280;

/// The smallest MTU, in bytes, among the interfaces that hold the node's addresses; none if no interface does.
///
/// # Errors
/// The kernel does not tell.
pub async fn mtu(addresses: &[IpAddr]) -> Result<Option<u32>, std::io::Error> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let failed = std::io::Error::other::<rtnetlink::Error>;
    let mut mtus = HashMap::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await.map_err(failed)? {
        for attribute in &link.attributes {
            if let LinkAttribute::Mtu(mtu) = attribute {
                mtus.insert(link.header.index, *mtu);
            }
        }
    }
    let mut smallest = None;
    let mut held = handle.address().get().execute();
    while let Some(address) = held.try_next().await.map_err(failed)? {
        let is_ours = address.attributes.iter().any(|attribute| match attribute {
            AddressAttribute::Address(ip) | AddressAttribute::Local(ip) => addresses.contains(ip),
            _ => false,
        });
        if is_ours && let Some(mtu) = mtus.get(&address.header.index) {
            smallest = Some(smallest.map_or(*mtu, |smallest: u32| smallest.min(*mtu)));
        }
    }
    connection.abort();
    Ok(smallest)
}

/// The device's MTU over an underlay with this one.
pub fn device_mtu(underlay: u32) -> u32 {
    underlay.saturating_sub(OVERHEAD).max(SMALLEST_DEVICE_MTU)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_leaves_room_for_what_is_added_and_carries_ipv6() {
        assert_eq!(device_mtu(1500), 1420);
        assert_eq!(device_mtu(9000), 8920);
        assert_eq!(device_mtu(1300), 1280);
    }

    #[tokio::test]
    async fn loopback_has_an_mtu_and_an_address_of_nobody_has_none() {
        let loopback = mtu(&["127.0.0.1".parse().expect("an address")]).await.expect("netlink answers");
        assert!(loopback.is_some_and(|mtu| mtu >= 1280), "{loopback:?}");
        assert_eq!(mtu(&["192.0.2.1".parse().expect("an address")]).await.expect("netlink answers"), None);
    }
}
