//! Stock `wg` against our socket, with a device behind it that only remembers what it was told; and our client.
//! As root: `wg` looks in `/run/wireguard` alone, so each call has a mount namespace in which the test's folder is there.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use ipnet::IpNet;
use isthmus_wireguard::config::{
    AllowedIp, ApplyError, Change, Configurable, Counter, DeviceState, DeviceUpdate, PeerState, PeerUpdate,
    PrivateKey, PublicKey,
};
use isthmus_wireguard::control::{Backend, Control, ControlError, Location, UserDevice};
use isthmus_wireguard::uapi::{Server, ServerError};
use tokio_util::sync::CancellationToken;

const INTERFACE: &str = "wgtest0";

/// Remembers, as the protocol says a device does.
#[derive(Default)]
struct Memory {
    state: Mutex<DeviceState>,
    /// What the next update is refused with.
    refusal: Mutex<Option<ApplyError>>,
}

impl Configurable for Memory {
    fn apply(&self, update: DeviceUpdate) -> Result<(), ApplyError> {
        if let Some(refusal) = self.refusal.lock().unwrap().take() {
            return Err(refusal);
        }
        let mut state = self.state.lock().unwrap();
        update.private_key.apply_to(&mut state.private_key);
        update.next_private_key.apply_to(&mut state.next_private_key);
        state.listen_port = update.listen_port.unwrap_or(state.listen_port);
        state.fwmark = update.fwmark.unwrap_or(state.fwmark);
        if update.replace_peers {
            state.peers.clear();
        }
        update.peers.into_iter().for_each(|peer| change_peer(&mut state.peers, peer));
        Ok(())
    }

    fn state(&self) -> DeviceState {
        self.state.lock().unwrap().clone()
    }

    fn counters(&self) -> Vec<Counter> {
        vec![("dropped_replayed", 3)]
    }
}

fn change_peer(peers: &mut Vec<PeerState>, update: PeerUpdate) {
    let known = peers.iter().position(|peer| peer.public_key == update.public_key);
    if update.remove {
        return known.into_iter().for_each(|place| drop(peers.remove(place)));
    }
    if known.is_none() && update.update_only {
        return;
    }
    let place = known.unwrap_or_else(|| {
        peers.push(PeerState::new(update.public_key));
        peers.len() - 1
    });
    // Looks at every prefix of everybody, so it is left out where it cannot find any.
    if !update.allowed_ips.is_empty() {
        for other in peers.iter_mut().filter(|peer| peer.public_key != update.public_key) {
            other.allowed_ips.retain(|prefix| !update.allowed_ips.contains(&AllowedIp::Add(*prefix)));
        }
    }
    let peer = &mut peers[place];
    update.preshared_key.apply_to(&mut peer.preshared_key);
    peer.endpoint = update.endpoint.or(peer.endpoint);
    if let Some(seconds) = update.persistent_keepalive {
        peer.persistent_keepalive = NonZeroU16::new(seconds);
    }
    if update.replace_allowed_ips {
        peer.allowed_ips.clear();
    }
    for change in update.allowed_ips {
        match change {
            AllowedIp::Add(prefix) => peer.allowed_ips.push(prefix),
            AllowedIp::Remove(prefix) => peer.allowed_ips.retain(|owned| *owned != prefix),
        }
    }
    peer.successor_of = update.successor_of;
}

/// A served device; gone with its socket when dropped.
struct Served {
    folder: tempfile::TempDir,
    device: Arc<Memory>,
    shutdown: CancellationToken,
}

