//! What a policy's own status says of it: the condition `Valid`, of the form that Cilium's operator gives it.
//!
//! Written when it is not as it should be, on top of the object as it was last seen: whoever was faster is not
//! overwritten, and the watch brings what they wrote. Kubernetes' own NetworkPolicy has no status; of it only Events and
//! the status page tell.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use isthmus_wire::local::PolicyKind;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::facts::{Name, PolicyFact};
use super::report::chain;
use crate::election::Leadership;

const CONDITION: &str = "Valid";
/// Longest message that is written, in bytes. Kubernetes takes 32 KiB.
const LONGEST_MESSAGE: usize = 4096;
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// A policy as it is now, and whether it selects no pod (`None`: gone).
pub(crate) type Seen = ((PolicyKind, Name), Option<(PolicyFact, bool)>);

/// Keeps the conditions of policies right, one request at a time, until `shutdown`. Only the leader writes; the others know
/// what they would write when they lead.
pub(crate) async fn keep(
    client: Client,
    mut seen: mpsc::UnboundedReceiver<Seen>,
    mut leadership: Leadership,
    shutdown: CancellationToken,
) {
    let work = async {
        // Only policies whose condition is not right wait here, each once.
        let mut waiting: BTreeMap<(PolicyKind, Name), (PolicyFact, bool)> = BTreeMap::new();
        let mut delay = FIRST_RETRY;
        loop {
            if waiting.is_empty() {
                match seen.recv().await {
                    Some(policy) => take(&mut waiting, policy),
                    None => return,
                }
            }
            while !leadership.is_leading() {
                tokio::select! {
                    () = leadership.gained() => {}
                    // Most of it is put right by the leader, which the watch shows.
                    Some(policy) = seen.recv() => take(&mut waiting, policy),
                }
            }
            while let Ok(policy) = seen.try_recv() {
                take(&mut waiting, policy);
            }
            let Some(((kind, name), policy)) = waiting.pop_first() else { continue };
            match write(&client, kind, &policy.0, policy.1).await {
                Ok(()) => delay = FIRST_RETRY,
                Err(error) => {
                    tracing::warn!(kind = %kind, policy = %name, "cannot write a policy's status, trying again: {error}");
                    waiting.entry((kind, name)).or_insert(policy);
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(LONGEST_RETRY);
                }
            }
        }
    };
    shutdown.run_until_cancelled(work).await;
}

fn take(waiting: &mut BTreeMap<(PolicyKind, Name), (PolicyFact, bool)>, (key, policy): Seen) {
    let is_wrong = |(policy, idle): &(PolicyFact, bool)| {
        policy.kind != PolicyKind::NetworkPolicy && conditions(policy, *idle).is_some()
    };
    match policy.filter(is_wrong) {
        Some(policy) => drop(waiting.insert(key, policy)),
        None => drop(waiting.remove(&key)),
    }
}

/// All conditions as they should be; none if they are.
fn conditions(policy: &PolicyFact, idle: bool) -> Option<Vec<Value>> {
    let (status, reason, message) = verdict(policy, idle);
    let is_ours = |condition: &&Value| condition["type"] == CONDITION;
    let old = policy.conditions.iter().find(is_ours);
    let same = |field: &str, text: &str| old.is_some_and(|old| old[field] == text);
    if same("status", status) && same("reason", reason) && same("message", &message) {
        return None;
    }
    let since = old
        .filter(|old| old["status"] == status)
        .and_then(|old| old["lastTransitionTime"].as_str())
        .map_or_else(|| Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true), str::to_owned);
    let mut all: Vec<Value> =
        policy.conditions.iter().filter(|condition| !is_ours(condition)).cloned().collect();
    all.push(json!({
        "type": CONDITION, "status": status, "reason": reason, "message": message, "lastTransitionTime": since,
    }));
    Some(all)
}

