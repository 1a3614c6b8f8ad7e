//! Tells in Kubernetes of pods whose policy could not be put in force: an Event at the pod when that begins and when it is
//! over, and meanwhile a condition of this node's own, `isthmus.io/Enforced.<node>`, at each policy that has a part in it.
//!
//! Kubernetes' own NetworkPolicy has no status; of it only the Event tells. Nothing waits for any of this: the
//! reconciler is looked at, one request is made at a time, and what fails is tried again. Conditions of others are kept.
//! Those that an earlier run left are found once after the start.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use chrono::{SecondsFormat, Utc};
use isthmus_policy::PolicyName;
use isthmus_wire::local::PolicyKind;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::policy::Refusal;
use crate::reconcile::Looks;

/// Longest `reportingInstance` of an Event that Kubernetes takes, in bytes. A node's name may be longer.
const LONGEST_INSTANCE: usize = 128;
/// How often the reconciler is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two rounds of requests.
const PAUSE: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Between two messages of one condition, which change with every identity.
const REPHRASE_AFTER: Duration = Duration::from_secs(60);
/// Longest time that a request may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Events that wait to be sent. What is more is in the log and in the status.
const WAITING_EVENTS: usize = 256;
/// How often the API may refuse an Event before it is left out.
const REFUSED_AT_MOST: usize = 10;
/// Longest message of a condition, in bytes: every node may have one at a policy.
const LONGEST_MESSAGE: usize = 1024;
/// Longest note that Kubernetes takes, in bytes.
const LONGEST_NOTE: usize = 1024;
/// Names in one message.
const NAMES: usize = 5;
/// Objects of one page of a list.
const PAGE: u32 = 500;

