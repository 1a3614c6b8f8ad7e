//! A cluster's certificates in Secrets of its Kubernetes API: issued and renewed by the leader, taken into use by everybody.
//!
//! ```text
//!                 leader                                     every replica
//!   isthmus-ca ──▶ plan ──▶ keeper ──▶ Secrets ──▶ watch ──▶ follow ──▶ LiveIdentity, bundle ──▶ gateway, relay
//!                             ▲                      │                        │
//!                             └──────────────────────┘                        └──▶ cluster_info
//! ```
//!
//! | Secret | common name | whose |
//! |---|---|---|
//! | `clustermesh-apiserver-server-cert` | `clustermesh-apiserver.cilium.io` | the gateway's |
//! | `clustermesh-apiserver-remote-cert` | `remote-<cluster>` | our relay's, towards peers |
//! | `clustermesh-apiserver-admin-cert` | `admin-<cluster>` | of who operates the cluster |
//! | `clustermesh-apiserver-local-cert` | `local-<cluster>` | Cilium's agents' |
//! | `isthmus-node-agent-cert` | `agent-<cluster>` | our node agents' |
//!
//! Names, usages and further names are those of Cilium Cluster Mesh (wire format, section A.7).
//!
//! - `rotation`: how an authority is exchanged; the protocol that `isthmus rotate-ca` speaks.
//! - `authority`, `leaf`: the Secrets understood, and what they must be.
//! - `plan`: what is to be written, as a pure function of what there is.
//! - `keeper`: carries it out, if this replica leads and issues certificates ([`Issuer::Isthmus`]).
//! - `watch`, `follow`: the Secrets as they are, and into use.
//! - `events`: what people are told.
//!
//! With [`Issuer::External`] nobody here writes: cert-manager or a person does, and what is there is taken into use.
//!
//! Needs get, list and watch on secrets in the own namespace, create and update to issue them, and create and patch on
//! events.events.k8s.io, which it can do without.

mod authority;
mod events;
mod follow;
mod keeper;
mod leaf;
mod plan;
pub mod rotation;
mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use isthmus_crds::names::{
    ADMIN_CERT_SECRET, AGENT_CERT_SECRET, CA_SECRET, LOCAL_CERT_SECRET, PART_OF, PART_OF_LABEL,
    REMOTE_CERT_SECRET, SERVER_CERT_SECRET,
};
use isthmus_crds::{MANAGED_BY, MANAGED_BY_LABEL};
use isthmus_kvstore::config::LiveIdentity;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use tokio::sync::watch::{Receiver, channel};

use self::events::Events;
use self::follow::{Follow, Held};
use self::keeper::Keeper;
use crate::election::Leadership;
use crate::pki::LONGEST_PEM;
use crate::status::CertificateStatus;
use crate::tasks::Tasks;

/// How long certificates are valid unless said otherwise: 90 days.
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// The shortest life that a certificate may have.
pub const SHORTEST_VALIDITY: Duration = Duration::from_secs(10);
/// The longest life that a certificate may have: that of the authority that issues it.
pub const LONGEST_VALIDITY: Duration = authority::AUTHORITY_VALIDITY;

/// Who issues the certificates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Issuer {
    /// We do, by an authority in the Secret `isthmus-ca`.
    #[default]
    Isthmus,
    /// Somebody else does.
    External,
}

/// What to keep, and where.
#[derive(Clone, Debug)]
pub struct CertificatesConfig {
    /// Name of the own cluster.
    pub cluster: String,
    /// The namespace of the Secrets.
    pub namespace: String,
    /// Who issues them.
    pub issuer: Issuer,
    /// How long certificates that we issue are valid. [`DEFAULT_VALIDITY`] unless there is a reason.
    pub validity: Duration,
    /// Further names and addresses of the gateway.
    pub gateway_names: Vec<String>,
    /// The times that are kept.
    pub timing: Timing,
}

/// The times that the keeping of certificates keeps.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long it may take until a changed Secret is in the files of every pod that has it mounted. A rotation waits for
    /// it. Two minutes: a kubelet looks once a minute, and may look at what it has remembered for another.
    pub settle: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { settle: Duration::from_secs(120) }
    }
}

