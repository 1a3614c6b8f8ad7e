//! Whatever way the events took, the keys are those that a fresh start finds.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::*;
use super::{World, fact, identity};
use crate::exporter::facts::NetworkPolicy;

/// The Kubernetes API, its objects as JSON.
#[derive(Clone, Debug, Default)]
struct Cluster {
    objects: BTreeMap<(Kind, u8), Value>,
    identities: BTreeMap<u32, LabelSet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Namespace,
    Service,
    Slice,
    Node,
    Pod,
    Policy,
    Identity,
}

const KINDS: [Kind; 7] =
    [Kind::Namespace, Kind::Service, Kind::Slice, Kind::Node, Kind::Pod, Kind::Policy, Kind::Identity];

/// Something that happens.
#[derive(Clone, Debug)]
enum Step {
    /// An object is created or changed; the watch tells it so many times, perhaps not at all.
    Put { kind: Kind, which: u8, variant: u8, told: u8 },
    /// An object is deleted.
    Delete { kind: Kind, which: u8, told: u8 },
    /// Somebody deletes an identity.
    DeleteIdentity { nth: u8, told: u8 },
    /// Somebody else gives a label set that has a number a second one.
    DuplicateIdentity { nth: u8, id: u8, told: u8 },
    /// A list, which may break off.
    List { kind: Kind, complete: bool },
    /// The API answers one request.
    Answer,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop::sample::select(&KINDS[..6]);
    let told = prop_oneof![6 => Just(1u8), 1 => Just(0), 1 => Just(2)];
    let step = prop_oneof![
        8 => (kind.clone(), 0..4u8, 0..8u8, told.clone())
            .prop_map(|(kind, which, variant, told)| Step::Put { kind, which, variant, told }),
        3 => (kind, 0..4u8, told.clone()).prop_map(|(kind, which, told)| Step::Delete { kind, which, told }),
        1 => (0..4u8, told.clone()).prop_map(|(nth, told)| Step::DeleteIdentity { nth, told }),
        1 => (0..4u8, any::<u8>(), told).prop_map(|(nth, id, told)| Step::DuplicateIdentity { nth, id, told }),
        2 => (prop::sample::select(&KINDS[..]), any::<bool>())
            .prop_map(|(kind, complete)| Step::List { kind, complete }),
        4 => Just(Step::Answer),
    ];
    prop::collection::vec(step, 1..60)
}

fn object(kind: Kind, which: u8, variant: u8) -> Value {
    let (namespace, bit) = (format!("ns-{}", which % 2), |n: u8| variant >> n & 1 == 1);
    match kind {
        Kind::Namespace => json!({"metadata": {
            "name": namespace, "labels": {"team": format!("{}", variant % 2)},
            "annotations": if bit(1) { json!({"clustermesh.cilium.io/global": bit(2).to_string()}) } else { json!({}) },
        }}),
        Kind::Service => json!({
            "metadata": {"namespace": namespace, "name": format!("svc-{}", which / 2), "annotations": {
                "service.cilium.io/global": bit(0).to_string(), "service.cilium.io/shared": bit(1).to_string(),
            }},
            "spec": {"clusterIP": if bit(2) { "None".to_owned() } else { format!("10.96.0.{which}") },
                     "ports": [{"port": 80}]},
        }),
        Kind::Slice => json!({
            "metadata": {"namespace": namespace, "name": format!("slice-{which}"),
                         "labels": {"kubernetes.io/service-name": format!("svc-{}", variant % 2)}},
            "addressType": "IPv4", "ports": [{"port": 8080 + i32::from(variant)}],
            "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": bit(1)}},
                          {"addresses": [format!("10.0.0.{}", variant + 2)]}],
        }),
        Kind::Node => json!({
            "metadata": {"name": format!("node-{}", which % 2)}, "spec": {"podCIDR": format!("10.{variant}.0.0/24")},
            "status": {"addresses": [{"type": "InternalIP", "address": format!("172.18.0.{variant}")}]},
        }),
        Kind::Pod => json!({
            "metadata": {"namespace": namespace, "name": format!("pod-{which}"), "labels": {"app": format!("{}", variant % 3)},
                         "creationTimestamp": format!("2026-01-01T00:00:0{}Z", variant % 4)},
            "spec": {"containers": [], "nodeName": format!("node-{}", variant % 2), "hostNetwork": variant == 7},
            "status": {"phase": if variant == 6 { "Succeeded" } else { "Running" },
                       "podIP": format!("10.0.0.{}", variant % 3), "hostIP": "192.0.2.1"},
        }),
        Kind::Policy => json!({
            "metadata": {"namespace": namespace, "name": format!("policy-{which}"), "uid": format!("{}", variant % 2),
                         "generation": variant},
            "spec": {"podSelector": {"matchLabels": {"app": format!("{}", variant % 3)}}},
        }),
        Kind::Identity => unreachable!("identities are not made by steps"),
    }
}

/// The object's name, which several values of `which` may share.
fn index(kind: Kind, which: u8) -> u8 {
    if matches!(kind, Kind::Namespace | Kind::Node) { which % 2 } else { which }
}

