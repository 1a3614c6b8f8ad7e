//! `cargo xtask kustomize`: renders the installation in every way it is meant to be put together, and looks for what the
//! Kubernetes API would take and nobody would want: a flag that its program does not know, a Secret that nobody makes, a
//! selector that selects nothing, a container with rights that it was never to have, members that would not believe each other.
//!
//! That each object is well-formed is for the API to say: `lab/kube-api/tests/kustomize.rs` hands all of them to one.

mod comments;
mod compositions;
mod members;
mod object;
mod pods;
mod programs;
mod rbac;
mod references;
mod render;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, anyhow, bail};

use self::object::Objects;
use self::programs::Programs;

/// Render kustomize/ in every way it is put together, and check the results
#[derive(clap::Args)]
pub(crate) struct Kustomize {
    /// Folder with our programs, which read the flags; by default that of this program
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

/// Something to be put right.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// Kind and name of the object, or a file.
    at: String,
    problem: String,
}

impl Finding {
    fn new(at: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { at: at.into(), problem: problem.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.problem)
    }
}

impl Kustomize {
    pub(crate) fn run(&self, workspace: &Path) -> anyhow::Result<()> {
        let bin_dir = match &self.bin_dir {
            Some(dir) => dir.clone(),
            None => std::env::current_exe()?.parent().context("this program has no folder")?.to_owned(),
        };
        let programs = Programs::in_folder(&bin_dir);
        programs.require()?;
        let known = rbac::Known::new(workspace)?;
        let mut findings = Vec::new();
        for example in render::examples(workspace)? {
            let objects = render::render(workspace, &example)?;
            let found = check(&objects, &programs, &known)?;
            findings.extend(found.into_iter().map(|f| format!("{example}: {f}")));
        }
        findings.extend(together(workspace, &programs, &known)?);
        findings.extend(compositions::undescribed(workspace)?.iter().map(ToString::to_string));
        findings.extend(render::unused_components(workspace)?.iter().map(ToString::to_string));
        let unnamed = render::render(workspace, render::BASE)?;
        let accepted = programs.accepts_unnamed(&unnamed)?;
        findings.extend(accepted.iter().map(|f| format!("{}: {f}", render::BASE)));
        findings.extend(comments::missing(workspace)?.iter().map(ToString::to_string));
        if findings.is_empty() {
            return Ok(());
        }
        bail!("kustomize/ is not right:\n  {}", findings.join("\n  "));
    }
}

/// What there is to say about compositions that nobody has written down. There are dozens, and rendering takes most of the time, so
/// several are rendered at once.
fn together(workspace: &Path, programs: &Programs, known: &rbac::Known) -> anyhow::Result<Vec<String>> {
    let all = compositions::all(workspace)?;
    let next = AtomicUsize::new(0);
    let work = || {
        let mut findings = Vec::new();
        while let Some(composition) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let folder = composition.write(workspace)?;
            match render::render(workspace, &folder) {
                Ok(objects) => {
                    let found = check(&objects, programs, known)?;
                    findings.extend(found.into_iter().map(|f| format!("{composition}: {f}")));
                }
                Err(error) => findings.push(format!("{composition}: {error}")),
            }
        }
        anyhow::Ok(findings)
    };
    let at_once = thread::available_parallelism().map_or(1, usize::from);
    let findings = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| {
            worker.join().map_err(|_| anyhow!("a check panicked"))?
        };
        workers.into_iter().map(join).collect::<anyhow::Result<Vec<_>>>()
    })?;
    let mut findings: Vec<String> = findings.into_iter().flatten().collect();
    findings.sort();
    Ok(findings)
}

/// Everything that can be said about one composition.
fn check(objects: &Objects, programs: &Programs, known: &rbac::Known) -> anyhow::Result<Vec<Finding>> {
    let mut findings = pods::check(objects);
    findings.extend(references::check(objects));
    findings.extend(members::check(objects));
    findings.extend(rbac::check(objects, known));
    findings.extend(programs.check(objects)?);
    findings.sort();
    findings.dedup();
    Ok(findings)
}
