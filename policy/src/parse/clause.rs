//! Elements of the four lists of Cilium's policies.

use std::sync::Arc;

use isthmus_wire::Labels;
use serde_json::Value;

use super::fields::{Fields, describe};
use super::report::{Report, bounded};
use super::selector::{self, Keys};
use super::{MAX_ELEMENTS, MAX_PEERS, MAX_PORTS, cidr, ports};
use crate::labels::{Requirement, Source};
use crate::model::{Clause, Direction, Effect, Entity, Peer, Peers, PortMatch, Ports, ServiceRef};

/// One of the four lists.
#[derive(Clone, Copy)]
pub(super) struct List {
    pub(super) field: &'static str,
    pub(super) direction: Direction,
    pub(super) effect: Effect,
}

impl List {
    pub(super) const CILIUM: [Self; 4] = [
        Self { field: "ingress", direction: Direction::Ingress, effect: Effect::Allow },
        Self { field: "ingressDeny", direction: Direction::Ingress, effect: Effect::Deny },
        Self { field: "egress", direction: Direction::Egress, effect: Effect::Allow },
        Self { field: "egressDeny", direction: Direction::Egress, effect: Effect::Deny },
    ];
}

/// What an element's meaning depends on.
pub(super) struct Context<'a> {
    pub(super) list: List,
    /// The policy's namespace.
    pub(super) namespace: Option<&'a str>,
    /// Whether the policy is about endpoints without an identity.
    pub(super) of_init: bool,
}

/// What an element comes to.
pub(super) struct Outcome {
    /// None if it is about nothing.
    pub(super) clause: Option<Clause>,
    /// It has `fromRequires` or `toRequires`, which restrict what all other rules of the endpoints allow.
    pub(super) requires: bool,
}

/// Reads an element.
pub(super) fn read(
    path: &str,
    value: &Value,
    index: u16,
    context: &Context<'_>,
    report: &mut Report,
) -> Outcome {
    let List { direction, effect, .. } = context.list;
    let is_deny = effect == Effect::Deny;
    let clause = |peers, ports| Some(Clause { direction, effect, index, peers, ports });
    let mut fields = match Fields::of(path, value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, effect);
            let clause = if is_deny { clause(Peers::All, Ports::All) } else { None };
            return Outcome { clause, requires: false };
        }
    };
    let requires = requires(&mut fields, direction, report);
    let mut peers = peers(&mut fields, context, report);
    let mut ports = ports_and_types(&mut fields, effect, report);
    let mut refused = !is_deny && is_authenticated(&mut fields, effect, report);
    if let [one, other, ..] = peers.members[..] {
        let what = format!("{one} and {other} exclude each other: make them elements of their own");
        report.invalid(path, what, effect);
        refused = true;
    }
    if ports.both {
        report.invalid(path, "toPorts and icmps exclude each other: make them elements of their own", effect);
        refused = true;
    }
    let is_strange = report.unknown(&fields, effect);
    if (refused || is_strange) && !is_deny {
        return Outcome { clause: None, requires };
    }
    if is_strange {
        (peers.found, ports.found) = (None, None);
    } else if peers.found.is_none() && ports.found.is_none() && !peers.everybody {
        // "{}" switches default deny on and says nothing else.
        return Outcome { clause: None, requires };
    }
    let says_nothing = peers.found.as_ref().is_some_and(|found| found.is_empty() && !peers.everybody)
        || ports.found.as_ref().is_some_and(|found| found.is_empty() && !ports.every_one);
    let peers = match peers.found {
        Some(found) if !peers.everybody => Peers::OneOf(found),
        _ => Peers::All,
    };
    let ports = match ports.found {
        Some(found) if !ports.every_one => Ports::OneOf(found),
        _ => Ports::All,
    };
    Outcome { clause: if says_nothing { None } else { clause(peers, ports) }, requires }
}

