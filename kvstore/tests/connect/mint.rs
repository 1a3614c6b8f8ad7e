//! Certificates in memory, good ones and such as only an enemy would make.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

/// An authority, or one below it.
pub(crate) struct Mint {
    /// Its certificate.
    pub(crate) pem: String,
    /// Its own certificate and those between it and the root, as a chain shows them. Empty for a root.
    between: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate, with all that its chain shows, and its key.
#[derive(Clone)]
pub(crate) struct Minted {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// What a certificate is to say.
pub(crate) struct Wanted {
    common_names: Vec<String>,
    names: Vec<String>,
    usages: Vec<ExtendedKeyUsagePurpose>,
    /// From and until, in days from now.
    validity: (i64, i64),
}

impl Wanted {
    /// A client's.
    pub(crate) fn client(common_name: &str) -> Self {
        Self {
            common_names: vec![common_name.to_owned()],
            names: Vec::new(),
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth],
            validity: (-1, 1),
        }
    }

    /// A server's, for these names.
    pub(crate) fn server(names: &[&str]) -> Self {
        Self {
            common_names: vec!["server".into()],
            names: names.iter().map(ToString::to_string).collect(),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth],
            validity: (-1, 1),
        }
    }

    pub(crate) fn common_names(mut self, names: &[&str]) -> Self {
        self.common_names = names.iter().map(ToString::to_string).collect();
        self
    }

    /// From and until, in days from now.
    pub(crate) fn valid(mut self, from: i64, until: i64) -> Self {
        self.validity = (from, until);
        self
    }

    pub(crate) fn for_servers(mut self) -> Self {
        self.usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self
    }

    fn params(self) -> CertificateParams {
        let mut params = CertificateParams::new(self.names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        for (index, name) in self.common_names.into_iter().enumerate() {
            // The same attribute by its number, for rcgen keeps one of a kind.
            let kind = if index == 0 { DnType::CommonName } else { DnType::CustomDnType(vec![2, 5, 4, 3]) };
            params.distinguished_name.push(kind, name);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = self.usages;
        let now = std::time::SystemTime::now();
        let day = std::time::Duration::from_secs(24 * 60 * 60);
        let at = |days: i64| {
            let distance = day * u32::try_from(days.unsigned_abs()).unwrap();
            if days < 0 { now - distance } else { now + distance }
        };
        params.not_before = at(self.validity.0).into();
        params.not_after = at(self.validity.1).into();
        params
    }
}

impl Mint {
    /// A root of this name. Two of the same name have nothing else in common.
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = Self::params(name);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, between: String::new(), issuer: Issuer::new(params, key) }
    }

    /// An authority that this one has signed.
    pub(crate) fn below(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = Self::params(name);
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self { between: format!("{pem}{}", self.between), pem, issuer: Issuer::new(params, key) }
    }

    /// Somebody who was given no authority and signs nevertheless.
    pub(crate) fn usurper(&self, wanted: Wanted) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = wanted.params();
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self { between: format!("{pem}{}", self.between), pem, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn mint(&self, wanted: Wanted) -> Minted {
        let key = KeyPair::generate().unwrap();
        let certificate = wanted.params().signed_by(&key, &self.issuer).unwrap().pem();
        Minted { certificate: format!("{certificate}{}", self.between), key: key.serialize_pem() }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }
}
