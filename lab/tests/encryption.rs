//! Encryption with the real device and the real agents, seen by someone who taps every wire. As root.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use isthmus_lab::capture::Packets;
use isthmus_lab::cleanup::{self, Remains};
use isthmus_lab::names::LabName;
use isthmus_lab::netns::NetNs;
use isthmus_lab::scenario::Scenario;
use isthmus_lab::spec::Encryption;
use isthmus_lab::{Lab, PodRecord, Silent, status};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::json;
use support::{eventually, sh};

/// What a device takes in one piece, where the wire takes 1500 bytes.
const MTU: usize = 1420;
const PLAINTEXT: &[u8] = b"known to those who look for it; ";

/// The scenario's clusters, up to where only beta answers alpha's client.
async fn raise(name: &str, mode: Encryption) -> Lab {
    let name: LabName = name.parse().unwrap();
    cleanup::down(&name).await.unwrap();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind-scenarios/encryption");
    let mut scenario = Scenario::load(&dir).unwrap();
    scenario.encryption = mode;
    scenario.steps.truncate(4);
    let lab = Lab::up(scenario.lab(name, None), &mut |_| {}).await.unwrap();
    let report = isthmus_lab::run(&lab, &scenario, Duration::ZERO, &mut Silent).await;
    assert!(report.passed, "{}", serde_json::to_string_pretty(&report).unwrap());
    lab
}

async fn down(lab: Lab) {
    let name = lab.name().clone();
    lab.down().await.unwrap();
    assert!(Remains::of(&name).none(), "{:?}", Remains::of(&name));
}

fn pod(lab: &Lab, cluster: &str) -> (PodRecord, NetNs) {
    let pod = lab.cluster(cluster).unwrap().pod("default", "client").unwrap();
    let netns = NetNs::open(&lab.name().pod_netns(cluster, "default", "client")).unwrap();
    (pod, netns)
}

/// Whether alpha's client gets an answer from beta's pod.
async fn answered(lab: &Lab, from: &PodRecord) -> bool {
    let services: Api<k8s_openapi::api::core::v1::Service> =
        Api::namespaced(lab.cluster("alpha").unwrap().client(), "default");
    let service = services.get("rebel-base").await.unwrap().spec.unwrap().cluster_ip.unwrap();
    let curl = sh(&format!("curl -sf --noproxy '*' --max-time 1 http://{service}/"));
    from.launch(&curl).unwrap().output(Duration::from_secs(30)).await.unwrap().status.success()
}

