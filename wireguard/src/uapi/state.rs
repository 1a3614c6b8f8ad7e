//! Answers of a device, parsed from lines.

use std::collections::BTreeMap;
use std::io::Read;
use std::num::NonZeroU16;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{COUNTER_PREFIX, LineError, Lines, MAX_PEERS, MAX_PREFIXES, request};
use crate::config::{DeviceState, KEY_LENGTH, PeerState, PresharedKey, PrivateKey, PublicKey, parse_hex_key};

/// Different counters in one answer.
const MAX_COUNTERS: usize = 1024;

/// What a device answered.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// 0 when it did what it was asked for; otherwise why not, as a positive number.
    pub errno: i32,
    /// What it is, when that was asked for.
    pub state: DeviceState,
    /// What it has counted, when that was asked for and it is ours.
    pub counters: BTreeMap<String, u64>,
}

/// What is wrong about an answer. Names the line, never a value: that may be a secret.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// It is not a line of this protocol.
    #[error(transparent)]
    Line(#[from] LineError),
    /// A value cannot be one of its key.
    #[error("line {line}: the value of `{key}` is not one")]
    BadValue {
        /// Counted from 1 within the answer.
        line: usize,
        /// As received.
        key: String,
    },
    /// It ends without saying how it went.
    #[error("it ends without an errno")]
    NoErrno,
    /// It has more peers, prefixes or counters than any device.
    #[error("it has more than {MAX_PEERS} peers, {MAX_PREFIXES} prefixes or {MAX_COUNTERS} counters")]
    TooLong,
}

/// Reads one answer, to its end. Keys that mean nothing are passed over: devices may say more than this knows.
///
/// # Errors
/// When it cannot be understood.
pub fn read_answer<R: Read>(lines: &mut Lines<R>) -> Result<Answer, AnswerError> {
    lines.begin_message().map_err(LineError::from)?;
    let mut answer = Answer::default();
    let mut errno = None;
    let mut handshake = Handshake::default();
    let mut prefixes = 0;
    let mut line = 0;
    while let Some((key, value)) = lines.next_pair()? {
        line += 1;
        match key {
            "errno" => errno = value.parse::<i32>().ok(),
            "public_key" => handshake = Handshake::default(),
            "allowed_ip" => prefixes += 1,
            _ => {}
        }
        read_pair(&mut answer, &mut handshake, key, value)
            .ok_or_else(|| AnswerError::BadValue { line, key: key.to_owned() })?;
        let too_long = answer.state.peers.len() > MAX_PEERS || answer.counters.len() > MAX_COUNTERS;
        if too_long || prefixes > MAX_PREFIXES {
            return Err(AnswerError::TooLong);
        }
    }
    answer.errno = errno.and_then(i32::checked_abs).ok_or(AnswerError::NoErrno)?;
    Ok(answer)
}

/// The two halves of a peer's handshake time.
#[derive(Default)]
struct Handshake {
    seconds: u64,
    nanoseconds: u32,
}

impl Handshake {
    /// `None`: never.
    fn time(&self) -> Option<Option<SystemTime>> {
        let since =
            Duration::from_secs(self.seconds).checked_add(Duration::from_nanos(self.nanoseconds.into()))?;
        if since.is_zero() {
            return Some(None);
        }
        UNIX_EPOCH.checked_add(since).map(Some)
    }
}

/// `None` when the value is none of this key's.
fn read_pair(answer: &mut Answer, handshake: &mut Handshake, key: &str, value: &str) -> Option<()> {
    let state = &mut answer.state;
    if key == "public_key" {
        state.peers.push(PeerState::new(public_key(value)?));
        return Some(());
    }
    let Some(peer) = state.peers.last_mut() else {
        return read_device_pair(answer, key, value);
    };
    match key {
        "preshared_key" => peer.preshared_key = PresharedKey::from_bytes(*parse_hex_key(value).ok()?),
        "endpoint" => peer.endpoint = Some(request::endpoint(value).ok()?),
        "last_handshake_time_sec" => {
            handshake.seconds = value.parse().ok()?;
            peer.last_handshake = handshake.time()?;
        }
        "last_handshake_time_nsec" => {
            handshake.nanoseconds = value.parse().ok()?;
            peer.last_handshake = handshake.time()?;
        }
        "tx_bytes" => peer.tx_bytes = value.parse().ok()?,
        "rx_bytes" => peer.rx_bytes = value.parse().ok()?,
        "persistent_keepalive_interval" => peer.persistent_keepalive = NonZeroU16::new(value.parse().ok()?),
        "allowed_ip" => peer.allowed_ips.push(value.parse().ok()?),
        "successor_of" => peer.successor_of = Some(public_key(value)?),
        "session_key" => peer.session_key = Some(public_key(value)?),
        _ => {}
    }
    Some(())
}

fn read_device_pair(answer: &mut Answer, key: &str, value: &str) -> Option<()> {
    let state = &mut answer.state;
    match key {
        "private_key" => state.private_key = PrivateKey::from_bytes(*parse_hex_key(value).ok()?),
        "next_private_key" => state.next_private_key = PrivateKey::from_bytes(*parse_hex_key(value).ok()?),
        "listen_port" => state.listen_port = value.parse().ok()?,
        "fwmark" => state.fwmark = value.parse().ok()?,
        _ => {
            if let Some(name) = key.strip_prefix(COUNTER_PREFIX) {
                answer.counters.insert(name.to_owned(), value.parse().ok()?);
            }
        }
    }
    Some(())
}

