//! Runs the steps of a scenario in a lab, and reports what they found.

mod curl;
pub(crate) mod objects;
mod reach;
mod traffic;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use chrono::Utc;
use futures::future::try_join_all;

use self::curl::Curl;
pub(crate) use self::objects::kind;
use self::reach::{RunningAttempts, RunningFlow};
use self::traffic::Traffic;
use crate::cluster::Cluster;
use crate::command;
use crate::error::{LabError, Result};
use crate::kind::Kind;
use crate::kubectl::Metadata;
use crate::lab::Lab;
use crate::platform::Platform;
use crate::process::tail;
use crate::report::{LogTail, Report, StepReport, Tally};
use crate::scenario::{Annotate, Apply, Connect, Exec, Observe, Request, Scenario, Status, Step, Verb};
use crate::wait;

/// Who listens while a scenario runs.
pub trait Audience: Send {
    /// A stage of raising the lab begins.
    fn stage(&mut self, what: &str);
    /// The lab is up; so long it took.
    fn raised(&mut self, took: Duration);
    /// A step begins.
    fn begins(&mut self, number: usize, say: &str);
    /// A step has ended.
    fn ended(&mut self, step: &StepReport);
    /// All is done.
    fn finished(&mut self, report: &Report);
}

/// Listens to nothing.
pub struct Silent;

impl Audience for Silent {
    fn stage(&mut self, _: &str) {}
    fn raised(&mut self, _: Duration) {}
    fn begins(&mut self, _: usize, _: &str) {}
    fn ended(&mut self, _: &StepReport) {}
    fn finished(&mut self, _: &Report) {}
}

/// Applies the manifests and goes through the steps, up to the first whose expectation does not hold.
pub async fn run(lab: &Lab, scenario: &Scenario, raised: Duration, audience: &mut dyn Audience) -> Report {
    let report = Report {
        lab: lab.name().to_string(),
        store: lab.spec().store.as_str().to_owned(),
        kubernetes: lab.kubernetes().to_owned(),
        ..begun(scenario, raised)
    };
    go_through(Platform::Lab(lab), scenario, report, audience).await
}

/// As [`run`], on kind.
pub async fn run_on_kind(
    kind: &Kind,
    scenario: &Scenario,
    raised: Duration,
    audience: &mut dyn Audience,
) -> Report {
    let report = Report {
        lab: kind.name().to_string(),
        store: scenario.store.as_str().to_owned(),
        kubernetes: "kind".to_owned(),
        ..begun(scenario, raised)
    };
    go_through(Platform::Kind(kind), scenario, report, audience).await
}

fn begun(scenario: &Scenario, raised: Duration) -> Report {
    Report {
        title: scenario.title.clone(),
        started: Utc::now().to_rfc3339(),
        raised_ms: raised.as_secs_f64() * 1e3,
        passed: true,
        ..Report::default()
    }
}

async fn go_through(
    platform: Platform<'_>,
    scenario: &Scenario,
    mut report: Report,
    audience: &mut dyn Audience,
) -> Report {
    let mut runner = Runner {
        platform,
        scenario,
        traffic: BTreeMap::new(),
        flows: BTreeMap::new(),
        attempts: BTreeMap::new(),
        before: BTreeMap::new(),
        found: BTreeMap::new(),
        node: None,
    };
    let started = Instant::now();
    // The manifests come first, as a step of their own that no file writes down.
    let manifests = (!scenario.manifests.is_empty()).then_some(None);
    for (i, step) in manifests.into_iter().chain(scenario.steps.iter().map(Some)).enumerate() {
        let number = i + 1;
        let say = step.map_or("apply the manifests", |step| &step.say);
        audience.begins(number, say);
        let begun = Instant::now();
        let mut done = StepReport { number, say: say.to_owned(), ..StepReport::default() };
        let outcome = match step {
            None => runner.manifests().await,
            Some(step) => runner.step(step, &mut done).await,
        };
        done.took_ms = begun.elapsed().as_secs_f64() * 1e3;
        done.passed = outcome.is_ok();
        done.failure = outcome.err().map(|e| e.to_string());
        audience.ended(&done);
        let passed = done.passed;
        report.steps.push(done);
        if !passed {
            report.passed = false;
            report.logs = runner.logs().await;
            break;
        }
    }
    report.steps_ms = started.elapsed().as_secs_f64() * 1e3;
    audience.finished(&report);
    report
}

