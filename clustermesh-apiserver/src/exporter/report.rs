//! Telling people: logs, counters, Kubernetes Events and the status page.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use isthmus_wire::local::PolicyKind;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::events::{Event, EventType};
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::facts::{Name, PolicyFact};
use super::metrics::ExporterMetrics;
use super::problem::{Finding, Reason, Subject};
use super::status::ExporterStatus;
use super::translate::Counts;
use crate::election::Leadership;
use crate::recorder::Notes;

/// Objects whose findings are remembered, so that each is told once. Beyond it they are told again on every change.
const REMEMBERED: usize = 10_000;
/// Kubernetes Events that wait to be sent. What is more is only logged.
const WAITING_EVENTS: usize = 64;
/// Between two Kubernetes Events.
const EVENT_INTERVAL: Duration = Duration::from_millis(200);
/// A failed watch is tried again every 10 seconds at least: without a failure for this long, it works.
const FORGIVEN_AFTER: Duration = Duration::from_secs(20);
/// Longest note that Kubernetes takes, in bytes.
const LONGEST_NOTE: usize = 1024;

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Reporter {
    told: Arc<Mutex<HashMap<Subject, Vec<Finding>>>>,
    /// When a watch last failed.
    failures: Arc<Mutex<HashMap<&'static str, Instant>>>,
    metrics: ExporterMetrics,
    status: Arc<watch::Sender<ExporterStatus>>,
    events: mpsc::Sender<(Subject, Finding)>,
}

impl Reporter {
    /// The reporter, and the Events it wants to have sent: see [`send_events`].
    pub(crate) fn new(
        metrics: ExporterMetrics,
        status: watch::Sender<ExporterStatus>,
    ) -> (Self, mpsc::Receiver<(Subject, Finding)>) {
        let (events, receiver) = mpsc::channel(WAITING_EVENTS);
        (
            Self {
                told: Arc::default(),
                failures: Arc::default(),
                metrics,
                status: Arc::new(status),
                events,
            },
            receiver,
        )
    }

    /// All that there is to say about an object as it is now. What was said before is not said again.
    pub(crate) fn findings(&self, subject: Subject, findings: Vec<Finding>) {
        let mut told = self.told();
        if findings.is_empty() {
            if !told.is_empty() {
                told.remove(&subject);
            }
            return;
        }
        let before = told.get(&subject).map(Vec::as_slice).unwrap_or_default();
        let news: Vec<Finding> =
            findings.iter().filter(|finding| !before.contains(finding)).cloned().collect();
        if told.len() < REMEMBERED || told.contains_key(&subject) {
            told.insert(subject.clone(), findings);
        }
        drop(told);
        for finding in news {
            self.tell(&subject, finding);
        }
    }

    fn tell(&self, subject: &Subject, finding: Finding) {
        tracing::warn!(object = %subject, reason = finding.reason.as_str(), "{}", finding.message);
        self.metrics.problem(finding.reason);
        self.status.send_modify(|status| {
            *status.problems.entry(finding.reason.as_str().to_owned()).or_default() += 1;
        });
        // Whoever reads Events has the log too: what does not fit is left out.
        let _ = self.events.try_send((subject.clone(), finding));
    }

    /// A policy as it is now (`None`: gone), for the status page.
    pub(crate) fn policy(&self, kind: PolicyKind, name: &Name, policy: Option<&PolicyFact>) {
        let problems: Vec<String> = policy
            .iter()
            .flat_map(|policy| policy.problems.iter())
            .filter(|problem| problem.is_failure())
            .map(ToString::to_string)
            .collect();
        let key = format!("{kind} {name}");
        self.status.send_if_modified(|status| {
            let known = &mut status.policies_with_problems;
            let before = known.get(&key).map(Vec::as_slice).unwrap_or_default();
            if before == problems {
                return false;
            }
            if problems.is_empty() {
                known.remove(&key);
            } else if known.len() < REMEMBERED || known.contains_key(&key) {
                known.insert(key, problems);
            }
            true
        });
    }

    /// Whether a policy selects no pod at present: often a mistyped label.
    pub(crate) fn idle_policy(&self, kind: PolicyKind, name: &Name, idle: bool) {
        let api_version =
            if kind == PolicyKind::NetworkPolicy { "networking.k8s.io/v1" } else { "cilium.io/v2" };
        // Without a UID it is a subject of its own, beside what the watch said about the object.
        let subject = Subject { api_version, kind: kind.kind(), name: name.clone(), uid: String::new() };
        let message = "it selects no pod of this cluster at present, so it decides nothing".to_owned();
        let findings =
            if idle { vec![Finding::new(Reason::PolicySelectsNothing, message)] } else { Vec::new() };
        self.findings(subject, findings);
    }

    /// A watch has failed. It is told when what it says is new.
    pub(crate) fn watch_failed(&self, kind: &'static str, error: &watcher::Error, advice: &str) {
        self.metrics.watch_error(kind);
        let message = format!("{}: {advice}", chain(error));
        self.failures().insert(kind, Instant::now());
        self.status.send_if_modified(|status| {
            let watch = status.watches.entry(kind.to_owned()).or_default();
            let news = watch.error.as_ref() != Some(&message);
            if news {
                tracing::warn!(kind, "cannot watch the Kubernetes API: {message}");
                watch.error = Some(message);
            }
            news
        });
    }

