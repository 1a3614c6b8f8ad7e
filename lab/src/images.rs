//! What the lab's images contain. An image is a name in a manifest; here it stands for a program.

use std::convert::Infallible;
use std::ffi::OsString;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::{LabError, Result};
use crate::programs;

/// What [`echo`] answers: who it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The cluster it runs in.
    pub cluster: String,
    /// Its node.
    pub node: String,
    /// Its pod.
    pub pod: String,
}

/// The command that an image starts when the container names none.
///
/// # Errors
/// For an image the lab does not have; the message lists those it has.
pub fn command(image: &str) -> Result<Vec<OsString>> {
    let lab_pod: PathBuf = programs::ours(programs::LAB_POD)?;
    // A tag or digest makes no difference here.
    let name = image.split(['@', ':']).next().unwrap_or(image);
    match name {
        "isthmus.io/echo" => Ok(vec![lab_pod.into(), "echo".into()]),
        "isthmus.io/client" => Ok(vec![lab_pod.into(), "pause".into()]),
        _ => Err(LabError::invalid(format!(
            "image {image:?} is not in the lab, which has isthmus.io/echo and isthmus.io/client; \
             a container with a command of its own may name any image and runs that command on this machine"
        ))),
    }
}

/// The program of `isthmus.io/echo`. Who it is comes from `LAB_CLUSTER`, `LAB_NODE` and `LAB_POD`. Told to end, it does
/// what a good citizen of a mesh does: it is not ready from then on (`/healthz` answers 503) and serves for `--drain`
/// seconds more, in which every cluster hears of it.
///
/// # Errors
/// When it cannot listen.
pub fn echo(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let (mut port, mut drain): (u16, u64) = (8080, 5);
    while let Some(flag) = args.next() {
        match flag.to_str() {
            Some("--port") => {
                let value = args.next().context("--port wants a number")?;
                port = value
                    .to_str()
                    .and_then(|v| v.parse().ok())
                    .context("--port wants a number from 1 to 65535")?;
            }
            Some("--drain") => {
                let value = args.next().context("--drain wants a number of seconds")?;
                drain = value
                    .to_str()
                    .and_then(|v| v.parse().ok())
                    .context("--drain wants a number of seconds")?;
            }
            _ => anyhow::bail!("echo knows --port and --drain, not {flag:?}"),
        }
    }
    runtime()?.block_on(async move {
        let env = |name| std::env::var(name).unwrap_or_default();
        let answer = Answer { cluster: env("LAB_CLUSTER"), node: env("LAB_NODE"), pod: env("LAB_POD") };
        let draining = Arc::new(AtomicBool::new(false));
        let healthz = {
            let draining = Arc::clone(&draining);
            move || {
                std::future::ready(match draining.load(Ordering::Relaxed) {
                    false => (StatusCode::OK, "ok"),
                    true => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
                })
            }
        };
        let router = Router::new().route("/healthz", get(healthz)).fallback(move || {
            std::future::ready(Ok::<_, Infallible>((StatusCode::OK, Json(answer.clone())).into_response()))
        });
        // `::` takes IPv4 as well.
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}"))?;
        tokio::select! {
            served = async { axum::serve(listener, router).await } => served.context("serving"),
            () = async {
                told_to_end().await;
                draining.store(true, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(drain)).await;
            } => Ok(()),
        }
    })
}

/// Asks `isthmus.io/echo` at an address over one connection, ten times a second, and writes a line for each answer.
///
/// # Errors
/// When it cannot connect, or an answer does not come within five seconds.
pub fn ask(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    use std::io::{BufRead, BufReader, Read, Write};
    /// Longer than an answer is under way on however busy a machine.
    const PATIENCE: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_millis(100);
    let address = args.next().and_then(|text| text.to_str()?.parse::<SocketAddr>().ok());
    let address = address.context("ask wants an address and a port")?;
    let mut connection = std::net::TcpStream::connect_timeout(&address, 2 * PATIENCE)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(connection.try_clone()?);
    let mut out = std::io::stdout();
    loop {
        connection.write_all(b"GET / HTTP/1.1\r\nHost: echo\r\n\r\n").context("asking")?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            if answers.read_line(&mut line).context("waiting for an answer")? == 0 {
                anyhow::bail!("the connection was closed");
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().context("the answer's length")?;
            }
            if line.is_empty() {
                break;
            }
        }
        std::io::copy(&mut answers.by_ref().take(length), &mut std::io::sink())
            .context("reading an answer")?;
        writeln!(out, "answered")?;
        out.flush()?;
        #[expect(clippy::disallowed_methods, reason = "a program of its own, which does nothing else")]
        std::thread::sleep(PAUSE);
    }
}

/// Connects to an address twenty times a second, and writes for each attempt whether the connection was `made`, or `denied`:
/// the one packet that asks for it was not answered. Attempts do not wait for each other, so that some fall into any moment.
///
/// # Errors
/// When it is not told where to.
pub fn knock(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    use std::io::Write;
    /// TCP asks a second time after a second.
    const PATIENCE: Duration = Duration::from_millis(900);
    const PAUSE: Duration = Duration::from_millis(50);
    let address = args.next().and_then(|text| text.to_str()?.parse::<SocketAddr>().ok());
    let address = address.context("knock wants an address and a port")?;
    loop {
        std::thread::spawn(move || {
            let made = std::net::TcpStream::connect_timeout(&address, PATIENCE).is_ok();
            let mut out = std::io::stdout().lock();
            let line: &[u8] = if made { b"made\n" } else { b"denied\n" };
            // Nobody reads any more: the lab has ended, and this ends with it.
            let _ = out.write_all(line).and_then(|()| out.flush());
        });
        #[expect(clippy::disallowed_methods, reason = "a program of its own, which does nothing else")]
        std::thread::sleep(PAUSE);
    }
}

/// The program of `isthmus.io/client`: stays until told to end.
///
/// # Errors
/// When signals cannot be watched.
pub fn pause() -> anyhow::Result<()> {
    runtime()?.block_on(told_to_end());
    Ok(())
}

async fn told_to_end() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")
}
