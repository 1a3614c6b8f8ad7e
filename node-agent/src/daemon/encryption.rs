//! Starts what encryption needs, or takes it back.

use std::collections::BTreeSet;
use std::sync::Arc;

use isthmus_wireguard::config::PublicKey;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{Config, DaemonError};
use crate::datapath::{Datapath, EncryptionMode, routing};
use crate::encryption::publication::{self, OwnNode, Wanted};
use crate::encryption::{EncryptionStatus, KeyFiles, Prober, SharedPeers, Task};

/// What runs, for as long as this is kept.
pub(super) struct Encryption {
    /// To be kept up to date by the reconciler.
    pub(super) peers: Option<Arc<SharedPeers>>,
    pub(super) status: watch::Receiver<EncryptionStatus>,
    /// Asks which nodes can be reached.
    pub(super) prober: Prober,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// Starts it.
///
/// # Errors
/// The key cannot be read, or the kernel refuses.
pub(super) async fn start(
    config: &Config,
    client: Client,
    datapath: &Arc<Datapath>,
    shutdown: &CancellationToken,
) -> Result<Encryption, DaemonError> {
    let files = KeyFiles::new(&config.state_dir);
    let (wanted, wanted_of) = watch::channel(Wanted::AsItIs);
    let (seen, node) = watch::channel(OwnNode::default());
    let publication =
        publication::run(Api::all(client), config.node.clone(), wanted_of, seen, shutdown.clone());
    let mut tasks = Vec::new();
    let Some(settings) = &config.encryption else {
        datapath.set_encryption(EncryptionMode::Off)?;
        if let Err(error) = routing::remove().await {
            tracing::warn!(%error, "the way to the encryption device stays");
        }
        let of = own_keys(&files);
        if !of.is_empty() {
            wanted.send_replace(Wanted::Nothing { of });
            // Keeps its end of the channel: what is to be withdrawn stays so.
            tasks.push(spawn(async move {
                publication.await;
                drop(wanted);
            }));
        }
        let (_, status) = watch::channel(EncryptionStatus::default());
        let prober = Prober::off(config.own.name.as_str(), &config.node, status.clone());
        return Ok(Encryption { peers: None, status, prober, _tasks: tasks });
    };
    if datapath.encryption()? == EncryptionMode::Off {
        // Until the device has been found, what must be encrypted is not sent at all.
        datapath.set_encryption(EncryptionMode::On { device: None, strict: settings.strict })?;
    }
    match routing::outward().await {
        Ok(interfaces) => datapath.watch_over(&interfaces)?,
        Err(error) => tracing::warn!(
            %error,
            "what leaves this node is not watched over: a pod may be heard in the clear until its programs are attached"
        ),
    }
    let waiting = EncryptionStatus {
        enabled: true,
        strict: settings.strict,
        interface: settings.location.interface.clone(),
        port: settings.port,
        problem: Some("the device has not been set up yet".to_owned()),
        ..EncryptionStatus::default()
    };
    let (status, status_of) = watch::channel(waiting);
    let (prober, questions) = Prober::new(config.own.name.as_str(), &config.node, status_of.clone());
    let task =
        Task::prepare(settings.clone(), files, datapath.clone(), node, wanted, status, questions).await?;
    let peers = task.peers();
    tasks.push(spawn(publication));
    tasks.push(spawn(task.run(shutdown.clone())));
    Ok(Encryption { peers: Some(peers), status: status_of, prober, _tasks: tasks })
}

fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

/// This node's keys, as far as they can be read.
fn own_keys(files: &KeyFiles) -> BTreeSet<PublicKey> {
    let keys = [files.current(), files.next()];
    let read = keys.into_iter().filter_map(|key| match key {
        Ok(key) => key,
        Err(error) => {
            tracing::warn!(%error, "if this node has published a key, it stays published");
            None
        }
    });
    read.map(|key| key.key.public_key()).collect()
}
