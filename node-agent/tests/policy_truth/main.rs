//! The eBPF programs against the naive reference and the resolver's maps: the same worlds, the same packets, the same
//! verdicts, when the maps were filled at once and after changes one by one.
//!
//! Needs root. `ISTHMUS_TRUTH_SEED` and `ISTHMUS_TRUTH_CASES` say where to begin and how much to try.

#![allow(clippy::unwrap_used)]

#[path = "../../../policy/tests/truth/change.rs"]
mod change;
#[path = "../../../policy/tests/truth/engine.rs"]
mod engine;
mod kernel;
#[path = "../datapath/packet.rs"]
#[expect(dead_code, reason = "shared with the tests of the datapath, which use all of it")]
mod packet;
#[path = "../datapath/sandbox.rs"]
#[expect(dead_code, reason = "shared with the tests of the datapath, which use all of it")]
mod sandbox;

use engine::Node;
use fastrand::Rng;
use isthmus_policy::{Effect, RuleId};
use isthmus_policy_truth::{Packet, World, decide, generate, report, run_of, shrink};
use kernel::Kernel;
use sandbox::sandbox;

/// Packets per world.
const PACKETS: usize = 96;

#[test]
fn programs_decide_as_the_documentation_does() {
    let run = run_of(20_000);
    sandbox(|sandbox| {
        let mut kernel = Kernel::new(sandbox);
        let mut decided = 0;
        for seed in (0..).map(|number| run.seed.wrapping_add(number)) {
            if decided >= run.cases {
                break;
            }
            let mut rng = Rng::with_seed(seed);
            let world = generate::world(&mut rng);
            let packets = generate::packets(&mut rng, &world, PACKETS);
            let node = Node::of(&world);
            kernel.begin(&world, &node);
            for packet in packets.iter().filter(|packet| Kernel::can_send(packet)) {
                decided += 1;
                check(&mut kernel, &world, &node, packet, seed, true);
            }
        }
    });
}

#[test]
fn changes_in_place_leave_programs_deciding_as_after_a_fresh_start() {
    let run = run_of(6_000);
    sandbox(|sandbox| {
        let mut kernel = Kernel::new(sandbox);
        let mut decided = 0;
        for seed in (0..).map(|number| run.seed.wrapping_add(number)) {
            if decided >= run.cases {
                break;
            }
            let mut rng = Rng::with_seed(seed);
            let mut world = generate::world(&mut rng);
            let mut node = Node::of(&world);
            kernel.begin(&world, &node);
            for _ in 0..16 {
                change::change(&mut rng, &mut world, &mut node);
                if rng.bool() {
                    continue;
                }
                let changes = node.take();
                kernel.follow(&world, &node, &changes);
                let packets = generate::packets(&mut rng, &world, 16);
                for packet in packets.iter().filter(|packet| Kernel::can_send(packet)) {
                    decided += 1;
                    check(&mut kernel, &world, &node, packet, seed, false);
                }
            }
        }
    });
}

/// The reference, the map in user space, the engine's explanation and the program agree; so does the rule that the
/// program tells of.
fn check(kernel: &mut Kernel<'_>, world: &World, node: &Node, packet: &Packet, seed: u64, fresh: bool) {
    let expected = decide(world, packet).allowed;
    let explained = node.explain(world, packet);
    let told = kernel.send(world, packet);
    if told.passed == expected
        && node.allows(world, packet) == expected
        && (explained.effect == Effect::Allow) == expected
    {
        // Of what no rule decides, the programs say so or nothing.
        let same = |rule| match explained.origin {
            Some(_) => rule == explained.rule.0,
            None => rule < RuleId::FIRST.0,
        };
        if let Some(rule) = told.rule.filter(|rule| !same(*rule)) {
            panic!("seed {seed}: told of rule {rule}: {explained:#?}\n{}", report(world, packet));
        }
        return;
    }
    let (world, packet) = if fresh {
        shrink(world, packet, |world, packet| {
            if !Node::can_be_of(world) {
                return false;
            }
            let node = Node::of(world);
            kernel.begin(world, &node);
            kernel.send(world, packet).passed != decide(world, packet).allowed
        })
    } else {
        (world.clone(), *packet)
    };
    let node = Node::of(&world);
    let verdict = |allowed| if allowed { "allowed" } else { "denied" };
    panic!(
        "seed {seed}: the program says {}, the map {}, the engine {:?}\n{}\nmap: {:#?}",
        verdict(told.passed),
        verdict(node.allows(&world, &packet)),
        explained.effect,
        report(&world, &packet),
        node.endpoints[&engine::endpoint(&world.pods[packet.pod])],
    );
}
