//! Runs a program where a lab wants it, and holds the few programs that the lab's images contain.
//!
//! `lab-pod run --netns PATH --cgroup PATH [--hostname NAME] [--parent PID] -- PROGRAM ARGS...` joins the cgroup and
//! the network namespace and becomes the program: what a container runtime's shim does on a real node. Doing it in the
//! child, after the exec, needs no unsafe code between fork and exec in the lab's many-threaded process.
//!
//! `lab-pod echo [--port N]` answers HTTP with the names of its cluster, node and pod, which it knows from its
//! environment. `lab-pod ask ADDRESS` asks such a one over a single connection, again and again, and writes a line for each
//! answer; it fails when there is none for five seconds. `lab-pod knock ADDRESS` connects again and again, and writes `made` or
//! `denied` for each attempt. `lab-pod pause` sleeps until it is told to end.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let verb = args.next().unwrap_or_default();
    let result = match verb.to_str() {
        Some("run") => run(args),
        Some("echo") => isthmus_lab::images::echo(args),
        Some("ask") => isthmus_lab::images::ask(args),
        Some("knock") => isthmus_lab::images::knock(args),
        Some("pause") => isthmus_lab::images::pause(),
        _ => Err(anyhow::anyhow!("usage: lab-pod run|echo|ask|knock|pause (part of `isthmus lab`)")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            #[expect(clippy::print_stderr, reason = "the answer of a command-line program")]
            {
                eprintln!("lab-pod: {e:#}");
            }
            // What shells answer when a command cannot be started.
            ExitCode::from(127)
        }
    }
}

/// Never returns when all goes well: the process has become another.
fn run(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let (mut netns, mut cgroup, mut hostname, mut parent) = (None, None, None, None);
    loop {
        let flag = args.next().context("no program given after `--`")?;
        match flag.to_str() {
            Some("--") => break,
            Some("--netns") => netns = args.next().map(PathBuf::from),
            Some("--cgroup") => cgroup = args.next().map(PathBuf::from),
            Some("--hostname") => hostname = args.next(),
            Some("--parent") => parent = args.next(),
            _ => bail!("unknown flag {flag:?}"),
        }
    }
    let program = args.next().context("no program given after `--`")?;
    if let Some(parent) = parent {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
            .context("asking to end with the lab")?;
        let parent: i32 =
            parent.to_str().and_then(|p| p.parse().ok()).context("--parent is no process id")?;
        if nix::unistd::getppid().as_raw() != parent {
            bail!("the lab ended meanwhile");
        }
    }
    if let Some(cgroup) = cgroup {
        let procs = cgroup.join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("joining {}", procs.display()))?;
    }
    if let Some(netns) = netns {
        let file = File::open(&netns).with_context(|| format!("opening {}", netns.display()))?;
        nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering {}", netns.display()))?;
    }
    if let Some(hostname) = hostname {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS).context("making a UTS namespace")?;
        nix::unistd::sethostname(hostname).context("setting the hostname")?;
    }
    let error = Command::new(&program).args(args).exec();
    Err(error).with_context(|| format!("starting {}", program.display()))
}
