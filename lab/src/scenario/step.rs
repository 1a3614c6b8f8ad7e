//! Steps: one verb each, checked against the clusters and the files there are.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::action::{
    Annotate, Apply, Capture, Connect, Delete, EndTraffic, Exec, Forge, Heal, Observe, Partition, Plaintext,
    Request, RotateKey, Scale, Shows, Status, Target, Traffic, Until, Wait,
};
use crate::spec::Encryption;

/// Instead of a daemon's name, behind a cluster's: the clustermesh-apiserver that leads.
pub(crate) const LEADER: &str = "leader";
/// Instead of a daemon's name, behind a node's: the clustermesh-apiserver that the node's agent reads from.
pub(crate) const GATEWAY: &str = "gateway";

use super::reach::{Attempts, Connects, Cut, EndAttempts, Expect, Flow, GoesOn};

/// One step, checked.
#[derive(Debug, Clone)]
pub struct Step {
    /// What the story says about it.
    pub say: String,
    /// What is done.
    pub verb: Verb,
    /// After a change: who answers then, and how soon.
    pub shows: Option<Shows>,
}

/// What a step does; each is described where its fields are.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub enum Verb {
    Apply(Apply),
    Annotate(Annotate),
    Label(Annotate),
    Scale(Scale),
    Delete(Delete),
    Wait(Wait),
    Request(Request),
    Traffic(Traffic),
    EndTraffic(EndTraffic),
    Observe(Observe),
    Exec(Exec),
    Partition(Partition),
    Heal,
    Kill(String),
    Pause(String),
    Resume(String),
    Restart(String),
    Connect(Connect),
    Disconnect(Connect),
    Status(Status),
    Capture(Capture),
    Forge(Forge),
    RotateKey(RotateKey),
    Encryption(Encryption),
    Connects(Connects),
    Flow(Flow),
    GoesOn(GoesOn),
    Cut(Cut),
    Attempts(Attempts),
    EndAttempts(EndAttempts),
}

/// A step as it is written: `say`, exactly one verb, and perhaps `shows`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(super) struct FileStep {
    say: Option<String>,
    apply: Option<Apply>,
    annotate: Option<Annotate>,
    label: Option<Annotate>,
    scale: Option<Scale>,
    delete: Option<Delete>,
    wait: Option<Wait>,
    request: Option<Request>,
    traffic: Option<Traffic>,
    end_traffic: Option<EndTraffic>,
    observe: Option<Observe>,
    exec: Option<Exec>,
    partition: Option<Partition>,
    heal: Option<Heal>,
    kill: Option<String>,
    pause: Option<String>,
    resume: Option<String>,
    restart: Option<String>,
    connect: Option<Connect>,
    disconnect: Option<Connect>,
    status: Option<Status>,
    capture: Option<Capture>,
    forge: Option<Forge>,
    rotate_key: Option<RotateKey>,
    encryption: Option<Encryption>,
    connects: Option<Connects>,
    flow: Option<Flow>,
    goes_on: Option<GoesOn>,
    cut: Option<Cut>,
    attempts: Option<Attempts>,
    end_attempts: Option<EndAttempts>,
    shows: Option<Shows>,
}

const ONE_VERB: &str = "a step has exactly one of apply, annotate, label, scale, delete, wait, request, traffic, \
                        endTraffic, observe, exec, partition, heal, kill, pause, resume, restart, connect, \
                        disconnect, status, \
                        capture, forge, rotateKey, encryption, connects, flow, goesOn, cut, \
                        attempts, endAttempts";

