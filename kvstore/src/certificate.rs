//! What a certificate says of itself, for whoever has to tell somebody about it.

use std::{fmt, net::IpAddr};

use chrono::{DateTime, Utc};
use isthmus_wire::printable;
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
use x509_parser::x509::X509Name;

/// The longest name that is shown, in bytes. Whoever made the certificate chose it, so it is on one line, too.
const SHOWN: usize = 128;
/// The most names that are kept.
const MAX_NAMES: usize = 64;

/// The readable parts of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Certificate {
    /// Whose it is: the common name or, without one, the whole subject.
    pub subject: String,
    /// Who signed it, in the same form.
    pub issuer: String,
    /// The DNS names and addresses that it is valid for.
    pub names: Vec<String>,
    /// Since when it is valid.
    pub not_before: DateTime<Utc>,
    /// Until when it is valid.
    pub not_after: DateTime<Utc>,
}

impl Certificate {
    /// Reads it, none if it is no certificate.
    pub fn parse(der: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let time = |time: x509_parser::time::ASN1Time| DateTime::from_timestamp(time.timestamp(), 0);
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.iter().flat_map(|names| &names.value.general_names).filter_map(general_name);
        Some(Self {
            subject: shown(certificate.subject()),
            issuer: shown(certificate.issuer()),
            names: names.take(MAX_NAMES).collect(),
            not_before: time(certificate.validity().not_before)?,
            not_after: time(certificate.validity().not_after)?,
        })
    }

    /// How its validity stands at `now`.
    pub fn validity(&self, now: DateTime<Utc>) -> Validity {
        if now < self.not_before {
            Validity::NotYet
        } else if now > self.not_after {
            Validity::Expired
        } else {
            Validity::Valid
        }
    }
}

/// How a certificate's validity stands at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// It is not valid yet.
    NotYet,
    /// It is valid.
    Valid,
    /// It was valid.
    Expired,
}

/// `"remote-beta" (issued by "Isthmus CA beta", valid from 2026-01-01T00:00:00Z until 2026-04-01T00:00:00Z)`
impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} (issued by {:?}, valid from {} until {})",
            self.subject,
            self.issuer,
            clock(self.not_before),
            clock(self.not_after)
        )
    }
}

/// A time as messages show it: in seconds, in UTC.
pub(crate) fn clock(time: DateTime<Utc>) -> impl fmt::Display {
    time.format("%Y-%m-%dT%H:%M:%SZ")
}

/// The name that a client's certificate gives itself, on which rights are built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CommonName {
    /// There is none, or none that is text.
    None,
    /// The only one.
    One(String),
    /// There are several, and which one counts depends on who reads it.
    Several,
}

impl CommonName {
    pub(crate) fn of(der: &CertificateDer<'_>) -> Self {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Self::None };
        let mut names = certificate.subject().iter_common_name();
        match (names.next(), names.next()) {
            (_, Some(_)) => Self::Several,
            (Some(name), None) => match name.as_str() {
                Ok(name) if !name.is_empty() => Self::One(name.to_owned()),
                _ => Self::None,
            },
            (None, None) => Self::None,
        }
    }
}

/// The subject as it is encoded, by which an issuer is found; none if it is no certificate.
pub(crate) fn subject<'a>(der: &'a CertificateDer<'_>) -> Option<&'a [u8]> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(certificate.tbs_certificate.subject.as_raw())
}

fn shown(name: &X509Name<'_>) -> String {
    let common = name.iter_common_name().next().and_then(|name| name.as_str().ok());
    let text = common.map_or_else(|| name.to_string(), str::to_owned);
    printable(&text, SHOWN)
}

fn general_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(printable(name, SHOWN)),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
            _ => None,
        },
        _ => None,
    }
}
