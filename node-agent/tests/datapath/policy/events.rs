//! What user space is told of verdicts.

use isthmus_bpf_abi::{Counter, Direction, DropReason, PolicyEvent, PolicyVerdict, event_flags};

use super::*;
use crate::model::socket_addr;
use crate::packet::{ACK, SYN, TCP, UDP};
use crate::sandbox::DEADLINE;

/// All events that there are.
fn drain(pod: &Pod, work: impl FnOnce()) -> Vec<PolicyEvent> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let mut events = pod.datapath.events().expect("events");
    while events.try_next().is_some() {}
    work();
    std::iter::from_fn(|| events.try_next()).collect()
}

#[test]
fn the_first_packet_of_a_flow_and_every_dropped_one_is_told_of() {
    each_family(|pod| {
        let Family { pod: own, peer, other, .. } = pod.family;
        pod.allow(BOTH, &[(port(PEER_IDENTITY, Direction::Ingress, TCP, 8080), allowed())]);
        let events = drain(pod, || {
            pod.gets(&frame(TCP, peer, own, SYN));
            pod.gets(&frame(TCP, peer, own, ACK));
            pod.sends(&frame(TCP, own, peer, ACK));
            pod.gets(&frame(TCP, other, own, SYN));
            pod.datapath
                .update_policy(POD, &[(port(PEER_IDENTITY, Direction::Ingress, TCP, 8080), denied())], &[])
                .expect("an update");
            pod.sends(&frame(TCP, own, peer, ACK));
        });
        let ends = |event: &PolicyEvent| (event.source.ip(), event.destination.ip());
        let ip = |addr| socket_addr(addr).ip();
        let ports = |event: &PolicyEvent| {
            (u16::from_be(event.source_port_be), u16::from_be(event.destination_port_be))
        };
        let [first, second, third] = events.as_slice() else { panic!("{events:?}") };
        assert_eq!((ends(first), ports(first)), ((ip(peer), ip(own)), (40_000, 8080)));
        assert_eq!((first.verdict, first.reason, first.rule), (PolicyVerdict::Forwarded as u8, 0, 16));
        assert_eq!((first.source_identity, first.destination_identity), (PEER_IDENTITY, POD_IDENTITY));
        assert_eq!((first.ifindex, first.protocol, first.tcp_flags), (POD, TCP, SYN));
        assert_eq!((first.direction, first.flags), (Direction::Ingress as u8, 0));
        assert_eq!(ends(second), (ip(other), ip(own)));
        assert_eq!((second.verdict, second.reason), (PolicyVerdict::Dropped as u8, DropReason::NoRule as u8));
        assert_eq!((second.source_identity, second.rule), (OTHER_IDENTITY, 0));
        // An answer, cut by a rule about what it answers to.
        assert_eq!((ends(third), ports(third)), ((ip(own), ip(peer)), (8080, 40_000)));
        assert_eq!(
            (third.verdict, third.reason, third.rule),
            (PolicyVerdict::Dropped as u8, DropReason::Denied as u8, 17)
        );
        assert_eq!((third.direction, third.flags), (Direction::Ingress as u8, event_flags::REPLY));
        assert_eq!((third.source_identity, third.destination_identity), (POD_IDENTITY, PEER_IDENTITY));
        assert!(first.time <= second.time && second.time <= third.time);
        assert_eq!(first.len as usize, frame(TCP, peer, own, SYN).len());
    });
}

#[test]
fn a_reader_waits_for_events() {
    sandbox(|sandbox| {
        let pod = Pod::new(sandbox, V4);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut events = pod.datapath.events().expect("events");
            pod.datapath.events().expect_err("somebody reads already");
            for _ in 0..3 {
                let (event, _) = tokio::time::timeout(DEADLINE, async {
                    tokio::join!(events.next(), async { pod.sends(&frame(UDP, V4.pod, V4.peer, 0)) })
                })
                .await
                .expect("an event in time");
                let event = event.expect("an event");
                assert_eq!(event.reason, DropReason::Waiting as u8);
            }
        });
    });
}

#[test]
fn a_flood_is_told_of_up_to_a_limit_and_the_rest_is_counted() {
    const PACKETS: u32 = 20_000;
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| config.events_per_second = 50);
        let pod = Pod { datapath, family: V4 };
        pod.know();
        let sent = frame(UDP, V4.pod, V4.peer, 0);
        let started = std::time::Instant::now();
        pod.datapath.test_run(PacketProgram::FromPod, &sent, PACKETS).expect("test runs");
        let seconds = started.elapsed().as_secs() + 1;
        let told = pod.counter(Counter::EventSent);
        assert!((50..=50 * (seconds + 1)).contains(&told), "{told} in {seconds} s");
        assert_eq!(told + pod.counter(Counter::EventLimited), u64::from(PACKETS));
    });
}

#[test]
fn what_nobody_reads_in_time_is_counted_and_holds_up_nothing() {
    const PACKETS: u32 = 40_000;
    sandbox(|sandbox| {
        let datapath = sandbox.datapath_with(|config| config.events_per_second = u32::MAX);
        let pod = Pod { datapath, family: V4 };
        pod.know();
        let sent = frame(UDP, V4.pod, V4.peer, 0);
        pod.datapath.test_run(PacketProgram::FromPod, &sent, PACKETS).expect("test runs");
        let told = pod.counter(Counter::EventSent);
        assert!(told > 1000 && pod.counter(Counter::EventLost) > 0, "{told}");
        assert_eq!(told + pod.counter(Counter::EventLost), u64::from(PACKETS));
        assert_eq!(pod.counter(Counter::PolicyWaiting), u64::from(PACKETS));
    });
}
