//! Programs outside of a lab, run to their end: `kubectl`, `docker`, `kind`, and `isthmus` itself.

use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::error::{Doing, LabError, Result};
use crate::programs;

/// A command of `isthmus`, about the clusters of a kubeconfig.
///
/// # Errors
/// When it has not been built.
pub(crate) fn isthmus(verb: &str, kubeconfig: &Path) -> Result<Command> {
    let mut command = Command::new(programs::ours(programs::CLI)?);
    command.arg(verb).arg("--kubeconfig").arg(kubeconfig);
    Ok(command)
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started, fails, or takes longer; with its command line and what it printed to standard error.
pub(crate) async fn output(command: Command, input: Option<&str>, deadline: Duration) -> Result<String> {
    let line = command_line(&command);
    let output = ended(command, input, deadline).await?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(LabError::invalid(format!(
            "`{line}` failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}

/// Runs a command to its end, however it ends.
///
/// # Errors
/// When it cannot be started, or takes longer.
pub(crate) async fn ended(command: Command, input: Option<&str>, deadline: Duration) -> Result<Output> {
    let line = command_line(&command);
    let mut child = start(command, input.is_some(), Stdio::piped())?;
    let feed = child.stdin.take();
    let run = async {
        // Fed while it is read from: neither side waits for the other. A reader that has gone shows in the exit status.
        let fed = async {
            if let (Some(mut feed), Some(input)) = (feed, input) {
                let _ = feed.write_all(input.as_bytes()).await;
            }
        };
        tokio::join!(fed, child.wait_with_output()).1
    };
    match tokio::time::timeout(deadline, run).await {
        Ok(output) => output.doing(|| format!("running `{line}`")),
        Err(_) => Err(LabError::Deadline {
            what: format!("`{line}` to end"),
            within: deadline,
            last: "still running; ended".into(),
        }),
    }
}

/// Starts a command whose output the caller reads, and which ends with the answer.
///
/// # Errors
/// When it cannot be started.
pub(crate) fn start(mut command: Command, fed: bool, errors: Stdio) -> Result<Child> {
    let line = command_line(&command);
    command.stdin(if fed { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(errors).kill_on_drop(true);
    command.spawn().doing(|| format!("starting `{line}`"))
}

fn command_line(command: &Command) -> String {
    let command = command.as_std();
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
