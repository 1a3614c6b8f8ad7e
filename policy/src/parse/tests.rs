use serde_json::{Value, json};

use super::*;
use crate::model::{
    Direction, Effect, Entity, IcmpFamily, Peer, Peers, PortMatch, PortSet, Ports, Transport,
};

fn name(kind: PolicyKind) -> PolicyName {
    let namespace = kind.is_namespaced().then(|| "shop".parse().expect("a namespace"));
    PolicyName { kind, namespace, name: "p".parse().expect("a name") }
}

fn cnp(spec: Value) -> Parsed {
    policy(&name(PolicyKind::CiliumNetworkPolicy), &[spec])
}

fn kubernetes(spec: Value) -> Parsed {
    policy(&name(PolicyKind::NetworkPolicy), &[spec])
}

/// The only clause of a policy with this element in this list.
fn clause(list: &str, element: Value) -> (Option<(Peers, Ports)>, Vec<Problem>) {
    let parsed = cnp(json!({"endpointSelector": {}, list: [element]}));
    assert_eq!(parsed.rules.len(), 1);
    let rule = parsed.rules.into_iter().next().expect("a rule");
    assert!(rule.ingress_default_deny || rule.egress_default_deny, "an element denies by default");
    assert!(rule.clauses.len() <= 1, "{:?}", rule.clauses);
    (rule.clauses.into_iter().next().map(|clause| (clause.peers, clause.ports)), parsed.problems)
}

#[test]
fn what_is_not_supported_is_named_and_allows_nothing() {
    let tcp = json!([{"ports": [{"port": "80", "protocol": "TCP"}]}]);
    for (list, element, field) in [
        ("egress", json!({"toFQDNs": [{"matchName": "example.org"}]}), "spec.egress[0].toFQDNs"),
        ("egress", json!({"toFQDNs": [{"matchName": "a.org"}], "toPorts": tcp}), "spec.egress[0].toFQDNs"),
        ("egress", json!({"toGroups": [{"aws": {"region": "x"}}]}), "spec.egress[0].toGroups"),
        ("egress", json!({"toNodes": [{"matchLabels": {"a": "b"}}]}), "spec.egress[0].toNodes"),
        ("ingress", json!({"fromGroups": [{}]}), "spec.ingress[0].fromGroups"),
        ("ingress", json!({"fromNodes": [{}]}), "spec.ingress[0].fromNodes"),
        (
            "ingress",
            json!({"fromEndpoints": [{}], "authentication": {"mode": "required"}}),
            "spec.ingress[0].authentication",
        ),
        (
            "ingress",
            json!({"toPorts": [{"ports": [{"port": "80"}], "rules": {"http": [{"method": "GET"}]}}]}),
            "spec.ingress[0].toPorts[0].rules",
        ),
        (
            "egress",
            json!({"toPorts": [{"ports": [{"port": "443"}], "terminatingTLS": {"secret": {"name": "a"}}}]}),
            "spec.egress[0].toPorts[0].terminatingTLS",
        ),
        (
            "egress",
            json!({"toPorts": [{"ports": [{"port": "443"}], "serverNames": ["a.org"]}]}),
            "spec.egress[0].toPorts[0].serverNames",
        ),
        (
            "egress",
            json!({"toPorts": [{"ports": [{"port": "443"}], "listener": {"name": "a"}}]}),
            "spec.egress[0].toPorts[0].listener",
        ),
        (
            "egress",
            json!({"toCIDRSet": [{"cidrGroupRef": "office"}]}),
            "spec.egress[0].toCIDRSet[0].cidrGroupRef",
        ),
        ("ingress", json!({"fromEndpoints": [{}], "fromTheFuture": 1}), "spec.ingress[0].fromTheFuture"),
    ] {
        let (clause, problems) = clause(list, element.clone());
        assert_eq!(clause, None, "{element}");
        assert_eq!(problems.iter().map(|problem| problem.field.as_str()).collect::<Vec<_>>(), [field]);
        assert_eq!(problems[0].consequence, Consequence::AllowsNothing);
        assert!(problems[0].is_failure());
        assert!(problems[0].to_string().ends_with("; this part allows nothing"), "{}", problems[0]);
    }
}

