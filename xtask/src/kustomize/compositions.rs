//! Components with each other and on top of overlays: every two that `kustomize/README.md` does not rule out are put together.
//!
//! The table in there is read, so that it cannot say something else than what is tried: components are listed in its order, and
//! those that exclude each other say so in their rows.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};

use super::Finding;
use super::render::{BASE, COMPONENTS, FILE, OVERLAYS, folders, read};

const README: &str = "kustomize/README.md";
/// What sets the name, which a cluster does not start without.
const NAMED: &str = "kustomize/examples/cluster";
/// Compositions are written below this folder.
const WRITTEN: &str = "target/kustomize";
/// How a row says that a component excludes another one, whose name follows.
const EXCLUDES: &str = "not with `";

/// A row of the table.
#[derive(Debug, PartialEq, Eq)]
struct Component {
    name: String,
    excludes: Vec<String>,
}

/// Something to render.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Composition {
    resource: String,
    /// In the order in which they are listed.
    components: Vec<String>,
}

impl fmt::Display for Composition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {}", self.resource, self.components.join(" and "))
    }
}

impl Composition {
    /// Writes it down to be rendered. The folder that it is in, as seen from the workspace.
    pub(super) fn write(&self, workspace: &Path) -> anyhow::Result<String> {
        let name =
            format!("{}+{}", self.resource.rsplit('/').next().unwrap_or_default(), self.components.join("+"));
        let folder = format!("{WRITTEN}/{name}");
        let up = "../".repeat(folder.split('/').count());
        let mut text = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n".to_owned();
        text += &format!("resources:\n- {up}{}\ncomponents:\n- {up}{NAMED}\n", self.resource);
        text.extend(self.components.iter().map(|name| format!("- {up}{COMPONENTS}/{name}\n")));
        let path = workspace.join(&folder);
        fs::create_dir_all(&path)
            .and_then(|()| fs::write(path.join(FILE), text))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(folder)
    }
}

/// All that are to be tried.
pub(super) fn all(workspace: &Path) -> anyhow::Result<Vec<Composition>> {
    let table = table(&read(&workspace.join(README))?)?;
    let mut all = pairs(&table);
    for overlay in folders(&workspace.join(OVERLAYS))? {
        let resource = format!("{OVERLAYS}/{overlay}");
        let has = read(&workspace.join(&resource).join(FILE))?;
        let more =
            table.iter().filter(|component| !has.contains(&format!("components/{}\n", component.name)));
        all.extend(more.map(|component| Composition {
            resource: resource.clone(),
            components: vec![component.name.clone()],
        }));
    }
    Ok(all)
}

/// Components without a row, which nobody would know how to list.
pub(super) fn undescribed(workspace: &Path) -> anyhow::Result<Vec<Finding>> {
    let table = table(&read(&workspace.join(README))?)?;
    let there = folders(&workspace.join(COMPONENTS))?;
    let missing = there.iter().filter(|name| table.iter().all(|component| component.name != **name));
    let missing = missing.map(|name| Finding::new(README, format!("its table of components has no {name}")));
    let named = table.iter().flat_map(|component| component.excludes.iter().chain([&component.name]));
    let gone = named.filter(|name| !there.contains(name));
    let gone = gone.map(|name| Finding::new(README, format!("there is no component {name}")));
    Ok(missing.chain(gone).collect())
}

fn pairs(table: &[Component]) -> Vec<Composition> {
    let mut pairs = Vec::new();
    for (at, one) in table.iter().enumerate() {
        for other in &table[at + 1..] {
            if !one.excludes.contains(&other.name) && !other.excludes.contains(&one.name) {
                let components = vec![one.name.clone(), other.name.clone()];
                pairs.push(Composition { resource: BASE.to_owned(), components });
            }
        }
    }
    pairs
}

/// The rows below the heading `Components`.
fn table(readme: &str) -> anyhow::Result<Vec<Component>> {
    let section =
        readme.split("\n## ").find(|section| section.starts_with("Components\n")).unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let component = |row: &str| {
        let (name, rest) = row.split_once('`')?;
        let excludes = rest.split(EXCLUDES).skip(1).filter_map(|rest| rest.split('`').next());
        Some(Component { name: name.to_owned(), excludes: excludes.map(str::to_owned).collect() })
    };
    let table: Vec<Component> = rows.filter_map(component).collect();
    if table.len() < 2 {
        bail!("{README} has no table of components: nothing would be put together");
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_table_does_not_rule_out_is_put_together_in_its_order() {
        let readme = "# k\n\n## Install\n| `x` | y |\n\n## Components\n\n| component | what |\n|---|---|\n\
                      | `b` | first |\n| `a` | not with `c`, which `b` is no part of |\n| `c` | last |\n\n## More\n| `z` | |\n";
        let table = table(readme).expect("a table");
        let told: Vec<_> = pairs(&table).iter().map(ToString::to_string).collect();
        assert_eq!(told, ["kustomize/base with b and a", "kustomize/base with b and c"]);
    }

    #[test]
    fn a_table_that_is_not_found_is_an_error() {
        table("# k\n\n## Parts\n\n| `a` | |\n| `b` | |\n").expect_err("nothing would be tried");
    }
}
