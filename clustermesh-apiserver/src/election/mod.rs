//! Which of the replicas leads: a Lease of the Kubernetes API, as client-go's candidates use it.
//!
//! ```text
//!            the Lease is free, or has not been renewed for 15 s by the own clock
//!   standby ────────────────────────────────────────────────────────────────────▶ leading
//!      ▲                                                                             │
//!      └──── not renewed for 10 s · somebody else holds it · released at the end ────┘
//! ```
//!
//! - **Nobody trusts another's clock.** A standby counts from when it *saw* the Lease change, by its own monotonic clock;
//!   the times in the Lease are for people. (`kube-leader-election`, the crate there is, compares them with the local time,
//!   and leaves renewing to its user.)
//! - **A leader ends before the next can begin**: it counts its 10 seconds from before it *asked* for the renewal that
//!   worked, the others their 15 from after it was made. The 5 between are for its parts to stop.
//! - **An orderly end hands over at once**: the Lease is emptied when the parts have stopped, [`Election::release`].
//!
//! Needs get, create and update on leases.coordination.k8s.io.

mod candidate;

use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use self::candidate::Candidate;
use crate::exporter::chain;
use crate::tasks::Tasks;

/// The times of an election. The defaults are client-go's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a Lease that is not renewed keeps others from leading. Whole seconds. 15 s.
    pub lease: Duration,
    /// How long a leader that cannot renew it goes on. Less than `lease`, so that it has stopped before another begins.
    /// 10 s.
    pub renew_deadline: Duration,
    /// How often the Lease is renewed or looked at; up to a fifth more, so that candidates do not meet. 2 s.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

impl Timing {
    /// The defaults in proportion to another length of the Lease.
    pub fn of_lease(lease: Duration) -> Self {
        Self { lease, renew_deadline: lease * 2 / 3, retry: lease * 2 / 15 }
    }
}

/// What a replica is at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads, until then unless it renews the Lease before; none where nobody else could lead.
    Leading(Option<Instant>),
    /// It waits.
    Standby {
        /// Who leads, as far as is known.
        leader: Option<String>,
    },
}

impl Role {
    /// Whether it leads now. Asked again at the moment of use, it is right also in a process that stood still.
    pub fn is_leading(&self) -> bool {
        match self {
            Self::Leading(until) => until.is_none_or(|until| Instant::now() < until),
            Self::Standby { .. } => false,
        }
    }
}

/// Whether this replica leads: for whoever must not do something twice. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<Role>);

impl Leadership {
    /// That of the only replica.
    pub fn alone() -> Self {
        Self(watch::channel(Role::Leading(None)).1)
    }

    /// What this replica is at present.
    pub fn role(&self) -> Role {
        self.0.borrow().clone()
    }

    /// Whether it leads now.
    pub fn is_leading(&self) -> bool {
        self.0.borrow().is_leading()
    }

    /// The same as a value that is followed: true while this replica leads. Must be called within a tokio runtime.
    pub fn followed(&self) -> watch::Receiver<bool> {
        let (send, leading) = watch::channel(self.is_leading());
        let mut own = self.clone();
        tokio::spawn(async move {
            loop {
                let is_leading = own.is_leading();
                send.send_if_modified(|known| std::mem::replace(known, is_leading) != is_leading);
                tokio::select! {
                    changed = own.0.changed() => if changed.is_err() {
                        // The election is over, and its last word has been passed on.
                        send.closed().await;
                        return;
                    },
                    () = send.closed() => return,
                }
            }
        });
        leading
    }

