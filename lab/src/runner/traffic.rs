//! Requests all the time, each with when it was sent and what became of it; and when they show a change.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::curl::{Curl, list};
use crate::error::Result;
use crate::images::Answer;
use crate::report::Tally;

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) sent: Instant,
    pub(super) ended: Instant,
    pub(super) outcome: Result<Answer, String>,
}

/// Traffic that runs until it is dropped.
pub(super) struct Traffic {
    samples: Arc<Mutex<Vec<Sample>>>,
    count: watch::Receiver<usize>,
    hurry: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// So many answers in a row must agree before a change counts as shown for good.
const CONFIRM: usize = 20;

impl Traffic {
    /// Sends `rate` requests a second, one after the other; each `curl` is a process of its own, so a slow machine
    /// sends fewer.
    pub(super) fn start(curl: Curl, rate: u32) -> Self {
        let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
        let hurry = Arc::new(AtomicBool::new(false));
        let (tell, count) = watch::channel(0);
        let pause = Duration::from_secs(1) / rate.max(1);
        let task = tokio::spawn({
            let (samples, hurry) = (Arc::clone(&samples), Arc::clone(&hurry));
            async move {
                loop {
                    let sent = Instant::now();
                    let outcome = curl.ask().await;
                    let ended = Instant::now();
                    let length = {
                        let mut all = samples.lock().unwrap_or_else(PoisonError::into_inner);
                        all.push(Sample { sent, ended, outcome });
                        all.len()
                    };
                    tell.send_replace(length);
                    if !hurry.load(Ordering::Relaxed) {
                        tokio::time::sleep(pause.saturating_sub(sent.elapsed())).await;
                    }
                }
            }
        });
        Self { samples, count, hurry, task }
    }

    /// Until the answer is dropped, requests follow each other without a pause.
    pub(super) fn hurry(&self) -> Hurry {
        self.hurry.store(true, Ordering::Relaxed);
        Hurry(Arc::clone(&self.hurry))
    }

    /// What was met by requests sent at `since` or later.
    pub(super) fn tally(&self, since: Instant) -> Tally {
        let mut tally = Tally::default();
        self.since(since).iter().for_each(|sample| tally.add(&sample.outcome));
        tally
    }

    /// Waits until this many requests that were sent at `since` or later have ended, or until `within` is over.
    pub(super) async fn at_least(&self, requests: usize, since: Instant, within: Duration) {
        let mut count = self.count.clone();
        let enough = count.wait_for(|_| self.since(since).len() >= requests);
        // What there is then is judged as it is: too little will not be as expected.
        let _ = tokio::time::timeout(within, enough).await;
    }

    /// What was met since the beginning.
    pub(super) fn total(&self) -> Tally {
        let mut tally = Tally::default();
        let all = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().for_each(|sample| tally.add(&sample.outcome));
        tally
    }

