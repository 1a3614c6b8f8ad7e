/// What the datapath counts, per CPU: index into the map of counters. Numbers are never reused.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Counter {
    /// Sockets sent to a backend at `connect()`, and datagrams at `sendmsg()`.
    SocketTranslated = 0,
    /// Refused at the socket since the service has no backend.
    SocketNoBackend = 1,
    /// Refused at the socket by an error of ours (no consistent backend found, or a map refused an entry).
    SocketError = 2,
    /// Packets from pods sent on to a backend.
    TcForward = 3,
    /// Packets to pods whose source was turned back into the service's.
    TcReply = 4,
    /// Flows that connection tracking saw for the first time, or sent to a new backend.
    TcNewFlow = 5,
    /// Packets from pods to a service without backends, answered with a TCP reset or an ICMP error.
    TcNoBackend = 6,
    /// Packets dropped by an error of ours: they could not be rewritten, or tracked.
    TcError = 7,
    /// Packets refused since every backend tried already talks to the same client port under another service's name.
    TcClash = 8,
    /// Later fragments rewritten.
    TcFragment = 9,
    /// ICMP errors rewritten to name the service that the pod has dialled.
    TcIcmp = 10,
    /// Packets of pods that reached themselves through a service, both ways.
    TcHairpin = 11,
    /// Packets from pods given to the encryption device.
    Encrypted = 12,
    /// Packets from pods that the device cannot take whole, given to the stack to be fragmented or refused on the way to it.
    EncryptTooBig = 13,
    /// Packets dropped since they must be encrypted and there is no device.
    EncryptNoDevice = 14,
    /// Packets dropped in strict mode since their destination has no key.
    EncryptNoKey = 15,
    /// Packets to be encrypted dropped since their source is no address of the pod that sent them.
    EncryptForged = 16,
    /// Packets to be encrypted or just decrypted, dropped by an error of ours or since they cannot be read.
    EncryptError = 17,
    /// Decrypted packets handed straight to a pod.
    Decrypted = 18,
    /// Decrypted packets given to the stack: to the node itself, or to a pod that is not known yet.
    DecryptedToStack = 19,
    /// Decrypted packets dropped since their destination lives on another node.
    DecryptedElsewhere = 20,
    /// Packets to pods dropped in strict mode since they came from another node's pod in the clear.
    PlainRefused = 21,
    /// Flows that a pod's policy let through when their first packet came, or when they were decided again.
    PolicyForwarded = 22,
    /// Packets dropped since no rule of an enforced policy allows them.
    PolicyNoRule = 23,
    /// Packets dropped since a rule denies them.
    PolicyDenied = 24,
    /// Packets of pods whose rules were not known yet, dropped.
    PolicyWaiting = 25,
    /// Later fragments dropped since their first was not let through, or has not come.
    PolicyFragment = 26,
    /// Packets dropped since a policy is enforced and they cannot be read.
    PolicyUnreadable = 27,
    /// Packets that a pod sent from somebody else's address, dropped.
    PolicyForgedSource = 28,
    /// Flows that were let through and could not be remembered: answers to them may be dropped.
    PolicyError = 29,
    /// Verdicts that were told to user space.
    EventSent = 30,
    /// Verdicts not told, so as not to tell more of them per second than asked for.
    EventLimited = 31,
    /// Verdicts not told since nobody has read the earlier ones in time.
    EventLost = 32,
    /// Packets of this node's pods dropped when they were about to leave it in the clear, past the pods' own programs.
    EncryptWithheld = 33,
}

impl Counter {
    /// All of them, in order of their index.
    pub const ALL: [Self; 34] = [
        Self::SocketTranslated,
        Self::SocketNoBackend,
        Self::SocketError,
        Self::TcForward,
        Self::TcReply,
        Self::TcNewFlow,
        Self::TcNoBackend,
        Self::TcError,
        Self::TcClash,
        Self::TcFragment,
        Self::TcIcmp,
        Self::TcHairpin,
        Self::Encrypted,
        Self::EncryptTooBig,
        Self::EncryptNoDevice,
        Self::EncryptNoKey,
        Self::EncryptForged,
        Self::EncryptError,
        Self::Decrypted,
        Self::DecryptedToStack,
        Self::DecryptedElsewhere,
        Self::PlainRefused,
        Self::PolicyForwarded,
        Self::PolicyNoRule,
        Self::PolicyDenied,
        Self::PolicyWaiting,
        Self::PolicyFragment,
        Self::PolicyUnreadable,
        Self::PolicyForgedSource,
        Self::PolicyError,
        Self::EventSent,
        Self::EventLimited,
        Self::EventLost,
        Self::EncryptWithheld,
    ];

    /// Size of the map: room for more.
    pub const CAPACITY: u32 = 64;

    /// Name for metrics and status: lower case, words joined by underscores.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SocketTranslated => "socket_translated",
            Self::SocketNoBackend => "socket_no_backend",
            Self::SocketError => "socket_error",
            Self::TcForward => "tc_forward",
            Self::TcReply => "tc_reply",
            Self::TcNewFlow => "tc_new_flow",
            Self::TcNoBackend => "tc_no_backend",
            Self::TcError => "tc_error",
            Self::TcClash => "tc_clash",
            Self::TcFragment => "tc_fragment",
            Self::TcIcmp => "tc_icmp",
            Self::TcHairpin => "tc_hairpin",
            Self::Encrypted => "encrypted",
            Self::EncryptTooBig => "encrypt_too_big",
            Self::EncryptNoDevice => "encrypt_no_device",
            Self::EncryptNoKey => "encrypt_no_key",
            Self::EncryptForged => "encrypt_forged",
            Self::EncryptError => "encrypt_error",
            Self::Decrypted => "decrypted",
            Self::DecryptedToStack => "decrypted_to_stack",
            Self::DecryptedElsewhere => "decrypted_elsewhere",
            Self::PlainRefused => "plain_refused",
            Self::PolicyForwarded => "policy_forwarded",
            Self::PolicyNoRule => "policy_no_rule",
            Self::PolicyDenied => "policy_denied",
            Self::PolicyWaiting => "policy_waiting",
            Self::PolicyFragment => "policy_fragment",
            Self::PolicyUnreadable => "policy_unreadable",
            Self::PolicyForgedSource => "policy_forged_source",
            Self::PolicyError => "policy_error",
            Self::EventSent => "event_sent",
            Self::EventLimited => "event_limited",
            Self::EventLost => "event_lost",
            Self::EncryptWithheld => "encrypt_withheld",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_counters_is_in_order_and_fits() {
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
        }
        assert!(Counter::ALL.len() <= Counter::CAPACITY as usize);
    }
}
