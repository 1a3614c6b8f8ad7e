//! Identities in the Kubernetes API: created, found to exist, deleted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use isthmus_crds::CiliumIdentity;
use isthmus_wire::Labels;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::facts::Source;
use super::metrics::ExporterMetrics;
use super::report::chain;
use super::translate::{Event, IdentityAction, Input};

/// Requests in flight at once.
const PARALLEL: usize = 16;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// Carries out what the translation wants done about identities, and tells it what became of it.
///
/// Every request ends: with an object that has the number, whoever created it, or with a refusal. Anything else is
/// tried again, with a growing delay.
#[derive(Clone)]
pub(crate) struct IdentityStore {
    api: Api<CiliumIdentity>,
    answers: mpsc::Sender<Input>,
    metrics: ExporterMetrics,
    permits: Arc<Semaphore>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// What became of an attempt to create an identity.
enum Created {
    /// An object has the number now.
    Exists(Box<CiliumIdentity>),
    /// It existed, and was deleted before it could be read.
    Vanished,
    /// The API does not take it.
    Refused(String),
}

impl IdentityStore {
    pub(crate) fn new(
        client: Client,
        answers: mpsc::Sender<Input>,
        metrics: ExporterMetrics,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            api: Api::all(client),
            answers,
            metrics,
            permits: Arc::new(Semaphore::new(PARALLEL)),
            tasks: TaskTracker::new(),
            shutdown,
        }
    }

    /// Starts the action and returns at once.
    pub(crate) fn carry_out(&self, action: IdentityAction) {
        let store = self.clone();
        self.tasks.spawn(async move {
            let work = async {
                match action {
                    IdentityAction::Create { id, labels } => store.create(id, &labels).await,
                    IdentityAction::Delete { id, uid, resource_version } => {
                        store.delete(id, uid, resource_version).await;
                    }
                }
            };
            store.shutdown.run_until_cancelled(work).await;
        });
    }

    /// Waits until nothing is in flight any more.
    pub(crate) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn create(&self, id: u32, labels: &Labels) {
        let object = CiliumIdentity::new(id, labels.k8s(Labels::NAMESPACE), security_labels(labels));
        let mut delay = FIRST_RETRY;
        loop {
            let answer = match self.attempt(id, &object).await {
                Ok(Created::Exists(object)) => {
                    // What is wrong with somebody else's object is told when the watch brings it.
                    Some(Input::Identity(Event::Applied(object.fact(&mut Vec::new()))))
                }
                Ok(Created::Refused(why)) => Some(Input::IdentityRefused { id, why }),
                Ok(Created::Vanished) => None,
                Err(error) => {
                    self.metrics.identity_error();
                    tracing::warn!(id, "cannot store an identity, trying again: {}", explain(&error));
                    None
                }
            };
            if let Some(answer) = answer {
                // Without a receiver there is nobody left who needs to know.
                let _ = self.answers.send(answer).await;
                return;
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(LONGEST_RETRY);
        }
    }

    async fn attempt(&self, id: u32, object: &CiliumIdentity) -> Result<Created, kube::Error> {
        let _permit = self.permits.acquire().await;
        match self.api.create(&PostParams::default(), object).await {
            Ok(object) => Ok(Created::Exists(Box::new(object))),
            Err(kube::Error::Api(status)) if status.is_already_exists() || status.code == 409 => {
                let found = self.api.get_opt(&id.to_string()).await?;
                Ok(found.map_or(Created::Vanished, |object| Created::Exists(Box::new(object))))
            }
            Err(kube::Error::Api(status)) if status.is_invalid() || status.code == 400 => {
                Ok(Created::Refused(status.message))
            }
            Err(error) => Err(error),
        }
    }

    async fn delete(&self, id: u32, uid: String, resource_version: String) {
        let _permit = self.permits.acquire().await;
        let preconditions = Preconditions {
            resource_version: Some(resource_version).filter(|version| !version.is_empty()),
            uid: Some(uid).filter(|uid| !uid.is_empty()),
        };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match self.api.delete(&id.to_string(), &params).await {
            Ok(_) => tracing::info!(id, "deleted an identity that no pod needs any more"),
            // Changed or gone meanwhile: the watch says what holds now.
            Err(kube::Error::Api(status)) if status.is_not_found() || status.code == 409 => {}
            Err(error) => {
                self.metrics.identity_error();
                tracing::warn!(id, "cannot delete an unused identity: {}", explain(&error));
            }
        }
    }
}

fn security_labels(labels: &Labels) -> BTreeMap<String, String> {
    labels.iter().map(|(key, label)| (format!("{}:{key}", label.source), label.value.clone())).collect()
}

fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => {
            format!(
                "{}: grant this account the verbs get, create and delete on ciliumidentities",
                status.message
            )
        }
        kube::Error::Api(status) if status.is_not_found() => {
            format!("{}: apply crds/yaml/ciliumidentities.cilium.io.yaml to the cluster", status.message)
        }
        error => chain(error),
    }
}
