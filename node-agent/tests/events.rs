//! From the kernel's records to what listeners read.

#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use futures::StreamExt;
use isthmus_bpf_abi::{Addr, DropReason, PolicyEvent, PolicyVerdict, event_flags};
use isthmus_node_agent::events::flow::{Line, LostEventSource, TrafficDirection, Verdict};
use isthmus_node_agent::events::{Directory, Filter, Flow, Hub, PodName, decorate};
use isthmus_policy::{Direction, Effect, PolicyKind, PolicyName, RuleOrigin};
use isthmus_wire::Labels;
use serde_json::json;
use tokio_util::sync::CancellationToken;

struct Known;

const CLIENT: u32 = 65_793;
const SERVER: u32 = 131_330;
const RULE: u32 = 17;

impl Directory for Known {
    fn labels(&self, identity: u32) -> Option<Arc<Labels>> {
        let (app, cluster) = match identity {
            CLIENT => ("client", "alpha"),
            SERVER => ("rebel-base", "beta"),
            _ => return None,
        };
        let mut labels = Labels::new();
        for (key, value) in [("app", app), (Labels::CLUSTER, cluster), (Labels::NAMESPACE, "default")] {
            labels.insert_k8s(key, value).unwrap();
        }
        Some(Arc::new(labels))
    }

    fn cluster(&self, _identity: u32) -> Option<Arc<str>> {
        None
    }

    fn pod(&self, address: IpAddr) -> Option<PodName> {
        (address == IpAddr::from([10, 1, 0, 7]))
            .then(|| PodName { namespace: "default".into(), name: "client-5f".into() })
    }

    fn rule(&self, rule: u32) -> Option<RuleOrigin> {
        (rule == RULE).then(|| RuleOrigin {
            policy: PolicyName {
                kind: PolicyKind::CiliumNetworkPolicy,
                namespace: Some("default".parse().unwrap()),
                name: "no-base".parse().unwrap(),
            },
            rule: 0,
            direction: Direction::Egress,
            effect: Effect::Deny,
            index: 2,
        })
    }
}

fn event() -> PolicyEvent {
    PolicyEvent {
        time: 0,
        source: Addr::from(IpAddr::from([10, 1, 0, 7])),
        destination: Addr::from(IpAddr::from([10, 2, 0, 9])),
        source_identity: CLIENT,
        destination_identity: SERVER,
        ifindex: 12,
        rule: RULE,
        len: 74,
        source_port_be: 40_122_u16.to_be(),
        destination_port_be: 80_u16.to_be(),
        protocol: 6,
        direction: isthmus_bpf_abi::Direction::Egress as u8,
        verdict: PolicyVerdict::Dropped as u8,
        reason: DropReason::Denied as u8,
        tcp_flags: 2,
        flags: 0,
        pad: [0; 2],
    }
}

fn flow(event: &PolicyEvent) -> Flow {
    decorate(event, DateTime::<Utc>::UNIX_EPOCH, "alpha/node1", &Known)
}

#[test]
fn a_verdict_has_the_shape_of_hubbles_flows() {
    let told = serde_json::to_value(flow(&event())).unwrap();
    let expected = json!({
        "time": "1970-01-01T00:00:00Z",
        "verdict": "DROPPED",
        "drop_reason": 181,
        "drop_reason_desc": "POLICY_DENY",
        "IP": {"source": "10.1.0.7", "destination": "10.2.0.9", "ipVersion": "IPv4"},
        "l4": {"TCP": {"source_port": 40122, "destination_port": 80, "flags": {"SYN": true}}},
        "source": {
            "identity": CLIENT,
            "cluster_name": "alpha",
            "namespace": "default",
            "labels": [
                "k8s:app=client",
                "k8s:io.cilium.k8s.policy.cluster=alpha",
                "k8s:io.kubernetes.pod.namespace=default",
            ],
            "pod_name": "client-5f",
        },
        "destination": {
            "identity": SERVER,
            "cluster_name": "beta",
            "namespace": "default",
            "labels": [
                "k8s:app=rebel-base",
                "k8s:io.cilium.k8s.policy.cluster=beta",
                "k8s:io.kubernetes.pod.namespace=default",
            ],
        },
        "Type": "L3_L4",
        "node_name": "alpha/node1",
        "is_reply": false,
        "event_type": {"type": 1},
        "traffic_direction": "EGRESS",
        "Summary": "TCP Flags: SYN",
        "egress_denied_by": [{"name": "no-base", "namespace": "default", "kind": "CiliumNetworkPolicy"}],
        "isthmus": {
            "reason": "a rule denies it",
            "rule": "ciliumnetworkpolicy/default/no-base egressDeny[2]",
            "bytes": 74,
            "interface": 12,
        },
    });
    assert_eq!(told, expected);
    assert_eq!(
        serde_json::from_value::<Flow>(told).unwrap(),
        flow(&event()),
        "the command line reads it back"
    );
}

#[test]
fn what_is_not_known_is_left_out_and_nothing_is_made_up() {
    let mut event = PolicyEvent {
        source_identity: 999,
        rule: 0,
        reason: DropReason::NoRule as u8,
        protocol: 1,
        destination_port_be: 8_u16.to_be(),
        direction: isthmus_bpf_abi::Direction::Ingress as u8,
        ..event()
    };
    event.source = Addr::from(IpAddr::from([192, 0, 2, 1]));
    let flow = flow(&event);
    assert_eq!((flow.source.pod_name.as_str(), flow.source.labels.len()), ("", 0));
    assert_eq!(flow.isthmus.reason, "no rule allows it");
    assert_eq!((flow.isthmus.rule.as_deref(), flow.ingress_denied_by.len()), (None, 0));
    assert_eq!(serde_json::to_value(&flow.l4).unwrap(), json!({"ICMPv4": {"type": 8}}));
    assert_eq!(flow.drop_reason, Some(133));
}