/// Tells until `shutdown`.
pub(crate) async fn tell(client: Client, node: String, looks: Looks, shutdown: CancellationToken) {
    let mut teller = Teller::new(client, &node);
    let work = async {
        let mut delay = PAUSE;
        loop {
            let (version, told) = (teller.version, teller.told.keys().cloned().collect());
            let Some(seen) = looks.at(move |reconciler, _| look(reconciler.policies(), version, told)).await
            else {
                return;
            };
            let decided = seen.decided;
            if let Some(news) = seen.news {
                teller.version = Some(seen.version);
                teller.take(news);
            }
            let pause = match teller.step(decided).await {
                Ok(true) => {
                    delay = PAUSE;
                    PAUSE
                }
                Ok(false) => LOOK_EVERY,
                Err(error) => {
                    tracing::warn!(
                        "cannot tell in Kubernetes which policies are not in force, trying again: {error}"
                    );
                    delay = (delay * 2).min(LONGEST_RETRY);
                    delay
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    shutdown.run_until_cancelled(work).await;
}

/// What the reconciler says.
struct Seen {
    version: u64,
    decided: bool,
    /// None: as before.
    news: Option<News>,
}

struct News {
    refusals: Vec<Refusal>,
    /// Pods that were told of, and are still there.
    there: BTreeSet<Arc<str>>,
}

fn look(policies: &crate::policy::Policies, version: Option<u64>, told: BTreeSet<Arc<str>>) -> Seen {
    let now = policies.refusals_version();
    let news = (version != Some(now)).then(|| News {
        refusals: policies.refusals(),
        there: policies
            .local_endpoints()
            .map(|(_, pod)| pod.uid.clone())
            .filter(|uid| told.contains(uid))
            .collect(),
    });
    Seen { version: now, decided: policies.is_decided(), news }
}

/// What a condition says.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Saying {
    reason: &'static str,
    message: String,
}

/// A condition as it should be and as it is.
#[derive(Debug)]
struct Standing {
    wanted: Option<Saying>,
    /// None: not known.
    written: Option<Option<Saying>>,
    at: Instant,
}

impl Standing {
    fn is_due(&self) -> bool {
        match (&self.wanted, &self.written) {
            (Some(wanted), Some(Some(written))) => {
                wanted != written && (wanted.reason != written.reason || self.at.elapsed() >= REPHRASE_AFTER)
            }
            (wanted, written) => written.as_ref() != Some(wanted),
        }
    }
}

struct Teller {
    client: Client,
    recorder: Recorder,
    node: String,
    /// Type of the conditions.
    condition: String,
    version: Option<u64>,
    /// Pods that are refused, by UID.
    told: BTreeMap<Arc<str>, Arc<str>>,
    /// With how often each was refused.
    events: VecDeque<(Event, ObjectReference, usize)>,
    conditions: BTreeMap<PolicyName, Standing>,
    /// The policy that was written last: those that fail do not hold up the others.
    last: Option<PolicyName>,
    /// Whether the conditions of an earlier run have been found.
    listed: bool,
}

impl Teller {
    fn new(client: Client, node: &str) -> Self {
        let instance = node[..node.floor_char_boundary(LONGEST_INSTANCE)].to_owned();
        let reporter = Reporter { controller: "isthmus-node-agent".to_owned(), instance: Some(instance) };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            node: node.to_owned(),
            condition: format!("isthmus.io/Enforced.{node}"),
            version: None,
            told: BTreeMap::new(),
            events: VecDeque::new(),
            conditions: BTreeMap::new(),
            last: None,
            listed: false,
        }
    }

    /// What is to be told now.
    fn take(&mut self, news: News) {
        let refused: BTreeMap<Arc<str>, Arc<str>> =
            news.refusals.iter().map(|refusal| (refusal.uid.clone(), refusal.pod.clone())).collect();
        for refusal in &news.refusals {
            if !self.told.contains_key(&refusal.uid) {
                self.event(began(refusal), &refusal.uid, &refusal.pod);
            }
        }
        for (uid, pod) in std::mem::replace(&mut self.told, refused) {
            if !self.told.contains_key(&uid) && news.there.contains(&uid) {
                self.event(over(), &uid, &pod);
            }
        }
        let mut wanted = self.sayings(&news.refusals);
        for (name, standing) in &mut self.conditions {
            standing.wanted = wanted.remove(name);
        }
        let at = Instant::now();
        let new = wanted
            .into_iter()
            .map(|(name, saying)| (name, Standing { wanted: Some(saying), written: None, at }));
        self.conditions.extend(new);
    }

    fn event(&mut self, event: Event, uid: &str, pod: &str) {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        let regarding = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(name.to_owned()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        if self.events.len() < WAITING_EVENTS {
            self.events.push_back((event, regarding, 0));
        }
    }

    fn sayings(&self, refusals: &[Refusal]) -> BTreeMap<PolicyName, Saying> {
        let mut concerned: BTreeMap<&PolicyName, Vec<&Refusal>> = BTreeMap::new();
        for refusal in refusals {
            let names = refusal.policies.keys().filter(|name| name.kind != PolicyKind::NetworkPolicy);
            names.for_each(|name| concerned.entry(name).or_default().push(refusal));
        }
        let say = |refusals: Vec<&Refusal>| {
            let pods = named(refusals.iter().map(|refusal| refusal.pod.to_string()));
            let first = refusals.first().map(|refusal| refusal.message.as_str()).unwrap_or_default();
            let message = format!(
                "On node {} not in force for {pods}, which is allowed nothing in the directions that its policies restrict: {first}",
                self.node
            );
            let too_large = refusals.iter().any(|refusal| refusal.is_too_large);
            Saying { reason: reason(too_large), message: bounded(message, LONGEST_MESSAGE) }
        };
        concerned.into_iter().map(|(name, refusals)| (name.clone(), say(refusals))).collect()
    }

    /// Makes one request of each kind that is due. Whether there was one.
    async fn step(&mut self, decided: bool) -> Result<bool, String> {
        let (mut worked, mut failure) = (false, None);
        if decided && !self.listed {
            worked = true;
            match in_time(self.find_earlier()).await {
                Ok(()) => self.listed = true,
                Err(error) => failure = Some(error),
            }
        }
        if let Some((event, regarding, refused)) = self.events.pop_front() {
            worked = true;
            if let Err((error, by_api)) = self.send(&event, &regarding).await {
                if refused < REFUSED_AT_MOST {
                    self.events.push_back((event, regarding, refused + usize::from(by_api)));
                }
                failure = Some(error);
            }
        }
        if let Some(name) = self.next_due() {
            worked = true;
            let wanted = self.conditions.get(&name).and_then(|standing| standing.wanted.clone());
            match in_time(self.write(&name, wanted.as_ref())).await {
                Ok(()) if wanted.is_none() => drop(self.conditions.remove(&name)),
                Ok(()) => {
                    if let Some(standing) = self.conditions.get_mut(&name) {
                        (standing.written, standing.at) = (Some(wanted), Instant::now());
                    }
                }
                Err(error) => failure = Some(format!("{name}: {error}")),
            }
            self.last = Some(name);
        }
        failure.map_or(Ok(worked), Err)
    }

    fn next_due(&self) -> Option<PolicyName> {
        let after = self.last.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let later = self.conditions.range((after, Bound::Unbounded));
        let mut due = later.chain(&self.conditions).filter(|(_, standing)| standing.is_due());
        due.next().map(|(name, _)| name.clone())
    }

    /// Fails with whether it was the API that said no.
    async fn send(&self, event: &Event, regarding: &ObjectReference) -> Result<(), (String, bool)> {
        match tokio::time::timeout(PATIENCE, self.recorder.publish(event, regarding)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err((
                advice(&error, "create and patch on events.events.k8s.io"),
                matches!(error, kube::Error::Api(_)),
            )),
            Err(_) => Err(("the Kubernetes API does not answer".to_owned(), false)),
        }
    }

    /// Has conditions of an earlier run of which nothing is known now taken away.
    async fn find_earlier(&mut self) -> Result<(), String> {
        for kind in [PolicyKind::CiliumNetworkPolicy, PolicyKind::CiliumClusterwideNetworkPolicy] {
            let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource(kind));
            let mut page = ListParams::default().limit(PAGE);
            loop {
                let list = match api.list(&page).await {
                    Ok(list) => list,
                    // The cluster does not have the kind.
                    Err(kube::Error::Api(status)) if status.is_not_found() => break,
                    Err(error) => return Err(advice(&error, &format!("list on {}", resource(kind).plural))),
                };
                for policy in &list.items {
                    let ours =
                        conditions(policy).iter().any(|condition| condition["type"] == *self.condition);
                    let name = policy.name_any().parse().ok();
                    let namespace = policy.namespace().map(|namespace| namespace.parse().ok());
                    if let (true, Some(name), None | Some(Some(_))) = (ours, name, &namespace) {
                        let name = PolicyName { kind, namespace: namespace.flatten(), name };
                        let unknown = Standing { wanted: None, written: None, at: Instant::now() };
                        self.conditions.entry(name).or_insert(unknown);
                    }
                }
                match list.metadata.continue_.filter(|token| !token.is_empty()) {
                    Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
                    None => break,
                }
            }
        }
        Ok(())
    }

    /// On top of the object as it is: who was faster is not overwritten.
    async fn write(&self, name: &PolicyName, wanted: Option<&Saying>) -> Result<(), String> {
        let resource = resource(name.kind);
        let api: Api<DynamicObject> = match &name.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace.as_ref(), &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        let name: &str = name.name.as_ref();
        let policy = match api.get_opt(name).await {
            Ok(Some(policy)) => policy,
            Ok(None) => return Ok(()),
            Err(error) => return Err(advice(&error, &format!("get on {}", resource.plural))),
        };
        let Some(conditions) = amended(&conditions(&policy), &self.condition, wanted) else { return Ok(()) };
        let patch = json!({
            "metadata": {"resourceVersion": policy.metadata.resource_version}, "status": {"conditions": conditions},
        });
        match api.patch_status(name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            // It would be refused again.
            Err(kube::Error::Api(status)) if status.is_invalid() || status.code == 400 => {
                tracing::warn!(
                    policy = name,
                    "the API does not take the policy's status: {}",
                    status.message
                );
                Ok(())
            }
            Err(error) => Err(advice(&error, &format!("patch on {}/status", resource.plural))),
        }
    }
}

async fn in_time<T>(request: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let answer = tokio::time::timeout(PATIENCE, request).await;
    answer.unwrap_or_else(|_| Err("the Kubernetes API does not answer".to_owned()))
}

fn resource(kind: PolicyKind) -> ApiResource {
    let plural = match kind {
        PolicyKind::CiliumClusterwideNetworkPolicy => "ciliumclusterwidenetworkpolicies",
        _ => "ciliumnetworkpolicies",
    };
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("cilium.io", "v2", kind.kind()), plural)
}

fn conditions(policy: &DynamicObject) -> Vec<Value> {
    policy.data["status"]["conditions"].as_array().cloned().unwrap_or_default()
}

/// All conditions with ours as it should be; none if it is.
fn amended(all: &[Value], ours: &str, wanted: Option<&Saying>) -> Option<Vec<Value>> {
    let old = all.iter().find(|condition| condition["type"] == ours);
    let mut amended: Vec<Value> = all.iter().filter(|condition| condition["type"] != ours).cloned().collect();
    match (old, wanted) {
        (None, None) => return None,
        (Some(_), None) => {}
        (Some(old), Some(wanted))
            if old["status"] == "False"
                && old["reason"] == wanted.reason
                && old["message"] == *wanted.message =>
        {
            return None;
        }
        (old, Some(wanted)) => {
            let since = old
                .filter(|old| old["status"] == "False")
                .and_then(|old| old["lastTransitionTime"].as_str())
                .map_or_else(|| Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true), str::to_owned);
            amended.push(json!({
                "type": ours, "status": "False", "reason": wanted.reason, "message": wanted.message,
                "lastTransitionTime": since,
            }));
        }
    }
    Some(amended)
}

