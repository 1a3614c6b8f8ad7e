//! The verdict on one packet.

mod cilium;
mod kubernetes;
mod selector;

pub use cilium::asks_for_more;
use serde_json::Value;

use crate::world::{Direction, Kind, Packet, Peer, Pod, Reserved, World};

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// It passes.
    pub allowed: bool,
    /// Some policy takes everything for forbidden that is not allowed.
    pub default_deny: bool,
    /// The policies that say so: those that deny, else those that allow.
    pub policies: Vec<String>,
}

/// What one policy has to say of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Opinion {
    /// It selects the pod and isolates it in this direction.
    isolates: bool,
    /// It allows the packet.
    allows: bool,
    /// It forbids the packet, whatever others allow.
    denies: bool,
}

/// Asks every policy.
///
/// Kubernetes: pods are isolated by the policies that select them, and what any of those allows is allowed. Cilium: a
/// deny goes before every allow, of whichever kind of policy; `enableDefaultDeny` says whether a policy isolates.
pub fn decide(world: &World, packet: &Packet) -> Decision {
    let opinions: Vec<(String, Opinion)> = world
        .policies
        .iter()
        .flat_map(|policy| policy.specs.iter().map(move |spec| (policy, spec)))
        .map(|(policy, spec)| {
            let opinion = match policy.kind {
                Kind::NetworkPolicy => kubernetes::opinion(world, &policy.namespace, spec, packet),
                Kind::CiliumNetworkPolicy => cilium::opinion(world, Some(&policy.namespace), spec, packet),
                Kind::CiliumClusterwideNetworkPolicy => cilium::opinion(world, None, spec, packet),
            };
            (format!("{} {}/{}", policy.kind, policy.namespace, policy.name), opinion)
        })
        .collect();
    let who = |holds: fn(&Opinion) -> bool| -> Vec<String> {
        opinions.iter().filter(|(_, opinion)| holds(opinion)).map(|(name, _)| name.clone()).collect()
    };
    let default_deny = opinions.iter().any(|(_, opinion)| opinion.isolates);
    // A node can always reach its pods: its kubelet has to.
    if packet.direction == Direction::Ingress && packet.peer == Peer::Reserved(Reserved::Host) {
        return Decision { allowed: true, default_deny, policies: Vec::new() };
    }
    let (denying, allowing) = (who(|opinion| opinion.denies), who(|opinion| opinion.allows));
    let allowed = denying.is_empty() && (!allowing.is_empty() || !default_deny);
    Decision { allowed, default_deny, policies: if denying.is_empty() { allowing } else { denying } }
}

/// Who a rule can be about.
enum Subject<'a> {
    Pod(&'a Pod),
    Reserved(Reserved),
    Outside(std::net::IpAddr),
}

fn peer<'a>(world: &'a World, packet: &Packet) -> Subject<'a> {
    match packet.peer {
        Peer::Pod(index) => Subject::Pod(&world.pods[index]),
        Peer::Reserved(reserved) => Subject::Reserved(reserved),
        Peer::Outside(address) => Subject::Outside(address),
    }
}

/// The pod that receives: the one whose named ports count.
fn receiver<'a>(world: &'a World, packet: &Packet) -> Option<&'a Pod> {
    match (packet.direction, packet.peer) {
        (Direction::Ingress, _) => Some(&world.pods[packet.pod]),
        (Direction::Egress, Peer::Pod(index)) => Some(&world.pods[index]),
        (Direction::Egress, _) => None,
    }
}

/// Address in `cidr` and in none of `except`.
fn in_block(cidr: &Value, except: Option<&Value>, address: std::net::IpAddr) -> bool {
    let inside = |text: &Value| {
        let text = text.as_str().unwrap_or_default();
        match (text.parse::<ipnet::IpNet>(), text.parse::<std::net::IpAddr>()) {
            (Ok(block), _) => block.contains(&address),
            (_, Ok(one)) => one == address,
            _ => false,
        }
    };
    inside(cidr) && !except.and_then(Value::as_array).is_some_and(|list| list.iter().any(inside))
}

/// The elements of a list; none if there is no list.
fn list<'a>(object: &'a Value, field: &str) -> &'a [Value] {
    object.get(field).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
