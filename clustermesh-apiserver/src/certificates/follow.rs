//! Puts what is in the Secrets into use: every replica does, whoever has written them.
//!
//! What cannot be used changes nothing: the last that could stays in use, and the problem is told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use isthmus_crds::names::{REMOTE_CERT_SECRET, SERVER_CERT_SECRET};
use isthmus_kvstore::config::LiveIdentity;
use isthmus_kvstore::gateway::{TrustedAuthority, Vouches};
use k8s_openapi::api::core::v1::Secret;
use tokio::sync::watch;

use super::events::Events;
use super::leaf::pair;
use super::text;
use super::watch::Secrets;
use crate::pki::Certificate;
use crate::status::CertificateStatus;

/// Certificates begin and cease to be valid without anybody's doing.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// What is in use.
#[derive(Clone, Default)]
pub(super) struct Held {
    /// Who the gateway is.
    pub(super) server: Option<LiveIdentity>,
    /// Who our relay is.
    pub(super) remote: Option<LiveIdentity>,
    /// The cluster's authorities, PEM: what the gateway's Secret trusts.
    pub(super) bundle: Option<Arc<str>>,
    /// Every Secret that is there, or was.
    pub(super) status: BTreeMap<&'static str, CertificateStatus>,
}

/// What is in use of one Secret.
struct InUse {
    version: Option<String>,
    certificate: Certificate,
}

pub(super) struct Follow {
    pub(super) secrets: watch::Receiver<Secrets>,
    /// The Secrets to tell of.
    pub(super) names: Vec<&'static str>,
    pub(super) held: watch::Sender<Held>,
    pub(super) events: Events,
}

impl Follow {
    /// Never ends.
    pub(super) async fn run(mut self) {
        let mut in_use: BTreeMap<&'static str, InUse> = BTreeMap::new();
        loop {
            let secrets = self.secrets.borrow_and_update().clone();
            let now = Utc::now();
            for name in self.names.clone() {
                if secrets.knows(name) {
                    self.look(name, secrets.get(name), &mut in_use, now);
                }
            }
            tokio::select! {
                Ok(()) = self.secrets.changed() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    fn look(
        &self,
        name: &'static str,
        secret: Option<&Secret>,
        in_use: &mut BTreeMap<&'static str, InUse>,
        now: DateTime<Utc>,
    ) {
        let known = in_use.get(name);
        let read = match secret {
            None => Err(None),
            Some(secret) => pair(secret).map_err(Some),
        };
        let problem = match read {
            // Nobody misses what was never there; what cannot be done without is told where it is waited for.
            Err(None) => known.map(|_| "it was deleted; what was in it stays in use".to_owned()),
            Err(Some(problem)) if known.is_some() => {
                Some(format!("{problem}; what was in it before stays in use"))
            }
            Err(Some(problem)) => Some(problem),
            Ok(certificate) => {
                let version = secret.and_then(|secret| secret.metadata.resource_version.clone());
                let is_new = known.is_none_or(|known| known.version != version);
                let untimely = certificate.timely(now).err().map(|untimely| untimely.to_string());
                // One whose time is not now replaces none whose time it is.
                let replaces = untimely.is_none()
                    || known.is_none_or(|known| {
                        known.certificate.timely(now).is_err() || known.certificate == certificate
                    });
                let problem = match secret {
                    Some(secret) if is_new && replaces => self.take(name, secret).err(),
                    _ => None,
                };
                if problem.is_none() && replaces {
                    in_use.insert(name, InUse { version, certificate });
                }
                problem.or(untimely)
            }
        };
        self.tell(name, in_use.get(name).map(|in_use| &in_use.certificate), problem);
    }

    /// Puts a Secret's certificate into use.
    fn take(&self, name: &'static str, secret: &Secret) -> Result<(), String> {
        let (certificate, key) = (text(secret, "tls.crt")?, text(secret, "tls.key")?);
        let bundle = if name == SERVER_CERT_SECRET {
            let bundle = Certificate::all(text(secret, "ca.crt")?);
            let bundle = bundle.map_err(|error| format!("ca.crt: {error}"))?;
            // It is published: whatever else somebody has put there, a key even, stays where it is.
            let bundle = Arc::from(bundle.iter().map(Certificate::pem).collect::<String>());
            let authority = TrustedAuthority { pem: Arc::clone(&bundle), vouches: Vouches::Anyone };
            authority.check().map_err(|error| format!("ca.crt: {error}"))?;
            Some(bundle)
        } else {
            None
        };
        let held = self.held.borrow().clone();
        let identity = match name {
            SERVER_CERT_SECRET => held.server,
            REMOTE_CERT_SECRET => held.remote,
            _ => return Ok(()),
        };
        let identity = match identity {
            Some(identity) => {
                identity.replace(certificate, key).map_err(|error| error.to_string())?;
                identity
            }
            None => LiveIdentity::new(certificate, key).map_err(|error| error.to_string())?,
        };
        tracing::info!(secret = name, "certificate taken into use");
        self.held.send_modify(|held| match name {
            SERVER_CERT_SECRET => {
                held.server = Some(identity);
                held.bundle = bundle;
            }
            _ => held.remote = Some(identity),
        });
        Ok(())
    }

    fn tell(&self, name: &'static str, certificate: Option<&Certificate>, problem: Option<String>) {
        if certificate.is_none() && problem.is_none() {
            return;
        }
        let status = CertificateStatus {
            name: name.to_owned(),
            subject: certificate.map(|certificate| certificate.subject.clone()).unwrap_or_default(),
            issuer: certificate.map(|certificate| certificate.issuer.clone()).unwrap_or_default(),
            not_before: certificate.map(|certificate| certificate.not_before),
            not_after: certificate.map(|certificate| certificate.not_after),
            problem: problem.clone(),
        };
        // Both clocks are in the words: the first that were said of it stay.
        let same = |known: &CertificateStatus| {
            known.not_after == status.not_after
                && known.subject == status.subject
                && known.problem.is_some() == status.problem.is_some()
        };
        let mut told = false;
        self.held.send_if_modified(|held| {
            let known = held.status.get(name);
            if known.is_some_and(|known| *known == status) {
                return false;
            }
            told = known.is_some_and(same);
            held.status.insert(name, status.clone());
            true
        });
        if let Some(problem) = problem.filter(|_| !told) {
            tracing::warn!(secret = name, "{problem}");
            self.events.problem(name, &problem);
        }
    }
}
