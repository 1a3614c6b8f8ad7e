//! The harness for the real programs, tried with Debian's etcd and a kube-apiserver that is the stand-in
//! behind the real one's flags. With `KUBEBUILDER_ASSETS` set every other test runs on the real ones.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use isthmus_kube_api::Tls;
use isthmus_kube_api::real::{ClientTls, RealConfig, RealError, RealKubeApi, is_ready};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// Translates flags, and refuses to run if one of those that matter is not there.
const SCRIPT: &str = r#"#!/bin/sh
set -eu
for flag; do
  case $flag in
    --bind-address=*) ip=${flag#*=} ;;
    --secure-port=*) port=${flag#*=} ;;
    --tls-cert-file=*) cert=${flag#*=} ;;
    --tls-private-key-file=*) key=${flag#*=} ;;
    --client-ca-file=*) ca=${flag#*=} ;;
    --service-cluster-ip-range=*) range=${flag#*=} ;;
    --service-account-signing-key-file=*) grep -q 'PRIVATE KEY' "${flag#*=}" ;;
    --service-account-key-file=*) grep -q 'PUBLIC KEY' "${flag#*=}" ;;
    --authorization-mode=*) [ "${flag#*=}" = RBAC ] ;;
  esac
done
exec LAB_KUBE_API --listen "$ip:$port" --tls-cert "$cert" --tls-key "$key" --client-ca "$ca" --service-cidr "$range"
"#;

#[tokio::test]
async fn both_programs_are_started_and_stopped() {
    let folder = tempfile::tempdir().expect("a folder");
    let script = SCRIPT.replace("LAB_KUBE_API", env!("CARGO_BIN_EXE_lab-kube-api"));
    let (config, client) = config(folder.path(), &script);
    let address = config.listen;
    let mut real = RealKubeApi::start(config).await.expect("started");
    let ready = real.wait_ready(Duration::from_secs(30), async || is_ready(address, &client).await);
    ready.await.expect("ready");
    let pids = real.pids();
    assert_eq!(pids.len(), 2);
    real.stop().await;
    assert!(!is_ready(address, &client).await);
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} still runs");
    }
}

#[tokio::test]
async fn a_program_that_ends_is_reported_with_its_last_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, _) = config(folder.path(), "#!/bin/sh\necho 'unknown flag: --nonsense' >&2\nexit 1\n");
    let mut real = RealKubeApi::start(config).await.expect("started");
    let error = real.wait_ready(Duration::from_secs(30), async || false).await.expect_err("it ended");
    assert!(matches!(error, RealError::Ended { program: "kube-apiserver", .. }), "{error}");
    assert!(error.to_string().contains("unknown flag: --nonsense"), "{error}");
    real.stop().await;
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let (mut config, _) = config(folder.path(), "");
    config.assets = folder.path().join("nowhere");
    let error = RealKubeApi::start(config).await.expect_err("nothing there");
    assert!(error.to_string().contains("KUBEBUILDER_ASSETS"), "{error}");
}

fn config(folder: &Path, apiserver: &str) -> (RealConfig, ClientTls) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let assets = folder.join("assets");
    std::fs::create_dir(&assets).expect("a folder");
    symlink("/usr/bin/etcd", assets.join("etcd")).expect("a link");
    let program = assets.join("kube-apiserver");
    std::fs::write(&program, apiserver).expect("a file");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("executable");
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());

    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).expect("a CA").pem().into_bytes();
    let issuer = Issuer::new(ca, ca_key);
    let signed = |mut params: CertificateParams, name: &str| {
        let key = KeyPair::generate().expect("a key");
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        (certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
    };
    let server = CertificateParams::new(vec!["127.0.0.1".into()]).expect("a name");
    let (cert_pem, key_pem) = signed(server, "server");
    let tls = Tls { cert_pem, key_pem, client_ca_pem: ca_pem.clone() };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::OrganizationName, "system:masters");
    let (cert_pem, key_pem) = signed(params, "admin");
    let config = RealConfig {
        assets,
        dir: folder.join("run"),
        listen: free.expect("a free port"),
        advertise: None,
        tls,
        service_cidrs: vec!["10.96.0.0/16".parse().expect("a range")],
        etcd_ports: None,
        command_prefix: vec!["env".into(), "LANG=C".into()],
    };
    (config, ClientTls { ca_pem, cert_pem, key_pem })
}
