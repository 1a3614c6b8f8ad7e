//! Pods of a cluster that runs Cilium.

use std::net::IpAddr;

use isthmus_crds::CiliumEndpoint;
use isthmus_wire::value::NamedPort;

use super::cilium_node::encryption_key;
use super::{Assigned, EndpointFact, Finding, Host, Name, Reason, Source, optional_address};

impl Source for CiliumEndpoint {
    type Fact = EndpointFact;

    fn fact(self, findings: &mut Vec<Finding>) -> EndpointFact {
        let name = Name::of(&self);
        let status = self.status;
        let networking = status.networking.unwrap_or_default();
        let mut addresses: Vec<IpAddr> = Vec::new();
        for pair in networking.addressing.iter().flatten() {
            for text in [&pair.ipv4, &pair.ipv6] {
                let what = "status.networking.addressing";
                if let Some(ip) = optional_address(what, text, findings)
                    && !addresses.contains(&ip)
                {
                    addresses.push(ip);
                }
            }
        }
        let identity = match status.identity.map(|identity| identity.id) {
            None | Some(0) => Assigned::Nothing,
            Some(id) => u32::try_from(id).map_or_else(
                |_| {
                    findings.push(Finding::new(
                        Reason::InvalidIdentity,
                        format!("status.identity.id {id} is not a numeric identity; the pod is not exported"),
                    ));
                    Assigned::Nothing
                },
                Assigned::Numeric,
            ),
        };
        EndpointFact {
            name,
            addresses,
            identity,
            host: Host::Address {
                address: optional_address("status.networking.node", &networking.node, findings),
                encryption_key: encryption_key(status.encryption.key, findings),
            },
            service_account: status.service_account.into(),
            named_ports: named_ports(status.named_ports.unwrap_or_default()),
            created: self.metadata.creation_timestamp.map_or(0, |time| time.0.as_second()),
        }
    }
}

/// One whose protocol or number means nothing is passed over: names of ports serve policies alone.
fn named_ports(listed: Vec<isthmus_crds::EndpointPort>) -> Vec<NamedPort> {
    let read = |port: isthmus_crds::EndpointPort| {
        let number = super::port(Some(&port.protocol), port.port).ok()?;
        (!port.name.is_empty()).then_some(NamedPort {
            name: port.name,
            port: number.port,
            protocol: number.protocol,
        })
    };
    listed.into_iter().filter_map(read).collect()
}
