//! Why a command ended, in words that say what to do.

use std::error::Error;
use std::fmt;
use std::io;

use chrono::{DateTime, Utc};
use kube::core::Status;
use rustls::CertificateError;

use super::certificates::utc;
use super::contexts::chain;

/// Why a command could not do what it was told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MeshError {
    /// No kubeconfig, or not one.
    #[error("the kubeconfig {which} cannot be used: {why}; give --kubeconfig, or set KUBECONFIG")]
    Kubeconfig {
        /// Which file or files.
        which: String,
        /// What is wrong with it.
        why: String,
    },
    /// Nothing says which cluster is meant.
    #[error("the kubeconfig has no current context: give --context, one of {}", list(known))]
    NoCurrentContext {
        /// Those there are.
        known: Vec<String>,
    },
    /// A name that is not in the kubeconfig.
    #[error("context {context}: the kubeconfig has no such context; it has {}", list(known))]
    NoSuchContext {
        /// The name.
        context: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// A context that leads nowhere.
    #[error("context {context}: the kubeconfig's entry cannot be used: {why}")]
    UnusableContext {
        /// Its name.
        context: String,
        /// What is wrong with it.
        why: String,
    },
    /// An API server that does not answer, or says no.
    #[error(transparent)]
    Api(#[from] Refusal),
    /// Something is not as it must be; the message says what to do.
    #[error("{0}")]
    Invalid(String),
    /// The options make no sense together.
    #[error("{0}")]
    Usage(String),
}

impl MeshError {
    /// What is wrong and what to do, for whoever names the context beside it.
    pub(crate) fn in_context(&self) -> (String, String) {
        match self {
            Self::Api(refusal) => (refusal.problem(), refusal.advice()),
            Self::NoSuchContext { known, .. } => {
                ("the kubeconfig has no such context".to_owned(), format!("it has {}", list(known)))
            }
            Self::UnusableContext { context, why } => (
                format!("the kubeconfig's entry cannot be used: {why}"),
                format!("try `kubectl --context {context} version`"),
            ),
            other => (other.to_string(), "`kubectl config view` shows the kubeconfig".to_owned()),
        }
    }
}

/// An API server's refusal or silence, and what was being done.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// The context.
    pub(crate) context: String,
    /// The API server's URL.
    pub(crate) server: String,
    /// What was being done: `read ConfigMap isthmus-system/isthmus-cluster-info`.
    pub(crate) doing: String,
    /// When the kubeconfig's client certificate ends, if it has one.
    pub(crate) certificate_ends: Option<DateTime<Utc>>,
    /// What came back.
    pub(crate) source: Box<kube::Error>,
}

impl Refusal {
    /// The API server's own answer, if it is one.
    pub(crate) fn status(&self) -> Option<&Status> {
        match &*self.source {
            kube::Error::Api(status) => Some(status),
            _ => None,
        }
    }

    /// What is wrong, without the context.
    pub(crate) fn problem(&self) -> String {
        match self.status() {
            Some(status) => format!("cannot {}: {}", self.doing, answer(status)),
            None => format!("cannot {}: {} {}", self.doing, self.server, silence(&self.source)),
        }
    }

    /// What to do about it.
    pub(crate) fn advice(&self) -> String {
        let context = &self.context;
        match self.status().map(|status| status.code) {
            Some(401) => match self.certificate_ends.filter(|end| *end < Utc::now()) {
                Some(end) => format!(
                    "the client certificate in the kubeconfig expired on {} (it is {} here): have a new one issued",
                    utc(end),
                    utc(Utc::now())
                ),
                None => format!(
                    "the API server does not know you: log in again, then try `kubectl --context {context} auth whoami`"
                ),
            },
            Some(403) => format!(
                "ask for that right; `kubectl --context {context} auth can-i --list` shows those you have"
            ),
            Some(code) if code >= 500 || code == 429 => {
                format!(
                    "the API server has trouble itself: `kubectl --context {context} get --raw /readyz?verbose`"
                )
            }
            Some(_) => format!("try `kubectl --context {context} version`"),
            None => silence_advice(&self.source, context, self.certificate_ends),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "context {}: {}; {}", self.context, self.problem(), self.advice())
    }
}

