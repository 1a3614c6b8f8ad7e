//! Who is asking: the client certificate's common name is the user, its organizations are the groups.

use x509_parser::prelude::{FromDer, X509Certificate};

/// An authenticated user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// For instance `system:node:alpha-1`.
    pub name: String,
    /// With `system:authenticated`.
    pub groups: Vec<String>,
}

/// The group that may do everything.
pub const MASTERS: &str = "system:masters";

impl User {
    /// The user that a verified client certificate names. `None` if it names nobody.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        if name.is_empty() {
            return None;
        }
        let mut groups: Vec<String> =
            subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect();
        groups.push("system:authenticated".to_owned());
        Some(Self { name, groups })
    }

    /// Whoever talks to a server without TLS, which listens on loopback only.
    pub fn loopback() -> Self {
        Self { name: "system:admin".into(), groups: vec![MASTERS.into(), "system:authenticated".into()] }
    }

    /// Whether the user is in this group.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}
