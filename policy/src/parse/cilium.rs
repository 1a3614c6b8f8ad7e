//! CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy.
//!
//! Meaning: <https://docs.cilium.io/en/stable/security/policy/language/>.

use isthmus_wire::Labels;
use serde_json::Value;

use super::clause::{self, List};
use super::fields::{Fields, describe};
use super::problem::{Consequence, ProblemKind};
use super::report::{Report, bounded};
use super::selector::{self, Keys, Read};
use super::{MAX_ELEMENTS, MAX_SPECS, Parsed, spec_path};
use crate::labels::{Operator, Requirement, Selector, Source};
use crate::model::{Clause, Direction, Effect, Peers, PolicyName, Ports, Rule};

/// Reads a CiliumNetworkPolicy or a CiliumClusterwideNetworkPolicy. `specs` are its `spec` and its `specs`, in this order.
pub fn cilium(name: &PolicyName, specs: &[Value]) -> Parsed {
    let namespace = name.namespace.as_ref().map(|namespace| namespace.as_str());
    let mut report = Report::default();
    let (read, all) = bounded(specs, MAX_SPECS, "specs", Consequence::SelectsMore, &mut report);
    let mut rules: Vec<Rule> = read
        .iter()
        .enumerate()
        .filter_map(|(index, spec)| rule(spec_path(specs, index), spec, namespace, &mut report))
        .collect();
    if !all {
        rules.push(Rule::lockdown(scope(namespace)));
    }
    if specs.is_empty() {
        let what = "there is neither spec nor specs, so it says nothing";
        report.note("spec", ProblemKind::Invalid, what, Consequence::HasNoEffect);
    }
    Parsed { rules, problems: report.0 }
}

/// Every endpoint that a policy of this namespace, or of none, can be about.
fn scope(namespace: Option<&str>) -> Selector {
    Selector::new(namespace.map(of_namespace).into_iter().collect())
}

fn of_namespace(namespace: &str) -> Requirement {
    Requirement::equals(Source::k8s(), Labels::NAMESPACE, namespace)
}

fn rule(path: String, spec: &Value, namespace: Option<&str>, report: &mut Report) -> Option<Rule> {
    let mut fields = match Fields::of(path.as_str(), spec) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, Consequence::SelectsMore);
            return Some(Rule::lockdown(scope(namespace)));
        }
    };
    let Some((subject, of_init, mut complete)) = subject(&mut fields, namespace, report) else {
        // What it says otherwise is not looked at: none of it is about an endpoint.
        return None;
    };
    for harmless in ["description", "labels", "log"] {
        fields.get(harmless);
    }
    let defaults = default_deny(&mut fields, report);
    let mut rule =
        Rule { subject, ingress_default_deny: false, egress_default_deny: false, clauses: Vec::new() };
    for list in List::CILIUM {
        let is_empty = read_list(&mut fields, list, namespace, of_init, &mut rule.clauses, report);
        let deny = match list.direction {
            Direction::Ingress => &mut rule.ingress_default_deny,
            Direction::Egress => &mut rule.egress_default_deny,
        };
        *deny |= !is_empty;
    }
    rule.ingress_default_deny = defaults[0].unwrap_or(rule.ingress_default_deny);
    rule.egress_default_deny = defaults[1].unwrap_or(rule.egress_default_deny);
    if report.unknown(&fields, Consequence::SelectsMore) {
        (rule.ingress_default_deny, rule.egress_default_deny) = (true, true);
        complete = false;
    }
    if !complete {
        rule.clauses.retain(|clause| clause.effect == Effect::Deny);
    }
    Some(rule)
}

