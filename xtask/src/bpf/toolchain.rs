//! Finds a compiler that can build for eBPF (it needs the source of its own core library), a linker, and objcopy.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// Names the compiler to use.
const COMPILER_VARIABLE: &str = "BPF_RUSTC";
const TARGET: &str = "bpfel-unknown-none";
const BINARY: &str = "isthmus";

/// Besides the path remapping, which depends on the machine.
pub(super) const FLAGS: [&str; 4] =
    ["--cfg=bpf_target_arch=\"x86_64\"", "-Cdebuginfo=2", "-Clink-arg=--btf", "-Zbuild-std=core"];

pub(super) struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    rust_source: PathBuf,
    objcopy: PathBuf,
    linker_dir: PathBuf,
    pub(super) compiler: String,
    pub(super) llvm: String,
    pub(super) linker: String,
    pub(super) objcopy_version: String,
}

impl Toolchain {
    /// `$BPF_RUSTC`, Debian's compiler with its source, or rustup's nightly.
    pub(super) fn find() -> anyhow::Result<Self> {
        let (rustc, cargo) = compiler()?;
        let rust_source = source_of(&rustc)?;
        let version = output(&rustc, ["-vV"])?;
        let line = |prefix: &str| version.lines().find_map(|line| line.strip_prefix(prefix));
        let linker = find_on_path("bpf-linker").context(
            "bpf-linker is not on the path; install it: apt-get install llvm-22-dev g++ && LLVM_PREFIX=/usr/lib/llvm-22 \
             cargo install bpf-linker --version 0.13.0 --locked --no-default-features --features llvm-22",
        )?;
        let objcopy = objcopy()?;
        Ok(Self {
            compiler: version.lines().next().unwrap_or_default().to_owned(),
            llvm: line("LLVM version: ").unwrap_or("unknown").to_owned(),
            linker: output(&linker, ["--version"])?.trim().to_owned(),
            objcopy_version: objcopy_version(&objcopy)?,
            linker_dir: linker.parent().unwrap_or(Path::new("/")).to_owned(),
            rustc,
            cargo,
            rust_source,
            objcopy,
        })
    }

    /// Builds in `target` and returns the path of the stripped object there.
    pub(super) fn build(&self, workspace: &Path, source: &Path, target: &Path) -> anyhow::Result<PathBuf> {
        // The registry's folder must be there to be remapped.
        let mut fetch = Command::new(&self.cargo);
        fetch.args(["fetch", "--quiet", "--locked"]).current_dir(source).env("RUSTC", &self.rustc);
        run(&mut fetch).context("the dependencies of the eBPF programs cannot be had")?;
        let mut flags: Vec<OsString> = FLAGS[..3].iter().map(OsString::from).collect();
        for (from, to) in self.remapped(workspace)? {
            let mut flag = OsString::from("--remap-path-prefix=");
            flag.push(from);
            flag.push("=");
            flag.push(to);
            flags.push(flag);
        }
        let mut path = OsString::from(&self.linker_dir);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = Command::new(&self.cargo);
        command
            .args(["build", "--quiet", "--release", "--locked", "--target", TARGET, FLAGS[3]])
            .current_dir(source)
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", target)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join(OsStr::new("\x1f")))
            .env("PATH", path);
        run(&mut command)
            .with_context(|| format!("the eBPF programs do not build with {}", self.compiler))?;
        let built = target.join(TARGET).join("release").join(BINARY);
        let stripped = target.join("isthmus.bpf.o");
        // DWARF names folders of this machine, and no kernel reads it; BTF stays.
        output(&self.objcopy, [OsStr::new("--strip-debug"), built.as_os_str(), stripped.as_os_str()])?;
        Ok(stripped)
    }

