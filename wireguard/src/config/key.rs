//! Keys as types: what is secret is wiped when dropped and never printed.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use boringtun::x25519;
use zeroize::{Zeroize, Zeroizing};

/// Bytes in every key.
pub const KEY_LENGTH: usize = 32;

const BASE64_LENGTH: usize = 44;
const HEX_LENGTH: usize = 2 * KEY_LENGTH;

/// Text that is not a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a WireGuard key: expected 32 bytes, as 44 characters of base64 or 64 of hexadecimal")]
pub struct KeyError;

/// A Curve25519 public key: the name of a peer. Shown in base64, as `wg` does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; KEY_LENGTH]);

impl PublicKey {
    /// The key made of these bytes.
    pub const fn new(bytes: [u8; KEY_LENGTH]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }

    /// All zero: no one's key, and what some programs write when they have none.
    pub fn is_zero(&self) -> bool {
        self.0 == [0; KEY_LENGTH]
    }

    /// In lower-case hexadecimal, as in UAPI.
    pub fn to_hex(&self) -> String {
        hex(&self.0).to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Ok(Self(*parse(text)?))
    }
}

impl From<x25519::PublicKey> for PublicKey {
    fn from(key: x25519::PublicKey) -> Self {
        Self(key.to_bytes())
    }
}

impl From<PublicKey> for x25519::PublicKey {
    fn from(key: PublicKey) -> Self {
        Self::from(key.0)
    }
}

/// A Curve25519 private key. Wiped when dropped; `Debug` shows nothing of it.
#[derive(Clone)]
pub struct PrivateKey(x25519::StaticSecret);

impl PrivateKey {
    /// A new key from the operating system's randomness.
    pub fn generate() -> Self {
        Self::clamped(x25519::StaticSecret::random_from_rng(rand_core::OsRng).to_bytes())
    }

    /// The key made of these bytes; `None` when they are all zero, which says "no key" everywhere in WireGuard.
    pub fn from_bytes(bytes: [u8; KEY_LENGTH]) -> Option<Self> {
        let bytes = Zeroizing::new(bytes);
        (*bytes != [0; KEY_LENGTH]).then(|| Self::clamped(*bytes))
    }

    /// What others know this key by.
    pub fn public_key(&self) -> PublicKey {
        x25519::PublicKey::from(&self.0).into()
    }

    /// For the handshake.
    pub fn secret(&self) -> &x25519::StaticSecret {
        &self.0
    }

    /// In base64, as in a key file.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0.as_bytes()))
    }

    /// In lower-case hexadecimal, as in UAPI.
    pub fn to_hex(&self) -> Zeroizing<String> {
        hex(self.0.as_bytes())
    }

    /// The same bytes that every implementation keeps, so that what was set and what is read can be compared.
    fn clamped(mut bytes: [u8; KEY_LENGTH]) -> Self {
        bytes[0] &= 0b1111_1000;
        bytes[31] = (bytes[31] & 0b0111_1111) | 0b0100_0000;
        let key = Self(x25519::StaticSecret::from(bytes));
        bytes.zeroize();
        key
    }
}

impl PartialEq for PrivateKey {
    fn eq(&self, other: &Self) -> bool {
        // In constant time: folds over all bytes whatever they are.
        let differing = self.0.as_bytes().iter().zip(other.0.as_bytes()).fold(0, |acc, (a, b)| acc | (a ^ b));
        differing == 0
    }
}

impl Eq for PrivateKey {}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl FromStr for PrivateKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(*parse(text)?).ok_or(KeyError)
    }
}

/// A symmetric key that two peers share besides their key pairs. Wiped when dropped; `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey(Zeroizing<[u8; KEY_LENGTH]>);

impl PresharedKey {
    /// The key made of these bytes; `None` when they are all zero, which says "no key" everywhere in WireGuard.
    pub fn from_bytes(bytes: [u8; KEY_LENGTH]) -> Option<Self> {
        let bytes = Zeroizing::new(bytes);
        (*bytes != [0; KEY_LENGTH]).then_some(Self(bytes))
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }

    /// In lower-case hexadecimal, as in UAPI.
    pub fn to_hex(&self) -> Zeroizing<String> {
        hex(&self.0)
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

impl FromStr for PresharedKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        Self::from_bytes(*parse(text)?).ok_or(KeyError)
    }
}

