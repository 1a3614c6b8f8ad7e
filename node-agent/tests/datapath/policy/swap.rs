//! A policy changes while packets are decided: none sees half of a change.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use isthmus_bpf_abi::Direction;

use super::*;
use crate::packet::{SYN, TCP};
use crate::sandbox::DEADLINE;

/// Packets are decided for as long as this many changes are made.
const CHANGES: u32 = 60;

/// Runs `change` over and over while packets of ever new flows are decided; each must have this verdict.
fn while_changing(pod: &Pod, expected: &[(&str, u32)], mut change: impl FnMut(&Datapath, u32) + Send) {
    let (changes, packets, failed) = (AtomicU32::new(0), AtomicU32::new(0), AtomicBool::new(false));
    // Both sides go on until there was enough of both: neither need be as fast as the other.
    let is_enough =
        || changes.load(Ordering::Relaxed) >= CHANGES && packets.load(Ordering::Relaxed) > CHANGES;
    let own = pod.family.pod;
    let started = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !failed.load(Ordering::Relaxed) && !is_enough() {
                change(&pod.datapath, changes.load(Ordering::Relaxed));
                changes.fetch_add(1, Ordering::Relaxed);
            }
        });
        while !is_enough() {
            let number = packets.load(Ordering::Relaxed);
            failed.fetch_or(started.elapsed() >= DEADLINE, Ordering::Relaxed);
            assert!(!failed.load(Ordering::Relaxed), "too slow");
            for &(remote, verdict) in expected {
                let sent = frame(TCP, &at_port(remote, 1024 + (number % 60_000) as u16), own, SYN);
                let got = pod.gets(&sent);
                failed.fetch_or(got != verdict, Ordering::Relaxed);
                assert_eq!(got, verdict, "packet {number} of {remote}");
            }
            packets.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// The thread that changes is in the test's namespaces and needs nothing of them: maps are descriptors.
#[test]
fn a_packet_that_two_policies_agree_on_never_sees_another_verdict() {
    sandbox(|sandbox| {
        let pod = Pod::new(sandbox, V4);
        let ingress = Direction::Ingress;
        let allow = |key| (key, allowed());
        let deny = |key| (key, denied());
        // One allows the peer by its identity and denies the other, the next allows everybody and denies the other by a port.
        let first = vec![allow(all_of(PEER_IDENTITY, ingress)), deny(all_of(OTHER_IDENTITY, ingress))];
        let second = vec![allow(all_of(0, ingress)), deny(port(OTHER_IDENTITY, ingress, TCP, 8080))];
        let policies = [(INGRESS, first), (BOTH, second)];
        pod.allow(policies[0].0, &policies[0].1);
        let expected = [(V4.peer, PASS), (V4.other, DROP)];
        while_changing(&pod, &expected, |datapath, round| {
            let (enforcement, entries) = &policies[round as usize % 2];
            datapath.replace_policy(POD, *enforcement, entries).expect("a policy");
        });
    });
}

#[test]
fn an_update_in_place_never_shows_what_is_neither_old_nor_new() {
    sandbox(|sandbox| {
        let pod = Pod::new(sandbox, V4);
        let ingress = Direction::Ingress;
        // The other side's rules come and go whole: denied on one port, allowed on all. And they change from that to being
        // allowed on the port alone. The one that is asked about is the same in all of them.
        let broad = (all_of(OTHER_IDENTITY, ingress), allowed());
        let closed = (port(OTHER_IDENTITY, ingress, TCP, 8080), denied());
        let narrow = (PolicyKey::ports(PEER_IDENTITY, ingress, TCP, 8064, 11), allowed());
        let one = (port(PEER_IDENTITY, ingress, TCP, 8080), allowed());
        let all = (all_of(PEER_IDENTITY, ingress), allowed());
        pod.allow(INGRESS, &[one]);
        let expected = [(V4.peer, PASS), (V4.other, DROP)];
        while_changing(&pod, &expected, |datapath, round| {
            let update =
                |put: &[_], delete: &[_]| datapath.update_policy(POD, put, delete).expect("an update");
            match round % 4 {
                0 => update(&[broad, closed], &[]),
                1 => update(&[all], &[one.0]),
                2 => update(&[narrow], &[all.0, broad.0, closed.0]),
                _ => update(&[one], &[narrow.0]),
            }
        });
    });
}