/// `fromRequires` narrows what every other rule of the same endpoints allows, so it cannot be left out without allowing
/// more. It was deprecated in Cilium 1.17.
fn requires(fields: &mut Fields<'_>, direction: Direction, report: &mut Report) -> bool {
    let field = match direction {
        Direction::Ingress => "fromRequires",
        Direction::Egress => "toRequires",
    };
    let is_there = is_set(fields.get(field));
    if is_there {
        report.unsupported(fields.at(field), Effect::Deny);
    }
    is_there
}

/// `authentication` other than `mode: disabled`.
fn is_authenticated(fields: &mut Fields<'_>, effect: Effect, report: &mut Report) -> bool {
    let Some(value) = fields.get("authentication") else { return false };
    if value.get("mode").and_then(Value::as_str) == Some("disabled") {
        return false;
    }
    report.unsupported(fields.at("authentication"), effect);
    true
}

/// Whether a field says anything: not null, not an empty list or object.
fn is_set(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(Value::Object(fields)) => !fields.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    }
}

#[derive(Default)]
struct ReadPeers {
    /// None if there is no list of peers; a list that is there and empty is nobody.
    found: Option<Vec<Peer>>,
    everybody: bool,
    /// The lists that are there and not empty.
    members: Vec<&'static str>,
}