fn reason(too_large: bool) -> &'static str {
    if too_large { "PolicyTooLarge" } else { "PolicyNotInForce" }
}

fn began(refusal: &Refusal) -> Event {
    let mut largest: Vec<_> = refusal.policies.iter().collect();
    largest.sort_by_key(|(_, entries)| std::cmp::Reverse(**entries));
    let policies = named(largest.iter().map(|(name, entries)| format!("{name} ({entries} entries)")));
    let of = if policies.is_empty() { String::new() } else { format!(". Its policies: {policies}") };
    let note = format!(
        "The pod is allowed nothing in the directions that its policies restrict: {}{of}",
        refusal.message
    );
    event(EventType::Warning, reason(refusal.is_too_large), note)
}

fn over() -> Event {
    let note = "The pod's policy is in force; before, it was allowed nothing".to_owned();
    event(EventType::Normal, "PolicyInForce", note)
}

fn event(type_: EventType, reason: &str, note: String) -> Event {
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(bounded(note, LONGEST_NOTE)),
        action: "Enforce".to_owned(),
        secondary: None,
    }
}

/// The first names, and how many more.
fn named(names: impl ExactSizeIterator<Item = String>) -> String {
    let more = names.len().saturating_sub(NAMES);
    let first: Vec<String> = names.take(NAMES).collect();
    match more {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

fn bounded(mut text: String, longest: usize) -> String {
    text.truncate(text.floor_char_boundary(longest));
    text
}

fn advice(error: &kube::Error, verb: &str) -> String {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => {
            format!("{}: grant this account the verb {verb}", status.message)
        }
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "isthmus.io/Enforced.node-0";

    #[test]
    fn only_the_own_condition_changes() {
        let valid = json!({"type": "Valid", "status": "True"});
        let other = json!({"type": "isthmus.io/Enforced.node-1", "status": "False"});
        let before = vec![valid.clone(), other.clone()];
        let saying = Saying { reason: "PolicyTooLarge", message: "300 of 256".to_owned() };
        let with = amended(&before, OURS, Some(&saying)).expect("it is new");
        assert_eq!(with[..2], [valid, other]);
        assert_eq!((&with[2]["type"], &with[2]["status"]), (&json!(OURS), &json!("False")));
        assert_eq!(amended(&with, OURS, Some(&saying)), None, "it is there");
        assert_eq!(amended(&with, OURS, None), Some(before.clone()));
        assert_eq!(amended(&before, OURS, None), None);
    }

    #[test]
    fn a_message_names_a_few_and_counts_the_rest() {
        let names = |count: usize| named((0..count).map(|index| index.to_string()));
        assert_eq!(names(2), "0, 1");
        assert_eq!(names(7), "0, 1, 2, 3, 4 and 2 more");
    }
}
