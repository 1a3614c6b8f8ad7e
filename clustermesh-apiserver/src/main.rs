//! The daemon: `clustermesh-apiserver --help` tells how to use it.

use std::process::ExitCode;

use clap::Parser;
use clustermesh_apiserver::daemon;
use clustermesh_apiserver::flags::Flags;

fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Err(error) = isthmus_daemon::init_logging(flags.log_format, &flags.log_level) {
        return fail(format_args!("--log-level {}: {error}", flags.log_level));
    }
    let config = match flags.config() {
        Ok(config) => config,
        Err(error) => return fail(error),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(format_args!("the system gives no threads: {error}")),
    };
    let outcome = runtime.block_on(async {
        let shutdown = isthmus_daemon::shutdown_on_signal()
            .map_err(|error| anyhow::anyhow!("signals cannot be received: {error}"))?;
        daemon::run(config, shutdown).await.map_err(anyhow::Error::from)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error),
    }
}

/// One line on standard error, whatever the log level is.
#[allow(clippy::print_stderr, reason = "this is the line for who started it")]
fn fail(error: impl std::fmt::Display) -> ExitCode {
    eprintln!("clustermesh-apiserver: {error}");
    ExitCode::FAILURE
}
