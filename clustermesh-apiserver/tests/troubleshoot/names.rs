//! DNS.

use std::net::SocketAddr;

use clustermesh_apiserver::relay::NotReached;
use clustermesh_apiserver::troubleshoot::Step;
use tokio::net::UdpSocket;

use crate::fixture::{World, asking, ends, found, probe};

/// A name server that gives every question this response code, and no answer.
async fn name_server(code: u8) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut packet = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut packet).await {
            // The question again, as an answer: no records, and nothing after the question.
            let mut answer = packet[..length].to_vec();
            let question = 12 + answer[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
            answer.truncate(question);
            answer[2] |= 0x80;
            answer[3] = 0x80 | code;
            answer[6..12].fill(0);
            let _ = socket.send_to(&answer, from).await;
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_does_not_exist() {
    let world = World::new();
    let target = world.target(&["https://beta.mesh.example:2379".to_owned()]);
    let report = probe(target, asking(name_server(3).await)).await;
    let problem = ends(&report, Step::Dns, "name-not-found");
    assert!(problem.contains("beta.mesh.example") && problem.contains("127.0.0.1"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_without_an_address() {
    let world = World::new();
    let target = world.target(&["https://beta.mesh.example:2379".to_owned()]);
    let report = probe(target, asking(name_server(0).await)).await;
    ends(&report, Step::Dns, "name-without-address");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_server_that_cannot_answer() {
    let world = World::new();
    let target = world.target(&["https://beta.mesh.example:2379".to_owned()]);
    let report = probe(target, asking(name_server(2).await)).await;
    ends(&report, Step::Dns, "dns-failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_server_that_is_dead() {
    let world = World::new();
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let target = world.target(&["https://beta.mesh.example:2379".to_owned()]);
    let report = probe(target, asking(silent.local_addr().unwrap())).await;
    let problem = ends(&report, Step::Dns, "dns-server-silent");
    assert!(problem.contains("beta.mesh.example"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_in_the_configuration_need_no_name_server() {
    let world = World::new();
    let beta = world.beta_with(&world.ca.server("beta.mesh.example", crate::fixture::NOW)).await;
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut target = world.target(&[format!("https://beta.mesh.example:{}", beta.address.port())]);
    if let Ok(client) = &mut target.client {
        client.addresses.insert("beta.mesh.example".to_owned(), vec![beta.address.ip()]);
    }
    let report = probe(target, asking(silent.local_addr().unwrap())).await;
    assert!(report.findings().next().is_none(), "{report:?}");
    let seen = &report.step(Step::Dns).unwrap().seen;
    assert!(seen[0].contains("as `addresses` says"), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_used() {
    let world = World::new();
    let mut target = world.target(&["https://beta.mesh.example:2379".to_owned()]);
    target.client = Err(NotReached::Unusable("`trusted-ca-file` is missing".to_owned()));
    let report = probe(target, asking("127.0.0.1:9".parse().unwrap())).await;
    let problem = ends(&report, Step::Configuration, "configuration-unusable");
    assert!(problem.contains("trusted-ca-file"), "{problem}");

    let target = world.target(&["https://beta.mesh.example:2379".to_owned()]);
    std::fs::remove_file(world.path("remote.crt")).unwrap();
    let report = probe(target, asking("127.0.0.1:9".parse().unwrap())).await;
    let problem = found(&report, Step::Configuration, "certificate-unreadable");
    assert!(problem.contains("remote.crt"), "{problem}");
}
