//! Why a packet would be let through or not, without sending one.

use isthmus_wire::NumericIdentity;
use serde::{Serialize, Serializer};

use super::{EndpointId, Engine, RuleId};
use crate::model::{Direction, Effect, PolicyName, RuleOrigin};

/// A packet to ask about, as it looks at the endpoint: after service translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Seen from the endpoint.
    pub direction: Direction,
    /// Identity of the other side.
    pub peer: NumericIdentity,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; for ICMP the type; 0 for other protocols.
    pub port: u16,
}

/// What is decided, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Whether it passes.
    pub effect: Effect,
    /// What the endpoint's map says, as events do.
    pub rule: RuleId,
    /// The rule that decides; none if no rule does.
    pub origin: Option<RuleOrigin>,
    /// In words, why.
    pub reason: &'static str,
    /// Whether the direction is restricted at all.
    pub enforced: bool,
    /// Every rule that is about this packet, denies first, in the order of their names.
    pub matching: Vec<RuleOrigin>,
    /// Policies that restrict this endpoint in this direction by default.
    #[serde(serialize_with = "as_texts")]
    pub default_deny_by: Vec<PolicyName>,
}

impl Engine {
    /// Why a packet would pass or not, as of the last [`Engine::take_changes`]. None if there is no such endpoint.
    pub fn explain(&self, question: &Question) -> Option<Explanation> {
        let class = self.class(question.endpoint)?;
        let Question { direction, peer, protocol, port, .. } = *question;
        let decision = class.table.verdict(direction, peer, protocol, port);
        let mut matching = self.matching(question)?;
        matching.sort_by(|a, b| b.effect.cmp(&a.effect).then_with(|| a.cmp(b)));
        let mut default_deny_by: Vec<PolicyName> = class
            .rules
            .iter()
            .filter(|(name, index)| {
                let rule = self.policies.get(name).and_then(|policy| policy.rules.get(*index));
                rule.is_some_and(|rule| rule.denies_by_default(direction))
            })
            .map(|(name, _)| name.clone())
            .collect();
        default_deny_by.dedup();
        Some(Explanation {
            effect: decision.effect,
            rule: decision.rule,
            origin: self.origin(decision.rule).cloned(),
            reason: reason(decision.rule, decision.effect),
            enforced: class.table.is_enforced(direction),
            matching,
            default_deny_by,
        })
    }

    /// The rules that are about a packet, straight from the policies and not from the map made of them.
    fn matching(&self, question: &Question) -> Option<Vec<RuleOrigin>> {
        let class = self.class(question.endpoint)?;
        let nothing = super::NamedPorts::new();
        let peer = self.identities.get(question.peer);
        let names = match question.direction {
            Direction::Ingress => &class.likeness.named_ports,
            Direction::Egress => peer.map_or(&nothing, |peer| &peer.named_ports),
        };
        let fits = |ids: &[super::PeerId]| {
            peer.is_some_and(|peer| ids.iter().any(|id| peer.peers.binary_search(id).is_ok()))
        };
        let rules = class.rules.iter().filter_map(|(name, at)| self.policies.get(name)?.rules.get(*at));
        let found = rules
            .flat_map(|rule| &rule.clauses)
            .filter(|clause| {
                clause.direction == question.direction
                    && clause.peers.as_deref().is_none_or(fits)
                    && clause.ports.matches(names, question.protocol, question.port)
            })
            .filter_map(|clause| self.origin(clause.rule).cloned());
        Some(found.collect())
    }
}

fn reason(rule: RuleId, effect: Effect) -> &'static str {
    match (rule, effect) {
        (RuleId::DEFAULT_DENY, _) => "a policy selects the endpoint, and no rule allows it",
        (RuleId::NOT_RESTRICTED, _) => "no policy restricts the endpoint in this direction by default",
        (RuleId::HOST, _) => "a node always reaches its own pods",
        (_, Effect::Allow) => "a rule allows it, and none denies it",
        (_, Effect::Deny) => "a rule denies it, whatever others allow",
    }
}

fn as_texts<S: Serializer>(names: &[PolicyName], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(names.iter().map(ToString::to_string))
}
