//! Every command of every page under `docs/` is run, in the order in which a reader comes to them, as root in a real
//! lab. The workspace's programs must have been built (`cargo build --workspace --bins`).
//!
//! What a page shows in a fence marked `sh` is a command; nothing else may look like one. Comments, which readers do not
//! see, say what a test needs to know: see [`page`].

#![allow(clippy::unwrap_used)]

mod metrics;
mod page;
mod session;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use self::page::Page;
use self::session::Session;

/// Each page raises labs of its own.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The root of the checkout, which commands are run in.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = std::fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    pages.sort();
    pages
}

fn run(name: &str) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let page = Page::read(&root().join("docs").join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(!page.blocks.is_empty(), "{name} has no commands");
    let mut session = Session::new(&root());
    for block in &page.blocks {
        session.run(name, block);
    }
    if name == "metrics.md" {
        metrics_are_there();
    }
}

/// One test per page, so that a page that fails does not hide another, and none can be forgotten.
macro_rules! pages {
    ($($test:ident: $page:literal,)*) => {
        $(
            #[test]
            fn $test() {
                run($page);
            }
        )*

        #[test]
        fn every_page_with_commands_is_run() {
            let run = [$($page),*];
            for path in pages() {
                let name = path.file_name().unwrap().to_str().unwrap();
                let page = Page::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
                assert!(page.blocks.is_empty() || run.contains(&name), "add docs/{name} to cli/tests/docs/main.rs");
            }
        }
    };
}

pages! {
    getting_started: "getting-started.md",
    connect_clusters: "connect-clusters.md",
    beside_cilium: "beside-cilium.md",
    certificates: "certificates.md",
    upgrade: "upgrade.md",
    metrics: "metrics.md",
    troubleshooting: "troubleshooting.md",
}

/// A link that leads nowhere is as bad as a command that fails.
#[test]
fn links_between_pages_lead_somewhere() {
    let more = ["README.md", "ARCHITECTURE.md", "kustomize/README.md", "kind-scenarios/README.md"];
    for path in pages().into_iter().chain(more.map(|name| root().join(name))) {
        let text = std::fs::read_to_string(&path).unwrap();
        for target in page::links(&text) {
            let file = target.split('#').next().unwrap_or_default();
            let there = path.parent().unwrap().join(file);
            assert!(there.exists(), "{}: the link to {target} leads nowhere", path.display());
        }
    }
}

/// Needs what the page's own commands wrote down.
fn metrics_are_there() {
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let told: String = ["apiserver", "agent", "wireguard"]
        .map(|daemon| std::fs::read_to_string(root().join(format!("target/docs-{daemon}.metrics"))).unwrap())
        .concat();
    let wrong = metrics::disagreements(&page, &told, &metrics::registered(&root()));
    assert!(wrong.is_empty(), "docs/metrics.md and the programs disagree:\n{}", wrong.join("\n"));
}
