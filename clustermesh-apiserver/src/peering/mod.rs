//! Tells the Kubernetes API how the connections to peers are: ClusterPeers with their conditions, and Events.
//!
//! ```text
//!   relay ──(something changed)──▶ what each ClusterPeer should say ──▶ differs, and not written too often? ──▶ written
//!                                                                                          └──▶ Events
//! ```
//!
//! Only while this replica leads. What an earlier leader wrote is taken over: conditions keep the time of their last change, and
//! a ClusterPeer whose peer is gone is deleted, though not before it is certain that it is gone.

mod conditions;
mod events;
mod keeper;
mod object;
mod pace;
mod subject;

use isthmus_crds::ClusterPeer;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::keeper::Keeper;
use crate::relay::Relay;

/// Keeps the ClusterPeers right while `leader` is true, until `shutdown`.
///
/// Needs list, get, create, patch and delete on clusterpeers, patch on clusterpeers/status, and create and patch on events (those
/// about ClusterPeers are in namespace `default`, as for everything that is in no namespace). What fails is tried again.
pub async fn keep(
    client: Client,
    relay: Relay,
    mut leader: watch::Receiver<bool>,
    shutdown: CancellationToken,
) {
    let (events, queue) = events::channel();
    let api: Api<ClusterPeer> = Api::all(client.clone());
    let work = async {
        while leader.wait_for(|leads| *leads).await.is_ok() {
            let mut keeper = Keeper::new(api.clone(), relay.clone(), events.clone());
            tokio::select! {
                () = keeper.run() => {}
                _ = leader.wait_for(|leads| !*leads) => {}
            }
        }
    };
    let work = async {
        tokio::select! {
            () = work => {}
            () = events::send(client, queue) => {}
        }
    };
    shutdown.run_until_cancelled(work).await;
}
