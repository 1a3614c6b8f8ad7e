//! Certificates of authorities, as they are passed from cluster to cluster: PEM text, checked once.

use std::fmt;
use std::sync::Arc;

use isthmus_wire::printable;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The longest bundle, in bytes.
pub const MAX_BUNDLE_BYTES: usize = 64 * 1024;
/// The most certificates in one bundle: a cluster has one authority, two while it changes it.
pub const MAX_CERTIFICATES: usize = 16;

/// One certificate authority or several, PEM. Cheap to clone; equal if the text is.
///
/// Whether a certificate is valid at present is not looked at: that changes with time, and is told when a connection is
/// made.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CaBundle(Arc<str>);

/// Why a text is no bundle of authorities.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BundleError {
    /// Longer than [`MAX_BUNDLE_BYTES`].
    #[error(
        "it is {0} bytes long, and at most {MAX_BUNDLE_BYTES} are taken; keep only the peer's authorities in it"
    )]
    TooLong(usize),
    /// A private key in it.
    #[error(
        "it holds a private key, which must not leave its cluster; take it out, and exchange the authority, for others may \
         have read its key"
    )]
    PrivateKey,
    /// No certificate in it.
    #[error("it holds no certificate; put PEM text there, `-----BEGIN CERTIFICATE-----` and so on")]
    Empty,
    /// More than [`MAX_CERTIFICATES`].
    #[error("it holds more than {MAX_CERTIFICATES} certificates; keep only the peer's authorities in it")]
    TooMany,
    /// Broken PEM.
    #[error("certificate {number} is not PEM text: {problem}")]
    Pem {
        /// Its place in the bundle, from 1.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Not X.509.
    #[error("certificate {number} cannot be read: {problem}")]
    Certificate {
        /// Its place in the bundle, from 1.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A certificate of a server or a client.
    #[error(
        "certificate {number} ({subject:?}) is not that of an authority; put the one that signed it there"
    )]
    NoAuthority {
        /// Its place in the bundle, from 1.
        number: usize,
        /// Its subject.
        subject: String,
    },
}

impl CaBundle {
    /// Takes `text` if it is a bundle of authorities.
    ///
    /// # Errors
    /// A [`BundleError`] that says which certificate is wrong and what to do.
    pub fn parse(text: &str) -> Result<Self, BundleError> {
        if text.len() > MAX_BUNDLE_BYTES {
            return Err(BundleError::TooLong(text.len()));
        }
        // Of any kind: `PRIVATE KEY`, `EC PRIVATE KEY`, `ENCRYPTED PRIVATE KEY`.
        if text.contains("PRIVATE KEY-----") {
            return Err(BundleError::PrivateKey);
        }
        let mut number = 0;
        for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
            number += 1;
            if number > MAX_CERTIFICATES {
                return Err(BundleError::TooMany);
            }
            let der = certificate
                .map_err(|error| BundleError::Pem { number, problem: brief(&error.to_string()) })?;
            let (_, certificate) = X509Certificate::from_der(&der)
                .map_err(|error| BundleError::Certificate { number, problem: brief(&error.to_string()) })?;
            if !certificate.is_ca() {
                let subject = brief(&certificate.subject().to_string());
                return Err(BundleError::NoAuthority { number, subject });
            }
        }
        if number == 0 {
            return Err(BundleError::Empty);
        }
        Ok(Self(text.into()))
    }

    /// The PEM text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The PEM text, shared.
    pub fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    /// The certificates, DER.
    pub fn certificates(&self) -> impl Iterator<Item = CertificateDer<'static>> + '_ {
        // All of them were readable when this was made.
        CertificateDer::pem_slice_iter(self.0.as_bytes()).filter_map(Result::ok)
    }
}

impl fmt::Debug for CaBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CaBundle")
            .field(&format_args!("{} certificates", self.certificates().count()))
            .finish()
    }
}

/// The beginning of a text that somebody else wrote.
pub(crate) fn brief(text: &str) -> String {
    const LONGEST: usize = 120;
    printable(text, LONGEST)
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};

    use super::*;

    /// A certificate and its key, PEM.
    pub(crate) fn certificate(name: &str, authority: bool) -> (String, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        if authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let key = KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    fn error(text: &str) -> String {
        CaBundle::parse(text).expect_err("must be refused").to_string()
    }

    #[test]
    fn a_bundle_of_authorities_is_taken_as_it_is() {
        let text = format!("# old\n{}# new\n{}", certificate("one", true).0, certificate("two", true).0);
        let bundle = CaBundle::parse(&text).unwrap();
        assert_eq!(bundle.as_str(), text);
        assert_eq!(bundle.certificates().count(), 2);
        assert_eq!(format!("{bundle:?}"), "CaBundle(2 certificates)");
    }

    #[test]
    fn what_is_no_authority_is_named() {
        let (authority, key) = certificate("one", true);
        let (server, _) = certificate("gateway of beta", false);
        assert!(error("").contains("no certificate"));
        for text in [&key, &format!("{authority}{key}")] {
            let error = error(text);
            assert!(error.contains("private key") && !error.contains("BEGIN"), "{error}");
        }
        let text = error(&format!("{authority}{server}"));
        assert!(text.contains("certificate 2") && text.contains("gateway of beta"), "{text}");
        assert!(error("-----BEGIN CERTIFICATE-----\n?\n-----END CERTIFICATE-----\n").contains("not PEM"));
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(error(nonsense).contains("cannot be read"));
    }

    #[test]
    fn a_bundle_is_bounded() {
        assert!(error(&"x".repeat(MAX_BUNDLE_BYTES + 1)).contains("bytes long"));
        assert!(error(&certificate("one", true).0.repeat(MAX_CERTIFICATES + 1)).contains("more than 16"));
    }
}
