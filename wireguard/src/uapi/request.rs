//! Requests to a device, parsed from lines.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use ipnet::IpNet;

use super::{EXTENSIONS, LineError, Lines, MAX_PEERS, MAX_PREFIXES};
use crate::config::{
    AllowedIp, Change, DeviceUpdate, KEY_LENGTH, KeyError, PeerUpdate, PresharedKey, PrivateKey, PublicKey,
};

/// What a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// What is the device now?
    Get {
        /// Also what only our device has.
        extended: bool,
    },
    /// Apply this.
    Set(DeviceUpdate),
}

/// What is wrong about a request. Names the line and the key, never the value: that may be a secret.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct RequestError {
    /// Counted from 1 within the request.
    pub line: usize,
    /// What is wrong about it.
    pub reason: Reason,
}

/// What is wrong about a line of a request.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// It is not a line of this protocol.
    #[error(transparent)]
    Line(#[from] LineError),
    /// The first line is neither of the two there are.
    #[error("a request begins with `get=1` or `set=1`")]
    NoSuchRequest,
    /// Something follows `get=1`.
    #[error("an empty line, or `{EXTENSIONS}=1`, follows `get=1`")]
    NotEmptyGet,
    /// The key means nothing.
    #[error("the key is unknown, or is a peer's and stands before the first `public_key`")]
    UnknownKey,
    /// The value cannot be one of this key.
    #[error("the value of `{key}` must be {expected}")]
    BadValue {
        /// The key, as documented.
        key: &'static str,
        /// What was expected.
        expected: &'static str,
    },
    /// There are more peers than a request may have.
    #[error("there are more than {MAX_PEERS} peers: send them in several requests")]
    TooManyPeers,
    /// There are more prefixes than a request may have.
    #[error("there are more than {MAX_PREFIXES} prefixes: send them in several requests")]
    TooManyPrefixes,
}

impl RequestError {
    /// The number that answers for this error.
    pub fn errno(&self) -> i32 {
        match &self.reason {
            Reason::Line(LineError::Io(source)) => source.raw_os_error().unwrap_or(libc::EPROTO),
            Reason::Line(LineError::MessageTooLong) | Reason::TooManyPeers | Reason::TooManyPrefixes => {
                libc::E2BIG
            }
            Reason::Line(_) | Reason::NoSuchRequest => libc::EPROTO,
            Reason::NotEmptyGet | Reason::UnknownKey | Reason::BadValue { .. } => libc::EINVAL,
        }
    }

    /// Whether the requests that follow on this connection can be told apart still.
    pub fn is_fatal(&self) -> bool {
        matches!(&self.reason, Reason::Line(error) if error.is_fatal())
    }
}

/// Reads one request, to its end; also when it is wrong, so that what follows is the next one. `None` when the client
/// has closed the connection.
///
/// # Errors
/// Says what is wrong about it, and where.
pub fn read_request<R: Read>(lines: &mut Lines<R>) -> Result<Option<Request>, RequestError> {
    match lines.begin_message() {
        Ok(true) => {}
        Ok(false) => return Ok(None),
        Err(source) => return Err(RequestError { line: 1, reason: LineError::from(source).into() }),
    }
    let mut reader = Reader { lines, line: 0, ended: false };
    let request = reader.request();
    let line = reader.line;
    let ended = reader.ended;
    request.map(Some).map_err(|reason| {
        let mut error = RequestError { line, reason };
        if !error.is_fatal()
            && !ended
            && let Err(reason) = lines.skip_message()
        {
            error = RequestError { line, reason: reason.into() };
        }
        error
    })
}

/// Counts the lines of one request.
struct Reader<'a, R> {
    lines: &'a mut Lines<R>,
    line: usize,
    ended: bool,
}

