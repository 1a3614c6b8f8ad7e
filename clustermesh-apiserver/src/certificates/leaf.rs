//! The certificates of a cluster: what each must be, and whether the one in its Secret is that.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};
use isthmus_crds::names::{
    ADMIN_CERT_SECRET, AGENT_CERT_SECRET, LOCAL_CERT_SECRET, REMOTE_CERT_SECRET, SERVER_CERT_SECRET,
};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::core::ObjectMeta;

use super::authority::{AuthoritySecret, keys};
use super::{labels, text};
use crate::pki::{Certificate, Client, GATEWAY_NAME, Identity, PkiError, gateway_names, usable_pair};

/// Set by cert-manager on what it issues.
const CERT_MANAGER: &str = "cert-manager.io/certificate-name";

/// One of a cluster's certificates.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    /// The Secret that it lies in.
    pub(super) secret: &'static str,
    common_name: String,
    /// The names that a server's certificate must be valid for; none for a client's.
    names: Option<Vec<String>>,
}

/// What is to be done about a certificate.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    /// It is right. It is looked at again then, if time can change anything about it.
    Keep(Option<DateTime<Utc>>),
    /// It is right, but its Secret does not trust what it should.
    Trust(Option<DateTime<Utc>>),
    /// It is to be issued anew.
    Issue(Reason),
    /// It is not ours to issue.
    Foreign(String),
}

/// Why a certificate is issued.
#[derive(Debug, PartialEq)]
pub(super) enum Reason {
    Missing,
    Damaged(String),
    CommonName(String),
    MissingName(String),
    Usage,
    Authority(String),
    Early(DateTime<Utc>),
    Due(DateTime<Utc>),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("there was none"),
            Self::Damaged(what) => write!(f, "the one before could not be used: {what}"),
            Self::CommonName(name) => write!(f, "the one before had the common name {name:?}"),
            Self::MissingName(name) => write!(f, "the one before was not valid for {name}"),
            Self::Usage => f.write_str("the one before was not for this usage"),
            Self::Authority(issuer) => {
                write!(f, "the one before was issued by an authority that is not the active one ({issuer})")
            }
            Self::Early(from) => {
                write!(
                    f,
                    "the one before is valid only from {from} on: the clock was ahead when it was issued"
                )
            }
            Self::Due(until) => {
                write!(f, "two thirds of its life are over; the one before is valid until {until}")
            }
        }
    }
}

impl Leaf {
    /// All certificates of a cluster; the gateway is also valid for `more` names.
    pub(super) fn all(cluster: &str, namespace: &str, more: &[String]) -> Vec<Self> {
        let client =
            |secret, client: Client<'_>| Self { secret, common_name: client.common_name(), names: None };
        vec![
            Self {
                secret: SERVER_CERT_SECRET,
                common_name: GATEWAY_NAME.to_owned(),
                names: Some(gateway_names(namespace, more)),
            },
            client(REMOTE_CERT_SECRET, Client::Remote(cluster)),
            client(ADMIN_CERT_SECRET, Client::Admin(cluster)),
            client(LOCAL_CERT_SECRET, Client::Local(cluster)),
            client(AGENT_CERT_SECRET, Client::Agent(cluster)),
        ]
    }

    /// Whether what is in the Secret is what it must be.
    pub(super) fn judge(
        &self,
        secret: Option<&Secret>,
        authority: &AuthoritySecret,
        validity: Duration,
        now: DateTime<Utc>,
    ) -> Verdict {
        let Some(secret) = secret else { return Verdict::Issue(Reason::Missing) };
        let annotations = secret.metadata.annotations.as_ref();
        if let Some(name) = annotations.and_then(|annotations| annotations.get(CERT_MANAGER)) {
            return Verdict::Foreign(format!(
                "cert-manager keeps it (Certificate {name}): start with --certificates=external, or delete that"
            ));
        }
        let certificate = match pair(secret) {
            Ok(certificate) => certificate,
            Err(what) => return Verdict::Issue(Reason::Damaged(what)),
        };
        if let Some(reason) = self.wrong(&certificate, authority) {
            return Verdict::Issue(reason);
        }
        if now < certificate.not_before {
            return Verdict::Issue(Reason::Early(certificate.not_before));
        }
        let due = due(&certificate);
        // One that lives as long as its authority cannot be had for longer.
        let gains = (now + validity).min(authority.certificate.not_after) > certificate.not_after;
        if now >= due && gains {
            return Verdict::Issue(Reason::Due(certificate.not_after));
        }
        let due = (now < due).then_some(due);
        if text(secret, "ca.crt").is_ok_and(|bundle| bundle == authority.bundle()) {
            Verdict::Keep(due)
        } else {
            Verdict::Trust(due)
        }
    }

