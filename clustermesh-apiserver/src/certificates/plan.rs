//! What the leader has to write: a pure function of what the API holds.

use std::time::Duration;

use chrono::{DateTime, Utc};
use isthmus_crds::names::CA_SECRET;
use k8s_openapi::api::core::v1::Secret;

use super::authority::AuthoritySecret;
use super::leaf::{Leaf, Verdict};
use super::rotation::{FINISHING, Rotation, Step};
use super::watch::Secrets;
use crate::pki::PkiError;

/// What there is to know for it.
pub(super) struct Facts<'a> {
    pub(super) cluster: &'a str,
    pub(super) secrets: &'a Secrets,
    pub(super) leaves: &'a [Leaf],
    pub(super) validity: Duration,
    pub(super) now: DateTime<Utc>,
    /// The authority as it was last good, to outlive its deletion by mistake.
    pub(super) remembered: Option<&'a AuthoritySecret>,
    /// The bundle that the cluster's published information has.
    pub(super) published: Option<&'a str>,
    /// Since when everything has been as it should be: long enough for files of agents to have followed.
    pub(super) settled: bool,
}

/// What follows.
#[derive(Default)]
pub(super) struct Plan {
    /// To be written, in this order.
    pub(super) writes: Vec<Write>,
    /// When to look again at the latest.
    pub(super) due: Option<DateTime<Utc>>,
    /// What a person has to see to, by Secret.
    pub(super) problems: Vec<(&'static str, String)>,
    /// Set while everything is as the state of the rotation wants it: names that, so that the time since can be taken.
    pub(super) spread: Option<String>,
    pub(super) rotation: Rotation,
}

/// One write. Made only if the object is still the one that was looked at.
pub(super) struct Write {
    pub(super) name: &'static str,
    pub(super) secret: Secret,
    pub(super) why: String,
}

/// What to write, the authority having been read.
pub(super) fn plan(facts: &Facts<'_>, authority: Option<&AuthoritySecret>) -> Result<Plan, PkiError> {
    let mut plan = Plan::default();
    let Some(authority) = authority else {
        if !facts.secrets.knows(CA_SECRET) || facts.secrets.get(CA_SECRET).is_some() {
            return Ok(plan);
        }
        let (secret, why) = match facts.remembered {
            // Whoever deletes it does not mean to cut off every peer.
            Some(known) => (known.resurrected(), "it was deleted; it is the same as before".to_owned()),
            None => (AuthoritySecret::generate(facts.cluster)?, "this cluster had none".to_owned()),
        };
        plan.writes.push(Write { name: CA_SECRET, secret, why });
        return Ok(plan);
    };
    plan.rotation = authority.rotation;
    expiry(authority, facts.now, &mut plan);
    if facts.leaves.iter().any(|leaf| !facts.secrets.knows(leaf.secret)) {
        return Ok(plan);
    }
    let complete = leaves(facts, authority, &mut plan)?;
    if complete && facts.published == Some(&*authority.bundle()) {
        plan.spread = Some(format!("{}\n{}", authority.rotation, authority.bundle()));
    }
    let spread = Spread { published: plan.spread.is_some(), settled: facts.settled };
    match rotate(facts.cluster, authority, complete, spread)? {
        Rotate::No => {}
        Rotate::Say(write) => plan.writes.push(write),
        // The certificates follow from it, so they are looked at again when it has been written.
        Rotate::Move(write) => plan.writes = vec![write],
    }
    Ok(plan)
}

/// The certificates that are to be written; whether there are none.
fn leaves(facts: &Facts<'_>, authority: &AuthoritySecret, plan: &mut Plan) -> Result<bool, PkiError> {
    let bundle = authority.bundle();
    let mut complete = true;
    // An authority whose time is not now issues nothing that anybody would take.
    let can_issue = authority.certificate.timely(facts.now).is_ok();
    for leaf in facts.leaves {
        let before = facts.secrets.get(leaf.secret);
        let (identity, why) = match leaf.judge(before, authority, facts.validity, facts.now) {
            Verdict::Keep(due) => {
                plan.due = plan.due.into_iter().chain(due).min();
                continue;
            }
            Verdict::Trust(_) => (None, "the authorities that it trusts have changed".to_owned()),
            Verdict::Foreign(problem) => {
                plan.problems.push((leaf.secret, problem));
                complete = false;
                continue;
            }
            Verdict::Issue(_) if !can_issue => {
                complete = false;
                continue;
            }
            Verdict::Issue(reason) => (Some(leaf.issue(authority, facts.validity)?), reason.to_string()),
        };
        complete = false;
        let secret = leaf.secret(before, identity.as_ref(), &bundle);
        plan.writes.push(Write { name: leaf.secret, secret, why });
    }
    Ok(complete)
}

/// What is to be written about the rotation.
enum Rotate {
    No,
    /// Words alone.
    Say(Write),
    /// Another state.
    Move(Write),
}

/// How far what the rotation has written has come.
#[derive(Clone, Copy)]
struct Spread {
    /// To every certificate's Secret, and to the cluster's published information.
    published: bool,
    /// And so long ago that it is in the files of agents.
    settled: bool,
}

fn rotate(
    cluster: &str,
    authority: &AuthoritySecret,
    complete: bool,
    spread: Spread,
) -> Result<Rotate, PkiError> {
    let write = |secret, why: &str| Write { name: CA_SECRET, secret, why: why.to_owned() };
    let say = |message: Option<&str>| {
        if authority.message() == message {
            return Rotate::No;
        }
        let why = message.unwrap_or("there is nothing more to say of its rotation");
        Rotate::Say(write(authority.saying(message), why))
    };
    let request = match &authority.request {
        Ok(Some(_)) if !authority.is_ours() => {
            return Ok(say(Some(
                "refused: isthmus has not made this authority; exchange it where it comes from",
            )));
        }
        Err(error) => return Ok(say(Some(error))),
        Ok(request) => *request,
    };
    let (secret, why) = match authority.rotation.step(request, spread.published && spread.settled) {
        Step::Stay(None) if authority.message() == Some(FINISHING) && !spread.published => {
            return Ok(Rotate::No);
        }
        Step::Stay(message) => return Ok(say(message)),
        // Something has been touched since: first that is put right.
        Step::Activate if !complete => return Ok(Rotate::No),
        Step::Activate => match authority.activated() {
            Some(secret) => (secret, "the next authority was asked to be the active one"),
            None => return Ok(Rotate::No),
        },
        Step::MakeNext => (authority.with_next(cluster)?, "the next authority was asked for"),
        Step::IsPrepared => {
            (authority.in_state(Rotation::Prepared), "the next authority is trusted everywhere")
        }
        Step::IsActivated => {
            (authority.in_state(Rotation::Activated), "every certificate is the new authority's")
        }
        Step::Finish => (authority.finished(), "the old authority is trusted no more, as was asked"),
        Step::Abort => (authority.aborted(), "the next authority is taken back, as was asked"),
    };
    Ok(Rotate::Move(write(secret, why)))
}

/// An authority does not renew itself: its peers have to be told.
fn expiry(authority: &AuthoritySecret, now: DateTime<Utc>, plan: &mut Plan) {
    let certificate = &authority.certificate;
    let warn = certificate.not_before + (certificate.not_after - certificate.not_before) * 2 / 3;
    if let Err(untimely) = certificate.timely(now) {
        plan.problems.push((CA_SECRET, format!("no certificate is issued: of this authority, {untimely}")));
    } else if now >= warn {
        let until = certificate.not_after;
        plan.problems.push((
            CA_SECRET,
            format!("this authority is valid until {until}; have another one in its place before: isthmus rotate-ca"),
        ));
    } else {
        plan.due = plan.due.into_iter().chain([warn]).min();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificates::rotation::REQUEST_ANNOTATION;

    const LIFE: Duration = Duration::from_secs(90 * 24 * 60 * 60);

    /// What the API holds, and what becomes of it when plans are carried out.
    struct World {
        secrets: Vec<(&'static str, Option<Secret>)>,
        leaves: Vec<Leaf>,
        now: DateTime<Utc>,
        /// Another bundle is published than the authority's.
        published: Option<String>,
    }

    impl World {
        fn new() -> Self {
            let leaves = Leaf::all("alpha", "isthmus-system", &[]);
            let names = leaves.iter().map(|leaf| leaf.secret).chain([CA_SECRET]);
            let secrets = names.map(|name| (name, None)).collect();
            Self { secrets, leaves, now: Utc::now(), published: None }
        }

        fn authority(&self) -> Option<AuthoritySecret> {
            let (_, secret) = self.secrets.iter().find(|(name, _)| *name == CA_SECRET)?;
            secret.as_ref().map(|secret| AuthoritySecret::parse(secret).ok().unwrap())
        }

        fn plan(&self, settled: bool) -> Plan {
            let authority = self.authority();
            let bundle = self.published.clone().or_else(|| authority.as_ref().map(AuthoritySecret::bundle));
            let facts = Facts {
                cluster: "alpha",
                secrets: &Secrets::of(self.secrets.clone()),
                leaves: &self.leaves,
                validity: LIFE,
                now: self.now,
                remembered: None,
                published: bundle.as_deref(),
                settled,
            };
            plan(&facts, authority.as_ref()).unwrap()
        }

        /// Carries plans out until there is nothing more to write.
        fn settle(&mut self, settled: bool) {
            for _ in 0..10 {
                let writes = self.plan(settled).writes;
                if writes.is_empty() {
                    return;
                }
                for write in writes {
                    self.secrets.iter_mut().find(|(name, _)| *name == write.name).unwrap().1 =
                        Some(write.secret);
                }
            }
            panic!("there is always more to write");
        }

        fn ask(&mut self, request: &str) {
            let (_, secret) = self.secrets.iter_mut().find(|(name, _)| *name == CA_SECRET).unwrap();
            let annotations = secret.as_mut().unwrap().metadata.annotations.get_or_insert_default();
            annotations.insert(REQUEST_ANNOTATION.to_owned(), request.to_owned());
        }

        fn leaf(&self, number: usize) -> Option<Secret> {
            self.secrets[number].1.clone()
        }
    }

    #[test]
    fn from_nothing_everything_is_made_and_then_nothing_is_written() {
        let mut world = World::new();
        assert_eq!(world.plan(true).writes.len(), 1, "first the authority");
        world.settle(true);
        assert!((0..5).all(|number| world.leaf(number).is_some()));
        let plan = world.plan(true);
        assert!(plan.spread.is_some() && plan.problems.is_empty());
        let due = plan.due.expect("something is renewed some day");
        assert!(due < world.now + LIFE * 2 / 3 && due > world.now + LIFE / 2);
    }

    #[test]
    fn what_is_not_known_yet_is_not_made() {
        let mut world = World::new();
        let authority = world.secrets.pop().unwrap();
        assert!(world.plan(true).writes.is_empty(), "the authority may be there");
        world.secrets.push(authority);
        world.secrets.remove(0);
        world.settle(true);
        assert!(world.authority().is_some());
        assert!(world.secrets[..4].iter().all(|(_, secret)| secret.is_none()), "a certificate may be there");
    }

    #[test]
    fn a_rotation_waits_until_what_it_has_written_has_settled() {
        let mut world = World::new();
        world.settle(true);
        let before = world.leaf(0);
        world.ask("prepare");
        world.settle(false);
        assert_eq!(world.authority().unwrap().rotation, Rotation::Preparing);
        let trusting = world.leaf(0).unwrap();
        assert_ne!(Some(&trusting), before.as_ref(), "its bundle has grown");
        assert_eq!(trusting.data.as_ref().unwrap()["tls.crt"], before.unwrap().data.unwrap()["tls.crt"]);
        world.ask("activate");
        world.settle(false);
        assert_eq!(world.authority().unwrap().rotation, Rotation::Preparing, "agents have not followed yet");
        world.settle(true);
        assert_eq!(world.authority().unwrap().rotation, Rotation::Activated);
        let issued = world.leaf(0).unwrap();
        assert_ne!(issued.data.as_ref().unwrap()["tls.crt"], trusting.data.unwrap()["tls.crt"]);
        world.published = world.authority().map(|authority| authority.bundle());
        world.ask("finish");
        world.settle(true);
        let ending = world.authority().unwrap();
        assert_eq!((ending.rotation, ending.message()), (Rotation::Steady, Some(FINISHING)));
        assert_ne!(Some(ending.bundle()), world.published, "which is still to be published");
        world.published = None;
        world.settle(true);
        let done = world.authority().unwrap();
        assert_eq!((done.rotation, done.message()), (Rotation::Steady, None));
        assert_eq!(world.leaf(0).unwrap().data.unwrap()["tls.crt"], issued.data.unwrap()["tls.crt"]);
    }

    #[test]
    fn an_authority_near_its_end_is_a_problem_and_one_after_it_issues_nothing() {
        let mut world = World::new();
        world.settle(true);
        world.now += Duration::from_secs(9 * 365 * 24 * 60 * 60);
        assert!(world.plan(true).problems[0].1.contains("rotate-ca"));
        world.now += Duration::from_secs(2 * 365 * 24 * 60 * 60);
        let plan = world.plan(true);
        assert!(plan.problems[0].1.contains("the clock here says"), "{:?}", plan.problems);
        assert!(plan.writes.is_empty());
    }
}
