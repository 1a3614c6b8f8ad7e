//! Keeps the cluster's authority and certificates as they should be. Only the leader does.
//!
//! Each round looks at what the API holds, writes what is wrong about it, and waits for the watches to show that, for the
//! next certificate to be due, or for a rotation to have settled. Every write names the version that it is based on: of two
//! who believe to lead for a moment, one is refused, and looks again.

use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use isthmus_crds::names::CA_SECRET;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;
use tokio::time::Instant;

use super::CertificatesConfig;
use super::authority::AuthoritySecret;
use super::events::Events;
use super::leaf::Leaf;
use super::plan::{Facts, Plan, Write, plan};
use super::watch::Secrets;
use crate::election::Leadership;
use crate::exporter::chain;

/// The wall clock may be set: it is looked at this often at least.
const LOOK_AGAIN: Duration = Duration::from_secs(600);
/// After a failed write.
const RETRY: Duration = Duration::from_secs(2);

pub(super) struct Keeper {
    pub(super) config: CertificatesConfig,
    pub(super) api: Api<Secret>,
    pub(super) secrets: watch::Receiver<Secrets>,
    /// The bundle that the cluster's published information has.
    pub(super) published: watch::Receiver<Option<Arc<str>>>,
    pub(super) events: Events,
    /// What a person has to see to, by Secret; for the status.
    pub(super) problems: watch::Sender<Vec<(&'static str, String)>>,
}

impl Keeper {
    /// Keeps them whenever this replica leads.
    pub(super) async fn run(mut self, mut leadership: Leadership) {
        let mut remembered = None;
        loop {
            self.stand_by(&mut leadership, &mut remembered).await;
            let mut lost = leadership.clone();
            tokio::select! {
                biased;
                () = lost.lost() => {}
                () = self.lead(&leadership, &mut remembered) => {}
            }
            // Who leads next has the word.
            self.problems.send_replace(Vec::new());
        }
    }

    /// Waits until this replica leads. Whoever leads after somebody has deleted the authority and ended the leader knows what
    /// it was at last, not what it was when it led itself.
    async fn stand_by(&mut self, leadership: &mut Leadership, remembered: &mut Option<AuthoritySecret>) {
        loop {
            let present = self.secrets.borrow_and_update().get(CA_SECRET).map(AuthoritySecret::parse);
            if let Some(Ok(authority)) = present {
                *remembered = Some(authority);
            }
            tokio::select! {
                () = leadership.gained() => return,
                Ok(()) = self.secrets.changed() => {}
            }
        }
    }

    async fn lead(&mut self, leadership: &Leadership, remembered: &mut Option<AuthoritySecret>) {
        let leaves = Leaf::all(&self.config.cluster, &self.config.namespace, &self.config.gateway_names);
        // What has spread, and since when.
        let mut spread: Option<(String, Instant)> = None;
        loop {
            let secrets = self.secrets.borrow_and_update().clone();
            let published = self.published.borrow_and_update().clone();
            let read = secrets.get(CA_SECRET).map(AuthoritySecret::parse);
            let (authority, damage) = match read {
                None => (None, None),
                Some(Ok(authority)) => (Some(authority), None),
                Some(Err(damage)) => (None, Some(damage)),
            };
            let settle = self.config.timing.settle;
            let planned = plan(
                &Facts {
                    cluster: &self.config.cluster,
                    secrets: &secrets,
                    leaves: &leaves,
                    validity: self.config.validity,
                    now: Utc::now(),
                    remembered: remembered.as_ref(),
                    published: published.as_deref(),
                    settled: spread.as_ref().is_some_and(|(_, since)| since.elapsed() >= settle),
                },
                authority.as_ref(),
            );
            let mut plan = planned.unwrap_or_else(|error| Plan {
                problems: vec![(CA_SECRET, format!("no certificate is issued: {error}"))],
                ..Plan::default()
            });
            plan.problems.extend(damage.map(|damage| {
                let advice = "put the one before back; or delete it if it is lost, to have a new one made, which cuts off \
                              every peer until it is connected again";
                (CA_SECRET, format!("no certificate is issued, since it cannot be used: {damage}; {advice}"))
            }));
            *remembered = authority.or(remembered.take());
            spread = match (plan.spread.take(), spread) {
                (Some(now), Some((before, since))) if now == before => Some((before, since)),
                (Some(now), _) => Some((now, Instant::now())),
                (None, _) => None,
            };
            let written = self.write(plan.writes, leadership).await;
            let retry = written.is_err().then_some(RETRY);
            plan.problems.extend(written.err().flatten());
            self.tell(plan.problems);

            let due = plan.due.map(|due| (due - Utc::now()).to_std().unwrap_or_default());
            let settles = spread.as_ref().map(|(_, since)| settle.saturating_sub(since.elapsed()));
            // One that has settled has had its turn.
            let settles = settles.filter(|wait| !wait.is_zero());
            let wait = [due, settles, retry].into_iter().flatten().chain([LOOK_AGAIN]).min();
            tokio::select! {
                Ok(()) = self.secrets.changed() => {}
                Ok(()) = self.published.changed() => {}
                // A moment later, so that what is due then is due.
                () = tokio::time::sleep(wait.unwrap_or(LOOK_AGAIN) + Duration::from_millis(10)) => {}
            }
        }
    }

    /// Writes in this order, and ends at the first write that does not work: with the Secret and the reason, if a person may
    /// have to see to it.
    async fn write(
        &self,
        writes: Vec<Write>,
        leadership: &Leadership,
    ) -> Result<(), Option<(&'static str, String)>> {
        for Write { name, secret, why } in writes {
            // Asked at the last moment: this process may have stood still.
            if !leadership.is_leading() {
                return Err(None);
            }
            let exists = secret.metadata.resource_version.is_some();
            let written = match exists {
                false => self.api.create(&PostParams::default(), &secret).await,
                true => self.api.replace(name, &PostParams::default(), &secret).await,
            };
            match written {
                Ok(secret) => {
                    tracing::info!(secret = name, "written: {why}");
                    self.events.wrote(&secret, &why);
                }
                // Somebody was faster, or it is gone: the watch says what holds now.
                Err(kube::Error::Api(status)) if status.code == 409 || (exists && status.is_not_found()) => {
                    return Err(None);
                }
                Err(error) => {
                    let text = format!("it cannot be written ({why}), trying again: {}", explain(&error));
                    return Err(Some((name, text)));
                }
            }
        }
        Ok(())
    }

    fn tell(&self, problems: Vec<(&'static str, String)>) {
        self.problems.send_if_modified(|known| {
            let news = *known != problems;
            if news {
                for (secret, problem) in problems.iter().filter(|problem| !known.contains(problem)) {
                    tracing::error!(secret, "{problem}");
                    self.events.problem(secret, problem);
                }
                *known = problems;
            }
            news
        });
    }
}

fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => {
            format!(
                "{}: grant this account the verbs create and update on secrets in this namespace",
                status.message
            )
        }
        kube::Error::Api(status) if status.is_not_found() => {
            format!("{}: check that the namespace given with --namespace exists", status.message)
        }
        error => chain(error),
    }
}
