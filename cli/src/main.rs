//! `isthmus`: whole clusters on one machine, and how a mesh is doing.

#![forbid(unsafe_code)]

/// As `println!`, but that nobody reads (`| head`) is no error.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

mod agents;
mod explain;
mod keep;
mod lab;
mod monitor;
mod rotate_key;
mod status;
mod troubleshoot;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Joins Kubernetes clusters into one mesh.
#[derive(Debug, Parser)]
#[command(name = "isthmus", version, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Whole clusters on this machine: demos, tests, experiments
    #[command(subcommand)]
    Lab(lab::LabCommand),
    /// Give a node another WireGuard key, without losing a packet
    RotateKey(rotate_key::RotateKeyArgs),
    /// How the mesh is doing: per cluster and per node
    Status(status::StatusArgs),
    /// Why clusters are not connected, step by step, and what to run next
    Troubleshoot(Box<troubleshoot::TroubleshootArgs>),
    /// Verdicts of policies on packets, as they are made
    Monitor(Box<monitor::MonitorArgs>),
    /// Which policy decides about a packet, and why, without sending one
    Explain(explain::ExplainArgs),
}

const EXAMPLES: &str = "Examples:
  # Two clusters share a global service, as a short story
  isthmus lab run kind-scenarios/global-service

  # The same, left running; then look around
  isthmus lab run kind-scenarios/global-service --keep
  isthmus status
  isthmus lab exec alpha/client -- curl -s http://CLUSTER-IP/
  isthmus lab down";

#[tokio::main]
async fn main() -> ExitCode {
    // RUST_LOG=isthmus_lab=debug shows what the lab's kubelets and controllers do.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,kube_client=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match Cli::parse().command {
        Command::Lab(command) => lab::run(command).await,
        Command::RotateKey(args) => rotate_key::run(args).await,
        Command::Status(args) => status::run(args).await,
        Command::Troubleshoot(args) => troubleshoot::run(*args).await,
        Command::Monitor(args) => monitor::run(*args).await,
        Command::Explain(args) => explain::run(args).await,
    };
    result.unwrap_or_else(|e| {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "isthmus: {e}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
