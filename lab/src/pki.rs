//! Certificates of the lab's Kubernetes APIs, and kubeconfigs that use them.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;

use crate::error::{Doing, LabError, Result};

/// Paths of a certificate and its key, both PEM.
#[derive(Debug, Clone)]
pub(crate) struct CertFiles {
    /// The certificate.
    pub(crate) cert: PathBuf,
    /// Its private key.
    pub(crate) key: PathBuf,
}

/// A certificate authority whose certificates lie in one folder.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
}

impl Authority {
    /// Makes one, and writes `ca.crt` into `dir`.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(crate) fn create(common_name: &str, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).doing(|| format!("making {}", dir.display()))?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, common_name);
        let key = KeyPair::generate().map_err(refused)?;
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(refused)?;
        let authority = Self { issuer, dir: dir.to_owned() };
        write_private(&authority.ca(), authority.issuer.pem().as_bytes())?;
        Ok(authority)
    }

    /// Path of its own certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A server's certificate, `<name>.crt` and `<name>.key`.
    ///
    /// # Errors
    /// When a name cannot be in a certificate, or the files cannot be written.
    pub(crate) fn server(&self, name: &str, dns: &[&str], addresses: &[IpAddr]) -> Result<CertFiles> {
        let names: Vec<String> = dns.iter().map(|&s| s.to_owned()).collect();
        let mut params = CertificateParams::new(names).map_err(refused)?;
        params.subject_alt_names.extend(addresses.iter().map(|a| SanType::IpAddress(*a)));
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(name, params)
    }

    /// A client's certificate, `<file>.crt` and `<file>.key`: Kubernetes takes the common name as the user and
    /// the organisations as its groups.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn client(&self, file: &str, user: &str, groups: &[&str]) -> Result<CertFiles> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(file, params)
    }

    fn issue(&self, file: &str, mut params: CertificateParams) -> Result<CertFiles> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let key = KeyPair::generate().map_err(refused)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(refused)?;
        let files = CertFiles {
            cert: self.dir.join(format!("{file}.crt")),
            key: self.dir.join(format!("{file}.key")),
        };
        write_private(&files.cert, cert.pem().as_bytes())?;
        write_private(&files.key, key.serialize_pem().as_bytes())?;
        Ok(files)
    }
}

/// Writes a kubeconfig with one context, named after the cluster. The certificates go into it, so that it can be
/// copied elsewhere.
///
/// # Errors
/// When a certificate cannot be read or the file not be written.
pub(crate) fn write_kubeconfig(
    path: &Path,
    cluster: &str,
    server: &str,
    ca: &Path,
    client: &CertFiles,
) -> Result<()> {
    use base64::Engine;
    let read = |path: &Path| -> Result<String> {
        let bytes = fs::read(path).doing(|| format!("reading {}", path.display()))?;
        Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": {"server": server, "certificate-authority-data": read(ca)?}}],
        "users": [{"name": cluster, "user": {
            "client-certificate-data": read(&client.cert)?, "client-key-data": read(&client.key)?,
        }}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
        "current-context": cluster,
    });
    write_private(path, config.to_string().as_bytes())
}

/// Writes a file that only its owner may read.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).doing(|| format!("writing {}", path.display()))
}

fn refused(e: rcgen::Error) -> LabError {
    LabError::invalid(format!("making a certificate: {e}"))
}