/// Reads the lists of peers. In a deny, what cannot be read is everybody.
fn peers(fields: &mut Fields<'_>, context: &Context<'_>, report: &mut Report) -> ReadPeers {
    type Reader = fn(&str, &Value, &Context<'_>, &mut Report) -> Option<Peer>;
    let effect = context.list.effect;
    let lists: &[(&'static str, Option<Reader>)] = match context.list.direction {
        Direction::Ingress => &[
            ("fromEndpoints", Some(endpoints)),
            ("fromEntities", Some(entity)),
            (
                "fromCIDR",
                Some(|path, value, context, report| cidr::plain(path, value, context.list.effect, report)),
            ),
            ("fromCIDRSet", Some(cidr_set)),
            ("fromGroups", None),
            ("fromNodes", None),
        ],
        Direction::Egress => &[
            ("toEndpoints", Some(endpoints)),
            ("toEntities", Some(entity)),
            (
                "toCIDR",
                Some(|path, value, context, report| cidr::plain(path, value, context.list.effect, report)),
            ),
            ("toCIDRSet", Some(cidr_set)),
            ("toServices", Some(service)),
            ("toFQDNs", None),
            ("toGroups", None),
            ("toNodes", None),
        ],
    };
    let mut read = ReadPeers::default();
    for (field, reader) in lists {
        let path = fields.at(field);
        let items = match fields.list(field) {
            Ok(None) => continue,
            Ok(Some(items)) => items,
            Err(what) => {
                report.invalid(path, what, effect);
                read.found.get_or_insert_default();
                read.everybody |= effect == Effect::Deny;
                continue;
            }
        };
        let found = read.found.get_or_insert_default();
        if items.is_empty() {
            continue;
        }
        read.members.push(field);
        let Some(reader) = reader else {
            report.unsupported(path, effect);
            read.everybody |= effect == Effect::Deny;
            continue;
        };
        let (items, all) = bounded(items, MAX_PEERS, &path, effect, report);
        read.everybody |= !all && effect == Effect::Deny;
        for (index, item) in items.iter().enumerate() {
            found.extend(reader(&format!("{path}[{index}]"), item, context, report));
        }
    }
    let found = read.found.as_deref().unwrap_or_default();
    read.everybody |= found.contains(&Peer::Entity(Entity::All));
    read
}

fn everybody_if_deny(effect: Effect) -> Option<Peer> {
    (effect == Effect::Deny).then_some(Peer::Entity(Entity::All))
}

/// Endpoints by their labels: of the policy's namespace unless the selector says something of namespaces; of any namespace
/// if the policy has none. A selector of reserved labels is about the fixed identities, which have no namespace.
fn endpoints(path: &str, value: &Value, context: &Context<'_>, report: &mut Report) -> Option<Peer> {
    let effect = context.list.effect;
    let mut read = selector::selector(path, value, Keys::Cilium, effect.into(), report);
    if !read.complete {
        return everybody_if_deny(effect);
    }
    if !read.is_reserved() {
        let says_where =
            read.is_about(Labels::NAMESPACE) || read.is_about_prefix(Labels::NAMESPACE_LABEL_PREFIX);
        match context.namespace {
            Some(namespace) if !says_where => {
                read.requirements.push(Requirement::equals(Source::k8s(), Labels::NAMESPACE, namespace));
            }
            None if context.of_init => {}
            _ => read.requirements.push(Requirement::exists(Source::k8s(), Labels::NAMESPACE)),
        }
    }
    Some(Peer::Labels(Arc::new(read.into_selector())))
}

fn entity(path: &str, value: &Value, context: &Context<'_>, report: &mut Report) -> Option<Peer> {
    let effect = context.list.effect;
    let read = value.as_str().ok_or_else(|| format!("{} is not a text", describe(value)));
    match read.and_then(str::parse) {
        Ok(entity) => Some(Peer::Entity(entity)),
        Err(what) => {
            report.invalid(path, what, effect);
            everybody_if_deny(effect)
        }
    }
}

fn cidr_set(path: &str, value: &Value, context: &Context<'_>, report: &mut Report) -> Option<Peer> {
    cidr::with_exceptions(path, value, context.list.effect, report)
}

/// Services by name or by labels: of the policy's namespace unless they name another; of any if it has none.
fn service(path: &str, value: &Value, context: &Context<'_>, report: &mut Report) -> Option<Peer> {
    let effect = context.list.effect;
    let read = Fields::of(path, value).and_then(|mut fields| {
        let service = match (fields.get("k8sService"), fields.get("k8sServiceSelector")) {
            (Some(named), None) => service_by_name(&fields.at("k8sService"), named, context)?,
            (None, Some(labelled)) => {
                let path = fields.at("k8sServiceSelector");
                service_by_labels(&path, labelled, context, report)?
            }
            _ => return Err("it must have one of k8sService and k8sServiceSelector".to_owned()),
        };
        match fields.unknown().next() {
            Some((name, _)) => Err(format!("there is no such field as {:?}", super::problem::short(name))),
            None => Ok(service),
        }
    });
    match read {
        Ok(service) => Some(Peer::Service(service)),
        Err(what) => {
            report.invalid(path, what, effect);
            everybody_if_deny(effect)
        }
    }
}

fn service_by_name(path: &str, value: &Value, context: &Context<'_>) -> Result<ServiceRef, String> {
    let mut fields = Fields::of(path, value)?;
    let name = fields.text("serviceName")?.filter(|name| !name.is_empty()).ok_or("it has no serviceName")?;
    let namespace = service_namespace(&mut fields, context)?;
    match fields.unknown().next() {
        Some((name, _)) => Err(format!("there is no such field as {:?}", super::problem::short(name))),
        None => Ok(ServiceRef::Named { namespace, name: name.into() }),
    }
}

fn service_by_labels(
    path: &str,
    value: &Value,
    context: &Context<'_>,
    report: &mut Report,
) -> Result<ServiceRef, String> {
    let mut fields = Fields::of(path, value)?;
    let labels = fields.get("selector").ok_or("it has no selector")?;
    let read =
        selector::selector(&fields.at("selector"), labels, Keys::Cilium, context.list.effect.into(), report);
    let namespace = service_namespace(&mut fields, context)?;
    if !read.complete {
        return Err("its selector cannot be read".to_owned());
    }
    match fields.unknown().next() {
        Some((name, _)) => Err(format!("there is no such field as {:?}", super::problem::short(name))),
        None => Ok(ServiceRef::Labelled { namespace, selector: Arc::new(read.into_selector()) }),
    }
}

fn service_namespace(fields: &mut Fields<'_>, context: &Context<'_>) -> Result<Option<Arc<str>>, String> {
    let named = fields.text("namespace")?.filter(|namespace| !namespace.is_empty());
    Ok(named.or(context.namespace).map(Arc::from))
}

#[derive(Default)]
struct ReadPorts {
    /// None if neither ports nor types are restricted.
    found: Option<Vec<PortMatch>>,
    every_one: bool,
    /// There are `toPorts` and `icmps`.
    both: bool,
}

/// Reads `toPorts` and `icmps`. In a deny, what cannot be read is every port.
fn ports_and_types(fields: &mut Fields<'_>, effect: Effect, report: &mut Report) -> ReadPorts {
    let mut read = ReadPorts::default();
    let mut lists = 0;
    for field in ["toPorts", "icmps"] {
        let path = fields.at(field);
        let items = match fields.list(field) {
            Ok(items) => items.unwrap_or_default(),
            Err(what) => {
                report.invalid(path, what, effect);
                read.found.get_or_insert_default();
                read.every_one |= effect == Effect::Deny;
                continue;
            }
        };
        // An empty list is as good as none.
        if items.is_empty() {
            continue;
        }
        lists += 1;
        let found = read.found.get_or_insert_default();
        let (items, all) = bounded(items, MAX_ELEMENTS, &path, effect, report);
        read.every_one |= !all && effect == Effect::Deny;
        for (index, item) in items.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let complete = if field == "toPorts" {
                port_rule(&path, item, effect, found, report)
            } else {
                icmp_rule(&path, item, effect, found, report)
            };
            read.every_one |= !complete && effect == Effect::Deny;
        }
    }
    read.both = lists > 1;
    read
}

/// An element of `toPorts`. What would look into the traffic is not supported, and nothing is granted without the look.
/// Returns whether all of it was read.
fn port_rule(
    path: &str,
    value: &Value,
    effect: Effect,
    found: &mut Vec<PortMatch>,
    report: &mut Report,
) -> bool {
    let mut fields = match Fields::of(path, value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, effect);
            return false;
        }
    };
    let mut complete = true;
    let rules = fields.get("rules");
    let inspects = match rules {
        Some(Value::Object(kinds)) => kinds.values().any(|rules| is_set(Some(rules))),
        other => is_set(other),
    };
    if inspects {
        report.unsupported(fields.at("rules"), effect);
        complete = false;
    }
    for field in ["terminatingTLS", "originatingTLS", "serverNames", "listener"] {
        if is_set(fields.get(field)) {
            report.unsupported(fields.at(field), effect);
            complete = false;
        }
    }
    let listed = elements(&mut fields, "ports", ports::cilium, effect, report);
    complete &= !report.unknown(&fields, effect);
    // Nothing of it is granted unless all of it is understood; a single port that is not leaves the others alone.
    if complete || effect == Effect::Deny {
        found.extend(listed.0);
    }
    complete && listed.1
}

