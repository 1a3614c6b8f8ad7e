//! Tells in Kubernetes Events, at the Secrets, what became of their certificates. Only the leader does.

use k8s_openapi::api::core::v1::{ObjectReference, Secret};
use kube::runtime::events::{Event, EventType};
use kube::{Client, Resource};
use tokio::sync::mpsc;

use crate::election::Leadership;
use crate::exporter::chain;
use crate::recorder::Notes;
use crate::tasks::Tasks;

/// Events that wait. Whoever reads Events has the log too: what does not fit is left out.
const WAITING: usize = 32;
/// Longest note that Kubernetes takes, in bytes.
const LONGEST_NOTE: usize = 1024;

/// Where to hand in what is to be told. Cheap to clone.
#[derive(Clone)]
pub(super) struct Events {
    namespace: String,
    waiting: mpsc::Sender<(ObjectReference, Event)>,
}

impl Events {
    /// Sends them in the background.
    pub(super) fn start(
        client: Client,
        namespace: &str,
        replica: &str,
        leadership: Leadership,
        tasks: &Tasks,
    ) -> Self {
        let (waiting, mut events) = mpsc::channel::<(ObjectReference, Event)>(WAITING);
        let mut notes = Notes::new(client, Some(replica));
        tasks.spawn("the sending of Events about certificates", async move {
            while let Some((at, event)) = events.recv().await {
                if !leadership.is_leading() {
                    continue;
                }
                if let Err(error) = notes.publish(&event, &at).await {
                    tracing::debug!("cannot record a Kubernetes Event: {}", chain(&error));
                }
            }
        });
        Self { namespace: namespace.to_owned(), waiting }
    }

    /// A Secret was written.
    pub(super) fn wrote(&self, secret: &Secret, why: &str) {
        self.hand_in(secret.object_ref(&()), EventType::Normal, "CertificateWritten", why);
    }

    /// A Secret cannot be used, or not as it is meant.
    pub(super) fn problem(&self, secret: &str, problem: &str) {
        let at = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Secret".to_owned()),
            name: Some(secret.to_owned()),
            namespace: Some(self.namespace.clone()),
            ..ObjectReference::default()
        };
        self.hand_in(at, EventType::Warning, "CertificateUnusable", problem);
    }

    fn hand_in(&self, at: ObjectReference, type_: EventType, reason: &str, note: &str) {
        let note = note[..note.floor_char_boundary(LONGEST_NOTE)].to_owned();
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note),
            action: "KeepCertificates".to_owned(),
            secondary: None,
        };
        let _ = self.waiting.try_send((at, event));
    }
}
