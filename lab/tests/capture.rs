//! Someone who listens at a bridge. As root.

#![allow(clippy::unwrap_used)]

use std::net::UdpSocket;

use isthmus_lab::LabError;
use isthmus_lab::netns::NetNs;

/// Removes namespaces at the end, whatever happens.
struct Namespaces(Vec<NetNs>);

impl Namespaces {
    async fn new(names: &[&str]) -> Self {
        let mut all = Self(Vec::new());
        for name in names {
            let name = format!("capture-test-{name}");
            // What an earlier, killed test left.
            isthmus_lab::netns::remove_path(&std::path::Path::new("/run/netns").join(&name)).unwrap();
            all.0.push(NetNs::create(&name).await.unwrap());
        }
        all
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for ns in &self.0 {
            let _ = ns.remove();
        }
    }
}

/// Sends a word, and returns once it has come through.
fn say(from: &NetNs, to: &NetNs, address: &'static str, word: &'static str) {
    let heard = to.run(move || UdpSocket::bind(address)).unwrap();
    from.run(move || UdpSocket::bind("0.0.0.0:0")?.send_to(word.as_bytes(), address)).unwrap();
    heard.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    let mut buffer = [0; 64];
    let length = heard.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], word.as_bytes());
}

/// Two hosts at a bridge, as kind's nodes are at Docker's, and one beside it.
#[tokio::test(flavor = "multi_thread")]
async fn what_crosses_a_bridge_is_heard_at_both_ports_and_what_passes_beside_it_is_not() {
    let all = Namespaces::new(&["machine", "one", "two", "three"]).await;
    let [machine, one, two, three] = all.0.as_slice() else { panic!() };
    let netlink = machine.netlink().unwrap();
    netlink.add_bridge("br-test").await.unwrap();
    netlink.add_bridge("br-empty").await.unwrap();
    for (number, host, subnet) in [(1, one, 7), (2, two, 7), (3, three, 8)] {
        let port = format!("port{number}");
        netlink
            .add_veth(&port, [2, 0, 0, 0, 0, number], "eth0", [2, 0, 0, 0, 1, number], host)
            .await
            .unwrap();
        let inside = host.netlink().unwrap();
        inside.up("eth0").await.unwrap();
        inside.add_address("eth0", format!("10.99.{subnet}.{number}/24").parse().unwrap()).await.unwrap();
        if host.name() != three.name() {
            netlink.enslave(&port, "br-test").await.unwrap();
        }
    }
    netlink.add_address("port3", "10.99.8.9/24".parse().unwrap()).await.unwrap();

    let tap = machine.capture_bridge("br-test").await.unwrap();
    say(one, two, "10.99.7.2:7", "over the bridge");
    say(three, machine, "10.99.8.9:7", "beside it");
    let packets = tap.end().await.unwrap();
    assert_eq!(packets.with(b"over the bridge"), 2, "once at each port");
    assert_eq!(packets.of("10.99.7.2".parse().unwrap()), 2);
    assert_eq!(packets.with(b"beside it"), 0);

    for (bridge, why) in [("br-empty", "has no ports"), ("br-none", "br-none")] {
        let refused = machine.capture_bridge(bridge).await.err().unwrap();
        assert!(matches!(refused, LabError::Invalid(_) | LabError::Netlink { .. }), "{refused}");
        assert!(refused.to_string().contains(why), "{refused}");
    }
}