    /// A watch delivers.
    pub(crate) fn watch_works(&self, kind: &'static str, list_is_complete: bool) {
        self.failures().remove(kind);
        self.status.send_if_modified(|status| {
            let watch = status.watches.entry(kind.to_owned()).or_default();
            if watch.error.take().is_some() {
                tracing::info!(kind, "the Kubernetes API is being watched again");
            } else if (watch.synced && !watch.absent) || !list_is_complete {
                return false;
            }
            watch.synced |= list_is_complete;
            watch.absent &= !list_is_complete;
            true
        });
    }

    /// There is nothing to watch: the cluster does not have the kind, and need not.
    pub(crate) fn watch_absent(&self, kind: &'static str) {
        self.failures().remove(kind);
        self.status.send_if_modified(|status| {
            let watch = status.watches.entry(kind.to_owned()).or_default();
            let absent = super::status::WatchStatus { synced: true, absent: true, error: None };
            let news = *watch != absent;
            if news {
                tracing::info!(kind, "the cluster does not have this kind; it is watched once it is there");
                *watch = absent;
            }
            news
        });
    }

    /// A watch on which nothing happens gives no sign of life: it works again when it has not failed for a while.
    pub(crate) fn forgive_watches(&self) {
        let forgiven: Vec<&'static str> = {
            let mut failures = self.failures();
            failures
                .extract_if(|_, failure| failure.elapsed() > FORGIVEN_AFTER)
                .map(|(kind, _)| kind)
                .collect()
        };
        for kind in forgiven {
            self.watch_works(kind, false);
        }
    }

    pub(crate) fn counts(&self, counts: Counts) {
        self.metrics.counts(counts);
        self.status.send_if_modified(|status| {
            let changed = status.exported != counts.into();
            status.exported = counts.into();
            changed
        });
    }

    pub(crate) fn section_complete(&self, section: &str, ready: bool) {
        self.status.send_modify(|status| {
            status.sections.insert(section.to_owned(), true);
            status.ready = ready;
        });
    }

    fn failures(&self) -> MutexGuard<'_, HashMap<&'static str, Instant>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> MutexGuard<'_, HashMap<Subject, Vec<Finding>>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends findings as Kubernetes Events, seen by `kubectl describe` on the object. Slowly, and failures do not matter. Only
/// the leader does: the other replicas have found the same.
pub(crate) async fn send_events(
    client: Client,
    mut findings: mpsc::Receiver<(Subject, Finding)>,
    leadership: Leadership,
    shutdown: CancellationToken,
) {
    let mut notes = Notes::new(client.clone(), None);
    while let Some(Some((subject, finding))) = shutdown.run_until_cancelled(findings.recv()).await {
        if !leadership.is_leading() {
            continue;
        }
        let event = Event {
            type_: EventType::Warning,
            reason: finding.reason.as_str().to_owned(),
            note: Some(bounded(finding.message)),
            action: "Export".to_owned(),
            secondary: None,
        };
        let send = async { notes.publish(&event, &reference(&client, subject).await).await };
        let sent = shutdown.run_until_cancelled(send).await;
        match sent {
            None => return,
            Some(Err(error)) => tracing::debug!("cannot record a Kubernetes Event: {}", chain(&error)),
            Some(Ok(())) => {}
        }
        if shutdown.run_until_cancelled(tokio::time::sleep(EVENT_INTERVAL)).await.is_none() {
            return;
        }
    }
}

/// The object as Events name it. `kubectl describe` shows those alone that have its UID, so one that is not known is asked for.
async fn reference(client: &Client, subject: Subject) -> ObjectReference {
    let uid = match subject.uid.is_empty() {
        true => uid(client, &subject).await,
        false => Some(subject.uid),
    };
    ObjectReference {
        api_version: Some(subject.api_version.to_owned()),
        kind: Some(subject.kind.to_owned()),
        name: Some(subject.name.name.to_string()),
        namespace: Some(subject.name.namespace.to_string()).filter(|namespace| !namespace.is_empty()),
        uid,
        ..Default::default()
    }
}

/// None if the object is gone, or may not be read: an Event without it is found by name.
async fn uid(client: &Client, subject: &Subject) -> Option<String> {
    let (group, version) = subject.api_version.split_once('/').unwrap_or(("", subject.api_version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, subject.kind));
    let api: Api<DynamicObject> = match subject.name.namespace.is_empty() {
        true => Api::all_with(client.clone(), &resource),
        false => Api::namespaced_with(client.clone(), &subject.name.namespace, &resource),
    };
    let found = api.get_metadata_opt(&subject.name.name).await;
    found.ok().flatten().and_then(|object| object.metadata.uid)
}

fn bounded(mut text: String) -> String {
    let end = text.floor_char_boundary(LONGEST_NOTE);
    text.truncate(end);
    text
}

/// An error and its causes, each once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exporter::facts::Name;

    fn subject() -> Subject {
        Subject { api_version: "v1", kind: "Service", name: Name::new("app", "echo"), uid: String::new() }
    }

    #[test]
    fn a_finding_is_told_once_and_again_after_it_had_gone() {
        let metrics = ExporterMetrics::new(&mut prometheus_client::registry::Registry::default());
        let (status, reader) = watch::channel(ExporterStatus::default());
        let (reporter, mut events) = Reporter::new(metrics, status);
        let finding = Finding::new(Reason::InvalidAnnotation, "no".to_owned());
        let counted = || reader.borrow().problems.get("InvalidAnnotation").copied().unwrap_or_default();
        reporter.findings(subject(), vec![finding.clone()]);
        reporter.findings(subject(), vec![finding.clone()]);
        assert_eq!(counted(), 1);
        reporter.findings(subject(), Vec::new());
        reporter.findings(subject(), vec![finding]);
        assert_eq!(counted(), 2);
        assert_eq!(events.try_recv().expect("an Event").0, subject());
    }
}
