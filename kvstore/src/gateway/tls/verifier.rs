//! Judges the certificates of clients: signed by an authority that is trusted, and by one that may say this name.
//!
//! Authorities are grouped by what they may vouch for, and each group verifies on its own. All of them may have the
//! same name ("Cilium CA"); what tells them apart is their keys.
//!
//! Anybody may show a certificate, and whoever calls itself `remote` is looked for in every peer's group. So what a stranger
//! costs must not be of its own making: a group whose authorities have other names costs no signature, and one in which they
//! have the right one costs one for each way there, of which `check_chain` leaves hardly two.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{TlsError, Trust, Vouches};
use crate::certificate::{Certificate, CommonName, clock, subject};
use crate::pem;

/// The most bytes of authorities' names that clients are given to choose a certificate by. With more they are given
/// none, and show what they have.
const MAX_HINT_BYTES: usize = 32 << 10;
/// The most authorities that a client may put between itself and the one that is trusted.
const MAX_INTERMEDIATES: usize = 3;
/// Of so many authorities that may not say a name it is found out whether they said it.
const SUSPECTS: usize = 32;
/// A refusal is logged once in this time, the others are counted: anybody may try.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Verifies clients' certificates by one [`Trust`].
#[derive(Debug)]
pub(in crate::gateway) struct TrustVerifier {
    groups: Vec<Group>,
    hints: Vec<DistinguishedName>,
    algorithms: WebPkiSupportedAlgorithms,
    /// How often something was taken out of trust before it became this.
    losses: u64,
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Group {
    vouches: Vouches,
    certificates: HashSet<CertificateDer<'static>>,
    verifier: Arc<dyn ClientCertVerifier>,
}

#[derive(Debug, Default)]
struct Log {
    last: Option<Instant>,
    unsaid: u64,
}

/// A certificate that is good but says what its authority may not say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error(
        "the authority of cluster {cluster} vouches for {cluster} alone (`remote-{cluster}`, `remote`), not for {name:?}"
    )]
    Name { cluster: String, name: String },
    #[error(
        "the authority of cluster {cluster} vouches for `remote-{cluster}` alone, and the certificate has no name"
    )]
    Nameless { cluster: String },
    #[error("the certificate has several common names, and only one can count")]
    Several,
}

/// A chain that costs more to follow than a client needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Tangle {
    #[error("its chain has {0} more certificates, and no more than {MAX_INTERMEDIATES} are looked at")]
    TooLong(usize),
    #[error(
        "two certificates in its chain have the same subject, so that there are several ways to follow it"
    )]
    Ambiguous,
}

