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
mod mesh;
mod monitor;
mod output;
mod rotate_key;
mod status;
mod troubleshoot;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use self::output::Printed;

/// Joins Kubernetes clusters into one mesh.
#[derive(Debug, Parser)]
#[command(name = "isthmus", version, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connect clusters with each other
    Connect(Box<mesh::connect::ConnectArgs>),
    /// Take connected clusters apart
    Disconnect(Box<mesh::disconnect::DisconnectArgs>),
    /// The peers of clusters, and how the connections are
    Peers(mesh::peers::PeersArgs),
    /// Whole clusters on this machine: demos, tests, experiments
    #[command(subcommand)]
    Lab(lab::LabCommand),
    /// Give a cluster another CA, while everybody stays connected
    RotateCa(Box<mesh::rotate_ca::RotateCaArgs>),
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
    /// The script that completes this program's command lines in a shell
    #[command(after_help = COMPLETION_EXAMPLES)]
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

const EXAMPLES: &str = "Examples:
  # Connect two clusters that run Isthmus, and see how that goes
  isthmus connect --context kind-alpha --destination-context kind-beta
  isthmus peers --context kind-alpha,kind-beta

  # Two clusters share a global service, as a short story
  isthmus lab run kind-scenarios/global-service

  # The same, left running; then look around
  isthmus lab run kind-scenarios/global-service --keep
  isthmus status
  isthmus lab exec alpha/client -- curl -s http://CLUSTER-IP/
  isthmus lab down

With -o json there is one JSON document on standard output whatever comes of the command: its report, or {\"error\": \"...\"} \
if it ends without one. Progress and errors are on standard error.";

const COMPLETION_EXAMPLES: &str = "Examples:
  # In this shell
  source <(isthmus completion bash)

  # In every one
  isthmus completion bash > /etc/bash_completion.d/isthmus
  isthmus completion zsh > \"${fpath[1]}/_isthmus\"
  isthmus completion fish > ~/.config/fish/completions/isthmus.fish";

#[tokio::main]
async fn main() -> ExitCode {
    // RUST_LOG=isthmus_lab=debug shows what the lab's kubelets and controllers do.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,kube_client=off"));
    let colours = std::io::stderr().is_terminal() && output::colours();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let command = Cli::parse().command;
    let printed = command.printed();
    match run(command).await {
        Ok(code) => code,
        Err(error) => {
            output::note(&format!("isthmus: {error}"));
            output::failure(printed, &error.to_string());
            ExitCode::from(if error.is_usage() { USAGE } else { FAILED })
        }
    }
}

impl Command {
    /// For whom it prints.
    fn printed(&self) -> Printed {
        let json = match self {
            Self::Connect(args) => args.prints_json(),
            Self::Disconnect(args) => args.prints_json(),
            Self::Peers(args) => args.prints_json(),
            Self::Lab(command) => command.prints_json(),
            Self::RotateCa(args) => args.prints_json(),
            Self::RotateKey(args) => args.prints_json(),
            Self::Status(args) => args.prints_json(),
            Self::Troubleshoot(args) => args.prints_json(),
            Self::Explain(args) => args.prints_json(),
            Self::Monitor(args) if args.prints_json() => return Printed::JsonLines,
            Self::Monitor(_) | Self::Completion { .. } => false,
        };
        if json { Printed::Json } else { Printed::Text }
    }
}

/// Something is not well, or could not be done.
const FAILED: u8 = 1;
/// The command line makes no sense, or the question; clap says so with the same number.
const USAGE: u8 = 2;

async fn run(command: Command) -> Result<ExitCode, Failure> {
    Ok(match command {
        Command::Connect(args) => mesh::connect::run(*args).await?,
        Command::Disconnect(args) => mesh::disconnect::run(*args).await?,
        Command::Peers(args) => mesh::peers::run(args).await?,
        Command::Lab(command) => lab::run(command).await?,
        Command::RotateCa(args) => mesh::rotate_ca::run(*args).await?,
        Command::RotateKey(args) => rotate_key::run(args).await?,
        Command::Status(args) => status::run(args).await?,
        Command::Troubleshoot(args) => troubleshoot::run(*args).await.map_err(Failure::Unanswered)?,
        Command::Monitor(args) => monitor::run(*args).await.map_err(Failure::Unanswered)?,
        Command::Explain(args) => explain::run(args).await.map_err(Failure::Unanswered)?,
        Command::Completion { shell } => complete(shell),
    })
}

fn complete(shell: clap_complete::Shell) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "isthmus", &mut script);
    say!("{}", String::from_utf8_lossy(&script).trim_end());
    ExitCode::SUCCESS
}

/// Why a command ended; the message says what to do.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Lab(#[from] isthmus_lab::LabError),
    #[error(transparent)]
    Mesh(#[from] mesh::MeshError),
    /// A question that nobody could be asked. The exit status of a command that asks one is its answer, so this has another.
    #[error(transparent)]
    Unanswered(isthmus_lab::LabError),
}

impl Failure {
    fn is_usage(&self) -> bool {
        matches!(self, Self::Mesh(mesh::MeshError::Usage(_)) | Self::Unanswered(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// Columns that clap fills. A line that is longer is broken in two, and an example of two lines is none.
    const WIDTH: usize = 100;

    fn all(command: &clap::Command) -> Vec<&clap::Command> {
        std::iter::once(command).chain(command.get_subcommands().flat_map(all)).collect()
    }

    #[test]
    fn examples_fit_and_paragraphs_are_left_to_be_wrapped() {
        let command = Cli::command();
        for command in all(&command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines() {
                let name = command.get_name();
                match line.starts_with(' ') {
                    true => assert!(line.chars().count() <= WIDTH, "{name}: {line:?} does not fit"),
                    false => assert!(
                        line.is_empty() || line.ends_with(['.', ':']),
                        "{name}: {line:?} is broken off"
                    ),
                }
            }
        }
    }
}
