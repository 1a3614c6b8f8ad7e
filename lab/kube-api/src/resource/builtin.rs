//! The built-in resources, one line each. Group, version, kind, URL and scope come from `k8s-openapi`.

use std::any::TypeId;
use std::sync::{Arc, LazyLock};

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::{
    apps::v1 as apps, authentication::v1 as authn, authorization::v1 as authz,
    coordination::v1 as coordination, core::v1 as core, discovery::v1 as discovery, networking::v1 as net,
    policy::v1 as policy, rbac::v1 as rbac, scheduling::v1 as scheduling,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use schemars::JsonSchema;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value};

use super::{Resource, Scale};
use crate::schema::{Schema, builtin as schema};
use crate::table;

fn rows() -> Vec<Row> {
    vec![
        row::<core::ConfigMap>().short(&["cm"]),
        row::<core::Endpoints>().short(&["ep"]),
        row::<core::Event>().short(&["ev"]),
        row::<core::Namespace>().short(&["ns"]).status(),
        row::<core::Node>().short(&["no"]).status(),
        row::<core::Pod>().short(&["po"]).all().status().actions(&["binding", "eviction"]),
        row::<core::ResourceQuota>().short(&["quota"]).status(),
        row::<core::Secret>(),
        row::<core::Service>().short(&["svc"]).all().status(),
        row::<core::ServiceAccount>().short(&["sa"]),
        row::<apps::DaemonSet>().short(&["ds"]).all().status(),
        row::<apps::Deployment>().short(&["deploy"]).all().status().scale(),
        row::<apps::ReplicaSet>().short(&["rs"]).all().status().scale(),
        row::<apps::StatefulSet>().short(&["sts"]).all().status().scale(),
        row::<discovery::EndpointSlice>(),
        row::<k8s_openapi::api::events::v1::Event>().short(&["ev"]),
        row::<coordination::Lease>(),
        row::<net::NetworkPolicy>().short(&["netpol"]),
        row::<policy::PodDisruptionBudget>().short(&["pdb"]).status(),
        row::<scheduling::PriorityClass>().short(&["pc"]),
        row::<rbac::ClusterRole>().any_name(),
        row::<rbac::ClusterRoleBinding>().any_name(),
        row::<rbac::Role>().any_name(),
        row::<rbac::RoleBinding>().any_name(),
        row::<apiextensions::CustomResourceDefinition>().short(&["crd", "crds"]).status(),
        row::<authn::SelfSubjectReview>().answered(),
        row::<authz::SelfSubjectAccessReview>().answered(),
        row::<authz::SelfSubjectRulesReview>().answered(),
        row::<authz::SubjectAccessReview>().answered(),
    ]
}

/// The built-in resources.
pub fn resources() -> &'static [Arc<Resource>] {
    static RESOURCES: LazyLock<Vec<Arc<Resource>>> = LazyLock::new(|| {
        let rows = rows();
        let roots: Vec<String> = rows.iter().map(|row| row.definition.clone()).collect();
        rows.into_iter()
            .zip(schema::schemas(&roots))
            .map(|(row, schema)| Arc::new(row.build(schema)))
            .collect()
    });
    &RESOURCES
}

/// The JSON schema of all types that the built-in resources are made of.
pub(crate) fn definitions() -> Map<String, Value> {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    for row in rows() {
        (row.define)(&mut generator);
    }
    generator.subschema_for::<k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions>();
    generator.subschema_for::<k8s_openapi::api::policy::v1::Eviction>();
    generator.subschema_for::<core::Binding>();
    generator.subschema_for::<k8s_openapi::api::autoscaling::v1::Scale>();
    generator.take_definitions(true)
}

struct Row {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    namespaced: bool,
    definition: String,
    define: fn(&mut SchemaGenerator),
    short_names: &'static [&'static str],
    in_all: bool,
    status: bool,
    scale: bool,
    actions: &'static [&'static str],
    any_name: bool,
    answered: bool,
}

fn row<T>() -> Row
where
    T: k8s_openapi::Resource + JsonSchema,
    T::Scope: 'static,
{
    Row {
        group: T::GROUP,
        version: T::VERSION,
        kind: T::KIND,
        plural: T::URL_PATH_SEGMENT,
        namespaced: TypeId::of::<T::Scope>() == TypeId::of::<NamespaceResourceScope>(),
        definition: T::schema_name().into_owned(),
        define: |generator| {
            generator.subschema_for::<T>();
        },
        short_names: &[],
        in_all: false,
        status: false,
        scale: false,
        actions: &[],
        any_name: false,
        answered: false,
    }
}

impl Row {
    fn short(mut self, names: &'static [&'static str]) -> Self {
        self.short_names = names;
        self
    }

    /// In `kubectl get all`.
    fn all(mut self) -> Self {
        self.in_all = true;
        self
    }

    fn status(mut self) -> Self {
        self.status = true;
        self
    }

    fn scale(mut self) -> Self {
        self.scale = true;
        self
    }

    fn actions(mut self, actions: &'static [&'static str]) -> Self {
        self.actions = actions;
        self
    }

    fn any_name(mut self) -> Self {
        self.any_name = true;
        self
    }

    fn answered(mut self) -> Self {
        self.answered = true;
        self
    }

    fn build(self, schema: Schema) -> Resource {
        let path = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
        Resource {
            group: self.group.to_owned(),
            version: self.version.to_owned(),
            kind: self.kind.to_owned(),
            list_kind: format!("{}List", self.kind),
            plural: self.plural.to_owned(),
            singular: self.kind.to_lowercase(),
            short_names: self.short_names.iter().map(|s| (*s).to_owned()).collect(),
            categories: if self.in_all { vec!["all".to_owned()] } else { Vec::new() },
            namespaced: self.namespaced,
            status: self.status,
            scale: self.scale.then(|| Scale {
                spec_replicas: path("spec.replicas"),
                status_replicas: path("status.replicas"),
                selector: Some(path("spec.selector")),
            }),
            actions: self.actions,
            schema,
            definition: self.definition,
            custom_schema: None,
            columns: table::builtin(self.group, self.plural),
            path_segment_names: self.any_name,
            virtual_: self.answered,
            custom: false,
            collection: format!("{}/{}", self.group, self.plural).into(),
        }
    }
}