#[test]
fn what_is_next_to_something_unsupported_is_granted_all_the_same() {
    let (clause, problems) = clause(
        "ingress",
        json!({"fromEntities": ["world"], "toPorts": [
            {"ports": [{"port": "80"}], "rules": {"http": [{"path": "/"}]}},
            {"ports": [{"port": "443", "protocol": "TCP"}], "rules": {"http": []}},
        ]}),
    );
    let port = PortMatch::Transport { protocol: Some(Transport::Tcp), ports: PortSet::Range(443, 443) };
    assert_eq!(clause, Some((Peers::OneOf(vec![Peer::Entity(Entity::World)]), Ports::OneOf(vec![port]))));
    assert_eq!(problems.len(), 1);
}

#[test]
fn a_deny_that_cannot_be_read_denies_everything_it_could_be_about() {
    let world = Peers::OneOf(vec![Peer::Entity(Entity::World)]);
    let port = PortMatch::Transport { protocol: Some(Transport::Tcp), ports: PortSet::Range(80, 80) };
    let one_port = || Ports::OneOf(vec![port.clone()]);
    let tcp = json!([{"ports": [{"port": "80", "protocol": "TCP"}]}]);
    for (list, element, peers, ports) in [
        ("egressDeny", json!({"toFQDNs": [{"matchName": "a.org"}], "toPorts": tcp}), Peers::All, one_port()),
        ("egressDeny", json!({"toGroups": [{}], "toPorts": tcp}), Peers::All, one_port()),
        ("ingressDeny", json!({"fromNodes": [{}]}), Peers::All, Ports::All),
        ("ingressDeny", json!({"fromEntities": ["wrold"], "toPorts": tcp}), Peers::All, one_port()),
        ("ingressDeny", json!({"fromCIDR": ["10.0.0.0/33"], "toPorts": tcp}), world.clone(), one_port()),
        (
            "ingressDeny",
            json!({"fromEntities": ["world"], "toPorts": [{"ports": [{"port": "70000"}]}]}),
            world.clone(),
            Ports::All,
        ),
        (
            "ingressDeny",
            json!({"fromEntities": ["world"], "toPorts": [{"ports": [{"port": "80"}], "rules": {"http": [{}]}}]}),
            world.clone(),
            Ports::All,
        ),
        (
            "ingressDeny",
            json!({"fromEntities": ["world"], "toPorts": tcp, "new": true}),
            Peers::All,
            Ports::All,
        ),
        ("ingressDeny", json!("everything"), Peers::All, Ports::All),
    ] {
        let (clause, problems) = clause(list, element.clone());
        assert_eq!(clause, Some((peers, ports)), "{element}");
        assert!(!problems.is_empty() && problems.iter().all(|p| p.consequence == Consequence::DeniesMore));
    }
}