    /// Waits until it leads.
    pub async fn gained(&mut self) {
        if self.0.wait_for(Role::is_leading).await.is_err() {
            // The election has ended, and with it the chance.
            if !self.is_leading() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until it does not lead.
    pub async fn lost(&mut self) {
        if self.0.wait_for(|role| !role.is_leading()).await.is_err() && self.is_leading() {
            std::future::pending::<()>().await;
        }
    }
}

/// Runs for the Lease until it is released.
#[derive(Debug)]
pub struct Election {
    ended: CancellationToken,
    task: JoinHandle<()>,
}

impl Election {
    /// Begins to run for the Lease `lease` in `namespace` as `replica`, a name that no other replica has. Must be called
    /// within a tokio runtime.
    pub fn start(
        client: Client,
        namespace: &str,
        lease: &str,
        replica: &str,
        timing: Timing,
        tasks: &Tasks,
    ) -> (Self, Leadership) {
        let (role, seen) = watch::channel(Role::Standby { leader: None });
        let ended = CancellationToken::new();
        let run = Run {
            api: Api::namespaced(client, namespace),
            lease: lease.to_owned(),
            candidate: Candidate::new(replica.to_owned(), timing),
            timing,
            role,
            trouble: None,
        };
        let task = tasks.spawn_until("the election", ended.clone(), run.until(ended.clone()));
        (Self { ended, task }, Leadership(seen))
    }

    /// Ends it, so that another can lead at once. What only a leader may do must have ended before.
    pub async fn release(mut self) {
        self.ended.cancel();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Election {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

struct Run {
    api: Api<Lease>,
    lease: String,
    candidate: Candidate,
    timing: Timing,
    role: watch::Sender<Role>,
    /// What was last said in the log.
    trouble: Option<String>,
}

impl Run {
    async fn until(mut self, ended: CancellationToken) {
        loop {
            // Not broken off: a renewal that is under way may be taken all the same, and what is released then would be a
            // version that is no more.
            self.round(&ended).await;
            if ended.is_cancelled() {
                break;
            }
            let pause = self.timing.retry.mul_f64(1.0 + fastrand::f64() / 5.0);
            let wait = async {
                // Not a moment longer than the Lease is ours for sure.
                let now = Instant::now();
                match self.candidate.until(now) {
                    Some(until) if until < now + pause => {
                        sleep_until(until).await;
                        self.tell();
                    }
                    _ => sleep(pause).await,
                }
            };
            if ended.run_until_cancelled(wait).await.is_none() {
                break;
            }
        }
        self.release().await;
    }

    /// Looks at the Lease, and takes or renews it where that is due. Lasts until the renewal deadline at the longest, and no
    /// longer than a retry after the end.
    async fn round(&mut self, ended: &CancellationToken) {
        let asked = Instant::now();
        // A request that hangs must not outlast what it was meant to save.
        let deadline = self.candidate.until(asked).unwrap_or(asked + self.timing.renew_deadline);
        let patience = self.timing.retry;
        let too_late = async {
            tokio::select! {
                () = sleep_until(deadline) => {}
                () = async { ended.cancelled().await; sleep(patience).await } => {}
            }
        };
        let outcome = tokio::select! {
            outcome = self.attempt(asked) => outcome,
            () = too_late => Err("the Kubernetes API does not answer in time".to_owned()),
        };
        let trouble = outcome.err();
        if trouble != self.trouble {
            match &trouble {
                Some(error) => {
                    tracing::warn!(lease = self.lease, "the Lease cannot be used, trying again: {error}")
                }
                None => tracing::info!(lease = self.lease, "the Lease can be used again"),
            }
            self.trouble = trouble;
        }
        self.tell();
    }

    async fn attempt(&mut self, asked: Instant) -> Result<(), String> {
        let failed = |error: kube::Error| explain(&error);
        let found = self.api.get_opt(&self.lease).await.map_err(failed)?;
        self.candidate.observe(found.as_ref(), Instant::now());
        self.tell();
        let Some(wanted) =
            self.candidate.wants(&self.lease, Instant::now(), k8s_openapi::jiff::Timestamp::now())
        else {
            return Ok(());
        };
        let written = match &found {
            None => self.api.create(&PostParams::default(), &wanted).await,
            Some(_) => self.api.replace(&self.lease, &PostParams::default(), &wanted).await,
        };
        match written {
            Ok(lease) => {
                self.candidate.wrote(&lease, asked, Instant::now());
                Ok(())
            }
            // Somebody was faster: the next look says who.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    fn tell(&self) {
        let role = self.candidate.role(Instant::now());
        self.role.send_if_modified(|known| {
            if *known == role {
                return false;
            }
            // The last word counts: one whose time has run out leads no more, whether it was told or not.
            let led = matches!(known, Role::Leading(_));
            match &role {
                Role::Leading(_) if !led => tracing::info!(lease = self.lease, "this replica leads now"),
                Role::Standby { leader } if led => tracing::warn!(
                    lease = self.lease,
                    leader = leader.as_deref().unwrap_or("nobody yet"),
                    "this replica leads no more"
                ),
                Role::Standby { leader: Some(leader) } => {
                    tracing::info!(lease = self.lease, leader, "this replica stands by")
                }
                Role::Leading(_) | Role::Standby { .. } => {}
            }
            *known = role;
            true
        });
    }

    /// Empties the Lease if it is ours.
    async fn release(mut self) {
        let released = self.candidate.release(k8s_openapi::jiff::Timestamp::now());
        self.role.send_replace(Role::Standby { leader: None });
        let Some(lease) = released else { return };
        let params = PostParams::default();
        let write = self.api.replace(&self.lease, &params, &lease);
        match tokio::time::timeout(self.timing.retry, write).await {
            Ok(Ok(_)) => tracing::info!(lease = self.lease, "the Lease is released"),
            Ok(Err(error)) => tracing::debug!("the Lease is not released and will expire: {}", chain(&error)),
            Err(_) => tracing::debug!("the Lease is not released in time and will expire"),
        }
    }
}

fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.is_forbidden() => format!(
            "{}: grant this account the verbs get, create and update on leases.coordination.k8s.io",
            status.message
        ),
        kube::Error::Api(status) if status.is_not_found() => {
            format!("{}: check that the namespace given with --namespace exists", status.message)
        }
        error => chain(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use k8s_openapi::serde_json;
    use kube::client::Body;
    use tokio::sync::Notify;

    use super::*;

    /// An API with one Lease, which answers a renewal only when it is let.
    #[derive(Clone, Default)]
    struct Api {
        lease: Arc<Mutex<Option<Lease>>>,
        renewed: Arc<Notify>,
        may_answer: Arc<Notify>,
    }

    impl Api {
        async fn answer(self, request: http::Request<Body>) -> (u16, serde_json::Value) {
            let method = request.method().clone();
            let body = request.into_body().collect_bytes().await.expect("a body");
            let (code, answer, is_renewal) = {
                let mut kept = self.lease.lock().expect("not poisoned");
                let version = kept.as_ref().and_then(|lease| lease.metadata.resource_version.clone());
                if method == http::Method::GET {
                    match &*kept {
                        Some(lease) => (200, serde_json::to_value(lease), false),
                        None => (404, Ok(status(404, "NotFound")), false),
                    }
                } else {
                    let mut lease: Lease = serde_json::from_slice(&body).expect("a Lease");
                    if lease.metadata.resource_version != version {
                        (409, Ok(status(409, "Conflict")), false)
                    } else {
                        let next = version.map_or(1, |version| version.parse::<u64>().expect("ours") + 1);
                        lease.metadata.resource_version = Some(next.to_string());
                        let answer = serde_json::to_value(&lease);
                        *kept = Some(lease);
                        (200, answer, next == 2)
                    }
                }
            };
            if is_renewal {
                self.renewed.notify_one();
                self.may_answer.notified().await;
            }
            (code, answer.expect("JSON"))
        }

        fn holder(&self) -> Option<String> {
            self.lease.lock().expect("not poisoned").clone()?.spec?.holder_identity
        }
    }

    fn status(code: u16, reason: &str) -> serde_json::Value {
        serde_json::json!({ "kind": "Status", "status": "Failure", "reason": reason, "message": reason, "code": code })
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_released_also_when_its_renewal_is_under_way() {
        let api = Api::default();
        let served = api.clone();
        let service = tower::service_fn(move |request| {
            let api = served.clone();
            async move {
                let (code, answer) = api.answer(request).await;
                let body = Body::from(serde_json::to_vec(&answer).expect("JSON"));
                http::Response::builder().status(code).body(body)
            }
        });
        let tasks = Tasks::until(CancellationToken::new());
        let client = Client::new(service, "default");
        let (election, mut leadership) =
            Election::start(client, "default", "lease", "r0", Timing::default(), &tasks);
        leadership.gained().await;
        api.renewed.notified().await;
        assert_eq!(api.holder().as_deref(), Some("r0"));

        let release = tokio::spawn(election.release());
        tokio::task::yield_now().await;
        api.may_answer.notify_one();
        release.await.expect("no panic");
        assert_eq!(api.holder().as_deref(), Some(""), "the next one need not wait");
    }
}
