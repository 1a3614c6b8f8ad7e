//! Identities: the numbers and what they stand for.

use std::sync::Arc;

use isthmus_crds::CiliumIdentity;
use isthmus_wire::Labels;

use super::{Fact, Finding, Name, Reason, Source};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct IdentityFact {
    pub name: Name,
    pub uid: String,
    pub resource_version: String,
    /// `None` if the name is not a number: it takes no number then.
    pub id: Option<u32>,
    /// `None` if it cannot stand for anything, though it takes a number.
    pub labels: Option<Arc<Labels>>,
    /// Whether Isthmus allocated it, and so may delete it.
    pub ours: bool,
}

impl Fact for IdentityFact {
    fn name(&self) -> &Name {
        &self.name
    }

    fn uid(&self) -> &str {
        &self.uid
    }
}

impl Source for CiliumIdentity {
    type Fact = IdentityFact;

    fn fact(self, findings: &mut Vec<Finding>) -> IdentityFact {
        let name = Name::of(&self);
        let id = name.name.parse().ok();
        if id.is_none() {
            findings.push(Finding::new(
                Reason::InvalidIdentity,
                "the name is not a number, so it stands for no identity: delete the object".to_owned(),
            ));
        }
        let ours = self.is_ours();
        let mut labels = Labels::new();
        let complete = self.security_labels.iter().all(|(key, value)| {
            let (source, key) = key.split_once(':').unwrap_or(("", key));
            labels.insert(source, key, value).map_err(|error| findings.push(unusable(&error))).is_ok()
        });
        if labels.is_empty() && complete {
            findings.push(unusable(&"there are none"));
        }
        IdentityFact {
            name,
            uid: self.metadata.uid.unwrap_or_default(),
            resource_version: self.metadata.resource_version.unwrap_or_default(),
            id,
            labels: (complete && !labels.is_empty()).then(|| Arc::new(labels)),
            ours,
        }
    }
}

fn unusable(why: &dyn std::fmt::Display) -> Finding {
    Finding::new(
        Reason::InvalidIdentity,
        format!("security-labels cannot be used ({why}); the identity is not exported"),
    )
}
