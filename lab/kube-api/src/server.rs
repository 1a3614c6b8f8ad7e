//! Sockets, TLS and connections.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming as IncomingBody;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use crate::api::{Api, Body, Incoming, Settings, respond_error};
use crate::auth::User;
use crate::config::{Config, ServeError, Tls};
use crate::kinds::services::Addresses;
use crate::request::Query;
use crate::status::ApiError;

/// A client that has not finished its TLS handshake after this is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that has not sent its whole request after this is answered with an error.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long connections are given to end after their streams have been ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A running Kubernetes API server. Dropping it stops it, at once.
pub struct KubeApi {
    api: Arc<Api>,
    addresses: Vec<SocketAddr>,
    tasks: TaskTracker,
}

impl KubeApi {
    /// Serves on a listener, which may have been made in another network namespace.
    pub fn serve(listener: TcpListener, config: Config) -> Result<Self, ServeError> {
        Self::serve_all(vec![listener], config)
    }

    /// Serves the same API on several listeners.
    pub fn serve_all(listeners: Vec<TcpListener>, config: Config) -> Result<Self, ServeError> {
        config.check()?;
        let acceptor = config.tls.as_ref().map(acceptor).transpose()?;
        let addresses: Vec<SocketAddr> = listeners
            .iter()
            .map(|listener| listener.local_addr())
            .collect::<Result<_, _>>()
            .map_err(ServeError::Socket)?;
        if acceptor.is_none()
            && let Some(exposed) = addresses.iter().find(|address| !address.ip().is_loopback())
        {
            return Err(ServeError::PlainText(*exposed));
        }
        let settings =
            Settings { bookmark_interval: config.bookmark_interval, max_body: config.max_body_bytes };
        let advertised = config.advertise.or_else(|| addresses.first().copied());
        let known = Addresses::new(config.service_cidrs, advertised);
        let api = Arc::new(Api::new(settings, config.history_events, known));
        let tasks = TaskTracker::new();
        for listener in listeners {
            tasks.spawn(accept(listener, api.clone(), acceptor.clone(), tasks.clone()));
        }
        Ok(Self { api, addresses, tasks })
    }

    /// Where the server listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Forgets the history, as etcd's compaction does: who asks for an older revision is told 410.
    pub fn compact(&self) {
        self.api.state().store.compact();
    }

    /// Ends all watches, as a restarting load balancer does.
    pub fn disconnect_watches(&self) {
        self.api.disconnect_watches();
    }

    /// Ends watches, finishes running requests, and returns when connections are closed.
    pub async fn stop(self) {
        self.api.stopping.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, self.tasks.wait()).await;
    }
}

impl Drop for KubeApi {
    fn drop(&mut self) {
        self.api.stopping.cancel();
    }
}

async fn accept(listener: TcpListener, api: Arc<Api>, acceptor: Option<TlsAcceptor>, tasks: TaskTracker) {
    loop {
        let accepted = tokio::select! {
            () = api.stopping.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                tasks.spawn(connection(stream, peer, api.clone(), acceptor.clone()));
            }
            Err(error) => {
                // Out of file descriptors, say: others must end first.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, api: Arc<Api>, acceptor: Option<TlsAcceptor>) {
    let _ = stream.set_nodelay(true);
    let Some(acceptor) = acceptor else {
        return requests(stream, Some(User::loopback()), api).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let certificates = stream.get_ref().1.peer_certificates();
            let user = certificates.and_then(|c| c.first()).and_then(|c| User::from_certificate(c));
            requests(stream, user, api).await;
        }
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
    }
}

async fn requests<S>(stream: S, user: Option<User>, api: Arc<Api>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stopping = api.stopping.clone();
    let user = Arc::new(user);
    let service = service_fn(move |request| {
        let (api, user) = (api.clone(), user.clone());
        async move { Ok::<_, Infallible>(answer(&api, user.as_ref().as_ref(), request).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection ended");
    }
}

async fn answer(api: &Arc<Api>, user: Option<&User>, request: Request<IncomingBody>) -> Response<Body> {
    let Some(user) = user else { return respond_error(&ApiError::unauthorized()) };
    let (head, body) = request.into_parts();
    let body = match read(body, api.settings.max_body).await {
        Ok(body) => body,
        Err(error) => return respond_error(&error),
    };
    // `kubectl` sends HEAD to probe.
    let method = if head.method == Method::HEAD { Method::GET } else { head.method };
    let incoming = Incoming {
        user,
        method,
        path: head.uri.path(),
        query: Query::parse(head.uri.query()),
        headers: &head.headers,
        body,
    };
    let response = api.answer(&incoming);
    tracing::debug!(
        user = %user.name,
        method = %incoming.method,
        path = %incoming.path,
        status = response.status().as_u16(),
        "request"
    );
    response
}

async fn read(body: IncomingBody, limit: usize) -> Result<Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::too_large(limit)),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("cannot read the body: {error}"))),
        Err(_) => Err(ApiError::bad_request("the body did not come in time")),
    }
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor, ServeError> {
    let unreadable = |what: &'static str| {
        move |why: rustls_pki_types::pem::Error| ServeError::Pem { what, why: why.to_string() }
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&tls.cert_pem)
        .collect::<Result<_, _>>()
        .map_err(unreadable("server certificate"))?;
    let key = PrivateKeyDer::from_pem_slice(&tls.key_pem).map_err(unreadable("server key"))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&tls.client_ca_pem) {
        let certificate = certificate.map_err(unreadable("client CA"))?;
        roots.add(certificate).map_err(|e| ServeError::Tls(e.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    // A request without a certificate is to be answered (with 401), so the handshake lets it pass.
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|e| ServeError::Tls(e.to_string()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_client_cert_verifier(verifier).with_single_cert(chain, key))
        .map_err(|e| ServeError::Tls(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
