//! One client's connection: the handshake, who the client is, and how its requests reach the services.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Request, Status};
use tower::ServiceExt;
use tracing::Instrument as _;

use super::grants::{ClientGrants, Grants};
use super::limits::{GatewayLimits, Quota, Reserved};
use super::refusal::refusal;
use super::reply;
use super::tls::Handshakes;
use crate::certificate::CommonName;
use crate::memory::KeyRange;

/// Calls of one connection that are read and answered at a time; further ones wait unread. Watches are not counted.
const UNARY_CALLS: usize = 64;
/// Headers of a request; Go's and tonic's clients send well under 1 KiB.
const HEADER_BYTES: u32 = 16 << 10;
/// Bytes of requests that a client may send ahead, per connection and per request.
const CONNECTION_WINDOW: u32 = 1 << 20;
const STREAM_WINDOW: u32 = 64 << 10;
/// Bytes of responses that wait for a client's window, per request.
const SEND_BUFFER: usize = 64 << 10;
/// The pieces in which large messages are handed to the HTTP/2 layer.
const PIECE_BYTES: usize = 64 << 10;
/// Clients whose authority is no longer trusted are disconnected within this time.
const PARTING: Duration = Duration::from_secs(3);
/// How long, and how much, a client whose handshake failed may go on sending.
const FAREWELL: Duration = Duration::from_secs(1);
const FAREWELL_READS: usize = 16;
/// How long requests may take to end once the gateway shuts down.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(3);

/// What all connections share.
pub(super) struct Connections {
    pub(super) tls: Handshakes,
    pub(super) grants: Grants,
    pub(super) routes: Routes,
    pub(super) limits: GatewayLimits,
    pub(super) watches: Arc<Quota>,
    pub(super) shutdown: CancellationToken,
}

/// Who makes a request, and what the connection it came on may take. Part of every request's extensions.
#[derive(Clone, Debug)]
pub(super) struct Client {
    grants: Arc<ClientGrants>,
    pub(super) watches: Arc<Quota>,
    /// Ends the connection.
    hang_up: CancellationToken,
    request_timeout: Duration,
}

impl Client {
    pub(super) fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        // Set for every request below; without it nothing is permitted.
        request.extensions().get::<Self>().cloned().ok_or_else(reply::permission_denied)
    }

    pub(super) fn permit(&self, range: &KeyRange) -> Result<(), Status> {
        if self.grants.permit(range) { Ok(()) } else { Err(reply::permission_denied()) }
    }

    /// Hangs up on a client that does not take a large answer in time.
    fn deliver_in_time(&self) -> tokio_util::sync::DropGuard {
        let (client, delivered) = (self.clone(), CancellationToken::new());
        let guard = delivered.clone().drop_guard();
        tokio::spawn(async move {
            tokio::select! {
                () = delivered.cancelled() => {}
                () = client.hang_up.cancelled() => {}
                () = tokio::time::sleep(client.request_timeout) => client.hang_up.cancel(),
            }
        });
        guard
    }
}

impl Connections {
    pub(super) async fn serve(&self, stream: TcpStream) {
        let peer = stream.peer_addr().ok();
        let span = tracing::warn_span!("handshake", peer = peer.map(tracing::field::display));
        let handshake = tokio::time::timeout(self.limits.handshake_timeout, self.handshake(stream));
        let Accepted { stream, identity } = tokio::select! {
            () = self.shutdown.cancelled() => return,
            result = handshake.instrument(span) => match result {
                Ok(Ok(accepted)) => accepted,
                Ok(Err(error)) => return tracing::debug!(?peer, %error, "TLS handshake failed"),
                Err(_) => return tracing::debug!(?peer, "TLS handshake not finished in time"),
            },
        };
        let name = identity.name();
        let client = Client {
            grants: Arc::new(self.grants.of(name.as_deref())),
            watches: self.watches.child(self.limits.watch_bytes_per_connection),
            hang_up: CancellationToken::new(),
            request_timeout: self.limits.request_timeout,
        };
        tracing::debug!(?peer, client = ?name, "connected");
        tokio::select! {
            () = self.serve_requests(stream, client) => {}
            () = self.distrusted(&identity) => {
                tracing::info!(?peer, client = ?name, "the client's authority is no longer trusted: disconnecting it");
            }
        }
        tracing::debug!(?peer, client = ?name, "disconnected");
    }

    async fn handshake(&self, stream: TcpStream) -> io::Result<Accepted> {
        let since = UnixTime::now();
        let losses = self.tls.trust().map(|trust| trust.borrow().losses());
        let accept = TlsAcceptor::from(self.tls.config()).accept(stream).into_fallible();
        match accept.await {
            Ok(stream) => {
                let (_, session) = stream.get_ref();
                let chain = session.peer_certificates().unwrap_or_default();
                let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
                Ok(Accepted { stream, identity: ClientIdentity { chain, since, losses } })
            }
            Err((error, stream)) => {
                part(stream).await;
                Err(error)
            }
        }
    }