impl Step {
    pub(super) fn check(step: FileStep, clusters: &[&str], dir: &Path) -> Result<Self, String> {
        let mut verbs: Vec<Verb> = Vec::new();
        verbs.extend(step.apply.map(Verb::Apply));
        verbs.extend(step.annotate.map(Verb::Annotate));
        verbs.extend(step.label.map(Verb::Label));
        verbs.extend(step.scale.map(Verb::Scale));
        verbs.extend(step.delete.map(Verb::Delete));
        verbs.extend(step.wait.map(Verb::Wait));
        verbs.extend(step.request.map(Verb::Request));
        verbs.extend(step.traffic.map(Verb::Traffic));
        verbs.extend(step.end_traffic.map(Verb::EndTraffic));
        verbs.extend(step.observe.map(Verb::Observe));
        verbs.extend(step.exec.map(Verb::Exec));
        verbs.extend(step.partition.map(Verb::Partition));
        verbs.extend(step.heal.map(|Heal {}| Verb::Heal));
        verbs.extend(step.kill.map(Verb::Kill));
        verbs.extend(step.pause.map(Verb::Pause));
        verbs.extend(step.resume.map(Verb::Resume));
        verbs.extend(step.restart.map(Verb::Restart));
        verbs.extend(step.connect.map(Verb::Connect));
        verbs.extend(step.disconnect.map(Verb::Disconnect));
        verbs.extend(step.status.map(Verb::Status));
        verbs.extend(step.capture.map(Verb::Capture));
        verbs.extend(step.forge.map(Verb::Forge));
        verbs.extend(step.rotate_key.map(Verb::RotateKey));
        verbs.extend(step.encryption.map(Verb::Encryption));
        verbs.extend(step.connects.map(Verb::Connects));
        verbs.extend(step.flow.map(Verb::Flow));
        verbs.extend(step.goes_on.map(Verb::GoesOn));
        verbs.extend(step.cut.map(Verb::Cut));
        verbs.extend(step.attempts.map(Verb::Attempts));
        verbs.extend(step.end_attempts.map(Verb::EndAttempts));
        let (Some(verb), true) = (verbs.pop(), verbs.is_empty()) else { return Err(ONE_VERB.into()) };
        verb.check(clusters, dir)?;
        if let Some(shows) = &step.shows {
            known(&shows.answers, clusters, "shows.answers")?;
        }
        let say = step.say.unwrap_or_else(|| verb.describe());
        Ok(Self { say, verb, shows: step.shows })
    }
}

impl Apply {
    pub(super) fn check(&self, clusters: &[&str], dir: &Path) -> Result<(), String> {
        known(&self.clusters, clusters, "clusters")?;
        if self.file.contains('/') || !dir.join(&self.file).is_file() {
            return Err(format!("file: there is no {} in {}", self.file, dir.display()));
        }
        Ok(())
    }
}

impl Verb {
    fn check(&self, clusters: &[&str], dir: &Path) -> Result<(), String> {
        let target = |t: &Target, field| known([&t.from.cluster], clusters, field);
        match self {
            Self::Apply(apply) => apply.check(clusters, dir).map_err(|e| format!("apply.{e}")),
            Self::Annotate(a) | Self::Label(a) => {
                known(&a.clusters, clusters, "clusters").and_then(|()| object(&a.object))
            }
            Self::Scale(s) => known(&s.clusters, clusters, "scale.clusters"),
            Self::Delete(d) => {
                known(&d.clusters, clusters, "delete.clusters").and_then(|()| object(&d.object))
            }
            Self::Wait(w) => known(&w.clusters, clusters, "wait.clusters").and_then(|()| object(&w.object)),
            Self::Request(r) => {
                known(&r.answers, clusters, "request.answers")?;
                target(&r.target, "request.target.from")
            }
            Self::Traffic(t) => {
                if !(1..=200).contains(&t.rate) {
                    return Err(format!("traffic.rate: 1 to 200 requests per second, not {}", t.rate));
                }
                target(&t.target, "traffic.target.from")
            }
            Self::Observe(o) => known(&o.answers, clusters, "observe.answers"),
            Self::Exec(e) => known([&e.pod.cluster], clusters, "exec.pod"),
            Self::Partition(p) => known([&p.from, &p.to], clusters, "partition"),
            Self::Connect(c) | Self::Disconnect(c) => {
                known(c.to.iter().chain([&c.from]), clusters, "connect")
            }
            Self::Status(s) => known([&s.cluster, &s.peer], clusters, "status"),
            Self::Capture(c) => {
                known(&c.answers, clusters, "capture.answers")?;
                target(&c.target, "capture.target.from")
            }
            Self::Forge(f) => known([&f.node.cluster, &f.source.cluster, &f.to.cluster], clusters, "forge"),
            Self::Kill(daemon) | Self::Pause(daemon) | Self::Resume(daemon) | Self::Restart(daemon) => {
                let cluster = daemon.split('/').next().unwrap_or_default().to_owned();
                known([&cluster], clusters, "the daemon's cluster")
            }
            Self::RotateKey(r) => known([&r.node.cluster], clusters, "rotateKey.node"),
            Self::Connects(c) => known([&c.from.cluster, &c.to.cluster], clusters, "connects"),
            Self::Flow(f) => known([&f.from.cluster, &f.to.cluster], clusters, "flow"),
            Self::Attempts(a) => known([&a.from.cluster, &a.to.cluster], clusters, "attempts"),
            Self::EndTraffic(_) | Self::Heal | Self::Encryption(_) => Ok(()),
            Self::GoesOn(_) | Self::Cut(_) | Self::EndAttempts(_) => Ok(()),
        }
    }

