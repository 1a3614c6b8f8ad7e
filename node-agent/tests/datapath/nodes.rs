//! Two nodes with a pod each. Between them is a wire, and a pair of TUN devices that stand for WireGuard: what goes into
//! one comes out of the other, and is written down.
//!
//! ```text
//! pod 10.0.1.2 ── host1 [node 1] under ═══ the wire, 172.20.0.0/24 ═══ under [node 2] host2 ── pod 10.0.2.2
//!                              isthmus_wg0 ──────── the test ──────── isthmus_wg0
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use isthmus_bpf_abi::{Addr, Counter, IpcacheEntry, IpcacheKey, LocalPod, ipcache_flags};
use isthmus_node_agent::datapath::{Datapath, EncryptionDevice, EncryptionMode, Features, MapOp, routing};
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket};

use crate::model::apply;
use crate::pods::Pod;
use crate::sandbox::{Namespace, Sandbox, ip, until_local};

pub(crate) const MTU: u32 = 1420;
const DEVICE: &str = "isthmus_wg0";
const WIRE: &str = "under";

pub(crate) struct Node {
    pub(crate) datapath: Datapath,
    pub(crate) pod: Pod,
    pub(crate) namespace: Namespace,
    number: u8,
}

/// Both nodes, joined by the wire; encryption is off.
pub(crate) fn two_nodes(sandbox: &Sandbox, features: Features) -> [Node; 2] {
    let nodes = [Node::new(sandbox, 1, features), Node::new(sandbox, 2, features)];
    let [first, second] = &nodes;
    first
        .namespace
        .run(|| ip(&format!("link add {WIRE} type veth peer name {WIRE} netns {}", second.namespace.path())));
    for (node, other) in [(first, second), (second, first)] {
        let (own, far) = (node.number, other.number);
        node.namespace.run(|| {
            ip(&format!("addr add 172.20.0.{own}/24 dev {WIRE}"));
            ip(&format!("addr add fd00:20::{own}/64 dev {WIRE} nodad"));
            ip(&format!("link set {WIRE} up"));
            ip(&format!("route add 10.0.{far}.0/24 via 172.20.0.{far}"));
            ip(&format!("-6 route add fd00:{far}::/64 via fd00:20::{far}"));
        });
        node.knows(other, 255);
    }
    for node in &nodes {
        node.namespace.run(|| until_local(&format!("fd00:20::{}", node.number)));
    }
    nodes
}

impl Node {
    fn new(sandbox: &Sandbox, number: u8, features: Features) -> Self {
        let namespace = Namespace::new();
        let datapath = sandbox.datapath_with(|config| {
            config.pin_dir.set_file_name(format!("node{number}"));
            config.features = features;
        });
        let (pod_mac, host_mac) = ([2, 0, 0, 0, number, 2], [2, 0, 0, 0, number, 1]);
        let pod = namespace.run(|| {
            let set = |setting: &str, value: &str| {
                fs::write(format!("/proc/sys/net/{setting}"), value).expect("a setting");
            };
            set("ipv4/ip_forward", "1");
            set("ipv6/conf/all/forwarding", "1");
            set("ipv6/conf/default/accept_dad", "0");
            // As some distributions have it: the device must do with it.
            set("ipv4/conf/all/rp_filter", "1");
            let pod = Pod::new(u32::from(number));
            ip(&format!("link set host{number} address {}", mac(host_mac)));
            pod.namespace.run(|| ip(&format!("link set eth0 address {}", mac(pod_mac))));
            pod
        });
        let place = LocalPod { ifindex: pod.host_index, pod_mac, host_mac };
        for addr in pod_addrs(number) {
            datapath.put_local_pod(addr, place).expect("a pod");
        }
        let node = Self { datapath, pod, namespace, number };
        node.namespace.run(|| node.datapath.attach_pod(node.pod.host_index).expect("attach"));
        node
    }

    /// The other node's pod, by the range that it is in.
    pub(crate) fn knows(&self, other: &Self, key: u8) {
        let host = IpAddr::from(Ipv4Addr::new(172, 20, 0, other.number));
        let entry = IpcacheEntry {
            identity: 2,
            host: Addr::from(host),
            cluster: 0,
            key,
            flags: ipcache_flags::HAS_HOST,
        };
        let [v4, v6] = pod_addrs(other.number);
        let keys = [IpcacheKey::host(v4), IpcacheKey::new(prefix(v6), 64)];
        apply(&self.datapath, &keys.map(|key| MapOp::PutIpcache { key, entry }));
    }

    /// A device, up, and the descriptor that is its other side. It goes when that is closed.
    pub(crate) fn device(&self) -> (EncryptionDevice, File) {
        self.namespace.run(|| {
            let file = tun(DEVICE).expect("a TUN device");
            ip(&format!("link set {DEVICE} mtu {MTU} up"));
            let ifindex = nix::net::if_::if_nametoindex(DEVICE).expect("the device");
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            // Twice: it must not mind what is there.
            for _ in 0..2 {
                runtime
                    .block_on(routing::ensure(ifindex, std::path::Path::new("/proc/sys/net")))
                    .expect("a way to the device");
            }
            (EncryptionDevice { ifindex, mtu: MTU }, file)
        })
    }

