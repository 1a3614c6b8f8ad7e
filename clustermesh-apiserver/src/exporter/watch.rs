//! Watches of the Kubernetes API, each object turned into a fact where it arrives.
//!
//! A watch that ends, expires (410) or cannot be started is taken up again with a growing delay. Nothing is forgotten
//! meanwhile: deletions are believed when a watch says so, or when a complete list lacks the object.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::DeserializeGuard;
use kube::runtime::utils::Backoff;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::facts::{Name, Source};
use super::problem::{Finding, Reason, Subject};
use super::report::Reporter;
use super::translate::{Event, Input};

/// How long a watch runs before it is renewed. It is also how long an API server that has gone without a word goes
/// unnoticed.
const WATCH_SECONDS: u32 = 60;

/// A kind of object that is watched.
pub(crate) trait Watched:
    Source + Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
    const API_VERSION: &'static str;
    const KIND: &'static str;
    /// What to do when the API does not have the kind.
    const IF_ABSENT: &'static str = "check the version of the Kubernetes API";
    /// The definition of a kind that a cluster need not have. Without it there are no objects, and there will be some
    /// once it has been installed.
    const OPTIONAL: Option<&'static str> = None;

    fn input(event: Event<Self::Fact>) -> Input;
}

/// Watches all objects of a kind until the receiver is gone.
pub(crate) async fn watch<K: Watched>(client: Client, inputs: mpsc::Sender<Input>, reporter: Reporter) {
    let api: Api<DeserializeGuard<K>> = Api::all(client);
    let mut delay = RetryDelay::default();
    loop {
        match follow(api.clone(), &inputs, &reporter).await {
            Followed::Unwanted => return,
            Followed::Expired => {}
            Followed::Absent => {
                reporter.watch_absent(K::KIND);
                for event in [Event::ListBegins, Event::ListEnds] {
                    if inputs.send(K::input(event)).await.is_err() {
                        return;
                    }
                }
            }
        }
        delay.reset();
        tokio::time::sleep(delay.pause()).await;
    }
}

/// Why a watch was given up.
#[derive(Debug, PartialEq)]
enum Followed {
    /// Nobody listens any more.
    Unwanted,
    /// The revision to go on from has expired, so that there has to be a new list.
    Expired,
    /// The cluster does not have the kind at present, and need not.
    Absent,
}

async fn follow<K: Watched>(
    api: Api<DeserializeGuard<K>>,
    inputs: &mpsc::Sender<Input>,
    reporter: &Reporter,
) -> Followed {
    let client = api.clone().into_client();
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let mut events = watcher(api, config).backoff(RetryDelay::default()).boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                match event {
                    // Said before the list is asked for: no sign of life.
                    watcher::Event::Init => {}
                    watcher::Event::InitDone => reporter.watch_works(K::KIND, true),
                    _ => reporter.watch_works(K::KIND, false),
                }
                if inputs.send(K::input(fact_event(event, reporter))).await.is_err() {
                    return Followed::Unwanted;
                }
            }
            // The stream lists again by itself when a running watch expires, but would try for ever to begin one that
            // has: a proxy, or a restored or restarted API, refuses it outright.
            Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) if status.code == 410 => {
                return Followed::Expired;
            }
            // The ordinary end of a watch that has fallen behind; the list follows at once.
            Err(watcher::Error::WatchError(status)) if status.code == 410 => {
                tracing::debug!(kind = K::KIND, "the watch has expired: {}", status.message);
            }
            Err(error) if is_not_found(&error) && is_absent::<K>(&client).await => return Followed::Absent,
            Err(error) => reporter.watch_failed(K::KIND, &error, &advice::<K>(&error)),
        }
    }
    Followed::Expired
}

fn is_not_found(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    matches!(error, InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status)) if status.is_not_found())
}

/// Whether an optional kind is certainly not there. An API that has the definition and only does not serve the kind (yet,
/// or any more) proves nothing: policies must not be forgotten while it restarts.
async fn is_absent<K: Watched>(client: &Client) -> bool {
    let Some(name) = K::OPTIONAL else { return false };
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    matches!(definitions.get_metadata_opt(name).await, Ok(None))
}

fn fact_event<K: Watched>(event: watcher::Event<DeserializeGuard<K>>, reporter: &Reporter) -> Event<K::Fact> {
    match event {
        watcher::Event::Init => Event::ListBegins,
        watcher::Event::InitDone => Event::ListEnds,
        watcher::Event::InitApply(object) => {
            read(object, reporter).map_or_else(Event::Unreadable, Event::Listed)
        }
        watcher::Event::Apply(object) => {
            read(object, reporter).map_or_else(Event::Unreadable, Event::Applied)
        }
        watcher::Event::Delete(object) => {
            reporter.findings(subject::<K>(&object), Vec::new());
            Event::Deleted { name: Name::of(&object), uid: object.meta().uid.clone().unwrap_or_default() }
        }
    }
}

/// The fact about an object, or the name of one that is not of its kind's form.
fn read<K: Watched>(object: DeserializeGuard<K>, reporter: &Reporter) -> Result<K::Fact, Name> {
    let subject = subject::<K>(&object);
    match object.0 {
        Ok(object) => {
            let mut findings = Vec::new();
            let fact = object.fact(&mut findings);
            reporter.findings(subject, findings);
            Ok(fact)
        }
        Err(invalid) => {
            let name = subject.name.clone();
            let message = format!("{}; what was known of it before is kept", invalid.error);
            reporter.findings(subject, vec![Finding::new(Reason::InvalidObject, message)]);
            Err(name)
        }
    }
}

fn subject<K: Watched>(object: &DeserializeGuard<K>) -> Subject {
    Subject {
        api_version: K::API_VERSION,
        kind: K::KIND,
        name: Name::of(object),
        uid: object.meta().uid.clone().unwrap_or_default(),
    }
}

/// What the operator can do about a failed watch.
fn advice<K: Watched>(error: &watcher::Error) -> String {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    let (InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error)) = error else {
        return "it is taken up again".to_owned();
    };
    match error {
        kube::Error::Api(status) if status.is_not_found() => K::IF_ABSENT.to_owned(),
        kube::Error::Api(status) if status.is_forbidden() => {
            format!("grant this account the verbs list and watch on {}", K::plural(&()))
        }
        kube::Error::Api(status) if status.code == 401 => {
            "check the credentials in the kubeconfig".to_owned()
        }
        _ => "check that the Kubernetes API can be reached".to_owned(),
    }
}

/// 200 ms, doubled up to 10 s, and back to 200 ms after half a minute of peace.
///
/// The start of each list counts as success for the stream, so success alone must not set it back.
pub(crate) struct RetryDelay {
    next: Duration,
    last_failure: Option<Instant>,
}

impl RetryDelay {
    /// The shortest.
    pub(crate) const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(10);
    const PEACE: Duration = Duration::from_secs(30);

    /// Notes a failure and says how long to wait before the next attempt.
    fn pause(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(Self::LONGEST);
        self.last_failure = Some(Instant::now());
        delay
    }
}

impl Default for RetryDelay {
    fn default() -> Self {
        Self { next: Self::FIRST, last_failure: None }
    }
}

impl Iterator for RetryDelay {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.pause())
    }
}

impl Backoff for RetryDelay {
    fn reset(&mut self) {
        if self.last_failure.is_some_and(|failure| failure.elapsed() > Self::PEACE) {
            *self = Self::default();
        }
    }
}