#[test]
fn values_that_mean_nothing_are_refused_with_advice() {
    for (list, element, says) in [
        ("ingress", json!({"fromEntities": ["wrold"]}), "\"wrold\" is not one of all, world"),
        ("ingress", json!({"fromCIDR": ["10.0.0.256"]}), "is not a prefix such as"),
        ("ingress", json!({"fromCIDRSet": [{"cidr": "10.0.0.1"}]}), "is not a prefix such as"),
        (
            "ingress",
            json!({"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}]}),
            "does not lie within",
        ),
        ("ingress", json!({"toPorts": [{"ports": [{"port": "80", "endPort": 70}]}]}), "below port 80"),
        (
            "ingress",
            json!({"toPorts": [{"ports": [{"port": "http", "endPort": 90}]}]}),
            "needs a port that is a number",
        ),
        ("ingress", json!({"toPorts": [{"ports": [{"port": "0", "endPort": 90}]}]}), "begin at port 1"),
        ("ingress", json!({"toPorts": [{"ports": [{"protocol": "TCP"}]}]}), "it has no port"),
        (
            "ingress",
            json!({"toPorts": [{"ports": [{"port": "80", "protocol": "HTTP"}]}]}),
            "is not one of TCP",
        ),
        (
            "ingress",
            json!({"toPorts": [{"ports": [{"port": "1", "protocol": "ICMP"}]}]}),
            "matched with the field icmps",
        ),
        ("ingress", json!({"toPorts": [{"ports": [{"port": "a_b"}]}]}), "neither a port nor a port's name"),
        ("ingress", json!({"icmps": [{"fields": [{"type": 256}]}]}), "0 to 255"),
        (
            "ingress",
            json!({"icmps": [{"fields": [{"type": "PacketTooBig"}]}]}),
            "name of a type of its family",
        ),
        ("ingress", json!({"fromEndpoints": [{}], "fromEntities": ["host"]}), "exclude each other"),
        (
            "ingress",
            json!({"toPorts": [{"ports": [{"port": "1"}]}], "icmps": [{"fields": [{"type": 8}]}]}),
            "exclude each other",
        ),
        ("ingress", json!({"fromEndpoints": "all"}), "is not a list"),
        ("ingress", json!({"fromEndpoints": [{"matchLabels": {"a": 1}}]}), "1 is not a text"),
        (
            "ingress",
            json!({"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "Like"}]}]}),
            "is not one of In",
        ),
        (
            "ingress",
            json!({"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "In"}]}]}),
            "at least one value",
        ),
        (
            "ingress",
            json!({"fromEndpoints": [{"matchLabels": {"cidr:10.0.0.0/8": ""}}]}),
            "labels of source \"cidr\"",
        ),
        ("egress", json!({"toServices": [{}]}), "one of k8sService and k8sServiceSelector"),
        ("egress", json!({"toServices": [{"k8sService": {"namespace": "a"}}]}), "no serviceName"),
    ] {
        let (clause, problems) = clause(list, element.clone());
        assert_eq!(clause, None, "{element}");
        assert!(problems[0].to_string().contains(says), "{}: {}", element, problems[0]);
    }
}

#[test]
fn an_element_without_peers_and_ports_says_nothing_and_one_with_an_empty_list_neither() {
    for element in [
        json!({}),
        json!({"fromEndpoints": []}),
        json!({"fromEndpoints": [], "toPorts": [{"ports": [{"port": "80"}]}]}),
        json!({"fromEntities": []}),
        json!({"fromCIDR": []}),
        json!({"toPorts": [{}]}),
        json!({"toPorts": []}),
        json!({"fromEndpoints": null}),
    ] {
        assert_eq!(clause("ingress", element.clone()), (None, Vec::new()), "{element}");
        assert_eq!(clause("ingressDeny", element.clone()), (None, Vec::new()), "{element}");
    }
    let (found, _) = clause("ingress", json!({"fromEntities": ["host", "all"]}));
    assert_eq!(found, Some((Peers::All, Ports::All)));
}

#[test]
fn an_endpoint_selector_is_bounded_by_its_namespace_unless_it_says_otherwise() {
    let selector = |kind, selector: Value| {
        let spec = json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [selector]}]});
        let parsed = policy(&name(kind), &[spec]);
        assert_eq!(parsed.problems, []);
        let Peers::OneOf(peers) = &parsed.rules[0].clauses[0].peers else { panic!("everybody") };
        let [Peer::Labels(selector)] = &peers[..] else { panic!("{peers:?}") };
        selector.to_string()
    };
    let namespaced = |value| selector(PolicyKind::CiliumNetworkPolicy, value);
    let clusterwide = |value| selector(PolicyKind::CiliumClusterwideNetworkPolicy, value);
    assert_eq!(namespaced(json!({})), "k8s:io.kubernetes.pod.namespace=shop");
    assert_eq!(clusterwide(json!({})), "k8s:io.kubernetes.pod.namespace");
    assert_eq!(
        namespaced(json!({"matchLabels": {"k8s:app": "a", "any:b": "c"}})),
        "k8s:app=a,b=c,k8s:io.kubernetes.pod.namespace=shop"
    );
    let other = json!({"matchLabels": {"k8s:io.kubernetes.pod.namespace": "bank"}});
    assert!(!namespaced(other).contains("shop"));
    let by_label = json!({"matchLabels": {"io.cilium.k8s.namespace.labels.team": "x"}});
    assert!(!namespaced(by_label).contains("shop"));
    assert_eq!(namespaced(json!({"matchLabels": {"reserved:host": ""}})), "reserved:host=");
}

#[test]
fn a_policy_selects_endpoints_of_its_own_namespace_whatever_it_says() {
    let spec = json!({"endpointSelector": {"matchLabels": {"k8s:io.kubernetes.pod.namespace": "bank"}}});
    let parsed = cnp(spec);
    assert_eq!(parsed.rules[0].subject.to_string(), "k8s:io.kubernetes.pod.namespace=shop");
    assert!(!parsed.problems[0].is_failure());
}

#[test]
fn a_spec_that_cannot_be_read_locks_down_everything_it_could_select() {
    for (spec, subject) in [
        (json!("deny"), "k8s:io.kubernetes.pod.namespace=shop"),
        (json!({"ingress": [{"fromEndpoints": [{}]}]}), "k8s:io.kubernetes.pod.namespace=shop"),
        (
            json!({"endpointSelector": {"matchLabels": {"app": "a", "b": 1}}, "ingress": [{"fromEndpoints": [{}]}]}),
            "app=a,k8s:io.kubernetes.pod.namespace=shop",
        ),
        (
            json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": [{}]}], "priority": 3}),
            "k8s:io.kubernetes.pod.namespace=shop",
        ),
        (
            json!({"endpointSelector": {}, "nodeSelector": {}, "ingress": [{"fromEndpoints": [{}]}]}),
            "k8s:io.kubernetes.pod.namespace=shop",
        ),
    ] {
        let parsed = cnp(spec.clone());
        let rule = &parsed.rules[0];
        assert_eq!(rule.subject.to_string(), subject, "{spec}");
        assert!(rule.ingress_default_deny, "{spec}");
        assert!(rule.clauses.is_empty(), "{spec}");
        assert_eq!(parsed.problems[0].consequence, Consequence::SelectsMore);
    }
}

#[test]
fn a_policy_for_nodes_has_no_effect_on_pods_and_says_so() {
    let parsed = cnp(json!({"nodeSelector": {}, "ingressDeny": [{"fromEntities": ["all"]}]}));
    assert!(parsed.rules.is_empty());
    assert_eq!(parsed.problems[0].field, "spec.nodeSelector");
    assert_eq!(parsed.problems[0].consequence, Consequence::HasNoEffect);
}

#[test]
fn requirements_on_all_other_rules_deny_since_leaving_them_out_would_allow() {
    let parsed = cnp(json!({
        "endpointSelector": {},
        "ingress": [{"fromRequires": [{"matchLabels": {"env": "prod"}}], "fromEndpoints": [{}]}],
    }));
    let clauses = &parsed.rules[0].clauses;
    let deny = clauses.iter().find(|clause| clause.effect == Effect::Deny).expect("a deny");
    assert_eq!((&deny.peers, &deny.ports, deny.direction), (&Peers::All, &Ports::All, Direction::Ingress));
    assert_eq!(parsed.problems[0].field, "spec.ingress[0].fromRequires");
}

#[test]
fn default_deny_follows_the_lists_unless_the_policy_says_otherwise() {
    for (spec, ingress, egress) in [
        (json!({"endpointSelector": {}}), false, false),
        (json!({"endpointSelector": {}, "ingress": [], "egress": []}), false, false),
        (json!({"endpointSelector": {}, "ingress": [{}]}), true, false),
        (json!({"endpointSelector": {}, "egressDeny": [{}]}), false, true),
        (
            json!({"endpointSelector": {}, "egress": [{}], "enableDefaultDeny": {"egress": false}}),
            false,
            false,
        ),
        (json!({"endpointSelector": {}, "enableDefaultDeny": {"ingress": true}}), true, false),
        (
            json!({"endpointSelector": {}, "ingress": [{}], "enableDefaultDeny": {"ingress": "no"}}),
            true,
            false,
        ),
    ] {
        let rule = cnp(spec.clone()).rules.remove(0);
        assert_eq!((rule.ingress_default_deny, rule.egress_default_deny), (ingress, egress), "{spec}");
    }
}

#[test]
fn a_kubernetes_policy_is_about_ingress_and_about_egress_if_it_says_so() {
    for (spec, ingress, egress, clauses) in [
        (json!({"podSelector": {}}), true, false, 0),
        (json!({"podSelector": {}, "egress": [{}]}), true, true, 1),
        (json!({"podSelector": {}, "policyTypes": ["Egress"]}), false, true, 0),
        (json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}), false, true, 0),
        (json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{}]}), true, true, 1),
    ] {
        let parsed = kubernetes(spec.clone());
        assert_eq!(parsed.problems, []);
        let rule = &parsed.rules[0];
        assert_eq!((rule.ingress_default_deny, rule.egress_default_deny), (ingress, egress), "{spec}");
        assert_eq!(rule.clauses.len(), clauses, "{spec}");
    }
}

