//! The node-agents that a command is about, and how they are asked.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use isthmus_lab::names::LabName;
use isthmus_lab::state::StateDir;
use isthmus_lab::{LabError, Result};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

/// Longest answer that is read, of those that end.
const MOST: u64 = 16 << 20;
/// Longest error that is read.
const MOST_OF_AN_ERROR: u64 = 4 << 10;
const DEADLINE: Duration = Duration::from_secs(5);

/// Which agents.
#[derive(Debug, clap::Args)]
pub(crate) struct AgentArgs {
    /// Which lab; the only one there is when left out
    #[arg(long, conflicts_with = "socket")]
    lab: Option<LabName>,
    /// The API socket of a node-agent; may be given several times
    #[arg(long, value_name = "PATH")]
    socket: Vec<PathBuf>,
}

/// An agent's API socket.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    /// `cluster/node` in a lab, the socket's path elsewhere.
    pub(crate) name: String,
    /// Where it is.
    pub(crate) socket: PathBuf,
}

impl AgentArgs {
    /// All of them.
    pub(crate) fn agents(&self) -> Result<Vec<Agent>> {
        if !self.socket.is_empty() {
            let named =
                |socket: &PathBuf| Agent { name: socket.display().to_string(), socket: socket.clone() };
            return Ok(self.socket.iter().map(named).collect());
        }
        let lab = crate::lab::choose(self.lab.clone()).map_err(|error| match self.lab {
            Some(_) => error,
            None => LabError::invalid(format!("{error}; on a node of a real cluster, give --socket")),
        })?;
        let dir = StateDir::of(&lab);
        let state = dir.read()?;
        let nodes = state.clusters.iter().flat_map(|cluster| {
            cluster.nodes.iter().map(|node| Agent {
                name: format!("{}/{node}", cluster.name),
                socket: dir.agent_socket(&cluster.name, node),
            })
        });
        Ok(nodes.collect())
    }
}

impl Agent {
    /// The whole answer to `GET path`.
    pub(crate) async fn get(&self, path: &str) -> Result<String> {
        let answer = async {
            let mut lines = open(&self.socket, path).await?;
            let mut body = String::new();
            lines.get_mut().take(MOST).read_to_string(&mut body).await?;
            io::Result::Ok(body)
        };
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(error)) => Err(self.refused(&error)),
            Err(_) => Err(self.refused(&io::ErrorKind::TimedOut.into())),
        }
    }

    /// The lines of the answer to `GET path`, which has no end.
    pub(crate) async fn lines(&self, path: &str) -> io::Result<Lines<BufReader<OwnedReadHalf>>> {
        let opened = tokio::time::timeout(DEADLINE, open(&self.socket, path)).await;
        opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    pub(crate) fn refused(&self, error: &io::Error) -> LabError {
        LabError::invalid(match error.kind() {
            // The agent's own words.
            io::ErrorKind::InvalidInput => format!("{}: {error}", self.name),
            io::ErrorKind::PermissionDenied => format!("{}: {error}: run this as root", self.name),
            _ => format!("{}: no answer ({error}); is the agent running?", self.name),
        })
    }
}

/// Asks, and reads as far as the end of the head.
async fn open(socket: &Path, path: &str) -> io::Result<Lines<BufReader<OwnedReadHalf>>> {
    let (read, mut write) = UnixStream::connect(socket).await?.into_split();
    // 1.0, so that the answer is not cut into chunks and ends with the connection.
    write.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).await?;
    // Closing this half would end the request.
    write.forget();
    let not_http = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP");
    let mut lines = BufReader::new(read).lines();
    let head = lines.next_line().await?.ok_or_else(not_http)?;
    let status =
        head.strip_prefix("HTTP/1.").and_then(|head| head.split(' ').nth(1)).ok_or_else(not_http)?.to_owned();
    while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
    if status == "200" {
        return Ok(lines);
    }
    let mut text = String::new();
    lines.get_mut().take(MOST_OF_AN_ERROR).read_to_string(&mut text).await?;
    match status.as_str() {
        "404" => Err(io::Error::new(io::ErrorKind::InvalidInput, not_found(text.trim()))),
        "400" => Err(io::Error::new(io::ErrorKind::InvalidInput, text.trim().to_owned())),
        _ => Err(io::Error::other(format!("it answers {status}: {}", text.trim()))),
    }
}

fn not_found(text: &str) -> String {
    if text.is_empty() { "the agent is of an older version".to_owned() } else { text.to_owned() }
}
