//! Who gets in: only clients whose certificates the authority vouches for, by the files as they are now.

use std::fs;

use isthmus_kvstore::gateway::{Gateway, GatewayError, Grants};
use isthmus_kvstore::memory::{Limits, MemoryStore, StoreId};

use crate::fixture::{Pki, Served, eventually};

#[tokio::test]
async fn a_client_of_another_authority_does_not_get_in() {
    let served = Served::start().await;
    let other = Pki::new();
    let mut foreign = other.client("admin-alpha");
    foreign.ca = served.pki.client("admin-alpha").ca;
    let refused = match served.try_client(&foreign).await {
        Ok(mut client) => client.get("a", None).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
}

#[tokio::test]
async fn a_server_certificate_is_no_clients() {
    let served = Served::start().await;
    let server = served.pki.server();
    let mut files = served.pki.client("admin-alpha");
    (files.certificate, files.key) = (server.certificate, server.key);
    let refused = match served.try_client(&files).await {
        Ok(mut client) => client.get("a", None).await.is_err(),
        Err(_) => true,
    };
    assert!(refused);
}

#[tokio::test]
async fn new_handshakes_follow_the_files_and_open_connections_stay() {
    let mut served = Served::start().await;
    served.store.put("a", "1");
    let mut old = served.client("admin-alpha").await;
    assert_eq!(old.get("a", None).await.unwrap().count(), 1);
    let old_files = served.pki.client("old");
    let old_contents =
        [&old_files.ca, &old_files.certificate, &old_files.key].map(|path| fs::read(path).unwrap());

    served.pki.replace_authority();
    served.pki.server();
    let mut new = eventually("the new authority's client", async || {
        let mut client = served.try_client(&served.pki.client("admin-alpha")).await.ok()?;
        client.get("a", None).await.ok().map(|_| client)
    })
    .await;
    assert_eq!(new.get("a", None).await.unwrap().count(), 1);
    assert_eq!(
        old.get("a", None).await.unwrap().count(),
        1,
        "a connection outlives the certificates it began with"
    );
    for (path, content) in
        [&old_files.ca, &old_files.certificate, &old_files.key].into_iter().zip(old_contents)
    {
        fs::write(path, content).unwrap();
    }
    let refused = match served.try_client(&old_files).await {
        Ok(mut client) => client.get("a", None).await.is_err(),
        Err(_) => true,
    };
    assert!(refused, "the old authority's clients are strangers now");
}

#[tokio::test]
async fn half_written_files_leave_the_last_certificates_in_use() {
    let served = Served::start().await;
    let files = served.pki.server();
    fs::write(&files.certificate, "-----BEGIN CERTIFICATE-----\nhalf").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await; // the files are looked at once a second
    let mut client = served.client("admin-alpha").await;
    assert_eq!(client.get("a", None).await.unwrap().count(), 0);
}

#[tokio::test]
async fn what_keeps_a_gateway_from_starting_is_said() {
    let pki = Pki::new();
    let store = MemoryStore::new(StoreId(1), Limits::default());
    let serve =
        |files, address: std::net::SocketAddr| Gateway::serve(address, files, store.clone(), Grants::none());
    let any = "127.0.0.1:0".parse().unwrap();

    let mut files = pki.server();
    files.key = "/nonexistent.key".into();
    let error = serve(files, any).await.unwrap_err().to_string();
    assert!(error.contains("/nonexistent.key") && error.contains("check that it exists"), "{error}");

    let mut files = pki.server();
    files.key = pki.client("someone").key;
    let error = serve(files, any).await.unwrap_err().to_string();
    assert!(error.contains("cannot be used together"), "{error}");

    let first = serve(pki.server(), any).await.unwrap();
    let taken = serve(pki.server(), first.local_addr()).await.unwrap_err();
    assert!(matches!(taken, GatewayError::Listen { .. }), "{taken}");
    first.shutdown().await;
}
