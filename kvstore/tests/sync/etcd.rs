//! A real etcd for one test, on loopback, with a directory of its own, ended with the test.

use std::{
    process::{Child, Command, Stdio},
    sync::Arc,
};

use isthmus_kvstore::config::ClientConfig;
use tempfile::TempDir;

use crate::{pki::Pki, ports, wait};

pub(crate) struct Etcd {
    process: Child,
    pub(crate) port: u16,
    pub(crate) pki: Arc<Pki>,
    _data: TempDir,
}

impl Etcd {
    /// Starts an etcd of its own cluster id that asks for client certificates, and waits until it answers.
    pub(crate) async fn start() -> Self {
        Self::start_with(Arc::new(Pki::new())).await
    }

    /// Another etcd with another cluster id, whose certificates are the same.
    pub(crate) async fn start_like(other: &Self) -> Self {
        Self::start_with(Arc::clone(&other.pki)).await
    }

    async fn start_with(pki: Arc<Pki>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let (port, peer_port) = (ports::reserve(), ports::reserve());
        let peer = format!("http://127.0.0.1:{peer_port}");
        let client = format!("https://127.0.0.1:{port}");
        let argument = |name: &str, value: &str| format!("--{name}={value}");
        // It ends with the thread of its test, however that ends.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd"])
            .args([
                argument("data-dir", data.path().join("data").to_str().unwrap()),
                argument("listen-client-urls", &client),
                argument("advertise-client-urls", &client),
                argument("listen-peer-urls", &peer),
                argument("initial-advertise-peer-urls", &peer),
                argument("initial-cluster", &format!("default={peer}")),
                // What makes the cluster id another one.
                argument("initial-cluster-token", data.path().to_str().unwrap()),
                argument("client-cert-auth", "true"),
                argument("trusted-ca-file", pki.ca().to_str().unwrap()),
                argument("cert-file", pki.path("server.crt").to_str().unwrap()),
                argument("key-file", pki.path("server.key").to_str().unwrap()),
                argument("enable-grpc-gateway", "false"),
                // The data goes with the test: nobody should wait for a slow disk.
                "--unsafe-no-fsync".to_owned(),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "these tests need a real etcd and cannot start one ({error}): apt-get install etcd-server"
                )
            });
        let etcd = Self { process, port, pki, _data: data };
        wait::until("etcd answers", async || {
            match tokio::time::timeout(std::time::Duration::from_secs(2), etcd.try_client()).await {
                Ok(Ok(mut client)) => client.get("x", None).await.is_ok(),
                _ => false,
            }
        })
        .await;
        etcd
    }

    /// How to reach it as user `root`.
    pub(crate) fn config(&self) -> ClientConfig {
        self.config_at(self.port)
    }

    /// As [`Etcd::config`], through another port.
    pub(crate) fn config_at(&self, port: u16) -> ClientConfig {
        self.pki.client("root", port)
    }

    /// The stock client, to look from outside.
    pub(crate) async fn client(&self) -> etcd_client::Client {
        self.try_client().await.unwrap()
    }

    async fn try_client(&self) -> Result<etcd_client::Client, etcd_client::Error> {
        self.config();
        let identity = self.pki.files("root");
        let tls = etcd_client::TlsOptions::new()
            .ca_certificate(etcd_client::Certificate::from_pem(std::fs::read(self.pki.ca()).unwrap()))
            .identity(etcd_client::Identity::from_pem(
                std::fs::read(identity.cert_file).unwrap(),
                std::fs::read(identity.key_file).unwrap(),
            ));
        let options = etcd_client::ConnectOptions::new().with_tls(tls);
        etcd_client::Client::connect([format!("https://127.0.0.1:{}", self.port)], Some(options)).await
    }

    /// Stops (`STOP`) or continues (`CONT`) the process, which keeps its sockets.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
