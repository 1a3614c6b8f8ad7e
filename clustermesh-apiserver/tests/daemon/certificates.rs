//! Certificates in Secrets, by the real program: issued, renewed, put right, taken from others, and their authority rotated.

use std::time::Duration;

use base64::Engine as _;
use clustermesh_apiserver::certificates::rotation::{
    MESSAGE_ANNOTATION, REQUEST_ANNOTATION, STATE_ANNOTATION,
};
use clustermesh_apiserver::pki::{Certificate, Client};
use etcd_client::{WatchOptions, WatchStream};
use isthmus_crds::ClusterInfo;
use isthmus_crds::names::{
    ADMIN_CERT_SECRET, AGENT_CERT_SECRET, CA_SECRET, CLUSTER_INFO, LOCAL_CERT_SECRET, REMOTE_CERT_SECRET,
    SERVER_CERT_SECRET,
};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::fixture::{Cluster, Daemon, Mesh, Mounted, NAMESPACE, until};

const LEAVES: [&str; 5] =
    [SERVER_CERT_SECRET, REMOTE_CERT_SECRET, ADMIN_CERT_SECRET, LOCAL_CERT_SECRET, AGENT_CERT_SECRET];

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_makes_an_authority_and_certificates_and_a_restart_keeps_them() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let flags = ["--gateway-san", "mesh.example.org", "--gateway-san", "192.0.2.7"];
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &flags).await;
    daemon.ready_within_deadline().await;

    let authority = Certificate::first(&alpha.entry(CA_SECRET, "tls.crt").await.unwrap()).unwrap();
    for (secret, common_name) in LEAVES.into_iter().zip([
        "clustermesh-apiserver.cilium.io",
        "remote-alpha",
        "admin-alpha",
        "local-alpha",
        "agent-alpha",
    ]) {
        let text = until("the certificate is there", async || {
            alpha.entry(secret, "tls.crt").await.ok_or_else(|| daemon.log())
        })
        .await;
        let certificate = Certificate::first(&text).unwrap();
        assert_eq!(certificate.common_name, common_name);
        assert!(certificate.is_signed_by(&authority), "{secret}");
    }
    let server = Certificate::first(&alpha.entry(SERVER_CERT_SECRET, "tls.crt").await.unwrap()).unwrap();
    for name in
        ["*.mesh.cilium.io", "clustermesh-apiserver.isthmus-system.svc", "mesh.example.org", "192.0.2.7"]
    {
        assert!(server.names.iter().any(|has| has == name), "{name}: {:?}", server.names);
    }
    // They are what an agent and a person connect with.
    let agent = alpha.mounted(&mesh, AGENT_CERT_SECRET).await;
    assert!(daemon.read(&agent, "cilium/cluster-config/alpha").unwrap().contains("\"id\":1"));
    let admin = alpha.mounted(&mesh, ADMIN_CERT_SECRET).await;
    assert!(daemon.read(&admin, "cilium/.heartbeat").unwrap().contains('T'));
    // And what others need to know is where everybody may read it.
    let info = until("the cluster's information is published", async || {
        let map = alpha.own::<ConfigMap>().get_opt(CLUSTER_INFO).await.unwrap().ok_or("absent")?;
        ClusterInfo::parse(&map).map_err(|error| error.to_string())
    })
    .await;
    assert_eq!((info.cluster.as_str(), info.id.number()), ("alpha", 1));
    assert_eq!(Certificate::all(info.ca.as_str()).unwrap(), [authority]);

    let status = daemon.status().await;
    assert_eq!((status.leading, status.leader.as_deref()), (true, Some("r0")));
    assert_eq!(status.certificates.len(), 6, "{:?}", status.certificates);
    assert_eq!(status.problems(), Vec::<String>::new());
    let metrics = daemon.metrics().await;
    for line in [
        r#"cilium_clustermesh_apiserver_leader_election_master_status{name="isthmus-clustermesh-apiserver"} 1"#,
        r#"isthmus_certificate_expiry_timestamp_seconds{secret="clustermesh-apiserver-server-cert"}"#,
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }

    let versions = async || {
        let secrets = alpha.own::<Secret>().list(&ListParams::default()).await.unwrap().items;
        let version = |secret: Secret| (secret.metadata.name, secret.metadata.resource_version);
        secrets.into_iter().map(version).collect::<Vec<_>>()
    };
    let before = versions().await;
    daemon.terminate().await;
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &flags).await;
    daemon.ready_within_deadline().await;
    until("it leads again", async || match daemon.status().await.leading {
        true => Ok(()),
        false => Err(daemon.log()),
    })
    .await;
    daemon.read(&agent, "cilium/.heartbeat").unwrap();
    assert_eq!(versions().await, before);
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_while_a_watch_goes_on() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &["--certificate-validity", "30s"]).await;
    daemon.ready_within_deadline().await;
    let admin = alpha.mounted(&mesh, ADMIN_CERT_SECRET).await;
    let mut watch = watch_services(&daemon, &admin).await;
    let in_use = async || {
        let certificates = daemon.status().await.certificates;
        certificates.into_iter().find(|one| one.name == SERVER_CERT_SECRET).and_then(|one| one.not_after)
    };
    let first = in_use().await;
    until("the gateway shows another certificate", async || match in_use().await {
        now if now > first => Ok(()),
        now => Err(format!("{now:?}\n{}", daemon.log())),
    })
    .await;
    until("the client's certificate is renewed, too", async || {
        let now = alpha.entry(ADMIN_CERT_SECRET, "tls.crt").await.unwrap();
        if now != std::fs::read_to_string(&admin.identity.certificate).unwrap() {
            Ok(())
        } else {
            Err(daemon.log())
        }
    })
    .await;
    // The connection was made with certificates that are no longer in use anywhere.
    alpha.global_service("app", "echo", &["10.1.0.7"]).await;
    sees(&mut watch, "cilium/state/services/v1/alpha/app/echo").await;
    daemon.read(&alpha.mounted(&mesh, ADMIN_CERT_SECRET).await, "cilium/.heartbeat").unwrap();
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_or_damaged_is_put_right_and_the_authority_stays_the_same() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &[]).await;
    daemon.ready_within_deadline().await;
    let authority = alpha.entry(CA_SECRET, "tls.crt").await.unwrap();
    let agent = until("the agents' certificate is there", async || {
        alpha.entry(AGENT_CERT_SECRET, "tls.crt").await.ok_or_else(|| daemon.log())
    })
    .await;

    alpha.own::<Secret>().delete(AGENT_CERT_SECRET, &DeleteParams::default()).await.unwrap();
    until("a deleted certificate is issued again", async || {
        match alpha.entry(AGENT_CERT_SECRET, "tls.crt").await {
            Some(again) if again != agent => Ok(()),
            _ => Err(daemon.log()),
        }
    })
    .await;
    alpha.put(SERVER_CERT_SECRET, &[("tls.crt", "damaged")]).await;
    until("a damaged certificate is issued again", async || {
        let text = alpha.entry(SERVER_CERT_SECRET, "tls.crt").await.unwrap();
        Certificate::first(&text).map(drop).map_err(|_| daemon.log())
    })
    .await;
    alpha.own::<Secret>().delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
    let again = until("a deleted authority is put back", async || {
        alpha.entry(CA_SECRET, "tls.crt").await.ok_or_else(|| daemon.log())
    })
    .await;
    assert_eq!(again, authority);
    // A damaged one might be the only copy of something: it is told, and not written over.
    alpha.put(CA_SECRET, &[("tls.key", "damaged")]).await;
    until("a damaged authority is told", async || {
        let problems = daemon.status().await.problems();
        match problems.iter().any(|problem| problem.contains(CA_SECRET) && problem.contains("tls.key")) {
            true => Ok(()),
            false => Err(format!("{problems:?}\n{}", daemon.log())),
        }
    })
    .await;
    assert_eq!(alpha.entry(CA_SECRET, "tls.key").await.as_deref(), Some("damaged"));
    daemon.read(&alpha.mounted(&mesh, AGENT_CERT_SECRET).await, "cilium/.heartbeat").unwrap();
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_certificates_from_being_written_is_told_until_it_is_mended() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    alpha.namespaces().delete(NAMESPACE, &DeleteParams::default()).await.unwrap();
    until("the namespace is gone", async || match alpha.namespaces().get_opt(NAMESPACE).await.unwrap() {
        None => Ok(()),
        Some(namespace) => Err(format!("{namespace:?}")),
    })
    .await;
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &["--leader-elect", "false"]).await;
    until("it says what is missing", async || {
        let (code, waiting) = daemon.http(daemon.health, "/readyz").await;
        let problems = daemon.status().await.problems();
        let told = |text: &str| text.contains(CA_SECRET) && text.contains("--namespace exists");
        match code != 200 && told(&waiting) && problems.iter().any(|problem| told(problem)) {
            true => Ok(()),
            false => Err(format!("{waiting}\n{problems:?}\n{}", daemon.log())),
        }
    })
    .await;
    let namespace = serde_json::from_value(json!({"metadata": {"name": NAMESPACE}})).unwrap();
    alpha.namespaces().create(&PostParams::default(), &namespace).await.unwrap();
    daemon.ready_within_deadline().await;
    until("nothing is wrong any more", async || match daemon.status().await.problems() {
        none if none.is_empty() => Ok(()),
        problems => Err(format!("{problems:?}\n{}", daemon.log())),
    })
    .await;
    assert_eq!(daemon.log().matches("it cannot be written").count(), 1, "told once: {}", daemon.log());
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_who_both_believe_to_lead_agree_on_one_authority() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let flags = ["--leader-elect", "false"];
    let (one, other) = tokio::join!(
        Daemon::replica(&mesh, &alpha, "r0", &flags),
        Daemon::replica(&mesh, &alpha, "r1", &flags)
    );
    for daemon in [&one, &other] {
        daemon.ready_within_deadline().await;
        assert!(daemon.status().await.leading);
    }
    until("all certificates are of the one authority", async || {
        let authority = Certificate::first(&alpha.entry(CA_SECRET, "tls.crt").await.ok_or("none")?).unwrap();
        for secret in LEAVES {
            let text = alpha.entry(secret, "tls.crt").await.ok_or(secret)?;
            if !Certificate::first(&text).unwrap().is_signed_by(&authority) {
                return Err(format!("{secret}\n{}\n--\n{}", one.log(), other.log()));
            }
        }
        Ok(())
    })
    .await;
    // And both gateways let in whom it vouches for.
    let agent = alpha.mounted(&mesh, AGENT_CERT_SECRET).await;
    for daemon in [&one, &other] {
        until("it is served", async || daemon.read(&agent, "cilium/.heartbeat")).await;
    }
    for name in LEAVES.into_iter().chain([CA_SECRET]) {
        let written = format!("written: there was none secret=\"{name}\"");
        let first = format!("written: this cluster had none secret=\"{name}\"");
        let logs = [one.log(), other.log()].concat();
        assert_eq!(logs.matches(&written).count() + logs.matches(&first).count(), 1, "{name} once\n{logs}");
    }
    one.terminate().await;
    other.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_was_put_there_is_honoured_and_shared() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let shared = mesh.authority().identity();
    let object: Secret = serde_json::from_value(json!({
        "metadata": { "name": CA_SECRET, "annotations": { REQUEST_ANNOTATION: "prepare" } },
        "type": "kubernetes.io/tls",
        "stringData": { "tls.crt": shared.certificate, "tls.key": shared.key },
    }))
    .unwrap();
    alpha.own::<Secret>().create(&PostParams::default(), &object).await.unwrap();
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &[]).await;
    daemon.ready_within_deadline().await;
    // Whoever has a certificate of the shared authority, from whichever cluster, is let in.
    daemon.etcdctl(&mesh.client(Client::Remote("beta")), &["get", "cilium/.heartbeat"]).unwrap();
    assert_eq!(alpha.entry(CA_SECRET, "tls.crt").await, Some(shared.certificate));
    until("a rotation of what is not ours is refused", async || {
        let annotation = annotation(&alpha, MESSAGE_ANNOTATION).await;
        if annotation.contains("refused") { Ok(()) } else { Err(format!("{annotation}\n{}", daemon.log())) }
    })
    .await;
    assert_eq!(alpha.entry(CA_SECRET, "next.crt").await, None);
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_is_deleted_while_the_leader_is_gone_is_put_back_by_the_next() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let flags = crate::replicas::LEASE_FLAGS;
    let leader = Daemon::replica(&mesh, &alpha, "r0", &flags).await;
    leader.ready_within_deadline().await;
    let next = Daemon::replica(&mesh, &alpha, "r1", &flags).await;
    until("the other replica has seen all certificates", async || match next.status().await {
        status if status.certificates.len() == 6 && !status.leading => Ok(()),
        status => Err(format!("{:?}\n{}", status.certificates, next.log())),
    })
    .await;
    let authority = alpha.entry(CA_SECRET, "tls.crt").await.unwrap();
    leader.kill().await;
    alpha.own::<Secret>().delete(CA_SECRET, &DeleteParams::default()).await.unwrap();
    let again = until("the authority is put back", async || {
        alpha.entry(CA_SECRET, "tls.crt").await.ok_or_else(|| next.log())
    })
    .await;
    assert_eq!(again, authority);
    assert!(next.status().await.leading);
    next.terminate().await;
}

