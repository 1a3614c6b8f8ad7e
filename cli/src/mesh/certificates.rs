//! What certificates say: for how long they are valid, and whom they name. Public parts only.

use std::fmt;

use chrono::{DateTime, Utc};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A bundle with more than this is not one of CA certificates.
const MOST: usize = 64;

/// A certificate's public face.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// The subject's common name, or the whole subject where there is none.
    pub(crate) subject: String,
    /// Valid from here on.
    pub(crate) not_before: DateTime<Utc>,
    /// And until here.
    pub(crate) not_after: DateTime<Utc>,
    /// Two certificates are the same if this is.
    pub(crate) der: Vec<u8>,
}

/// How a moment relates to a certificate's validity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validity {
    NotYet,
    Valid,
    Over,
}

impl Certificate {
    /// Whether it is valid at a moment.
    pub(crate) fn at(&self, moment: DateTime<Utc>) -> Validity {
        if moment < self.not_before {
            Validity::NotYet
        } else if moment > self.not_after {
            Validity::Over
        } else {
            Validity::Valid
        }
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`, valid from {} to {}", self.subject, utc(self.not_before), utc(self.not_after))
    }
}

/// A moment as people compare it.
pub(crate) fn utc(moment: DateTime<Utc>) -> String {
    moment.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// The certificates of a PEM text, in its order.
///
/// # Errors
/// In words: what of it is not a certificate.
pub(crate) fn parse(pem: &[u8]) -> Result<Vec<Certificate>, String> {
    let mut all = Vec::new();
    for der in CertificateDer::pem_slice_iter(pem) {
        let der = der.map_err(|error| format!("it is not PEM: {error}"))?;
        if all.len() == MOST {
            return Err(format!("it has more than {MOST} certificates"));
        }
        let (_, certificate) = X509Certificate::from_der(&der)
            .map_err(|_| format!("certificate {} in it is not an X.509 certificate", all.len() + 1))?;
        let moment = |time: x509_parser::time::ASN1Time| {
            DateTime::from_timestamp(time.timestamp(), 0)
                .ok_or_else(|| format!("certificate {} in it has a date beyond all calendars", all.len() + 1))
        };
        let subject = certificate.subject();
        let name = subject.iter_common_name().next().and_then(|name| name.as_str().ok());
        all.push(Certificate {
            subject: name.map_or_else(|| subject.to_string(), str::to_owned),
            not_before: moment(certificate.validity().not_before)?,
            not_after: moment(certificate.validity().not_after)?,
            der: der.to_vec(),
        });
    }
    if all.is_empty() { Err("it has no certificate".into()) } else { Ok(all) }
}