    pub(crate) fn encrypt(&self, device: Option<EncryptionDevice>, strict: bool) {
        self.set(EncryptionMode::On { device, strict });
    }

    pub(crate) fn set(&self, mode: EncryptionMode) {
        self.namespace.run(|| self.datapath.set_encryption(mode).expect("set"));
    }

    /// Watches over whatever leaves this node.
    pub(crate) fn watch_over(&self) {
        self.namespace.run(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let outward = runtime.block_on(routing::outward()).expect("interfaces");
            assert_eq!(outward, [nix::net::if_::if_nametoindex(WIRE).expect("the wire")]);
            self.datapath.watch_over(&outward).expect("attach");
        });
    }

    pub(crate) fn count(&self, wanted: Counter) -> u64 {
        let counters = self.datapath.counters().expect("counters");
        counters.into_iter().find(|(known, _)| *known == wanted).expect("every counter is there").1
    }

    /// Begins to look at the wire.
    pub(crate) fn sniff(&self) -> Sniffer {
        self.namespace.run(|| {
            let flags = SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll);
            let wire = nix::net::if_::if_nametoindex(WIRE).expect("the wire");
            Sniffer { socket: socket.expect("a packet socket"), wire }
        })
    }
}

/// The addresses of node `number`'s pod.
pub(crate) fn pod_addrs(number: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 0, number, 2).into(), Ipv6Addr::new(0xfd00, number.into(), 0, 0, 0, 0, 0, 2).into()]
}

fn prefix(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V6(addr) => Ipv6Addr::from_bits(addr.to_bits() & !0xffff).into(),
        v4 => v4,
    }
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// What is sent over the wire.
pub(crate) struct Sniffer {
    socket: OwnedFd,
    wire: u32,
}

impl Sniffer {
    /// IP packets from or to a pod, in the clear, since it was asked last.
    pub(crate) fn plain(&self) -> usize {
        let mut buffer = [0; 65_536];
        let mut plain = 0;
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((len, Some(from))) if from.ifindex() == self.wire as usize => {
                    plain += usize::from(is_of_a_pod(&buffer[..len]));
                }
                Ok(_) => {}
                Err(nix::Error::EAGAIN) => return plain,
                Err(error) => panic!("looking at the wire: {error}"),
            }
        }
    }
}

fn is_of_a_pod(packet: &[u8]) -> bool {
    let pods = [1, 2].map(pod_addrs);
    let ends: [IpAddr; 2] = match packet.first().map(|byte| byte >> 4) {
        Some(4) => [12, 16].map(|at| <[u8; 4]>::try_from(&packet[at..at + 4]).expect("four bytes").into()),
        Some(6) => [8, 24].map(|at| <[u8; 16]>::try_from(&packet[at..at + 16]).expect("sixteen").into()),
        _ => return false,
    };
    ends.iter().any(|end| pods.iter().flatten().any(|pod| pod == end))
}

/// Joins two devices.
pub(crate) struct Pipe {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pipe {
    pub(crate) fn new(first: File, second: File) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let ends = [(first.try_clone(), second.try_clone()), (Ok(second), Ok(first))];
        let threads = ends.map(|(from, to)| {
            let (mut from, mut to) = (from.expect("a descriptor"), to.expect("a descriptor"));
            let (stop, seen) = (stop.clone(), seen.clone());
            thread::spawn(move || {
                let mut buffer = [0; 65_536];
                loop {
                    let Ok(len) = read(&mut from, &mut buffer) else {
                        // What is under way arrives before it ends: nobody waits for ever for the end of a connection.
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        continue;
                    };
                    let packet = &buffer[..len];
                    // The beginning is enough to tell what it was.
                    let mut head = packet[..len.min(48)].to_vec();
                    head.resize(len, 0);
                    seen.lock().expect("no panic").push(head);
                    to.write_all(packet).expect("the other device takes it");
                }
            })
        });
        Self { stop, seen, threads: threads.into() }
    }

    /// The packets so far.
    pub(crate) fn seen(&self) -> Vec<Vec<u8>> {
        self.seen.lock().expect("no panic").clone()
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One packet, if there is one within a moment.
pub(crate) fn read(from: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut wait = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live structure.
    if unsafe { libc::poll(&raw mut wait, 1, 20) } < 1 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    from.read(buffer)
}

/// A TUN device in the calling thread's network namespace.
fn tun(name: &str) -> io::Result<File> {
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUN_WITHOUT_PACKET_INFORMATION: u16 = 0x1001;
    // SAFETY: a path with an end.
    let fd =
        unsafe { libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut request = Request { name: [0; 16], flags: TUN_WITHOUT_PACKET_INFORMATION, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: a live structure with the layout of `struct ifreq`.
    if unsafe { libc::ioctl(fd, TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
