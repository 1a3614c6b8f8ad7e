//! The cluster's authority as it lies in its Secret.

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_crds::names::{CA_SECRET, CA_SECRET_TYPE, FORMER_CERTIFICATE_KEY as FORMER};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::core::ObjectMeta;

use super::rotation::{
    FINISHING, MESSAGE_ANNOTATION, REQUEST_ANNOTATION, Request, Rotation, STATE_ANNOTATION,
};
use super::{labels, text};
use crate::pki::{Authority, Certificate, PkiError};

/// How long an authority is valid: 10 years.
pub(super) const AUTHORITY_VALIDITY: Duration = Duration::from_secs(3650 * 24 * 60 * 60);

/// The Secret `isthmus-ca`, understood.
pub(super) struct AuthoritySecret {
    secret: Secret,
    /// What issues.
    pub(super) active: Authority,
    /// Its certificate, read.
    pub(super) certificate: Certificate,
    /// Everything that is trusted, the active one first.
    trusted: Vec<Certificate>,
    next: Option<Authority>,
    /// Which one the active one has taken the place of, until it is trusted no more.
    former: Option<Certificate>,
    /// Where its rotation stands.
    pub(super) rotation: Rotation,
    /// What is wanted of it; in words if that cannot be understood.
    pub(super) request: Result<Option<Request>, String>,
}

impl AuthoritySecret {
    /// The Secret of a new authority for `cluster`.
    pub(super) fn generate(cluster: &str) -> Result<Secret, PkiError> {
        let new = authority(cluster)?.identity();
        Ok(Secret {
            metadata: ObjectMeta {
                name: Some(CA_SECRET.to_owned()),
                labels: Some(labels()),
                ..ObjectMeta::default()
            },
            type_: Some(CA_SECRET_TYPE.to_owned()),
            data: Some(BTreeMap::from([
                ("ca.crt".to_owned(), bytes(&new.certificate)),
                ("tls.crt".to_owned(), bytes(&new.certificate)),
                ("tls.key".to_owned(), bytes(&new.key)),
            ])),
            ..Secret::default()
        })
    }

    /// Beside our own form that of Cilium (`ca.crt`, `ca.key`) is taken, so that clusters can share one authority.
    pub(super) fn parse(secret: &Secret) -> Result<Self, String> {
        let has = |key: &str| has(secret, key);
        let pair = keys(secret);
        let read = |(certificate, key)| -> Result<Authority, String> {
            Authority::from_pem(text(secret, certificate)?, text(secret, key)?)
                .map_err(|error| error.to_string())
        };
        let active = read(pair)?;
        let certificate = Certificate::first(active.certificate()).map_err(|error| error.to_string())?;
        let mut trusted = vec![certificate.clone()];
        if has("ca.crt") {
            let bundle = Certificate::all(text(secret, "ca.crt")?);
            trusted.extend(bundle.map_err(|error| format!("ca.crt: {error}"))?);
        }
        let next = if has("next.crt") {
            Some(read(("next.crt", "next.key")).map_err(|error| format!("the next authority: {error}"))?)
        } else {
            None
        };
        let former = if has(FORMER) {
            let former = Certificate::first(text(secret, FORMER)?);
            Some(former.map_err(|error| format!("{FORMER}: {error}"))?)
        } else {
            None
        };
        let annotation = |name: &str| secret.metadata.annotations.as_ref()?.get(name).map(String::as_str);
        // What is there decides where it contradicts what is said, as after somebody has edited it.
        let said = annotation(STATE_ANNOTATION).unwrap_or("steady").parse().unwrap_or_default();
        let rotation = match (said, &next) {
            (Rotation::Steady | Rotation::Activating | Rotation::Activated, Some(_)) => Rotation::Preparing,
            (Rotation::Preparing | Rotation::Prepared, None) => Rotation::Steady,
            (said, _) => said,
        };
        // What another one still has to be trusted no more is not over.
        let rotation = match rotation {
            Rotation::Steady if former.is_some() => Rotation::Activating,
            rotation => rotation,
        };
        Ok(Self {
            active,
            certificate,
            trusted: distinct(trusted),
            next,
            former,
            rotation,
            request: annotation(REQUEST_ANNOTATION).map(str::parse).transpose(),
            secret: secret.clone(),
        })
    }

    /// Everything that is trusted, PEM: the same text for the same authorities.
    pub(super) fn bundle(&self) -> String {
        self.trusted.iter().map(Certificate::pem).collect()
    }

    /// Whether we have made it, and so may change it.
    pub(super) fn is_ours(&self) -> bool {
        self.secret.type_.as_deref() == Some(CA_SECRET_TYPE)
    }

    pub(super) fn message(&self) -> Option<&str> {
        self.secret.metadata.annotations.as_ref()?.get(MESSAGE_ANNOTATION).map(String::as_str)
    }

