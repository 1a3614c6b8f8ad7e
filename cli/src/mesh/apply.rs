//! Writes Secrets, once it is known that all of them can be written: half a connection helps nobody.

use isthmus_crds::SecretVersion;
use isthmus_crds::peer::{ADMIT_ANNOTATION, Relation};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::json;

use super::checks::Finding;
use super::contexts::Api;
use super::error::Refusal;
use super::exchange::{Change, FIELD_MANAGER, Step};

/// Asks the API server whether it would take the Secret. Nothing is written.
pub(crate) async fn rehearse(api: &Api, step: &Step) -> Result<(), Finding> {
    if step.change == Change::Unchanged {
        return Ok(());
    }
    write(api, step, true).await.map(|_| ()).map_err(|refusal| finding(api, step, &refusal))
}

/// Writes the Secret if it is to change. The version that says what it is to say, as far as that is known.
pub(crate) async fn apply(api: &Api, step: &Step) -> Result<Option<SecretVersion>, Refusal> {
    if step.change == Change::Unchanged {
        return Ok(step.present.clone());
    }
    let written = write(api, step, false).await?;
    Ok(SecretVersion::of(&written.metadata))
}

async fn write(api: &Api, step: &Step, dry_run: bool) -> Result<Secret, Refusal> {
    let mut params = PatchParams::apply(FIELD_MANAGER);
    params.dry_run = dry_run;
    params.force = step.force;
    let secrets = api.namespaced::<Secret>();
    let name = step.name();
    let written = secrets.patch(&name, &params, &Patch::Apply(manifest(step))).await;
    written.map_err(|error| api.refused(format!("write Secret {}/{name}", api.namespace), error))
}

/// The Secret as it is applied.
pub(crate) fn manifest(step: &Step) -> serde_json::Value {
    // kube fills in neither for typed objects, and the API server wants both.
    let mut manifest = json!({"apiVersion": "v1", "kind": "Secret"});
    if let (Some(manifest), Ok(serde_json::Value::Object(secret))) =
        (manifest.as_object_mut(), serde_json::to_value(&step.secret))
    {
        manifest.extend(secret);
    }
    manifest
}

fn finding(api: &Api, step: &Step, refusal: &Refusal) -> Finding {
    let (problem, advice) = match refusal.status().map(|status| status.code) {
        Some(409) => (
            format!(
                "Secret {}/{} was written by somebody else, and differs: {}",
                api.namespace,
                step.name(),
                refusal.problem()
            ),
            "change it where it is kept, or give --force to take it over".to_owned(),
        ),
        Some(404) => (
            format!("there is no namespace {}", api.namespace),
            "install Isthmus there, or give --namespace".to_owned(),
        ),
        _ => (refusal.problem(), refusal.advice()),
    };
    Finding::error(&[&api.context], problem, advice)
}

/// Tells a cluster what a peer is to it from now on.
pub(crate) async fn relate(api: &Api, secret: &Secret, relation: Relation) -> Result<(), Refusal> {
    let name = secret.name_any();
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let mut annotations = json!(relation.annotations());
    if relation != Relation::Admitted {
        annotations[ADMIT_ANNOTATION] = serde_json::Value::Null;
    }
    let patch = json!({"metadata": {"annotations": annotations}});
    let done = api.namespaced::<Secret>().patch(&name, &params, &Patch::Merge(patch)).await;
    done.map(|_| ()).map_err(|error| api.refused(format!("annotate Secret {}/{name}", api.namespace), error))
}

/// Makes a cluster forget a peer. One that is gone already is no error.
pub(crate) async fn delete(api: &Api, secret: &Secret) -> Result<(), Refusal> {
    let name = secret.name_any();
    match api.namespaced::<Secret>().delete(&name, &DeleteParams::default()).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(api.refused(format!("delete Secret {}/{name}", api.namespace), error)),
    }
}