impl Served {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let served = Self { folder, device: Arc::default(), shutdown: CancellationToken::new() };
        let server = Server::bind(&served.dir(), INTERFACE).unwrap();
        tokio::spawn(server.serve(served.device.clone(), served.shutdown.clone()));
        served
    }

    /// Made by the server.
    fn dir(&self) -> std::path::PathBuf {
        self.folder.path().join("wireguard")
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir().join(format!("{INTERFACE}.sock"))
    }

    fn location(&self) -> Location {
        Location { interface: INTERFACE.to_owned(), uapi_dir: self.dir() }
    }

    /// Runs stock `wg`, with this on its standard input.
    async fn wg_with(&self, arguments: &[&str], input: &str) -> Output {
        let script =
            r#"mkdir -p /run/wireguard && mount --bind "$1" /run/wireguard && shift && exec wg "$@""#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]).arg(self.dir()).args(arguments);
        let input = input.to_owned();
        tokio::task::spawn_blocking(move || {
            let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
            let mut child = child.expect("wg runs: xtask/setup.sh test installs wireguard-tools");
            child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        })
        .await
        .unwrap()
    }

    async fn wg(&self, arguments: &[&str]) -> String {
        let output = self.wg_with(arguments, "").await;
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && error.is_empty(), "wg {arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn public(number: u8) -> PublicKey {
    PublicKey::new([number; 32])
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_wg_shows_the_device() {
    let served = Served::start();
    let key = PrivateKey::generate();
    *served.device.state.lock().unwrap() = DeviceState {
        private_key: Some(key.clone()),
        next_private_key: Some(PrivateKey::generate()),
        listen_port: 51871,
        fwmark: 0xe00,
        peers: vec![
            PeerState {
                endpoint: Some("[2001:db8::1]:51871".parse().unwrap()),
                last_handshake: Some(UNIX_EPOCH + Duration::new(1_700_000_000, 42)),
                rx_bytes: 7,
                tx_bytes: 5,
                persistent_keepalive: NonZeroU16::new(25),
                allowed_ips: vec![net("10.1.0.0/16"), net("2001:db8:1::/64")],
                successor_of: Some(public(2)),
                ..PeerState::new(public(1))
            },
            PeerState::new(public(2)),
        ],
    };
    let dump = served.wg(&["show", INTERFACE, "dump"]).await;
    let expected = [
        format!("{}\t{}\t51871\t0xe00", key.to_base64().as_str(), key.public_key()),
        format!(
            "{}\t(none)\t[2001:db8::1]:51871\t10.1.0.0/16,2001:db8:1::/64\t1700000000\t7\t5\t25",
            public(1)
        ),
        format!("{}\t(none)\t(none)\t(none)\t0\t0\t0\toff", public(2)),
    ];
    assert_eq!(dump.lines().collect::<Vec<_>>(), expected);
    assert_eq!(served.wg(&["show", "interfaces"]).await.trim(), INTERFACE);
    let shown = served.wg(&["show"]).await;
    assert!(
        shown.contains(&format!("interface: {INTERFACE}")) && shown.contains("every 25 seconds"),
        "{shown}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_wg_sets_changes_and_takes_away() {
    let served = Served::start();
    let key = PrivateKey::generate();
    let file = served.folder.path().join("private");
    fs::write(&file, key.to_base64().as_str()).unwrap();
    let (one, other) = (public(1).to_string(), public(2).to_string());

    served.wg(&["set", INTERFACE, "listen-port", "51871", "private-key", file.to_str().unwrap()]).await;
    served
        .wg(&["set", INTERFACE, "peer", &one, "allowed-ips", "10.1.0.0/16", "endpoint", "192.0.2.1:51871"])
        .await;
    served
        .wg(&[
            "set",
            INTERFACE,
            "peer",
            &other,
            "allowed-ips",
            "10.2.0.0/16,::/0",
            "persistent-keepalive",
            "25",
        ])
        .await;
    let state = served.device.state();
    assert_eq!((state.private_key, state.listen_port), (Some(key), 51871));
    assert_eq!(state.peers[0].endpoint, Some("192.0.2.1:51871".parse().unwrap()));
    assert_eq!(state.peers[1].allowed_ips, [net("10.2.0.0/16"), net("::/0")]);
    assert_eq!(state.peers[1].persistent_keepalive, NonZeroU16::new(25));

    served.wg(&["set", INTERFACE, "peer", &one, "remove", "peer", &other, "allowed-ips", ""]).await;
    served.wg(&["set", INTERFACE, "private-key", "/dev/null"]).await;
    let state = served.device.state();
    assert_eq!(state.private_key, None);
    assert_eq!(state.peers.iter().map(|peer| peer.public_key).collect::<Vec<_>>(), [public(2)]);
    assert!(state.peers[0].allowed_ips.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_wg_brings_the_device_to_what_a_file_says() {
    let served = Served::start();
    let key = PrivateKey::generate();
    let config = |peers: &[(u8, &str)]| {
        let mut text =
            format!("[Interface]\nPrivateKey = {}\nListenPort = 51871\n", key.to_base64().as_str());
        for (number, prefixes) in peers {
            text += &format!("[Peer]\nPublicKey = {}\nAllowedIPs = {prefixes}\n", public(*number));
        }
        text
    };
    let owned = || -> BTreeMap<PublicKey, Vec<IpNet>> {
        let state = served.device.state();
        state.peers.into_iter().map(|peer| (peer.public_key, peer.allowed_ips)).collect()
    };
    for (command, peers, expected) in [
        (
            "setconf",
            &[(1, "10.1.0.0/16"), (2, "10.2.0.0/16")][..],
            vec![(1, "10.1.0.0/16"), (2, "10.2.0.0/16")],
        ),
        ("syncconf", &[(2, "10.2.0.0/16"), (3, "10.3.0.0/16")], vec![(2, "10.2.0.0/16"), (3, "10.3.0.0/16")]),
        ("addconf", &[(4, "10.4.0.0/16")], vec![(2, "10.2.0.0/16"), (3, "10.3.0.0/16"), (4, "10.4.0.0/16")]),
    ] {
        let output = served.wg_with(&[command, INTERFACE, "/dev/stdin"], &config(peers)).await;
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        let expected =
            expected.into_iter().map(|(number, prefix)| (public(number), vec![net(prefix)])).collect();
        assert_eq!(owned(), expected, "{command}");
    }
    let shown = served.wg(&["showconf", INTERFACE]).await;
    assert!(shown.contains("AllowedIPs = 10.3.0.0/16"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_wg_says_why_an_update_was_refused() {
    let served = Served::start();
    let in_use = std::io::Error::from_raw_os_error(98);
    *served.device.refusal.lock().unwrap() = Some(ApplyError::Listen { port: 51871, source: in_use });
    let output = served.wg_with(&["set", INTERFACE, "listen-port", "51871"], "").await;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("Address already in use"), "{error}");
    assert_eq!(served.wg(&["show", INTERFACE, "listen-port"]).await.trim(), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_sees_and_sets_what_only_our_device_has() {
    let served = Served::start();
    let control = Control::open(Backend::User, &served.location()).await.unwrap();
    let (key, next) = (PrivateKey::generate(), PrivateKey::generate());
    let update = DeviceUpdate {
        private_key: Change::Set(key.clone()),
        next_private_key: Change::Set(next.clone()),
        peers: vec![PeerUpdate { successor_of: Some(public(2)), ..PeerUpdate::new(public(1)) }],
        ..DeviceUpdate::default()
    };
    control.apply(&update).await.unwrap();
    let state = control.state().await.unwrap();
    assert_eq!((state.private_key, state.next_private_key), (Some(key), Some(next)));
    assert_eq!(state.peers[0].successor_of, Some(public(2)));
    assert_eq!(control.counters().await.unwrap(), BTreeMap::from([("dropped_replayed".to_owned(), 3)]));

    let plain = UserDevice::of_another_make(&served.location()).read().await.unwrap();
    assert_eq!((plain.state.next_private_key, plain.state.peers[0].successor_of), (None, None));
    assert!(plain.counters.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_peers_are_told_and_read_in_one_exchange() {
    let served = Served::start();
    let control = Control::open(Backend::User, &served.location()).await.unwrap();
    let key = |i: u32| {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&(i + 1).to_be_bytes());
        PublicKey::new(bytes)
    };
    // The memory device looks at every peer for every prefix, so the many prefixes are with one.
    let prefixes = |i: u32| IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + i).into(), 32).unwrap();
    let mut peers: Vec<_> = (0..10_000).map(|i| PeerUpdate::new(key(i))).collect();
    peers[0].allowed_ips = (0..10_000).map(|i| AllowedIp::Add(prefixes(i))).collect();
    control.apply(&DeviceUpdate { peers, ..DeviceUpdate::default() }).await.unwrap();
    let state = control.state().await.unwrap();
    assert_eq!((state.peers.len(), state.peers[0].allowed_ips.len()), (10_000, 10_000));
    assert_eq!(state.peers[9_999].public_key, key(9_999));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_owner_may_open_the_socket_and_its_folder() {
    let served = Served::start();
    assert_eq!(fs::metadata(served.dir()).unwrap().permissions().mode() & 0o777, 0o700);
    let socket = fs::metadata(served.socket()).unwrap();
    assert_eq!((socket.permissions().mode() & 0o777, socket.uid()), (0o600, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
    let served = Served::start();
    let refused = Server::bind(&served.dir(), INTERFACE).unwrap_err();
    assert!(matches!(refused, ServerError::InUse { .. }), "{refused}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("{INTERFACE}.sock"));
    // What a killed device leaves: the file, and no one behind it.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = Server::bind(folder.path(), INTERFACE).unwrap();
    UnixStream::connect(&path).unwrap();
    drop(server);
    assert!(!path.exists());

    fs::write(&path, "mine").unwrap();
    let refused = Server::bind(folder.path(), INTERFACE).unwrap_err();
    assert!(matches!(refused, ServerError::NotASocket { .. }) && fs::read(&path).unwrap() == b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_run_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location { interface: INTERFACE.to_owned(), uapi_dir: folder.path().to_owned() };
    let control = Control::open(Backend::User, &location).await.unwrap();
    for error in
        [control.state().await.unwrap_err(), control.apply(&DeviceUpdate::default()).await.unwrap_err()]
    {
        assert!(matches!(error, ControlError::NotRunning { .. }), "{error}");
        assert!(error.to_string().contains("isthmus-wireguard --interface wgtest0"), "{error}");
    }
    let error = control.link().await.unwrap_err();
    assert!(matches!(error, ControlError::NoInterface { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_talks_nonsense_or_not_at_all_keeps_no_one_else_waiting() {
    let served = Served::start();
    let socket = served.socket();
    let silent: Vec<_> = (0..4).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let answers = tokio::task::spawn_blocking(move || answers_to_nonsense(&socket)).await.unwrap();
    // Two requests, two answers; then one whose end cannot be found, and the connection is closed.
    assert_eq!(answers, "errno=-71\n\nerrno=-22\n\nerrno=-71\n\n");
    assert_eq!(served.wg(&["show", INTERFACE, "fwmark"]).await.trim(), "off");
    drop(silent);
}

fn answers_to_nonsense(socket: &Path) -> String {
    let mut client = UnixStream::connect(socket).unwrap();
    let endless = "x".repeat(4096);
    // The device may close before it has read all of this.
    let _ = client.write_all(format!("hello=1\n\nset=1\nfwmark=x\n\n{endless}").as_bytes());
    let mut answers = String::new();
    let mut byte = [0];
    while let Ok(1) = client.read(&mut byte) {
        answers.push(char::from(byte[0]));
    }
    answers
}

/// Where the kernel has no WireGuard, `auto` is the device in user space and `kernel` an error that says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn auto_chooses_by_what_the_kernel_has() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location { interface: "wgauto0".to_owned(), uapi_dir: folder.path().to_owned() };
    if isthmus_wireguard::control::kernel_is_available().await.unwrap() {
        eprintln!("this kernel has WireGuard: its absence cannot be seen here");
        return;
    }
    let control = Control::open(Backend::Auto, &location).await.unwrap();
    assert!(!control.is_kernel());
    let error = Control::open(Backend::Kernel, &location).await.unwrap_err();
    assert!(error.to_string().contains("--wireguard=user"), "{error}");
}
