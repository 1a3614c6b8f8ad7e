//! Access to the Kubernetes API.

use std::path::PathBuf;

use super::DaemonError;
use crate::exporter::chain;

/// A client with the access in the file or, without one, that of the pod's service account. Nothing is asked yet.
pub(super) async fn client(kubeconfig: Option<&PathBuf>) -> Result<kube::Client, DaemonError> {
    let config = match kubeconfig {
        Some(path) => {
            let failed = |error: kube::config::KubeconfigError| DaemonError::Kubeconfig {
                path: path.clone(),
                problem: chain(&error),
            };
            let file = kube::config::Kubeconfig::read_from(path).map_err(failed)?;
            kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
                .await
                .map_err(failed)?
        }
        None => kube::Config::incluster().map_err(|error| DaemonError::InCluster(chain(&error)))?,
    };
    kube::Client::try_from(config).map_err(|error| match kubeconfig {
        Some(path) => DaemonError::Kubeconfig { path: path.clone(), problem: chain(&error) },
        None => DaemonError::InCluster(chain(&error)),
    })
}