    /// For steps that say nothing of themselves.
    fn describe(&self) -> String {
        let list = |clusters: &[String]| clusters.join(" and ");
        match self {
            Self::Apply(a) => format!("apply {} to {}", a.file, list(&a.clusters)),
            Self::Annotate(a) => format!("annotate {} in {}", a.object, list(&a.clusters)),
            Self::Label(a) => format!("label {} in {}", a.object, list(&a.clusters)),
            Self::Scale(s) => format!("scale {} in {} to {}", s.deployment, list(&s.clusters), s.replicas),
            Self::Delete(d) => format!("delete {} in {}", d.object, list(&d.clusters)),
            Self::Wait(w) => match &w.until {
                Until::Gone => format!("wait until {} is gone", w.object),
                Until::Ready => format!("wait until {} is ready", w.object),
                Until::Condition(c) => format!("wait until {} has {}={}", w.object, c.condition, c.is),
            },
            Self::Request(r) => format!("{} asks {} {} times", r.target.from, r.target.service, r.count),
            Self::Traffic(t) => format!("{} asks {} all the time", t.target.from, t.target.service),
            Self::EndTraffic(e) => format!("end traffic {}", e.name),
            Self::Observe(o) => format!("watch traffic {} for {:?}", o.traffic, o.time),
            Self::Exec(e) => format!("{} in {}", e.command.join(" "), e.pod),
            Self::Partition(p) if p.one_way => format!("cut the way from {} to {}", p.from, p.to),
            Self::Partition(p) => format!("cut {} and {} off from each other", p.from, p.to),
            Self::Heal => "join what was cut".into(),
            Self::Kill(d) => format!("kill {d}"),
            Self::Pause(d) => format!("pause {d}"),
            Self::Resume(d) => format!("let {d} go on"),
            Self::Restart(d) => format!("restart {d}"),
            Self::Connect(c) => {
                format!("isthmus connect --context {} --destination-context {}", c.from, c.to.join(","))
            }
            Self::Disconnect(c) => {
                format!("isthmus disconnect --context {} --destination-context {}", c.from, c.to.join(","))
            }
            Self::Status(s) if s.connected => format!("{} is connected to {}", s.cluster, s.peer),
            Self::Status(s) => format!("{} has lost {}", s.cluster, s.peer),
            Self::Capture(c) => {
                let unseen = if c.plaintext == Plaintext::Unseen { "cannot" } else { "can" };
                format!("what {} and {} say {unseen} be read on the wire", c.target.from, c.target.service)
            }
            Self::RotateKey(r) => format!("give {} another key", r.node),
            Self::Encryption(mode) => format!("start every agent again with encryption {}", mode.as_str()),
            Self::Connects(c) => {
                let reaches = if c.expect == Expect::Allowed { "reaches" } else { "does not reach" };
                format!("{} {reaches} {} port {}", c.from, c.to, c.port)
            }
            Self::Flow(f) => format!("{} keeps a connection to {} port {}", f.from, f.to, f.port),
            Self::GoesOn(g) => format!("flow {} goes on", g.flow),
            Self::Cut(c) => format!("flow {} is cut", c.flow),
            Self::Attempts(a) => format!("{} tries to reach {} port {} all the time", a.from, a.to, a.port),
            Self::EndAttempts(e) if e.expect == Expect::Allowed => format!("no attempt of {} failed", e.name),
            Self::EndAttempts(e) => format!("no attempt of {} got through", e.name),
            Self::Forge(f) => format!("{} sends to {} in the name of {}, in vain", f.node, f.to, f.source),
        }
    }
}

