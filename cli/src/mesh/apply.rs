//! Writes Secrets, once it is known that all of them can be written: half a connection helps nobody.

use isthmus_crds::peer::{ADMIT_ANNOTATION, Relation};
use isthmus_crds::{MANAGED_BY_LABEL, SecretVersion};
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
    let mut manifest = manifest(step);
    // What is replaced is what was looked at. If that is another one by now, so may be the decision.
    if step.change == Change::Updated
        && let Some(present) = &step.present
    {
        manifest["metadata"]["resourceVersion"] = json!(present.resource_version);
    }
    let written = secrets.patch(&name, &params, &Patch::Apply(manifest)).await;
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

/// The Secret as somebody else applies it. Who that is keeps it from then on, and not this command.
pub(crate) fn manifest_to_keep(step: &Step) -> serde_json::Value {
    let mut manifest = manifest(step);
    if let Some(labels) = manifest["metadata"]["labels"].as_object_mut() {
        labels.remove(MANAGED_BY_LABEL);
    }
    manifest
}

/// Why a Secret was not written, and what to do.
pub(crate) fn finding(api: &Api, step: &Step, refusal: &Refusal) -> Finding {
    let (problem, advice) = match refusal.status().map(|status| status.code) {
        Some(409 | 422) if is_about_the_type(refusal) => (
            format!(
                "Secret {}/{} is there and of another type: {}",
                api.namespace,
                step.name(),
                refusal.problem()
            ),
            format!(
                "a Secret's type cannot be changed: `kubectl --context {} -n {} delete secret {}`, and give the command again",
                api.context,
                api.namespace,
                step.name()
            ),
        ),
        Some(409) if step.change == Change::Updated => (
            format!(
                "Secret {}/{} was changed by somebody else since it was looked at: {}",
                api.namespace,
                step.name(),
                refusal.problem()
            ),
            "give the command again: it looks at what is there now".to_owned(),
        ),
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

/// Whether it is the type that cannot be written: somebody else owns it, or nobody can change it.
fn is_about_the_type(refusal: &Refusal) -> bool {
    [" .type", "type: Invalid value"].iter().any(|what| refusal.problem().contains(what))
}

/// Tells a cluster what a peer is to it from now on; or, as a dry run, asks whether it would be taken.
pub(crate) async fn relate(
    api: &Api,
    secret: &Secret,
    relation: Relation,
    dry_run: bool,
) -> Result<(), Refusal> {
    let name = secret.name_any();
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), dry_run, ..PatchParams::default() };
    let mut annotations = json!(relation.annotations());
    if relation != Relation::Admitted {
        annotations[ADMIT_ANNOTATION] = serde_json::Value::Null;
    }
    let patch = json!({"metadata": {"annotations": annotations}});
    let done = api.namespaced::<Secret>().patch(&name, &params, &Patch::Merge(patch)).await;
    done.map(|_| ()).map_err(|error| api.refused(format!("annotate Secret {}/{name}", api.namespace), error))
}

/// Makes a cluster forget a peer; or, as a dry run, asks whether it would. One that is gone already is no error.
pub(crate) async fn delete(api: &Api, secret: &Secret, dry_run: bool) -> Result<(), Refusal> {
    let name = secret.name_any();
    let params = DeleteParams { dry_run, ..DeleteParams::default() };
    match api.namespaced::<Secret>().delete(&name, &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(api.refused(format!("delete Secret {}/{name}", api.namespace), error)),
    }
}

#[cfg(test)]
mod tests {
    use isthmus_crds::peer::{CONNECT_ANNOTATION, PeerSecret};
    use isthmus_kube_api::{Config, KubeApi};
    use k8s_openapi::api::core::v1::Namespace;
    use kube::Client;
    use kube::api::PostParams;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
    use tokio::net::TcpListener;

    use super::*;

    fn secret(endpoint: &str, authority: &str) -> Secret {
        serde_json::from_value(json!({
            "metadata": {"name": "peer-beta"}, "type": "isthmus.io/peer",
            "stringData": {"cluster-name": "beta", "endpoints": endpoint, "ca.crt": authority},
        }))
        .expect("a Secret")
    }

    fn authority() -> String {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        params.self_signed(&key).expect("a certificate").pem()
    }

    #[tokio::test]
    async fn what_was_changed_since_it_was_looked_at_is_not_replaced() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let kubernetes = KubeApi::serve(listener, Config::default()).expect("an API");
        let server = format!("http://{}", kubernetes.addresses()[0]);
        let config = kube::Config::new(server.parse().expect("a URL"));
        let client = Client::try_from(config).expect("a client");
        let namespace = "isthmus-system".to_owned();
        let api = Api { context: "kind-alpha".into(), server, namespace, client, certificate_ends: None };
        let named =
            serde_json::from_value(json!({"metadata": {"name": api.namespace}})).expect("a Namespace");
        api.global::<Namespace>().create(&PostParams::default(), &named).await.expect("a namespace");
        let secrets = api.namespaced::<Secret>();
        let authority = authority();
        let looked_at = secret("https://192.0.2.1:2379", &authority);
        let looked_at = secrets.create(&PostParams::default(), &looked_at).await.expect("a Secret");
        let mut step = Step {
            context: api.context.clone(),
            peer: "beta".parse().expect("a name"),
            secret: secret("https://192.0.2.2:2379", &authority),
            wanted: PeerSecret::parse(&looked_at).expect("a peer"),
            present: SecretVersion::of(&looked_at.metadata),
            change: Change::Updated,
            force: true,
        };
        let held = json!({"metadata": {"annotations": {CONNECT_ANNOTATION: "false"}}});
        let held = secrets.patch("peer-beta", &PatchParams::default(), &Patch::Merge(held)).await;

        let finding = rehearse(&api, &step).await.expect_err("it is another one by now");
        let says = "Secret isthmus-system/peer-beta was changed by somebody else since it was looked at";
        assert!(finding.problem.starts_with(says), "{finding:?}");
        let refusal = apply(&api, &step).await.expect_err("it is another one by now");
        assert_eq!(refusal.status().map(|status| status.code), Some(409), "{refusal}");
        step.present = SecretVersion::of(&held.expect("a Secret").metadata);
        rehearse(&api, &step).await.expect("it is the one that was looked at");
        let written = apply(&api, &step).await.expect("it is the one that was looked at");
        assert!(written.is_some() && written != step.present, "{written:?}");
    }
}
