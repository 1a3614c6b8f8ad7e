//! What stands in a certificate: who it is, who vouches for it, and for how long.

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use chrono::{DateTime, SecondsFormat, Utc};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;
use x509_parser::x509::X509Name;

/// Longest PEM text that is looked at, in bytes: a bundle of some hundred certificates.
pub const LONGEST_PEM: usize = 1 << 20;

/// A certificate, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The subject's common name; empty if there is none.
    pub common_name: String,
    /// The subject, as OpenSSL writes it.
    pub subject: String,
    /// Who issued it, as OpenSSL writes it.
    pub issuer: String,
    /// Valid from then on.
    pub not_before: DateTime<Utc>,
    /// Valid until then.
    pub not_after: DateTime<Utc>,
    /// The names and addresses that it is valid for, as a server.
    pub names: Vec<String>,
    /// Whether it may be shown by a server.
    pub server: bool,
    /// Whether it may be shown by a client.
    pub client: bool,
    /// Whether it may issue others.
    pub authority: bool,
    der: Vec<u8>,
}

/// Why a PEM text is no certificate. Never tells what else it holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotACertificate {
    /// No PEM block of a certificate.
    #[error("it holds no PEM certificate")]
    Empty,
    /// Beyond [`LONGEST_PEM`].
    #[error("it is longer than {LONGEST_PEM} bytes, which is no certificate")]
    TooLong,
    /// A PEM block that is no certificate.
    #[error("the certificate in it cannot be read: {0}")]
    Malformed(String),
}

/// When a certificate is not valid at a time, in words that show both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untimely {
    /// Its time has not come.
    NotYet {
        /// When it begins to be valid.
        from: DateTime<Utc>,
        /// The clock here.
        now: DateTime<Utc>,
    },
    /// Its time is over.
    Expired {
        /// When it ceased to be valid.
        until: DateTime<Utc>,
        /// The clock here.
        now: DateTime<Utc>,
    },
}

impl fmt::Display for Untimely {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |time: &DateTime<Utc>| time.to_rfc3339_opts(SecondsFormat::Secs, true);
        match self {
            Self::NotYet { from, now } => write!(
                f,
                "it is valid only from {} on, and the clock here says {}: set the clock of whoever is wrong",
                text(from),
                text(now)
            ),
            Self::Expired { until, now } => write!(
                f,
                "it expired at {}, and the clock here says {}: renew it, or set the clock if that is wrong",
                text(until),
                text(now)
            ),
        }
    }
}

impl Certificate {
    /// The first certificate of a PEM text: of a chain, the one that the key belongs to.
    ///
    /// # Errors
    /// [`NotACertificate`] if there is none.
    pub fn first(pem: &str) -> Result<Self, NotACertificate> {
        Self::all(pem)?.into_iter().next().ok_or(NotACertificate::Empty)
    }

    /// Every certificate of a PEM text; other blocks are left out.
    ///
    /// # Errors
    /// [`NotACertificate`] if there is none, or one of them cannot be read.
    pub fn all(pem: &str) -> Result<Vec<Self>, NotACertificate> {
        if pem.len() > LONGEST_PEM {
            return Err(NotACertificate::TooLong);
        }
        let mut certificates = Vec::new();
        for block in Pem::iter_from_buffer(pem.as_bytes()) {
            let block = block.map_err(|error| NotACertificate::Malformed(error.to_string()))?;
            if block.label == "CERTIFICATE" {
                certificates.push(Self::from_der(block.contents)?);
            }
        }
        if certificates.is_empty() { Err(NotACertificate::Empty) } else { Ok(certificates) }
    }