impl<R: Read> Reader<'_, R> {
    fn request(&mut self) -> Result<Request, Reason> {
        match self.next()? {
            Some(("get", "1")) => self.get(),
            Some(("set", "1")) => self.set().map(Request::Set),
            _ => Err(Reason::NoSuchRequest),
        }
    }

    fn next(&mut self) -> Result<Option<(&str, &str)>, Reason> {
        self.line += 1;
        let pair = self.lines.next_pair()?;
        self.ended = pair.is_none();
        Ok(pair)
    }

    fn get(&mut self) -> Result<Request, Reason> {
        let mut extended = false;
        while let Some(pair) = self.next()? {
            if pair != (EXTENSIONS, "1") {
                return Err(Reason::NotEmptyGet);
            }
            extended = true;
        }
        Ok(Request::Get { extended })
    }

    fn set(&mut self) -> Result<DeviceUpdate, Reason> {
        let mut update = DeviceUpdate::default();
        let mut prefixes = 0;
        while let Some((key, value)) = self.next()? {
            if key == "public_key" {
                if update.peers.len() == MAX_PEERS {
                    return Err(Reason::TooManyPeers);
                }
                update.peers.push(PeerUpdate::new(public_key("public_key", value)?));
            } else if let Some(peer) = update.peers.last_mut() {
                set_in_peer(peer, key, value)?;
                if key == "allowed_ip" {
                    prefixes += 1;
                    if prefixes > MAX_PREFIXES {
                        return Err(Reason::TooManyPrefixes);
                    }
                }
            } else {
                set_in_device(&mut update, key, value)?;
            }
        }
        Ok(update)
    }
}

fn set_in_device(update: &mut DeviceUpdate, key: &str, value: &str) -> Result<(), Reason> {
    match key {
        "private_key" => update.private_key = private_key("private_key", value)?,
        "next_private_key" if value.is_empty() => update.next_private_key = Change::Clear,
        "next_private_key" => update.next_private_key = private_key("next_private_key", value)?,
        "listen_port" => update.listen_port = Some(number("listen_port", value, "0 to 65535")?),
        "fwmark" => update.fwmark = Some(number("fwmark", value, "0 to 4294967295")?),
        "replace_peers" => update.replace_peers = yes("replace_peers", value)?,
        _ => return Err(Reason::UnknownKey),
    }
    Ok(())
}

fn set_in_peer(peer: &mut PeerUpdate, key: &str, value: &str) -> Result<(), Reason> {
    const KEEPALIVE: &str = "persistent_keepalive_interval";
    match key {
        "remove" => peer.remove = yes("remove", value)?,
        "update_only" => peer.update_only = yes("update_only", value)?,
        "preshared_key" => {
            let bytes = key_bytes("preshared_key", value)?;
            peer.preshared_key = PresharedKey::from_bytes(*bytes).map_or(Change::Clear, Change::Set);
        }
        "endpoint" => peer.endpoint = Some(endpoint(value)?),
        KEEPALIVE => peer.persistent_keepalive = Some(number(KEEPALIVE, value, "0 to 65535")?),
        "replace_allowed_ips" => peer.replace_allowed_ips = yes("replace_allowed_ips", value)?,
        "allowed_ip" => peer.allowed_ips.push(allowed_ip(value)?),
        "protocol_version" if value == "1" => {}
        "protocol_version" => return Err(Reason::BadValue { key: "protocol_version", expected: "1" }),
        "successor_of" => peer.successor_of = Some(public_key("successor_of", value)?),
        _ => return Err(Reason::UnknownKey),
    }
    Ok(())
}

fn yes(key: &'static str, value: &str) -> Result<bool, Reason> {
    if value == "true" { Ok(true) } else { Err(Reason::BadValue { key, expected: "`true`" }) }
}

fn number<N: std::str::FromStr>(key: &'static str, value: &str, expected: &'static str) -> Result<N, Reason> {
    // Rust would take a plus sign, which is not in the format.
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    value.parse().ok().filter(|_| digits).ok_or(Reason::BadValue { key, expected })
}

fn key_bytes(key: &'static str, value: &str) -> Result<zeroize::Zeroizing<[u8; KEY_LENGTH]>, Reason> {
    crate::config::parse_hex_key(value)
        .map_err(|KeyError| Reason::BadValue { key, expected: "64 hexadecimal digits" })
}

fn public_key(key: &'static str, value: &str) -> Result<PublicKey, Reason> {
    Ok(PublicKey::new(*key_bytes(key, value)?))
}

fn private_key(key: &'static str, value: &str) -> Result<Change<PrivateKey>, Reason> {
    Ok(PrivateKey::from_bytes(*key_bytes(key, value)?).map_or(Change::Clear, Change::Set))
}