/// An element of `icmps`. Returns whether all of it was read.
fn icmp_rule(
    path: &str,
    value: &Value,
    effect: Effect,
    found: &mut Vec<PortMatch>,
    report: &mut Report,
) -> bool {
    let mut fields = match Fields::of(path, value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, effect);
            return false;
        }
    };
    let (listed, all) = elements(&mut fields, "fields", ports::icmp, effect, report);
    let complete = !report.unknown(&fields, effect);
    if complete || effect == Effect::Deny {
        found.extend(listed);
    }
    complete && all
}

/// The elements of a list that can be read, and whether those are all.
fn elements(
    fields: &mut Fields<'_>,
    field: &'static str,
    read: fn(&str, &Value) -> Result<PortMatch, String>,
    effect: Effect,
    report: &mut Report,
) -> (Vec<PortMatch>, bool) {
    let path = fields.at(field);
    let items = match fields.list(field) {
        Ok(items) => items.unwrap_or_default(),
        Err(what) => {
            report.invalid(path, what, effect);
            return (Vec::new(), false);
        }
    };
    let (items, mut complete) = bounded(items, MAX_PORTS, &path, effect, report);
    let mut found = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let path = format!("{path}[{index}]");
        match read(&path, item) {
            Ok(port) => found.push(port),
            Err(what) => {
                report.invalid(path, what, effect);
                complete = false;
            }
        }
    }
    (found, complete)
}
