//! How long the certificates of a cluster are valid, as its Kubernetes API has them: the authority that it publishes, those
//! that it shows, and those that its peers are believed by.

mod kept;

use chrono::{DateTime, TimeDelta, Utc};
use isthmus_crds::names;
use k8s_openapi::ByteString;
use serde::{Serialize, Serializer};

pub(crate) use self::kept::Kept;
use self::kept::{Keeper, Public};
use super::certificates::{self, Certificate, Validity, utc};
use super::checks::Level;
use super::error::Refusal;
use super::facts::Identity;
use crate::output::age;

/// An authority that ends within this time is to be looked at, however long it lives: peers have to be told of the next one
/// before.
const SOON: TimeDelta = TimeDelta::days(14);

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// It issues the cluster's others.
    Authority,
    /// Shown to peers and agents.
    Gateway,
    /// Shown to peers' gateways.
    Relay,
    /// Shown to the own gateway.
    NodeAgents,
    /// The same, where Cilium's agents run.
    CiliumAgents,
    /// For a person with `etcdctl`.
    Administrator,
    /// A peer is believed by it.
    PeerAuthority,
    /// Issued by a peer, and shown to that one alone.
    PeerIdentity,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Self::Authority => "authority",
            Self::Gateway => "gateway",
            Self::Relay => "relay",
            Self::NodeAgents => "node-agents",
            Self::CiliumAgents => "cilium-agents",
            Self::Administrator => "administrator",
            Self::PeerAuthority => "peer-authority",
            Self::PeerIdentity => "peer-identity",
        }
    }
}

/// Where a certificate is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    /// Its time has not come.
    NotYetValid,
    /// Nothing is to be done.
    Valid,
    /// It should have been renewed by now.
    Overdue,
    /// Its time is over.
    Expired,
}

impl Stage {
    fn of(role: Role, certificate: &Certificate, now: DateTime<Utc>) -> Self {
        let left = certificate.not_after - now;
        let life = certificate.not_after - certificate.not_before;
        match certificate.at(now) {
            Validity::NotYet => Self::NotYetValid,
            Validity::Over => Self::Expired,
            // Whatever renews certificates does so at two thirds of their life. It is given a thirtieth to get it done.
            Validity::Valid if left < life / 3 - life / 30 => Self::Overdue,
            Validity::Valid if left < SOON && matches!(role, Role::Authority | Role::PeerAuthority) => {
                Self::Overdue
            }
            Validity::Valid => Self::Valid,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::NotYetValid => "not-yet-valid",
            Self::Valid => "valid",
            Self::Overdue => "overdue",
            Self::Expired => "expired",
        }
    }
}

/// A certificate, as it is printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CertificateStatus {
    role: Role,
    /// The cluster that it is about, if that is a peer.
    peer: Option<String>,
    /// Its common name.
    subject: String,
    /// Kind and name of the object that it was read from.
    kept_in: String,
    #[serde(serialize_with = "rfc3339")]
    not_before: DateTime<Utc>,
    #[serde(serialize_with = "rfc3339")]
    not_after: DateTime<Utc>,
    /// Until its end, for people: `59d`, or `3h ago`.
    left: String,
    /// The same in seconds; less than none if it has expired.
    left_seconds: i64,
    stage: Stage,
}

impl CertificateStatus {
    fn new(
        role: Role,
        peer: Option<&str>,
        kept_in: String,
        certificate: &Certificate,
        now: DateTime<Utc>,
    ) -> Self {
        let left = certificate.not_after - now;
        Self {
            role,
            peer: peer.map(str::to_owned),
            subject: certificate.subject.clone(),
            kept_in,
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            left: span(left),
            left_seconds: left.num_seconds(),
            stage: Stage::of(role, certificate, now),
        }
    }

