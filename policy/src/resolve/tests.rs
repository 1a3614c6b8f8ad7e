use serde_json::{Value, json};

use super::*;
use crate::model::{Direction, Effect, PolicyKind, Transport};
use crate::parse;

mod property;

const TCP: u8 = 6;
const WEB: EndpointId = EndpointId(1);
const OTHER: EndpointId = EndpointId(2);

fn engine() -> Engine {
    engine_with(|_| {})
}

fn engine_with(change: impl FnOnce(&mut Settings)) -> Engine {
    let mut settings = Settings::new("alpha".parse().expect("a cluster"));
    change(&mut settings);
    let mut engine = Engine::new(settings);
    engine.set_endpoint(WEB, Some(subject("shop", "web")));
    engine.set_endpoint(OTHER, Some(subject("shop", "other")));
    for (id, cluster, namespace, app) in PEERS {
        engine.set_identity(NumericIdentity(id), Some(labels(cluster, namespace, app)));
    }
    engine
}

const CLIENT: NumericIdentity = NumericIdentity(70_001);
const STRANGER: NumericIdentity = NumericIdentity(70_002);
const ABROAD: NumericIdentity = NumericIdentity(140_001);
const BANK: NumericIdentity = NumericIdentity(70_003);
const PEERS: [(u32, &str, &str, &str); 4] = [
    (CLIENT.0, "alpha", "shop", "client"),
    (STRANGER.0, "alpha", "shop", "stranger"),
    (ABROAD.0, "beta", "shop", "client"),
    (BANK.0, "alpha", "bank", "client"),
];

fn labels(cluster: &str, namespace: &str, app: &str) -> Arc<Labels> {
    let cluster = cluster.parse().expect("a cluster");
    let pod = BTreeMap::from([("app".to_owned(), app.to_owned())]);
    let team = BTreeMap::from([("team".to_owned(), namespace.to_owned())]);
    Arc::new(identity_labels(&cluster, namespace, &team, &pod, ""))
}

fn subject(namespace: &str, app: &str) -> Subject {
    let mut named_ports = NamedPorts::new();
    named_ports.insert("http", Transport::Tcp, 8080);
    Subject {
        namespace: namespace.into(),
        labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        service_account: "".into(),
        named_ports,
    }
}

fn named(kind: PolicyKind, name: &str) -> PolicyName {
    let namespace = kind.is_namespaced().then(|| "shop".parse().expect("a namespace"));
    PolicyName { kind, namespace, name: name.parse().expect("a name") }
}

fn set(engine: &mut Engine, name: &str, spec: Value) {
    set_kind(engine, PolicyKind::CiliumNetworkPolicy, name, spec);
}

fn set_kind(engine: &mut Engine, kind: PolicyKind, name: &str, spec: Value) {
    let name = named(kind, name);
    let parsed = parse::policy(&name, &[spec]);
    assert_eq!(parsed.problems, []);
    engine.set_policy(name, Some(parsed));
}

/// What the endpoint `web` does with a packet.
fn verdict(engine: &Engine, direction: Direction, peer: NumericIdentity, port: u16) -> Decision {
    engine.resolved(WEB).expect("an endpoint").verdict(direction, peer, TCP, port)
}

fn comes(engine: &Engine, peer: NumericIdentity, port: u16) -> bool {
    verdict(engine, Direction::Ingress, peer, port).effect == Effect::Allow
}

fn goes(engine: &Engine, peer: NumericIdentity, port: u16) -> bool {
    verdict(engine, Direction::Egress, peer, port).effect == Effect::Allow
}

fn web() -> Value {
    json!({"matchLabels": {"app": "web"}})
}

#[test]
fn without_policies_everything_passes_and_the_maps_are_empty() {
    let mut engine = engine();
    let changes = engine.take_changes();
    assert_eq!(changes.endpoints.len(), 2);
    for (_, change) in changes.endpoints {
        assert_eq!(change, EndpointChange::Replace(Arc::new(Resolved::default())));
    }
    assert!(comes(&engine, STRANGER, 1) && goes(&engine, STRANGER, 1));
    assert!(engine.take_changes().is_empty());
}

