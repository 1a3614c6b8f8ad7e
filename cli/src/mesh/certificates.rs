//! What certificates say: for how long they are valid, and whom they name. Public parts only.

use std::fmt;

use chrono::{DateTime, Utc};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

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
        // Also where it is read, what somebody else wrote into it is made fit for a terminal.
        let Some(read) = isthmus_kvstore::Certificate::parse(&der) else {
            return Err(format!("certificate {} in it is not an X.509 certificate", all.len() + 1));
        };
        let isthmus_kvstore::Certificate { subject, not_before, not_after, .. } = read;
        all.push(Certificate { subject, not_before, not_after });
    }
    if all.is_empty() { Err("it has no certificate".into()) } else { Ok(all) }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    #[test]
    fn what_another_cluster_calls_itself_is_nothing_that_a_terminal_obeys() {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("CA\u{1b}[2J{}", "x".repeat(1000)));
        let pem = params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").pem();
        let shown = parse(pem.as_bytes()).expect("a certificate")[0].to_string();
        assert!(shown.starts_with("`CA") && !shown.contains(char::is_control), "{shown:?}");
        assert!(shown.chars().count() < 300, "{shown}");
    }
}