    /// Its cells in a table below [`HEADER`].
    pub(crate) fn row(&self, context: &str) -> Vec<String> {
        vec![
            context.to_owned(),
            self.role.word().to_owned(),
            self.peer.clone().unwrap_or_else(|| "-".to_owned()),
            text(self.not_after),
            self.left.clone(),
            self.stage.word().to_owned(),
            self.kept_in.clone(),
        ]
    }
}

/// The columns of a table of certificates.
pub(crate) const HEADER: [&str; 7] =
    ["CONTEXT", "CERTIFICATE", "OF PEER", "EXPIRES", "LEFT", "STAGE", "KEPT IN"];

/// Those that people are shown: the cluster's own, what is to be looked at, and of peers' the one that ends first. A large mesh has
/// thousands of them.
pub(crate) fn worth_showing(all: &[CertificateStatus]) -> impl Iterator<Item = &CertificateStatus> {
    let first = all.iter().filter(|one| one.peer.is_some()).min_by_key(|one| one.not_after);
    all.iter().filter(move |one| {
        one.peer.is_none()
            || one.stage != Stage::Valid
            || first.is_some_and(|first| std::ptr::eq(first, *one))
    })
}

/// The cluster that certificates are judged for.
pub(crate) struct Judge<'a> {
    pub(crate) context: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) now: DateTime<Utc>,
    /// What it publishes, if that is known.
    pub(crate) published: Option<&'a Identity>,
}

/// Something about certificates that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Concern {
    pub(crate) level: Level,
    pub(crate) problem: String,
    pub(crate) hint: String,
}