impl TrustVerifier {
    pub(super) fn of(trust: &Trust) -> Result<Self, TlsError> {
        let mut groups: Vec<(Vouches, Vec<CertificateDer<'static>>)> = Vec::new();
        for authority in &trust.authorities {
            let certificates = pem::certificates(authority.pem.as_bytes())
                .map_err(|source| TlsError::Authority { vouches: authority.vouches.clone(), source })?;
            match groups.iter_mut().find(|(vouches, _)| *vouches == authority.vouches) {
                Some((_, all)) => all.extend(certificates),
                None => groups.push((authority.vouches.clone(), certificates)),
            }
        }
        Self::new(groups)
    }

    pub(super) fn new(
        groups: impl IntoIterator<Item = (Vouches, Vec<CertificateDer<'static>>)>,
    ) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut hints: Vec<DistinguishedName> = Vec::new();
        let mut verifiers = Vec::new();
        for (vouches, certificates) in groups {
            let unusable = |reason: String| TlsError::Anchor { vouches: vouches.clone(), reason };
            let mut roots = RootCertStore::empty();
            for certificate in &certificates {
                roots.add(certificate.clone()).map_err(|error| unusable(error.to_string()))?;
            }
            hints.extend(roots.subjects());
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
                .build()
                .map_err(|error| unusable(error.to_string()))?;
            verifiers.push(Group { vouches, certificates: certificates.into_iter().collect(), verifier });
        }
        if verifiers.is_empty() {
            return Err(TlsError::NoAuthority);
        }
        hints.sort_unstable_by(|one, other| one.as_ref().cmp(other.as_ref()));
        hints.dedup_by(|one, other| one.as_ref() == other.as_ref());
        if hints.iter().map(|hint| hint.as_ref().len()).sum::<usize>() > MAX_HINT_BYTES {
            hints.clear();
        }
        let algorithms = provider.signature_verification_algorithms;
        Ok(Self { groups: verifiers, hints, algorithms, losses: 0, log: Mutex::default() })
    }

    /// This one, in the place of `before`.
    pub(super) fn after(mut self, before: &Self) -> Self {
        let kept = |old: &Group| {
            self.groups
                .iter()
                .any(|new| new.vouches == old.vouches && new.certificates.is_superset(&old.certificates))
        };
        let lost = !before.groups.iter().all(kept);
        self.losses = before.losses + u64::from(lost);
        self
    }

    /// How often something was taken out of trust. While it stays the same, whoever was let in would be let in again.
    pub(in crate::gateway) fn losses(&self) -> u64 {
        self.losses
    }

    /// Whether a client with this chain would be let in, at the time when it was.
    pub(in crate::gateway) fn still_trusts(&self, chain: &[CertificateDer<'_>], since: UnixTime) -> bool {
        let Some((own, intermediates)) = chain.split_first() else { return false };
        self.judge(own, intermediates, since).is_ok()
    }

    fn judge(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        check_chain(intermediates)?;
        let name = CommonName::of(own);
        let signed = |group: &Group| group.verifier.verify_client_cert(own, intermediates, now);
        let mut why = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        for group in self.groups.iter().filter(|group| group.vouches.cover(&name)) {
            match signed(group) {
                Ok(_) => return Ok(()),
                Err(error) => {
                    if is_telling(&error) {
                        why = error;
                    }
                }
            }
        }
        // It is refused; what is left to find out is why.
        for group in self.groups.iter().filter(|group| !group.vouches.cover(&name)).take(SUSPECTS) {
            match signed(group) {
                Ok(_) => return Err(Refusal::of(&group.vouches, name).into()),
                Err(error) if is_telling(&error) => why = error,
                Err(_) => {}
            }
        }
        Err(why)
    }

    /// Tells the operator, who is found at the address of the span that this is in.
    fn tell(&self, own: &CertificateDer<'_>, error: &rustls::Error) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.last.is_some_and(|last| last.elapsed() < LOG_EVERY) {
            log.unsaid += 1;
            return;
        }
        log.last = Some(Instant::now());
        let others = std::mem::take(&mut log.unsaid);
        drop(log);
        let certificate = Certificate::parse(own)
            .map_or_else(|| "one that cannot be read".to_owned(), |certificate| certificate.to_string());
        let reason = reason(error);
        tracing::warn!(%certificate, %reason, others, "a client's certificate is refused; {}", advice(error));
    }
}

/// Refuses a chain that can be followed in many ways before anything is verified. Each group would try all of them, with as many
/// signatures as there are orders in which certificates of the same name fit each other.
fn check_chain(intermediates: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(Tangle::TooLong(intermediates.len()).into());
    }
    let mut subjects = HashSet::new();
    for certificate in intermediates {
        let subject =
            subject(certificate).ok_or(rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if !subjects.insert(subject) {
            return Err(Tangle::Ambiguous.into());
        }
    }
    Ok(())
}

/// Whether an error says more than "signed by somebody else". An authority of the same name as the right one has
/// another key, so its signature does not fit either.
fn is_telling(error: &rustls::Error) -> bool {
    !matches!(
        error,
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)
    )
}

fn reason(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(refusal))) => {
            refusal.to_string()
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "no trusted authority has signed it".into()
        }
        rustls::Error::InvalidCertificate(
            CertificateError::ExpiredContext { .. } | CertificateError::Expired,
        ) => format!("it has expired; the clock here says {}", clock(chrono::Utc::now())),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYetContext { .. } | CertificateError::NotValidYet,
        ) => format!("it is not valid yet; the clock here says {}", clock(chrono::Utc::now())),
        other => other.to_string(),
    }
}

fn advice(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(refusal)))
            if refusal.is::<Refusal>() =>
        {
            "whoever holds that authority's key issues certificates for others: let that cluster connect with its own \
             name, or take it out of trust"
        }
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(tangle)))
            if tangle.is::<Tangle>() =>
        {
            "let the client show its certificate and the authorities between it and the trusted one, each once"
        }
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "connect that cluster with its present authority (ca.crt) if it is a peer"
        }
        rustls::Error::InvalidCertificate(
            CertificateError::ExpiredContext { .. }
            | CertificateError::Expired
            | CertificateError::NotValidYetContext { .. }
            | CertificateError::NotValidYet,
        ) => "have the client's certificate renewed, and compare the clocks",
        _ => "have a client certificate issued for it",
    }
}

impl Refusal {
    fn of(vouches: &Vouches, name: CommonName) -> Self {
        match (vouches, name) {
            (Vouches::Peer(cluster), CommonName::One(name)) => {
                Self::Name { cluster: cluster.to_string(), name: name.chars().take(128).collect() }
            }
            (Vouches::Peer(cluster), CommonName::None) => Self::Nameless { cluster: cluster.to_string() },
            (_, CommonName::Several) | (Vouches::Anyone, _) => Self::Several,
        }
    }
}

impl From<Tangle> for rustls::Error {
    fn from(tangle: Tangle) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(tangle))))
    }
}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