/// Whom the spec is about, whether it asks for endpoints without an identity, and whether that is all that it says. None if
/// it is about nodes.
fn subject(
    fields: &mut Fields<'_>,
    namespace: Option<&str>,
    report: &mut Report,
) -> Option<(Selector, bool, bool)> {
    let nodes = fields.get("nodeSelector");
    let path = fields.at("endpointSelector");
    let Some(endpoints) = fields.get("endpointSelector") else {
        if nodes.is_some() {
            let what = "Isthmus does not filter the traffic of nodes yet";
            let field = fields.at("nodeSelector");
            report.note(field, ProblemKind::Unsupported, what, Consequence::HasNoEffect);
            return None;
        }
        report.invalid(path, "it is required", Consequence::SelectsMore);
        return Some((scope(namespace), false, false));
    };
    let mut read = selector::selector(&path, endpoints, Keys::Cilium, Consequence::SelectsMore, report);
    if nodes.is_some() {
        let what = "endpointSelector and nodeSelector exclude each other";
        report.invalid(fields.at("nodeSelector"), what, Consequence::SelectsMore);
        read.complete = false;
    }
    let of_init = read
        .requirements
        .iter()
        .any(|requirement| requirement.source == Source::reserved() && *requirement.key == *"init");
    if let Some(namespace) = namespace {
        settle_namespace(&mut read, namespace, &path, report);
    }
    let complete = read.complete;
    Some((read.into_selector(), of_init, complete))
}

/// A policy of a namespace is about endpoints of this namespace, whatever else it says.
fn settle_namespace(read: &mut Read, namespace: &str, path: &str, report: &mut Report) {
    let own = of_namespace(namespace);
    let before = read.requirements.len();
    read.requirements.retain(|requirement| {
        let names_namespace = *requirement.key == *Labels::NAMESPACE
            && requirement.source == Source::k8s()
            && matches!(&requirement.operator, Operator::In(values) if values.len() == 1);
        !names_namespace || *requirement == own
    });
    if read.requirements.len() != before {
        let what = format!(
            "it names another namespace; the policy is about endpoints of {namespace:?} all the same"
        );
        report.note(path, ProblemKind::Note, what, Consequence::Enforced);
    }
    read.requirements.push(own);
}

/// What `enableDefaultDeny` says, for ingress and egress.
fn default_deny(fields: &mut Fields<'_>, report: &mut Report) -> [Option<bool>; 2] {
    let Some(value) = fields.get("enableDefaultDeny") else { return [None; 2] };
    let path = fields.at("enableDefaultDeny");
    let mut fields = match Fields::of(path.as_str(), value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, Consequence::SelectsMore);
            return [Some(true); 2];
        }
    };
    let mut said = ["ingress", "egress"].map(|direction| match fields.get(direction) {
        None => None,
        Some(Value::Bool(deny)) => Some(*deny),
        Some(other) => {
            let what = format!("{} is neither true nor false", describe(other));
            report.invalid(fields.at(direction), what, Consequence::SelectsMore);
            Some(true)
        }
    });
    if report.unknown(&fields, Consequence::SelectsMore) {
        said = [Some(true); 2];
    }
    said
}

/// Reads one of the four lists; returns whether it is empty, which is as if it were not there.
fn read_list(
    fields: &mut Fields<'_>,
    list: List,
    namespace: Option<&str>,
    of_init: bool,
    clauses: &mut Vec<Clause>,
    report: &mut Report,
) -> bool {
    let path = fields.at(list.field);
    let everything = |index| Clause {
        direction: list.direction,
        effect: Effect::Deny,
        index,
        peers: Peers::All,
        ports: Ports::All,
    };
    let elements = match fields.list(list.field) {
        Ok(elements) => elements.unwrap_or_default(),
        Err(what) => {
            report.invalid(path, what, list.effect);
            clauses.extend((list.effect == Effect::Deny).then(|| everything(0)));
            return false;
        }
    };
    let (read, all) = bounded(elements, MAX_ELEMENTS, &path, list.effect, report);
    for (index, element) in read.iter().enumerate() {
        // Bounded by MAX_ELEMENTS.
        let at = index as u16;
        let context = clause::Context { list, namespace, of_init };
        let outcome = clause::read(&format!("{path}[{index}]"), element, at, &context, report);
        clauses.extend(outcome.clause);
        if outcome.requires {
            clauses.push(everything(at));
        }
    }
    if !all && list.effect == Effect::Deny {
        clauses.push(everything(MAX_ELEMENTS as u16));
    }
    elements.is_empty()
}