impl Judge<'_> {
    /// All certificates, and what is wrong with them.
    pub(crate) fn judge(&self, kept: &Kept) -> (Vec<CertificateStatus>, Vec<Concern>) {
        let (mut all, mut concerns) = (Vec::new(), Vec::new());
        if let Some(identity) = self.published {
            let kept_in = format!("ConfigMap {}", names::CLUSTER_INFO);
            let status = |one| CertificateStatus::new(Role::Authority, None, kept_in.clone(), one, self.now);
            all.extend(identity.authorities.iter().map(status));
            concerns.extend(self.authority(&identity.authorities));
        }
        for (role, secret) in &kept.own {
            match self.first(secret) {
                Ok(certificate) => {
                    all.push(CertificateStatus::new(*role, None, secret.kept_in(), &certificate, self.now));
                    concerns.extend(self.own(*role, secret, &certificate));
                }
                Err(concern) => concerns.push(concern),
            }
        }
        concerns.extend(self.missing(kept));
        for secret in &kept.peers {
            self.peer(secret, &mut all, &mut concerns);
        }
        concerns.extend(self.refusals(&kept.refused));
        (all, concerns)
    }

    /// Where none is in a Secret they are kept in files. Where some are, those that an apiserver cannot do without are missed.
    fn missing(&self, kept: &Kept) -> Vec<Concern> {
        let Some((_, other)) = kept.own.first() else { return Vec::new() };
        let kubectl = self.kubectl();
        let needed = |name: &&&str| [names::SERVER_CERT_SECRET, names::REMOTE_CERT_SECRET].contains(*name);
        let concern = |name: &&str| Concern {
            level: Level::Error,
            problem: format!("there is no Secret {}/{name}, although there are others", self.namespace),
            hint: match other.keeper() {
                Keeper::CertManager(_) => format!("{kubectl} get certificates"),
                Keeper::Apiserver => self.logs(),
                Keeper::Somebody => "have it issued where the others come from".to_owned(),
            },
        };
        kept.missing.iter().filter(needed).map(concern).collect()
    }

    /// The certificate of a Secret's key: of a chain, the one that the key belongs to.
    fn first(&self, secret: &Public) -> Result<Certificate, Concern> {
        let pem = secret.data.certificate.as_ref().map(|pem| pem.0.as_slice()).unwrap_or_default();
        let read = certificates::parse(pem).map(|mut all| all.swap_remove(0));
        read.map_err(|why| Concern {
            level: Level::Error,
            problem: format!("Secret {}/{}: tls.crt cannot be used: {why}", self.namespace, secret.name()),
            hint: self.renewal(secret),
        })
    }

    /// One authority that is valid is enough: while they are exchanged there are two.
    fn authority(&self, authorities: &[Certificate]) -> Option<Concern> {
        let last = authorities.iter().max_by_key(|one| one.not_after)?;
        let rotate = format!("isthmus rotate-ca --context {}", self.context);
        let (problem, hint) = match Stage::of(Role::Authority, last, self.now) {
            Stage::Valid => return None,
            Stage::Expired => (format!("the CA ({last}) has expired: it is {} here", utc(self.now)), rotate),
            Stage::NotYetValid => (
                format!("the CA ({last}) is not valid yet: it is {} here", utc(self.now)),
                "compare the clocks".to_owned(),
            ),
            Stage::Overdue => (
                format!(
                    "the CA ends on {}, in {}, and does not renew itself",
                    utc(last.not_after),
                    self.left(last)
                ),
                format!("{rotate}, with --destination-context for each cluster that is connected to it"),
            ),
        };
        Some(self.concern(Role::Authority, last, problem, hint))
    }

    fn own(&self, role: Role, secret: &Public, certificate: &Certificate) -> Option<Concern> {
        let what = format!("the certificate of {} ({certificate}), in Secret {}", whose(role), secret.name());
        let authority_ends =
            self.published.and_then(|of| of.authorities.iter().map(|authority| authority.not_after).max());
        let (problem, hint) = match Stage::of(role, certificate, self.now) {
            Stage::Valid => return None,
            Stage::Expired => {
                (format!("{what}, has expired: it is {} here", utc(self.now)), self.renewal(secret))
            }
            Stage::NotYetValid => (
                format!("{what}, is not valid yet: it is {} here", utc(self.now)),
                "compare the clocks".to_owned(),
            ),
            // No certificate outlives its authority.
            Stage::Overdue if authority_ends.is_some_and(|end| certificate.not_after >= end) => (
                format!("{what}, ends with the CA, in {}", self.left(certificate)),
                format!("isthmus rotate-ca --context {}", self.context),
            ),
            Stage::Overdue => (
                format!(
                    "{what}, ends in {} and has not been renewed, although two thirds of its life are over",
                    self.left(certificate)
                ),
                self.renewal(secret),
            ),
        };
        Some(self.concern(role, certificate, problem, hint))
    }

    /// What to do so that a certificate of this cluster is renewed.
    fn renewal(&self, secret: &Public) -> String {
        let kubectl = self.kubectl();
        match secret.keeper() {
            Keeper::CertManager(name) => format!("{kubectl} describe certificate {name}"),
            Keeper::Apiserver => format!(
                "{} tells why; `{kubectl} delete secret {}` has it issued anew",
                self.logs(),
                secret.name()
            ),
            Keeper::Somebody => "renew it where it comes from: Isthmus has not issued it".to_owned(),
        }
    }

    fn kubectl(&self) -> String {
        format!("kubectl --context {} -n {}", self.context, self.namespace)
    }

    fn logs(&self) -> String {
        format!("`{} logs -l app.kubernetes.io/name={} --prefix`", self.kubectl(), names::APISERVER)
    }

    fn peer(&self, secret: &Public, all: &mut Vec<CertificateStatus>, concerns: &mut Vec<Concern>) {
        let peer = secret.peer();
        let status = |role, one: &Certificate| {
            CertificateStatus::new(role, Some(&peer), secret.kept_in(), one, self.now)
        };
        // What cannot be read is told by the peer's ClusterPeer, with what else is wrong with the Secret.
        let read = |pem: &Option<ByteString>| {
            pem.as_ref().and_then(|pem| certificates::parse(&pem.0).ok()).unwrap_or_default()
        };
        let trusted = read(&secret.data.trusted);
        all.extend(trusted.iter().map(|one| status(Role::PeerAuthority, one)));
        if let Some(last) = trusted.iter().max_by_key(|one| one.not_after) {
            let what =
                format!("the CA that peer {peer} is believed by ({last}), in Secret {}", secret.name());
            let hint = format!(
                "isthmus rotate-ca with the context of {peer}, and --destination-context {} among others; if it has another CA \
                 already, isthmus connect tells it",
                self.context
            );
            concerns.extend(self.of_peer(Role::PeerAuthority, last, &what, hint));
        }
        if let Some(own) = read(&secret.data.certificate).first() {
            all.push(status(Role::PeerIdentity, own));
            let what =
                format!("the certificate that is shown to peer {peer} ({own}), in Secret {}", secret.name());
            let hint = format!(
                "have {peer}, whose CA issued it, issue another one, and put that into the Secret with its key"
            );
            concerns.extend(self.of_peer(Role::PeerIdentity, own, &what, hint));
        }
    }

    fn of_peer(&self, role: Role, certificate: &Certificate, what: &str, hint: String) -> Option<Concern> {
        let (problem, hint) = match Stage::of(role, certificate, self.now) {
            Stage::Valid => return None,
            Stage::Expired => (format!("{what}, has expired: it is {} here", utc(self.now)), hint),
            Stage::NotYetValid => (
                format!("{what}, is not valid yet: it is {} here", utc(self.now)),
                "compare the clocks".to_owned(),
            ),
            Stage::Overdue => (format!("{what}, ends in {}", self.left(certificate)), hint),
        };
        Some(self.concern(role, certificate, problem, hint))
    }

    fn concern(&self, role: Role, certificate: &Certificate, problem: String, hint: String) -> Concern {
        let level = match Stage::of(role, certificate, self.now) {
            Stage::Valid | Stage::Overdue => Level::Warning,
            Stage::NotYetValid | Stage::Expired => Level::Error,
        };
        Concern { level, problem, hint }
    }

    fn left(&self, certificate: &Certificate) -> String {
        span(certificate.not_after - self.now)
    }

    /// Who may not look at Secrets is told so once, and sees the rest. A cluster that does not answer says so to every other
    /// question.
    fn refusals(&self, refused: &[Refusal]) -> Vec<Concern> {
        let forbidden = |refusal: &&Refusal| refusal.status().is_some_and(|status| status.code == 403);
        let missing: Vec<&Refusal> = refused.iter().filter(forbidden).collect();
        let rights = missing.first().map(|first| {
            let more = match missing.len() - 1 {
                0 => String::new(),
                more => format!(" (nor {more} more)"),
            };
            Concern {
                level: Level::Warning,
                problem: format!("not all certificates are looked at: {}{more}", first.problem()),
                hint: format!(
                    "ask for the right to get and list secrets in namespace {}; the apiserver's metric \
                     isthmus_certificate_expiry_timestamp_seconds tells the same",
                    self.namespace
                ),
            }
        });
        let others = refused.iter().filter(|refusal| !forbidden(refusal));
        let others = others.map(|refusal| Concern {
            level: Level::Error,
            problem: refusal.problem(),
            hint: refusal.advice(),
        });
        rights.into_iter().chain(others).collect()
    }
}

