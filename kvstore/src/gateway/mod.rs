//! The read side of the etcd v3 API over a [`MemoryStore`], for clients with certificates.
//!
//! Cilium's agents and relays, `etcdctl` and every etcd v3 client read it as they read etcd 3.5:
//!
//! - **Range** with all its options, **Watch** with all of its own, transactions that only read, **Status**,
//!   **MemberList**. Errors have etcd's codes and etcd's texts.
//! - **Nobody writes.** Writes, leases, users, members and maintenance are refused as etcd refuses a user without the
//!   right, whatever the client's name.
//! - **The certificate's common name decides what is read** ([`Grants`]). A range wider than the grant fails as a whole.
//! - **An authority is believed only the names it may vouch for** ([`Trust`]): a peer's speaks for that peer alone.
//! - **Every answer names the store** (`cluster_id`), so that a reader notices another one in its place.
//!
//! What a client can tie up is bounded ([`GatewayLimits`]): connections, requests, bytes of answers, watches. A slow
//! watcher holds one response; a client that does not take a large answer in time is hung up on.

mod connection;
mod fragment;
mod grants;
mod kv;
mod limits;
mod proto;
mod refusal;
mod reply;
mod status;
mod tls;
mod txn;
mod watch;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use self::connection::Connections;
use self::kv::KvService;
use self::limits::{Budget, Quota};
use self::proto::etcdserverpb::cluster_server::ClusterServer;
use self::proto::etcdserverpb::kv_server::KvServer;
use self::proto::etcdserverpb::lease_server::LeaseServer;
use self::proto::etcdserverpb::maintenance_server::MaintenanceServer;
use self::proto::etcdserverpb::watch_server::WatchServer;
use self::reply::Origin;
use self::status::StatusService;
use self::tls::Handshakes;
use self::watch::WatchService;
use crate::memory::{MemoryStore, StoreId};

pub use self::grants::{ClientGrants, Grants};
pub use self::limits::GatewayLimits;
pub use self::tls::{LiveTls, ServerTls, TlsError, TlsFiles, Trust, TrustedAuthority, Vouches};

/// Requests of clients that only read are small; a transaction of 128 reads with long keys still fits.
const REQUEST_BYTES: usize = 256 << 10;
/// A request on a watch stream names one range.
const WATCH_REQUEST_BYTES: usize = 64 << 10;
/// How long to wait before accepting again when the system has no more sockets to give.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// What a gateway is, beside its address, its certificates and its store.
#[derive(Clone, Debug, Default)]
pub struct GatewayOptions {
    /// Bounds on what clients may take.
    pub limits: GatewayLimits,
    /// The name it has in the list of members. `isthmus` if empty.
    pub name: String,
    /// The addresses that the list of members shows, as `https://host:port`. Its own port on the loopback if empty, as
    /// Cilium's etcd does, since clients come through load balancers and must not be led around them.
    pub client_urls: Vec<String>,
}

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address or stop what uses it")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A running gateway. Dropped, it stops at once; [`Gateway::shutdown`] lets answers end first.
#[derive(Debug)]
pub struct Gateway {
    address: SocketAddr,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    _stop: DropGuard,
}

impl Gateway {
    /// Serves `store` on `listen` with the default options. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`GatewayError`] if the address or the certificates cannot be used. Once it runs, unusable certificates are
    /// logged and the last usable ones stay.
    pub async fn serve(
        listen: SocketAddr,
        tls: impl Into<ServerTls>,
        store: MemoryStore,
        grants: Grants,
    ) -> Result<Self, GatewayError> {
        Self::serve_with(listen, tls, store, grants, GatewayOptions::default()).await
    }

    /// Serves `store` on `listen`.
    ///
    /// # Errors
    /// As [`Gateway::serve`].
    pub async fn serve_with(
        listen: SocketAddr,
        tls: impl Into<ServerTls>,
        store: MemoryStore,
        grants: Grants,
        options: GatewayOptions,
    ) -> Result<Self, GatewayError> {
        let failed = |source| GatewayError::Listen { address: listen, source };
        let tls = Handshakes::new(tls.into())?;
        let listener = bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let shutdown = CancellationToken::new();
        let connections = Connections {
            tls,
            grants,
            routes: routes(&store, address, &options, &shutdown),
            limits: options.limits,
            watches: Quota::new(options.limits.watch_bytes),
            shutdown: shutdown.clone(),
        };
        let tasks = TaskTracker::new();
        tasks.spawn(accept(listener, Arc::new(connections), tasks.clone()));
        tracing::info!(%address, cluster_id = format_args!("{:x}", store.id().0), "gateway listening");
        Ok(Self { address, tasks, _stop: shutdown.clone().drop_guard(), shutdown })
    }