/// Every mention of traffic comes while there is traffic of that name.
pub(super) fn check_traffic(steps: &[Step]) -> Result<(), String> {
    let mut running: BTreeSet<&str> = BTreeSet::new();
    for (i, step) in steps.iter().enumerate() {
        let mentioned = match &step.verb {
            Verb::Traffic(t) => {
                if !running.insert(&t.name) {
                    return Err(format!("steps[{i}].traffic.name: traffic {} runs already", t.name));
                }
                None
            }
            Verb::EndTraffic(end) => Some(&end.name),
            Verb::Observe(o) => Some(&o.traffic),
            _ => None,
        };
        for name in mentioned.into_iter().chain(step.shows.as_ref().map(|s| &s.traffic)) {
            if !running.contains(name.as_str()) {
                return Err(format!(
                    "steps[{i}]: no traffic {name} runs by then; a step `traffic` starts it"
                ));
            }
        }
        if let Verb::EndTraffic(end) = &step.verb {
            running.remove(end.name.as_str());
        }
    }
    Ok(())
}

/// Every mention of a flow, or of attempts, comes while there are some of that name.
pub(super) fn check_flows(steps: &[Step]) -> Result<(), String> {
    let mut running: BTreeSet<(&str, &str)> = BTreeSet::new();
    for (i, step) in steps.iter().enumerate() {
        let (what, name, begins, ends) = match &step.verb {
            Verb::Flow(flow) => ("flow", &flow.name, true, false),
            Verb::GoesOn(goes_on) => ("flow", &goes_on.flow, false, false),
            Verb::Cut(cut) => ("flow", &cut.flow, false, true),
            Verb::Attempts(attempts) => ("attempts", &attempts.name, true, false),
            Verb::EndAttempts(end) => ("attempts", &end.name, false, true),
            _ => continue,
        };
        let known = running.contains(&(what, name.as_str()));
        match (begins, known) {
            (true, true) => return Err(format!("steps[{i}].{what}.name: {what} {name} runs already")),
            (true, false) => drop(running.insert((what, name))),
            (false, false) => {
                return Err(format!("steps[{i}]: no {what} {name} runs by then; a step `{what}` starts it"));
            }
            (false, true) if ends => drop(running.remove(&(what, name.as_str()))),
            (false, true) => {}
        }
    }
    Ok(())
}

fn known<'a>(
    named: impl IntoIterator<Item = &'a String>,
    clusters: &[&str],
    field: &str,
) -> Result<(), String> {
    match named.into_iter().find(|n| !clusters.contains(&n.as_str())) {
        Some(stranger) => {
            Err(format!("{field}: there is no cluster {stranger:?}, only {}", clusters.join(", ")))
        }
        None => Ok(()),
    }
}

fn object(text: &str) -> Result<(), String> {
    match text.split_once('/') {
        Some((kind, name)) if !name.is_empty() && !name.contains('/') => crate::runner::kind(kind).map(drop),
        _ => Err(format!("object: {text:?} is none: write KIND/NAME, like service/rebel-base")),
    }
}
