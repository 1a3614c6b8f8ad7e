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
use tokio::time::{Instant, sleep, timeout_at};
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
        while ended.run_until_cancelled(self.round()).await.is_some() {
            let pause = self.timing.retry.mul_f64(1.0 + fastrand::f64() / 5.0);
            let wait = async {
                // Not a moment longer than the Lease is ours for sure.
                let now = Instant::now();
                match self.candidate.until(now) {
                    Some(until) if until < now + pause => {
                        tokio::time::sleep_until(until).await;
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

    /// Looks at the Lease, and takes or renews it where that is due.
    async fn round(&mut self) {
        let asked = Instant::now();
        // A request that hangs must not outlast what it was meant to save.
        let deadline = self.candidate.until(asked).unwrap_or(asked + self.timing.renew_deadline);
        let outcome = match timeout_at(deadline, self.attempt(asked)).await {
            Ok(outcome) => outcome,
            Err(_) => Err("the Kubernetes API does not answer in time".to_owned()),
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
