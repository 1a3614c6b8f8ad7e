//! Ports for an etcd, which is told by number where to listen.

use std::{
    net::Ipv4Addr,
    sync::{Mutex, PoisonError},
};

use tokio::net::TcpSocket;

/// A TCP port of the loopback where nothing listens. For as long as this process lives, the kernel gives it to nobody
/// who takes any port: it waits for the program that asks for it by its number and, as Go does, sets `SO_REUSEADDR`.
pub(crate) fn reserve() -> u16 {
    static RESERVED: Mutex<Vec<TcpSocket>> = Mutex::new(Vec::new());
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a socket");
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a free port");
    let port = socket.local_addr().expect("an address").port();
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
    port
}