fn whose(role: Role) -> &'static str {
    match role {
        Role::Gateway => "the gateway",
        Role::Relay => "the relay",
        Role::NodeAgents => "the node-agents",
        Role::CiliumAgents => "Cilium's agents",
        Role::Administrator => "the administrator",
        Role::Authority | Role::PeerAuthority => "the authority",
        Role::PeerIdentity => "the peer",
    }
}

/// Time that is left, or has gone since.
fn span(left: TimeDelta) -> String {
    let seconds = left.num_seconds();
    match seconds {
        0.. => age(Some(seconds as f64)),
        _ => format!("{} ago", age(Some(-seconds as f64))),
    }
}

fn text(moment: DateTime<Utc>) -> String {
    moment.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

fn rfc3339<S: Serializer>(moment: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&text(*moment))
}

#[cfg(test)]
mod tests {
    use isthmus_crds::{CaBundle, ClusterInfo, MANAGED_BY, MANAGED_BY_LABEL};
    use isthmus_wire::MaxConnectedClusters;
    use serde_json::json;

    use super::kept::CERT_MANAGER;
    use super::*;

    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n";

    /// One that may issue others, began so many days ago and ends in so many.
    fn pem(name: &str, began: i64, ends: i64) -> String {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let moment = |days: i64| (std::time::SystemTime::from(Utc::now() + TimeDelta::days(days))).into();
        (params.not_before, params.not_after) = (moment(-began), moment(ends));
        let key = rcgen::KeyPair::generate().expect("a key");
        params.self_signed(&key).expect("a certificate").pem()
    }

