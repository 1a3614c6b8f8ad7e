//! What is written is read back the same, whatever it holds; and is written the same again.

#[allow(dead_code)]
mod support;

use isthmus_wire::local::{LocalNamespace, LocalPolicy, LocalService};
use isthmus_wire::*;
use proptest::prelude::*;

macro_rules! survives {
    ($name:ident, $type:ty) => {
        proptest! {
            #[test]
            fn $name(value in support::$name()) {
                let bytes = value.encode();
                let read = <$type>::decode(&bytes);
                prop_assert_eq!(read.as_ref(), Ok(&value), "{}", String::from_utf8_lossy(&bytes));
                prop_assert_eq!(read.expect("compared above").encode(), bytes);
            }
        }
    };
}

survives!(labels, Labels);
survives!(cluster_config, ClusterConfig);
survives!(node, Node);
survives!(ip_identity_pair, IpIdentityPair);
survives!(cluster_service, ClusterService);
survives!(service_export, McsApiServiceSpec);
survives!(endpoint_slice, ClusterEndpointSlice);
survives!(timestamp, Timestamp);
survives!(local_service, LocalService);
survives!(local_policy, LocalPolicy);
survives!(local_namespace, LocalNamespace);

proptest! {
    #[test]
    fn key(key in support::key()) {
        prop_assert_eq!(Key::parse(&key.to_bytes()), Ok(key));
    }

    #[test]
    fn a_key_is_found_in_the_range_of_its_prefix(
        cluster in support::cluster_name(), id in support::identity(), entry in support::ip_entry(),
        tree in support::tree(), name in support::object_name(),
    ) {
        let keys = [
            Key::Node { tree, cluster: cluster.clone(), name },
            Key::Identity { mirror_of: (tree == Tree::Cache).then(|| cluster.clone()), id },
            Key::Ip { mirror_of: (tree == Tree::Cache).then(|| cluster.clone()), entry },
        ];
        for key in keys {
            let resource = key.resource().expect("a synchronised resource");
            let prefix = match tree {
                Tree::State => Prefix::State(resource),
                Tree::Cache => Prefix::Cache(resource),
            };
            prop_assert!(key.to_string().starts_with(&prefix.range(&cluster)), "{key}");
        }
    }

    #[test]
    fn mirroring_twice_is_mirroring_once(key in support::key(), peer in support::cluster_name()) {
        if let Some(mirrored) = key.mirrored(&peer) {
            prop_assert_eq!(mirrored.mirrored(&peer), Some(mirrored.clone()));
        }
    }
}
