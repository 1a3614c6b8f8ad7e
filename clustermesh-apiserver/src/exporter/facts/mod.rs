//! What the translation needs to know of each Kubernetes object, parsed at the edge.
//!
//! A fact is small, typed and complete: everything questionable in an object is settled here, once, and told to the user
//! as a [`Finding`]; what remains of the object is used. Nothing behind this folder reads Kubernetes' own types.

mod cilium_endpoint;
mod cilium_node;
mod identity;
mod namespace;
mod node;
mod pod;
mod policy;
mod service;
mod slice;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_wire::annotation::AnnotationError;
use isthmus_wire::value::{Protocol, ServicePort};

use super::problem::{Finding, Reason};

pub(crate) use identity::IdentityFact;
pub(crate) use namespace::NamespaceFact;
pub(crate) use node::NodeFact;
pub(crate) use pod::{Assigned, EndpointFact, Host};
#[cfg(test)]
pub(crate) use policy::understand;
pub(crate) use policy::{
    CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy, NetworkPolicy, PolicyFact, policy_key,
};
pub(crate) use service::{ServiceFact, ServiceKind};
pub(crate) use slice::{Backend, BackendState, SliceFact};

/// Namespace and name of an object; the namespace is empty for cluster-scoped kinds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Name {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub(crate) fn of(object: &impl kube::Resource) -> Self {
        let meta = object.meta();
        Self::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// A fact about one object.
pub(crate) trait Fact: PartialEq + Send + 'static {
    fn name(&self) -> &Name;

    /// The object's UID, where objects of the kind may reach us on two ways; empty otherwise.
    fn uid(&self) -> &str {
        ""
    }
}

/// An object that a [`Fact`] is made of.
pub(crate) trait Source {
    type Fact: Fact;

    /// Reads what is needed, noting what cannot be used and why.
    fn fact(self, findings: &mut Vec<Finding>) -> Self::Fact;
}

/// A port: an absent protocol means TCP.
fn port(protocol: Option<&str>, number: i32) -> Result<ServicePort, Finding> {
    let problem = |what: String| Finding::new(Reason::InvalidPort, format!("{what}; the port is left out"));
    let protocol = match protocol {
        None | Some("") => Protocol::Tcp,
        Some(text) => text.parse().map_err(|error| problem(format!("protocol {error}")))?,
    };
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(ServicePort { protocol, port }),
        _ => Err(problem(format!("port {number} is not between 1 and 65535"))),
    }
}

/// An address as text; `what` says where it stands in the object.
fn address(what: &str, text: &str, findings: &mut Vec<Finding>) -> Option<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(address) => Some(canonical(address)),
        Err(_) => {
            findings.push(Finding::new(
                Reason::InvalidAddress,
                format!("{what} {text:?} is not an IP address; it is left out"),
            ));
            None
        }
    }
}

/// An optional address: empty text is none.
fn optional_address(what: &str, text: &str, findings: &mut Vec<Finding>) -> Option<IpAddr> {
    if text.is_empty() { None } else { address(what, text, findings) }
}

/// Addresses are compared and rendered as IPv4 wherever they are.
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

fn prefix(what: &str, text: &str, findings: &mut Vec<Finding>) -> Option<IpNet> {
    match text.parse::<IpNet>() {
        Ok(net) => Some(net.trunc()),
        Err(_) => {
            findings.push(Finding::new(
                Reason::InvalidAddress,
                format!("{what} {text:?} is not an address range such as 10.244.1.0/24; it is left out"),
            ));
            None
        }
    }
}

/// An annotation whose value means nothing.
fn annotation(error: &AnnotationError) -> Finding {
    Finding::new(Reason::InvalidAnnotation, error.to_string())
}
