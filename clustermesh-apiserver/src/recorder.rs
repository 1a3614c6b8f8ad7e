//! Recording Kubernetes Events, within what the API takes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, Recorder, Reporter};

/// Who records.
const CONTROLLER: &str = "isthmus-clustermesh-apiserver";
/// Longest `reportingInstance` that Kubernetes takes, in bytes.
const LONGEST_INSTANCE: usize = 128;
/// Notes that are remembered. Beyond it an Event that is recorded again is another one.
const NOTES: usize = 256;

/// Records Events. One that was recorded a few minutes ago, and is again, is counted up.
///
/// What an Event says cannot be changed (the API refuses it), and kube's recorder takes Events that differ in their note
/// alone for one: it would count up the old note, and the new one would never be read. So each note has a recorder.
pub(crate) struct Notes {
    client: Client,
    reporter: Reporter,
    by_note: HashMap<Option<String>, Recorder>,
}

impl Notes {
    /// As this replica; as the machine's name says if there is only one.
    pub(crate) fn new(client: Client, replica: Option<&str>) -> Self {
        let mut reporter = Reporter::from(CONTROLLER);
        if let Some(replica) = replica {
            reporter.instance = Some(replica.to_owned());
        }
        if let Some(instance) = &mut reporter.instance {
            instance.truncate(instance.floor_char_boundary(LONGEST_INSTANCE));
        }
        Self { client, reporter, by_note: HashMap::new() }
    }

    /// Records one.
    ///
    /// # Errors
    /// What the API, or the way to it, says.
    pub(crate) async fn publish(&mut self, event: &Event, about: &ObjectReference) -> kube::Result<()> {
        if self.by_note.len() >= NOTES && !self.by_note.contains_key(&event.note) {
            self.by_note.clear();
        }
        let recorder = match self.by_note.entry(event.note.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Recorder::new(self.client.clone(), self.reporter.clone())),
        };
        recorder.publish(event, about).await
    }
}

#[cfg(test)]
mod tests {
    use isthmus_kube_api::{Config, KubeApi};
    use k8s_openapi::api::events::v1;
    use kube::api::ListParams;
    use kube::runtime::events::EventType;
    use kube::{Api, ResourceExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn another_note_is_another_event_and_the_same_one_is_counted_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let kubernetes = KubeApi::serve(listener, Config::default()).expect("an API");
        let server = format!("http://{}", kubernetes.addresses()[0]);
        let client = Client::try_from(kube::Config::new(server.parse().expect("a URL"))).expect("a client");
        // Longer than the API takes.
        let mut notes = Notes::new(client.clone(), Some(&"replica-".repeat(20)));
        let about = ObjectReference { name: Some("beta".to_owned()), ..ObjectReference::default() };
        for note in ["it is unreachable", "it is unreachable", "its certificate has expired"] {
            let event = Event {
                type_: EventType::Warning,
                reason: "ConnectionLost".to_owned(),
                note: Some(note.to_owned()),
                action: "Connect".to_owned(),
                secondary: None,
            };
            notes.publish(&event, &about).await.expect(note);
        }
        let events: Api<v1::Event> = Api::namespaced(client, "default");
        let mut events = events.list(&ListParams::default()).await.expect("a list").items;
        events.sort_by_key(ResourceExt::name_any);
        let counts = events.iter().map(|event| {
            let times = event.series.as_ref().map_or(1, |series| series.count);
            (event.note.as_deref().unwrap_or_default(), times)
        });
        assert_eq!(Vec::from_iter(counts), [("it is unreachable", 2), ("its certificate has expired", 1)]);
    }
}