/// How much of a log is shown when a step has failed.
const LOG_LINES: usize = 30;

/// Time for the checks that `isthmus connect` makes before it does anything.
const LONGEST_CHECK: Duration = Duration::from_secs(30);

/// So many requests are observed for each cluster that should answer: with two the chance that one of them is never
/// chosen is below 1e-9.
const REQUESTS_EACH: usize = 16;

/// How long requests are waited for beyond the time that is observed.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

struct Runner<'a> {
    platform: Platform<'a>,
    scenario: &'a Scenario,
    traffic: BTreeMap<String, Traffic>,
    flows: BTreeMap<String, RunningFlow>,
    attempts: BTreeMap<String, RunningAttempts>,
    /// Who answered a traffic's requests before the next change.
    before: BTreeMap<String, BTreeSet<String>>,
    /// Which daemons were meant by words such as `alpha/leader` when something was done to them.
    found: BTreeMap<String, String>,
    /// Where the last client was, as `cluster/node`.
    node: Option<String>,
}

impl Runner<'_> {
    async fn manifests(&self) -> Result<()> {
        for manifest in &self.scenario.manifests {
            self.apply(manifest).await?;
        }
        Ok(())
    }

    async fn step(&mut self, step: &Step, report: &mut StepReport) -> Result<()> {
        let hurry = step.shows.as_ref().map(|s| self.running(&s.traffic).map(Traffic::hurry)).transpose()?;
        let changed = Instant::now();
        self.act(&step.verb, report).await?;
        let Some(shows) = &step.shows else { return Ok(()) };
        let traffic = self.running(&shows.traffic)?;
        let before = self.before.get(&shows.traffic).cloned().unwrap_or_default();
        let shown = traffic.shows(changed, &before, &shows.answers, shows.within).await;
        report.requests = Some(traffic.tally(changed));
        let took = shown.map_err(LabError::Invalid)?;
        report.shown_after_ms = Some(took.as_secs_f64() * 1e3);
        drop(hurry);
        let after = traffic.tally(changed + took);
        self.before.insert(shows.traffic.clone(), shows.answers.clone());
        if after.failed > 0 && !shows.answers.is_empty() {
            let first = after.first_failure.unwrap_or_default();
            return Err(LabError::invalid(format!(
                "{} requests failed after the change had shown, the first with: {first}",
                after.failed
            )));
        }
        Ok(())
    }

    async fn act(&mut self, verb: &Verb, report: &mut StepReport) -> Result<()> {
        let platform = self.platform;
        match verb {
            Verb::Apply(apply) => self.apply(apply).await,
            Verb::Annotate(a) => self.set(Metadata::Annotations, a).await,
            Verb::Label(a) => self.set(Metadata::Labels, a).await,
            Verb::Scale(s) => {
                each(&s.clusters, |c| platform.scale(c, &s.deployment, &s.namespace, s.replicas)).await
            }
            Verb::Delete(d) => each(&d.clusters, |c| platform.delete(c, &d.object, &d.namespace)).await,
            Verb::Wait(w) => {
                each(&w.clusters, |c| platform.wait(c, &w.object, &w.namespace, &w.until, w.within)).await
            }
            Verb::Request(request) => self.request(request, report).await,
            Verb::Traffic(t) => {
                let curl = Curl::new(self.platform, &t.target).await?;
                self.node = Some(format!("{}/{}", t.target.from.cluster, curl.node()));
                self.traffic.insert(t.name.clone(), Traffic::start(curl, t.rate));
                Ok(())
            }
            Verb::EndTraffic(end) => {
                let traffic = self.traffic.remove(&end.name);
                let total = traffic.map(|t| t.total()).unwrap_or_default();
                report.requests = Some(total.clone());
                if total.failed <= end.failures {
                    return Ok(());
                }
                let first = total.first_failure.unwrap_or_default();
                Err(LabError::invalid(format!(
                    "{} requests failed in all, the first with: {first}",
                    total.failed
                )))
            }
            Verb::Observe(observe) => self.observe(observe, report).await,
            Verb::Exec(exec) => self.exec(exec).await,
            Verb::Partition(p) => {
                platform.cut(&p.from, &p.to).await?;
                if p.one_way { Ok(()) } else { platform.cut(&p.to, &p.from).await }
            }
            Verb::Heal => platform.heal().await,
            Verb::Kill(daemon) => platform.kill(&self.find(daemon).await?).await,
            Verb::Pause(daemon) => platform.pause(&self.find(daemon).await?).await,
            Verb::Resume(daemon) => platform.resume(&self.found(daemon).await?).await,
            Verb::Restart(daemon) => platform.restart(&self.found(daemon).await?).await,
            Verb::Connect(connect) => self.isthmus("connect", connect).await,
            Verb::Disconnect(connect) => self.isthmus("disconnect", connect).await,
            Verb::Status(status) => self.status(status).await,
            Verb::Capture(capture) => self.capture(capture, report).await,
            Verb::Forge(forge) => self.forge(forge).await,
            Verb::RotateKey(rotation) => self.rotate_key(rotation).await,
            Verb::Encryption(mode) => platform.encrypt(*mode, self.scenario).await,
            Verb::Connects(connects) => self.connects(connects).await,
            Verb::Flow(flow) => self.flow(flow).await,
            Verb::GoesOn(goes_on) => self.goes_on(goes_on).await,
            Verb::Cut(cut) => self.cut_flow(cut).await,
            Verb::Attempts(attempts) => self.attempts(attempts).await,
            Verb::EndAttempts(end) => self.end_attempts(end),
        }
    }

    async fn apply(&self, apply: &Apply) -> Result<()> {
        let file = self.scenario.dir.join(&apply.file);
        each(&apply.clusters, |cluster| self.platform.apply(cluster, &file)).await
    }

    async fn set(&self, what: Metadata, a: &Annotate) -> Result<()> {
        each(&a.clusters, |c| self.platform.set(c, what, &a.object, &a.namespace, &a.set)).await
    }

    /// Who is meant now, for what is done to a daemon; remembered.
    async fn find(&mut self, daemon: &str) -> Result<String> {
        let name = self.platform.resolve(daemon).await?;
        self.found.insert(daemon.to_owned(), name.clone());
        Ok(name)
    }

    /// Who was meant the last time: to undo what was done, though another may be meant by the same words now.
    async fn found(&self, daemon: &str) -> Result<String> {
        match self.found.get(daemon) {
            Some(name) => Ok(name.clone()),
            None => self.platform.resolve(daemon).await,
        }
    }

    async fn isthmus(&self, verb: &str, step: &Connect) -> Result<()> {
        let mut isthmus = command::isthmus(verb, &self.platform.kubeconfig())?;
        isthmus.args(["--context", &step.from, "--destination-context", &step.to.join(",")]);
        isthmus.args(["--connection-mode", step.mode.as_str()]);
        isthmus.arg("--wait-duration").arg(format!("{}s", step.within.as_secs().max(1)));
        // Its checks come before, and they have deadlines of their own.
        command::output(isthmus, None, step.within * 2 + LONGEST_CHECK).await.map(drop)
    }

    async fn request(&mut self, request: &Request, report: &mut StepReport) -> Result<()> {
        let curl = Curl::new(self.platform, &request.target).await?;
        self.node = Some(format!("{}/{}", request.target.from.cluster, curl.node()));
        let deadline = Instant::now() + request.within.unwrap_or_default();
        loop {
            let mut tally = Tally::default();
            for _ in 0..request.count {
                tally.add(&curl.ask().await);
            }
            let mut outcome = tally.check(&request.answers);
            if let (Ok(()), Some(most)) = (&outcome, request.most_pods)
                && tally.pods.len() > most
            {
                outcome = Err(format!("at most {most} pods should answer, but {} did", tally.pods.len()));
            }
            report.requests = Some(tally);
            match outcome {
                Ok(()) => return Ok(()),
                Err(e) if Instant::now() >= deadline => return Err(LabError::Invalid(e)),
                Err(_) => {}
            }
        }
    }

    async fn observe(&self, observe: &Observe, report: &mut StepReport) -> Result<()> {
        let traffic = self.running(&observe.traffic)?;
        let since = Instant::now();
        tokio::time::sleep(observe.time).await;
        // A slow machine sends fewer requests, of which one of the clusters may have got none by chance.
        traffic.at_least(REQUESTS_EACH * observe.answers.len().max(1), since, LONGEST_WAIT).await;
        let tally = traffic.tally(since);
        report.requests = Some(tally.clone());
        tally.check(&observe.answers).map_err(LabError::Invalid)
    }

    async fn exec(&mut self, exec: &Exec) -> Result<()> {
        let pod = self.platform.pod(&exec.pod).await?;
        self.node = Some(format!("{}/{}", exec.pod.cluster, pod.node()));
        let output = pod.output(&exec.command, exec.within).await?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        if output.status.code() != Some(exec.exit_code) {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(LabError::invalid(format!(
                "{} instead of exit status {}: {}{}",
                output.status,
                exec.exit_code,
                stdout.trim(),
                stderr.trim()
            )));
        }
        match stdout.contains(&exec.stdout) {
            true => Ok(()),
            false => Err(LabError::invalid(format!("the output lacks {:?}: {}", exec.stdout, stdout.trim()))),
        }
    }

    async fn status(&self, status: &Status) -> Result<()> {
        let what = format!(
            "{} to see {} {}",
            status.cluster,
            status.peer,
            if status.connected { "connected" } else { "lost" }
        );
        wait::until(what, status.within, || async {
            match self.platform.peer_connected(&status.cluster, &status.peer).await? {
                connected if connected == status.connected => Ok(()),
                true => Err("it is connected".to_owned()),
                false => Err("it is not connected".to_owned()),
            }
        })
        .await
    }

    fn running(&self, name: &str) -> Result<&Traffic> {
        self.traffic.get(name).ok_or_else(|| LabError::invalid(format!("no traffic {name} runs")))
    }

    /// The agent of the client's node, the apiserver of its cluster, and whatever has ended by itself.
    async fn logs(&self) -> Vec<LogTail> {
        match self.platform {
            Platform::Lab(lab) => self.lab_logs(lab),
            Platform::Kind(kind) => kind.logs(LOG_LINES).await,
        }
    }

    fn lab_logs(&self, lab: &Lab) -> Vec<LogTail> {
        let mut names: BTreeSet<String> = lab.fallen().iter().map(|d| d.name().to_owned()).collect();
        let of = self.node.as_ref().and_then(|node| node.split('/').next());
        let involved = lab.clusters().iter().filter(|cluster| of.is_none_or(|of| of == cluster.name()));
        names.extend(involved.flat_map(Cluster::apiservers));
        names.extend(self.node.iter().map(|node| format!("{node}/{}", crate::programs::NODE_AGENT)));
        let tail_of = |name: String| {
            let lines = tail(&lab.state().log(&name), LOG_LINES);
            LogTail { process: name, lines }
        };
        names.into_iter().map(tail_of).collect()
    }
}

/// Does the same in several clusters at once.
async fn each<'a, F>(clusters: &'a [String], what: impl Fn(&'a str) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    try_join_all(clusters.iter().map(|cluster| what(cluster))).await.map(drop)
}