    fn secret(object: serde_json::Value) -> Public {
        serde_json::from_value(object).expect("a Secret")
    }

    fn of_peer(ca: &str) -> Public {
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        secret(json!({
            "metadata": {"name": "peer-beta"}, "type": "isthmus.io/peer",
            "data": {"cluster-name": bytes("beta"), "ca.crt": bytes(ca), "endpoints": bytes("https://192.0.2.1:2379")},
        }))
    }

    fn own(name: &str, pem: &str, metadata: serde_json::Value) -> Public {
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let mut object = json!({
            "metadata": metadata, "type": "kubernetes.io/tls",
            "data": {"tls.crt": bytes(pem), "tls.key": bytes(KEY), "ca.crt": bytes(pem)},
        });
        object["metadata"]["name"] = json!(name);
        secret(object)
    }

    fn judged(kept: &Kept) -> (Vec<CertificateStatus>, Vec<Concern>) {
        let judge =
            Judge { context: "kind-alpha", namespace: "isthmus-system", now: Utc::now(), published: None };
        judge.judge(kept)
    }

    fn gateway(began: i64, ends: i64, metadata: serde_json::Value) -> Kept {
        let secret =
            own(names::SERVER_CERT_SECRET, &pem("clustermesh-apiserver.cilium.io", began, ends), metadata);
        Kept { own: vec![(Role::Gateway, secret)], ..Kept::default() }
    }

    #[test]
    fn a_certificate_is_looked_at_when_it_should_have_been_renewed() {
        for (began, ends, stage) in [
            (0, 90, Stage::Valid),
            (61, 29, Stage::Valid),
            (64, 26, Stage::Overdue),
            (91, -1, Stage::Expired),
            (-1, 90, Stage::NotYetValid),
        ] {
            let (all, concerns) = judged(&gateway(began, ends, json!({})));
            assert_eq!(all[0].stage, stage, "{all:?}");
            let level = match stage {
                Stage::Valid => None,
                Stage::Overdue => Some(Level::Warning),
                Stage::Expired | Stage::NotYetValid => Some(Level::Error),
            };
            assert_eq!(concerns.first().map(|concern| concern.level), level, "{concerns:?}");
        }
        let (all, _) = judged(&gateway(91, -1, json!({})));
        assert_eq!((all[0].left.as_str(), all[0].left_seconds < 0), ("24h ago", true));
    }

    #[test]
    fn what_to_do_is_said_by_who_renews_it() {
        let ours = json!({"labels": {MANAGED_BY_LABEL: MANAGED_BY}});
        let theirs = json!({"annotations": {CERT_MANAGER: "gateway"}});
        for (metadata, says) in [
            (
                ours,
                "kubectl --context kind-alpha -n isthmus-system delete secret clustermesh-apiserver-server-cert",
            ),
            (theirs, "kubectl --context kind-alpha -n isthmus-system describe certificate gateway"),
            (json!({}), "where it comes from"),
        ] {
            let (_, concerns) = judged(&gateway(64, 26, metadata));
            assert!(concerns[0].hint.contains(says), "{concerns:?}");
        }
    }

