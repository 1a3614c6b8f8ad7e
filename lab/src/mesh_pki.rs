//! Certificates of the mesh: one authority for all clusters, as Cilium's `cilium-ca` is.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::pki::{Authority, CertFiles};

/// The mesh's authority.
pub(crate) struct MeshPki(Authority);

impl MeshPki {
    /// Makes one in `dir`.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        Authority::create("Isthmus CA", dir).map(Self)
    }

    /// The authority's certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.0.ca()
    }

    /// The gateway of `cluster`.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn gateway(&self, cluster: &str, addresses: &[IpAddr]) -> Result<CertFiles> {
        let own = format!("{cluster}.mesh.cilium.io");
        let dns = ["clustermesh-apiserver.cilium.io", &own, "*.mesh.cilium.io", "localhost"];
        self.0.server(&format!("{cluster}-gateway"), &dns, addresses)
    }

    /// With which `cluster` reads its peers' gateways.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn remote(&self, cluster: &str) -> Result<CertFiles> {
        let user = format!("remote-{cluster}");
        self.0.client(&user, &user, &[])
    }

    /// With which the agents of `cluster` read their own gateway.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn agent(&self, cluster: &str) -> Result<CertFiles> {
        let user = format!("agent-{cluster}");
        self.0.client(&user, &user, &[])
    }

    /// With which `etcdctl` reads everything of `cluster`.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub(crate) fn admin(&self, cluster: &str) -> Result<CertFiles> {
        let user = format!("admin-{cluster}");
        self.0.client(&user, &user, &[])
    }
}
