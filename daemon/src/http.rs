use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// A loopback address and port: the only place for plain text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoopbackAddr(SocketAddr);

impl LoopbackAddr {
    /// This port of 127.0.0.1.
    pub const fn ipv4(port: u16) -> Self {
        Self(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
    }

    /// Address and port.
    pub fn socket_addr(self) -> SocketAddr {
        self.0
    }
}

impl fmt::Display for LoopbackAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for LoopbackAddr {
    type Err = NotLoopback;

    fn from_str(text: &str) -> Result<Self, NotLoopback> {
        let addr: SocketAddr = text.parse().map_err(|_| NotLoopback::Malformed(text.to_owned()))?;
        if is_loopback(addr.ip()) { Ok(Self(addr)) } else { Err(NotLoopback::Elsewhere(addr)) }
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// Why an address is refused for a plain-text listener.
#[derive(Debug, thiserror::Error)]
pub enum NotLoopback {
    /// Not an address and a port.
    #[error("`{0}` is not an address and a port: write 127.0.0.1:PORT or [::1]:PORT")]
    Malformed(String),
    /// An address that others can reach.
    #[error(
        "{0} is not a loopback address, and this endpoint speaks plain text: use 127.0.0.1 or [::1], and a sidecar or \
         proxy with TLS where it must be reached from elsewhere"
    )]
    Elsewhere(SocketAddr),
}

/// Whether the daemon is ready, and if not, what it waits for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Readiness {
    /// Ready.
    Ready,
    /// Not yet; the text names what is missing.
    Waiting(String),
}

/// Why the endpoints could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// A TCP address cannot be listened on.
    #[error("{what}: cannot listen on {addr}: {source}; choose another port with {flag}")]
    Bind {
        /// The endpoint.
        what: &'static str,
        /// Its address.
        addr: LoopbackAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The API socket cannot be made.
    #[error("API socket {path}: {source}; choose another path with --api-socket")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Something that is no socket is in the way.
    #[error("API socket {0}: a file that is not a socket is there; choose another path with --api-socket")]
    InTheWay(PathBuf),
}

/// The local HTTP endpoints of a daemon: health, metrics and an API socket.
///
/// Each is served from the call that opens it until the shutdown token is cancelled; [`Endpoints::finish`] waits for
/// the requests under way and removes the socket.
pub struct Endpoints {
    tasks: JoinSet<()>,
    sockets: Vec<PathBuf>,
    shutdown: CancellationToken,
}

impl Endpoints {
    /// None open yet.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { tasks: JoinSet::new(), sockets: Vec::new(), shutdown }
    }

    /// `/healthz` (200 while the process runs), `/readyz` (200, or 503 and the reason), and what `more` adds.
    ///
    /// # Errors
    /// [`HttpError::Bind`] if the address is taken.
    pub async fn health(
        &mut self,
        addr: LoopbackAddr,
        readiness: impl Fn() -> Readiness + Clone + Send + Sync + 'static,
        more: Router,
    ) -> Result<SocketAddr, HttpError> {
        let ready = move || {
            let answer = match readiness() {
                Readiness::Ready => (StatusCode::OK, "ok\n".to_owned()),
                Readiness::Waiting(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            };
            std::future::ready(answer)
        };
        let router = more.route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(ready));
        self.tcp("health", "--health-address", addr, router).await
    }

    /// `/metrics` in the OpenMetrics text format.
    ///
    /// # Errors
    /// [`HttpError::Bind`] if the address is taken.
    pub async fn metrics(
        &mut self,
        addr: LoopbackAddr,
        registry: Arc<Registry>,
    ) -> Result<SocketAddr, HttpError> {
        let metrics = move || std::future::ready(render(&registry));
        self.tcp("metrics", "--metrics-address", addr, Router::new().route("/metrics", get(metrics))).await
    }

    /// `router` on a unix socket that its owner alone may open. A socket left by an earlier run is replaced.
    ///
    /// # Errors
    /// [`HttpError::Socket`] or [`HttpError::InTheWay`].
    pub fn api(&mut self, path: &Path, router: Router) -> Result<(), HttpError> {
        let socket = |source| HttpError::Socket { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path).map_err(socket)?,
            Ok(_) => return Err(HttpError::InTheWay(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(socket(error)),
        }
        let listener = UnixListener::bind(path).map_err(socket)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(socket)?;
        self.sockets.push(path.to_owned());
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            let served =
                axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
            log_end("API socket", served);
        });
        Ok(())
    }

    /// Waits until the shutdown token is cancelled and the requests under way are answered.
    pub async fn finish(mut self) {
        while self.tasks.join_next().await.is_some() {}
        for path in self.sockets {
            if let Err(error) = fs::remove_file(&path) {
                tracing::debug!(path = %path.display(), %error, "API socket not removed");
            }
        }
    }

    async fn tcp(
        &mut self,
        what: &'static str,
        flag: &'static str,
        addr: LoopbackAddr,
        router: Router,
    ) -> Result<SocketAddr, HttpError> {
        let bind = |source| HttpError::Bind { what, addr, flag, source };
        let listener = TcpListener::bind(addr.0).await.map_err(bind)?;
        let local = listener.local_addr().map_err(bind)?;
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            let served =
                axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
            log_end(what, served);
        });
        Ok(local)
    }
}

fn render(registry: &Registry) -> axum::response::Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn log_end(what: &'static str, served: io::Result<()>) {
    if let Err(error) = served {
        tracing::error!(endpoint = what, %error, "endpoint ended");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite, path: &str) -> String {
        let mut stream = Box::pin(stream);
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[test]
    fn plain_text_stays_on_loopback() {
        for good in ["127.0.0.1:9880", "[::1]:9880", "127.8.8.8:1", "[::ffff:127.0.0.1]:80"] {
            good.parse::<LoopbackAddr>().unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in ["0.0.0.0:9880", "[::]:9880", "10.0.0.1:9880", "localhost:9880", "127.0.0.1", ""] {
            bad.parse::<LoopbackAddr>().expect_err(bad);
        }
    }

    #[tokio::test]
    async fn readiness_says_what_it_waits_for() {
        let shutdown = CancellationToken::new();
        let mut endpoints = Endpoints::new(shutdown.clone());
        let (ready, waits) = tokio::sync::watch::channel(false);
        let readiness = move || match *waits.borrow() {
            true => Readiness::Ready,
            false => Readiness::Waiting("waiting for the first list of services".to_owned()),
        };
        let addr = endpoints.health("127.0.0.1:0".parse().unwrap(), readiness, Router::new()).await.unwrap();
        let answer = ask(tokio::net::TcpStream::connect(addr).await.unwrap(), "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("list of services"), "{answer}");
        ready.send(true).unwrap();
        let answer = ask(tokio::net::TcpStream::connect(addr).await.unwrap(), "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        shutdown.cancel();
        endpoints.finish().await;
    }

    #[tokio::test]
    async fn the_api_socket_is_private_replaces_a_stale_one_and_goes_with_the_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        let shutdown = CancellationToken::new();
        let mut endpoints = Endpoints::new(shutdown.clone());
        endpoints.api(&path, Router::new().route("/v1/status", get(|| async { "fine" }))).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let answer = ask(tokio::net::UnixStream::connect(&path).await.unwrap(), "/v1/status").await;
        assert!(answer.ends_with("fine"), "{answer}");
        shutdown.cancel();
        endpoints.finish().await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_in_the_way_of_the_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = Endpoints::new(CancellationToken::new()).api(&path, Router::new()).unwrap_err();
        assert!(matches!(error, HttpError::InTheWay(_)), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }
}