#[test]
fn a_flow_that_is_let_through_names_the_rule_that_allows_it() {
    let event = PolicyEvent {
        verdict: PolicyVerdict::Forwarded as u8,
        reason: DropReason::None as u8,
        flags: event_flags::REPLY,
        ..event()
    };
    let flow = flow(&event);
    assert_eq!((flow.verdict, flow.drop_reason, flow.drop_reason_desc), (Verdict::Forwarded, None, None));
    assert!(flow.is_reply && flow.egress_denied_by.is_empty());
    assert_eq!(flow.egress_allowed_by.len(), 1);
}

#[test]
fn filters_are_alternatives_within_a_field_and_conditions_across_fields() {
    let wants = |query: &str| Filter::from_query(query).unwrap().wants(&flow(&event()));
    for query in [
        "",
        "pod=client",
        "pod=default/client-5f",
        "pod=alpha/default/client",
        "pod=nobody&pod=client",
        "label=app",
        "label=app=client",
        "label=k8s:app=rebel-base",
        "label=app=client,io.cilium.k8s.policy.cluster=alpha",
        "cluster=beta&port=80&protocol=tcp&verdict=DROPPED&direction=egress",
        "ip=10.2.0.0/16",
        "ip=10.2.0.9",
        "identity=65793",
        "port=40122",
    ] {
        assert!(wants(query), "{query}");
        let filter = Filter::from_query(query).unwrap();
        assert_eq!(Filter::from_query(&filter.to_query()), Ok(filter), "{query}");
    }
    for query in [
        "pod=other/client",
        "pod=beta/default/client",
        "label=app=client,io.cilium.k8s.policy.cluster=beta",
        "label=container:app",
        "cluster=beta&port=81",
        "verdict=forwarded",
        "direction=ingress",
        "ip=10.3.0.0/16",
        "protocol=icmp",
    ] {
        assert!(!wants(query), "{query}");
    }
}

#[test]
fn a_filter_that_is_none_is_refused_with_what_there_is() {
    let refused = |query: &str| Filter::from_query(query).unwrap_err().to_string();
    assert!(refused("pod=a/b/c/d").contains("[[CLUSTER/]NAMESPACE/]NAME"));
    assert!(refused("colour=red").contains("pod, label, cluster"), "{}", refused("colour=red"));
    assert_eq!(refused("verdict=maybe"), "verdict: `maybe` is not forwarded or dropped");
    assert_eq!(refused("port=http"), "port: `http` is not a port");
    let many = "pod=x&".repeat(65);
    assert_eq!(refused(many.trim_end_matches('&')), "pod: more than 64 values");
}

fn line(bytes: &[u8]) -> Line {
    serde_json::from_slice(bytes).unwrap()
}

#[tokio::test]
async fn a_listener_hears_what_it_wants_from_then_on() {
    let hub = Hub::new("alpha/node1", CancellationToken::new());
    assert!(!hub.has_listeners());
    hub.tell(flow(&event()));
    let mut all = Box::pin(hub.listen(Filter::default()));
    let mut ingress = Box::pin(hub.listen(Filter::from_query("direction=ingress").unwrap()));
    assert!(hub.has_listeners());
    hub.tell(flow(&event()));
    hub.tell(flow(&PolicyEvent { direction: 0, ..event() }));
    let heard = line(&all.next().await.unwrap().unwrap());
    assert_eq!(heard.flow.unwrap().traffic_direction, TrafficDirection::Egress);
    let heard = line(&ingress.next().await.unwrap().unwrap());
    assert_eq!(heard.flow.unwrap().traffic_direction, TrafficDirection::Ingress);
    drop((all, ingress));
    assert!(!hub.has_listeners());
}

#[tokio::test]
async fn a_slow_listener_is_told_how_much_it_has_missed_and_delays_nobody() {
    const TOLD: u64 = 10_000;
    let hub = Hub::new("alpha/node1", CancellationToken::new());
    let mut slow = Box::pin(hub.listen(Filter::default()));
    for _ in 0..TOLD {
        hub.tell(flow(&event()));
    }
    let first = line(&slow.next().await.unwrap().unwrap()).lost_events.unwrap();
    assert_eq!(first.source, LostEventSource::HubbleRingBuffer);
    hub.lost(LostEventSource::RateLimit, 3, Utc::now());
    // Telling of that takes the place of one more.
    let mut accounted_for = first.num_events_lost;
    let limited = loop {
        let line = line(&slow.next().await.unwrap().unwrap());
        match line.lost_events {
            Some(lost) if lost.source == LostEventSource::RateLimit => break lost,
            Some(lost) => accounted_for += lost.num_events_lost,
            None => accounted_for += 1,
        }
    };
    assert_eq!(accounted_for, TOLD);
    assert_eq!((limited.source, limited.num_events_lost), (LostEventSource::RateLimit, 3));
}

#[tokio::test]
async fn listeners_are_sent_away_when_the_agent_stops() {
    let shutdown = CancellationToken::new();
    let hub = Hub::new("alpha/node1", shutdown.clone());
    let mut listener = Box::pin(hub.listen(Filter::default()));
    shutdown.cancel();
    assert!(listener.next().await.is_none());
}