    /// Waits until the traffic shows that `expected`, and no others, answer, after a change made at `changed`; `before`
    /// answered until then. Returns how long the change took to show.
    pub(super) async fn shows(
        &self,
        changed: Instant,
        before: &BTreeSet<String>,
        expected: &BTreeSet<String>,
        within: Duration,
    ) -> Result<Duration, String> {
        let mut count = self.count.clone();
        let watched = async {
            loop {
                count.mark_unchanged();
                if let Some(at) = shown(&self.since(changed), before, expected) {
                    return at.saturating_duration_since(changed);
                }
                if count.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(within, watched).await.map_err(|_| {
            let samples = self.since(changed);
            let mut last = Tally::default();
            samples.iter().rev().take(CONFIRM).for_each(|s| last.add(&s.outcome));
            let found: BTreeSet<String> = last.answers.keys().cloned().collect();
            let failures = match &last.first_failure {
                Some(first) => format!("; {} of them failed, like this: {first}", last.failed),
                None => String::new(),
            };
            format!(
                "not shown within {within:?}: {} should answer; of the last {} requests {} did{failures}",
                list(expected),
                samples.len().min(CONFIRM),
                list(&found),
            )
        })
    }

    fn since(&self, since: Instant) -> Vec<Sample> {
        let all = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let first = all.partition_point(|s| s.sent < since);
        all[first..].to_vec()
    }
}

/// See [`Traffic::hurry`].
pub(super) struct Hurry(Arc<AtomicBool>);

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// When `samples`, the requests sent after a change, first showed it: the first answer of a cluster that did not answer
/// before, and the first answer after the last one of a cluster that no longer does, whichever is later. `None` while
/// that is not certain: a cluster has not answered yet, or too few answers have followed. A request that fails shows
/// nothing, unless nobody is expected to answer.
fn shown(samples: &[Sample], before: &BTreeSet<String>, expected: &BTreeSet<String>) -> Option<Instant> {
    let answered_by = |s: &Sample| s.outcome.as_ref().ok().map(|a| a.cluster.clone());
    let fits = |s: &Sample| match answered_by(s) {
        Some(cluster) => expected.contains(&cluster),
        None => expected.is_empty(),
    };
    // A failure is told apart by what is expected, not here: it only must not count as agreement.
    let first_fit = samples.iter().rposition(|s| !fits(s) && (s.outcome.is_ok() || expected.is_empty()));
    let agreeing = &samples[first_fit.map_or(0, |last| last + 1)..];
    let confirmed: Vec<&Sample> = agreeing.iter().filter(|s| fits(s)).collect();
    if confirmed.len() < CONFIRM {
        return None;
    }
    let mut at = match (first_fit, expected.is_empty()) {
        (None, false) => None,
        _ => confirmed.first().map(|s| s.ended),
    };
    for cluster in expected {
        let first = samples.iter().find(|s| answered_by(s).as_ref() == Some(cluster))?;
        if !before.contains(cluster) {
            at = at.max(Some(first.ended));
        }
    }
    // Everything agreed from the first request on: the change shows in it.
    at.or_else(|| confirmed.first().map(|s| s.ended))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One request per letter, each 10 ms: `a` and `b` answer, `-` failed.
    fn run(letters: &str) -> (Instant, Vec<Sample>) {
        let start = Instant::now();
        let samples = letters.chars().enumerate().map(|(i, letter)| {
            let sent = start + Duration::from_millis(10) * i as u32;
            let name = letter.to_string();
            let outcome = match letter {
                '-' => Err("refused".to_owned()),
                _ => Ok(Answer { cluster: name.clone(), node: String::new(), pod: name }),
            };
            Sample { sent, ended: sent + Duration::from_millis(10), outcome }
        });
        (start, samples.collect())
    }

    fn after(letters: &str, before: &str, expected: &str) -> Option<u128> {
        let (start, samples) = run(letters);
        let set = |s: &str| s.chars().map(|c| c.to_string()).collect();
        shown(&samples, &set(before), &set(expected)).map(|at| (at - start).as_millis())
    }

    #[test]
    fn a_cluster_that_joins_is_shown_by_its_first_answer() {
        assert_eq!(after("aaabaabbaabababababababab", "a", "ab"), Some(40));
        assert_eq!(after("aaaaaaaaaaaaaaaaaaaaaaaaa", "a", "ab"), None);
    }

    #[test]
    fn a_cluster_that_leaves_is_shown_by_the_first_answer_after_its_last() {
        assert_eq!(after("ababbbbbbbbbbbbbbbbbbbbbbb", "ab", "b"), Some(40));
        assert_eq!(after("ababbbbbbbbbb", "ab", "b"), None, "too few to be sure");
        assert_eq!(after("bbbbbbbbbbbbbbbbbbbbbbb", "ab", "b"), Some(10), "shown by the first request");
    }

    #[test]
    fn failures_neither_show_a_change_nor_hide_it() {
        assert_eq!(after("a--bbbbbbbbbbbbbbbbbbbbbbb", "a", "b"), Some(40));
        assert_eq!(after("a------------------------", "a", "b"), None);
    }

    #[test]
    fn nobody_answers_when_everything_fails() {
        assert_eq!(after("aa-----------------------", "a", ""), Some(30));
        assert_eq!(after("--a----------------------", "a", ""), Some(40));
    }

    #[tokio::test]
    async fn requests_are_waited_for_until_there_are_enough() {
        let (start, mut samples) = run("abb");
        let last = samples.pop().expect("three");
        let samples = Arc::new(Mutex::new(samples));
        let (tell, count) = watch::channel(2);
        let task = tokio::spawn(std::future::pending());
        let traffic = Traffic { samples: Arc::clone(&samples), count, hurry: Arc::default(), task };
        traffic.at_least(2, start, Duration::from_secs(60)).await;
        traffic.at_least(3, start, Duration::from_millis(10)).await;
        assert_eq!(traffic.tally(start).answers.len(), 2, "those that there are");

        let mut enough = std::pin::pin!(traffic.at_least(3, start, Duration::from_secs(60)));
        assert!(futures::poll!(enough.as_mut()).is_pending());
        samples.lock().expect("no panic").push(last);
        tell.send_replace(3);
        enough.await;
        assert_eq!(traffic.total().answers["b"], 2);
    }
}
