//! Ports for programs that are told by number where to listen.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use tokio::net::TcpSocket;

/// A TCP port of the loopback where nothing listens. For as long as this process lives, the kernel gives it to nobody
/// who takes any port, neither a listener nor a client: it waits for the program that asks for it by its number, and
/// for that program's successors.
///
/// Such a program has to set `SO_REUSEADDR`, as the listeners of tokio, of the standard library and of Go do.
///
/// # Errors
/// When the kernel gives no socket or has no port left.
pub fn reserve() -> io::Result<SocketAddr> {
    static RESERVED: Mutex<Vec<TcpSocket>> = Mutex::new(Vec::new());
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    let address = socket.local_addr()?;
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
    Ok(address)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_reserved_port_refuses_connections_until_somebody_listens_there() {
        let address = reserve().expect("a port");
        assert_ne!(reserve().expect("another port"), address);
        for _ in 0..2 {
            let refused = TcpStream::connect(address).expect_err("nothing listens");
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            let listener = TcpListener::bind(address).expect("whoever asks for it has it");
            let _client = TcpStream::connect(address).expect("a connection");
            let _ = listener.accept().expect("a connection");
        }
    }
}
