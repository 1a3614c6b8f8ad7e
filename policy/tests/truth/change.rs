//! Changes of a world, one by one.

use fastrand::Rng;
use isthmus_policy_truth::{Pod, World, generate};

use crate::engine::Node;

/// Pods that are here at most: a test has an interface for each.
const MOST_HERE: usize = 8;

/// Something of the world is another now, and the node is told.
pub(crate) fn change(rng: &mut Rng, world: &mut World, node: &mut Node) {
    match rng.u8(..8) {
        0 | 1 => {
            let number = rng.usize(..6);
            let policy = generate::policy(rng, world, number);
            node.set_policy(&policy);
            world.policies.retain(|known| {
                (known.kind, &known.namespace, &known.name) != (policy.kind, &policy.namespace, &policy.name)
            });
            world.policies.push(policy);
        }
        2 if !world.policies.is_empty() => {
            let gone = world.policies.swap_remove(rng.usize(..world.policies.len()));
            node.remove_policy(&gone);
        }
        3 | 4 => {
            let identity = 512 + rng.u16(..1000);
            let room = world.pods.iter().filter(|pod| pod.here).count() < MOST_HERE;
            let here = room && rng.u8(..4) == 0;
            let pod = generate::pod(rng, world, identity, here);
            let known = |known: &Pod| {
                known.labels == pod.labels || known.v4 == pod.v4 || known.identity == pod.identity
            };
            if !world.pods.iter().any(known) {
                node.set_pod(&pod);
                world.pods.push(pod);
            }
        }
        5 if world.pods.len() > 2 => {
            // One stays here, so that there is somebody to ask about.
            let index = 1 + rng.usize(..world.pods.len() - 1);
            let gone = world.pods.remove(index);
            node.remove_pod(&gone);
        }
        6 => {
            let index = rng.usize(..world.pods.len());
            let made = generate::pod(rng, world, 1, true);
            world.pods[index].named_ports = made.named_ports;
            node.set_pod(&world.pods[index]);
        }
        _ => {
            let index = rng.usize(..world.services.len());
            let app = ["web", "db", "api", "cache"][rng.usize(..4)];
            world.services[index].selector.insert("app".to_owned(), app.to_owned());
            node.set_service(&world.services[index]);
        }
    }
}