#[test]
fn kubernetes_ports_are_tcp_unless_they_say_otherwise() {
    let ports = |port: Value| {
        let parsed = kubernetes(json!({"podSelector": {}, "ingress": [{"ports": [port]}]}));
        parsed.rules[0].clauses.first().map(|clause| clause.ports.clone()).ok_or(parsed.problems)
    };
    let tcp = |ports| Ok(Ports::OneOf(vec![PortMatch::Transport { protocol: Some(Transport::Tcp), ports }]));
    assert_eq!(ports(json!({})), tcp(PortSet::All));
    assert_eq!(ports(json!({"port": 80})), tcp(PortSet::Range(80, 80)));
    assert_eq!(ports(json!({"port": 80, "endPort": 90})), tcp(PortSet::Range(80, 90)));
    assert_eq!(ports(json!({"port": "http"})), tcp(PortSet::Named("http".into())));
    for bad in [
        json!({"port": "http", "endPort": 90}),
        json!({"endPort": 90}),
        json!({"port": 0}),
        json!({"port": 80, "protocol": "ICMP"}),
    ] {
        assert!(ports(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn kubernetes_peers_that_say_two_things_at_once_are_refused() {
    for (peer, says) in [
        (json!({}), "none of podSelector"),
        (json!({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}), "ipBlock excludes"),
        (json!({"ipBlock": {"cidr": "10.0.0.0/8", "exempt": []}}), "no such field"),
        (json!({"serviceSelector": {}}), "no such field"),
    ] {
        let parsed = kubernetes(json!({"podSelector": {}, "ingress": [{"from": [peer]}]}));
        assert!(parsed.rules[0].clauses.is_empty());
        assert!(parsed.problems[0].to_string().contains(says), "{}", parsed.problems[0]);
    }
}

#[test]
fn icmp_types_have_numbers_and_names_of_their_family() {
    let (found, problems) = clause(
        "ingress",
        json!({"icmps": [{"fields": [{"type": 8}, {"type": "EchoReply"}, {"family": "IPv6", "type": "EchoRequest"}]}]}),
    );
    assert_eq!(problems, []);
    let icmp = |family, kind| PortMatch::Icmp { family, kind };
    let types = vec![icmp(IcmpFamily::V4, 8), icmp(IcmpFamily::V4, 0), icmp(IcmpFamily::V6, 128)];
    assert_eq!(found, Some((Peers::All, Ports::OneOf(types))));
}

#[test]
fn too_much_is_refused_by_name_and_what_is_within_the_bound_is_kept_for_allows() {
    let many: Vec<Value> = (1..=41).map(|port| json!({"port": port.to_string()})).collect();
    let (allow, problems) = clause("ingress", json!({"toPorts": [{"ports": many}]}));
    assert!(matches!(allow, Some((Peers::All, Ports::OneOf(ports))) if ports.len() == MAX_PORTS));
    assert_eq!(problems[0].kind, ProblemKind::TooLarge);
    assert_eq!(problems[0].field, "spec.ingress[0].toPorts[0].ports");
    let (deny, _) = clause("ingressDeny", json!({"toPorts": [{"ports": many}]}));
    assert_eq!(deny, Some((Peers::All, Ports::All)));
    let rules: Vec<Value> = (0..=MAX_ELEMENTS).map(|_| json!({"fromEntities": ["host"]})).collect();
    let parsed = cnp(json!({"endpointSelector": {}, "ingressDeny": rules}));
    assert_eq!(parsed.rules[0].clauses.last().map(|clause| &clause.peers), Some(&Peers::All));
}

#[test]
fn what_the_definition_of_the_resource_has_is_what_is_read() {
    // Through the types that the schema is made of: a field that only one of both knows is a problem here.
    let rule: isthmus_crds::policy::Rule = serde_json::from_value(json!({
        "endpointSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "c", "operator": "Exists"}]},
        "ingress": [
            {"fromEndpoints": [{}]}, {"fromEntities": ["cluster"]}, {"fromCIDR": ["10.0.0.1"]},
            {"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]},
            {"toPorts": [{"ports": [{"port": "1", "endPort": 2, "protocol": "ANY"}]}]},
            {"icmps": [{"fields": [{"family": "IPv4", "type": 8}]}]},
        ],
        "ingressDeny": [{"fromEndpoints": [{}]}],
        "egress": [
            {"toEndpoints": [{}]}, {"toEntities": ["none"]}, {"toCIDR": ["10.0.0.0/8"]},
            {"toCIDRSet": [{"cidr": "fd00::/8"}]},
            {"toServices": [
                {"k8sService": {"serviceName": "a", "namespace": "b"}},
                {"k8sServiceSelector": {"selector": {}, "namespace": "c"}},
            ]},
        ],
        "egressDeny": [{"toEndpoints": [{}]}],
        "enableDefaultDeny": {"ingress": true, "egress": true},
        "description": "all that there is",
    }))
    .expect("a rule");
    assert!(rule.unknown.is_empty());
    let parsed = cnp(serde_json::to_value(&rule).expect("JSON"));
    assert_eq!(parsed.problems, []);
    assert_eq!(parsed.rules[0].clauses.len(), 6 + 1 + 5 + 1);
}

mod any_bytes {
    use proptest::prelude::*;

    use super::*;

    /// JSON out of the words of policies, so that it comes far.
    fn value() -> impl Strategy<Value = Value> {
        const WORDS: &[&str] = &[
            "endpointSelector",
            "nodeSelector",
            "ingress",
            "egressDeny",
            "fromEndpoints",
            "toEntities",
            "toCIDRSet",
            "cidr",
            "except",
            "toPorts",
            "ports",
            "port",
            "endPort",
            "protocol",
            "icmps",
            "fields",
            "type",
            "matchLabels",
            "matchExpressions",
            "key",
            "operator",
            "values",
            "podSelector",
            "policyTypes",
            "from",
            "ipBlock",
            "enableDefaultDeny",
            "k8sService",
            "toServices",
            "In",
            "TCP",
            "80",
            "10.0.0.0/8",
            "all",
            "x",
        ];
        let word = || prop::sample::select(WORDS);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            word().prop_map(Value::from),
        ];
        leaf.prop_recursive(6, 64, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((word(), inner), 0..5).prop_map(|fields| {
                    Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn nothing_that_a_user_can_write_ends_the_parser(specs in prop::collection::vec(value(), 0..3)) {
            for kind in PolicyKind::ALL {
                let parsed = policy(&name(kind), &specs);
                prop_assert!(parsed.rules.len() <= specs.len());
                for problem in &parsed.problems {
                    prop_assert!(problem.to_string().len() < 1000);
                }
            }
        }
    }
}