    fn from_der(der: Vec<u8>) -> Result<Self, NotACertificate> {
        let malformed = |error: &dyn fmt::Display| NotACertificate::Malformed(error.to_string());
        let (_, read) = X509Certificate::from_der(&der).map_err(|error| malformed(&error))?;
        let usage = read.extended_key_usage().map_err(|error| malformed(&error))?;
        let usage = usage.map(|usage| usage.value);
        let names = read.subject_alternative_name().map_err(|error| malformed(&error))?;
        let certificate = Self {
            common_name: common_name(read.subject()),
            subject: read.subject().to_string(),
            issuer: read.issuer().to_string(),
            not_before: time(read.validity().not_before)?,
            not_after: time(read.validity().not_after)?,
            names: names.iter().flat_map(|names| &names.value.general_names).filter_map(name).collect(),
            server: usage.is_none_or(|usage| usage.any || usage.server_auth),
            client: usage.is_none_or(|usage| usage.any || usage.client_auth),
            authority: read.is_ca(),
            der: Vec::new(),
        };
        Ok(Self { der, ..certificate })
    }

    /// Its encoding as PEM: one text for one certificate.
    pub fn pem(&self) -> String {
        let body = base64::engine::general_purpose::STANDARD.encode(&self.der);
        let mut text = String::with_capacity(body.len() + body.len() / 64 + 64);
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let mut rest = body.as_str();
        while !rest.is_empty() {
            let (line, more) = rest.split_at(rest.len().min(64));
            text.push_str(line);
            text.push('\n');
            rest = more;
        }
        text.push_str("-----END CERTIFICATE-----\n");
        text
    }

    /// Its encoding.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Whether `authority`'s key has signed it. Says nothing about validity.
    pub fn is_signed_by(&self, authority: &Self) -> bool {
        let Ok((_, own)) = X509Certificate::from_der(&self.der) else { return false };
        let Ok((_, issuer)) = X509Certificate::from_der(&authority.der) else { return false };
        own.issuer() == issuer.subject() && own.verify_signature(Some(issuer.public_key())).is_ok()
    }

    /// Whether it is valid at this time.
    ///
    /// # Errors
    /// [`Untimely`] says which of the two clocks is ahead.
    pub fn timely(&self, now: DateTime<Utc>) -> Result<(), Untimely> {
        if now < self.not_before {
            Err(Untimely::NotYet { from: self.not_before, now })
        } else if now > self.not_after {
            Err(Untimely::Expired { until: self.not_after, now })
        } else {
            Ok(())
        }
    }
}

/// The certificate of a pair that a server or client can show: certificate and key, PEM, which belong together.
///
/// # Errors
/// [`UnusablePair`] says what is wrong with it, and nothing of what is in it.
pub fn usable_pair(certificate: &str, key: &str) -> Result<Certificate, UnusablePair> {
    let first = Certificate::first(certificate)?;
    if key.len() > LONGEST_PEM {
        return Err(UnusablePair::Key);
    }
    let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| NotACertificate::Malformed(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|_| UnusablePair::Key)?;
    match CertifiedKey::from_der(chain, key, &rustls::crypto::ring::default_provider()) {
        Ok(_) => Ok(first),
        Err(rustls::Error::InconsistentKeys(_)) => Err(UnusablePair::Mismatch),
        Err(_) => Err(UnusablePair::Key),
    }
}

/// Why a certificate and a key cannot be shown to anybody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusablePair {
    /// The certificate is none.
    #[error("tls.crt: {0}")]
    Certificate(#[from] NotACertificate),
    /// The key is none.
    #[error("tls.key: it is no private key in PEM of a kind that TLS uses (RSA, ECDSA, Ed25519)")]
    Key,
    /// The key is another one's.
    #[error("tls.key does not belong to the certificate in tls.crt")]
    Mismatch,
}

fn common_name(name: &X509Name<'_>) -> String {
    let first = name.iter_common_name().next();
    first.and_then(|name| name.as_str().ok()).unwrap_or_default().to_owned()
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match **bytes {
            [a, b, c, d] => Some(IpAddr::from([a, b, c, d]).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
        },
        _ => None,
    }
}

