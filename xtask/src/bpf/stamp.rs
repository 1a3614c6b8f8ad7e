//! What an object was built from and with.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use super::toolchain::Toolchain;

/// A line `name: value` for each field.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) compiler: String,
    pub(super) llvm: String,
    pub(super) linker: String,
    pub(super) objcopy: String,
    /// SHA-256 of Cargo.lock; also part of `source`.
    pub(super) lockfile: String,
    /// SHA-256 over the names and contents of all that is compiled.
    pub(super) source: String,
    /// SHA-256 of the object.
    pub(super) object: String,
}

impl Stamp {
    pub(super) fn new(toolchain: &Toolchain, source: &Path, object: &[u8]) -> anyhow::Result<Self> {
        let lockfile = source.join("Cargo.lock");
        let lockfile = fs::read(&lockfile).with_context(|| format!("cannot read {}", lockfile.display()))?;
        Ok(Self {
            compiler: toolchain.compiler.clone(),
            llvm: toolchain.llvm.clone(),
            linker: toolchain.linker.clone(),
            objcopy: toolchain.objcopy_version.clone(),
            lockfile: hash(&lockfile),
            source: source_hash(source)?,
            object: hash(object),
        })
    }

    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .map(str::to_owned)
                .with_context(|| format!("the stamp has no line `{name}: ...`"))
        };
        Ok(Self {
            compiler: field("compiler")?,
            llvm: field("llvm")?,
            linker: field("linker")?,
            objcopy: field("objcopy")?,
            lockfile: field("lockfile")?,
            source: field("source")?,
            object: field("object")?,
        })
    }

    /// Where this toolchain is another than the one recorded, a line each.
    pub(super) fn differences(&self, toolchain: &Toolchain) -> Vec<String> {
        [
            ("compiler", &self.compiler, &toolchain.compiler),
            ("llvm", &self.llvm, &toolchain.llvm),
            ("linker", &self.linker, &toolchain.linker),
            ("objcopy", &self.objcopy, &toolchain.objcopy_version),
        ]
        .into_iter()
        .filter(|(_, recorded, here)| recorded != here)
        .map(|(name, recorded, here)| format!("  {name}: {recorded} in the stamp, {here} here"))
        .collect()
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# Written by `cargo xtask bpf build`, read by `cargo xtask bpf check`.")?;
        writeln!(f, "compiler: {}", self.compiler)?;
        writeln!(f, "llvm: {}", self.llvm)?;
        writeln!(f, "linker: {}", self.linker)?;
        writeln!(f, "objcopy: {}", self.objcopy)?;
        writeln!(f, "lockfile: {}", self.lockfile)?;
        writeln!(f, "source: {}", self.source)?;
        writeln!(f, "object: {}", self.object)
    }
}

pub(super) fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Over everything below `bpf/` that is compiled, and how the compiler is called.
pub(super) fn source_hash(source: &Path) -> anyhow::Result<String> {
    let mut files = Vec::new();
    for path in ["Cargo.toml", "Cargo.lock", "src", "abi/Cargo.toml", "abi/src"] {
        collect(&source.join(path), &mut files)?;
    }
    files.sort();
    let mut hasher = Sha256::new();
    hasher.update(super::toolchain::FLAGS.join(" "));
    for file in files {
        let content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.strip_prefix(source).unwrap_or(&file).to_string_lossy().into_owned();
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update((content.len() as u64).to_le_bytes());
        hasher.update(content);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let context = || format!("cannot read {}", path.display());
    let kind = fs::metadata(path).with_context(context)?;
    if kind.is_file() {
        files.push(path.to_owned());
        return Ok(());
    }
    if !kind.is_dir() {
        bail!("{} is neither a file nor a folder", path.display());
    }
    for entry in fs::read_dir(path).with_context(context)? {
        collect(&entry.with_context(context)?.path(), files)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp() -> Stamp {
        let text = |text: &str| text.to_owned();
        Stamp {
            compiler: text("rustc 1"),
            llvm: text("22"),
            linker: text("bpf-linker 0"),
            objcopy: text("22.1"),
            lockfile: text("aa"),
            source: text("bb"),
            object: text("cc"),
        }
    }

    #[test]
    fn a_stamp_is_read_as_it_was_written() {
        let stamp = stamp();
        assert_eq!(Stamp::parse(&stamp.to_string()).expect("a valid stamp"), stamp);
    }

    #[test]
    fn a_stamp_without_a_field_says_which() {
        let text = stamp().to_string().replace("linker: bpf-linker 0\n", "");
        let error = Stamp::parse(&text).expect_err("a field is missing").to_string();
        assert!(error.contains("linker"), "{error}");
    }
}
