//! From a process of a pod to the host's side of the pod's interfaces.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

/// Why a pod's interfaces are not known (yet).
#[derive(Debug, thiserror::Error)]
pub(super) enum VethError {
    /// The namespace cannot be used.
    #[error("{path}: {source}")]
    Namespace {
        /// The namespace's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The interfaces cannot be listed.
    #[error("cannot list network interfaces: {0}")]
    Netlink(#[from] rtnetlink::Error),
    /// No socket, or no thread.
    #[error("cannot look into the pod's network namespace: {0}")]
    System(#[from] io::Error),
    /// Nothing to attach to.
    #[error(
        "the pod has no veth whose other end is on this node (yet); where the CNI uses another kind of interface, sockets are still balanced"
    )]
    NoVeth,
}

/// An interface by index, and the index of its other end in that end's namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Veth {
    index: u32,
    peer: u32,
}

/// Whether the process lives in the network namespace of this one.
pub(super) fn shares_host_network(proc_root: &Path, pid: u32) -> io::Result<bool> {
    let id = |path: PathBuf| std::fs::metadata(path).map(|namespace| (namespace.dev(), namespace.ino()));
    Ok(id(namespace(proc_root, pid))? == id(PathBuf::from("/proc/self/ns/net"))?)
}

/// Indices, in this process' namespace, of the other ends of the veths in the namespace of `pid`.
pub(super) async fn host_sides(proc_root: &Path, pid: u32) -> Result<Vec<u32>, VethError> {
    let path = namespace(proc_root, pid);
    let file = File::open(&path).map_err(|source| VethError::Namespace { path: path.clone(), source })?;
    let inside = in_namespace(file, path).await?;
    let outside = veths().await?;
    // Both must point at each other, or an index of another namespace is taken for one of ours.
    let points_back =
        |inner: &Veth| outside.iter().any(|outer| outer.index == inner.peer && outer.peer == inner.index);
    let found: Vec<u32> = inside.iter().filter(|veth| points_back(veth)).map(|veth| veth.peer).collect();
    if found.is_empty() { Err(VethError::NoVeth) } else { Ok(found) }
}

/// Whether there still is such an interface in this process' namespace.
pub(super) fn exists(index: u32) -> bool {
    // nix 0.31 takes the null pointer of an index that is gone for an empty name.
    nix::net::if_::if_indextoname(index).is_ok_and(|name| !name.is_empty())
}

fn namespace(proc_root: &Path, pid: u32) -> PathBuf {
    proc_root.join(pid.to_string()).join("ns/net")
}

/// The veths in another namespace, listed on a thread of their own, which enters the namespace and then ends: a thread
/// of the runtime must never be left in one.
async fn in_namespace(file: File, path: PathBuf) -> Result<Vec<Veth>, VethError> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("pod-netns".to_owned()).spawn(move || {
        let list = || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|errno| VethError::Namespace { path, source: errno.into() })?;
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(veths())
        };
        // Who has asked may have given up.
        let _ = answer.send(list());
    })?;
    answered.await.map_err(|_| io::Error::other("the thread that lists interfaces has ended"))?
}

async fn veths() -> Result<Vec<Veth>, VethError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let links: Result<Vec<LinkMessage>, _> = handle.link().get().execute().try_collect().await;
    connection.abort();
    Ok(links?.iter().filter_map(veth).collect())
}

fn veth(link: &LinkMessage) -> Option<Veth> {
    let is_veth = link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    });
    let peer = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(peer) => Some(*peer),
        _ => None,
    });
    is_veth.then_some(Veth { index: link.header.index, peer: peer? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_gone_is_not_taken_for_one_that_is_there() {
        let loopback = nix::net::if_::if_nametoindex("lo").expect("every namespace has it");
        assert!(exists(loopback));
        assert!(!exists(i32::MAX as u32));
    }
}
