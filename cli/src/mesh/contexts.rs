//! The clusters a command is about: contexts of the kubeconfig, each with a client that does not wait for ever.

use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::Args;
use isthmus_crds::names;
use kube::Client;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig, KubeconfigError};

use super::certificates;
use super::error::{MeshError, Refusal};

/// How long a connection to an API server may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take. Nothing here watches: an open answer is a dead one.
const ANSWER: Duration = Duration::from_secs(20);

/// Where clusters are found, and Isthmus in them.
#[derive(Debug, Clone, Args)]
pub(crate) struct KubeArgs {
    /// The kubeconfig file; $KUBECONFIG, which may name several, or ~/.kube/config when left out
    #[arg(long, value_name = "PATH")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The namespace Isthmus runs in, in every cluster
    #[arg(short, long, env = "ISTHMUS_NAMESPACE", default_value = names::DEFAULT_NAMESPACE, value_parser = namespace)]
    pub(crate) namespace: String,
}

/// What the kubeconfig offers.
#[derive(Debug)]
pub(crate) struct Contexts {
    kubeconfig: Kubeconfig,
    namespace: String,
}

/// One cluster's API, through a context.
#[derive(Clone)]
pub(crate) struct Api {
    /// The context's name.
    pub(crate) context: String,
    /// Where the API is, as the kubeconfig has it.
    pub(crate) server: String,
    /// Isthmus's namespace.
    pub(crate) namespace: String,
    /// The connection.
    pub(crate) client: Client,
    /// When the client certificate that the kubeconfig holds is no longer valid.
    pub(crate) certificate_ends: Option<DateTime<Utc>>,
}

impl KubeArgs {
    /// Reads the kubeconfig; asks no cluster anything.
    pub(crate) fn contexts(&self) -> Result<Contexts, MeshError> {
        Contexts::read(self.kubeconfig.as_deref(), &self.namespace)
    }
}

/// As the API server would refuse it, but before anything is asked: a slip is no path.
fn namespace(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let sound = !text.is_empty() && text.len() <= 63 && text.chars().all(allowed);
    if sound && !text.starts_with('-') && !text.ends_with('-') {
        return Ok(text.to_owned());
    }
    Err("a namespace is named by 1 to 63 of a-z, 0-9 and -, and neither begins nor ends with -".to_owned())
}

impl Contexts {
    /// The kubeconfig in this file, or wherever `kubectl` has it; Isthmus is in this namespace of every cluster.
    pub(crate) fn read(file: Option<&Path>, namespace: &str) -> Result<Self, MeshError> {
        let read = match file {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        let kubeconfig = read.map_err(|error| {
            let which = match file {
                Some(path) => path.display().to_string(),
                None => std::env::var("KUBECONFIG").unwrap_or_else(|_| "~/.kube/config".into()),
            };
            let why = match &error {
                // It names the file once more, in quotes of two kinds.
                KubeconfigError::ReadConfig(why, _) => why.to_string(),
                other => chain(other),
            };
            MeshError::Kubeconfig { which, why }
        })?;
        Ok(Self { kubeconfig, namespace: namespace.to_owned() })
    }

    /// The context that `kubectl` would use.
    pub(crate) fn current(&self) -> Result<String, MeshError> {
        let current = self.kubeconfig.current_context.clone().filter(|name| !name.is_empty());
        current.ok_or_else(|| MeshError::NoCurrentContext { known: self.known() })
    }

    /// The named one, or that `kubectl` would use.
    pub(crate) fn or_current(&self, name: Option<&str>) -> Result<String, MeshError> {
        name.map_or_else(|| self.current(), |name| Ok(name.to_owned()))
    }

    /// A client for a context. No request is made yet.
    pub(crate) async fn open(&self, context: &str) -> Result<Api, MeshError> {
        self.open_within(context, ANSWER).await
    }

    /// The same, for what may be silent for longer.
    pub(crate) async fn open_within(&self, context: &str, answer: Duration) -> Result<Api, MeshError> {
        let Some(named) = self.kubeconfig.contexts.iter().find(|named| named.name == context) else {
            return Err(MeshError::NoSuchContext { context: context.to_owned(), known: self.known() });
        };
        let unusable = |why: String| MeshError::UnusableContext { context: context.to_owned(), why };
        let options = KubeConfigOptions { context: Some(context.to_owned()), ..Default::default() };
        let config = kube::Config::from_custom_kubeconfig(self.kubeconfig.clone(), &options).await;
        let mut config = config.map_err(|error| unusable(chain(&error)))?;
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = Some(answer);
        config.write_timeout = Some(answer);
        // Connections are used again after seconds of idling between polls.
        config.reset_reader_on_write = true;
        // Waiting is ours to do, and to tell.
        config.default_retry = false;
        let server = config.cluster_url.to_string();
        let user = named.context.as_ref().and_then(|context| context.user.as_deref());
        let certificate_ends = user.and_then(|user| self.certificate_ends(user));
        let client = Client::try_from(config).map_err(|error| unusable(chain(&error)))?;
        Ok(Api {
            context: context.to_owned(),
            server: server.trim_end_matches('/').to_owned(),
            namespace: self.namespace.clone(),
            client,
            certificate_ends,
        })
    }

    fn known(&self) -> Vec<String> {
        self.kubeconfig.contexts.iter().map(|named| named.name.clone()).collect()
    }

    /// An expired certificate is the usual reason for an API server's refusal, which does not say so.
    fn certificate_ends(&self, user: &str) -> Option<DateTime<Utc>> {
        let found = self.kubeconfig.auth_infos.iter().find(|info| info.name == user)?;
        let pem = client_certificate(found.auth_info.as_ref()?)?;
        Some(certificates::parse(&pem).ok()?.first()?.not_after)
    }
}

impl Api {
    /// Objects in Isthmus's namespace.
    pub(crate) fn namespaced<K>(&self) -> kube::Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        kube::Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Objects of the whole cluster.
    pub(crate) fn global<K: kube::Resource<DynamicType = ()>>(&self) -> kube::Api<K> {
        kube::Api::all(self.client.clone())
    }

    /// Says in words why the API did not do what was asked.
    pub(crate) fn refused(&self, doing: impl Into<String>, source: kube::Error) -> Refusal {
        Refusal {
            context: self.context.clone(),
            server: self.server.clone(),
            doing: doing.into(),
            certificate_ends: self.certificate_ends,
            source: Box::new(source),
        }
    }
}

/// Refuses names of contexts of which one is there twice.
pub(crate) fn distinct(names: &[String]) -> Result<(), MeshError> {
    let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    match twice {
        Some((_, name)) => Err(MeshError::Usage(format!("context {name} is named twice"))),
        None => Ok(()),
    }
}

fn client_certificate(info: &AuthInfo) -> Option<Vec<u8>> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    if let Some(data) = &info.client_certificate_data {
        return STANDARD.decode(data.trim()).ok();
    }
    std::fs::read(info.client_certificate.as_ref()?).ok()
}

/// An error and what caused it, once each.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