/// The 32 bytes that these 64 hexadecimal digits name.
pub(crate) fn parse_hex_key(text: &str) -> Result<Zeroizing<[u8; KEY_LENGTH]>, KeyError> {
    if text.len() == HEX_LENGTH { parse(text) } else { Err(KeyError) }
}

fn parse(text: &str) -> Result<Zeroizing<[u8; KEY_LENGTH]>, KeyError> {
    match text.len() {
        HEX_LENGTH => parse_hex(text.as_bytes()),
        BASE64_LENGTH => parse_base64(text),
        _ => None,
    }
    .ok_or(KeyError)
}

fn parse_base64(text: &str) -> Option<Zeroizing<[u8; KEY_LENGTH]>> {
    // One byte more than a key has, since the decoder asks for room before it looks at the padding.
    let mut buffer = Zeroizing::new([0; KEY_LENGTH + 1]);
    let length = STANDARD.decode_slice(text, &mut *buffer).ok()?;
    let bytes = buffer[..length].try_into().ok()?;
    Some(Zeroizing::new(bytes))
}

fn parse_hex(text: &[u8]) -> Option<Zeroizing<[u8; KEY_LENGTH]>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = Zeroizing::new([0; KEY_LENGTH]);
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn hex(bytes: &[u8; KEY_LENGTH]) -> Zeroizing<String> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = Zeroizing::new(String::with_capacity(HEX_LENGTH));
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pair as `wg genkey` and `wg pubkey` print it.
    const PRIVATE: &str = "IGipqN/ZlRaxHWsSpQHYltjmOIP2bfw5z4RpzeVHA2Y=";
    const PUBLIC: &str = "6Hvm1ew47KDj6INBR9eEnHkg1Q72IMPR4GQfwdi5JXw=";
    const PUBLIC_HEX: &str = "e87be6d5ec38eca0e3e8834147d7849c7920d50ef620c3d1e0641fc1d8b9257c";

    #[test]
    fn the_public_key_is_the_one_that_wg_derives() {
        let key: PrivateKey = PRIVATE.parse().unwrap();
        assert_eq!(key.public_key().to_string(), PUBLIC);
        assert_eq!(key.to_base64().as_str(), PRIVATE);
    }

    #[test]
    fn base64_and_hexadecimal_name_the_same_key() {
        let key: PublicKey = PUBLIC.parse().unwrap();
        assert_eq!(key.to_hex(), PUBLIC_HEX);
        assert_eq!(PUBLIC_HEX.parse(), Ok(key));
        assert_eq!(PUBLIC_HEX.to_uppercase().parse(), Ok(key));
    }

    #[test]
    fn what_is_not_32_bytes_is_not_a_key() {
        let long = format!("{PUBLIC_HEX}00");
        let bad_digit = PUBLIC_HEX.replace('a', "g");
        let bad_padding = PUBLIC.replace('=', "A");
        let not_ascii = "\u{e9}".repeat(HEX_LENGTH / 2);
        for text in ["", "=", PUBLIC.trim_end_matches('='), &long, &bad_digit, &bad_padding, &not_ascii] {
            assert_eq!(text.parse::<PublicKey>(), Err(KeyError), "{text}");
        }
    }

    #[test]
    fn a_key_of_zeros_is_no_private_key() {
        let zeros = "0".repeat(HEX_LENGTH);
        assert_eq!(zeros.parse::<PrivateKey>(), Err(KeyError));
        assert_eq!(zeros.parse::<PresharedKey>(), Err(KeyError));
        assert!(zeros.parse::<PublicKey>().unwrap().is_zero());
    }

    #[test]
    fn generated_keys_differ_and_come_back_from_text() {
        let (one, other) = (PrivateKey::generate(), PrivateKey::generate());
        assert_ne!(one, other);
        assert_eq!(one.to_base64().parse::<PrivateKey>().as_ref(), Ok(&one));
        assert_eq!(one.to_hex().parse::<PrivateKey>().as_ref(), Ok(&one));
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let private: PrivateKey = PRIVATE.parse().unwrap();
        let shared: PresharedKey = PRIVATE.parse().unwrap();
        assert_eq!(format!("{private:?} {shared:?}"), "PrivateKey(..) PresharedKey(..)");
    }
}