fn public_key(value: &str) -> Option<PublicKey> {
    let bytes: [u8; KEY_LENGTH] = *parse_hex_key(value).ok()?;
    Some(PublicKey::new(bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::{Request, read_request, write_request, write_state};
    use super::*;
    use crate::config::{AllowedIp, Change, DeviceUpdate, PeerUpdate};

    fn peer(number: u8) -> PeerState {
        PeerState {
            preshared_key: PresharedKey::from_bytes([number; 32]),
            endpoint: Some("[2001:db8::1]:51871".parse().unwrap()),
            last_handshake: Some(UNIX_EPOCH + Duration::new(1_700_000_000, 42)),
            rx_bytes: u64::MAX,
            tx_bytes: 1,
            persistent_keepalive: NonZeroU16::new(25),
            allowed_ips: vec!["10.1.0.0/16".parse().unwrap(), "2001:db8::/64".parse().unwrap()],
            successor_of: Some(PublicKey::new([9; 32])),
            session_key: Some(PublicKey::new([8; 32])),
            ..PeerState::new(PublicKey::new([number; 32]))
        }
    }

    fn device() -> DeviceState {
        DeviceState {
            private_key: Some(PrivateKey::generate()),
            next_private_key: Some(PrivateKey::generate()),
            listen_port: 51871,
            fwmark: 0xe00,
            peers: vec![peer(1), PeerState::new(PublicKey::new([2; 32]))],
        }
    }

    fn written(state: &DeviceState, extended: bool) -> Vec<u8> {
        let mut text = Vec::new();
        let counters = [("dropped_replayed", 3), ("dropped_malformed", 0)];
        write_state(state, extended.then_some(&counters[..]), &mut text).unwrap();
        text.write_all(b"errno=0\n\n").unwrap();
        text
    }

    #[test]
    fn a_device_is_read_as_it_was_written() {
        let state = device();
        let answer = read_answer(&mut Lines::new(&written(&state, true)[..])).unwrap();
        assert_eq!(answer.state, state);
        assert_eq!(
            answer.counters.into_iter().collect::<Vec<_>>(),
            [("dropped_malformed".to_owned(), 0), ("dropped_replayed".to_owned(), 3)]
        );
    }

    #[test]
    fn who_has_not_asked_for_extensions_gets_none() {
        let mut state = device();
        let text = written(&state, false);
        let answer = read_answer(&mut Lines::new(&text[..])).unwrap();
        state.next_private_key = None;
        state.peers[0].successor_of = None;
        state.peers[0].session_key = None;
        assert_eq!(answer, Answer { state, ..Answer::default() });
    }

    #[test]
    fn an_ipv4_peer_of_a_dual_stack_socket_shows_as_ipv4() {
        let mut state = device();
        state.peers[0].endpoint = Some("[::ffff:192.0.2.1]:5".parse().unwrap());
        let answer = read_answer(&mut Lines::new(&written(&state, false)[..])).unwrap();
        assert_eq!(answer.state.peers[0].endpoint, Some("192.0.2.1:5".parse().unwrap()));
    }

    #[test]
    fn an_update_is_read_as_it_was_written() {
        let update = DeviceUpdate {
            private_key: Change::Set(PrivateKey::generate()),
            next_private_key: Change::Clear,
            listen_port: Some(0),
            fwmark: Some(0),
            replace_peers: true,
            peers: vec![
                PeerUpdate {
                    preshared_key: Change::Clear,
                    endpoint: Some("192.0.2.1:51871".parse().unwrap()),
                    persistent_keepalive: Some(0),
                    replace_allowed_ips: true,
                    update_only: true,
                    allowed_ips: vec![
                        AllowedIp::Add("0.0.0.0/0".parse().unwrap()),
                        AllowedIp::Remove("2001:db8::/64".parse().unwrap()),
                    ],
                    successor_of: Some(PublicKey::new([9; 32])),
                    ..PeerUpdate::new(PublicKey::new([1; 32]))
                },
                PeerUpdate::removal(PublicKey::new([2; 32])),
            ],
        };
        let request = Request::Set(update);
        let mut text = Vec::new();
        write_request(&request, true, &mut text).unwrap();
        assert_eq!(read_request(&mut Lines::new(&text[..])).unwrap(), Some(request));
    }

    #[test]
    fn other_devices_are_not_told_what_they_do_not_have() {
        let update = DeviceUpdate {
            next_private_key: Change::Set(PrivateKey::generate()),
            peers: vec![PeerUpdate {
                successor_of: Some(PublicKey::new([9; 32])),
                ..PeerUpdate::new(PublicKey::new([1; 32]))
            }],
            ..DeviceUpdate::default()
        };
        let mut text = Vec::new();
        write_request(&Request::Set(update), false, &mut text).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), format!("set=1\npublic_key={}\n\n", "01".repeat(32)));
    }

    #[test]
    fn the_errno_counts_whatever_its_sign() {
        for text in ["errno=22\n\n", "errno=-22\n\n"] {
            assert_eq!(read_answer(&mut Lines::new(text.as_bytes())).unwrap().errno, 22);
        }
        for text in ["\n", "errno=\n\n", "errno=-2147483648\n\n"] {
            let error = read_answer(&mut Lines::new(text.as_bytes())).unwrap_err();
            assert!(matches!(error, AnswerError::NoErrno), "{error}");
        }
    }

    #[test]
    fn a_bad_value_is_named_by_its_line_and_key() {
        let text = format!("listen_port=1\npublic_key={}\nallowed_ip=10.0.0.0\nerrno=0\n\n", "01".repeat(32));
        let error = read_answer(&mut Lines::new(text.as_bytes())).unwrap_err();
        assert_eq!(error.to_string(), "line 3: the value of `allowed_ip` is not one");
    }
}