/// The certificates in use. Cheap to clone.
#[derive(Clone)]
pub struct Certificates {
    config: Arc<CertificatesConfig>,
    held: Receiver<Held>,
    secrets: Receiver<watch::Secrets>,
    /// What the leader cannot put right.
    problems: Receiver<Vec<(&'static str, String)>>,
}

/// What a gateway and a relay need.
pub struct InUse {
    /// Who the gateway is.
    pub server: LiveIdentity,
    /// Who our relay is towards peers.
    pub remote: LiveIdentity,
    /// The cluster's authorities at present, PEM.
    pub bundle: Arc<str>,
}

impl Certificates {
    /// Begins to follow the Secrets, and to keep them whenever this replica leads. `published` is the bundle that the
    /// cluster's published information has. Must be called within a tokio runtime.
    pub fn start(
        client: &Client,
        config: CertificatesConfig,
        replica: &str,
        leadership: &Leadership,
        published: Receiver<Option<Arc<str>>>,
        tasks: &Tasks,
    ) -> Self {
        let mut names = vec![
            SERVER_CERT_SECRET,
            REMOTE_CERT_SECRET,
            ADMIN_CERT_SECRET,
            LOCAL_CERT_SECRET,
            AGENT_CERT_SECRET,
        ];
        if config.issuer == Issuer::Isthmus {
            names.push(CA_SECRET);
        }
        let secrets = watch::follow(client, &config.namespace, &names, tasks);
        let events = Events::start(client.clone(), &config.namespace, replica, leadership.clone(), tasks);
        let (held, seen) = channel(Held::default());
        let follow = Follow { secrets: secrets.clone(), names, held, events: events.clone() };
        tasks.spawn("the following of the certificates' Secrets", follow.run());
        let (tell, problems) = channel(Vec::new());
        if config.issuer == Issuer::Isthmus {
            let keeper = Keeper {
                config: config.clone(),
                api: Api::namespaced(client.clone(), &config.namespace),
                secrets: secrets.clone(),
                published,
                events,
                problems: tell,
            };
            tasks.spawn("the keeping of certificates", keeper.run(leadership.clone()));
        }
        Self { config: config.into(), held: seen, secrets, problems }
    }

    /// Waits until there is what a gateway and a relay need.
    pub async fn in_use(&self) -> InUse {
        let mut held = self.held.clone();
        loop {
            if let Held { server: Some(server), remote: Some(remote), bundle: Some(bundle), .. } =
                &*held.borrow_and_update()
            {
                return InUse { server: server.clone(), remote: remote.clone(), bundle: Arc::clone(bundle) };
            }
            if held.changed().await.is_err() {
                // Nobody looks any more: the program is ending.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The cluster's authorities, PEM, and when they change.
    pub fn bundles(&self) -> Bundles {
        Bundles(self.held.clone())
    }

    /// What is waited for before there is [`Certificates::in_use`], and what to do about it. None once there is.
    pub fn waiting_for(&self) -> Option<String> {
        let held = self.held.borrow();
        let missing =
            [(SERVER_CERT_SECRET, held.server.is_none()), (REMOTE_CERT_SECRET, held.remote.is_none())];
        let (name, _) = missing.into_iter().find(|(_, missing)| *missing)?;
        let namespace = &self.config.namespace;
        let secrets = self.secrets.borrow();
        if let Some(trouble) = secrets.trouble.get(name) {
            return Some(format!("waiting for the Secret {namespace}/{name}: {trouble}"));
        }
        if let Some(problem) = held.status.get(name).and_then(|status| status.problem.as_ref()) {
            return Some(format!("the Secret {namespace}/{name} cannot be used: {problem}"));
        }
        if let Some((secret, problem)) = self.problems.borrow().first() {
            return Some(format!("waiting for the Secret {namespace}/{name}; Secret {secret}: {problem}"));
        }
        Some(match self.config.issuer {
            Issuer::Isthmus => {
                format!("waiting for the Secret {namespace}/{name}, which the leading replica issues")
            }
            Issuer::External => format!(
                "waiting for the Secret {namespace}/{name}: create it with tls.crt, tls.key and ca.crt (with cert-manager, by a \
                 Certificate that has it for its secretName), or start with --certificates=isthmus"
            ),
        })
    }

    /// Every certificate there is.
    pub fn status(&self) -> Vec<CertificateStatus> {
        let mut all = self.held.borrow().status.clone();
        for (name, problem) in self.problems.borrow().iter() {
            let status = all.entry(name).or_insert_with(|| CertificateStatus {
                name: (*name).to_owned(),
                subject: String::new(),
                issuer: String::new(),
                not_before: None,
                not_after: None,
                problem: None,
            });
            status.problem = Some(problem.clone());
        }
        all.into_values().collect()
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The cluster's authorities as they change.
#[derive(Clone)]
pub struct Bundles(Receiver<Held>);

impl Bundles {
    /// The present ones, PEM; none before any are known.
    pub fn present(&self) -> Option<Arc<str>> {
        self.0.borrow().bundle.clone()
    }

    /// Waits until they are others than `known`.
    pub async fn changed_from(&mut self, known: Option<&Arc<str>>) {
        if self.0.wait_for(|held| held.bundle.as_ref() != known).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// What tells that an object is ours.
fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([
        (MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned()),
        (PART_OF_LABEL.to_owned(), PART_OF.to_owned()),
    ])
}

/// An entry of a Secret, as text. Never repeats what is in it.
fn text<'a>(secret: &'a Secret, key: &str) -> Result<&'a str, String> {
    let bytes = secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| bytes.0.as_slice());
    let bytes =
        bytes.filter(|bytes| !bytes.is_empty()).ok_or_else(|| format!("{key} is missing or empty"))?;
    if bytes.len() > LONGEST_PEM {
        return Err(format!("{key} is longer than {LONGEST_PEM} bytes"));
    }
    std::str::from_utf8(bytes).map_err(|_| format!("{key} is not text"))
}