    #[test]
    fn an_authority_ends_soon_enough_for_people_and_one_that_is_valid_is_enough() {
        let short = pem("CA of beta", 2, 9);
        let (all, concerns) = judged(&Kept { peers: vec![of_peer(&short)], ..Kept::default() });
        assert_eq!((all[0].role, all[0].peer.as_deref()), (Role::PeerAuthority, Some("beta")));
        assert_eq!((all[0].stage, concerns[0].level), (Stage::Overdue, Level::Warning), "{concerns:?}");
        assert!(concerns[0].hint.contains("--destination-context kind-alpha"), "{concerns:?}");

        let rotated = format!("{}{}", pem("CA of beta", 400, -1), pem("CA of beta", 1, 400));
        let (all, concerns) = judged(&Kept { peers: vec![of_peer(&rotated)], ..Kept::default() });
        assert_eq!((all[0].stage, all[1].stage), (Stage::Expired, Stage::Valid));
        assert_eq!(concerns, [], "the next one is there");
        assert_eq!(worth_showing(&all).count(), 1, "{all:?}");
    }

    #[test]
    fn what_ends_with_its_authority_cannot_be_renewed_before_that_is() {
        let ca = pem("CA of alpha", 300, 26);
        let info = ClusterInfo {
            cluster: "alpha".parse().expect("a name"),
            id: 1.try_into().expect("an id"),
            mesh: MaxConnectedClusters::C255,
            version: "0.1.0".into(),
            ca: CaBundle::parse(&ca).expect("a bundle"),
            server_name: "alpha.mesh.cilium.io".into(),
        };
        let authorities = certificates::parse(ca.as_bytes()).expect("a certificate");
        let published = Identity { info, authorities };
        let judge = Judge {
            context: "kind-alpha",
            namespace: "isthmus-system",
            now: Utc::now(),
            published: Some(&published),
        };
        let (all, concerns) =
            judge.judge(&gateway(64, 26, json!({"labels": {MANAGED_BY_LABEL: MANAGED_BY}})));
        assert_eq!(all.len(), 2);
        assert!(
            concerns.iter().all(|concern| concern.hint.starts_with("isthmus rotate-ca --context kind-alpha"))
        );
        assert!(concerns[1].problem.contains("ends with the CA"), "{concerns:?}");
    }

    #[test]
    fn keys_are_not_even_taken_over() {
        let kept = gateway(1, 89, json!({}));
        let (all, concerns) = judged(&kept);
        let shown = format!("{kept:?}{concerns:?}{}", serde_json::to_string(&all).expect("JSON"));
        for secret in ["c2VjcmV0", "PRIVATE", "tls.key"] {
            assert!(!shown.contains(secret), "{shown}");
        }
        let bytes: Vec<String> = KEY.bytes().map(|byte| byte.to_string()).collect();
        assert!(!shown.contains(&bytes.join(", ")), "{shown}");
    }

    #[test]
    fn a_certificate_that_cannot_be_read_or_is_missing_is_an_error() {
        let kept = Kept {
            own: vec![(Role::Gateway, own(names::SERVER_CERT_SECRET, KEY, json!({})))],
            missing: vec![names::REMOTE_CERT_SECRET, names::LOCAL_CERT_SECRET],
            ..Kept::default()
        };
        let (all, concerns) = judged(&kept);
        assert_eq!(all, []);
        let problems: Vec<_> = concerns.iter().map(|concern| concern.problem.as_str()).collect();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("server-cert: tls.crt cannot be used"), "{problems:?}");
        assert!(
            problems[1].contains("no Secret isthmus-system/clustermesh-apiserver-remote-cert"),
            "{problems:?}"
        );
        assert_eq!(judged(&Kept { missing: vec![names::SERVER_CERT_SECRET], ..Kept::default() }).1, []);
    }
}
