//! The daemon: `clustermesh-apiserver --help` tells how to use it.

use std::process::ExitCode;

use clap::Parser;
use clustermesh_apiserver::daemon;
use clustermesh_apiserver::flags::Flags;
use clustermesh_apiserver::troubleshoot;
use isthmus_daemon::LoopbackAddr;

/// Why a peer is not connected, step by step, from here: without a running daemon and without Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "clustermesh-apiserver troubleshoot", version)]
struct Troubleshoot {
    #[command(flatten)]
    flags: troubleshoot::Flags,
}

fn main() -> ExitCode {
    // `clustermesh-apiserver probe readyz`, in a pod.
    let usual_health = LoopbackAddr::ipv4(9880);
    if let Some(outcome) = isthmus_daemon::probe(std::env::args_os(), usual_health) {
        return outcome;
    }
    // A program of its own, which serves nothing and so needs none of the daemon's flags.
    if std::env::args_os().nth(1).is_some_and(|word| word == "troubleshoot") {
        let flags = Troubleshoot::parse_from(std::env::args_os().skip(1)).flags;
        return match runtime() {
            Ok(runtime) => runtime.block_on(troubleshoot::run(&flags)),
            Err(error) => fail(format_args!("the system gives no threads: {error}")),
        };
    }
    let flags = Flags::parse();
    if let Err(error) = isthmus_daemon::init_logging(flags.log_format, &flags.log_level) {
        return fail(format_args!("--log-level {}: {error}", flags.log_level));
    }
    let config = match flags.config() {
        Ok(config) => config,
        Err(error) => return fail(error),
    };
    let runtime = match runtime() {
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

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// One line on standard error, whatever the log level is.
#[allow(clippy::print_stderr, reason = "this is the line for who started it")]
fn fail(error: impl std::fmt::Display) -> ExitCode {
    eprintln!("clustermesh-apiserver: {error}");
    ExitCode::FAILURE
}
