//! [`kube::Resource`] for Cilium's resources that have no `spec`, which `kube`'s derive insists on.

/// Implements [`kube::Resource`] for a `cilium.io/v2` type with a `metadata` field.
macro_rules! cilium_resource {
    ($type:ty, $scope:ty, kind: $kind:literal, plural: $plural:literal) => {
        impl kube::Resource for $type {
            type DynamicType = ();
            type Scope = $scope;

            fn kind(_: &()) -> std::borrow::Cow<'_, str> {
                $kind.into()
            }

            fn group(_: &()) -> std::borrow::Cow<'_, str> {
                "cilium.io".into()
            }

            fn version(_: &()) -> std::borrow::Cow<'_, str> {
                "v2".into()
            }

            fn plural(_: &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

pub(crate) use cilium_resource;
