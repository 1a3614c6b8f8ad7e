//! What comes out is a function of what went in last.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Something the engine is told.
#[derive(Clone, Debug)]
enum Step {
    Policy(u8, Option<Value>),
    Identity(u8, Option<u8>),
    Ports(u8, Option<u16>),
    Endpoint(u8, Option<u8>),
    Namespace(u8, bool),
    Service(u8, Option<u8>),
    /// Changes are taken.
    Take,
}

const APPS: [&str; 4] = ["web", "client", "db", "cache"];
const NAMESPACES: [&str; 2] = ["shop", "bank"];

fn selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({})),
        (0..4usize).prop_map(|app| json!({"matchLabels": {"app": APPS[app]}})),
        (0..4usize).prop_map(
            |app| json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": [APPS[app]]}]})
        ),
        Just(json!({"matchLabels": {"io.cilium.k8s.policy.cluster": "beta"}})),
        Just(json!({"matchLabels": {"io.cilium.k8s.namespace.labels.team": "bank"}})),
        Just(json!({"matchLabels": {"reserved:remote-node": ""}})),
    ]
}

fn peers(from: bool) -> impl Strategy<Value = Value> {
    let field = move |name: &str| format!("{}{name}", if from { "from" } else { "to" });
    prop_oneof![
        Just(json!({})),
        vec(selector(), 0..3).prop_map(move |list| json!({field("Endpoints"): list})),
        prop::sample::select(vec!["world", "cluster", "all", "host", "kube-apiserver", "world-ipv6"])
            .prop_map(move |entity| json!({field("Entities"): [entity]})),
        prop::sample::select(vec!["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "fd00::/8"])
            .prop_map(move |net| json!({field("CIDR"): [net]})),
        Just(json!({field("CIDRSet"): [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]})),
    ]
}

fn element(from: bool) -> impl Strategy<Value = Value> {
    let ports = prop_oneof![
        2 => Just(json!({})),
        1 => (1..12u16, 0..8u16)
            .prop_map(|(first, more)| json!({"toPorts": [{"ports": [{"port": first.to_string(), "endPort": first + more, "protocol": "TCP"}]}]})),
        1 => Just(json!({"toPorts": [{"ports": [{"port": "http"}]}]})),
        1 => Just(json!({"icmps": [{"fields": [{"type": 8}]}]})),
    ];
    (peers(from), ports, 0..12u8).prop_map(move |(mut peers, ports, service)| {
        if service == 0 && !from {
            peers = json!({"toServices": [{"k8sServiceSelector": {"selector": {}, "namespace": "bank"}}]});
        }
        let fields = peers.as_object_mut().expect("an object");
        fields.extend(ports.as_object().expect("an object").clone());
        peers
    })
}

fn policy() -> impl Strategy<Value = Value> {
    let lists = (
        vec(element(true), 0..3),
        vec(element(true), 0..2),
        vec(element(false), 0..3),
        vec(element(false), 0..2),
    );
    (selector(), lists, any::<Option<bool>>()).prop_map(|(subject, lists, default)| {
        let mut spec = json!({
            "endpointSelector": subject, "ingress": lists.0, "ingressDeny": lists.1, "egress": lists.2,
            "egressDeny": lists.3,
        });
        if let Some(default) = default {
            spec["enableDefaultDeny"] = json!({"ingress": default, "egress": !default});
        }
        spec
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4u8, prop::option::weighted(0.8, policy())).prop_map(|(name, spec)| Step::Policy(name, spec)),
        4 => (0..8u8, prop::option::weighted(0.8, 0..16u8)).prop_map(|(id, kind)| Step::Identity(id, kind)),
        1 => (0..8u8, prop::option::of(1..12u16)).prop_map(|(id, port)| Step::Ports(id, port)),
        2 => (0..3u8, prop::option::weighted(0.8, 0..8u8)).prop_map(|(id, kind)| Step::Endpoint(id, kind)),
        1 => (0..2u8, any::<bool>()).prop_map(|(name, labelled)| Step::Namespace(name, labelled)),
        1 => (0..3u8, prop::option::of(0..6u8)).prop_map(|(name, kind)| Step::Service(name, kind)),
        3 => Just(Step::Take),
    ]
}

/// Which directions are enforced, and the entries with their rules' names.
type NamedMap = (bool, bool, Vec<(PolicyKey, Effect, String)>);

/// An engine, and maps that are kept as its changes say.
struct Follower {
    engine: Engine,
    maps: BTreeMap<EndpointId, Resolved>,
    cidrs: BTreeMap<IpNet, CidrIdentity>,
}

impl Follower {
    fn new() -> Self {
        let engine = Engine::new(Settings::new("alpha".parse().expect("a cluster")));
        Self { engine, maps: BTreeMap::new(), cidrs: BTreeMap::new() }
    }

    fn tell(&mut self, step: &Step) {
        let engine = &mut self.engine;
        match step {
            Step::Policy(number, spec) => {
                let name = named(PolicyKind::ALL[1 + usize::from(number % 2)], &format!("p{number}"));
                let parsed = spec.as_ref().map(|spec| parse::policy(&name, std::slice::from_ref(spec)));
                engine.set_policy(name, parsed);
            }
            Step::Identity(number, kind) => engine.set_identity(identity(*number), kind.map(peer_labels)),
            Step::Ports(number, port) => {
                let mut ports = NamedPorts::new();
                if let Some(port) = port {
                    ports.insert("http", Transport::Tcp, *port);
                }
                engine.set_named_ports(identity(*number), ports);
            }
            Step::Endpoint(number, kind) => {
                let endpoint =
                    |kind: u8| subject(NAMESPACES[usize::from(kind % 2)], APPS[usize::from(kind / 2)]);
                engine.set_endpoint(EndpointId((*number).into()), kind.map(endpoint));
            }
            Step::Namespace(number, labelled) => {
                let name = NAMESPACES[usize::from(*number)];
                let labels = BTreeMap::from([("team".to_owned(), name.to_owned())]);
                engine.set_namespace(name, labelled.then_some(labels));
            }
            Step::Service(number, kind) => {
                let name = match number {
                    0 => ServiceName::new("default", "kubernetes"),
                    number => ServiceName::new("bank", &format!("s{number}")),
                };
                engine.set_service(name, kind.map(service));
            }
            Step::Take => self.take(),
        }
    }

    fn take(&mut self) {
        let changes = self.engine.take_changes();
        for (id, change) in changes.endpoints {
            match change {
                EndpointChange::Replace(resolved) => {
                    self.maps.insert(id, (*resolved).clone());
                }
                EndpointChange::Update { put, delete } => {
                    let map = self.maps.get_mut(&id).expect("an endpoint that was told of");
                    for key in delete {
                        assert!(map.entries.remove(&key).is_some(), "deleted what was not there: {key:?}");
                    }
                    for (key, decision) in put {
                        assert_ne!(
                            map.entries.insert(key, decision),
                            Some(decision),
                            "put what was there: {key:?}"
                        );
                    }
                }
                EndpointChange::Remove => {
                    self.maps.remove(&id);
                }
            }
        }
        for (net, identity) in changes.cidrs {
            match identity {
                Some(identity) => self.cidrs.insert(net, identity),
                None => self.cidrs.remove(&net),
            };
        }
        assert!(self.engine.take_changes().is_empty());
    }

    /// The maps with rules by their names.
    fn named_maps(&self) -> BTreeMap<EndpointId, NamedMap> {
        let name = |rule| self.engine.origin(rule).map_or_else(|| format!("{rule:?}"), ToString::to_string);
        self.maps
            .iter()
            .map(|(id, map)| {
                let entries = map
                    .entries
                    .iter()
                    .map(|(key, decision)| (*key, decision.effect, name(decision.rule)))
                    .collect();
                (*id, (map.ingress_enforced, map.egress_enforced, entries))
            })
            .collect()
    }
}

fn identity(number: u8) -> NumericIdentity {
    NumericIdentity(70_000 + u32::from(number))
}

fn peer_labels(kind: u8) -> Arc<Labels> {
    let bit = |at: u8| usize::from(kind >> at & 1);
    labels(["alpha", "beta"][bit(0)], NAMESPACES[bit(1)], APPS[usize::from(kind >> 2)])
}

fn service(kind: u8) -> Service {
    let mut service = Service::default();
    match kind {
        0..4 => drop(service.selector.insert("app".to_owned(), APPS[usize::from(kind)].to_owned())),
        kind => drop(service.backends.insert([10, 1, 0, kind].into())),
    }
    service
}

/// The last word on each subject, in another order, all at once.
fn last_words(steps: &[Step]) -> Vec<Step> {
    let mut last: BTreeMap<(u8, u8), Step> = BTreeMap::new();
    for step in steps {
        let subject = match step {
            Step::Policy(number, _) => (5, *number),
            Step::Identity(number, _) => (2, *number),
            Step::Ports(number, _) => (1, *number),
            Step::Endpoint(number, _) => (3, *number),
            Step::Namespace(number, _) => (4, *number),
            Step::Service(number, _) => (0, *number),
            Step::Take => continue,
        };
        last.insert(subject, step.clone());
    }
    last.into_values().rev().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_news_comes_to_what_is_worked_out_from_scratch(steps in vec(step(), 1..40)) {
        let mut follower = Follower::new();
        steps.iter().for_each(|step| follower.tell(step));
        follower.take();
        let mut fresh = Follower::new();
        last_words(&steps).iter().for_each(|step| fresh.tell(step));
        fresh.take();
        prop_assert_eq!(&follower.cidrs, &fresh.cidrs);
        prop_assert_eq!(follower.named_maps(), fresh.named_maps());
        for (id, map) in &follower.maps {
            let whole = follower.engine.resolved(*id);
            prop_assert_eq!(Some(map), whole.as_ref());
        }
        prop_assert_eq!(follower.engine.sizes(), fresh.engine.sizes());
    }

    #[test]
    fn an_explanation_agrees_with_the_map_and_with_the_rules(
        steps in vec(step(), 1..30),
        asked in vec((0..3u64, any::<bool>(), 0..12u8, prop_oneof![Just((6u8, 0..12u16)), Just((1, 8..9)), Just((47, 0..1))]), 1..20),
        port: u16,
    ) {
        let mut follower = Follower::new();
        steps.iter().for_each(|step| follower.tell(step));
        follower.take();
        for (endpoint, ingress, peer, (protocol, ports)) in asked {
            let port = ports.start + port % (ports.end - ports.start);
            let peer = match peer {
                0..8 => identity(peer),
                peer => follower.cidrs.values().nth(usize::from(peer) % follower.cidrs.len()).expect("world").identity,
            };
            let direction = if ingress { Direction::Ingress } else { Direction::Egress };
            let question = Question { endpoint: EndpointId(endpoint), direction, peer, protocol, port };
            let Some(explanation) = follower.engine.explain(&question) else { continue };
            let verdict = follower.maps[&question.endpoint].verdict(direction, peer, protocol, port);
            prop_assert_eq!((explanation.effect, explanation.rule), (verdict.effect, verdict.rule));
            let says = |effect| explanation.matching.iter().any(|origin| origin.effect == effect);
            let allowed = !says(Effect::Deny) && (says(Effect::Allow) || explanation.default_deny_by.is_empty());
            prop_assert_eq!(explanation.effect == Effect::Allow, allowed, "{:?}", explanation);
            if let Some(origin) = &explanation.origin {
                prop_assert!(explanation.matching.contains(origin), "{:?}", explanation);
            }
        }
    }
}