#[test]
fn an_endpoint_is_told_of_its_rules_at_once_and_of_identities_one_by_one() {
    let mut engine = engine();
    engine.take_changes();
    set(
        &mut engine,
        "a",
        json!({"endpointSelector": web(), "ingress": [{"fromEndpoints": [{"matchLabels": {"app": "client"}}]}]}),
    );
    let changes = engine.take_changes();
    assert!(matches!(&changes.endpoints[..], [(WEB, EndpointChange::Replace(_))]), "{changes:?}");
    assert!(comes(&engine, CLIENT, 80) && !comes(&engine, STRANGER, 80) && !comes(&engine, ABROAD, 80));

    let another = NumericIdentity(70_009);
    let mut more = (*labels("alpha", "shop", "client")).clone();
    more.insert_k8s("version", "2").expect("a label");
    engine.set_identity(another, Some(Arc::new(more)));
    let changes = engine.take_changes();
    let [(WEB, EndpointChange::Update { put, delete })] = &changes.endpoints[..] else {
        panic!("{changes:?}")
    };
    assert_eq!((put.len(), delete.len()), (1, 0));
    assert_eq!(put[0].0.identity, another);

    engine.set_identity(another, Some(labels("alpha", "shop", "stranger")));
    let changes = engine.take_changes();
    let [(WEB, EndpointChange::Update { put, delete })] = &changes.endpoints[..] else {
        panic!("{changes:?}")
    };
    assert_eq!((put.len(), delete.len()), (0, 1));
}

#[test]
fn an_identity_that_no_rule_selects_touches_nobody() {
    let mut engine = engine();
    set(&mut engine, "a", json!({"endpointSelector": web(), "ingress": [{"fromEndpoints": [web()]}]}));
    engine.take_changes();
    engine.set_identity(NumericIdentity(70_010), Some(labels("alpha", "bank", "web")));
    engine.set_identity(STRANGER, None);
    assert!(engine.take_changes().is_empty());
}

#[test]
fn a_policy_that_changes_nothing_for_an_endpoint_does_not_touch_it() {
    let mut engine = engine();
    let spec = json!({"endpointSelector": web(), "ingress": [{"fromEndpoints": [{}]}]});
    set(&mut engine, "a", spec.clone());
    engine.take_changes();
    set(&mut engine, "b", spec.clone());
    assert!(engine.take_changes().is_empty(), "the first rule that says it is the one that is named");
    engine.set_policy(named(PolicyKind::CiliumNetworkPolicy, "a"), None);
    assert_eq!(engine.take_changes().endpoints.len(), 1, "now it is another rule");
    assert_eq!(engine.selected_by(&named(PolicyKind::CiliumNetworkPolicy, "b")), 1);
}

#[test]
fn endpoints_that_are_alike_share_one_map() {
    let mut engine = engine();
    engine.set_endpoint(EndpointId(3), Some(subject("shop", "web")));
    set(&mut engine, "a", json!({"endpointSelector": web(), "ingress": [{"fromEndpoints": [{}]}]}));
    let changes = engine.take_changes();
    let maps: Vec<&Arc<Resolved>> = changes
        .endpoints
        .iter()
        .filter_map(|(id, change)| match change {
            EndpointChange::Replace(resolved) if *id != OTHER => Some(resolved),
            _ => None,
        })
        .collect();
    assert!(maps.len() == 2 && Arc::ptr_eq(maps[0], maps[1]));
}

#[test]
fn a_rule_is_found_by_the_number_in_the_map_until_its_policy_is_gone() {
    let mut engine = engine();
    let spec = |port: &str| json!({"endpointSelector": web(), "ingress": [{}, {"toPorts": [{"ports": [{"port": port}]}]}]});
    set(&mut engine, "a", spec("80"));
    engine.take_changes();
    let rule = verdict(&engine, Direction::Ingress, CLIENT, 80).rule;
    assert_eq!(
        engine.origin(rule).map(ToString::to_string).as_deref(),
        Some("ciliumnetworkpolicy/shop/a ingress[1]")
    );
    set(&mut engine, "a", spec("81"));
    engine.take_changes();
    assert_eq!(verdict(&engine, Direction::Ingress, CLIENT, 81).rule, rule, "the same rule, changed");
    engine.set_policy(named(PolicyKind::CiliumNetworkPolicy, "a"), None);
    assert_eq!(engine.origin(rule), None);
    set(&mut engine, "a", spec("80"));
    engine.take_changes();
    assert_ne!(verdict(&engine, Direction::Ingress, CLIENT, 80).rule, rule, "a number is never given twice");
}

