//! Tasks that the program cannot do without: one that ends by itself is noticed, also when it has panicked.
//!
//! A task that is merely spawned ends in silence. The gateway would go on serving then, and be ready, with nobody to renew its
//! certificates or to see that a peer has gone.

use std::future::Future;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Spawns them, and tells when one has ended before its time. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tasks {
    shutdown: CancellationToken,
    /// The first one that has.
    ended: watch::Sender<Option<&'static str>>,
}

impl Tasks {
    /// Those that run until `shutdown`.
    pub fn until(shutdown: CancellationToken) -> Self {
        Self { shutdown, ended: watch::Sender::new(None) }
    }

    /// Runs `task`, which never ends, and drops it at the shutdown. `what` names it to people. Must be called within a tokio
    /// runtime.
    pub fn spawn(&self, what: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shutdown.clone();
        let task = async move {
            shutdown.run_until_cancelled(task).await;
        };
        self.spawn_until(what, self.shutdown.clone(), task);
    }

    /// Runs `task`, which ends by itself some time after `over`, and not before. Otherwise as [`Tasks::spawn`].
    pub fn spawn_until(
        &self,
        what: &'static str,
        over: CancellationToken,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        let end = End { what, over, ended: self.ended.clone() };
        tokio::spawn(async move {
            let _end = end;
            task.await;
        })
    }

    /// Completes when one has ended before its time, with its name.
    pub async fn ended(&self) -> &'static str {
        let mut ended = self.ended.subscribe();
        // The other side is in `self`, so that it is never closed.
        match ended.wait_for(Option::is_some).await.ok().and_then(|what| *what) {
            Some(what) => what,
            None => std::future::pending().await,
        }
    }
}

/// Dropped when the task ends, whichever way it does.
struct End {
    what: &'static str,
    over: CancellationToken,
    ended: watch::Sender<Option<&'static str>>,
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.over.is_cancelled() {
            // Those that depended on it may end, too: the first one is what matters.
            self.ended.send_if_modified(|ended| {
                let first = ended.is_none();
                ended.get_or_insert(self.what);
                first
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_or_ends_is_named_also_to_who_asks_later() {
        let tasks = Tasks::until(CancellationToken::new());
        tasks.spawn("one that goes on", std::future::pending());
        assert_eq!(tasks.ended().now_or_never(), None);
        tasks.spawn("one that panics", async { panic!("on purpose") });
        assert_eq!(tasks.ended().await, "one that panics");
        tasks.spawn("a later one", async {});
        tokio::task::yield_now().await;
        assert_eq!(tasks.clone().ended().await, "one that panics");

        let tasks = Tasks::until(CancellationToken::new());
        let over = CancellationToken::new();
        drop(tasks.spawn_until("one that is not over", over, async {}));
        assert_eq!(tasks.ended().await, "one that is not over");
    }

    #[tokio::test]
    async fn what_ends_when_it_should_is_no_fault() {
        let shutdown = CancellationToken::new();
        let tasks = Tasks::until(shutdown.clone());
        let over = CancellationToken::new();
        let (send, dropped) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn("one", async move {
            let _send = send;
            std::future::pending().await
        });
        let ending = tasks.spawn_until("another", over.clone(), over.clone().cancelled_owned());
        over.cancel();
        ending.await.unwrap();
        shutdown.cancel();
        assert!(dropped.await.is_err(), "it is dropped where it stands");
        assert_eq!(tasks.ended().now_or_never(), None);
    }
}
