//! The engine in a world of the reference.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use isthmus_policy::model::{Direction, Effect, Transport};
use isthmus_policy::resolve::{
    Changes, EndpointChange, EndpointId, Engine, Explanation, NamedPorts, Question, Resolved, Service,
    ServiceName, Settings, Subject,
};
use isthmus_policy::{PolicyKind, PolicyName, parse};
use isthmus_policy_truth as truth;
use isthmus_wire::{Labels, NumericIdentity};
use truth::{Kind, Packet, Peer, Pod, Policy, World};

/// An engine, and everything that it has said so far, applied as its user would.
pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) endpoints: BTreeMap<EndpointId, Resolved>,
    pub(crate) cidrs: BTreeMap<IpNet, NumericIdentity>,
}

impl Node {
    /// Knows all of the world.
    pub(crate) fn of(world: &World) -> Self {
        let mut node = Self::empty(world);
        for (name, labels) in &world.namespaces {
            node.engine.set_namespace(name, Some(labels.clone()));
        }
        for service in &world.services {
            node.set_service(service);
        }
        for pod in &world.pods {
            node.set_pod(pod);
        }
        for policy in &world.policies {
            node.set_policy(policy);
        }
        node.take();
        node
    }

    /// Whether its policies are valid: what is left of one need not be.
    pub(crate) fn can_be_of(world: &World) -> bool {
        world.policies.iter().all(|policy| {
            let problems = parse::policy(&name(policy), &policy.specs).problems;
            problems.is_empty() != policy.specs.iter().any(truth::asks_for_more)
        })
    }

    pub(crate) fn empty(world: &World) -> Self {
        let mut settings = Settings::new(world.cluster.parse().expect("a name of a cluster"));
        settings.policy_default_local_cluster = world.default_local_cluster;
        Self { engine: Engine::new(settings), endpoints: BTreeMap::new(), cidrs: BTreeMap::new() }
    }

    pub(crate) fn set_service(&mut self, service: &truth::Service) {
        let name = ServiceName::new(&service.namespace, &service.name);
        let (labels, selector) = (service.labels.clone(), service.selector.clone());
        self.engine.set_service(name, Some(Service { labels, selector, ..Service::default() }));
    }

    /// A pod's identity and, if it is here, its endpoint.
    pub(crate) fn set_pod(&mut self, pod: &Pod) {
        let identity = NumericIdentity(pod.identity);
        self.engine.set_identity(identity, Some(Arc::new(labels(pod))));
        self.engine.set_named_ports(identity, named_ports(pod));
        if pod.here {
            self.engine.set_endpoint(endpoint(pod), Some(subject(pod)));
        }
    }

    pub(crate) fn remove_pod(&mut self, pod: &Pod) {
        let identity = NumericIdentity(pod.identity);
        self.engine.set_identity(identity, None);
        self.engine.set_named_ports(identity, NamedPorts::new());
        if pod.here {
            self.engine.set_endpoint(endpoint(pod), None);
        }
    }

    pub(crate) fn set_policy(&mut self, policy: &Policy) {
        let name = name(policy);
        let parsed = parse::policy(&name, &policy.specs);
        let asks_for_more = policy.specs.iter().any(truth::asks_for_more);
        assert_eq!(!parsed.problems.is_empty(), asks_for_more, "{parsed:#?}\n{:#?}", policy.specs);
        self.engine.set_policy(name, Some(parsed));
    }

    pub(crate) fn remove_policy(&mut self, policy: &Policy) {
        self.engine.set_policy(name(policy), None);
    }

    /// Takes in what the engine says, and hands it on.
    pub(crate) fn take(&mut self) -> Changes {
        let changes = self.engine.take_changes();
        for (id, change) in &changes.endpoints {
            match change {
                EndpointChange::Replace(resolved) => drop(self.endpoints.insert(*id, (**resolved).clone())),
                EndpointChange::Update { put, delete } => {
                    let entries =
                        &mut self.endpoints.get_mut(id).expect("an endpoint comes whole first").entries;
                    for key in delete {
                        assert!(entries.remove(key).is_some(), "deleted what was not there: {key:?}");
                    }
                    entries.extend(put.iter().copied());
                }
                EndpointChange::Remove => drop(self.endpoints.remove(id)),
            }
        }
        for (prefix, identity) in &changes.cidrs {
            match identity {
                Some(identity) => drop(self.cidrs.insert(*prefix, identity.identity)),
                None => drop(self.cidrs.remove(prefix)),
            }
        }
        changes
    }

