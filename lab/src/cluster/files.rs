//! Trust and peers by files: one authority for all clusters, and an etcd client configuration for each peer in a folder, as
//! Cilium's own installation has them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use clustermesh_apiserver::pki::Client;

use super::{Cluster, Flags, client_config};
use crate::error::{Doing, LabError, Result};
use crate::pki::{Authority, CertFiles};
use crate::state;

impl Cluster {
    /// Certificates of all of the cluster's programs, and peer files.
    pub(crate) fn write_files(&self, pki: &Authority, all: &[Cluster]) -> Result<()> {
        let addresses: Vec<String> = self.gateways().iter().map(|gateway| gateway.ip().to_string()).collect();
        pki.gateway(&format!("{}-gateway", self.name()), &addresses)?;
        let ca = pki.ca();
        let admin = pki.mesh_client(Client::Admin(self.name()))?;
        folder(&self.ground.state.admin_certificate(self.name()), &ca, &admin)?;
        pki.mesh_client(Client::Local(self.name()))?;
        let remote = self.ground.state.cluster(self.name()).join("remote");
        folder(&remote, &ca, &pki.mesh_client(Client::Remote(self.name()))?)?;
        for peer in &self.spec.peers {
            let other = all.iter().find(|c| c.name() == peer);
            let other =
                other.ok_or_else(|| LabError::invalid(format!("there is no cluster {peer} to join")))?;
            let gateways: Vec<String> = other.gateways().iter().map(|g| format!("https://{g}")).collect();
            let config = client_config(&gateways, &remote);
            state::write_whole(&self.peers_dir().join(peer), config.as_bytes())?;
        }
        let agent = pki.mesh_client(Client::Agent(self.name()))?;
        for node in self.nodes() {
            folder(&self.ground.state.agent_certificate(self.name(), node), &ca, &agent)?;
        }
        Ok(())
    }

    /// The folder with its peers' files.
    fn peers_dir(&self) -> PathBuf {
        self.ground.state.cluster(self.name()).join("peers")
    }

    pub(super) fn files_flags(&self, flags: &mut Flags) {
        let pki = self.ground.state.path().join("pki");
        flags.add("--peers-dir", self.peers_dir());
        flags.add("--tls-cert", pki.join(format!("{}-gateway.crt", self.name())));
        flags.add("--tls-key", pki.join(format!("{}-gateway.key", self.name())));
        flags.add("--tls-client-ca", pki.join("ca.crt"));
    }
}

/// A certificate under the names that it has where a Secret is mounted.
fn folder(dir: &Path, ca: &Path, identity: &CertFiles) -> Result<()> {
    let doing = || format!("making {}", dir.display());
    fs::create_dir_all(dir).doing(doing)?;
    symlink(ca, dir.join("ca.crt")).doing(doing)?;
    symlink(&identity.certificate, dir.join("tls.crt")).doing(doing)?;
    symlink(&identity.key, dir.join("tls.key")).doing(doing)
}
