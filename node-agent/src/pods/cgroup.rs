//! From a pod's UID to a process of it: the cgroup that the kubelet made for the pod, in each of the kubelet's layouts.
//!
//! | driver | where, below the cgroup root |
//! |---|---|
//! | cgroupfs | `kubepods[/burstable|/besteffort]/pod<uid>/<container>` |
//! | systemd | `kubepods.slice[/kubepods-<qos>.slice]/kubepods[-<qos>]-pod<uid with _>.slice/<container>.scope` |
//!
//! Either may stand below the kubelet's own root (`--cgroup-root`), as in kind: `kubelet/kubepods/...` and
//! `kubelet.slice/kubelet-kubepods.slice/...`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

const CLASSES: [&str; 3] = ["besteffort", "burstable", ""];
/// A pod has one level of containers, and containers may make cgroups of their own.
const DEPTH: usize = 3;
/// Bytes of a `cgroup.procs` that are looked at: one process is enough.
const PROCS_BYTES: u64 = 4096;

/// The pod's directory, if the kubelet has made it.
pub(super) fn pod_directory(root: &Path, uid: &str) -> Option<PathBuf> {
    // The UID comes from the Kubernetes API and becomes part of a path.
    let plain = !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !plain {
        return None;
    }
    candidates(uid).map(|candidate| root.join(candidate)).find(|path| path.is_dir())
}

/// Processes of the pod, as few as answer the question where it lives.
pub(super) fn processes(pod: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    collect(pod, DEPTH, &mut found);
    found
}

fn candidates(uid: &str) -> impl Iterator<Item = PathBuf> {
    let underscored = uid.replace('-', "_");
    let cgroupfs =
        |root: &str, class: &str| Path::new(root).join("kubepods").join(class).join(format!("pod{uid}"));
    let systemd = |root: &str, class: &str| {
        let prefix = if root.is_empty() { String::new() } else { format!("{root}-") };
        let top = format!("{prefix}kubepods.slice");
        let (middle, name) = if class.is_empty() {
            (String::new(), format!("{prefix}kubepods-pod{underscored}.slice"))
        } else {
            (
                format!("{prefix}kubepods-{class}.slice"),
                format!("{prefix}kubepods-{class}-pod{underscored}.slice"),
            )
        };
        let below = if root.is_empty() { PathBuf::new() } else { PathBuf::from(format!("{root}.slice")) };
        below.join(top).join(middle).join(name)
    };
    let all: Vec<_> = ["", "kubelet"]
        .into_iter()
        .flat_map(|root| {
            CLASSES.into_iter().flat_map(move |class| [(root, class, false), (root, class, true)])
        })
        .map(|(root, class, slices)| if slices { systemd(root, class) } else { cgroupfs(root, class) })
        .collect();
    all.into_iter()
}

fn collect(directory: &Path, depth: usize, found: &mut Vec<u32>) {
    // In a threaded cgroup only threads are listed; any of them leads to the same place. A cgroup may also go while it
    // is looked at; others may still answer.
    let text =
        ["cgroup.procs", "cgroup.threads"].iter().find_map(|file| read_some(&directory.join(file)).ok());
    let ids = text.iter().flat_map(|text| text.lines());
    found.extend(ids.filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, found);
        }
    }
}

fn read_some(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(PROCS_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a1b2c3d-0000-4000-8000-000000000001";

    #[test]
    fn each_layout_of_the_kubelet_is_found() {
        for path in [
            "kubepods/burstable/pod0a1b2c3d-0000-4000-8000-000000000001/container",
            "kubepods/pod0a1b2c3d-0000-4000-8000-000000000001/container",
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0a1b2c3d_0000_4000_8000_000000000001.slice/cri-containerd-1.scope",
            "kubepods.slice/kubepods-pod0a1b2c3d_0000_4000_8000_000000000001.slice/crio-1.scope",
            "kubelet/kubepods/besteffort/pod0a1b2c3d-0000-4000-8000-000000000001/container",
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod0a1b2c3d_0000_4000_8000_000000000001.slice/cri-containerd-1.scope",
        ] {
            let root = tempfile::tempdir().expect("a folder");
            let container = root.path().join(path);
            fs::create_dir_all(&container).expect("a folder");
            fs::write(container.join("cgroup.procs"), "0\n4711\n4712\n").expect("a file");
            let pod = pod_directory(root.path(), UID).unwrap_or_else(|| panic!("{path} is not found"));
            assert_eq!(processes(&pod), [4711, 4712], "{path}");
        }
    }

    #[test]
    fn a_uid_is_no_path() {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(root.path().join("kubepods/podx")).expect("a folder");
        assert_eq!(pod_directory(root.path(), "x/../podx"), None);
        assert_eq!(pod_directory(root.path(), ""), None);
    }
}
