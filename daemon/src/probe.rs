//! The daemon's program asks the daemon how it is.
//!
//! Health is told in plain text, and therefore on loopback only: the kubelet does not reach it in a pod with a network of its
//! own, and an image without a shell has nothing to ask with. So the program does, as an `exec` probe.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::LoopbackAddr;

/// The first word of the command line that asks.
const WORD: &str = "probe";
/// Less than the second that a probe has by default.
const PATIENCE: Duration = Duration::from_millis(900);
/// Of an answer, more than any reason is long.
const MOST: u64 = 64 * 1024;

/// Asks the daemon that runs beside this how it is: ends with 0 if well, else with 1, and says why.
#[derive(Parser)]
#[command(name = WORD)]
struct Probe {
    /// Whether it is alive, or whether it is ready
    #[arg(value_enum)]
    what: What,
    /// The daemon's own --health-address, if it is not the usual one
    #[arg(long, value_name = "ADDRESS")]
    health_address: Option<LoopbackAddr>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    Healthz,
    Readyz,
}

/// Why the daemon is not well.
#[derive(Debug, thiserror::Error)]
enum Unwell {
    #[error("nobody answers at {0}: {1}")]
    Silent(LoopbackAddr, io::Error),
    #[error("{0}")]
    Says(String),
}

/// Answers a command line `PROGRAM probe healthz|readyz`; none if it is another one, which is the daemon's own to read.
/// `usual` is where the daemon tells its health unless it is told otherwise.
pub fn probe(arguments: impl IntoIterator<Item = OsString>, usual: LoopbackAddr) -> Option<ExitCode> {
    let mut arguments = arguments.into_iter().skip(1).peekable();
    arguments.peek().filter(|first| *first == WORD)?;
    let probe = Probe::parse_from(arguments);
    Some(match probe.ask(usual) {
        Ok(()) => ExitCode::SUCCESS,
        Err(unwell) => {
            // The kubelet puts what is written here into the pod's events.
            let _ = writeln!(io::stdout(), "{unwell}");
            ExitCode::FAILURE
        }
    })
}

impl Probe {
    fn ask(&self, usual: LoopbackAddr) -> Result<(), Unwell> {
        let address = self.health_address.unwrap_or(usual);
        let path = match self.what {
            What::Healthz => "/healthz",
            What::Readyz => "/readyz",
        };
        let answer = get(address, path).map_err(|error| Unwell::Silent(address, error))?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        if head.split(' ').nth(1) == Some("200") {
            return Ok(());
        }
        let status = head.lines().next().unwrap_or_default();
        Err(Unwell::Says(format!("{path} answers {status}: {}", body.trim())))
    }
}

fn get(address: LoopbackAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address.socket_addr(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MOST).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{Endpoints, Readiness};

    fn asked(what: What, address: &str) -> Result<(), Unwell> {
        Probe { what, health_address: None }.ask(address.parse().unwrap())
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_daemon_that_waits_is_alive_and_not_ready_and_says_what_for() {
        let shutdown = CancellationToken::new();
        let mut endpoints = Endpoints::new(shutdown.clone());
        let waits = || Readiness::Waiting("waiting for peer beta".to_owned());
        let address = endpoints.health("127.0.0.1:0".parse().unwrap(), waits, Router::new()).await.unwrap();
        let (alive, ready) = tokio::task::spawn_blocking(move || {
            let address = address.to_string();
            (asked(What::Healthz, &address), asked(What::Readyz, &address))
        })
        .await
        .unwrap();
        alive.unwrap();
        let why = ready.unwrap_err().to_string();
        assert!(why.contains("503") && why.contains("waiting for peer beta"), "{why}");
        shutdown.cancel();
        endpoints.finish().await;
    }

    #[test]
    fn a_daemon_that_is_not_there_is_unwell() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        drop(taken);
        let why = asked(What::Healthz, &address).unwrap_err().to_string();
        assert!(why.contains(&address), "{why}");
    }

    #[test]
    fn other_command_lines_are_the_daemon_s() {
        let usual: LoopbackAddr = "127.0.0.1:9880".parse().unwrap();
        for line in [&["daemon"][..], &["daemon", "--cluster-name", "probe"], &["probe"]] {
            assert!(probe(line.iter().map(OsString::from), usual).is_none(), "{line:?}");
        }
    }
}
