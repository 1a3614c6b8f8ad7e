//! Makes a failing case small.

use serde_json::Value;

use crate::world::{Packet, Peer, World};

/// Leaves out whatever can be left out of a world while `fails` still holds for it and the packet: whole policies,
/// specs, rules, parts of rules, pods and services. Deterministic.
pub fn shrink(
    world: &World,
    packet: &Packet,
    mut fails: impl FnMut(&World, &Packet) -> bool,
) -> (World, Packet) {
    let (mut world, mut packet) = (world.clone(), *packet);
    loop {
        let Some(smaller) =
            candidates(&world, &packet).into_iter().find(|(world, packet)| fails(world, packet))
        else {
            return (world, packet);
        };
        (world, packet) = smaller;
    }
}

/// Everything that is one step smaller, the biggest steps first.
fn candidates(world: &World, packet: &Packet) -> Vec<(World, Packet)> {
    let mut all = Vec::new();
    let mut with = |change: &dyn Fn(&mut World)| {
        let mut smaller = world.clone();
        change(&mut smaller);
        all.push((smaller, *packet));
    };
    for index in 0..world.policies.len() {
        with(&|world| drop(world.policies.remove(index)));
    }
    for (index, policy) in world.policies.iter().enumerate() {
        if policy.specs.len() > 1 {
            for spec in 0..policy.specs.len() {
                with(&|world| drop(world.policies[index].specs.remove(spec)));
            }
        }
        for (spec, value) in policy.specs.iter().enumerate() {
            for smaller in without_one(value, true) {
                with(&|world| world.policies[index].specs[spec] = smaller.clone());
            }
        }
    }
    for index in 0..world.services.len() {
        with(&|world| drop(world.services.remove(index)));
    }
    for (index, pod) in world.pods.iter().enumerate() {
        for name in pod.named_ports.keys() {
            with(&|world| world.pods[index].named_ports.retain(|known, _| known != name));
        }
    }
    for index in 0..world.pods.len() {
        all.extend(without_pod(world, packet, index));
    }
    all
}

fn without_pod(world: &World, packet: &Packet, index: usize) -> Option<(World, Packet)> {
    let moved = |at: usize| if at > index { at - 1 } else { at };
    let peer = match packet.peer {
        Peer::Pod(at) if at == index => return None,
        Peer::Pod(at) => Peer::Pod(moved(at)),
        other => other,
    };
    if packet.pod == index {
        return None;
    }
    let mut smaller = world.clone();
    smaller.pods.remove(index);
    Some((smaller, Packet { pod: moved(packet.pod), peer, ..*packet }))
}

/// The same without one element of a list or one field, at any depth. What makes an object valid stays: the selector of
/// a spec, an expression's parts, a port's number.
fn without_one(value: &Value, top: bool) -> Vec<Value> {
    let mut all = Vec::new();
    match value {
        Value::Array(list) => {
            for index in 0..list.len() {
                // An empty list means something else than a shorter one; what is left out then is the list.
                if list.len() > 1 {
                    let mut shorter = list.clone();
                    shorter.remove(index);
                    all.push(Value::Array(shorter));
                }
                for smaller in without_one(&list[index], false) {
                    let mut changed = list.clone();
                    changed[index] = smaller;
                    all.push(Value::Array(changed));
                }
            }
        }
        Value::Object(object) => {
            let needed: &[&str] = if top {
                &["endpointSelector", "podSelector"]
            } else {
                &[
                    "key", "operator", "values", "port", "type", "family", "ports", "fields", "cidr",
                    "ipBlock", "selector",
                ]
            };
            for (key, inner) in object {
                if !needed.contains(&key.as_str()) {
                    let mut fewer = object.clone();
                    fewer.shift_remove(key);
                    all.push(Value::Object(fewer));
                }
                for smaller in without_one(inner, false) {
                    let mut changed = object.clone();
                    changed.insert(key.clone(), smaller);
                    all.push(Value::Object(changed));
                }
            }
        }
        _ => {}
    }
    all
}