    /// As it was, to be made again after somebody has deleted it.
    pub(super) fn resurrected(&self) -> Secret {
        let old = &self.secret.metadata;
        Secret {
            metadata: ObjectMeta {
                name: old.name.clone(),
                labels: old.labels.clone(),
                annotations: old.annotations.clone(),
                ..ObjectMeta::default()
            },
            ..self.secret.clone()
        }
    }

    /// With a next authority, trusted like the active one.
    pub(super) fn with_next(&self, cluster: &str) -> Result<Secret, PkiError> {
        let next = authority(cluster)?.identity();
        let read = Certificate::first(&next.certificate).map_err(crate::pki::UnusablePair::from)?;
        let trusted = self.trusted.iter().chain([&read]).map(Certificate::pem).collect::<String>();
        Ok(self.changed(Rotation::Preparing, |data| {
            data.insert("ca.crt".to_owned(), bytes(&trusted));
            data.insert("next.crt".to_owned(), bytes(&next.certificate));
            data.insert("next.key".to_owned(), bytes(&next.key));
        }))
    }

    /// In another state, with the same authorities.
    pub(super) fn in_state(&self, rotation: Rotation) -> Secret {
        self.changed(rotation, |_| {})
    }

    /// With the next authority as the active one. None if there is none.
    pub(super) fn activated(&self) -> Option<Secret> {
        let next = self.next.as_ref()?.identity();
        Some(self.changed(Rotation::Activating, |data| {
            data.insert("tls.crt".to_owned(), bytes(&next.certificate));
            data.insert("tls.key".to_owned(), bytes(&next.key));
            data.insert(FORMER.to_owned(), bytes(&self.certificate.pem()));
            data.remove("next.crt");
            data.remove("next.key");
        }))
    }

    /// Without the authority that the active one has taken the place of. Others that somebody has put beside them stay.
    pub(super) fn finished(&self) -> Secret {
        let stays = |trusted: &&Certificate| match &self.former {
            Some(former) => *trusted != former,
            // Whoever has exchanged the active one has not said which it was: none is safe to be left.
            None => **trusted == self.certificate,
        };
        let trusted = self.trusted.iter().filter(stays).map(Certificate::pem).collect::<String>();
        let mut secret = self.changed(Rotation::Steady, |data| {
            data.insert("ca.crt".to_owned(), bytes(&trusted));
            data.remove(FORMER);
        });
        // In one write with the state: nobody sees that without this.
        let annotations = secret.metadata.annotations.get_or_insert_default();
        annotations.insert(MESSAGE_ANNOTATION.to_owned(), FINISHING.to_owned());
        secret
    }

    /// Without the next authority.
    pub(super) fn aborted(&self) -> Secret {
        let next = self.next.as_ref().and_then(|next| Certificate::first(next.certificate()).ok());
        let stays = self.trusted.iter().filter(|trusted| Some(*trusted) != next.as_ref());
        let trusted = stays.map(Certificate::pem).collect::<String>();
        self.changed(Rotation::Steady, |data| {
            data.insert("ca.crt".to_owned(), bytes(&trusted));
            data.remove("next.crt");
            data.remove("next.key");
        })
    }

    /// With something to say; none to say nothing.
    pub(super) fn saying(&self, message: Option<&str>) -> Secret {
        let mut secret = self.secret.clone();
        let annotations = secret.metadata.annotations.get_or_insert_default();
        match message {
            Some(message) => drop(annotations.insert(MESSAGE_ANNOTATION.to_owned(), message.to_owned())),
            None => drop(annotations.remove(MESSAGE_ANNOTATION)),
        }
        secret
    }

    fn changed(&self, rotation: Rotation, change: impl FnOnce(&mut BTreeMap<String, ByteString>)) -> Secret {
        // The resource version stays with it: somebody else's change in between makes the write fail.
        let mut secret = self.secret.clone();
        let annotations = secret.metadata.annotations.get_or_insert_default();
        annotations.insert(STATE_ANNOTATION.to_owned(), rotation.to_string());
        annotations.remove(MESSAGE_ANNOTATION);
        change(secret.data.get_or_insert_default());
        secret
    }
}

/// Where certificate and key lie.
pub(super) fn keys(secret: &Secret) -> (&'static str, &'static str) {
    if !has(secret, "tls.crt") && has(secret, "ca.key") {
        ("ca.crt", "ca.key")
    } else {
        ("tls.crt", "tls.key")
    }
}

fn has(secret: &Secret, key: &str) -> bool {
    secret.data.as_ref().is_some_and(|data| data.contains_key(key))
}

fn authority(cluster: &str) -> Result<Authority, PkiError> {
    Authority::generate(&format!("Isthmus CA {cluster}"), AUTHORITY_VALIDITY)
}

fn distinct(certificates: Vec<Certificate>) -> Vec<Certificate> {
    let mut distinct: Vec<Certificate> = Vec::with_capacity(certificates.len());
    for certificate in certificates {
        if !distinct.contains(&certificate) {
            distinct.push(certificate);
        }
    }
    distinct
}

