//! The resolver against the naive reference: the same worlds, the same packets, the same verdicts; and whatever order a
//! world came about in, the same maps.
//!
//! `ISTHMUS_TRUTH_SEED` and `ISTHMUS_TRUTH_CASES` say where to begin and how much to try.

#![allow(clippy::unwrap_used)]

mod change;
mod engine;

use change::change;
use engine::Node;
use fastrand::Rng;
use isthmus_policy_truth::{Packet, World, decide, generate, report, run_of, shrink};

/// Packets per world: making a world costs more than deciding a packet.
const PACKETS: usize = 96;

#[test]
fn the_resolver_decides_as_the_documentation_does() {
    let run = run_of(50_000);
    let mut decided = 0;
    for number in 0.. {
        if decided >= run.cases {
            break;
        }
        let mut rng = Rng::with_seed(run.seed.wrapping_add(number));
        let world = generate::world(&mut rng);
        let packets = generate::packets(&mut rng, &world, PACKETS);
        let node = Node::of(&world);
        for packet in &packets {
            let (map, explained) = (node.allows(&world, packet), node.explain(&world, packet));
            if map != decide(&world, packet).allowed {
                disagree(run.seed.wrapping_add(number), &world, packet);
            }
            let explained_allows = explained.effect == isthmus_policy::Effect::Allow;
            assert_eq!(explained_allows, map, "{explained:#?}\n{}", report(&world, packet));
        }
        decided += packets.len();
    }
}

#[test]
fn changes_one_by_one_lead_to_the_maps_that_are_made_from_the_whole() {
    let run = run_of(20_000);
    let mut decided = 0;
    for number in 0.. {
        if decided >= run.cases {
            break;
        }
        let seed = run.seed.wrapping_add(number);
        let mut rng = Rng::with_seed(seed);
        let mut world = generate::world(&mut rng);
        let mut node = Node::of(&world);
        for step in 0..16 {
            change(&mut rng, &mut world, &mut node);
            // Several changes are sometimes taken together.
            if rng.bool() {
                continue;
            }
            node.take();
            let fresh = Node::of(&world);
            let shown = |node: &Node| {
                let endpoints = node.endpoints.iter().map(|(id, resolved)| {
                    let keys: Vec<_> = resolved
                        .entries
                        .iter()
                        .map(|(key, decision)| {
                            // Identities of blocks are numbers that depend on the order: their prefixes do not.
                            let block = node.cidrs.iter().find(|(_, identity)| **identity == key.identity);
                            (
                                block.map(|(prefix, _)| *prefix),
                                block.is_none().then_some(key.identity),
                                key.direction,
                                key.l4,
                                decision.effect,
                            )
                        })
                        .collect();
                    let mut keys: Vec<_> = keys;
                    keys.sort_by_key(|(prefix, identity, direction, l4, _)| {
                        (*prefix, *identity, *direction, *l4)
                    });
                    (*id, resolved.ingress_enforced, resolved.egress_enforced, keys)
                });
                (endpoints.collect::<Vec<_>>(), node.cidrs.keys().copied().collect::<Vec<_>>())
            };
            assert_eq!(shown(&node), shown(&fresh), "seed {seed}, step {step}\n{:#?}", world.policies);
            let packets = generate::packets(&mut rng, &world, 16);
            for packet in &packets {
                if fresh.allows(&world, packet) != decide(&world, packet).allowed {
                    disagree(seed, &world, packet);
                }
                assert_eq!(
                    node.allows(&world, packet),
                    decide(&world, packet).allowed,
                    "seed {seed}, step {step}: after changes one by one\n{}",
                    report(&world, packet)
                );
            }
            decided += packets.len();
        }
    }
}

fn disagree(seed: u64, world: &World, packet: &Packet) -> ! {
    let differs = |world: &World, packet: &Packet| {
        Node::can_be_of(world) && Node::of(world).allows(world, packet) != decide(world, packet).allowed
    };
    let (world, packet) = shrink(world, packet, differs);
    let node = Node::of(&world);
    let resolved = &node.endpoints[&engine::endpoint(&world.pods[packet.pod])];
    panic!(
        "seed {seed}: the resolver's map says {}\n{}\nblocks: {:?}\nmap: {resolved:#?}",
        if node.allows(&world, &packet) { "allowed" } else { "denied" },
        report(&world, &packet),
        node.cidrs,
    );
}
