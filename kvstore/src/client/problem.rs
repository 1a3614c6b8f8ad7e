//! What can be wrong in a TLS handshake with a store, told apart by whose certificate it is and what is to be done.

use std::io;

use chrono::{DateTime, Utc};
use rustls::{AlertDescription, CertificateError};
use rustls_pki_types::CertificateDer;

use crate::{
    certificate::{Certificate, Validity, clock},
    config::IdentityError,
};

/// Why there is no TLS with a store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsProblem {
    /// The authorities that are trusted cannot be read.
    #[error("{place} {reason}")]
    Trust {
        /// Where they should be.
        place: String,
        /// What is wrong with them.
        reason: String,
    },
    /// There is no authority to trust.
    #[error("no authority is trusted, so the other side cannot prove who it is; name its ca.crt")]
    NoTrust,
    /// This side's own certificate or key cannot be used.
    #[error("this side's own identity cannot be used: {0}")]
    Identity(#[source] IdentityError),
    /// The name to verify is none.
    #[error(
        "{name:?} is not a name that a certificate can be valid for; correct the endpoint or the server name"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The other side's certificate has expired, or its clock or this one's is wrong.
    #[error(
        "the other side's certificate {certificate} has expired: the clock here says {}; have it renewed there, or \
         correct the clock here if it is wrong", clock(*.now)
    )]
    Expired {
        /// The certificate, which may be one between the server's and its authority's.
        certificate: Certificate,
        /// This side's clock.
        now: DateTime<Utc>,
    },
    /// The other side's certificate is not valid yet, or its clock or this one's is wrong.
    #[error(
        "the other side's certificate {certificate} is not valid yet: the clock here says {}; compare the clocks of both \
         sides (NTP)", clock(*.now)
    )]
    NotYetValid {
        /// The certificate, which may be one between the server's and its authority's.
        certificate: Certificate,
        /// This side's clock.
        now: DateTime<Utc>,
    },
    /// The other side's certificate is for other names.
    #[error(
        "the other side's certificate {certificate} is for {}, not for {expected}; is this the right cluster's endpoint? If \
         so, set the server name to one of those", names(.certificate)
    )]
    WrongName {
        /// The name that it should be for.
        expected: String,
        /// The certificate.
        certificate: Certificate,
    },
    /// The other side's certificate was signed by nobody who is trusted.
    #[error(
        "the other side's certificate {certificate} comes from an authority that is not trusted here (trusted: {}); if \
         this is the right cluster, its authority has changed: exchange ca.crt again", .trusted.join(", ")
    )]
    UnknownIssuer {
        /// The certificate.
        certificate: Certificate,
        /// The names of the authorities that are trusted. One may be of the same name and have another key.
        trusted: Vec<String>,
    },
    /// The other side's certificate is not one for servers.
    #[error(
        "the other side's certificate {certificate} is not made for a server (extended key usage); have one issued that is"
    )]
    NotAServer {
        /// The certificate.
        certificate: Certificate,
    },
    /// The other side refuses this side's certificate.
    #[error("{}", refused(*.why, .certificate.as_ref(), *.now))]
    Refused {
        /// Why, so far as it says.
        why: Why,
        /// This side's certificate, none if it showed none.
        certificate: Option<Certificate>,
        /// This side's clock.
        now: DateTime<Utc>,
    },
    /// What answers does not speak TLS.
    #[error("what answers does not speak TLS; is this the port of the gateway?")]
    NotTls,
    /// The other side ended the connection without a word.
    #[error(
        "the other side ended the connection in the handshake ({reason}); is a gateway behind the load balancer, and is \
         it running?"
    )]
    Ended {
        /// What the system said.
        reason: String,
    },
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// Why the other side refuses this side's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// By its clock it has expired, or is not valid yet.
    Validity,
    /// It does not trust the authority that signed it.
    Authority,
    /// It wants a certificate and was shown none.
    Required,
    /// It knows the authority, but does not take this certificate from it: its name is one that the authority may not
    /// vouch for, or it is not one for clients.
    Certificate,
    /// It does not say.
    Unsaid,
}

