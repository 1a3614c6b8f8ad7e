//! One connection to one endpoint: TCP, TLS with certificates read now, HTTP/2 with keepalive.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, ConnectOptions};
use hyper_util::rt::TokioIo;
use rustls::{RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Mutex,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::config::{ClientConfig, Endpoint, IdentityError, Pem};

/// How long the whole of TCP, TLS and HTTP/2 may take for one endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A ping is sent when nothing has come for this long. etcd refuses clients that ping more often than every 5 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(6);
/// The connection is dead when a ping is unanswered for this long.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);
/// What one stream may have in flight unread: a slow consumer holds back its own watch by this much.
const STREAM_WINDOW: u32 = 1 << 20;
/// What all streams together may have in flight unread. Far more than one stream's, so that a few slow consumers do
/// not hold back the others, the heartbeat among them.
const CONNECTION_WINDOW: u32 = 64 << 20;

/// Why no endpoint could be connected to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The authorities that are trusted cannot be read.
    #[error("{field} {reason}")]
    Authority {
        /// Where they should be.
        field: String,
        /// What is wrong with them.
        reason: String,
    },
    /// The certificate and the key do not make an identity together.
    #[error("this side's identity: {0}")]
    Identity(#[source] IdentityError),
    /// The endpoint's host is neither a DNS name nor an address.
    #[error("{endpoint}: the host is not a valid name for TLS")]
    ServerName {
        /// The endpoint.
        endpoint: Endpoint,
    },
    /// Nothing answers at the endpoint.
    #[error(
        "{endpoint}: cannot connect: {source}; is the address right, and is the port open for this host?"
    )]
    Unreachable {
        /// The endpoint.
        endpoint: Endpoint,
        /// What the system said.
        source: std::io::Error,
    },
    /// TLS was refused by either side.
    #[error("{endpoint}: TLS: {source}; do both sides trust the authority of the other's certificate?")]
    Tls {
        /// The endpoint.
        endpoint: Endpoint,
        /// What TLS said.
        source: std::io::Error,
    },
    /// Something answered, but not in time.
    #[error("{endpoint}: no connection within {}s; are packets to it dropped on the way?", CONNECT_TIMEOUT.as_secs())]
    TimedOut {
        /// The endpoint.
        endpoint: Endpoint,
    },
    /// HTTP/2 or the login failed on an established connection.
    #[error("{endpoint}: {reason}")]
    Protocol {
        /// The endpoint.
        endpoint: Endpoint,
        /// What is wrong.
        reason: String,
    },
}

/// Connects to the first endpoint that answers, beginning with the one that `attempt` falls on, so that repeated
/// attempts go round the list.
///
/// The certificate files are read at each call. The connection is never re-established underneath: once it breaks,
/// every call on it fails, and whoever holds it knows that there may have been a gap.
///
/// # Errors
/// The error of the last endpoint that was tried.
pub(crate) async fn connect(
    config: &ClientConfig,
    attempt: usize,
) -> Result<(Client, Endpoint), ConnectError> {
    let count = config.endpoints.len();
    let mut last = None;
    for index in 0..count {
        let endpoint = &config.endpoints[(attempt + index) % count];
        let connection = timeout(CONNECT_TIMEOUT, connect_to(config, endpoint)).await;
        match connection.unwrap_or_else(|_| Err(ConnectError::TimedOut { endpoint: endpoint.clone() })) {
            Ok(client) => return Ok((client, endpoint.clone())),
            Err(error) => {
                tracing::debug!(%endpoint, %error, "endpoint is not usable");
                last = Some(error);
            }
        }
    }
    Err(last.expect("a client configuration lists at least one endpoint"))
}

async fn connect_to(config: &ClientConfig, endpoint: &Endpoint) -> Result<Client, ConnectError> {
    let unreachable = |source| ConnectError::Unreachable { endpoint: endpoint.clone(), source };
    let tls = if endpoint.tls { Some(tls_config(config)?) } else { None };
    let tcp = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await.map_err(unreachable)?;
    tcp.set_nodelay(true).map_err(unreachable)?;
    match tls {
        None => over(config, endpoint, tcp).await,
        Some(tls) => {
            let name =
                ServerName::try_from(config.server_name.clone().unwrap_or_else(|| endpoint.host.clone()))
                    .map_err(|_| ConnectError::ServerName { endpoint: endpoint.clone() })?;
            let stream = TlsConnector::from(Arc::new(tls))
                .connect(name, tcp)
                .await
                .map_err(|source| ConnectError::Tls { endpoint: endpoint.clone(), source })?;
            over(config, endpoint, stream).await
        }
    }
}

/// Speaks HTTP/2 over `stream`, which is the only one this client ever has.
async fn over<S>(config: &ClientConfig, endpoint: &Endpoint, stream: S) -> Result<Client, ConnectError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let protocol = |reason: String| ConnectError::Protocol { endpoint: endpoint.clone(), reason };
    let stream = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let only_once = tower::service_fn(move |_: http::Uri| {
        let stream = Arc::clone(&stream);
        async move { stream.lock().await.take().ok_or_else(|| std::io::Error::other("the connection was lost")) }
    });
    // tonic must not add TLS of its own, so it is told `http`; the peer is told the truth through `origin`.
    let authority = endpoint.authority();
    let origin = endpoint.to_string().parse().map_err(|error| protocol(format!("{error}")))?;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{authority}"))
        .map_err(|error| protocol(error.to_string()))?
        .origin(origin)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector(only_once)
        .await
        .map_err(|error| protocol(chain(&error)))?;
    let mut options = ConnectOptions::new().with_require_leader(true);
    if let Some(user) = &config.password {
        options = options.with_user(&user.name, &user.password);
    }
    Client::from_channel(etcd_client::Channel::Tonic(channel), Some(options))
        .await
        .map_err(|error| protocol(error.to_string()))
}

fn tls_config(config: &ClientConfig) -> Result<rustls::ClientConfig, ConnectError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    if let Some(trusted) = &config.trusted_ca {
        let unusable = |reason| ConnectError::Authority { field: place(trusted), reason };
        for certificate in trusted.certificates().map_err(|error| unusable(error.to_string()))? {
            roots.add(certificate).map_err(|error| unusable(format!("cannot be used: {error}")))?;
        }
    }
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ConnectError::Identity(IdentityError::Mismatch(error)))?
        .with_root_certificates(roots);
    let mut tls = match &config.identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let certified = identity.current().map_err(ConnectError::Identity)?;
            builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)))
        }
    };
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(tls)
}

fn place(pem: &Pem) -> String {
    match pem {
        Pem::File(path) => format!("trusted-ca-file {}", path.display()),
        Pem::Text(_) => "the trusted authority".into(),
    }
}

/// An error with its causes, which tonic's `Display` leaves out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