    fn wrong(&self, certificate: &Certificate, authority: &AuthoritySecret) -> Option<Reason> {
        if certificate.common_name != self.common_name {
            return Some(Reason::CommonName(certificate.common_name.clone()));
        }
        let names = self.names.iter().flatten();
        let has = |name: &str| certificate.names.iter().any(|has| has.eq_ignore_ascii_case(name));
        if let Some(name) = names.into_iter().find(|name| !has(name)) {
            return Some(Reason::MissingName(name.clone()));
        }
        if !(if self.names.is_some() { certificate.server } else { certificate.client }) {
            return Some(Reason::Usage);
        }
        let signed = certificate.is_signed_by(&authority.certificate);
        (!signed).then(|| Reason::Authority(certificate.issuer.clone()))
    }

    /// Issues it.
    pub(super) fn issue(
        &self,
        authority: &AuthoritySecret,
        validity: Duration,
    ) -> Result<Identity, PkiError> {
        match &self.names {
            Some(names) => authority.active.server(&self.common_name, names, validity),
            None => authority.active.user(&self.common_name, &[], validity),
        }
    }

    /// The Secret with this identity, or with the one it has, and with what it should trust.
    pub(super) fn secret(
        &self,
        before: Option<&Secret>,
        identity: Option<&Identity>,
        bundle: &str,
    ) -> Secret {
        let mut secret = before.cloned().unwrap_or_else(|| Secret {
            metadata: ObjectMeta {
                name: Some(self.secret.to_owned()),
                labels: Some(labels()),
                ..ObjectMeta::default()
            },
            type_: Some("kubernetes.io/tls".to_owned()),
            ..Secret::default()
        });
        let data: &mut BTreeMap<String, ByteString> = secret.data.get_or_insert_default();
        let mut put = |key: &str, text: &str| {
            data.insert(key.to_owned(), ByteString(text.as_bytes().to_vec()));
        };
        if let Some(identity) = identity {
            put("tls.crt", &identity.certificate);
            put("tls.key", &identity.key);
        }
        put("ca.crt", bundle);
        secret
    }
}

/// The certificate of a Secret, whose key belongs to it.
pub(super) fn pair(secret: &Secret) -> Result<Certificate, String> {
    let (certificate, key) = keys(secret);
    usable_pair(text(secret, certificate)?, text(secret, key)?).map_err(|error| error.to_string())
}