#[test]
fn names_of_ports_are_the_endpoints_own_for_what_comes_and_the_peers_for_what_goes() {
    let mut engine = engine();
    let http = json!([{"ports": [{"port": "HTTP", "protocol": "TCP"}]}]);
    set(
        &mut engine,
        "a",
        json!({"endpointSelector": web(), "ingress": [{"toPorts": http}], "egress": [{"toPorts": http}]}),
    );
    engine.take_changes();
    assert!(comes(&engine, CLIENT, 8080) && !comes(&engine, CLIENT, 80));
    assert!(!goes(&engine, CLIENT, 8080), "nobody has said how the peer calls its ports");
    let mut ports = NamedPorts::new();
    ports.insert("http", Transport::Tcp, 9090);
    engine.set_named_ports(CLIENT, ports);
    assert_eq!(engine.take_changes().endpoints.len(), 1);
    assert!(goes(&engine, CLIENT, 9090) && !goes(&engine, CLIENT, 8080) && !goes(&engine, STRANGER, 9090));
    engine.set_named_ports(CLIENT, NamedPorts::new());
    engine.take_changes();
    assert!(!goes(&engine, CLIENT, 9090));
}

#[test]
fn prefixes_have_identities_of_their_own_and_the_longest_counts() {
    let mut engine = engine();
    set(
        &mut engine,
        "a",
        json!({"endpointSelector": web(),
            "egress": [{"toCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]}, {"toCIDR": ["10.1.2.0/24"]}]}),
    );
    let cidrs: BTreeMap<IpNet, NumericIdentity> = engine
        .take_changes()
        .cidrs
        .into_iter()
        .filter_map(|(net, identity)| Some((net, identity?.identity)))
        .collect();
    let identity = |net: &str| cidrs[&net.parse().expect("a prefix")];
    assert_eq!(cidrs.len(), 2 + 3);
    assert_eq!(identity("0.0.0.0/0"), cidrs::WORLD_IPV4);
    assert!(identity("10.0.0.0/8").0 >= 1 << 24);
    assert!(goes(&engine, identity("10.0.0.0/8"), 80));
    assert!(!goes(&engine, identity("10.1.0.0/16"), 80));
    assert!(goes(&engine, identity("10.1.2.0/24"), 80), "allowed by its own rule");
    assert!(!goes(&engine, cidrs::WORLD_IPV4, 80) && !goes(&engine, CLIENT, 80));

    engine.set_policy(named(PolicyKind::CiliumNetworkPolicy, "a"), None);
    let gone = engine.take_changes().cidrs;
    assert_eq!(gone.len(), 3);
    assert!(gone.iter().all(|(_, identity)| identity.is_none()));
    set(&mut engine, "b", json!({"endpointSelector": web(), "egress": [{"toCIDR": ["10.0.0.0/8"]}]}));
    let again = engine.take_changes().cidrs;
    assert_eq!(again[0].1.map(|it| it.identity), Some(identity("10.0.0.0/8")), "the same number again");
}

#[test]
fn the_world_is_every_prefix_and_both_families_and_no_pod() {
    let mut engine = engine();
    set(&mut engine, "a", json!({"endpointSelector": web(), "egress": [{"toEntities": ["world-ipv4"]}]}));
    set(
        &mut engine,
        "b",
        json!({"endpointSelector": web(), "egressDeny": [{"toCIDR": ["192.0.2.0/24", "2001:db8::/32"]}]}),
    );
    let cidrs = engine.take_changes().cidrs;
    let identity = |ipv4: bool, length: u8| {
        let (_, identity) = cidrs
            .iter()
            .find(|(net, _)| net.addr().is_ipv4() == ipv4 && net.prefix_len() == length)
            .expect("a prefix");
        identity.expect("an identity").identity
    };
    assert!(goes(&engine, identity(true, 0), 1) && !goes(&engine, identity(false, 0), 1));
    assert!(!goes(&engine, identity(true, 24), 1) && !goes(&engine, identity(false, 32), 1));
    assert!(!goes(&engine, CLIENT, 1));
}

#[test]
fn services_stand_for_the_pods_they_select_or_the_addresses_behind_them() {
    let mut engine = engine();
    set(
        &mut engine,
        "a",
        json!({"endpointSelector": web(), "egress": [
            {"toServices": [{"k8sService": {"serviceName": "clients", "namespace": "bank"}}]},
            {"toServices": [{"k8sServiceSelector": {"selector": {"matchLabels": {"tier": "db"}}}}]},
        ]}),
    );
    engine.take_changes();
    assert!(!goes(&engine, BANK, 80));
    let by_labels = Service { selector: [("app".into(), "client".into())].into(), ..Service::default() };
    engine.set_service(ServiceName::new("bank", "clients"), Some(by_labels));
    let outside = Service {
        labels: [("tier".into(), "db".into())].into(),
        backends: ["192.0.2.7".parse().expect("an address")].into(),
        ..Service::default()
    };
    engine.set_service(ServiceName::new("shop", "database"), Some(outside.clone()));
    engine.set_service(ServiceName::new("bank", "database"), Some(outside));
    let cidrs = engine.take_changes().cidrs;
    assert_eq!(cidrs.len(), 1);
    assert!(goes(&engine, BANK, 80) && !goes(&engine, CLIENT, 80));
    assert!(goes(&engine, cidrs[0].1.expect("an identity").identity, 5432));
    engine.set_service(ServiceName::new("shop", "database"), None);
    engine.set_service(ServiceName::new("bank", "clients"), None);
    assert_eq!(engine.take_changes().cidrs, [(cidrs[0].0, None)]);
    assert!(!goes(&engine, BANK, 80));
}

#[test]
fn the_kubernetes_api_is_what_is_behind_its_own_service() {
    let mut engine = engine();
    set(&mut engine, "a", json!({"endpointSelector": web(), "egress": [{"toEntities": ["kube-apiserver"]}]}));
    engine.take_changes();
    let api = Service { backends: ["203.0.113.1".parse().expect("an address")].into(), ..Service::default() };
    engine.set_service(ServiceName::new("default", "kubernetes"), Some(api));
    let cidrs = engine.take_changes().cidrs;
    let identity = cidrs[0].1.expect("an identity");
    assert!(identity.kube_apiserver && goes(&engine, identity.identity, 6443));
    assert!(goes(&engine, NumericIdentity::KUBE_APISERVER, 6443));
    assert!(!goes(&engine, cidrs::WORLD_IPV4, 6443));
    engine.set_service(ServiceName::new("default", "kubernetes"), None);
    assert_eq!(engine.take_changes().cidrs, [(cidrs[0].0, None)]);
}

#[test]
fn the_cluster_is_the_own_one_and_the_nodes_of_all() {
    let mut engine = engine();
    set(&mut engine, "a", json!({"endpointSelector": web(), "ingress": [{"fromEntities": ["cluster"]}]}));
    engine.take_changes();
    assert!(
        comes(&engine, CLIENT, 1)
            && comes(&engine, BANK, 1)
            && comes(&engine, NumericIdentity::REMOTE_NODE, 1)
    );
    assert!(!comes(&engine, ABROAD, 1) && !comes(&engine, NumericIdentity::WORLD, 1));
}

#[test]
fn peers_are_of_the_own_cluster_unless_they_say_so_or_the_mesh_is_one_cluster() {
    let from = |engine: &mut Engine, selector: Value| {
        set(engine, "a", json!({"endpointSelector": web(), "ingress": [{"fromEndpoints": [selector]}]}));
        engine.take_changes();
        [CLIENT, ABROAD, BANK].map(|peer| comes(engine, peer, 1))
    };
    let client = json!({"matchLabels": {"app": "client"}});
    assert_eq!(from(&mut engine(), client.clone()), [true, false, false]);
    let mut one_cluster = engine_with(|settings| settings.policy_default_local_cluster = false);
    assert_eq!(from(&mut one_cluster, client), [true, true, false]);
    let beta = json!({"matchLabels": {"io.cilium.k8s.policy.cluster": "beta"}});
    assert_eq!(from(&mut engine(), beta), [false, true, false]);
    let anywhere =
        json!({"matchExpressions": [{"key": "k8s:io.cilium.k8s.policy.cluster", "operator": "Exists"}]});
    assert_eq!(from(&mut engine(), anywhere), [true, true, false]);
    let team = json!({"matchLabels": {"io.cilium.k8s.namespace.labels.team": "bank"}});
    assert_eq!(from(&mut engine(), team), [false, false, true]);
}

#[test]
fn a_node_reaches_its_pods_whatever_policies_say() {
    let mut engine = engine();
    set(
        &mut engine,
        "a",
        json!({"endpointSelector": web(), "ingressDeny": [{"fromEntities": ["all", "host"]}]}),
    );
    engine.take_changes();
    assert_eq!(verdict(&engine, Direction::Ingress, NumericIdentity::HOST, 1).rule, RuleId::HOST);
    assert!(!comes(&engine, NumericIdentity::REMOTE_NODE, 1));
}

#[test]
fn enforcement_can_be_for_all_or_for_none() {
    let policy = json!({"endpointSelector": web(), "ingressDeny": [{"fromEndpoints": [{}]}]});
    let mut always = engine_with(|settings| settings.enforcement = Enforcement::Always);
    always.take_changes();
    assert!(!comes(&always, CLIENT, 1) && !goes(&always, CLIENT, 1));
    let mut never = engine_with(|settings| settings.enforcement = Enforcement::Never);
    set(&mut never, "a", policy.clone());
    never.take_changes();
    assert!(comes(&never, CLIENT, 1) && goes(&never, CLIENT, 1));
    assert_eq!(never.resolved(WEB), Some(Resolved::default()));
}

#[test]
fn a_policy_without_default_deny_forbids_and_restricts_nothing_else() {
    let mut engine = engine();
    set(
        &mut engine,
        "a",
        json!({"endpointSelector": web(), "enableDefaultDeny": {"ingress": false},
            "ingressDeny": [{"fromEndpoints": [{"matchLabels": {"app": "stranger"}}]}]}),
    );
    engine.take_changes();
    assert!(
        comes(&engine, CLIENT, 1) && comes(&engine, cidrs::WORLD_IPV6, 1) && !comes(&engine, STRANGER, 1)
    );
    assert_eq!(verdict(&engine, Direction::Ingress, CLIENT, 1).rule, RuleId::NOT_RESTRICTED);
    assert_eq!(engine.resolved(WEB).expect("an endpoint").entries.len(), 2);
}

#[test]
fn labels_of_a_namespace_count_for_its_endpoints_as_soon_as_they_are_known() {
    let mut engine = engine();
    set_kind(
        &mut engine,
        PolicyKind::CiliumClusterwideNetworkPolicy,
        "a",
        json!({"endpointSelector": {"matchLabels": {"io.cilium.k8s.namespace.labels.locked": "yes"}}, "ingress": [{}]}),
    );
    engine.take_changes();
    assert!(comes(&engine, CLIENT, 1));
    engine.set_namespace("shop", Some(BTreeMap::from([("locked".to_owned(), "yes".to_owned())])));
    assert_eq!(engine.take_changes().endpoints.len(), 2);
    assert!(!comes(&engine, CLIENT, 1));
    engine.set_namespace("shop", None);
    engine.take_changes();
    assert!(comes(&engine, CLIENT, 1));
}

#[test]
fn an_endpoint_that_goes_and_comes_back_is_told_everything_again() {
    let mut engine = engine();
    engine.take_changes();
    engine.set_endpoint(WEB, None);
    assert_eq!(engine.take_changes().endpoints, [(WEB, EndpointChange::Remove)]);
    assert_eq!(engine.resolved(WEB), None);
    engine.set_endpoint(WEB, Some(subject("shop", "web")));
    engine.set_endpoint(WEB, None);
    assert_eq!(engine.take_changes().endpoints, [(WEB, EndpointChange::Remove)]);
    engine.set_endpoint(WEB, Some(subject("shop", "web")));
    assert!(matches!(engine.take_changes().endpoints[..], [(WEB, EndpointChange::Replace(_))]));
}

#[test]
fn fixed_identities_cannot_be_taken_over() {
    let mut engine = engine();
    set(&mut engine, "a", json!({"endpointSelector": web(), "ingress": [{"fromEndpoints": [{}]}]}));
    for id in [2, 6, 10, 1 << 24] {
        engine.set_identity(NumericIdentity(id), Some(labels("alpha", "shop", "client")));
    }
    engine.take_changes();
    assert!(comes(&engine, CLIENT, 1));
    assert!([2, 6, 10, 1 << 24].iter().all(|id| !comes(&engine, NumericIdentity(*id), 1)));
}

#[test]
fn an_explanation_names_what_decides_and_everything_that_is_about_the_packet() {
    let mut engine = engine();
    set(&mut engine, "a", json!({"endpointSelector": web(), "ingress": [{"fromEndpoints": [{}]}]}));
    set(
        &mut engine,
        "b",
        json!({"endpointSelector": web(), "ingressDeny": [{"toPorts": [{"ports": [{"port": "80", "endPort": 90}]}]}]}),
    );
    engine.take_changes();
    let ask = |port| {
        let question =
            Question { endpoint: WEB, direction: Direction::Ingress, peer: CLIENT, protocol: TCP, port };
        engine.explain(&question).expect("an endpoint")
    };
    let denied = ask(85);
    assert_eq!(denied.effect, Effect::Deny);
    assert_eq!(
        denied.origin.map(|origin| origin.to_string()).as_deref(),
        Some("ciliumnetworkpolicy/shop/b ingressDeny[0]")
    );
    assert_eq!(denied.matching.len(), 2);
    assert_eq!(denied.default_deny_by.len(), 2);
    let allowed = ask(91);
    assert_eq!((allowed.effect, allowed.matching.len()), (Effect::Allow, 1));
    let json = serde_json::to_value(&allowed).expect("JSON");
    assert_eq!(json["matching"][0]["policy"], "ciliumnetworkpolicy/shop/a");
}
