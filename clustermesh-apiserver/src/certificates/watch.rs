//! Follows the Secrets with certificates, one small watch each: of the namespace's other Secrets nothing is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::utils::StreamBackoff;
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio::sync::watch;

use crate::exporter::chain;
use crate::tasks::Tasks;

/// How long a watch runs before it is renewed: an API server that has gone without a word goes unnoticed as long.
const WATCH_SECONDS: u32 = 60;

/// The Secrets as they were last seen.
#[derive(Clone, Default)]
pub(super) struct Secrets {
    /// None: known not to exist. Left out: not known yet.
    by_name: BTreeMap<&'static str, Option<Arc<Secret>>>,
    /// Why a watch does not work at present.
    pub(super) trouble: BTreeMap<&'static str, String>,
}

impl Secrets {
    /// The Secret, if it is there.
    pub(super) fn get(&self, name: &str) -> Option<&Secret> {
        self.by_name.get(name)?.as_deref()
    }

    /// These and no others.
    #[cfg(test)]
    pub(super) fn of(all: impl IntoIterator<Item = (&'static str, Option<Secret>)>) -> Self {
        let by_name = all.into_iter().map(|(name, secret)| (name, secret.map(Arc::new))).collect();
        Self { by_name, trouble: BTreeMap::new() }
    }

    /// Whether it is known that there is, or is not, this Secret.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }
}

/// Follows the Secrets `names` in `namespace`.
pub(super) fn follow(
    client: &Client,
    namespace: &str,
    names: &[&'static str],
    tasks: &Tasks,
) -> watch::Receiver<Secrets> {
    let (send, secrets) = watch::channel(Secrets::default());
    let send = Arc::new(send);
    for name in names {
        let watch = one(Api::namespaced(client.clone(), namespace), name, Arc::clone(&send));
        tasks.spawn("the watch of the certificates' Secrets", watch);
    }
    secrets
}

async fn one(api: Api<Secret>, name: &'static str, secrets: Arc<watch::Sender<Secrets>>) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}")).timeout(WATCH_SECONDS);
    loop {
        let stream = watcher(api.clone(), config.clone());
        let mut events = StreamBackoff::new(stream, watcher::DefaultBackoff::default()).boxed();
        let mut listed = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => listed = None,
                Ok(watcher::Event::InitApply(secret)) => listed = Some(Arc::new(secret)),
                Ok(watcher::Event::InitDone) => saw(&secrets, name, listed.take()),
                Ok(watcher::Event::Apply(secret)) => saw(&secrets, name, Some(Arc::new(secret))),
                Ok(watcher::Event::Delete(_)) => saw(&secrets, name, None),
                Err(error) => {
                    // The stream would try for ever to begin a watch at a revision that has expired.
                    let expired = matches!(&error, watcher::Error::WatchStartFailed(kube::Error::Api(status))
                        if status.code == 410);
                    let ordinary = matches!(&error, watcher::Error::WatchError(status) if status.code == 410);
                    if expired {
                        break;
                    }
                    if !ordinary {
                        failed(&secrets, name, &error);
                    }
                }
            }
        }
    }
}

fn saw(secrets: &watch::Sender<Secrets>, name: &'static str, secret: Option<Arc<Secret>>) {
    secrets.send_if_modified(|secrets| {
        let healed = secrets.trouble.remove(name).is_some();
        let version = |secret: &Option<Arc<Secret>>| {
            secret.as_ref().and_then(|secret| secret.metadata.resource_version.clone())
        };
        let known = secrets.by_name.get(name).map(version);
        let news = known != Some(version(&secret));
        secrets.by_name.insert(name, secret);
        news || healed
    });
}

fn failed(secrets: &watch::Sender<Secrets>, name: &'static str, error: &watcher::Error) {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    let advice = match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
            if status.is_forbidden() =>
        {
            "grant this account the verbs get, list and watch on secrets in this namespace"
        }
        _ => "check that the Kubernetes API can be reached",
    };
    let text = format!("{}: {advice}", chain(error));
    secrets.send_if_modified(|secrets| {
        let news = secrets.trouble.get(name) != Some(&text);
        if news {
            tracing::warn!(secret = name, "the Secret cannot be watched: {text}");
            secrets.trouble.insert(name, text);
        }
        news
    });
}
