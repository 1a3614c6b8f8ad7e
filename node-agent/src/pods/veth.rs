//! From a process of a pod to the host's side of the pod's interfaces.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_route::address::AddressAttribute;
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

/// One of a pod's interfaces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct PodInterface {
    /// Index of the host's side, in this process' namespace.
    pub(super) host: u32,
    /// Hardware address of the pod's side.
    pub(super) pod_mac: [u8; 6],
    /// Hardware address of the host's side.
    pub(super) host_mac: [u8; 6],
    /// Addresses that it has in the pod.
    pub(super) addresses: Vec<IpAddr>,
}

/// An interface by index, and the index of its other end in that end's namespace.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Veth {
    index: u32,
    peer: u32,
    mac: [u8; 6],
    addresses: Vec<IpAddr>,
}

/// Whether the process lives in the network namespace of this one.
pub(super) fn shares_host_network(proc_root: &Path, pid: u32) -> io::Result<bool> {
    let id = |path: PathBuf| std::fs::metadata(path).map(|namespace| (namespace.dev(), namespace.ino()));
    Ok(id(namespace(proc_root, pid))? == id(PathBuf::from("/proc/self/ns/net"))?)
}

/// The veths in the namespace of `pid` whose other ends are in this process' namespace.
pub(super) async fn of_process(proc_root: &Path, pid: u32) -> Result<Vec<PodInterface>, VethError> {
    let path = namespace(proc_root, pid);
    let file = File::open(&path).map_err(|source| VethError::Namespace { path: path.clone(), source })?;
    let inside = in_namespace(file, path).await?;
    let outside = veths().await?;
    // Both must point at each other, or an index of another namespace is taken for one of ours.
    let host_side =
        |inner: &Veth| outside.iter().find(|outer| outer.index == inner.peer && outer.peer == inner.index);
    let found: Vec<PodInterface> = inside
        .into_iter()
        .filter_map(|veth| {
            let host = host_side(&veth)?;
            Some(PodInterface {
                host: host.index,
                pod_mac: veth.mac,
                host_mac: host.mac,
                addresses: veth.addresses,
            })
        })
        .collect();
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
    let read = async {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
        let mut veths: Vec<Veth> = links.iter().filter_map(veth).collect();
        let mut addresses = handle.address().get().execute();
        while let Some(message) = addresses.try_next().await? {
            let veth = veths.iter_mut().find(|veth| veth.index == message.header.index);
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            if let (Some(veth), Some(address)) = (veth, address) {
                veth.addresses.push(address);
            }
        }
        Ok::<_, rtnetlink::Error>(veths)
    };
    let veths = read.await;
    connection.abort();
    Ok(veths?)
}

fn veth(link: &LinkMessage) -> Option<Veth> {
    let is_veth = link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    });
    let peer = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(peer) => Some(*peer),
        _ => None,
    });
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    });
    is_veth.then_some(Veth { index: link.header.index, peer: peer?, mac: mac?, addresses: Vec::new() })
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