fn refused(why: Why, certificate: Option<&Certificate>, now: DateTime<Utc>) -> String {
    let Some(certificate) = certificate else {
        return "the other side wants a client certificate and was shown none; configure one".into();
    };
    let reason = match (certificate.validity(now), why) {
        (Validity::Expired, _) => "it has expired; have it renewed",
        (Validity::NotYet, _) => "it is not valid yet; compare the clocks of both sides (NTP)",
        (Validity::Valid, Why::Validity) => {
            "it is outside of its validity by the clock there, or a certificate above it is; compare the clocks of both \
             sides (NTP)"
        }
        (Validity::Valid, Why::Authority | Why::Required) => {
            "the authority that signed it is not trusted there; have the other side trust it (exchange ca.crt again)"
        }
        (Validity::Valid, Why::Certificate) => {
            "its authority may not vouch for this name there, or it is not a client's; the log of the gateway says which"
        }
        (Validity::Valid, Why::Unsaid) => {
            "the other side does not say why; does it trust the authority that signed it? Its log may say more"
        }
    };
    format!(
        "the other side refused this side's certificate {certificate}, with the clock here at {}: {reason}",
        clock(now)
    )
}

fn names(certificate: &Certificate) -> String {
    if certificate.names.is_empty() { "no name at all".into() } else { certificate.names.join(", ") }
}

/// What is known of a handshake when it fails.
#[derive(Debug, Clone)]
pub(super) struct Circumstances {
    /// The name that the server should have.
    pub(super) expected: String,
    /// The certificates that it has shown.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// The names of the authorities that are trusted.
    pub(super) trusted: Vec<String>,
    /// This side's own certificate.
    pub(super) own: Option<Certificate>,
}

impl Circumstances {
    /// What an error of a TLS stream means.
    pub(super) fn explain(&self, error: &io::Error) -> TlsProblem {
        match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
            Some(error) => self.explain_tls(error),
            None => TlsProblem::Ended { reason: error.to_string() },
        }
    }

    fn explain_tls(&self, error: &rustls::Error) -> TlsProblem {
        match error {
            rustls::Error::InvalidCertificate(error) => self.theirs(error),
            rustls::Error::AlertReceived(alert) => self.alert(*alert),
            rustls::Error::InvalidMessage(_) => TlsProblem::NotTls,
            other => TlsProblem::Other(other.to_string()),
        }
    }

    fn theirs(&self, error: &CertificateError) -> TlsProblem {
        let now = Utc::now();
        let mut chain = self.chain.iter().filter_map(Certificate::parse);
        let Some(certificate) = chain.next() else {
            return TlsProblem::Other(format!("the other side's certificate: {error}"));
        };
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                let past = |certificate: &Certificate| certificate.validity(now) == Validity::Expired;
                let culprit = std::iter::once(certificate.clone()).chain(chain).find(past);
                TlsProblem::Expired { certificate: culprit.unwrap_or(certificate), now }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                let early = |certificate: &Certificate| certificate.validity(now) == Validity::NotYet;
                let culprit = std::iter::once(certificate.clone()).chain(chain).find(early);
                TlsProblem::NotYetValid { certificate: culprit.unwrap_or(certificate), now }
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                TlsProblem::WrongName { expected: self.expected.clone(), certificate }
            }
            // An authority of the same name and with another key is another authority.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                TlsProblem::UnknownIssuer { certificate, trusted: self.trusted.clone() }
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                TlsProblem::NotAServer { certificate }
            }
            other => TlsProblem::Other(format!("the other side's certificate {certificate}: {other}")),
        }
    }

    fn alert(&self, alert: AlertDescription) -> TlsProblem {
        let why = match alert {
            AlertDescription::CertificateExpired => Why::Validity,
            AlertDescription::UnknownCA => Why::Authority,
            AlertDescription::CertificateRequired => Why::Required,
            AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked => Why::Certificate,
            // Go answers so to whatever is wrong with a certificate.
            AlertDescription::BadCertificate | AlertDescription::DecryptError => Why::Unsaid,
            other => return TlsProblem::Other(format!("the other side ended TLS: {other:?}")),
        };
        TlsProblem::Refused { why, certificate: self.own.clone(), now: Utc::now() }
    }
}
