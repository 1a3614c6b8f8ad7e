//! The custom resources that every cluster of a lab has.

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};

use crate::error::{Doing, Result};
use crate::rbac::FIELD_MANAGER;
use crate::wait;

/// Creates them and waits until the API serves them.
///
/// # Errors
/// When the API refuses one.
pub(crate) async fn install(client: &Client) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in isthmus_crds::definitions() {
        let name = definition.name_any();
        let params = PatchParams::apply(FIELD_MANAGER).force();
        api.patch(&name, &params, &Patch::Apply(&definition))
            .await
            .doing(|| format!("creating CRD {name}"))?;
        wait::until(format!("CRD {name} to be served"), Duration::from_secs(30), || async {
            let status = api.get(&name).await.map_err(|e| e.to_string())?.status.unwrap_or_default();
            let mut conditions = status.conditions.unwrap_or_default().into_iter();
            let established = conditions.any(|c| c.type_ == "Established" && c.status == "True");
            if established { Ok(()) } else { Err("it is not established".to_owned()) }
        })
        .await?;
    }
    Ok(())
}
