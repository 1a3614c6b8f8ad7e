//! Secrets as files, kept up to date, as a kubelet mounts them: the files of a folder are links through `..data`, and that is
//! exchanged in one step, so that no reader meets a certificate beside another's key.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;

use crate::error::{Doing, LabError, Result};
use crate::lab::Ground;
use crate::pki::write_private;

/// Secrets of one namespace, and the folders that show them.
pub(crate) struct Projections {
    shown: watch::Receiver<BTreeMap<String, u64>>,
}

impl Projections {
    /// Shows Secrets in folders from now on, until the lab ends: `folders` by the Secret's name.
    pub(crate) fn start(
        ground: &Arc<Ground>,
        client: Client,
        namespace: &str,
        folders: BTreeMap<String, Vec<PathBuf>>,
    ) -> Self {
        let (tell, shown) = watch::channel(BTreeMap::new());
        let secrets: Api<Secret> = Api::namespaced(client, namespace);
        ground.tasks.spawn(ground.stop.clone().run_until_cancelled_owned(async move {
            // It backs off and resumes by itself.
            let mut events =
                std::pin::pin!(isthmus_node_agent::kubernetes::watch(secrets, watcher::Config::default()));
            loop {
                let secret = match events.try_next().await {
                    Ok(Some(Event::Apply(secret) | Event::InitApply(secret))) => secret,
                    // Files outlive their Secret, as a kubelet's do.
                    Ok(Some(_)) => continue,
                    Ok(None) => return,
                    Err(e) => {
                        tracing::debug!(error = %e, "watching Secrets");
                        continue;
                    }
                };
                let name = secret.name_any();
                let Some(folders) = folders.get(&name) else { continue };
                let data = secret.data.unwrap_or_default();
                match folders.iter().try_for_each(|folder| show(folder, &data)) {
                    Ok(()) => tell.send_modify(|shown| *shown.entry(name).or_default() += 1),
                    Err(e) => tracing::error!(secret = %name, error = %e, "a Secret cannot be shown"),
                }
            }
        }));
        Self { shown }
    }

    /// Waits until a Secret's folders show it.
    ///
    /// # Errors
    /// When it is not there in time.
    pub(crate) async fn shown(&self, secret: &str, within: std::time::Duration) -> Result<()> {
        let mut shown = self.shown.clone();
        let waited = shown.wait_for(|shown| shown.contains_key(secret));
        match tokio::time::timeout(within, waited).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(LabError::Deadline {
                what: format!("Secret {secret}"),
                within,
                last: "nobody has made it".into(),
            }),
        }
    }
}

/// Exchanges what a folder shows.
fn show(folder: &Path, data: &BTreeMap<String, ByteString>) -> Result<()> {
    let doing = || format!("showing a Secret in {}", folder.display());
    let current = folder.join("..data");
    let before = fs::read_link(&current).ok();
    let name = format!("..{}", chrono::Utc::now().timestamp_nanos_opt().unwrap_or_default());
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder.join(&name)).doing(doing)?;
    for (key, ByteString(value)) in data {
        write_private(&folder.join(&name).join(key), value)?;
    }
    let new = folder.join("..data_tmp");
    let _ = fs::remove_file(&new);
    symlink(&name, &new).and_then(|()| fs::rename(&new, &current)).doing(doing)?;
    for key in data.keys() {
        match symlink(Path::new("..data").join(key), folder.join(key)) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e).doing(doing),
            _ => {}
        }
    }
    if let Some(before) = before {
        let _ = fs::remove_dir_all(folder.join(before));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_exchanged_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("certificate");
        let data = |text: &str| {
            let value = |key: &str| (key.to_owned(), ByteString(text.as_bytes().to_vec()));
            BTreeMap::from([value("tls.crt"), value("tls.key")])
        };
        for text in ["first", "second"] {
            show(&folder, &data(text)).unwrap();
            assert_eq!(fs::read_to_string(folder.join("tls.crt")).unwrap(), text);
            assert_eq!(fs::read_to_string(folder.join("tls.key")).unwrap(), text);
        }
        assert_eq!(fs::read_link(folder.join("tls.key")).unwrap(), Path::new("..data/tls.key"));
        let left = fs::read_dir(&folder).unwrap().count();
        assert_eq!(left, 4, "two links, ..data, and what it leads to");
    }
}
