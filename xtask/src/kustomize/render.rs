//! What there is to render, and rendering it as a user does: with `kubectl kustomize`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use super::Finding;
use super::object::Objects;

/// Without a name.
pub(super) const BASE: &str = "kustomize/base";
const EXAMPLES: &str = "kustomize/examples";
pub(super) const COMPONENTS: &str = "kustomize/components";
pub(super) const OVERLAYS: &str = "kustomize/overlays";
/// In this file of a folder is what it adds.
pub(super) const FILE: &str = "kustomization.yaml";

/// Paths of the compositions.
pub(super) fn examples(workspace: &Path) -> anyhow::Result<Vec<String>> {
    let mut examples = Vec::new();
    for name in folders(&workspace.join(EXAMPLES))? {
        let file = workspace.join(EXAMPLES).join(&name).join(FILE);
        // What only sets the name is no composition.
        if !read(&file)?.contains("kind: Component") {
            examples.push(format!("{EXAMPLES}/{name}"));
        }
    }
    if examples.is_empty() {
        bail!("{EXAMPLES} is empty: nothing would be checked");
    }
    Ok(examples)
}

/// Components that no example is made of would be checked by nobody.
pub(super) fn unused_components(workspace: &Path) -> anyhow::Result<Vec<Finding>> {
    let mut users = String::new();
    for folder in [EXAMPLES, OVERLAYS] {
        for name in folders(&workspace.join(folder))? {
            users += &read(&workspace.join(folder).join(name).join(FILE))?;
        }
    }
    let components = folders(&workspace.join(COMPONENTS))?;
    let unused = components.iter().filter(|name| !users.contains(&format!("components/{name}\n")));
    Ok(unused
        .map(|name| {
            Finding::new(format!("{COMPONENTS}/{name}"), format!("no example in {EXAMPLES} is made of it"))
        })
        .collect())
}

/// The objects of one of them.
pub(super) fn render(workspace: &Path, path: &str) -> anyhow::Result<Objects> {
    let kubectl = std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into());
    let output = Command::new(&kubectl)
        .args(["kustomize", path])
        .current_dir(workspace)
        .output()
        .context("kubectl does not start: run xtask/setup.sh test, or name one in KUBECTL")?;
    if !output.status.success() {
        bail!(
            "kubectl kustomize {path}: {}\n(it has to be kubectl 1.27 or later: see `kubectl version --client`)",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Objects::parse(&String::from_utf8(output.stdout).context("kubectl wrote no text")?)
        .with_context(|| path.to_owned())
}

/// Names of the folders in a folder, sorted.
pub(super) fn folders(of: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(of).with_context(|| format!("cannot list {}", of.display()))? {
        let entry = entry.with_context(|| format!("cannot list {}", of.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
