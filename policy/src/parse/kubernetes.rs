//! Kubernetes' NetworkPolicy.
//!
//! Meaning: <https://kubernetes.io/docs/concepts/services-networking/network-policies/>. It only ever allows, so what cannot
//! be read allows nothing.

use std::sync::Arc;

use isthmus_wire::Labels;
use serde_json::Value;

use super::fields::{Fields, describe};
use super::problem::{Consequence, ProblemKind, short};
use super::report::{Report, bounded};
use super::selector::{self, Keys};
use super::{MAX_ELEMENTS, MAX_PEERS, MAX_SPECS, Parsed, cidr, ports, spec_path};
use crate::labels::{Requirement, Selector, Source};
use crate::model::{Clause, Direction, Effect, Peer, Peers, PolicyName, PortMatch, Ports, Rule};

const ALLOW: Effect = Effect::Allow;

/// Reads a NetworkPolicy. `specs` holds its `spec`.
pub fn network_policy(name: &PolicyName, specs: &[Value]) -> Parsed {
    let namespace = name.namespace.as_ref().map_or("", |namespace| namespace.as_str());
    let mut report = Report::default();
    let (read, all) = bounded(specs, MAX_SPECS, "specs", Consequence::SelectsMore, &mut report);
    let mut rules: Vec<Rule> = read
        .iter()
        .enumerate()
        .map(|(index, spec)| rule(spec_path(specs, index), spec, namespace, &mut report))
        .collect();
    if !all {
        rules.push(Rule::lockdown(scope(namespace)));
    }
    if specs.is_empty() {
        let what = "there is no spec, so it says nothing";
        report.note("spec", ProblemKind::Invalid, what, Consequence::HasNoEffect);
    }
    Parsed { rules, problems: report.0 }
}

fn scope(namespace: &str) -> Selector {
    Selector::new(vec![of_namespace(namespace)])
}

fn of_namespace(namespace: &str) -> Requirement {
    Requirement::equals(Source::k8s(), Labels::NAMESPACE, namespace)
}

fn rule(path: String, spec: &Value, namespace: &str, report: &mut Report) -> Rule {
    let mut fields = match Fields::of(path.as_str(), spec) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, Consequence::SelectsMore);
            return Rule::lockdown(scope(namespace));
        }
    };
    let mut complete = true;
    let mut requirements = vec![of_namespace(namespace)];
    // Without a selector it is about all pods of the namespace, as with an empty one.
    if let Some(pods) = fields.get("podSelector") {
        let path = fields.at("podSelector");
        let read = selector::selector(&path, pods, Keys::Pod, Consequence::SelectsMore, report);
        complete &= read.complete;
        requirements.extend(read.requirements);
    }
    let types = policy_types(&mut fields, report);
    let mut rule = Rule {
        subject: Selector::new(requirements),
        ingress_default_deny: false,
        egress_default_deny: false,
        clauses: Vec::new(),
    };
    for direction in Direction::BOTH {
        let mut clauses = Vec::new();
        let is_empty = read_list(&mut fields, direction, namespace, &mut clauses, report);
        // "If no policyTypes are specified on a NetworkPolicy then by default Ingress will always be set and Egress will be
        // set if the NetworkPolicy has any egress rules." Rules of a type that is not set have no effect.
        let applies = match &types {
            Some(types) => types.contains(&direction),
            None => direction == Direction::Ingress || !is_empty,
        };
        if applies {
            rule.clauses.append(&mut clauses);
            match direction {
                Direction::Ingress => rule.ingress_default_deny = true,
                Direction::Egress => rule.egress_default_deny = true,
            }
        }
    }
    if report.unknown(&fields, Consequence::SelectsMore) {
        (rule.ingress_default_deny, rule.egress_default_deny) = (true, true);
        complete = false;
    }
    if !complete {
        rule.clauses.clear();
    }
    rule
}

/// The directions the policy is about; none if it does not say.
fn policy_types(fields: &mut Fields<'_>, report: &mut Report) -> Option<Vec<Direction>> {
    let path = fields.at("policyTypes");
    let listed = match fields.list("policyTypes") {
        Ok(listed) => listed.unwrap_or_default(),
        Err(what) => {
            report.invalid(path, what, Consequence::SelectsMore);
            return Some(Direction::BOTH.to_vec());
        }
    };
    let mut types = Vec::new();
    for (index, value) in listed.iter().take(MAX_ELEMENTS).enumerate() {
        match value.as_str() {
            Some("Ingress") => types.push(Direction::Ingress),
            Some("Egress") => types.push(Direction::Egress),
            _ => {
                let what = format!("{} is not one of Ingress, Egress", describe(value));
                report.invalid(format!("{path}[{index}]"), what, Consequence::SelectsMore);
                types.extend(Direction::BOTH);
            }
        }
    }
    (!types.is_empty()).then_some(types)
}

