//! HTTP/2 and the login on a connection, up to the first word of the other side.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use etcd_client::{Client, ConnectOptions};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Mutex, watch},
};

use super::{
    handshake::Secured,
    problem::{Circumstances, TlsProblem},
};
use crate::config::{ClientConfig, Endpoint};

/// A ping is sent when nothing has come for this long. etcd refuses clients that ping more often than every 5 s.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(6);
/// The connection is dead when a ping is unanswered for this long.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);
/// What one stream may have in flight unread: a slow consumer holds back its own watch by this much.
const STREAM_WINDOW: u32 = 1 << 20;
/// What all streams together may have in flight unread. Far more than one stream's, so that a few slow consumers do
/// not hold back the others, the heartbeat among them.
const CONNECTION_WINDOW: u32 = 64 << 20;

/// Why a connection is of no use although TLS was agreed on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// The other side has looked at this side's certificate meanwhile, and refuses it.
    #[error(transparent)]
    Tls(TlsProblem),
    /// HTTP/2 or the login failed.
    #[error("{0}; does a gateway or an etcd answer there?")]
    Protocol(String),
}

/// Begins to speak the etcd v3 API over a connection, and waits until the other side has said its first word: in TLS
/// 1.3 only that tells whether it takes this side's certificate.
///
/// The connection is never re-established underneath: once it breaks, every call on it fails, and whoever holds it
/// knows that there may have been a gap.
///
/// # Errors
/// [`OpenError`]
pub async fn open(config: &ClientConfig, endpoint: &Endpoint, secured: Secured) -> Result<Client, OpenError> {
    let protocol = |reason: String| OpenError::Protocol(reason);
    let (heard, mut hearing) = watch::channel(Heard::Nothing);
    let stream = Listening { circumstances: secured.circumstances.clone(), stream: secured, heard };
    let stream = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let only_once = tower::service_fn(move |_: http::Uri| {
        let stream = Arc::clone(&stream);
        async move { stream.lock().await.take().ok_or_else(|| io::Error::other("the connection was lost")) }
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
    // A server begins with its settings (RFC 9113, section 3.4), whatever it is asked afterwards.
    let first = hearing.wait_for(|heard| !matches!(heard, Heard::Nothing)).await.map(|heard| heard.clone());
    match first {
        Ok(Heard::Refusal(problem)) => return Err(OpenError::Tls(problem)),
        Ok(Heard::Failure(reason)) => return Err(protocol(reason)),
        Err(_) => return Err(protocol("the connection ended before the other side said anything".into())),
        Ok(Heard::Something | Heard::Nothing) => {}
    }
    let mut options = ConnectOptions::new().with_require_leader(true);
    if let Some(user) = &config.password {
        options = options.with_user(&user.name, &user.password);
    }
    Client::from_channel(etcd_client::Channel::Tonic(channel), Some(options))
        .await
        .map_err(|error| protocol(error.to_string()))
}

/// What has come from the other side.
#[derive(Debug, Clone)]
enum Heard {
    Nothing,
    Something,
    Refusal(TlsProblem),
    Failure(String),
}

/// Passes everything through, and tells what came first.
struct Listening {
    stream: Secured,
    circumstances: Option<Circumstances>,
    heard: watch::Sender<Heard>,
}

impl Listening {
    fn first(&self, news: impl FnOnce() -> Heard) {
        self.heard.send_if_modified(|heard| {
            let first = matches!(heard, Heard::Nothing);
            if first {
                *heard = news();
            }
            first
        });
    }

    fn failed(&self, error: &io::Error) {
        self.first(|| match &self.circumstances {
            Some(circumstances) if is_tls(error) => Heard::Refusal(circumstances.explain(error)),
            _ => Heard::Failure(error.to_string()),
        });
    }

    /// Writing fails when the other side has closed the connection. What it said before may still be there to read.
    fn cannot_write(&mut self, context: &mut Context<'_>, error: &io::Error) {
        if !matches!(*self.heard.borrow(), Heard::Nothing) {
            return;
        }
        let mut bytes = [0; 64];
        match Pin::new(&mut self.stream).poll_read(context, &mut ReadBuf::new(&mut bytes)) {
            Poll::Ready(Err(last)) => self.failed(&last),
            _ => self.failed(error),
        }
    }
}

fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<rustls::Error>())
}

impl AsyncRead for Listening {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut this.stream).poll_read(context, buffer));
        match &result {
            Ok(()) if buffer.filled().len() > before => this.first(|| Heard::Something),
            Ok(()) => this.first(|| Heard::Failure("the other side ended the connection".into())),
            Err(error) => this.failed(error),
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Listening {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write(context, bytes));
        if let Err(error) = &result {
            this.cannot_write(context, error);
        }
        Poll::Ready(result)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_flush(context));
        if let Err(error) = &result {
            this.cannot_write(context, error);
        }
        Poll::Ready(result)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
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
