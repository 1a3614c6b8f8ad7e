//! Network policies. What they say travels as it was written: the agents understand it, with the code that tells their
//! owner here what of it is not enforced as written.

use std::borrow::Cow;
use std::sync::Arc;

use isthmus_policy::labels::Selector;
use isthmus_policy::parse::ProblemKind;
use isthmus_policy::{Parsed, Problem};
use isthmus_wire::local::{LocalPolicy, PolicyKey, PolicyKind};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::{Fact, Finding, Name, Reason, Source};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PolicyFact {
    pub name: Name,
    pub kind: PolicyKind,
    pub says: Arc<LocalPolicy>,
    pub resource_version: String,
    /// The conditions in its status.
    pub conditions: Vec<Value>,
    /// What of it is not enforced as written.
    pub problems: Arc<[Problem]>,
    /// Whom it is about: those that any of these select.
    pub subjects: Arc<[Selector]>,
}

impl Fact for PolicyFact {
    fn name(&self) -> &Name {
        &self.name
    }

    fn uid(&self) -> &str {
        &self.says.uid
    }
}

/// The parts of a policy that are read. Nothing of `spec` is lost, whatever version of the API wrote it.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Written {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Option<Value>,
    #[serde(default)]
    specs: Option<Vec<Value>>,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Status {
    #[serde(default)]
    conditions: Option<Vec<Value>>,
}

impl Written {
    fn fact(self, kind: PolicyKind, name: Name, findings: &mut Vec<Finding>) -> PolicyFact {
        let says = LocalPolicy::new(
            self.metadata.uid.unwrap_or_default(),
            self.metadata.generation.unwrap_or_default(),
            self.spec.into_iter().chain(self.specs.into_iter().flatten()).collect(),
        );
        let Parsed { rules, problems } = understand(kind, &name, &says);
        findings.extend(problems.iter().filter(|problem| problem.is_failure()).map(finding));
        PolicyFact {
            name,
            kind,
            says: Arc::new(says),
            resource_version: self.metadata.resource_version.unwrap_or_default(),
            conditions: self.status.conditions.unwrap_or_default(),
            problems: problems.into(),
            subjects: rules.into_iter().map(|rule| rule.subject).collect(),
        }
    }
}

/// What a policy says, what of it is not enforced as written, and what happens instead.
pub(crate) fn understand(kind: PolicyKind, name: &Name, says: &LocalPolicy) -> Parsed {
    // Kubernetes admits no other names; such a policy would not reach the agents either.
    policy_key(kind, name).map(|name| isthmus_policy::parse::policy(&name, &says.specs)).unwrap_or_default()
}

/// The policy's name in the store and in all that is said of it; `None` for one that Kubernetes would never admit.
pub(crate) fn policy_key(kind: PolicyKind, name: &Name) -> Option<PolicyKey> {
    let namespace = match kind.is_namespaced() {
        true => Some(name.namespace.parse().ok()?),
        false => None,
    };
    Some(PolicyKey { kind, namespace, name: name.name.parse().ok()? })
}

fn finding(problem: &Problem) -> Finding {
    let reason = match problem.kind {
        ProblemKind::Unsupported => Reason::UnsupportedPolicy,
        _ => Reason::InvalidPolicy,
    };
    Finding::new(reason, problem.to_string())
}

macro_rules! policy {
    ($(#[$meta:meta])* $type:ident, $scope:ident, $group:literal, $version:literal, $plural:literal) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Deserialize)]
        #[serde(transparent)]
        pub(crate) struct $type(Written);

        impl kube::Resource for $type {
            type DynamicType = ();
            type Scope = k8s_openapi::$scope;

            fn kind(_: &()) -> Cow<'_, str> {
                PolicyKind::$type.kind().into()
            }

            fn group(_: &()) -> Cow<'_, str> {
                $group.into()
            }

            fn version(_: &()) -> Cow<'_, str> {
                $version.into()
            }

            fn plural(_: &()) -> Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.0.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.0.metadata
            }
        }

        impl Source for $type {
            type Fact = PolicyFact;

            fn fact(self, findings: &mut Vec<Finding>) -> PolicyFact {
                let name = Name::of(&self);
                self.0.fact(PolicyKind::$type, name, findings)
            }
        }
    };
}

policy!(
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    NamespaceResourceScope,
    "networking.k8s.io",
    "v1",
    "networkpolicies"
);
policy!(
    /// `cilium.io/v2`.
    CiliumNetworkPolicy,
    NamespaceResourceScope,
    "cilium.io",
    "v2",
    "ciliumnetworkpolicies"
);
policy!(
    /// `cilium.io/v2`.
    CiliumClusterwideNetworkPolicy,
    ClusterResourceScope,
    "cilium.io",
    "v2",
    "ciliumclusterwidenetworkpolicies"
);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_policy_says_is_kept_whole_also_what_is_not_known() {
        let object = json!({
            "metadata": {"namespace": "app", "name": "a", "uid": "u", "generation": 2},
            "spec": {"endpointSelector": {}, "fromTheFuture": [1]},
            "specs": [{"endpointSelector": {"matchLabels": {"app": "x"}}}],
            "status": {"conditions": [{"type": "Valid", "status": "True"}]},
        });
        let policy: CiliumNetworkPolicy = serde_json::from_value(object).expect("a policy");
        let fact = policy.fact(&mut Vec::new());
        assert_eq!((fact.says.uid.as_str(), fact.says.generation), ("u", 2));
        assert_eq!(fact.says.specs.len(), 2);
        assert_eq!(fact.says.specs[0]["fromTheFuture"], json!([1]));
        assert_eq!(fact.conditions.len(), 1);
    }
}
