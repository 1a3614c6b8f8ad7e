//! `cargo xtask kustomize`: renders the installation in every way it is meant to be put together, and looks for what the
//! Kubernetes API would take and nobody would want: a flag that its program does not know, a Secret that nobody makes, a
//! selector that selects nothing, a container with rights that it was never to have, members that would not believe each other.
//!
//! That each object is well-formed is for the API to say: `lab/kube-api/tests/kustomize.rs` hands all of them to one.

mod comments;
mod members;
mod object;
mod pods;
mod programs;
mod rbac;
mod references;
mod render;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

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
