//! A door from the root namespace's loopback into a control plane: how `kubectl`, and the lab itself, reach a
//! cluster's Kubernetes API. The only one: nothing in the root namespace has a route to anything else of a lab.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::error::{Doing, Result};
use crate::netns::NetNs;

/// Accepts on a free port of 127.0.0.1 and connects each to `to`, as seen from inside `ns`, until `stop`.
/// Returns the address it accepts on.
///
/// # Errors
/// When no port can be had.
pub(crate) async fn forward(ns: NetNs, to: SocketAddr, stop: CancellationToken) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.doing(|| "listening on 127.0.0.1")?;
    let address = listener.local_addr().doing(|| "asking for the port")?;
    tokio::spawn(stop.run_until_cancelled_owned(async move {
        loop {
            // Accepting fails for want of descriptors at most; the next try may do better.
            let Ok((near, _)) = listener.accept().await else {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            };
            let ns = ns.clone();
            tokio::spawn(async move {
                if let Err(e) = join(near, &ns, to).await {
                    tracing::debug!(%to, error = %e, "a forwarded connection ended");
                }
            });
        }
    }));
    Ok(address)
}

async fn join(mut near: TcpStream, ns: &NetNs, to: SocketAddr) -> std::io::Result<()> {
    near.set_nodelay(true)?;
    let mut far = ns.connect(to).await?;
    tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop)
}
