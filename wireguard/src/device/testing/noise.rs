//! The initiator's half of WireGuard's handshake, written down from section 5.4 of the paper. It gives the session's
//! keys, which `Tunn` keeps to itself, so that tests can send what no honest implementation does.

use blake2::digest::{FixedOutput, KeyInit, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use boringtun::x25519::{PublicKey, StaticSecret};
use hmac::SimpleHmac;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";

/// A handshake under way: the initiation has been sent.
pub(crate) struct ByHand {
    pub(crate) initiation: Vec<u8>,
    ephemeral: StaticSecret,
    chain: [u8; 32],
    hash: [u8; 32],
    /// `None` plays someone without a private key, whose public key is zero.
    secret: Option<StaticSecret>,
}

/// A session's keys, and the index that the other side knows it by.
pub(crate) struct Keys {
    pub(crate) sending: [u8; 32],
    pub(crate) index: [u8; 4],
}

impl ByHand {
    pub(crate) fn begin(secret: Option<StaticSecret>, responder: &PublicKey) -> Self {
        let ephemeral = StaticSecret::from([0x17; 32]);
        let ephemeral_public = PublicKey::from(&ephemeral).to_bytes();
        let public = secret.as_ref().map_or([0; 32], |secret| PublicKey::from(secret).to_bytes());
        let chain = hash(&[CONSTRUCTION]);
        let h = hash(&[&chain, IDENTIFIER]);
        let h = hash(&[&h, responder.as_bytes()]);
        let chain = kdf::<1>(&chain, &ephemeral_public)[0];
        let h = hash(&[&h, &ephemeral_public]);
        let [chain, key] = kdf(&chain, ephemeral.diffie_hellman(responder).as_bytes());
        let sealed_static = seal(&key, 0, &public, &h);
        let h = hash(&[&h, &sealed_static]);
        let [chain, key] = kdf(&chain, &agree(secret.as_ref(), responder));
        let sealed_time = seal(&key, 0, &[0x40; 12], &h);
        let h = hash(&[&h, &sealed_time]);
        let mut initiation = vec![1, 0, 0, 0, 5, 5, 5, 5];
        initiation.extend(ephemeral_public);
        initiation.extend(sealed_static);
        initiation.extend(sealed_time);
        let mac_key = hash(&[b"mac1----", responder.as_bytes()]);
        let mut mac = <Blake2sMac<blake2::digest::consts::U16> as KeyInit>::new_from_slice(&mac_key).unwrap();
        Update::update(&mut mac, &initiation);
        initiation.extend(mac.finalize_fixed());
        initiation.extend([0; 16]);
        Self { initiation, ephemeral, chain, hash: h, secret }
    }

    pub(crate) fn finish(self, response: &[u8]) -> Keys {
        let theirs: [u8; 32] = response[12..44].try_into().unwrap();
        let chain = kdf::<1>(&self.chain, &theirs)[0];
        let h = hash(&[&self.hash, &theirs]);
        let theirs = PublicKey::from(theirs);
        let chain = kdf::<1>(&chain, self.ephemeral.diffie_hellman(&theirs).as_bytes())[0];
        let chain = kdf::<1>(&chain, &agree(self.secret.as_ref(), &theirs))[0];
        let [chain, mixed, key] = kdf(&chain, &[0; 32]);
        let h = hash(&[&h, &mixed]);
        assert_eq!(seal(&key, 0, &[], &h), response[44..60], "the responder agrees");
        let [sending, _receiving] = kdf(&chain, &[]);
        Keys { sending, index: response[4..8].try_into().unwrap() }
    }
}

impl Keys {
    /// A data message with this counter.
    pub(crate) fn datagram(&self, counter: u64, packet: &[u8]) -> Vec<u8> {
        let mut message = vec![4, 0, 0, 0];
        message.extend(self.index);
        message.extend(counter.to_le_bytes());
        message.extend(seal(&self.sending, counter, packet, &[]));
        message
    }
}

fn agree(secret: Option<&StaticSecret>, public: &PublicKey) -> [u8; 32] {
    secret.map_or([0; 32], |secret| secret.diffie_hellman(public).to_bytes())
}

fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Blake2s256::new();
    parts.iter().for_each(|part| Digest::update(&mut hash, part));
    hash.finalize().into()
}

fn kdf<const N: usize>(key: &[u8], input: &[u8]) -> [[u8; 32]; N] {
    let secret = hmac(key, &[input]);
    let mut before: Vec<u8> = Vec::new();
    std::array::from_fn(|index| {
        let output = hmac(&secret, &[&before, &[index as u8 + 1]]);
        before = output.to_vec();
        output
    })
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = <SimpleHmac<Blake2s256> as Mac>::new_from_slice(key).unwrap();
    parts.iter().for_each(|part| Mac::update(&mut mac, part));
    mac.finalize_fixed().into()
}

fn seal(key: &[u8; 32], counter: u64, plain: &[u8], authenticated: &[u8]) -> Vec<u8> {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).unwrap());
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    let mut sealed = plain.to_vec();
    let nonce = Nonce::assume_unique_for_key(nonce);
    key.seal_in_place_append_tag(nonce, Aad::from(authenticated), &mut sealed).unwrap();
    sealed
}