    /// Waits until the client would not be let in any more, if that may happen to an open connection.
    async fn distrusted(&self, client: &ClientIdentity) {
        let Some(mut trust) = self.tls.trust() else { return std::future::pending().await };
        let mut seen = client.losses;
        loop {
            // Also before the first change: there may have been one during the handshake.
            let verifier = trust.borrow_and_update().clone();
            let lost = seen.replace(verifier.losses()) != Some(verifier.losses());
            if lost && !verifier.still_trusts(&client.chain, client.since) {
                // Not all of an authority's clients at once: each reads everything anew from wherever it goes.
                return tokio::time::sleep(PARTING.mul_f64(fastrand::f64())).await;
            }
            if trust.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    async fn serve_requests(&self, stream: TlsStream<TcpStream>, client: Client) {
        let limits = &self.limits;
        let slots = Arc::new(Semaphore::new(UNARY_CALLS));
        let routes = self.routes.clone();
        let _hang_up_on_drop = client.hang_up.clone().drop_guard();
        let hang_up = client.hang_up.clone();
        let service =
            service_fn(move |request| answer(request, routes.clone(), client.clone(), slots.clone()));
        let connection = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(limits.keepalive_interval)
            .keep_alive_timeout(limits.keepalive_timeout)
            .max_concurrent_streams(limits.streams_per_connection)
            .max_header_list_size(HEADER_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            _ = connection.as_mut() => return,
            () = hang_up.cancelled() => return,
            () = self.shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        // Whether it ended in time or not, it ends now.
        let _ = tokio::time::timeout(SHUTDOWN_GRACE, connection).await;
    }
}

async fn answer(
    request: hyper::Request<Incoming>,
    routes: Routes,
    client: Client,
    slots: Arc<Semaphore>,
) -> Result<hyper::Response<Delivered>, Infallible> {
    if let Some(status) = refusal(request.uri().path()) {
        return Ok(status.into_http().map(Delivered::uncounted));
    }
    let streaming = request.uri().path() == "/etcdserverpb.Watch/Watch";
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(client.clone());
    let call = routes.oneshot(request);
    let result = if streaming {
        call.await
    } else {
        let in_turn = async {
            let _slot = slots.acquire().await;
            call.await
        };
        match tokio::time::timeout(client.request_timeout, in_turn).await {
            Ok(result) => result,
            Err(_) => return Ok(reply::timed_out().into_http().map(Delivered::uncounted)),
        }
    };
    let mut response = match result {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let room = response.extensions_mut().remove::<Reserved>().filter(Reserved::is_counted);
    let delivery = room.map(|room| Delivery { _room: room, _in_time: client.deliver_in_time() });
    Ok(response.map(|body| Delivered { body, rest: Bytes::new(), _delivery: delivery }))
}

/// The body of a response, which holds the room it takes until it is sent.
///
/// It hands out large messages in pieces: the HTTP/2 layer asks for the next one when the client has room for it, but
/// would take a whole message at once, out of sight and for as long as the client likes.
struct Delivered {
    body: Body,
    rest: Bytes,
    _delivery: Option<Delivery>,
}

struct Delivery {
    _room: Reserved,
    _in_time: tokio_util::sync::DropGuard,
}

impl Delivered {
    fn uncounted(body: Body) -> Self {
        Self { body, rest: Bytes::new(), _delivery: None }
    }
}

impl HttpBody for Delivered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        if this.rest.is_empty() {
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(end),
            };
            match frame.into_data() {
                Ok(data) => this.rest = data,
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
        let piece = this.rest.split_to(this.rest.len().min(PIECE_BYTES));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }
}

/// A client that is let in.
struct Accepted {
    stream: TlsStream<TcpStream>,
    identity: ClientIdentity,
}

/// The certificates that a client showed, and when.
struct ClientIdentity {
    chain: Vec<CertificateDer<'static>>,
    since: UnixTime,
    /// What had been taken out of trust by then, if that may end an open connection.
    losses: Option<u64>,
}

impl ClientIdentity {
    /// The common name that its authority vouches for.
    fn name(&self) -> Option<String> {
        match CommonName::of(self.chain.first()?) {
            CommonName::One(name) => Some(name),
            CommonName::None | CommonName::Several => None,
        }
    }
}

/// Closes a connection whose handshake failed so that the client learns why: what it has sent meanwhile must be read, or
/// the system cuts the connection and may take back the alert with it.
async fn part(mut stream: TcpStream) {
    let drain = async {
        let mut rest = [0; 4 << 10];
        stream.shutdown().await?;
        for _ in 0..FAREWELL_READS {
            if stream.read(&mut rest).await? == 0 {
                break;
            }
        }
        io::Result::Ok(())
    };
    // The client may be gone or may not be one at all.
    let _ = tokio::time::timeout(FAREWELL, drain).await;
}
