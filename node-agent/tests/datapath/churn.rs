//! Services change while clients connect.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use isthmus_bpf_abi::Protocol;

use crate::model::{Model, apply, socket_addr};
use crate::sandbox::{eventually, sandbox};
use crate::sockets::{Server, ask_tcp, ask_udp, udp_socket};

const CHANGES: usize = 300;
const MOST: usize = 8;

/// Backends come and go between one and eight. One that is taken out is stopped as soon as every client has begun a new
/// connection after that: if a slot still led there, a client would be refused.
#[test]
fn no_connection_meets_a_backend_that_is_gone() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let mut model = Model::new(1, "10.96.0.10:80", Protocol::Tcp);
        let mut servers: Vec<(SocketAddr, Server)> = Vec::new();
        let mut next = 0u32;
        let mut start = |servers: &mut Vec<(SocketAddr, Server)>| {
            next += 1;
            let [_, _, high, low] = next.to_be_bytes();
            let addr = format!("127.1.{high}.{low}:8080");
            servers.push((socket_addr(&addr), Server::start(Protocol::Tcp, &addr)));
            socket_addr(&addr)
        };
        let first = start(&mut servers);
        apply(&datapath, &model.add(first));
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");

        let stop = AtomicBool::new(false);
        let rounds = [const { AtomicU64::new(0) }; 2];
        thread::scope(|scope| {
            let clients: Vec<_> = rounds
                .iter()
                .map(|rounds| {
                    scope.spawn(|| {
                        let mut seen = HashSet::new();
                        while !stop.load(Ordering::Relaxed) {
                            match ask_tcp("10.96.0.10:80") {
                                Ok(backend) => seen.insert(backend),
                                Err(error) => return Err(error),
                            };
                            rounds.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(seen.len())
                    })
                })
                .collect();
            let mut random = 88_172_645_463_325_252_u64;
            for _ in 0..CHANGES {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let grow = servers.len() == 1 || (servers.len() < MOST && random.is_multiple_of(2));
                if grow {
                    let addr = start(&mut servers);
                    apply(&datapath, &model.add(addr));
                    continue;
                }
                let (addr, server) = servers.swap_remove((random >> 8) as usize % servers.len());
                apply(&datapath, &model.remove(addr));
                let before = [0, 1].map(|client: usize| rounds[client].load(Ordering::Relaxed));
                eventually("every client connects anew, unless one was refused", || {
                    (0..2).all(|client| {
                        clients[client].is_finished()
                            || rounds[client].load(Ordering::Relaxed) >= before[client] + 2
                    })
                });
                drop(server);
            }
            stop.store(true, Ordering::Relaxed);
            for client in clients {
                let seen = client.join().expect("the client").expect("no connection fails");
                assert!(seen > 1, "the client saw {seen} backends");
            }
        });
    });
}

#[test]
fn a_udp_socket_never_loses_an_answer_while_others_come_and_go() {
    sandbox(|sandbox| {
        let datapath = sandbox.datapath();
        let _server = Server::start(Protocol::Udp, "127.0.0.11:53");
        let mut model = Model::new(1, "10.96.0.10:53", Protocol::Udp);
        model.grow(&datapath, &["127.0.0.11:53"]);
        datapath.attach_sockets(&sandbox.cgroup).expect("attach");
        let socket = udp_socket("0.0.0.0:0");
        ask_udp(&socket, "10.96.0.10:53");
        for _ in 0..100 {
            // Nobody listens there: a datagram that went astray would find no answer.
            model.grow(&datapath, &["127.0.0.12:53", "127.0.0.13:53"]);
            assert_eq!(ask_udp(&socket, "10.96.0.10:53").0, socket_addr("127.0.0.11:53"));
            model.shrink(&datapath, "127.0.0.12:53");
            assert_eq!(ask_udp(&socket, "10.96.0.10:53").0, socket_addr("127.0.0.11:53"));
            model.shrink(&datapath, "127.0.0.13:53");
        }
    });
}