    /// The address it listens on, with the port that the system chose if none was given.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more connections, ends watches with `Unavailable` (clients go elsewhere or come back), lets other
    /// requests end for a few seconds, and closes what is left.
    pub async fn shutdown(self) {
        self.shutdown.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

async fn bind(listen: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(listen).await {
        Err(error) => match without_ipv6(listen, &error) {
            Some(instead) => TcpListener::bind(instead).await,
            None => Err(error),
        },
        bound => bound,
    }
}

/// What all addresses (`[::]`) are on a machine whose kernel was told to have no IPv6 (`ipv6.disable=1`).
fn without_ipv6(listen: SocketAddr, error: &io::Error) -> Option<SocketAddr> {
    let all = listen.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let none = error.raw_os_error() == Some(libc::EAFNOSUPPORT);
    (all && none).then(|| (Ipv4Addr::UNSPECIFIED, listen.port()).into())
}

fn routes(
    store: &MemoryStore,
    address: SocketAddr,
    options: &GatewayOptions,
    shutdown: &CancellationToken,
) -> Routes {
    let StoreId(member) = StoreId::random();
    let origin = Origin { store: store.id(), member };
    let limits = options.limits;
    let kv = KvService { store: store.clone(), origin, answers: Budget::new(limits.answer_bytes) };
    let watch = WatchService {
        store: store.clone(),
        origin,
        progress_interval: limits.progress_interval,
        shutdown: shutdown.clone(),
    };
    let name = if options.name.is_empty() { "isthmus".to_owned() } else { options.name.clone() };
    let mut client_urls = options.client_urls.clone();
    if client_urls.is_empty() {
        client_urls.push(format!("https://127.0.0.1:{}", address.port()));
    }
    let status = StatusService { store: store.clone(), origin, name, client_urls };
    // Answers are as large as what is asked for, as with etcd; a `Budget` bounds all of them together.
    let kv = KvServer::new(kv).max_decoding_message_size(REQUEST_BYTES).max_encoding_message_size(usize::MAX);
    let watch = WatchServer::new(watch)
        .max_decoding_message_size(WATCH_REQUEST_BYTES)
        .max_encoding_message_size(usize::MAX);
    Routes::new(kv)
        .add_service(watch)
        .add_service(LeaseServer::new(status.clone()).max_decoding_message_size(REQUEST_BYTES))
        .add_service(ClusterServer::new(status.clone()).max_decoding_message_size(REQUEST_BYTES))
        .add_service(MaintenanceServer::new(status).max_decoding_message_size(REQUEST_BYTES))
        .prepare()
}

async fn accept(listener: TcpListener, connections: Arc<Connections>, tasks: TaskTracker) {
    let places = Arc::new(Semaphore::new(connections.limits.connections));
    loop {
        let next = async {
            // Without a free place clients wait in the system's queue, which is bounded.
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            () = connections.shutdown.cancelled() => return,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => {
                // Events are small and should not wait for more of them.
                let _ = stream.set_nodelay(true);
                let connections = connections.clone();
                tasks.spawn(async move {
                    connections.serve(stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_those_of_ipv4_where_there_is_no_ipv6() {
        let none = io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
        let instead = |listen: &str, error| without_ipv6(listen.parse().expect("an address"), error);
        assert_eq!(instead("[::]:2379", &none), "0.0.0.0:2379".parse().ok());
        for one in ["[::1]:2379", "[2001:db8::1]:2379", "0.0.0.0:2379"] {
            assert_eq!(instead(one, &none), None, "{one} is what was asked for");
        }
        assert_eq!(instead("[::]:2379", &io::ErrorKind::AddrInUse.into()), None);
    }
}