fn allowed_ip(value: &str) -> Result<AllowedIp, Reason> {
    let (change, prefix): (fn(IpNet) -> AllowedIp, _) = match value.as_bytes().first() {
        Some(b'-') => (AllowedIp::Remove, &value[1..]),
        Some(b'+') => (AllowedIp::Add, &value[1..]),
        _ => (AllowedIp::Add, value),
    };
    let network = match prefix.parse::<IpNet>() {
        Ok(network) => Some(network.trunc()),
        Err(_) => prefix.parse::<IpAddr>().ok().map(IpNet::from),
    };
    network
        .map(change)
        .ok_or(Reason::BadValue { key: "allowed_ip", expected: "a prefix such as 10.1.0.0/16" })
}

/// `192.0.2.1:51871`, `[2001:db8::1]:51871`, or with the name or the number of an interface `[fe80::1%eth0]:51871`.
pub(super) fn endpoint(value: &str) -> Result<SocketAddr, Reason> {
    value.parse().ok().or_else(|| scoped(value)).filter(|endpoint| endpoint.port() != 0).ok_or(
        Reason::BadValue { key: "endpoint", expected: "an address and a port, such as 192.0.2.1:51871" },
    )
}

fn scoped(value: &str) -> Option<SocketAddr> {
    let (address, rest) = value.strip_prefix('[')?.split_once('%')?;
    let (zone, port) = rest.split_once("]:")?;
    let scope = zone.parse().ok().or_else(|| nix::net::if_::if_nametoindex(zone).ok())?;
    Some(SocketAddrV6::new(address.parse().ok()?, port.parse().ok()?, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";
    const ZEROS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

    fn read(text: &str) -> Result<Request, RequestError> {
        read_request(&mut Lines::new(text.as_bytes())).map(|request| request.expect("there is a request"))
    }

    fn set(lines: &str) -> DeviceUpdate {
        match read(&format!("set=1\n{lines}\n")) {
            Ok(Request::Set(update)) => update,
            other => panic!("{other:?}"),
        }
    }

    fn refusal(lines: &str) -> RequestError {
        read(&format!("set=1\n{lines}\n")).expect_err(lines)
    }

    #[test]
    fn get_is_one_line_and_ours_is_asked_for_by_another() {
        assert_eq!(read("get=1\n\n").unwrap(), Request::Get { extended: false });
        assert_eq!(read("get=1\nisthmus_extensions=1\n\n").unwrap(), Request::Get { extended: true });
        assert!(matches!(read("get=1\nlisten_port=1\n\n").unwrap_err().reason, Reason::NotEmptyGet));
    }

    #[test]
    fn an_update_is_read_with_all_that_wg_can_say() {
        let update = set(&format!(
            "private_key={KEY}\nlisten_port=51871\nfwmark=3584\nreplace_peers=true\n\
             public_key={KEY}\nupdate_only=true\npreshared_key={KEY}\nendpoint=192.0.2.1:51871\n\
             persistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.1.2.3/16\n\
             allowed_ip=-2001:db8::/64\nprotocol_version=1\n\
             public_key={ZEROS}\nremove=true\n"
        ));
        let private: PrivateKey = KEY.parse().unwrap();
        assert_eq!(update.private_key, Change::Set(private));
        assert_eq!(
            (update.listen_port, update.fwmark, update.replace_peers),
            (Some(51871), Some(3584), true)
        );
        let [peer, gone] = &update.peers[..] else { panic!("{update:?}") };
        assert!(peer.update_only && peer.replace_allowed_ips && !peer.remove && gone.remove);
        assert_eq!(peer.preshared_key, Change::Set(KEY.parse().unwrap()));
        assert_eq!(peer.endpoint, Some("192.0.2.1:51871".parse().unwrap()));
        assert_eq!(peer.persistent_keepalive, Some(25));
        let (gained, lost) = ("10.1.0.0/16".parse().unwrap(), "2001:db8::/64".parse().unwrap());
        assert_eq!(peer.allowed_ips, [AllowedIp::Add(gained), AllowedIp::Remove(lost)]);
    }

    #[test]
    fn our_own_keys_say_which_peer_is_succeeded_and_which_key_comes_next() {
        let update = set(&format!("next_private_key={KEY}\npublic_key={KEY}\nsuccessor_of={ZEROS}\n"));
        assert_eq!(update.next_private_key, Change::Set(KEY.parse().unwrap()));
        assert_eq!(update.peers[0].successor_of, Some(PublicKey::new([0; KEY_LENGTH])));
        assert_eq!(set("next_private_key=\n").next_private_key, Change::Clear);
    }

    #[test]
    fn a_key_of_zeros_takes_the_key_away() {
        assert_eq!(set(&format!("private_key={ZEROS}\n")).private_key, Change::Clear);
        let update = set(&format!("public_key={KEY}\npreshared_key={ZEROS}\n"));
        assert_eq!(update.peers[0].preshared_key, Change::Clear);
    }

    #[test]
    fn addresses_of_one_link_name_their_interface() {
        let by_name = set(&format!("public_key={KEY}\nendpoint=[fe80::1%lo]:51871\n"));
        let by_number = set(&format!("public_key={KEY}\nendpoint=[fe80::1%1]:51871\n"));
        assert_eq!(by_name, by_number);
        assert!(matches!(by_name.peers[0].endpoint, Some(SocketAddr::V6(v6)) if v6.scope_id() == 1));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line_and_never_with_its_value() {
        let secret = format!("private_key={}x\n", &KEY[1..]);
        for (lines, line, named) in [
            (secret.as_str(), 2, "`private_key`"),
            ("listen_port=65536\n", 2, "`listen_port`"),
            ("listen_port=+1\n", 2, "`listen_port`"),
            ("fwmark=-1\n", 2, "`fwmark`"),
            ("fwmark=1\nreplace_peers=1\n", 3, "`replace_peers`"),
            ("endpoint=192.0.2.1:1\n", 2, "unknown"),
            ("no_such_key=1\n", 2, "unknown"),
            ("no value\n", 2, "key=value"),
            (&format!("public_key={KEY}\nlisten_port=1\n"), 3, "unknown"),
            (&format!("public_key={KEY}\nendpoint=localhost:1\n"), 3, "`endpoint`"),
            (&format!("public_key={KEY}\nendpoint=192.0.2.1:0\n"), 3, "`endpoint`"),
            (&format!("public_key={KEY}\nallowed_ip=10.0.0.0/33\n"), 3, "`allowed_ip`"),
            (&format!("public_key={KEY}\nallowed_ip=-\n"), 3, "`allowed_ip`"),
            (&format!("public_key={KEY}\nallowed_ip=\n"), 3, "`allowed_ip`"),
            (&format!("public_key={KEY}\nprotocol_version=2\n"), 3, "`protocol_version`"),
        ] {
            let error = refusal(lines);
            assert_eq!(error.line, line, "{lines}");
            let shown = error.to_string();
            assert!(shown.contains(named) && !shown.contains(&KEY[1..]), "{lines}: {shown}");
            assert!(!error.is_fatal());
        }
    }

    #[test]
    fn after_a_wrong_request_comes_the_next_one() {
        let text =
            "what=1\nlisten_port=1\n\nset=1\nlisten_port=x\n\nset=1\nno_such_key=1\nfwmark=1\n\nget=1\n\n";
        let mut lines = Lines::new(text.as_bytes());
        for _ in 0..3 {
            read_request(&mut lines).unwrap_err();
        }
        assert_eq!(read_request(&mut lines).unwrap(), Some(Request::Get { extended: false }));
        assert_eq!(read_request(&mut lines).unwrap(), None);
    }

    #[test]
    fn an_empty_request_ends_at_its_empty_line() {
        let mut lines = Lines::new(&b"\nget=1\n\n"[..]);
        assert!(matches!(read_request(&mut lines).unwrap_err().reason, Reason::NoSuchRequest));
        assert_eq!(read_request(&mut lines).unwrap(), Some(Request::Get { extended: false }));
    }

    #[test]
    fn a_request_has_no_more_than_so_many_peers_and_prefixes() {
        let peers = format!("public_key={KEY}\n").repeat(MAX_PEERS);
        assert_eq!(set(&peers).peers.len(), MAX_PEERS);
        let error = refusal(&format!("{peers}public_key={KEY}\n"));
        assert!(matches!(error.reason, Reason::TooManyPeers) && error.errno() == libc::E2BIG);
        let prefixes = format!("public_key={KEY}\n{}", "allowed_ip=10.0.0.1/32\n".repeat(MAX_PREFIXES + 1));
        assert!(matches!(refusal(&prefixes).reason, Reason::TooManyPrefixes));
    }
}
