//! What clients do that they should not: the gateway stays as it is, and others notice nothing.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, Txn, TxnOp, WatchOptions};
use isthmus_kvstore::gateway::{GatewayLimits, GatewayOptions};
use isthmus_kvstore::memory::{Limits, Mutation};
use rustls_pki_types::pem::PemObject;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::{DEADLINE, Served, eventually};

async fn with(limits: GatewayLimits) -> Served {
    Served::with(Limits::default(), GatewayOptions { limits, ..GatewayOptions::default() }).await
}

async fn answers(served: &Served) {
    let mut client = served.client("admin-alpha").await;
    let answer = tokio::time::timeout(DEADLINE, client.get("a", None)).await.expect("an answer");
    answer.expect("the gateway answers others");
}

#[tokio::test]
async fn a_handshake_that_is_not_finished_is_given_up() {
    let limits = GatewayLimits {
        // Long enough for an honest client, whatever else the machine does.
        handshake_timeout: Duration::from_secs(2),
        connections: 4,
        ..GatewayLimits::default()
    };
    let served = with(limits).await;
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(served.gateway.local_addr()).await.unwrap());
    }
    answers(&served).await;
    let mut closed = silent.remove(0);
    let read = tokio::time::timeout(DEADLINE, closed.read(&mut [0; 1])).await.expect("closed");
    assert!(matches!(read, Ok(0) | Err(_)));
}

#[tokio::test]
async fn random_bytes_instead_of_a_handshake_or_of_http_do_no_harm() {
    let served = Served::start().await;
    let mut random = Random(42);
    for round in 0..64 {
        let mut bytes = vec![0; 1 + (random.next() % 2000) as usize];
        bytes.fill_with(|| random.next() as u8);
        let mut stream = TcpStream::connect(served.gateway.local_addr()).await.unwrap();
        if round % 2 == 0 {
            let _ = stream.write_all(&bytes).await;
        } else {
            let mut stream = tls(&served, stream).await;
            if round % 4 == 1 {
                let _ = stream
                    .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                    .await;
            }
            let _ = stream.write_all(&bytes).await;
            let _ = stream.flush().await;
        }
    }
    answers(&served).await;
}