    /// Folders whose names would show in the object, and what stands there instead.
    fn remapped(&self, workspace: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
        let mut remapped =
            vec![(workspace.to_owned(), "isthmus".into()), (self.rust_source.clone(), "rust".into())];
        if let Ok(resolved) = self.rust_source.canonicalize()
            && resolved != self.rust_source
        {
            remapped.push((resolved, "rust".into()));
        }
        let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
            let home = std::env::var_os("HOME")?;
            Some(Path::new(&home).join(".cargo"))
        });
        let registries = home.context("neither CARGO_HOME nor HOME is set")?.join("registry/src");
        if let Ok(entries) = fs::read_dir(&registries) {
            for entry in entries.flatten() {
                remapped.push((entry.path(), "registry".into()));
            }
        }
        Ok(remapped)
    }
}

/// A compiler and the cargo to use with it.
fn compiler() -> anyhow::Result<(PathBuf, PathBuf)> {
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    if let Some(rustc) = std::env::var_os(COMPILER_VARIABLE) {
        let rustc = PathBuf::from(rustc);
        source_of(&rustc).with_context(|| format!("{COMPILER_VARIABLE} cannot be used"))?;
        return Ok((rustc, cargo));
    }
    let debian = PathBuf::from("/usr/bin/rustc");
    if debian.exists() && is_new_enough(&debian) && source_of(&debian).is_ok() {
        return Ok((debian, cargo));
    }
    if let Ok(rustc) = output(Path::new("rustup"), ["which", "--toolchain", "nightly", "rustc"])
        && let Ok(cargo) = output(Path::new("rustup"), ["which", "--toolchain", "nightly", "cargo"])
    {
        let rustc = PathBuf::from(rustc.trim());
        if source_of(&rustc).is_ok() {
            return Ok((rustc, PathBuf::from(cargo.trim())));
        }
    }
    bail!(
        "no compiler for eBPF here; install one of: apt-get install rustc-web cargo-web rust-web-src (Debian 12), or \
         rustup toolchain install nightly --component rust-src, or name a rustc that has its library's source with \
         {COMPILER_VARIABLE}"
    );
}

/// Debian 12's plain `rustc` package has the same path and is too old.
fn is_new_enough(rustc: &Path) -> bool {
    let Ok(version) = output(rustc, ["--version"]) else { return false };
    let mut numbers = version.split([' ', '.']).skip(1).map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(1), Some(95))
}

fn source_of(rustc: &Path) -> anyhow::Result<PathBuf> {
    let sysroot = output(rustc, ["--print", "sysroot"])?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust");
    if !source.join("library/core/src/lib.rs").exists() {
        bail!("{} has no source of its core library in {}", rustc.display(), source.display());
    }
    Ok(source)
}

/// The one of the LLVM that comes with the linker's instructions, so that the same bytes come out everywhere.
fn objcopy() -> anyhow::Result<PathBuf> {
    let beside = PathBuf::from("/usr/lib/llvm-22/bin/llvm-objcopy");
    if beside.exists() {
        return Ok(beside);
    }
    ["llvm-objcopy", "rust-objcopy"]
        .iter()
        .find_map(|name| find_on_path(name))
        .context("llvm-objcopy is not on the path; install it: apt-get install llvm-22")
}

fn objcopy_version(objcopy: &Path) -> anyhow::Result<String> {
    let text = output(objcopy, ["--version"])?;
    let line = text.lines().find(|line| line.contains("version")).unwrap_or_default();
    Ok(line.trim().to_owned())
}

fn find_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo/bin"));
    std::env::split_paths(&path).chain(home).map(|dir| dir.join(name)).find(|file| file.is_file())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    for variable in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"] {
        command.env_remove(variable);
    }
    let program = command.get_program().to_owned();
    let status = command.status().with_context(|| format!("cannot run {}", program.display()))?;
    if !status.success() {
        bail!("{} {status}", program.display());
    }
    Ok(())
}

fn output<A: AsRef<OsStr>>(program: &Path, args: impl IntoIterator<Item = A>) -> anyhow::Result<String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        bail!("{} failed: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} does not speak UTF-8", program.display()))
}