fn assert_hidden(packets: &Packets, addresses: &[IpAddr]) {
    for address in addresses {
        assert_eq!(packets.of(*address), 0, "packets from or to {address} in the clear");
    }
    assert_eq!(packets.with(PLAINTEXT), 0, "the plaintext can be read");
    assert_eq!(packets.encrypted_fragments(), 0, "encrypted packets are fragments");
    assert!(packets.encrypted() > 0, "none of {} packets is encrypted", packets.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn full_segments_and_pings_of_every_size_cross_whole_and_hidden_also_after_the_device_was_killed() {
    let lab = raise("t-encryption", Encryption::On).await;
    let ((near, near_ns), (far, far_ns)) = (pod(&lab, "alpha"), pod(&lab, "beta"));
    let addresses: Vec<IpAddr> = near.addresses.iter().chain(&far.addresses).copied().collect();
    assert_eq!(addresses.len(), 4, "both have two families");
    for discovers in [true, false] {
        let tap = lab.wan().capture().unwrap();
        let inside = near_ns.capture().unwrap();
        near_ns.sysctl(if discovers { DISCOVERS } else { DOES_NOT_DISCOVER }).unwrap();
        for to in &far.addresses {
            for size in (MTU - 8..=MTU + 8).chain([1480, 1500, 1501, 2 * MTU, 4000]) {
                ping(&near_ns, *to, size);
            }
        }
        let errors = told_sizes(&inside.end().await.unwrap());
        assert!(errors.iter().all(|size| *size == MTU), "{errors:?}");
        // Each family is told once, and keeps it in mind.
        assert!(!discovers || errors.len() >= far.addresses.len(), "{errors:?}");
        assert_hidden(&tap.end().await.unwrap(), &addresses);
    }
    for to in &far.addresses {
        let tap = lab.wan().capture().unwrap();
        bulk(&near_ns, &far_ns, SocketAddr::new(*to, 9000));
        let packets = tap.end().await.unwrap();
        // The router measures each segment of what offloading has made one packet. Had one not fit, it would have cut it.
        assert_hidden(&packets, &addresses);
    }

    let tap = lab.wan().capture().unwrap();
    for device in ["alpha", "beta"] {
        let node = if device == "alpha" { &near.node } else { &far.node };
        let device = format!("{device}/{node}/isthmus-wireguard");
        lab.kill(&device).await.unwrap();
        assert!(!answered(&lab, &near).await, "without {device} nothing gets through");
        let begun = Instant::now();
        lab.restart(&device).await.unwrap();
        eventually("an answer through the new device", async || match answered(&lab, &near).await {
            true => Ok(()),
            false => Err(format!("none {:?} after its start", begun.elapsed())),
        })
        .await;
    }
    assert_hidden(&tap.end().await.unwrap(), &addresses);
    down(lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_sends_nothing_to_a_node_whose_key_is_gone_and_says_so() {
    let lab = raise("t-strict", Encryption::Strict).await;
    let (near, _) = pod(&lab, "alpha");
    let beta = lab.cluster("beta").unwrap();
    let node = beta.nodes()[0].clone();
    lab.daemon(&format!("beta/{node}/node-agent")).unwrap().stop(Duration::from_secs(5)).await;
    let nodes: Api<Node> = Api::all(beta.client());
    let without = json!({"metadata": {"annotations": {"network.cilium.io/wg-pub-key": null}}});
    nodes.patch(&node, &PatchParams::default(), &Patch::Merge(without)).await.unwrap();
    let counted = async || {
        let socket = lab.cluster("alpha").unwrap().agent_socket(&near.node);
        let status = status::agent(&socket).await.map_err(|e| e.to_string())?;
        Ok::<_, String>(status.datapath.counters.get("encrypt_no_key").copied().unwrap_or_default())
    };
    let tap = lab.wan().capture().unwrap();
    eventually("what cannot be encrypted to be dropped and counted", async || {
        let _ = answered(&lab, &near).await;
        match counted().await? {
            0 => Err("nothing was dropped for want of a key".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    assert!(!answered(&lab, &near).await);
    let packets = tap.end().await.unwrap();
    for address in &near.addresses {
        assert_eq!(packets.of(*address), 0, "packets from or to {address} in the clear");
    }
    down(lab).await;
}

const DISCOVERS: &[(&str, &str)] = &[("ipv4/ip_no_pmtu_disc", "0")];
const DOES_NOT_DISCOVER: &[(&str, &str)] = &[("ipv4/ip_no_pmtu_disc", "1")];

/// Two megabytes of known plaintext each way over one connection.
fn bulk(near: &NetNs, far: &NetNs, to: SocketAddr) {
    let data: Vec<u8> = PLAINTEXT.iter().copied().cycle().take(2 << 20).collect();
    let within = Some(Duration::from_secs(60));
    let listener = far.run(move || TcpListener::bind(to)).unwrap();
    let echo = std::thread::spawn({
        let length = data.len();
        move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(within)?;
            let mut taken = vec![0; length];
            stream.read_exact(&mut taken)?;
            stream.write_all(&taken)
        }
    });
    let mut stream = near.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(60))).unwrap();
    stream.set_read_timeout(within).unwrap();
    stream.write_all(&data).unwrap();
    let mut back = vec![0; data.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == data, "it came back changed");
    echo.join().unwrap().unwrap();
}

/// Sends echo requests as IP packets of this size until one is answered, which may take two: the first may be too big, and
/// lost to finding that out.
fn ping(from: &NetNs, to: IpAddr, size: usize) {
    let v4 = to.is_ipv4();
    let (family, protocol, kind, answer, header) = match v4 {
        true => (AddressFamily::Inet, SockProtocol::Icmp, 8, 0, 20),
        false => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128, 129, 40),
    };
    let socket =
        from.run(move || Ok(socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?)).unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(250)).unwrap();
    let mut message = vec![0; size - header];
    message[0] = kind;
    message[4..8].copy_from_slice(&(size as u32).to_be_bytes());
    for (at, byte) in message[8..].iter_mut().enumerate() {
        *byte = PLAINTEXT[at % PLAINTEXT.len()];
    }
    if v4 {
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    let begun = Instant::now();
    let mut buffer = vec![0; 8192];
    while begun.elapsed() < Duration::from_secs(60) {
        let flags = MsgFlags::empty();
        let _ = match to {
            IpAddr::V4(to) => {
                let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
                sendto(socket.as_raw_fd(), &message, &to, flags)
            }
            IpAddr::V6(to) => {
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, 0));
                sendto(socket.as_raw_fd(), &message, &to, flags)
            }
        };
        while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, flags) {
            // Of IPv4 a raw socket shows the header too.
            let received = &buffer[if v4 { 20 } else { 0 }..length];
            // Length first: others' errors and neighbours' questions come by here too.
            if received.len() == message.len() && received[0] == answer && received[4..] == message[4..] {
                return;
            }
        }
    }
    panic!("no answer to an echo request of {size} bytes to {to}");
}

/// The sizes that a pod was told would fit, by "fragmentation needed" and "packet too big".
fn told_sizes(packets: &Packets) -> Vec<usize> {
    let told = |packet: &[u8]| match packet[0] >> 4 {
        // What is no first fragment has no header of its own.
        4 if packet[9] == 1 && u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff == 0 => {
            let size = u16::from_be_bytes(packet.get(26..28)?.try_into().ok()?);
            (packet[20..22] == [3, 4]).then_some(usize::from(size))
        }
        6 if packet[6] == 58 => {
            let size = u32::from_be_bytes(packet.get(44..48)?.try_into().ok()?);
            (packet[40] == 2).then_some(size as usize)
        }
        _ => None,
    };
    packets.iter().filter_map(told).collect()
}

fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