#[tokio::test]
async fn random_bytes_as_requests_are_answered_with_errors_or_with_nothing() {
    let served = Served::start().await;
    served.store.put("a", "1");
    let stream = tls(&served, TcpStream::connect(served.gateway.local_addr()).await.unwrap()).await;
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut random = Random(7);
    let paths = [
        "KV/Range",
        "KV/Txn",
        "KV/Put",
        "Watch/Watch",
        "Maintenance/Status",
        "Cluster/MemberList",
        "Lease/LeaseLeases",
        "No/Such",
    ];
    for round in 0..2000 {
        let mut message = vec![0; (random.next() % 64) as usize];
        // Field numbers and wire types of small messages, so that some of it parses.
        message.fill_with(|| {
            if random.next().is_multiple_of(3) { random.next() as u8 } else { (random.next() % 0x70) as u8 }
        });
        let announced =
            if random.next().is_multiple_of(8) { random.next() as u32 } else { message.len() as u32 };
        let mut body = vec![0];
        body.extend(announced.to_be_bytes());
        body.extend(message);
        let path = paths[round % paths.len()];
        let request = hyper::Request::post(format!("https://127.0.0.1/etcdserverpb.{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(tonic::body::Body::new(Full(Some(body.into()))))
            .unwrap();
        sender.ready().await.unwrap();
        let response =
            tokio::time::timeout(DEADLINE, sender.send_request(request)).await.expect("an answer").unwrap();
        assert_eq!(response.status(), 200, "{path}");
    }
    assert!(!connection.is_finished(), "not even the connection was lost");
    answers(&served).await;
}

#[tokio::test]
async fn more_watches_than_a_client_may_have_are_refused_and_given_back_when_it_leaves() {
    let limits = GatewayLimits { watch_bytes_per_connection: 300 << 10, ..GatewayLimits::default() };
    let served = with(limits).await;
    let mut client = served.client("admin-alpha").await;
    let mut watch = client.watch("a", None).await.unwrap();
    for number in 0..100 {
        watch.watch(format!("{number}"), None).await.unwrap();
    }
    let mut refused = 0;
    for _ in 0..=100 {
        let created = watch.message().await.unwrap().unwrap();
        if created.canceled() {
            assert_eq!(created.cancel_reason(), "etcdserver: too many requests");
            refused += 1;
        }
    }
    assert!((50..80).contains(&refused), "{refused}");
    let second = client.watch("a", None).await.map(drop).unwrap_err().to_string();
    assert!(second.contains("etcdserver: too many requests"), "{second}");
    drop((watch, client));
    eventually("no watchers", async || (served.store.stats().watchers == 0).then_some(())).await;
}

#[tokio::test]
async fn a_client_that_stops_reading_its_watch_is_cancelled_and_others_are_not() {
    let limits = Limits { history_bytes: 1 << 20, ..Limits::default() };
    let served = Served::with(limits, GatewayOptions::default()).await;
    let from_the_start = || Some(WatchOptions::new().with_prefix().with_start_revision(1));
    let mut slow = served.client("admin-alpha").await.watch("a/", from_the_start()).await.unwrap();
    let mut quick = served.client("admin-alpha").await.watch("a/", from_the_start()).await.unwrap();
    let value = "x".repeat(10_000);
    let mut seen = 0;
    assert!(quick.message().await.unwrap().unwrap().created());
    for round in 0..1000 {
        served.store.put(format!("a/{}", round % 10), value.clone());
        while seen <= round {
            let response =
                tokio::time::timeout(DEADLINE, quick.message()).await.expect("events").unwrap().unwrap();
            assert!(!response.canceled());
            seen += response.events().len();
        }
    }
    let stats = served.store.stats();
    assert!(stats.history_bytes <= 1 << 20, "{stats:?}");
    let canceled = loop {
        let response =
            tokio::time::timeout(DEADLINE, slow.message()).await.expect("a response").unwrap().unwrap();
        if response.canceled() {
            break response;
        }
    };
    assert_eq!(canceled.compact_revision(), served.store.stats().compact_revision.0);
}

#[tokio::test]
async fn a_client_that_does_not_take_a_large_answer_is_hung_up_on_and_the_next_gets_its_room() {
    let limits = GatewayLimits {
        request_timeout: Duration::from_millis(500),
        answer_bytes: 8 << 20,
        ..GatewayLimits::default()
    };
    let served = with(limits).await;
    let value = "x".repeat(1 << 20);
    served.store.apply((0..8).map(|key| Mutation::put(format!("a/{key}"), value.clone())).collect());

    let stream = tls(&served, TcpStream::connect(served.gateway.local_addr()).await.unwrap()).await;
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let connection = tokio::spawn(connection);
    // Range over everything from "a".
    let body = b"\0\0\0\0\x06\x0a\x01a\x12\x01\0".to_vec();
    let request = hyper::Request::post("https://127.0.0.1/etcdserverpb.KV/Range")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(Full(Some(body.into()))))
        .unwrap();
    let untaken = sender.send_request(request).await.unwrap();

    let mut client = served.client("admin-alpha").await.kv_client().max_decoding_message_size(64 << 20);
    let options = || Some(GetOptions::new().with_prefix());
    let answer = eventually("room for the next", async || client.get("a/", options()).await.ok()).await;
    assert_eq!(answer.kvs().len(), 8);
    assert!(tokio::time::timeout(DEADLINE, connection).await.is_ok(), "the connection ends");
    drop(untaken);
}

#[tokio::test]
async fn a_transaction_that_asks_for_everything_many_times_is_refused() {
    let served = Served::start().await;
    let value = "x".repeat(1 << 20);
    served.store.apply((0..8).map(|key| Mutation::put(format!("a/{key}"), value.clone())).collect());
    let mut client = served.client("admin-alpha").await.kv_client().max_decoding_message_size(64 << 20);
    let everything = |times| {
        let get = || TxnOp::get("a/", Some(GetOptions::new().with_prefix()));
        Txn::new().and_then((0..times).map(|_| get()).collect::<Vec<_>>())
    };
    assert_eq!(client.txn(everything(2)).await.unwrap().op_responses().len(), 2);
    let error = client.txn(everything(128)).await.unwrap_err().to_string();
    assert!(error.contains("etcdserver: request is too large"), "{error}");
    answers(&served).await;
}

#[tokio::test]
async fn a_progress_request_does_not_make_the_gateway_gather_all_of_history() {
    let served = Served::start().await;
    let value = "x".repeat(100_000);
    for round in 0..200 {
        served.store.put(format!("a/{}", round % 10), value.clone());
    }
    let from_the_start = || Some(WatchOptions::new().with_prefix().with_start_revision(1));
    let mut watch = served.client("admin-alpha").await.watch("a/", from_the_start()).await.unwrap();
    watch.request_progress().await.unwrap();
    // Every event comes once, and the answer after the last of them.
    let mut seen = 0;
    loop {
        let response =
            tokio::time::timeout(DEADLINE, watch.message()).await.expect("a response").unwrap().unwrap();
        seen += response.events().len();
        if !response.created() && response.events().is_empty() {
            assert_eq!(response.header().unwrap().revision(), served.store.revision().0);
            break;
        }
    }
    assert_eq!(seen, 200);
}

#[tokio::test]
async fn a_shutdown_ends_watches_and_connections_however_they_behave() {
    let served = Served::start().await;
    let mut watch = served.client("admin-alpha").await.watch("a", None).await.unwrap();
    assert!(watch.message().await.unwrap().unwrap().created());
    let _silent = TcpStream::connect(served.gateway.local_addr()).await.unwrap();
    let _idle = tls(&served, TcpStream::connect(served.gateway.local_addr()).await.unwrap()).await;
    tokio::time::timeout(DEADLINE, served.gateway.shutdown()).await.expect("the shutdown ends");
    let error = watch.message().await.unwrap_err().to_string();
    assert!(error.contains("etcdserver: server stopped"), "{error}");
    eventually("no watchers", async || (served.store.stats().watchers == 0).then_some(())).await;
}

async fn tls(served: &Served, stream: TcpStream) -> tokio_rustls::client::TlsStream<TcpStream> {
    use rustls_pki_types::{CertificateDer, PrivateKeyDer};
    let files = served.pki.client("admin-alpha");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&files.ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_file(&files.certificate).unwrap()];
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(&files.key).unwrap())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    stream.set_nodelay(true).unwrap();
    let name = "127.0.0.1".try_into().unwrap();
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

/// A body of one piece.
struct Full(Option<bytes::Bytes>);

impl hyper::body::Body for Full {
    type Data = bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, Self::Error>>> {
        std::task::Poll::Ready(self.0.take().map(|bytes| Ok(hyper::body::Frame::data(bytes))))
    }
}

/// Xorshift: the same bytes in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