/// At two thirds of its life, or a little before: how much follows from the certificate, so that it stays the same, and
/// clusters that were set up together do not renew together for ever.
fn due(certificate: &Certificate) -> DateTime<Utc> {
    let life = certificate.not_after - certificate.not_before;
    // The signature's last bytes: as good as random.
    let last =
        certificate.der().iter().rev().take(2).fold(0i32, |number, byte| number << 8 | i32::from(*byte));
    certificate.not_before + life * 2 / 3 - life / 20 * last / 0x1_0000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Authority;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const LIFE: Duration = Duration::from_secs(90 * 24 * 60 * 60);

    fn authority() -> AuthoritySecret {
        AuthoritySecret::parse(&AuthoritySecret::generate("alpha").unwrap()).ok().unwrap()
    }

    fn issued(leaf: &Leaf, authority: &AuthoritySecret) -> Secret {
        let identity = leaf.issue(authority, LIFE).unwrap();
        leaf.secret(None, Some(&identity), &authority.bundle())
    }

    fn reason(verdict: Verdict) -> String {
        match verdict {
            Verdict::Issue(reason) => reason.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_issued_is_kept_and_renewed_at_two_thirds_of_its_life() {
        let authority = authority();
        for leaf in Leaf::all("alpha", "isthmus-system", &["mesh.example.org".to_owned()]) {
            let secret = issued(&leaf, &authority);
            let now = Utc::now();
            let Verdict::Keep(Some(due)) = leaf.judge(Some(&secret), &authority, LIFE, now) else {
                panic!("{} is kept", leaf.secret)
            };
            let days = (due - now).num_days();
            assert!((54..=60).contains(&days), "{}: after {days} days", leaf.secret);
            assert!(matches!(
                leaf.judge(Some(&secret), &authority, LIFE, due),
                Verdict::Issue(Reason::Due(_))
            ));
        }
    }

    #[test]
    fn whatever_is_wrong_with_a_certificate_it_is_issued_anew_for_that_reason() {
        let authority = authority();
        let leaves = Leaf::all("alpha", "isthmus-system", &[]);
        let (server, remote) = (&leaves[0], &leaves[1]);
        let now = Utc::now();
        let judge = |leaf: &Leaf, secret: Option<&Secret>| reason(leaf.judge(secret, &authority, LIFE, now));
        assert!(judge(server, None).contains("there was none"));
        let mut damaged = issued(server, &authority);
        damaged.data.as_mut().unwrap().insert("tls.crt".to_owned(), ByteString(b"x".to_vec()));
        assert!(judge(server, Some(&damaged)).contains("tls.crt"));
        let mut half = issued(server, &authority);
        half.data.as_mut().unwrap().remove("tls.key");
        assert!(judge(server, Some(&half)).contains("tls.key"));
        let renamed = issued(&Leaf::all("beta", "isthmus-system", &[])[1], &authority);
        assert!(judge(remote, Some(&renamed)).contains("remote-beta"));
        let wider = &Leaf::all("alpha", "isthmus-system", &["192.0.2.7".to_owned()])[0];
        assert!(judge(wider, Some(&issued(server, &authority))).contains("192.0.2.7"));
        let elsewhere = issued(server, &self::authority());
        assert!(judge(server, Some(&elsewhere)).contains("not the active one"));
        let wrong = Leaf { common_name: GATEWAY_NAME.to_owned(), ..remote.clone() };
        let wrong = Leaf { secret: SERVER_CERT_SECRET, ..wrong };
        let no_server = issued(&wrong, &authority);
        let nameless = Leaf { names: Some(Vec::new()), ..server.clone() };
        assert!(judge(&nameless, Some(&no_server)).contains("usage"));
    }

    #[test]
    fn what_was_issued_by_a_clock_that_was_ahead_is_issued_anew() {
        let authority = authority();
        let leaf = &Leaf::all("alpha", "isthmus-system", &[])[0];
        let secret = issued(leaf, &authority);
        let earlier = Utc::now() - DAY;
        let verdict = leaf.judge(Some(&secret), &authority, LIFE, earlier);
        assert!(matches!(&verdict, Verdict::Issue(Reason::Early(from)) if *from > earlier), "{verdict:?}");
        assert!(reason(verdict).contains("clock"));
    }

    #[test]
    fn a_secret_that_trusts_too_little_keeps_its_certificate() {
        let authority = authority();
        let leaf = &Leaf::all("alpha", "isthmus-system", &[])[0];
        let secret = issued(leaf, &authority);
        let next = AuthoritySecret::parse(&authority.with_next("alpha").unwrap()).ok().unwrap();
        assert!(matches!(leaf.judge(Some(&secret), &next, LIFE, Utc::now()), Verdict::Trust(Some(_))));
        let trusting = leaf.secret(Some(&secret), None, &next.bundle());
        assert!(matches!(leaf.judge(Some(&trusting), &next, LIFE, Utc::now()), Verdict::Keep(Some(_))));
        assert_eq!(pair(&trusting), pair(&secret));
    }

    #[test]
    fn what_cert_manager_keeps_is_left_alone() {
        let authority = authority();
        let leaf = &Leaf::all("alpha", "isthmus-system", &[])[0];
        let mut secret = issued(leaf, &authority);
        secret.metadata.annotations = Some(BTreeMap::from([(CERT_MANAGER.to_owned(), "server".to_owned())]));
        let verdict = leaf.judge(Some(&secret), &authority, LIFE, Utc::now());
        assert!(matches!(verdict, Verdict::Foreign(what) if what.contains("--certificates=external")));
    }

    #[test]
    fn close_to_its_authority_s_end_a_certificate_is_not_issued_again_and_again() {
        let identity = Authority::generate("old", 30 * DAY).unwrap().identity();
        let data = [("tls.crt", identity.certificate), ("tls.key", identity.key)];
        let old = Secret {
            data: Some(data.into_iter().map(|(k, v)| (k.to_owned(), ByteString(v.into_bytes()))).collect()),
            ..Secret::default()
        };
        let authority = AuthoritySecret::parse(&old).ok().unwrap();
        let leaf = &Leaf::all("alpha", "isthmus-system", &[])[1];
        let secret = issued(leaf, &authority);
        let certificate = pair(&secret).unwrap();
        assert!(certificate.not_after <= authority.certificate.not_after);
        let late = Utc::now() + 29 * DAY;
        assert_eq!(leaf.judge(Some(&secret), &authority, LIFE, late), Verdict::Keep(None));

        // One that ends a little before its authority is renewed once more, not left to expire.
        let life = 29 * DAY;
        let identity = leaf.issue(&authority, life).unwrap();
        let secret = leaf.secret(None, Some(&identity), &authority.bundle());
        let verdict = leaf.judge(Some(&secret), &authority, life, Utc::now() + 28 * DAY);
        assert!(matches!(verdict, Verdict::Issue(Reason::Due(_))), "{verdict:?}");
    }
}