/// Reads `ingress` or `egress`; returns whether it is empty.
fn read_list(
    fields: &mut Fields<'_>,
    direction: Direction,
    namespace: &str,
    clauses: &mut Vec<Clause>,
    report: &mut Report,
) -> bool {
    let field = direction.as_str();
    let path = fields.at(field);
    let elements = match fields.list(field) {
        Ok(elements) => elements.unwrap_or_default(),
        Err(what) => {
            report.invalid(path, what, ALLOW);
            return false;
        }
    };
    let (read, _) = bounded(elements, MAX_ELEMENTS, &path, ALLOW, report);
    for (index, element) in read.iter().enumerate() {
        // Bounded by MAX_ELEMENTS.
        let at = index as u16;
        clauses.extend(clause(&format!("{path}[{index}]"), element, at, direction, namespace, report));
    }
    elements.is_empty()
}

/// An element of `ingress` or `egress`. Empty or missing lists in it restrict nothing.
fn clause(
    path: &str,
    value: &Value,
    index: u16,
    direction: Direction,
    namespace: &str,
    report: &mut Report,
) -> Option<Clause> {
    let mut fields = match Fields::of(path, value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, ALLOW);
            return None;
        }
    };
    let peers_field = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let read_peer = |path: &str, value: &Value, report: &mut Report| peer(path, value, namespace, report);
    let peers = elements(&mut fields, peers_field, MAX_PEERS, read_peer, report);
    let read_port = |path: &str, value: &Value, report: &mut Report| -> Option<PortMatch> {
        ports::kubernetes(path, value).map_err(|what| report.invalid(path, what, ALLOW)).ok()
    };
    let ports = elements(&mut fields, "ports", MAX_PEERS, read_port, report);
    let is_known = !report.unknown(&fields, ALLOW);
    let says_nothing = peers.as_ref().is_some_and(Vec::is_empty) || ports.as_ref().is_some_and(Vec::is_empty);
    (is_known && !says_nothing).then(|| Clause {
        direction,
        effect: ALLOW,
        index,
        peers: peers.map_or(Peers::All, Peers::OneOf),
        ports: ports.map_or(Ports::All, Ports::OneOf),
    })
}

/// The elements that could be read; none if the list is empty or missing.
fn elements<T>(
    fields: &mut Fields<'_>,
    field: &'static str,
    max: usize,
    read: impl Fn(&str, &Value, &mut Report) -> Option<T>,
    report: &mut Report,
) -> Option<Vec<T>> {
    let path = fields.at(field);
    let items = match fields.list(field) {
        Ok(items) => items.unwrap_or_default(),
        Err(what) => {
            report.invalid(path, what, ALLOW);
            return Some(Vec::new());
        }
    };
    if items.is_empty() {
        return None;
    }
    let (items, _) = bounded(items, max, &path, ALLOW, report);
    let read = |(index, item): (usize, &Value)| read(&format!("{path}[{index}]"), item, report);
    Some(items.iter().enumerate().filter_map(read).collect())
}

/// Pods of the policy's namespace, pods of some namespaces, or a block of addresses outside of the clusters.
fn peer(path: &str, value: &Value, namespace: &str, report: &mut Report) -> Option<Peer> {
    let mut fields = match Fields::of(path, value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, ALLOW);
            return None;
        }
    };
    let pods = fields.get("podSelector").map(|value| (fields.at("podSelector"), value));
    let namespaces = fields.get("namespaceSelector").map(|value| (fields.at("namespaceSelector"), value));
    let block = fields.get("ipBlock").map(|value| (fields.at("ipBlock"), value));
    if let Some((name, path)) = fields.unknown().next() {
        let what = format!("there is no such field as {:?}", short(name));
        report.fail(path, ProblemKind::Unknown, what, ALLOW);
        return None;
    }
    if let Some((path, block)) = block {
        if pods.is_some() || namespaces.is_some() {
            report.invalid(path, "ipBlock excludes podSelector and namespaceSelector", ALLOW);
            return None;
        }
        return cidr::with_exceptions(&path, block, ALLOW, report);
    }
    if pods.is_none() && namespaces.is_none() {
        report.invalid(path, "it has none of podSelector, namespaceSelector and ipBlock", ALLOW);
        return None;
    }
    let mut requirements = Vec::new();
    let mut complete = true;
    let mut take = |(path, value): (String, &Value), keys| {
        let read = selector::selector(&path, value, keys, ALLOW.into(), report);
        complete &= read.complete;
        requirements.extend(read.requirements);
    };
    let any_namespace = namespaces.is_some();
    if let Some(namespaces) = namespaces {
        take(namespaces, Keys::Namespace);
    }
    if let Some(pods) = pods {
        take(pods, Keys::Pod);
    }
    requirements.push(if any_namespace {
        Requirement::exists(Source::k8s(), Labels::NAMESPACE)
    } else {
        of_namespace(namespace)
    });
    complete.then(|| Peer::Labels(Arc::new(Selector::new(requirements))))
}
