//! What the lab's images contain. An image is a name in a manifest; here it stands for a program.

use std::convert::Infallible;
use std::ffi::OsString;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;

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

/// The program of `isthmus.io/echo`. Who it is comes from `LAB_CLUSTER`, `LAB_NODE` and `LAB_POD`. It ends at once
/// when told to; that connections are drained first is the business of the pod's `preStop`, as anywhere.
///
/// # Errors
/// When it cannot listen.
pub fn echo(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let mut port: u16 = 8080;
    while let Some(flag) = args.next() {
        match flag.to_str() {
            Some("--port") => {
                let value = args.next().context("--port wants a number")?;
                port = value
                    .to_str()
                    .and_then(|v| v.parse().ok())
                    .context("--port wants a number from 1 to 65535")?;
            }
            _ => anyhow::bail!("echo knows only --port, not {flag:?}"),
        }
    }
    runtime()?.block_on(async move {
        let env = |name| std::env::var(name).unwrap_or_default();
        let answer = Answer { cluster: env("LAB_CLUSTER"), node: env("LAB_NODE"), pod: env("LAB_POD") };
        let router = Router::new().route("/healthz", get(|| async { "ok" })).fallback(move || {
            std::future::ready(Ok::<_, Infallible>((StatusCode::OK, Json(answer.clone())).into_response()))
        });
        // `::` takes IPv4 as well.
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}"))?;
        tokio::select! {
            served = async { axum::serve(listener, router).await } => served.context("serving"),
            () = told_to_end() => Ok(()),
        }
    })
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
