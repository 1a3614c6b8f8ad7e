//! The private key of an authority, in whichever PEM form it comes.
//!
//! rcgen takes PKCS #8 alone. Cilium's `cilium-ca` holds what Helm's `genCA` or Cilium's certgen wrote, PKCS #1
//! (`RSA PRIVATE KEY`) or SEC 1 (`EC PRIVATE KEY`), and cert-manager writes those too unless it is told otherwise. They are
//! what PKCS #8 wraps, without the name of the algorithm; the certificate has that.

use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::asn1_rs::Any;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Certificate;

/// The pair of this PEM key, which belongs to `certificate`. None if it is of a kind that cannot issue here.
pub(super) fn key_pair(key: &str, certificate: &Certificate) -> Option<KeyPair> {
    let key = match PrivateKeyDer::from_pem_slice(key.as_bytes()).ok()? {
        PrivateKeyDer::Pkcs8(key) => key,
        PrivateKeyDer::Pkcs1(key) => wrapped(key.secret_pkcs1_der(), certificate)?,
        PrivateKeyDer::Sec1(key) => wrapped(key.secret_sec1_der(), certificate)?,
        _ => return None,
    };
    KeyPair::try_from(&key).ok()
}

/// `PrivateKeyInfo` of RFC 5208: a version, the algorithm, the key.
fn wrapped(key: &[u8], certificate: &Certificate) -> Option<PrivatePkcs8KeyDer<'static>> {
    const VERSION: [u8; 3] = [INTEGER, 1, 0];
    let info = [&VERSION, algorithm(certificate.der())?.as_slice(), &element(OCTET_STRING, key)].concat();
    Some(element(SEQUENCE, &info).into())
}

const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const SEQUENCE: u8 = 0x30;

/// The `AlgorithmIdentifier` of the certificate's own key, encoded.
fn algorithm(certificate: &[u8]) -> Option<Vec<u8>> {
    let (_, read) = X509Certificate::from_der(certificate).ok()?;
    let (_, info) = Any::from_der(read.public_key().raw).ok()?;
    let (behind, _) = Any::from_der(info.data).ok()?;
    Some(info.data[..info.data.len() - behind.len()].to_vec())
}

/// One element of DER.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let digits = &length[length.iter().position(|digit| *digit != 0).unwrap_or(length.len() - 1)..];
    let mut element = vec![tag];
    if content.len() >= 0x80 {
        // The length of the length, of which eight bytes are the most.
        element.push(0x80 | digits.len() as u8);
    }
    element.extend_from_slice(digits);
    element.extend_from_slice(content);
    element
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;
    use std::time::Duration;

    use super::*;
    use crate::pki::{Authority, Client, PkiError};

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn openssl(folder: &Path, arguments: &str) {
        let done = Command::new("openssl").args(arguments.split(' ')).current_dir(folder).output();
        let done = done.expect("openssl, which the page about certificates uses too");
        assert!(done.status.success(), "{arguments}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// An authority as others make it, with its key in PKCS #8 and as it was written before there was that.
    fn foreign(kind: &str) -> [String; 3] {
        let folder = tempfile::tempdir().expect("a folder");
        let usage = "-subj /CN=CiliumCA -addext keyUsage=critical,keyCertSign,cRLSign";
        openssl(
            folder.path(),
            &format!("req -x509 -newkey {kind} -nodes -days 1 {usage} -keyout new -out crt"),
        );
        openssl(folder.path(), "pkey -in new -traditional -out old");
        ["crt", "new", "old"].map(|name| std::fs::read_to_string(folder.path().join(name)).expect(name))
    }

    #[test]
    fn authorities_of_cilium_issue_with_the_keys_that_helm_and_certgen_write() {
        for (kind, label) in [
            ("rsa:2048", "RSA PRIVATE KEY"),
            ("ec -pkeyopt ec_paramgen_curve:P-256", "EC PRIVATE KEY"),
            ("ec -pkeyopt ec_paramgen_curve:P-384", "EC PRIVATE KEY"),
        ] {
            let [certificate, new, old] = foreign(kind);
            assert!(old.contains(label), "{kind} is the form in question");
            for key in [new, old] {
                let authority = Authority::from_pem(&certificate, &key).expect(kind);
                let client = authority.client(Client::Remote("alpha"), DAY).expect(kind);
                let [own, client] = [&certificate, &client.certificate]
                    .map(|pem| Certificate::first(pem).expect("a certificate"));
                assert!(client.is_signed_by(&own), "{kind}");
            }
        }
    }

    #[test]
    fn a_key_that_cannot_issue_is_told_with_what_to_do() {
        let [certificate, _, key] = foreign("ec -pkeyopt ec_paramgen_curve:secp521r1");
        let error = Authority::from_pem(&certificate, &key).err().expect("a curve that ring has not");
        assert!(matches!(error, PkiError::Pair(_) | PkiError::NoAuthority(_)), "{error}");
    }

    #[test]
    fn lengths_are_written_as_der_wants_them() {
        for (length, head) in
            [(0, &[4, 0][..]), (127, &[4, 127]), (128, &[4, 0x81, 128]), (256, &[4, 0x82, 1, 0])]
        {
            let element = element(OCTET_STRING, &vec![7; length]);
            assert_eq!((&element[..head.len()], element.len()), (head, head.len() + length));
        }
    }
}
