//! `cargo xtask crds`: the YAML of the custom resource definitions, generated from their Rust source.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use anyhow::{Context, bail};

/// Write the custom resource definitions to crds/yaml/
#[derive(clap::Args)]
pub(crate) struct Crds {
    /// Change nothing; fail if a file is missing, left over or differs
    #[arg(long)]
    check: bool,
}

impl Crds {
    pub(crate) fn run(&self, workspace: &Path) -> anyhow::Result<()> {
        let folder = workspace.join("crds/yaml");
        let wanted: BTreeMap<String, String> =
            isthmus_crds::yaml_files().context("cannot render the definitions")?.into_iter().collect();
        let found = read(&folder)?;
        let stale: Vec<&String> = wanted
            .iter()
            .filter(|(name, text)| found.get(*name) != Some(*text))
            .map(|(name, _)| name)
            .chain(found.keys().filter(|name| !wanted.contains_key(*name)))
            .collect();
        if self.check {
            if !stale.is_empty() {
                bail!(
                    "crds/yaml differs from crds/src in {stale:?}: run `cargo xtask crds` and commit the result"
                );
            }
            return Ok(());
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        for name in stale {
            let path = folder.join(name);
            match wanted.get(name) {
                Some(text) => fs::write(&path, text),
                None => fs::remove_file(&path),
            }
            .with_context(|| format!("cannot update {}", path.display()))?;
        }
        Ok(())
    }
}

fn read(folder: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", folder.display())),
    };
    let mut files = BTreeMap::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), text);
        }
    }
    Ok(files)
}
