//! What make and CI call: the eBPF build and its check, CRD generation, the check of the installation.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

mod bpf;
mod crds;
mod fuzz;
mod kustomize;
mod truth;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "What make and CI call")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build or check the eBPF object
    Bpf(bpf::Bpf),
    /// Write the custom resource definitions to crds/yaml/
    Crds(crds::Crds),
    /// Render and check the installation
    Kustomize(kustomize::Kustomize),
    /// Run every fuzz target for a while
    Fuzz(fuzz::Fuzz),
    /// Compare policy three ways: a naive reference, the resolver, the eBPF programs
    Truth(truth::Truth),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Bpf(bpf) => bpf.run(&workspace()),
        Command::Crds(crds) => crds.run(&workspace()),
        Command::Kustomize(kustomize) => kustomize.run(&workspace()),
        Command::Fuzz(fuzz) => fuzz.run(&workspace()),
        Command::Truth(truth) => truth.run(&workspace()),
    }
}

/// The folder that holds the workspace's Cargo.toml.
fn workspace() -> PathBuf {
    let xtask = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().map_or(xtask.clone(), PathBuf::from)
}
