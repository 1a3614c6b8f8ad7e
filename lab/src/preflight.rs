//! Says what a machine lacks, all of it at once, before anything is made.

use std::fs;
use std::path::Path;

use crate::error::{LabError, Result};
use crate::{cgroup, programs};

/// Which programs a lab will need besides ours.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// Debian's etcd behind each clustermesh-apiserver.
    pub etcd: bool,
    /// `curl` in the pods.
    pub curl: bool,
    /// A WireGuard device on each node.
    pub encryption: bool,
}

/// Checks the machine.
///
/// # Errors
/// [`LabError::Missing`], one line for each thing, each with what to do.
pub fn check(needs: Needs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(LabError::Missing(
            "  it makes network namespaces and loads eBPF programs, which takes root: run it with sudo"
                .into(),
        ));
    }
    let mut missing = Vec::new();
    let mut note = |result: Result<()>| {
        if let Err(e) = result {
            missing.push(match e {
                LabError::Missing(line) => line,
                other => format!("  {other}"),
            });
        }
    };
    note(cgroup::mount_point().map(drop));
    note(cgroup_kill());
    note(file("/proc/self/ns/net", "network namespaces (CONFIG_NET_NS)"));
    note(file("/sys/kernel/btf/vmlinux", "BTF (CONFIG_DEBUG_INFO_BTF)"));
    note(file_system("bpf", "the bpf file system (CONFIG_BPF_SYSCALL)"));
    note(veth());
    for program in [programs::LAB_POD, programs::KUBE_API, programs::APISERVER, programs::NODE_AGENT] {
        note(programs::ours(program).map(drop));
    }
    note(programs::machines("setpriv", "util-linux").map(drop));
    if needs.encryption {
        note(programs::ours(programs::WIREGUARD).map(drop));
        note(file("/dev/net/tun", "TUN devices (CONFIG_TUN)"));
    }
    if needs.etcd {
        note(programs::machines("etcd", "etcd-server").map(drop));
    }
    if needs.curl {
        note(programs::machines("curl", "curl").map(drop));
    }
    if missing.is_empty() { Ok(()) } else { Err(LabError::Missing(missing.join("\n"))) }
}

fn file(path: &str, what: &str) -> Result<()> {
    if Path::new(path).exists() { Ok(()) } else { Err(lacks(&format!("{what}: there is no {path}"))) }
}

fn file_system(name: &str, what: &str) -> Result<()> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let found = known.lines().any(|line| line.split_ascii_whitespace().last() == Some(name));
    if found { Ok(()) } else { Err(lacks(what)) }
}

/// Ending a lab's processes by their cgroup came with Linux 5.14.
fn cgroup_kill() -> Result<()> {
    let Ok(root) = cgroup::mount_point() else { return Ok(()) };
    let probe = root.join(format!("isthmus-preflight-{}", std::process::id()));
    fs::create_dir(&probe).map_err(|e| {
        LabError::Missing(format!(
            "  no cgroup can be made below {}: {e}. In a container, run it privileged",
            root.display()
        ))
    })?;
    let found = probe.join("cgroup.kill").exists();
    let _ = fs::remove_dir(&probe);
    if found { Ok(()) } else { Err(lacks("cgroup.kill, which Linux has since 5.14")) }
}

/// Tries one in a namespace that ends with the thread.
fn veth() -> Result<()> {
    let tried = std::thread::spawn(|| -> Result<(), String> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("a network namespace: {e}"))?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(|e| format!("rtnetlink: {e}"))?;
            tokio::spawn(connection);
            let add = handle.link().add(rtnetlink::LinkVeth::new("a", "b").build()).execute().await;
            add.map_err(|e| format!("a veth pair (CONFIG_VETH): {e}"))?;
            let add = handle.link().add(rtnetlink::LinkBridge::new("c").build()).execute().await;
            add.map_err(|e| format!("a bridge (CONFIG_BRIDGE): {e}"))
        })
    });
    match tried.join() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(what)) => Err(lacks(&what)),
        Err(_) => Err(lacks("network namespaces")),
    }
}

fn lacks(what: &str) -> LabError {
    LabError::Missing(format!(
        "  the kernel lacks {what}. Debian 12's own kernel has it; in a container, run it privileged"
    ))
}