    /// The identity that the datapath gives to the other side.
    pub(crate) fn identity(&self, world: &World, packet: &Packet) -> NumericIdentity {
        match packet.peer {
            Peer::Pod(index) => NumericIdentity(world.pods[index].identity),
            Peer::Reserved(reserved) => NumericIdentity(reserved.identity()),
            Peer::Outside(address) => self.outside(address),
        }
    }

    /// Whether the endpoint's map, looked up in user space, lets the packet pass.
    pub(crate) fn allows(&self, world: &World, packet: &Packet) -> bool {
        let pod = &world.pods[packet.pod];
        let resolved = self.endpoints.get(&endpoint(pod)).expect("every pod that is here has rules");
        let peer = self.identity(world, packet);
        let decision = resolved.verdict(direction(packet), peer, packet.protocol.number(), packet.port);
        decision.effect == Effect::Allow
    }

    /// What the engine says without a map.
    pub(crate) fn explain(&self, world: &World, packet: &Packet) -> Explanation {
        let question = Question {
            endpoint: endpoint(&world.pods[packet.pod]),
            direction: direction(packet),
            peer: self.identity(world, packet),
            protocol: packet.protocol.number(),
            port: packet.port,
        };
        self.engine.explain(&question).expect("every pod that is here can be asked about")
    }

    fn outside(&self, address: IpAddr) -> NumericIdentity {
        let covering = self.cidrs.iter().filter(|(prefix, _)| prefix.contains(&address));
        let longest = covering.max_by_key(|(prefix, _)| prefix.prefix_len());
        longest.map_or(NumericIdentity::WORLD, |(_, identity)| *identity)
    }
}

pub(crate) fn direction(packet: &Packet) -> Direction {
    match packet.direction {
        truth::Direction::Ingress => Direction::Ingress,
        truth::Direction::Egress => Direction::Egress,
    }
}

pub(crate) fn endpoint(pod: &Pod) -> EndpointId {
    EndpointId(pod.identity.into())
}

fn name(policy: &Policy) -> PolicyName {
    let kind = match policy.kind {
        Kind::NetworkPolicy => PolicyKind::NetworkPolicy,
        Kind::CiliumNetworkPolicy => PolicyKind::CiliumNetworkPolicy,
        Kind::CiliumClusterwideNetworkPolicy => PolicyKind::CiliumClusterwideNetworkPolicy,
    };
    PolicyName {
        kind,
        namespace: (!policy.namespace.is_empty()).then(|| policy.namespace.parse().expect("a namespace")),
        name: policy.name.parse().expect("a name"),
    }
}

fn labels(pod: &Pod) -> Labels {
    let mut labels = Labels::new();
    for (label, value) in &pod.labels {
        let (source, key) = label.split_once(':').expect("a source and a key");
        labels.insert(source, key, value).expect("a plain label");
    }
    labels
}

fn named_ports(pod: &Pod) -> NamedPorts {
    let mut ports = NamedPorts::new();
    for (name, (protocol, port)) in &pod.named_ports {
        let protocol = match protocol {
            truth::Protocol::Tcp => Transport::Tcp,
            truth::Protocol::Udp => Transport::Udp,
            truth::Protocol::Sctp => Transport::Sctp,
            other => panic!("{other} has no ports"),
        };
        ports.insert(name, protocol, *port);
    }
    ports
}

/// As the Pod object would describe it: what the engine adds by itself is left out.
fn subject(pod: &Pod) -> Subject {
    let own =
        |label: &str| label.strip_prefix("k8s:").filter(|key| !key.starts_with("io.")).map(str::to_owned);
    Subject {
        namespace: pod.namespace().into(),
        labels: pod.labels.iter().filter_map(|(key, value)| Some((own(key)?, value.clone()))).collect(),
        service_account: pod.label("io.cilium.k8s.policy.serviceaccount").unwrap_or_default().into(),
        named_ports: named_ports(pod),
    }
}