fn verdict(policy: &PolicyFact, idle: bool) -> (&'static str, &'static str, String) {
    let mut sentences = String::new();
    for problem in &*policy.problems {
        if !sentences.is_empty() {
            sentences.push_str(". ");
        }
        sentences.push_str(&problem.to_string());
    }
    if let Some(first) = policy.problems.iter().find(|problem| problem.is_failure()) {
        let mut message = format!("Not enforced as written: {sentences}");
        message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
        return ("False", first.reason(), message);
    }
    let mut message = "Policy validation succeeded".to_owned();
    if !sentences.is_empty() {
        message = format!("{message}. {sentences}");
        message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
    }
    if idle {
        message.push_str(". It selects no pod of this cluster at present");
    }
    ("True", "PolicyValid", message)
}

async fn write(client: &Client, kind: PolicyKind, policy: &PolicyFact, idle: bool) -> Result<(), String> {
    let Some(conditions) = conditions(policy, idle) else { return Ok(()) };
    let resource = ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("cilium.io", "v2", kind.kind()),
        match kind {
            PolicyKind::CiliumClusterwideNetworkPolicy => "ciliumclusterwidenetworkpolicies",
            _ => "ciliumnetworkpolicies",
        },
    );
    let api: Api<DynamicObject> = match kind.is_namespaced() {
        true => Api::namespaced_with(client.clone(), &policy.name.namespace, &resource),
        false => Api::all_with(client.clone(), &resource),
    };
    let patch = json!({
        "metadata": {"resourceVersion": policy.resource_version}, "status": {"conditions": conditions},
    });
    match api.patch_status(&policy.name.name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(()),
        // Changed or gone meanwhile: the watch brings what holds now.
        Err(kube::Error::Api(status)) if status.code == 409 || status.is_not_found() => Ok(()),
        Err(kube::Error::Api(status)) if status.is_forbidden() => Err(format!(
            "{}: grant this account the verb patch on {}/status",
            status.message, resource.plural
        )),
        // It would be refused again.
        Err(kube::Error::Api(status)) if status.is_invalid() || status.code == 400 => {
            tracing::warn!(kind = %kind, policy = %policy.name, "the API does not take the policy's status: {}", status.message);
            Ok(())
        }
        Err(error) => Err(chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use isthmus_wire::local::LocalPolicy;

    use super::*;
    use crate::exporter::facts::understand;

    fn policy(spec: Value, conditions: Vec<Value>) -> PolicyFact {
        let (kind, name) = (PolicyKind::CiliumNetworkPolicy, Name::new("app", "a"));
        let says = LocalPolicy::new("u".to_owned(), 1, vec![spec]);
        PolicyFact {
            problems: understand(kind, &name, &says).problems.into(),
            subjects: [].into(),
            name,
            kind,
            says: says.into(),
            resource_version: "1".to_owned(),
            conditions,
        }
    }

    #[test]
    fn a_condition_that_is_right_is_left_alone_and_others_are_kept() {
        let other = json!({"type": "Other", "status": "True"});
        let good = policy(json!({"endpointSelector": {}}), vec![other.clone()]);
        let conditions = conditions(&good, false).expect("it has none yet");
        assert_eq!(conditions[0], other);
        assert_eq!((&conditions[1]["type"], &conditions[1]["status"]), (&json!("Valid"), &json!("True")));
        let good = PolicyFact { conditions, ..good };
        assert_eq!(super::conditions(&good, false), None);
        let idle = super::conditions(&good, true).expect("that is news");
        assert!(idle[1]["message"].as_str().expect("text").contains("selects no pod"), "{idle:?}");
    }

    #[test]
    fn a_field_that_is_not_supported_is_named() {
        let bad = policy(
            json!({"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "example.org"}]}]}),
            Vec::new(),
        );
        let conditions = conditions(&bad, false).expect("it has none yet");
        assert_eq!(conditions[0]["status"], "False");
        assert!(conditions[0]["message"].as_str().expect("text").contains("toFQDNs"), "{conditions:?}");
    }
}
