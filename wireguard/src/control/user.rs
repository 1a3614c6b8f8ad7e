//! A device in user space, over its UAPI socket.

use std::io::{self, Write};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixStream;
use zeroize::Zeroizing;

use super::{ControlError, Location};
use crate::uapi::{Answer, Lines, Request, read_answer, write_request};

/// How long a device may take for one step of an exchange.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A device in user space. It need not run: each exchange opens the socket anew.
#[derive(Debug, Clone)]
pub struct UserDevice {
    interface: String,
    socket: PathBuf,
    extended: bool,
}

impl UserDevice {
    /// The device that `isthmus-wireguard` runs here.
    pub fn ours(location: &Location) -> Self {
        Self {
            interface: location.interface.clone(),
            socket: location.uapi_dir.join(format!("{}.sock", location.interface)),
            extended: true,
        }
    }

    /// A device of another make: it is told nothing that is not in the protocol, such as a second private key.
    pub fn of_another_make(location: &Location) -> Self {
        Self { extended: false, ..Self::ours(location) }
    }

    pub(super) fn interface(&self) -> &str {
        &self.interface
    }

    /// Applies an update.
    ///
    /// # Errors
    /// When the device does not run or refuses.
    pub async fn apply(&self, update: &crate::config::DeviceUpdate) -> Result<(), ControlError> {
        self.exchange(&Request::Set(update.clone()), "an update").await.map(drop)
    }

    /// What the device is, and what it has counted when it is ours.
    ///
    /// # Errors
    /// When the device does not run or its answer cannot be understood.
    pub async fn read(&self) -> Result<Answer, ControlError> {
        self.exchange(&Request::Get { extended: self.extended }, "to tell its state").await
    }

    async fn exchange(&self, request: &Request, what: &'static str) -> Result<Answer, ControlError> {
        let mut text = Zeroizing::new(Vec::with_capacity(size_hint(request)));
        write_request(request, self.extended, &mut *text).map_err(|source| self.io(source))?;
        let stream = self.connect().await?;
        let answer = tokio::task::spawn_blocking(move || converse(&stream, &text))
            .await
            .map_err(|panic| self.io(io::Error::other(panic)))?
            .map_err(|error| match error {
                crate::uapi::AnswerError::Line(crate::uapi::LineError::Io(source)) => self.io(source),
                other => {
                    ControlError::BadAnswer { interface: self.interface.clone(), reason: other.to_string() }
                }
            })?;
        match answer.errno {
            0 => Ok(answer),
            errno => Err(ControlError::Refused {
                interface: self.interface.clone(),
                what,
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    async fn connect(&self) -> Result<BlockingStream, ControlError> {
        let connected = tokio::time::timeout(TIMEOUT, UnixStream::connect(&self.socket)).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => blocking(stream).map_err(|source| self.io(source)),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Err(ControlError::NotRunning { path: self.socket.clone(), interface: self.interface.clone() })
            }
            Err(source) => Err(self.io(source)),
        }
    }

    fn io(&self, source: io::Error) -> ControlError {
        ControlError::Io { interface: self.interface.clone(), source }
    }
}

fn blocking(stream: UnixStream) -> io::Result<BlockingStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

fn converse(mut stream: &BlockingStream, request: &[u8]) -> Result<Answer, crate::uapi::AnswerError> {
    // A device that refuses early stops reading; why it does stands in its answer.
    let written = stream.write_all(request);
    let answer = read_answer(&mut Lines::new(stream));
    match (written, answer) {
        (Err(source), Err(_)) => Err(crate::uapi::LineError::Io(source).into()),
        (_, answer) => answer,
    }
}

/// Enough for most requests, so that the buffer seldom moves and leaves a copy of a key behind.
fn size_hint(request: &Request) -> usize {
    match request {
        Request::Get { .. } => 64,
        Request::Set(update) => {
            let prefixes: usize = update.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
            512 + 512 * update.peers.len() + 64 * prefixes
        }
    }
}
