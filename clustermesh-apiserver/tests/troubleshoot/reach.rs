//! TCP, and what answers there instead of a gateway.

use std::net::SocketAddr;
use std::sync::Arc;

use clustermesh_apiserver::troubleshoot::Step;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::fixture::{GATEWAY, NOW, World, ends, tls_server};

/// An address that nobody listens on.
pub(crate) fn unused() -> SocketAddr {
    isthmus_kube_api::ports::reserve().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_nobody_listens_on() {
    let world = World::new();
    let address = unused();
    let problem = ends(&world.probe(address).await, Step::Tcp, "connection-refused");
    assert!(problem.contains(&address.to_string()), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_that_are_dropped() {
    let world = World::new();
    // The kernel drops who wants to connect while the listener's queue is full.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(std::time::Duration::from_millis(500), TcpStream::connect(address)).await
    {
        waiting.push(stream);
        assert!(waiting.len() < 64, "the queue never fills");
    }
    let problem = ends(&world.probe(address).await, Step::Tcp, "packets-dropped");
    assert!(problem.contains("does not answer within 4s"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_speaks_something_else_than_tls() {
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").await;
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        }
    });
    let problem = ends(&world.probe(address).await, Step::Tls, "not-tls");
    assert!(problem.contains("SSH-2.0-OpenSSH_9.9"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_speaks_http_without_tls() {
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            http_server(stream).await;
        }
    });
    let problem = ends(&world.probe(address).await, Step::Tls, "not-tls");
    assert!(problem.contains("HTTP/1.1 400 Bad Request"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_server_with_the_right_certificate() {
    let world = World::new();
    let tls = tokio_rustls::TlsAcceptor::from(tls_server(&world.ca.server(GATEWAY, NOW)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = tls.accept(stream).await {
                http_server(stream).await;
            }
        }
    });
    let problem = ends(&world.probe(address).await, Step::Gateway, "http-server");
    assert!(problem.contains("HTTP/1.1 400 Bad Request"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_http_1_alone_and_says_so_in_tls() {
    let world = World::new();
    let mut config = Arc::unwrap_or_clone(tls_server(&world.ca.server(GATEWAY, NOW)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let tls = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = tls.accept(stream).await;
        }
    });
    ends(&world.probe(address).await, Step::Gateway, "http-server");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_balancer_that_takes_connections_and_has_no_backend() {
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let report = world.probe(listener.local_addr().unwrap()).await;
    ends(&report, Step::Tls, "tls-silent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_speaks_grpc_and_is_no_etcd() {
    let world = World::new();
    let mut config = Arc::unwrap_or_clone(tls_server(&world.ca.server(GATEWAY, NOW)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                let Ok(stream) = tls.accept(stream).await else { return };
                // No method is known: gRPC's own way to say so.
                let service = hyper::service::service_fn(|_| async {
                    let answer = http::Response::builder()
                        .header("content-type", "application/grpc")
                        .header("grpc-status", "12");
                    answer.body(String::new())
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                let _ = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
                    .serve_connection(io, service)
                    .await;
            });
        }
    });
    ends(&world.probe(address).await, Step::Gateway, "not-etcd");
}

/// Answers whatever is said as a web server does that does not understand it.
async fn http_server(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut request = [0; 1024];
    let _ = stream.read(&mut request).await;
    let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
    let _ = stream.shutdown().await;
}