fn time(time: ASN1Time) -> Result<DateTime<Utc>, NotACertificate> {
    DateTime::from_timestamp(time.timestamp(), 0)
        .ok_or_else(|| NotACertificate::Malformed(format!("{time} is no time")))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pki::{Authority, Client};

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    #[test]
    fn what_was_asked_for_is_read_back() {
        let authority = Authority::generate("Cilium CA", DAY).unwrap();
        let gateway = authority.gateway("isthmus-system", &["2001:db8::1".to_owned()], DAY).unwrap();
        let gateway = Certificate::first(&gateway.certificate).unwrap();
        assert_eq!(gateway.common_name, "clustermesh-apiserver.cilium.io");
        assert_eq!(gateway.issuer, "CN=Cilium CA");
        for name in [
            "*.mesh.cilium.io",
            "clustermesh-apiserver.isthmus-system.svc",
            "127.0.0.1",
            "::1",
            "2001:db8::1",
        ] {
            assert!(gateway.names.iter().any(|has| has == name), "{name}: {:?}", gateway.names);
        }
        assert!(gateway.server && !gateway.client && !gateway.authority);
        let client = authority.client(Client::Agent("alpha"), DAY).unwrap();
        let client = Certificate::first(&client.certificate).unwrap();
        assert!(client.client && !client.server);
        assert_eq!(client.common_name, "agent-alpha");
        let own = Certificate::first(authority.certificate()).unwrap();
        assert!(own.authority);
        assert_eq!(Certificate::all(&format!("{0}{0}", own.pem())).unwrap(), [own.clone(), own]);
    }

    #[test]
    fn a_namesake_of_an_authority_has_not_signed_what_the_authority_has() {
        let [own, namesake] = [(); 2].map(|()| Authority::generate("Cilium CA", DAY).unwrap());
        let client = own.client(Client::Agent("alpha"), DAY).unwrap();
        let client = Certificate::first(&client.certificate).unwrap();
        let [own, namesake] = [own, namesake].map(|ca| Certificate::first(ca.certificate()).unwrap());
        assert!(client.is_signed_by(&own));
        assert!(!client.is_signed_by(&namesake));
    }

    #[test]
    fn an_untimely_certificate_names_both_clocks() {
        let authority = Authority::generate("Cilium CA", DAY).unwrap();
        let certificate = Certificate::first(authority.certificate()).unwrap();
        let now = Utc::now();
        certificate.timely(now).unwrap();
        let late = certificate.timely(now + 2 * DAY).unwrap_err().to_string();
        assert!(late.contains("expired at") && late.contains("the clock here says"), "{late}");
        let early = certificate.timely(now - 2 * DAY).unwrap_err().to_string();
        assert!(early.contains("only from") && early.contains("the clock here says"), "{early}");
    }

    #[test]
    fn what_is_no_certificate_is_told_and_not_repeated() {
        assert_eq!(Certificate::first("").unwrap_err(), NotACertificate::Empty);
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        assert_eq!(Certificate::first(&key).unwrap_err(), NotACertificate::Empty);
        let broken = "-----BEGIN CERTIFICATE-----\nc2VjcmV0\n-----END CERTIFICATE-----\n";
        assert!(matches!(Certificate::first(broken).unwrap_err(), NotACertificate::Malformed(_)));
        assert_eq!(Certificate::first(&"x".repeat(LONGEST_PEM + 1)).unwrap_err(), NotACertificate::TooLong);
        let authority = Authority::generate("Cilium CA", DAY).unwrap();
        let [one, other] = ["a", "b"].map(|name| authority.user(name, &[], DAY).unwrap());
        usable_pair(&one.certificate, &one.key).unwrap();
        assert_eq!(usable_pair(&one.certificate, &other.key), Err(UnusablePair::Mismatch));
        assert_eq!(usable_pair(&one.certificate, "secret"), Err(UnusablePair::Key));
    }
}
