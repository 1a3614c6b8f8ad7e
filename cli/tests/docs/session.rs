//! A reader's terminal: one block after the other, with what the one before exported and the folder it ended in.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use isthmus_lab::cleanup;

use super::page::{Block, Lab};

/// Between two attempts at a block that may take a while to do as said.
const PAUSE: Duration = Duration::from_millis(500);

pub(crate) struct Session {
    root: PathBuf,
    /// Holds what blocks hand on to each other.
    folder: tempfile::TempDir,
}

/// The lab that a comment raises. Blocks may raise others, by the names of their scenarios.
const LAB: &str = "docs";

impl Session {
    pub(crate) fn new(root: &Path) -> Self {
        let labs = cleanup::leftovers();
        // Pages speak of "the lab"; what an earlier, killed test left is not in the way.
        let others: Vec<_> = labs.iter().filter(|name| name.as_str() != LAB).collect();
        assert!(others.is_empty(), "labs are kept on this machine, remove them first: {others:?}");
        let session = Self { root: root.to_owned(), folder: tempfile::tempdir().unwrap() };
        session.down();
        session
    }

    /// Runs a block and compares with what the page says.
    pub(crate) fn run(&mut self, page: &str, block: &Block) {
        match &block.lab {
            Some(Lab::None) => self.down(),
            Some(Lab::Scenario(folder)) => self.raise(page, folder),
            None => {}
        }
        let deadline = Instant::now() + block.again.unwrap_or_default();
        loop {
            let (code, output) = self.bash(&block.commands);
            let missing = block.shows.iter().find(|text| !output.contains(*text));
            if code == Some(block.exits) && missing.is_none() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "docs/{page}:{}: exit status {code:?} where {} is said{}\n--- commands\n{}\n--- output\n{output}",
                block.line,
                block.exits,
                missing.map(|text| format!(", and {text:?} is missing")).unwrap_or_default(),
                block.commands,
            );
            std::thread::park_timeout(PAUSE);
        }
    }

    fn raise(&self, page: &str, scenario: &str) {
        self.down();
        let script = format!(
            "isthmus lab up {scenario} --name {LAB}\nexport KUBECONFIG=$(isthmus lab kubeconfig --lab {LAB})"
        );
        let (code, output) = self.bash(&script);
        assert_eq!(code, Some(0), "docs/{page}: the lab {scenario} does not come up: {output}");
    }

    fn down(&self) {
        let (code, output) = self.bash(&format!("isthmus lab down {LAB}"));
        assert_eq!(code, Some(0), "{output}");
    }

    /// The exit status, and both outputs in the order in which they were written.
    fn bash(&self, commands: &str) -> (Option<i32>, String) {
        let state = self.folder.path().join("state");
        let script = format!(
            "exec 2>&1\n[ ! -e {state} ] || . {state}\nset -euo pipefail\n{commands}\nset +eu\n{{ export -p; echo \"cd '$PWD'\"; }} > {state}\n",
            state = state.display()
        );
        let programs = Path::new(env!("CARGO_BIN_EXE_isthmus")).parent().unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let output = Command::new("bash")
            .args(["-c", &script])
            .current_dir(&self.root)
            .env("PATH", format!("{}:{path}", programs.display()))
            // No page is to meet a cluster of whoever runs the tests.
            .env("KUBECONFIG", self.folder.path().join("no-clusters"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // There was none before. A panic while another one unwinds would hide the first.
        let _ = Command::new(env!("CARGO_BIN_EXE_isthmus")).args(["lab", "down", "--all"]).output();
    }
}
