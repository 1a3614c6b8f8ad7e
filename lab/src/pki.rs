//! Certificates of the lab's Kubernetes APIs, and kubeconfigs that use them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clustermesh_apiserver::pki::{self, Client, Identity, PkiError};
use serde_json::{Value, json};

use crate::error::{Doing, LabError, Result};

/// A lab does not live for long, but its clock may be wrong.
const VALIDITY: Duration = Duration::from_secs(30 * 24 * 3600);

/// Paths of a certificate and its key, both PEM.
pub(crate) type CertFiles = pki::IdentityFiles;

/// A certificate authority whose certificates lie in one folder.
pub(crate) struct Authority {
    authority: pki::Authority,
    dir: PathBuf,
}

impl Authority {
    /// Makes one, and writes `ca.crt` into `dir`.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(crate) fn create(common_name: &str, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).doing(|| format!("making {}", dir.display()))?;
        let authority = pki::Authority::generate(common_name, VALIDITY).map_err(refused)?;
        authority.write(dir, "ca").map_err(refused)?;
        Ok(Self { authority, dir: dir.to_owned() })
    }

    /// Path of its own certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A server's certificate, `<file>.crt` and `<file>.key`, valid for these names and addresses.
    ///
    /// # Errors
    /// When a name cannot be in a certificate, or the files cannot be written.
    pub(crate) fn server(&self, file: &str, names: &[String]) -> Result<CertFiles> {
        self.write(file, self.authority.server(file, names, VALIDITY))
    }

    /// The certificate of a mesh gateway.
    ///
    /// # Errors
    /// As [`Authority::server`].
    pub(crate) fn gateway(&self, file: &str, extra: &[String]) -> Result<CertFiles> {
        self.write(file, self.authority.gateway("isthmus-system", extra, VALIDITY))
    }

    /// The certificate of a mesh gateway's client, named after its user.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn mesh_client(&self, client: Client<'_>) -> Result<CertFiles> {
        self.write(&client.common_name(), self.authority.client(client, VALIDITY))
    }

    /// A Kubernetes user's certificate, `<file>.crt` and `<file>.key`: the API takes the common name as the user and
    /// the organisations as its groups.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn user(&self, file: &str, user: &str, groups: &[&str]) -> Result<CertFiles> {
        self.write(file, self.authority.user(user, groups, VALIDITY))
    }

    fn write(&self, file: &str, identity: Result<Identity, PkiError>) -> Result<CertFiles> {
        identity.and_then(|identity| identity.write(&self.dir, file)).map_err(refused)
    }
}

/// Writes a kubeconfig with one context, named after the cluster. The certificates go into it, so that it can be
/// copied elsewhere.
///
/// # Errors
/// When a certificate cannot be read or the file not be written.
pub(crate) fn write_kubeconfig(
    path: &Path,
    cluster: &str,
    server: &str,
    ca: &Path,
    client: &CertFiles,
) -> Result<()> {
    use base64::Engine;
    let read = |path: &Path| -> Result<String> {
        let bytes = fs::read(path).doing(|| format!("reading {}", path.display()))?;
        Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": {"server": server, "certificate-authority-data": read(ca)?}}],
        "users": [{"name": cluster, "user": {
            "client-certificate-data": read(&client.certificate)?, "client-key-data": read(&client.key)?,
        }}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
        "current-context": cluster,
    });
    write_private(path, config.to_string().as_bytes())
}

/// Puts the contexts of several kubeconfigs of [`write_kubeconfig`] into one; the first is the current one.
///
/// # Errors
/// When one cannot be read or the file not be written.
pub(crate) fn merge_kubeconfigs(path: &Path, parts: &[PathBuf]) -> Result<()> {
    let mut all: Option<Value> = None;
    for part in parts {
        let mut config: Value = crate::state::read_json(part)?;
        let Some(all) = &mut all else {
            all = Some(config);
            continue;
        };
        for list in ["clusters", "users", "contexts"] {
            if let (Some(all), Some(more)) = (all[list].as_array_mut(), config[list].as_array_mut()) {
                all.append(more);
            }
        }
    }
    write_private(path, all.unwrap_or_default().to_string().as_bytes())
}

/// Writes a file that only its owner may read.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).doing(|| format!("writing {}", path.display()))
}

fn refused(e: PkiError) -> LabError {
    LabError::invalid(format!("making a certificate: {e}"))
}
