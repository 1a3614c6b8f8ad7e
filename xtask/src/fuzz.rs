//! `cargo xtask fuzz`: every fuzz target of the tree, each for a while.
//!
//! cargo-fuzz wants a nightly compiler for the sanitizer flags; `RUSTC_BOOTSTRAP` lets a stable one take them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The crates that have fuzz targets, each in the package in `fuzz/`.
const FUZZED: [&str; 2] = ["wire", "wireguard"];
const CARGO_FUZZ: &str = "0.13.2";

/// What `cargo xtask fuzz` takes.
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    /// How long each target runs, in seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this target.
    #[arg(long)]
    target: Option<String>,
}

impl Fuzz {
    /// Runs every target in turn and stops at the first crash, whose input cargo-fuzz leaves under `fuzz/artifacts/`.
    pub(crate) fn run(&self, root: &Path) -> Result<()> {
        install(root)?;
        let mut ran = 0;
        for krate in FUZZED.map(|name| root.join(name)) {
            for target in targets(&krate)? {
                if self.target.as_ref().is_some_and(|only| *only != target) {
                    continue;
                }
                ran += 1;
                fuzz(&krate, &target, self.seconds)?;
            }
        }
        match (&self.target, ran) {
            (Some(name), 0) => {
                bail!("no fuzz target is called `{name}`: see fuzz/fuzz_targets/ in {}", FUZZED.join(", "))
            }
            _ => Ok(()),
        }
    }
}

fn fuzz(krate: &Path, target: &str, seconds: u32) -> Result<()> {
    let status = Command::new("cargo")
        .args([
            "fuzz",
            "run",
            "--features",
            "run",
            target,
            "--",
            &format!("-max_total_time={seconds}"),
            "-rss_limit_mb=2048",
        ])
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(krate)
        .status()
        .context("cargo fuzz does not start")?;
    if !status.success() {
        bail!(
            "{target} found something: its input is under {}",
            krate.join("fuzz/artifacts").join(target).display()
        );
    }
    Ok(())
}

fn targets(krate: &Path) -> Result<Vec<String>> {
    let folder = krate.join("fuzz/fuzz_targets");
    let mut names: Vec<String> = folder
        .read_dir()
        .with_context(|| format!("{} cannot be read", folder.display()))?
        .map(|entry| Ok(PathBuf::from(entry?.file_name())))
        .collect::<std::io::Result<Vec<_>>>()?
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "rs"))
        .filter_map(|file| Some(file.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn install(root: &Path) -> Result<()> {
    if Command::new("cargo").args(["fuzz", "--version"]).output().is_ok_and(|output| output.status.success())
    {
        return Ok(());
    }
    eprintln!("Building cargo-fuzz {CARGO_FUZZ} (once)");
    let status = Command::new("cargo")
        .args(["install", "--quiet", "--locked", "--debug", "cargo-fuzz", "--version", CARGO_FUZZ, "--root"])
        .arg(root.join(".tools"))
        .status()?;
    if !status.success() {
        bail!("cargo-fuzz {CARGO_FUZZ} could not be installed: `cargo install cargo-fuzz` tells more");
    }
    Ok(())
}
