//! `isthmus status`.

use std::process::ExitCode;

use clap::Args;
use isthmus_lab::Result;

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {}

pub(crate) async fn run(_: StatusArgs) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
