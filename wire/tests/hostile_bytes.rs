//! Whatever bytes a peer sends, every decoder answers: with a value that survives being written, or with an error that is
//! short enough for a log line. Never with a panic. The fuzz targets in `fuzz/` do the same with coverage to guide them.

#[allow(dead_code)]
mod support;

use isthmus_wire::local::{LocalNamespace, LocalPolicy, LocalService};
use isthmus_wire::*;
use proptest::prelude::*;

/// Longest error text: what foreign bytes it repeats is cut.
const MAX_ERROR: usize = 1024;

macro_rules! decoders {
    ($($type:ty),* $(,)?) => {
        fn offer(bytes: &[u8]) -> Result<(), TestCaseError> {
            $(
                match <$type>::decode(bytes) {
                    Ok(value) => prop_assert_eq!(<$type>::decode(&value.encode()), Ok(value)),
                    Err(error) => prop_assert!(error.to_string().len() < MAX_ERROR, "{error}"),
                }
            )*
            match Key::parse(bytes) {
                Ok(key) => prop_assert_eq!(key.to_bytes(), bytes),
                Err(error) => prop_assert!(error.to_string().len() < MAX_ERROR, "{error}"),
            }
            Ok(())
        }
    };
}

decoders!(
    Labels,
    ClusterConfig,
    Node,
    IpIdentityPair,
    ClusterService,
    McsApiServiceSpec,
    ClusterEndpointSlice,
    Timestamp,
    LocalService,
    LocalPolicy,
    LocalNamespace,
);

/// A well-formed value or key of any kind, as bytes.
fn good() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        support::key().prop_map(|key| key.to_bytes().into()),
        support::labels().prop_map(|value| value.encode().into()),
        support::cluster_config().prop_map(|value| value.encode().into()),
        support::node().prop_map(|value| value.encode().into()),
        support::ip_identity_pair().prop_map(|value| value.encode().into()),
        support::cluster_service().prop_map(|value| value.encode().into()),
        support::service_export().prop_map(|value| value.encode().into()),
        support::endpoint_slice().prop_map(|value| value.encode().into()),
        support::timestamp().prop_map(|value| value.encode().into()),
        support::local_service().prop_map(|value| value.encode().into()),
        support::local_policy().prop_map(|value| value.encode().into()),
        support::local_namespace().prop_map(|value| value.encode().into()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        offer(&bytes)?;
    }

    #[test]
    fn random_json(text in r#"(\{"(Name|id|IP|cluster|backends|ports|x)":|[\[\]{},:"0-9a-z.]|null|-1|1e9|"10\.0\.0\.1"|\}){0,40}"#) {
        offer(text.as_bytes())?;
    }

    #[test]
    fn mutated_values(
        mut bytes in good(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
    ) {
        for (at, byte, kind) in changes {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => { bytes.remove(at); }
                _ => bytes.truncate(at),
            }
        }
        offer(&bytes)?;
    }
}

#[test]
fn values_beyond_the_bound_are_not_even_looked_at() {
    let huge = vec![b'['; 3 << 20];
    for error in [
        ClusterService::decode(&huge).expect_err("huge"),
        Node::decode(&huge).expect_err("huge"),
        Labels::decode(&huge).expect_err("huge"),
        ClusterEndpointSlice::decode(&huge).expect_err("huge"),
        ClusterConfig::decode(&huge).expect_err("huge"),
        Timestamp::decode(&huge).expect_err("huge"),
    ] {
        assert!(matches!(error, ValueError::TooLarge { .. }), "{error}");
    }
}