/// A certificate with a byte behind its end: it can be read, and TLS takes it for no authority's.
fn with_a_byte_too_much(certificate: &str) -> String {
    let mut der = Certificate::first(certificate).unwrap().der().to_vec();
    der.push(0);
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn external_certificates_are_waited_for_and_a_damaged_one_is_told_while_the_last_stays_in_use() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &["--certificates", "external"]).await;
    let reason =
        until("it says what it waits for", async || match daemon.http(daemon.health, "/readyz").await {
            (503, reason) if reason.contains(SERVER_CERT_SECRET) => Ok(reason),
            (_, reason) => Err(reason),
        })
        .await;
    assert!(reason.contains("create it") && reason.contains("ca.crt"), "{reason}");

    let (authority, validity) = (mesh.authority(), Duration::from_secs(3600));
    let gateway = authority.gateway("isthmus-system", &[], validity).unwrap();
    let remote = authority.client(Client::Remote("alpha"), validity).unwrap();
    alpha.issue(SERVER_CERT_SECRET, &gateway, &with_a_byte_too_much(authority.certificate())).await;
    until("it says which authority is of no use", async || {
        match daemon.http(daemon.health, "/readyz").await {
            (503, reason) if reason.contains("cannot be used") && reason.contains("ca.crt") => Ok(()),
            (_, reason) => Err(reason),
        }
    })
    .await;
    // Somebody has put a key where certificates belong.
    let too_much = format!("{}\n{}", authority.certificate(), remote.key);
    alpha.put(SERVER_CERT_SECRET, &[("ca.crt", &too_much)]).await;
    alpha.issue(REMOTE_CERT_SECRET, &remote, authority.certificate()).await;
    daemon.ready_within_deadline().await;
    let published = until("the cluster's information is published", async || {
        let map = alpha.own::<ConfigMap>().get_opt(CLUSTER_INFO).await.unwrap().ok_or("absent")?;
        map.data.and_then(|data| data.get("ca.crt").cloned()).ok_or_else(|| daemon.log())
    })
    .await;
    assert!(!published.contains("PRIVATE KEY"), "a key is published to nobody");
    assert_eq!(Certificate::all(&published), Certificate::all(authority.certificate()));
    let agent = mesh.client(Client::Agent("alpha"));
    daemon.etcdctl(&agent, &["get", "cilium/.heartbeat"]).unwrap();

    alpha.put(SERVER_CERT_SECRET, &[("tls.key", &remote.key)]).await;
    let problem = until("the damage is told", async || {
        let certificates = daemon.status().await.certificates;
        let server = certificates.into_iter().find(|one| one.name == SERVER_CERT_SECRET).unwrap();
        server.problem.ok_or_else(|| daemon.log())
    })
    .await;
    assert!(problem.contains("does not belong") && problem.contains("stays in use"), "{problem}");
    until("it is told at the Secret", async || {
        let events = alpha.own::<Event>().list(&ListParams::default()).await.unwrap().items;
        let told = events.iter().any(|event| {
            event.regarding.as_ref().and_then(|at| at.name.as_deref()) == Some(SERVER_CERT_SECRET)
                && event.reason.as_deref() == Some("CertificateUnusable")
        });
        if told { Ok(()) } else { Err(format!("{} Events\n{}", events.len(), daemon.log())) }
    })
    .await;
    daemon.etcdctl(&agent, &["get", "cilium/.heartbeat"]).unwrap();
    assert_eq!(alpha.entry(CA_SECRET, "tls.crt").await, None, "nothing is issued here");
    assert!(!daemon.log().contains("PRIVATE KEY"));
    daemon.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_is_rotated_step_by_step_and_nobody_is_cut_off() {
    let mesh = Mesh::new();
    let alpha = Cluster::start("alpha", 1).await;
    let daemon = Daemon::replica(&mesh, &alpha, "r0", &["--ca-rotation-settle", "1s"]).await;
    daemon.ready_within_deadline().await;
    let old = Certificate::first(&alpha.entry(CA_SECRET, "tls.crt").await.unwrap()).unwrap();
    until("the agents' certificate is there", async || {
        alpha.entry(AGENT_CERT_SECRET, "tls.crt").await.ok_or_else(|| daemon.log())
    })
    .await;
    // An agent that read its files before all of it, and holds a watch; and one that is always behind by one step.
    let first = alpha.mounted(&mesh, AGENT_CERT_SECRET).await;
    let mut watch = watch_services(&daemon, &first).await;
    let mut behind = alpha.mounted(&mesh, AGENT_CERT_SECRET).await;

    for (number, (request, reached)) in
        [("prepare", "prepared"), ("activate", "activated"), ("finish", "steady")].into_iter().enumerate()
    {
        if request == "finish" {
            // Its watch was opened with a certificate of the old authority: until now it goes on.
            sees(&mut watch, "cilium/state/services/v1/alpha/app/activate").await;
        }
        ask(&alpha, request).await;
        until("the step is taken", async || {
            let state = annotation(&alpha, STATE_ANNOTATION).await;
            let has = |text: Option<String>| text.map(|text| Certificate::all(&text).unwrap().len());
            let trusted = has(alpha.entry(AGENT_CERT_SECRET, "ca.crt").await);
            let wanted = if reached == "steady" { 1 } else { 2 };
            if state == reached && trusted == Some(wanted) {
                return Ok(());
            }
            Err(format!("{state}, {} trusted\n{}", trusted.unwrap_or_default(), daemon.log()))
        })
        .await;
        // Whoever connects now does, whether their files have followed or are a step behind.
        let present = alpha.mounted(&mesh, AGENT_CERT_SECRET).await;
        let read = |pod: &Mounted| daemon.read(pod, "cilium/.heartbeat");
        read(&present).unwrap_or_else(|error| panic!("after {request}: {error}\n{}", daemon.log()));
        read(&behind).unwrap_or_else(|error| panic!("behind, after {request}: {error}\n{}", daemon.log()));
        behind = present;
        if number == 0 {
            assert!(
                Certificate::first(&alpha.entry(AGENT_CERT_SECRET, "tls.crt").await.unwrap())
                    .unwrap()
                    .is_signed_by(&old),
                "nothing of the next one is shown before it is trusted"
            );
        }
        alpha.global_service("app", request, &["10.1.0.7"]).await;
        if request == "prepare" {
            sees(&mut watch, "cilium/state/services/v1/alpha/app/prepare").await;
        }
    }
    let new = Certificate::first(&alpha.entry(CA_SECRET, "tls.crt").await.unwrap()).unwrap();
    assert_ne!(new, old);
    for secret in LEAVES {
        let leaf = Certificate::first(&alpha.entry(secret, "tls.crt").await.unwrap()).unwrap();
        assert!(leaf.is_signed_by(&new), "{secret}");
    }
    until("what is published trusts the new one alone", async || {
        let map = alpha.own::<ConfigMap>().get(CLUSTER_INFO).await.unwrap();
        let bundle = Certificate::all(ClusterInfo::parse(&map).unwrap().ca.as_str()).unwrap();
        if bundle == [new.clone()] { Ok(()) } else { Err(daemon.log()) }
    })
    .await;
    until("what the old one has issued is let in no more", async || {
        match daemon.read(&first, "cilium/.heartbeat") {
            Ok(_) => Err(daemon.log()),
            Err(_) => Ok(()),
        }
    })
    .await;
    daemon.terminate().await;
}

