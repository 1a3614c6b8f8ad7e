//! The certificates of a mesh: an authority per cluster or one for all, the gateway's own, and its clients'.
//!
//! Names, usages and lifetimes are those of Cilium Cluster Mesh (wire format, section A.7), so that its clients connect
//! with what is issued here and the other way round. Keys are ECDSA P-256: every etcd client takes them.

mod inspect;
mod key;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;

pub use self::inspect::{Certificate, LONGEST_PEM, NotACertificate, Untimely, UnusablePair, usable_pair};

/// How long a certificate is valid unless said otherwise: 1,095 days, Cilium's own default.
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(1_095 * 24 * 60 * 60);

/// The common name of every gateway, whatever its cluster.
pub const GATEWAY_NAME: &str = "clustermesh-apiserver.cilium.io";

/// How far back a certificate's validity begins, so that a peer whose clock is behind accepts a new one.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// What can go wrong while issuing or storing a certificate.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The names asked for cannot stand in a certificate.
    #[error("the certificate for `{name}` cannot be made: {source}")]
    Issue {
        /// Common name asked for.
        name: String,
        /// What rcgen says.
        source: rcgen::Error,
    },
    /// An authority from elsewhere is not one.
    #[error("{0}")]
    NoAuthority(&'static str),
    /// Its certificate and key are not usable together.
    #[error(transparent)]
    Pair(#[from] UnusablePair),
    /// A stored authority is not one.
    #[error("the authority in {path} cannot be used: {source}; delete it and its key to have a new one made")]
    Authority {
        /// The certificate's file.
        path: PathBuf,
        /// What rcgen says.
        source: Box<PkiError>,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Who a client of a gateway is. The common name decides what it may read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Client<'a> {
    /// Any peer's relay (authentication mode `legacy`).
    AnyRemote,
    /// The relay of the named peer (authentication mode `cluster`).
    Remote(&'a str),
    /// A Cilium agent of the named, own cluster.
    Local(&'a str),
    /// A node-agent of the named, own cluster.
    Agent(&'a str),
    /// A person who operates the named, own cluster.
    Admin(&'a str),
}

impl Client<'_> {
    /// The common name in its certificate.
    pub fn common_name(&self) -> String {
        match self {
            Self::AnyRemote => "remote".to_owned(),
            Self::Remote(cluster) => format!("remote-{cluster}"),
            Self::Local(cluster) => format!("local-{cluster}"),
            Self::Agent(cluster) => format!("agent-{cluster}"),
            Self::Admin(cluster) => format!("admin-{cluster}"),
        }
    }
}

/// A certificate and its key, both as PEM.
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its private key, PKCS #8.
    pub key: String,
}

impl Identity {
    /// Writes `<name>.crt` and `<name>.key` into `folder`; the key is readable by its owner alone.
    ///
    /// # Errors
    /// [`PkiError::File`] names the file that could not be written.
    pub fn write(&self, folder: &Path, name: &str) -> Result<IdentityFiles, PkiError> {
        let files = IdentityFiles {
            certificate: folder.join(format!("{name}.crt")),
            key: folder.join(format!("{name}.key")),
        };
        write(&files.certificate, &self.certificate, 0o644)?;
        write(&files.key, &self.key, 0o600)?;
        Ok(files)
    }
}

/// Where an [`Identity`] was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IdentityFiles {
    /// The certificate, PEM.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
}

/// A certificate authority.
pub struct Authority {
    certificate: String,
    key: String,
    /// Its own end: nothing that it issues is valid for longer.
    until: SystemTime,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority whose certificate has the common name `name` ("Cilium CA" where Cilium's tools should know it).
    ///
    /// # Errors
    /// [`PkiError::Issue`] if `name` cannot stand in a certificate.
    pub fn generate(name: &str, validity: Duration) -> Result<Self, PkiError> {
        let issue = |source| PkiError::Issue { name: name.to_owned(), source };
        let mut params = params(name, validity);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().map_err(issue)?;
        let certificate = params.self_signed(&key).map_err(issue)?.pem();
        let until = params.not_after.into();
        Ok(Self { certificate, key: key.serialize_pem(), until, issuer: Issuer::new(params, key) })
    }

    /// The authority with this certificate and key, both PEM. Of several certificates the first is the one that issues.
    ///
    /// # Errors
    /// [`PkiError::Pair`] if they are not a certificate and its key, [`PkiError::NoAuthority`] if it may not issue.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, PkiError> {
        let read = usable_pair(certificate, key)?;
        if !read.authority {
            return Err(PkiError::NoAuthority(
                "its certificate is not an authority's (basic constraints, CA:TRUE)",
            ));
        }
        let pair = key::key_pair(key, &read).ok_or(PkiError::NoAuthority(
            "its key is of no kind that issues here: RSA from 2048 bits on, or ECDSA on P-256 or P-384, complete with its \
             public part (openssl pkcs8 -topk8 -nocrypt -in OLD -out NEW adds that)",
        ))?;
        let der = CertificateDer::from(read.der().to_vec());
        let issuer = Issuer::from_ca_cert_der(&der, pair)
            .map_err(|source| PkiError::Issue { name: read.common_name.clone(), source })?;
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        Ok(Self { certificate, key, until: read.not_after.into(), issuer })
    }

    /// The authority that [`Authority::write`] stored.
    ///
    /// # Errors
    /// [`PkiError::File`] if a file cannot be read, [`PkiError::Authority`] if it holds something else.
    pub fn load(folder: &Path, name: &str) -> Result<Self, PkiError> {
        let path = folder.join(format!("{name}.crt"));
        let certificate = read(&path)?;
        let key = read(&folder.join(format!("{name}.key")))?;
        Self::from_pem(&certificate, &key)
            .map_err(|source| PkiError::Authority { path, source: Box::new(source) })
    }

    /// Its certificate, PEM: what those trust who trust it.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Its certificate and key, to be kept.
    pub fn identity(&self) -> Identity {
        Identity { certificate: self.certificate.clone(), key: self.key.clone() }
    }

    /// Writes `<name>.crt` and `<name>.key` into `folder`.
    ///
    /// # Errors
    /// [`PkiError::File`] names the file that could not be written.
    pub fn write(&self, folder: &Path, name: &str) -> Result<IdentityFiles, PkiError> {
        self.identity().write(folder, name)
    }

    /// A gateway's certificate: valid for Cilium's names of it, `clustermesh-apiserver.<namespace>.svc`, loopback,
    /// and `extra` names and addresses.
    ///
    /// # Errors
    /// [`PkiError::Issue`] if one of the names cannot stand in a certificate.
    pub fn gateway(
        &self,
        namespace: &str,
        extra: &[String],
        validity: Duration,
    ) -> Result<Identity, PkiError> {
        let names = gateway_names(namespace, extra);
        self.server(GATEWAY_NAME, &names, validity)
    }

    /// A server's certificate with the common name `name`, valid for `names` (DNS names and addresses).
    ///
    /// # Errors
    /// [`PkiError::Issue`] if one of the names cannot stand in a certificate.
    pub fn server(&self, name: &str, names: &[String], validity: Duration) -> Result<Identity, PkiError> {
        let mut params = params(name, validity);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for entry in names {
            params.subject_alt_names.push(match entry.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(
                    entry
                        .as_str()
                        .try_into()
                        .map_err(|source| PkiError::Issue { name: entry.clone(), source })?,
                ),
            });
        }
        self.issue(name, params)
    }

    /// A certificate for a client of a gateway.
    ///
    /// # Errors
    /// [`PkiError::Issue`] if the name cannot stand in a certificate.
    pub fn client(&self, client: Client<'_>, validity: Duration) -> Result<Identity, PkiError> {
        self.user(&client.common_name(), &[], validity)
    }

    /// A certificate for a user of a Kubernetes API: the common name is the user, the organizations are the groups.
    ///
    /// # Errors
    /// [`PkiError::Issue`] if a name cannot stand in a certificate.
    pub fn user(&self, name: &str, groups: &[&str], validity: Duration) -> Result<Identity, PkiError> {
        let mut params = params(name, validity);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(name, params)
    }

    fn issue(&self, name: &str, mut params: CertificateParams) -> Result<Identity, PkiError> {
        let issue = |source| PkiError::Issue { name: name.to_owned(), source };
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.use_authority_key_identifier_extension = true;
        params.not_after = params.not_after.min(self.until.into());
        let key = KeyPair::generate().map_err(issue)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(issue)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }
}

/// The names that a gateway's certificate is valid for.
pub fn gateway_names(namespace: &str, extra: &[String]) -> Vec<String> {
    let mut names = vec![
        GATEWAY_NAME.to_owned(),
        "*.mesh.cilium.io".to_owned(),
        format!("clustermesh-apiserver.{namespace}.svc"),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
    ];
    names.extend_from_slice(extra);
    names
}

fn params(name: &str, validity: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = std::time::SystemTime::now();
    // A short life, as tests have, is not mostly past.
    params.not_before = (now - CLOCK_SKEW.min(validity / 10)).into();
    params.not_after = (now + validity).into();
    params
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File { path: path.to_owned(), source })
}

/// Written beside and renamed: who reads it meanwhile gets the old one or the new one, never half of one.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let file = |source| PkiError::File { path: path.to_owned(), source };
    let beside = path.with_extension("new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file(error)),
        _ => {}
    }
    let mut out =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside).map_err(file)?;
    io::Write::write_all(&mut out, text.as_bytes()).map_err(file)?;
    fs::rename(&beside, path).map_err(file)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::server::WebPkiClientVerifier;
    use std::sync::Arc;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    fn der(pem: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    }

    fn roots(authority: &Authority) -> Arc<rustls::RootCertStore> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(der(authority.certificate())).unwrap();
        Arc::new(roots)
    }

    fn provider() -> Arc<rustls::crypto::CryptoProvider> {
        Arc::new(rustls::crypto::ring::default_provider())
    }

    #[test]
    fn a_gateway_is_who_it_says_under_ciliums_names_and_the_extra_ones() {
        let authority = Authority::generate("Cilium CA", DAY).unwrap();
        let gateway = authority.gateway("kube-system", &["10.1.2.3".to_owned()], DAY).unwrap();
        let verifier =
            rustls::client::WebPkiServerVerifier::builder_with_provider(roots(&authority), provider())
                .build()
                .unwrap();
        let verify = |name: &str| {
            let name = ServerName::try_from(name.to_owned()).unwrap();
            rustls::client::danger::ServerCertVerifier::verify_server_cert(
                verifier.as_ref(),
                &der(&gateway.certificate),
                &[],
                &name,
                &[],
                UnixTime::now(),
            )
        };
        for name in
            ["beta.mesh.cilium.io", "clustermesh-apiserver.kube-system.svc", "127.0.0.1", "::1", "10.1.2.3"]
        {
            verify(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        verify("elsewhere.example").expect_err("not one of its names");
        verify("10.1.2.4").expect_err("not one of its addresses");
    }

    #[test]
    fn a_client_is_accepted_by_its_own_authority_alone_and_a_server_is_no_client() {
        let own = Authority::generate("Cilium CA", DAY).unwrap();
        let other = Authority::generate("Cilium CA", DAY).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(&own), provider()).build().unwrap();
        let verify = |identity: &Identity| {
            rustls::server::danger::ClientCertVerifier::verify_client_cert(
                verifier.as_ref(),
                &der(&identity.certificate),
                &[],
                UnixTime::now(),
            )
        };
        verify(&own.client(Client::Remote("beta"), DAY).unwrap()).unwrap();
        verify(&other.client(Client::Remote("beta"), DAY).unwrap()).expect_err("another authority's");
        verify(&own.gateway("kube-system", &[], DAY).unwrap()).expect_err("a server's certificate");
    }

    #[test]
    fn an_authority_goes_on_after_a_restart_and_keys_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let files = Authority::generate("Cilium CA", DAY).unwrap().write(folder.path(), "ca").unwrap();
        assert_eq!(fs::metadata(&files.key).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Authority::load(folder.path(), "ca").unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots(&again), provider()).build().unwrap();
        let client = again.client(Client::Agent("alpha"), DAY).unwrap();
        rustls::server::danger::ClientCertVerifier::verify_client_cert(
            verifier.as_ref(),
            &der(&client.certificate),
            &[],
            UnixTime::now(),
        )
        .unwrap();
    }

    #[test]
    fn what_is_no_authority_is_named_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("ca.crt"), "nothing").unwrap();
        fs::write(folder.path().join("ca.key"), "nothing").unwrap();
        let error = Authority::load(folder.path(), "ca").err().unwrap().to_string();
        assert!(error.contains("ca.crt"), "{error}");
    }
}