fn event(kind: Kind, object: Value, wrap: Wrap) -> Input {
    macro_rules! wrap {
        ($variant:ident, $kind:ty) => {{
            let fact = fact::<$kind>(object);
            let name = crate::exporter::facts::Fact::name(&fact).clone();
            Input::$variant(match wrap {
                Wrap::Listed => Event::Listed(fact),
                Wrap::Applied => Event::Applied(fact),
                Wrap::Deleted => Event::Deleted { name, uid: String::new() },
            })
        }};
    }
    match kind {
        Kind::Namespace => wrap!(Namespace, Namespace),
        Kind::Service => wrap!(Service, Service),
        Kind::Slice => wrap!(Slice, EndpointSlice),
        Kind::Node => wrap!(Node, Node),
        Kind::Pod => wrap!(Endpoint, Pod),
        Kind::Policy => {
            let fact = fact::<NetworkPolicy>(object);
            let (name, uid) = (fact.name.clone(), String::new());
            Input::Policy(
                PolicyKind::NetworkPolicy,
                match wrap {
                    Wrap::Listed => Event::Listed(fact),
                    Wrap::Applied => Event::Applied(fact),
                    Wrap::Deleted => Event::Deleted { name, uid },
                },
            )
        }
        Kind::Identity => unreachable!("identities are not JSON here"),
    }
}

#[derive(Clone, Copy)]
enum Wrap {
    Listed,
    Applied,
    Deleted,
}

fn mark(kind: Kind, begins: bool) -> Input {
    macro_rules! mark {
        ($($kind:ident => $variant:ident),+) => {
            match kind {
                Kind::Policy => Input::Policy(
                    PolicyKind::NetworkPolicy,
                    if begins { Event::ListBegins } else { Event::ListEnds },
                ),
                $(Kind::$kind => Input::$variant(if begins { Event::ListBegins } else { Event::ListEnds }),)+
            }
        };
    }
    mark!(Namespace => Namespace, Service => Service, Slice => Slice, Node => Node, Pod => Endpoint, Identity => Identity)
}

impl Cluster {
    fn list(&self, kind: Kind, complete: bool, world: &mut World) {
        world.apply(mark(kind, true));
        if kind == Kind::Identity {
            for (id, labels) in &self.identities {
                world.apply(Input::Identity(Event::Listed(identity(*id, labels))));
            }
        }
        for ((_, _), object) in self.objects.iter().filter(|((of, _), _)| *of == kind) {
            world.apply(event(kind, object.clone(), Wrap::Listed));
        }
        if complete {
            world.apply(mark(kind, false));
        }
    }

    /// Answers what was asked first.
    fn answer(&mut self, world: &mut World) -> bool {
        if world.asked.is_empty() {
            return false;
        }
        match world.asked.remove(0) {
            IdentityAction::Create { id, labels } => {
                let stored = self.identities.entry(id).or_insert(labels);
                world.apply(Input::Identity(Event::Applied(identity(id, stored))));
            }
            IdentityAction::Delete { .. } => unreachable!("no garbage is collected here"),
        }
        true
    }
}

/// A cluster without the definitions of Cilium's kinds of policies.
fn no_cilium_policies(world: &mut World) {
    for kind in [PolicyKind::CiliumNetworkPolicy, PolicyKind::CiliumClusterwideNetworkPolicy] {
        world.apply(Input::Policy(kind, Event::ListEnds));
    }
}

fn deleted(id: u32) -> Input {
    Input::Identity(Event::Deleted { name: Name::new("", &id.to_string()), uid: String::new() })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_way_of_events_ends_in_the_keys_of_a_fresh_start(steps in steps()) {
        let mut cluster = Cluster::default();
        let mut world = World::new(true);
        // Kinds whose watch has lost something, or never had a list.
        let mut stale: BTreeSet<Kind> = KINDS.into_iter().collect();
        for step in steps {
            match step {
                Step::Put { kind, which, variant, told } => {
                    let object = object(kind, which, variant);
                    cluster.objects.insert((kind, index(kind, which)), object.clone());
                    (0..told).for_each(|_| world.apply(event(kind, object.clone(), Wrap::Applied)));
                    if told == 0 {
                        stale.insert(kind);
                    }
                }
                Step::Delete { kind, which, told } => {
                    let Some(object) = cluster.objects.remove(&(kind, index(kind, which))) else { continue };
                    (0..told).for_each(|_| world.apply(event(kind, object.clone(), Wrap::Deleted)));
                    if told == 0 {
                        stale.insert(kind);
                    }
                }
                Step::DeleteIdentity { nth, told } => {
                    let Some(id) = cluster.identities.keys().nth(nth.into()).copied() else { continue };
                    cluster.identities.remove(&id);
                    (0..told).for_each(|_| world.apply(deleted(id)));
                    if told == 0 {
                        stale.insert(Kind::Identity);
                    }
                }
                Step::DuplicateIdentity { nth, id, told } => {
                    let Some(labels) = cluster.identities.values().nth(nth.into()).cloned() else { continue };
                    let id = (3 << 16) + u32::from(id);
                    let labels = cluster.identities.entry(id).or_insert(labels).clone();
                    (0..told).for_each(|_| world.apply(Input::Identity(Event::Applied(identity(id, &labels)))));
                    if told == 0 {
                        stale.insert(Kind::Identity);
                    }
                }
                Step::List { kind, complete } => {
                    cluster.list(kind, complete, &mut world);
                    if complete {
                        stale.remove(&kind);
                    } else {
                        stale.insert(kind);
                    }
                }
                Step::Answer => {
                    cluster.answer(&mut world);
                }
            }
        }
        for kind in stale {
            cluster.list(kind, true, &mut world);
        }
        while cluster.answer(&mut world) {}
        no_cilium_policies(&mut world);
        prop_assert_eq!(world.completed.len(), Section::ALL.len());

        let mut fresh = World::new(true);
        no_cilium_policies(&mut fresh);
        for kind in KINDS.into_iter().rev() {
            cluster.list(kind, true, &mut fresh);
        }
        prop_assert!(fresh.asked.is_empty(), "a fresh start asks for {:?}", fresh.asked);
        prop_assert_eq!(&world.keys, &fresh.keys);
        let counts = world.translator.counts();
        prop_assert_eq!(counts, fresh.translator.counts());
        prop_assert_eq!(counts.pods_without_identity, 0);
    }
}
