//! WireGuard devices of several makes, each configured by stock `wg`.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use isthmus_wireguard::config::{PrivateKey, PublicKey};

use super::netns::{Namespace, Process, add_address};
use super::wait_for;

/// Who made the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    /// `isthmus-wireguard`.
    Ours,
    /// `wireguard-go`, from Debian.
    WireguardGo,
    /// `boringtun-cli`, which has the same cryptography as ours.
    Boringtun,
}

/// A running device called `wg0` in a namespace.
#[derive(Debug)]
pub(crate) struct Device {
    /// Where it is.
    pub(crate) namespace: Namespace,
    /// Its process.
    pub(crate) process: Process,
    key: PrivateKey,
    /// Its UAPI socket, its key file and its log.
    folder: tempfile::TempDir,
}

/// The one port of all devices.
pub(crate) const PORT: u16 = 51871;

impl Device {
    /// Starts one, with a new key, these inner addresses and an MTU of 1,420, up.
    pub(crate) fn start(make: Make, namespace: &Namespace, addresses: &[&str]) -> Self {
        Self::start_with(make, namespace, addresses, &[])
    }

    /// The same, with more arguments to the program.
    pub(crate) fn start_with(make: Make, namespace: &Namespace, addresses: &[&str], more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let key = PrivateKey::generate();
        fs::write(folder.path().join("key"), key.to_base64().as_str()).expect("a key file");
        let log = File::create(folder.path().join("log")).expect("a log");
        let mut command = within(namespace, folder.path().to_owned(), make.program());
        command.args(make.arguments()).args(more).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        let process = Process(command.spawn().expect("setpriv"));
        let mut device = Self { namespace: namespace.clone(), process, key, folder };
        device.wait_until_it_answers(make);
        let key_file = device.folder.path().join("key");
        device.wg(&[
            "set",
            "wg0",
            "private-key",
            &key_file.to_string_lossy(),
            "listen-port",
            &PORT.to_string(),
        ]);
        let mut lines: Vec<String> = addresses.iter().map(|address| add_address("wg0", address)).collect();
        lines.push("link set wg0 mtu 1420 up".to_owned());
        namespace.ip_batch(&lines);
        device
    }

    fn wait_until_it_answers(&mut self, make: Make) {
        wait_for("a device that answers", || {
            if let Ok(Some(status)) = self.process.0.try_wait() {
                panic!("{make:?} ended with {status}:\n{}", self.log());
            }
            let socket = self.folder.path().join("wg0.sock");
            std::os::unix::net::UnixStream::connect(socket).ok()?;
            self.namespace
                .command("ip")
                .args(["link", "show", "wg0"])
                .output()
                .ok()?
                .status
                .success()
                .then_some(())
        });
    }

    /// Its public key.
    pub(crate) fn key(&self) -> PublicKey {
        self.key.public_key()
    }

    /// The folder of its UAPI socket.
    pub(crate) fn uapi_dir(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// What it has said.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Runs stock `wg`.
    pub(crate) fn wg(&self, arguments: &[&str]) -> String {
        let output = within(&self.namespace, self.uapi_dir(), "wg").args(arguments).output().expect("wg");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "wg {arguments:?}: {error}\n{}", self.log());
        String::from_utf8(output.stdout).expect("text")
    }

    /// Adds a peer, or changes it: `words` as `wg set wg0 peer KEY` takes them.
    pub(crate) fn peer(&self, key: PublicKey, words: &str) {
        let key = key.to_string();
        let mut arguments = vec!["set", "wg0", "peer", &key];
        arguments.extend(words.split_whitespace());
        self.wg(&arguments);
    }

    /// What `wg show wg0 dump` says about a peer.
    pub(crate) fn shown(&self, key: PublicKey) -> Shown {
        let dump = self.wg(&["show", "wg0", "dump"]);
        let key = key.to_string();
        let line =
            dump.lines().find(|line| line.starts_with(&key)).unwrap_or_else(|| panic!("no {key} in {dump}"));
        let fields: Vec<&str> = line.split('\t').collect();
        let number = |index: usize| fields[index].parse().expect("a number");
        Shown { endpoint: fields[2].to_owned(), handshake: number(4), received: number(5), sent: number(6) }
    }
}

/// A peer as `wg` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    /// `(none)` when it is not known.
    pub(crate) endpoint: String,
    /// Seconds since 1970; 0 when there was none.
    pub(crate) handshake: u64,
    /// Bytes.
    pub(crate) received: u64,
    /// Bytes.
    pub(crate) sent: u64,
}

impl Make {
    fn program(self) -> &'static str {
        match self {
            Self::Ours => env!("CARGO_BIN_EXE_isthmus-wireguard"),
            Self::WireguardGo => "wireguard-go",
            Self::Boringtun => "boringtun-cli",
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Ours => &["--interface", "wg0", "--uapi-dir", "/run/wireguard"],
            Self::WireguardGo => &["--foreground", "wg0"],
            Self::Boringtun => &["--foreground", "--disable-drop-privileges", "wg0"],
        }
    }
}

/// A command in the namespace, for which `/run/wireguard` is this folder: the only place where `wg` and most devices look.
fn within(namespace: &Namespace, uapi_dir: PathBuf, program: &str) -> Command {
    let script = r#"mkdir -p /run/wireguard && mount --bind "$0" /run/wireguard && exec "$@""#;
    let mut command = namespace.command("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(uapi_dir).arg(program);
    command
}