impl Error for Refusal {}

/// The answer's own words. `Forbidden` names user, verb and object.
fn answer(status: &Status) -> String {
    match (status.code, status.message.is_empty()) {
        (401, _) => "it does not accept these credentials (401)".into(),
        (code, true) => format!("it answers {code} {}", status.reason),
        (_, false) => status.message.clone(),
    }
}

/// Why no answer came.
enum Silence {
    Refused,
    TimedOut,
    NoSuchHost,
    Unreachable,
    ServerCertificate(String),
    ClientCertificate(String),
    Credentials(String),
    Other(String),
}

fn why_silent(error: &kube::Error) -> Silence {
    if let kube::Error::Auth(error) = error {
        return Silence::Credentials(chain(error));
    }
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return tls_silence(tls);
        }
        if let Some(io) = error.downcast_ref::<io::Error>() {
            match io.kind() {
                io::ErrorKind::ConnectionRefused => return Silence::Refused,
                io::ErrorKind::TimedOut => return Silence::TimedOut,
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    return Silence::Unreachable;
                }
                // The resolver's error has no kind of its own.
                _ if io.to_string().contains("lookup address") => return Silence::NoSuchHost,
                _ => {}
            }
            // What is wrapped in one is not its source.
            next = match io.get_ref() {
                Some(inner) => Some(inner),
                None => io.source(),
            };
            continue;
        }
        next = error.source();
    }
    Silence::Other(chain(error))
}

fn tls_silence(error: &rustls::Error) -> Silence {
    use rustls::Error::{AlertReceived, InvalidCertificate};
    match error {
        InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            Silence::ServerCertificate("has expired".into())
        }
        InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            Silence::ServerCertificate("is not valid yet".into())
        }
        InvalidCertificate(CertificateError::UnknownIssuer) => {
            Silence::ServerCertificate("is not signed by the CA in the kubeconfig".into())
        }
        InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => Silence::ServerCertificate("is for another name than the kubeconfig's address".into()),
        InvalidCertificate(other) => Silence::ServerCertificate(format!("cannot be trusted: {other}")),
        AlertReceived(alert) => Silence::ClientCertificate(format!("{alert:?}")),
        other => Silence::Other(other.to_string()),
    }
}

fn silence(error: &kube::Error) -> String {
    match why_silent(error) {
        Silence::Refused => "refuses connections".into(),
        Silence::TimedOut => "does not answer in time".into(),
        Silence::NoSuchHost => "has a name that does not resolve".into(),
        Silence::Unreachable => "cannot be reached from this network".into(),
        Silence::ServerCertificate(what) => format!("shows a certificate that {what}"),
        Silence::ClientCertificate(alert) => format!("ended the TLS handshake ({alert})"),
        Silence::Credentials(why) => format!("was not asked, for there are no credentials: {why}"),
        Silence::Other(why) => format!("gives no answer: {why}"),
    }
}

fn silence_advice(error: &kube::Error, context: &str, certificate_ends: Option<DateTime<Utc>>) -> String {
    let expired = certificate_ends.filter(|end| *end < Utc::now());
    match why_silent(error) {
        Silence::Refused => "is the cluster running, and the kubeconfig's address still right?".into(),
        Silence::TimedOut | Silence::Unreachable => "is there a VPN to join or a firewall in between?".into(),
        Silence::NoSuchHost => "is the cluster still there, and DNS working here?".into(),
        Silence::ServerCertificate(_) => format!(
            "compare this machine's clock ({}), then fetch the kubeconfig's entry for {context} anew",
            utc(Utc::now())
        ),
        Silence::ClientCertificate(_) => match expired {
            Some(end) => {
                format!(
                    "the client certificate in the kubeconfig expired on {}: have a new one issued",
                    utc(end)
                )
            }
            None => format!("fetch the kubeconfig's entry for {context} anew"),
        },
        Silence::Credentials(_) => "run the kubeconfig's login command by hand to see what it says".into(),
        Silence::Other(_) => format!("try `kubectl --context {context} version`"),
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
