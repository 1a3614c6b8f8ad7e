//! Secrets of type `isthmus.io/peer`: watched in one namespace, annotated to connect or to admit.
//!
//! Only what a Secret says is kept, not the Secret, and only of those that ask for something.

mod book;

use std::fmt;
use std::time::{Duration, Instant};

use futures::StreamExt;
use isthmus_crds::peer::{ADMIT_ANNOTATION, CONNECT_ANNOTATION, PEER_SECRET_TYPE};
use isthmus_kvstore::config::LiveIdentity;
use isthmus_wire::ClusterName;
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::sync::watch;

use self::book::Book;
use super::{Found, Unread};
use crate::exporter::{RetryDelay, chain};
use crate::tasks::Tasks;

/// Secrets per answer of a list: each may be as large as a Secret can be.
const PAGE: u32 = 50;
/// How long a watch runs before it is renewed.
const WATCH_SECONDS: u32 = 60;
/// Attempts are at most 10 s apart: without a failure for this long, the watch works.
const FORGIVEN_AFTER: Duration = Duration::from_secs(20);

/// The Secrets to follow.
#[derive(Clone)]
pub struct SecretSource {
    /// Access to the Kubernetes API: list and watch on Secrets.
    pub client: Client,
    /// The namespace that they are in.
    pub namespace: String,
    /// Who to be towards peers whose Secret holds no client certificate.
    pub identity: LiveIdentity,
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretSource").field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

/// Follows the Secrets. `own` is the name of the own cluster.
///
/// A Secret that turns unusable keeps its last usable configuration, so that a bad edit cuts no peer off. Only one that is gone,
/// or does not ask for anything any more, is removed.
pub(super) fn follow(source: SecretSource, own: ClusterName, tasks: &Tasks) -> watch::Receiver<Found> {
    let reason =
        format!("waiting for the first list of the peers' Secrets in namespace {}", source.namespace);
    let unread = Some(Unread { first: true, reason });
    let (send, receive) = watch::channel(Found { unread: unread.clone(), ..Found::default() });
    let mut follower = Follower {
        api: Api::namespaced(source.client, &source.namespace),
        book: Book::new(source.namespace, own, source.identity),
        unread,
        failed: Instant::now(),
        send,
    };
    tasks.spawn("the watch of the peers' Secrets", async move { follower.run().await });
    receive
}

struct Follower {
    api: Api<Secret>,
    book: Book,
    unread: Option<Unread>,
    failed: Instant,
    send: watch::Sender<Found>,
}

impl Follower {
    async fn run(&mut self) {
        let config = watcher::Config::default()
            .fields(&format!("type={PEER_SECRET_TYPE}"))
            .page_size(PAGE)
            .timeout(WATCH_SECONDS);
        loop {
            let mut events = watcher(self.api.clone(), config.clone()).backoff(RetryDelay::default()).boxed();
            let mut forgive = tokio::time::interval(FORGIVEN_AFTER / 4);
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    _ = forgive.tick() => {
                        self.forgive();
                        continue;
                    }
                };
                match event {
                    Some(Ok(event)) => self.event(event),
                    // The stream would try for ever to go on from a revision that has expired.
                    Some(Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))))
                        if status.code == 410 =>
                    {
                        break;
                    }
                    // The ordinary end of a watch that has fallen behind; the list follows at once.
                    Some(Err(watcher::Error::WatchError(status))) if status.code == 410 => {}
                    Some(Err(error)) => self.failed(&error),
                    None => break,
                }
            }
            tokio::time::sleep(RetryDelay::FIRST).await;
        }
    }

    fn event(&mut self, event: watcher::Event<Secret>) {
        match event {
            // Nothing is known of the new list yet, and the old one holds until it is complete.
            watcher::Event::Init => return self.book.begin_list(),
            watcher::Event::InitApply(secret) => return self.book.listed(&secret),
            watcher::Event::InitDone => {
                self.book.end_list();
                self.unread = None;
            }
            watcher::Event::Apply(secret) => self.book.applied(&secret),
            watcher::Event::Delete(secret) => self.book.deleted(&secret),
        }
        self.publish();
    }

    fn failed(&mut self, error: &watcher::Error) {
        self.failed = Instant::now();
        let reason = format!("{}: {}", chain(error), advice(error));
        let first = self.unread.as_ref().is_some_and(|unread| unread.first);
        let unread = Unread { first, reason };
        if self.unread.as_ref() != Some(&unread) {
            tracing::warn!(
                reason = unread.reason,
                "the peers' Secrets cannot be watched; the peers known so far stay connected"
            );
            self.unread = Some(unread);
            self.publish();
        }
    }

    /// A watch on which nothing happens gives no sign of life.
    fn forgive(&mut self) {
        let running = self.unread.as_ref().is_some_and(|unread| !unread.first);
        if running && self.failed.elapsed() > FORGIVEN_AFTER {
            tracing::info!("the peers' Secrets are being watched again");
            self.unread = None;
            self.publish();
        }
    }

    fn publish(&mut self) {
        let now = Found { unread: self.unread.clone(), ..self.book.found() };
        self.send.send_if_modified(|found| {
            for (secret, refused) in
                now.refused.iter().filter(|(secret, refused)| found.refused.get(*secret) != Some(refused))
            {
                tracing::error!(reason = refused.reason, "peer configuration refused: {secret}");
            }
            super::replace(found, now)
        });
    }
}

fn advice(error: &watcher::Error) -> String {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
            if status.is_forbidden() =>
        {
            format!(
                "grant this account the verbs list and watch on secrets in this namespace; peers are the ones of type \
                 {PEER_SECRET_TYPE} annotated {CONNECT_ANNOTATION}=true or {ADMIT_ANNOTATION}=true"
            )
        }
        InitialListFailed(_) | WatchStartFailed(_) | WatchFailed(_) => {
            "check that the Kubernetes API can be reached".to_owned()
        }
        _ => "it is taken up again".to_owned(),
    }
}
