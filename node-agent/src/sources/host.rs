//! The addresses of this very node: those of all its interfaces, not only the ones that its Node object states. A packet from
//! a bridge's address, or one that the node has masqueraded, is the node's.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use tokio::sync::mpsc;

use super::mesh::Arrival;
use crate::mesh::MeshEvent;

/// How often they are looked at: one dump, of some microseconds per address.
const EVERY: Duration = Duration::from_secs(10);
/// Where kube-proxy keeps the addresses of services, which are not the node's.
const IPVS: &str = "kube-ipvs0";

/// Tells of the node's addresses, and whenever they are others, until nobody listens any more.
pub async fn run(events: mpsc::Sender<Arrival>) {
    let section: Arc<str> = "host".into();
    let mut known = None;
    let mut look = tokio::time::interval(EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        match addresses().await {
            Ok(found) if known.as_ref() == Some(&found) => {}
            Ok(found) => {
                let event = MeshEvent::HostAddresses { addresses: found.clone() };
                let arrival =
                    Arrival { event, section: section.clone(), revision: 0, received: Instant::now() };
                if events.send(arrival).await.is_err() {
                    return;
                }
                known = Some(found);
            }
            Err(error) => tracing::warn!(%error, "cannot list the addresses of this node; trying again"),
        }
    }
}

async fn addresses() -> Result<BTreeSet<IpAddr>, Box<dyn std::error::Error + Send + Sync>> {
    let ipvs = nix::net::if_::if_nametoindex(IPVS).ok();
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let read = async {
        let mut found = BTreeSet::new();
        let mut messages = handle.address().get().execute();
        while let Some(message) = messages.try_next().await? {
            if Some(message.header.index) == ipvs {
                continue;
            }
            // Of an interface with a peer, `Local` is this side; otherwise both say the same.
            let of = |attribute: &AddressAttribute| match attribute {
                AddressAttribute::Local(address) => Some((0, *address)),
                AddressAttribute::Address(address) => Some((1, *address)),
                _ => None,
            };
            let address = message.attributes.iter().filter_map(of).min().map(|(_, address)| address);
            found.extend(address.filter(|address| counts(*address)));
        }
        Ok::<_, rtnetlink::Error>(found)
    };
    let found = read.await;
    connection.abort();
    Ok(found?)
}

/// What stays on the machine or on one link says nothing to a pod, and is the same on every node.
fn counts(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback() && !address.is_unspecified(),
        IpAddr::V6(address) => {
            !address.is_loopback() && !address.is_unspecified() && !address.is_unicast_link_local()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_node_s_addresses_are_listed_without_those_that_stay_on_it() {
        let found = addresses().await.expect("a list");
        assert!(found.iter().all(|address| counts(*address)), "{found:?}");
        assert!(!counts("127.0.0.1".parse().expect("an address")));
        assert!(!counts("fe80::1".parse().expect("an address")));
        assert!(counts("10.1.0.1".parse().expect("an address")));
    }
}
