//! Clears away whatever a lab left, however it ended.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup;
use crate::error::{Doing, Result};
use crate::names::{LabName, STATE_ROOT};
use crate::netns::{self, NETNS_DIR};
use crate::state::StateDir;

/// Everything of a lab that is still there: empty when it has been cleared away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remains {
    /// Processes in its cgroup.
    pub processes: Vec<i32>,
    /// Its cgroups, the outermost first.
    pub cgroups: Vec<PathBuf>,
    /// Its network namespaces.
    pub namespaces: Vec<PathBuf>,
    /// Its mounts.
    pub mounts: Vec<PathBuf>,
    /// Its state folder.
    pub state: Vec<PathBuf>,
}

impl Remains {
    /// What there is of the lab of this name.
    pub fn of(lab: &LabName) -> Self {
        let mut remains = Self::default();
        if let Ok(root) = cgroup::mount_point() {
            walk(&root.join(lab.cgroup()), &mut remains);
        }
        remains.namespaces = namespaces(lab);
        remains.mounts = mounts_below(&lab.state_dir());
        if lab.state_dir().exists() {
            remains.state.push(lab.state_dir());
        }
        remains
    }

    /// Whether nothing is left.
    pub fn none(&self) -> bool {
        *self == Self::default()
    }
}

/// Ends the lab of this name, wherever it runs, and removes what it left. Returns what it found.
///
/// # Errors
/// When something cannot be removed; the rest has been, and another try may go further.
pub async fn down(lab: &LabName) -> Result<Remains> {
    let found = Remains::of(lab);
    if let Ok(state) = StateDir::of(lab).read()
        && state.supervisor.alive()
        && state.supervisor.pid != std::process::id() as i32
    {
        let _ = kill(Pid::from_raw(state.supervisor.pid), Signal::SIGTERM);
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
        while state.supervisor.alive() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        if state.supervisor.alive() {
            let _ = kill(Pid::from_raw(state.supervisor.pid), Signal::SIGKILL);
        }
    }
    let lab = lab.clone();
    tokio::task::spawn_blocking(move || sweep(&lab)).await.unwrap_or(Ok(()))?;
    Ok(found)
}

/// Removes processes, cgroups, namespaces, mounts and state of a lab, in this order; what is not there is no error.
/// Blocks for as long as processes take to go.
///
/// # Errors
/// The first thing that could not be removed; the others have been tried.
pub fn sweep(lab: &LabName) -> Result<()> {
    let mut outcome = Ok(());
    let mut note = |result: Result<()>| {
        if outcome.is_ok() {
            outcome = result;
        }
    };
    if let Ok(root) = cgroup::mount_point() {
        note(cgroup::destroy_blocking(&root.join(lab.cgroup())));
    }
    for path in namespaces(lab) {
        note(netns::remove_path(&path));
    }
    // The innermost first.
    for mount in mounts_below(&lab.state_dir()).into_iter().rev() {
        note(umount2(&mount, MntFlags::MNT_DETACH).doing(|| format!("unmounting {}", mount.display())));
    }
    match fs::remove_dir_all(lab.state_dir()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            note(Err(e).doing(|| format!("removing {}", lab.state_dir().display())));
        }
        _ => {}
    }
    // Only when no other lab is there.
    let _ = fs::remove_dir(STATE_ROOT);
    outcome
}

/// Names of labs that left something, with a state folder or without.
pub fn leftovers() -> Vec<LabName> {
    let mut names = crate::state::labs();
    let mut add = |name: Option<&str>| {
        if let Some(Ok(name)) = name.map(str::parse::<LabName>)
            && !names.contains(&name)
        {
            names.push(name);
        }
    };
    for entry in fs::read_dir(NETNS_DIR).into_iter().flatten().flatten() {
        let name = entry.file_name();
        add(name.to_str().and_then(|n| n.strip_prefix("isthmus-")).and_then(|n| n.split('.').next()));
    }
    if let Ok(root) = cgroup::mount_point() {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            add(entry.file_name().to_str().and_then(|n| n.strip_prefix("isthmus-")));
        }
    }
    names.sort();
    names
}

fn namespaces(lab: &LabName) -> Vec<PathBuf> {
    let prefix = lab.netns_prefix();
    let mut found: Vec<PathBuf> = fs::read_dir(NETNS_DIR)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    below.filter(|path| path.starts_with(dir)).collect()
}

fn walk(cgroup: &Path, remains: &mut Remains) {
    let Ok(entries) = fs::read_dir(cgroup) else { return };
    remains.cgroups.push(cgroup.to_owned());
    remains.processes.extend(cgroup::processes(cgroup));
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        walk(&entry.path(), remains);
    }
}