async fn ask(cluster: &Cluster, request: &str) {
    let change = Patch::Merge(json!({ "metadata": { "annotations": { REQUEST_ANNOTATION: request } } }));
    cluster.own::<Secret>().patch(CA_SECRET, &PatchParams::default(), &change).await.unwrap();
}

async fn annotation(cluster: &Cluster, name: &str) -> String {
    let secret = cluster.own::<Secret>().get(CA_SECRET).await.unwrap();
    secret.metadata.annotations.unwrap_or_default().get(name).cloned().unwrap_or_default()
}

async fn watch_services(daemon: &Daemon, pod: &Mounted) -> WatchStream {
    let mut client = daemon.connection(pod).await;
    let options = WatchOptions::new().with_prefix();
    client.watch("cilium/state/services/v1/", Some(options)).await.unwrap()
}

/// Waits for a change of this key on a watch that must not have ended.
async fn sees(watch: &mut WatchStream, key: &str) {
    let seen = async {
        loop {
            let message = watch.message().await.expect("the watch goes on").expect("the watch goes on");
            assert!(!message.canceled(), "{message:?}");
            let of_key = |event: &etcd_client::Event| event.kv().is_some_and(|kv| kv.key() == key.as_bytes());
            if message.events().iter().any(of_key) {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), seen).await.expect("the change is seen in time");
}
