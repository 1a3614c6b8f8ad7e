//! `cargo xtask truth`: the differential tests of policy, from a seed and for as long as one likes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What `cargo xtask truth` takes.
#[derive(clap::Args)]
pub(crate) struct Truth {
    /// Where the generator begins: the seed that a failure has printed, or any other.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Packets that each test decides at least.
    #[arg(long, default_value_t = 500_000)]
    cases: u64,
    /// Only the resolver, which needs no root.
    #[arg(long)]
    resolver: bool,
}

impl Truth {
    /// Runs the resolver's tests, then the programs'.
    pub(crate) fn run(&self, root: &Path) -> Result<()> {
        let tests = [("isthmus-policy", "truth"), ("isthmus-node-agent", "policy_truth")];
        for (krate, test) in tests.into_iter().take(if self.resolver { 1 } else { 2 }) {
            let status = Command::new("cargo")
                .args(["test", "--quiet", "--locked", "-p", krate, "--test", test])
                .env("ISTHMUS_TRUTH_SEED", self.seed.to_string())
                .env("ISTHMUS_TRUTH_CASES", self.cases.to_string())
                .current_dir(root)
                .status()
                .context("cargo test does not start")?;
            if !status.success() {
                bail!("{krate}: the seed above repeats it, with --cases 1");
            }
        }
        Ok(())
    }
}