impl ClientCertVerifier for TrustVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.hints
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match self.judge(end_entity, intermediates, now) {
            Ok(()) => Ok(ClientCertVerified::assertion()),
            Err(error) => {
                self.tell(end_entity, &error);
                Err(error)
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
        KeyUsagePurpose,
    };

    use super::*;
    use crate::gateway::TrustedAuthority;

    /// An authority of this name.
    fn authority(name: &str) -> (String, Issuer<'static, KeyPair>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        (params.self_signed(&key).unwrap().pem(), Issuer::new(params, key))
    }

    fn client(name: &str, issuer: &Issuer<'_, KeyPair>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap().der().clone()
    }

    fn trust(authorities: &[(&str, Vouches)]) -> TrustVerifier {
        let authorities = authorities
            .iter()
            .map(|(pem, vouches)| TrustedAuthority { pem: (*pem).into(), vouches: vouches.clone() });
        TrustVerifier::of(&Trust { authorities: authorities.collect() }).unwrap()
    }

    #[test]
    fn a_refusal_names_the_name_the_authoritys_cluster_and_what_to_do() {
        let (alpha, _) = authority("Cilium CA");
        let (beta, beta_issuer) = authority("Cilium CA");
        let peer = Vouches::Peer("beta".parse().unwrap());
        let verifier = trust(&[(&alpha, Vouches::Anyone), (&beta, peer)]);
        assert_eq!(verifier.root_hint_subjects().len(), 1, "one name for both");
        let error =
            |certificate: &CertificateDer<'_>| verifier.judge(certificate, &[], UnixTime::now()).unwrap_err();
        let refused = error(&client("admin-alpha", &beta_issuer));
        let text = reason(&refused);
        assert!(text.contains("cluster beta") && text.contains("\"admin-alpha\""), "{text}");
        assert!(advice(&refused).contains("take it out of trust"));
        let stranger = error(&client("remote-beta", &authority("Cilium CA").1));
        assert!(reason(&stranger).contains("no trusted authority"), "{stranger}");
        assert!(advice(&stranger).contains("ca.crt"));
    }

    /// An authority of this name, signed by another.
    fn signed_authority(name: &str, issuer: &Issuer<'_, KeyPair>) -> Intermediate {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.signed_by(&key, issuer).unwrap().der().clone();
        Intermediate { certificate, issuer: Issuer::new(params, key) }
    }

    struct Intermediate {
        certificate: CertificateDer<'static>,
        issuer: Issuer<'static, KeyPair>,
    }

    /// Peers whose authorities all have the same name; the last one's comes with it.
    fn many_peers(count: usize) -> (TrustVerifier, Issuer<'static, KeyPair>) {
        let all: Vec<_> = (0..count).map(|_| authority("Cilium CA")).collect();
        let peers: Vec<_> =
            (0..count).map(|index| Vouches::Peer(format!("peer-{index}").parse().unwrap())).collect();
        let entries: Vec<_> = all.iter().zip(&peers).map(|((pem, _), peer)| (&**pem, peer.clone())).collect();
        let verifier = trust(&entries);
        (verifier, all.into_iter().next_back().unwrap().1)
    }

    #[test]
    fn a_direct_chain_is_looked_for_among_all_authorities_of_a_name_and_one_through_others_too() {
        let (verifier, root) = many_peers(300);
        let judge = |certificate: &CertificateDer<'_>, chain: &[CertificateDer<'_>]| {
            verifier.judge(certificate, chain, UnixTime::now())
        };
        judge(&client("remote", &root), &[]).unwrap();
        let one = signed_authority("One", &root);
        let two = signed_authority("Two", &one.issuer);
        let three = signed_authority("Cilium CA", &two.issuer);
        let chain = [three.certificate, two.certificate, one.certificate];
        judge(&client("remote", &three.issuer), &chain).unwrap();
    }

    #[test]
    fn a_chain_that_can_be_followed_in_many_ways_is_refused_before_any_signature_is_looked_at() {
        let (verifier, root) = many_peers(2);
        let refused = |certificate: &CertificateDer<'_>, chain: &[CertificateDer<'_>]| {
            let error = verifier.judge(certificate, chain, UnixTime::now()).unwrap_err();
            assert!(advice(&error).contains("each once"), "{error}");
            reason(&error)
        };
        // Good ones, all of them; what is wrong with the chains is their shape alone.
        let good = client("remote", &root);
        let others: Vec<_> =
            (0..4).map(|index| signed_authority(&format!("CA {index}"), &root).certificate).collect();
        verifier.judge(&good, &others[..3], UnixTime::now()).unwrap();
        assert!(refused(&good, &others).contains("4 more certificates"));
        let alike = ["Cilium CA"; 2].map(|name| signed_authority(name, &root).certificate);
        assert!(refused(&good, &alike).contains("the same subject"));
        let unreadable = [CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])];
        let error = verifier.judge(&good, &unreadable, UnixTime::now()).unwrap_err();
        assert_eq!(error, rustls::Error::InvalidCertificate(CertificateError::BadEncoding));
    }

    #[test]
    fn only_what_is_taken_away_counts_as_a_loss() {
        let [(one, _), (two, _)] = ["One", "Two"].map(authority);
        let both = format!("{one}{two}");
        let first = trust(&[(&one, Vouches::Anyone)]);
        let grown = trust(&[(&both, Vouches::Anyone)]).after(&first);
        assert_eq!(grown.losses(), 0);
        let shrunk = trust(&[(&two, Vouches::Anyone)]).after(&grown);
        assert_eq!(shrunk.losses(), 1);
        let less = trust(&[(&two, Vouches::Peer("beta".parse().unwrap()))]).after(&shrunk);
        assert_eq!(less.losses(), 2, "it may vouch for less");
    }
}