fn bytes(text: &str) -> ByteString {
    ByteString(text.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(secret: &Secret) -> AuthoritySecret {
        AuthoritySecret::parse(secret).map_err(|error| panic!("{error}")).unwrap()
    }

    #[test]
    fn a_rotation_keeps_the_old_authority_trusted_until_it_is_finished() {
        let first = parse(&AuthoritySecret::generate("alpha").unwrap());
        assert_eq!(first.rotation, Rotation::Steady);
        let prepared = parse(&first.with_next("alpha").unwrap());
        assert_eq!(prepared.rotation, Rotation::Preparing);
        assert_eq!(prepared.certificate, first.certificate);
        assert_eq!(prepared.trusted.len(), 2);
        let activated = parse(&prepared.activated().unwrap());
        assert_eq!(activated.rotation, Rotation::Activating);
        assert_ne!(activated.certificate, first.certificate);
        assert!(activated.trusted.contains(&first.certificate));
        assert!(activated.activated().is_none());
        let finished = parse(&activated.finished());
        assert_eq!(finished.trusted, std::slice::from_ref(&activated.certificate));
        assert_eq!((finished.rotation, finished.former), (Rotation::Steady, None));
    }

    #[test]
    fn a_rotation_takes_away_the_authority_that_it_replaced_and_no_other() {
        let first = parse(&AuthoritySecret::generate("alpha").unwrap());
        let foreign = Authority::generate("by hand", AUTHORITY_VALIDITY).unwrap();
        let foreign = Certificate::first(foreign.certificate()).unwrap();
        let add = |mut secret: Secret| {
            let data = secret.data.as_mut().unwrap();
            let bundle = [data["ca.crt"].0.as_slice(), foreign.pem().as_bytes()].concat();
            data.insert("ca.crt".to_owned(), ByteString(bundle));
            secret
        };
        let before = parse(&add(first.secret.clone()));
        let prepared = parse(&before.with_next("alpha").unwrap());
        let activated = parse(&prepared.activated().unwrap());
        assert_eq!(activated.former.as_ref(), Some(&first.certificate));
        let finished = parse(&activated.finished());
        assert_eq!(finished.trusted, [activated.certificate.clone(), foreign.clone()]);

        let meanwhile = parse(&add(activated.in_state(Rotation::Activated)));
        assert_eq!(parse(&meanwhile.finished()).trusted, [activated.certificate.clone(), foreign.clone()]);

        // One that was activated by somebody who did not write down what was before.
        let mut unsaid = activated.in_state(Rotation::Activated);
        unsaid.data.as_mut().unwrap().remove(FORMER);
        assert_eq!(parse(&parse(&unsaid).finished()).trusted, [activated.certificate]);
    }

    #[test]
    fn an_aborted_rotation_leaves_what_was_there() {
        let first = parse(&AuthoritySecret::generate("alpha").unwrap());
        let aborted = parse(&parse(&first.with_next("alpha").unwrap()).aborted());
        assert_eq!((aborted.bundle(), aborted.rotation), (first.bundle(), Rotation::Steady));
    }

    #[test]
    fn an_authority_of_cilium_s_form_or_with_more_in_its_bundle_is_taken_and_is_not_ours() {
        let [own, other] =
            ["a", "b"].map(|name| Authority::generate(name, AUTHORITY_VALIDITY).unwrap().identity());
        let secret = |data: &[(&str, &str)]| Secret {
            data: Some(data.iter().map(|(key, value)| ((*key).to_owned(), bytes(value))).collect()),
            ..Secret::default()
        };
        let cilium = parse(&secret(&[("ca.crt", &own.certificate), ("ca.key", &own.key)]));
        assert_eq!(cilium.certificate.common_name, "a");
        assert!(!cilium.is_ours());
        let bundle = format!("{}{}", other.certificate, own.certificate);
        let data = [("tls.crt", &*own.certificate), ("tls.key", &own.key), ("ca.crt", &bundle)];
        assert_eq!(parse(&secret(&data)).trusted.len(), 2);
        let mixed = secret(&[("tls.crt", &own.certificate), ("tls.key", &other.key)]);
        assert!(AuthoritySecret::parse(&mixed).err().unwrap().contains("does not belong"));
    }

    #[test]
    fn what_is_there_decides_where_it_contradicts_the_annotation() {
        let first = parse(&AuthoritySecret::generate("alpha").unwrap());
        assert_eq!(parse(&first.in_state(Rotation::Prepared)).rotation, Rotation::Steady);
        let next = parse(&first.with_next("alpha").unwrap());
        assert_eq!(parse(&next.in_state(Rotation::Activated)).rotation, Rotation::Preparing);
        let activated = parse(&next.activated().unwrap());
        assert_eq!(parse(&activated.in_state(Rotation::Steady)).rotation, Rotation::Activating);
    }
}
