//! `cargo xtask bpf`: the eBPF object that the node-agent carries.
//!
//! The object is committed, so that building the agent needs no eBPF toolchain. Its stamp records what it was built
//! from and with. The same toolchain builds the same bytes from the same source, wherever the folder is; so the check
//! rebuilds and compares. Another toolchain builds other bytes, and then the tests decide.

mod stamp;
mod toolchain;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use stamp::Stamp;
use toolchain::Toolchain;

/// Build or check the eBPF object
#[derive(clap::Args)]
pub(crate) struct Bpf {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Rebuild bpf/isthmus.bpf.o and its stamp
    Build,
    /// Rebuild elsewhere and compare; fail if the committed object is not what the source builds to
    ///
    /// With another toolchain than the stamp's the bytes cannot be compared: then the path of the rebuilt object is
    /// printed, and the tests run on it with ISTHMUS_BPF_OBJECT=PATH.
    Check,
}

impl Bpf {
    pub(crate) fn run(&self, workspace: &Path) -> anyhow::Result<()> {
        let paths = Paths::new(workspace);
        match self.command {
            Command::Build => build(&paths),
            Command::Check => check(&paths),
        }
    }
}

struct Paths {
    workspace: PathBuf,
    source: PathBuf,
    object: PathBuf,
    stamp: PathBuf,
    /// Where cargo builds, apart from the workspace's own target directory.
    target: PathBuf,
}

impl Paths {
    fn new(workspace: &Path) -> Self {
        let source = workspace.join("bpf");
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
        Self {
            object: source.join("isthmus.bpf.o"),
            stamp: source.join("isthmus.bpf.stamp"),
            source,
            target: workspace.join(target).join("bpf"),
            workspace: workspace.to_owned(),
        }
    }
}

fn build(paths: &Paths) -> anyhow::Result<()> {
    let toolchain = Toolchain::find()?;
    let built = toolchain.build(&paths.workspace, &paths.source, &paths.target)?;
    let object = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let stamp = Stamp::new(&toolchain, &paths.source, &object)?;
    write(&paths.object, &object)?;
    write(&paths.stamp, stamp.to_string().as_bytes())?;
    report(&format!("{}: {} bytes, built with {}", paths.object.display(), object.len(), stamp.compiler));
    Ok(())
}

fn check(paths: &Paths) -> anyhow::Result<()> {
    const REBUILD: &str =
        "run `cargo xtask bpf build` and commit bpf/isthmus.bpf.o and bpf/isthmus.bpf.stamp";
    let text = fs::read_to_string(&paths.stamp)
        .with_context(|| format!("cannot read {}: {REBUILD}", paths.stamp.display()))?;
    let stamp = Stamp::parse(&text).with_context(|| format!("{}: {REBUILD}", paths.stamp.display()))?;
    let object = fs::read(&paths.object)
        .with_context(|| format!("cannot read {}: {REBUILD}", paths.object.display()))?;
    if stamp.source != stamp::source_hash(&paths.source)? {
        bail!("bpf/ changed: {REBUILD}");
    }
    if stamp.object != stamp::hash(&object) {
        bail!("bpf/isthmus.bpf.o is not the object that its stamp describes: {REBUILD}");
    }
    let toolchain = Toolchain::find().context(
        "bpf/isthmus.bpf.o belongs to the source by its stamp, but could not be rebuilt to prove it",
    )?;
    let differences = stamp.differences(&toolchain);
    let built = toolchain.build(&paths.workspace, &paths.source, &paths.target)?;
    let rebuilt = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    if rebuilt == object {
        report("bpf/isthmus.bpf.o: rebuilt, bit for bit the same");
        return Ok(());
    }
    if differences.is_empty() {
        bail!(
            "bpf/isthmus.bpf.o is not what its source builds to with the same toolchain (compare it with {}): {REBUILD}",
            built.display()
        );
    }
    report(&format!(
        "bpf/isthmus.bpf.o: cannot be compared bit for bit, since the toolchain is another one:\n{}\nThe source builds. \
         To run the tests on what it builds to here: ISTHMUS_BPF_OBJECT={}",
        differences.join("\n"),
        built.display()
    ));
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

#[expect(clippy::print_stdout, reason = "what the user has asked for")]
fn report(line: &str) {
    println!("{line}");
}
