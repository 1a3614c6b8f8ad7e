//! One HTTP request into a namespace: how probes and readiness are asked.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::netns::NetNs;

/// Longest answer that is read.
const MOST: u64 = 16 << 20;

/// `GET path` from inside `ns`: the status code and the body.
///
/// # Errors
/// When there is no answer within `deadline`, or it is not HTTP.
pub(crate) async fn get(
    ns: &NetNs,
    to: SocketAddr,
    path: &str,
    deadline: Duration,
) -> io::Result<(u16, String)> {
    let asked = async { ask(ns.connect(to).await?, &to.to_string(), path).await };
    tokio::time::timeout(deadline, asked).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// `GET path` over a Unix socket.
///
/// # Errors
/// As [`get`].
pub(crate) async fn get_unix(socket: &Path, path: &str, deadline: Duration) -> io::Result<(u16, String)> {
    let asked = async { ask(tokio::net::UnixStream::connect(socket).await?, "localhost", path).await };
    tokio::time::timeout(deadline, asked).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn ask(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    host: &str,
    path: &str,
) -> io::Result<(u16, String)> {
    // 1.0, so that the answer ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(MOST).read_to_end(&mut bytes).await?;
    parse(&String::from_utf8_lossy(&bytes))
}

fn parse(answer: &str) -> io::Result<(u16, String)> {
    let not_http = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP");
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(not_http)?;
    let status = head.strip_prefix("HTTP/1.").and_then(|h| h.split(' ').nth(1)).and_then(|s| s.parse().ok());
    Ok((status.ok_or_else(not_http)?, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_status_and_body() {
        assert_eq!(parse("HTTP/1.0 200 OK\r\nA: b\r\n\r\nok").unwrap(), (200, "ok".into()));
        assert_eq!(parse("HTTP/1.1 503 no\r\n\r\n").unwrap(), (503, String::new()));
        assert!(parse("SSH-2.0\r\n\r\n").is_err());
        assert!(parse("").is_err());
    }
}
