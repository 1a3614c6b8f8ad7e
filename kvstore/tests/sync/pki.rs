//! Certificates for one test.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use isthmus_kvstore::config::{ClientConfig, Identity, IdentityFiles, Pem};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;

/// An authority with a server certificate for loopback and client certificates as asked for.
pub(crate) struct Pki {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, "Test CA");
        let key = KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap();
        fs::write(directory.path().join("ca.crt"), ca.pem()).unwrap();
        let pki = Self { directory, issuer: Issuer::new(params, key) };
        pki.issue("server", "server", ExtendedKeyUsagePurpose::ServerAuth);
        pki
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A client with this common name that reads from `port`.
    pub(crate) fn client(&self, common_name: &str, port: u16) -> ClientConfig {
        self.issue(common_name, common_name, ExtendedKeyUsagePurpose::ClientAuth);
        ClientConfig {
            endpoints: vec![format!("https://127.0.0.1:{port}").parse().unwrap()],
            trusted_ca: Some(Pem::File(self.ca())),
            identity: Some(Identity::Files(self.files(common_name))),
            password: None,
            server_name: None,
            addresses: BTreeMap::new(),
        }
    }

    /// Where that client's certificate and key are.
    pub(crate) fn files(&self, common_name: &str) -> IdentityFiles {
        IdentityFiles {
            cert_file: self.path(format!("{common_name}.crt")),
            key_file: self.path(format!("{common_name}.key")),
        }
    }

    fn issue(&self, file: &str, common_name: &str, usage: ExtendedKeyUsagePurpose) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.path(format!("{file}.crt")), certificate.pem()).unwrap();
        fs::write(self.path(format!("{file}.key")), key.serialize_pem()).unwrap();
    }
}
