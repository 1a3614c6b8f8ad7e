//! The daemons' capabilities: exactly those that the containers of `kustomize/` have, so that one that is missing there is missed
//! here. Kubernetes' root in a container has no others either, and gains none by executing something.

use std::ffi::OsString;
use std::path::Path;

use serde_json::Value;

use crate::error::{LabError, Result};
use crate::programs;

/// A program, and the container that runs it in an installation.
struct Confined {
    program: &'static str,
    file: &'static str,
    text: &'static str,
    container: &'static str,
}

const CONFINED: [Confined; 3] = [
    Confined {
        program: programs::APISERVER,
        file: "kustomize/base/clustermesh-apiserver/deployment.yaml",
        text: include_str!("../../kustomize/base/clustermesh-apiserver/deployment.yaml"),
        container: "clustermesh-apiserver",
    },
    Confined {
        program: programs::NODE_AGENT,
        file: "kustomize/base/node-agent/daemonset.yaml",
        text: include_str!("../../kustomize/base/node-agent/daemonset.yaml"),
        container: "node-agent",
    },
    Confined {
        program: programs::WIREGUARD,
        file: "kustomize/base/wireguard/daemonset.yaml",
        text: include_str!("../../kustomize/base/wireguard/daemonset.yaml"),
        container: "wireguard",
    },
];

/// What stands before a program on its command line; nothing before one that no installation runs in a container.
///
/// # Errors
/// When `setpriv` is not installed, or the installation cannot be understood.
pub(crate) fn confine(program: &Path) -> Result<Vec<OsString>> {
    let name = program.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(confined) = CONFINED.iter().find(|confined| confined.program == name) else {
        return Ok(Vec::new());
    };
    let setpriv = programs::machines("setpriv", "util-linux")?;
    let only =
        confined.capabilities()?.iter().fold("-all".to_owned(), |only, name| format!("{only},+{name}"));
    // What is not in the bounding set is gone when the program is executed.
    let words = ["--bounding-set", &only, "--inh-caps", "-all", "--no-new-privs", "--"].map(OsString::from);
    Ok(std::iter::once(setpriv.into()).chain(words).collect())
}

impl Confined {
    /// As setpriv calls them.
    fn capabilities(&self) -> Result<Vec<String>> {
        let unusable = |problem: String| LabError::invalid(format!("{}: {problem}", self.file));
        let object: Value = serde_norway::from_str(self.text).map_err(|error| unusable(error.to_string()))?;
        let containers = object["spec"]["template"]["spec"]["containers"].as_array();
        let container =
            containers.into_iter().flatten().find(|container| container["name"] == self.container);
        let container =
            container.ok_or_else(|| unusable(format!("there is no container {}", self.container)))?;
        let capabilities = &container["securityContext"]["capabilities"];
        if capabilities["drop"] != serde_json::json!(["ALL"]) {
            return Err(unusable("the container does not drop all capabilities".to_owned()));
        }
        let added = capabilities["add"].as_array().into_iter().flatten();
        Ok(added.filter_map(Value::as_str).map(str::to_lowercase).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_has_what_its_container_has() {
        let of = |program: &str| {
            let words = confine(Path::new("/some/where").join(program).as_path()).expect("confined");
            words.get(2).map(|only| only.to_string_lossy().into_owned())
        };
        assert_eq!(of(programs::APISERVER).as_deref(), Some("-all"));
        assert_eq!(of(programs::WIREGUARD).as_deref(), Some("-all,+net_admin"));
        assert!(of(programs::NODE_AGENT).is_some_and(|only| only.contains("+sys_admin")));
        assert_eq!(of("curl"), None);
    }
}
