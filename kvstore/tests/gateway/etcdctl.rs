//! Stock `etcdctl` (Debian's etcd-client) reads the gateway as it reads etcd.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::Stdio;

use isthmus_kvstore::gateway::{Gateway, Grants};
use isthmus_kvstore::memory::{Mutation, Revision};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::fixture::{DEADLINE, Running, Served, eventually, failure, stdout};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn get_reads_keys_prefixes_pages_and_the_past() {
    let served = Served::start().await;
    let ctl = |arguments: &'static [&'static str]| stdout(served.etcdctl("admin-alpha", arguments));
    served.store.put("a/1", "one"); // 2
    served.store.put("a/2", "two"); // 3
    served.store.put("b/1", "other"); // 4
    served.store.put("a/1", "uno"); // 5
    served.store.delete("a/2"); // 6

    assert_eq!(ctl(&["get", "a/1"]).await, "a/1\nuno\n");
    assert_eq!(ctl(&["get", "absent"]).await, "");
    assert_eq!(ctl(&["get", "--prefix", "a/"]).await, "a/1\nuno\n");
    assert_eq!(ctl(&["get", "--prefix", "a/", "--rev", "3"]).await, "a/1\none\na/2\ntwo\n");
    assert_eq!(ctl(&["get", "--prefix", ""]).await, "a/1\nuno\nb/1\nother\n");
    assert_eq!(ctl(&["get", "--from-key", "a/2"]).await, "b/1\nother\n");
    assert_eq!(ctl(&["get", "a/", "c/", "--keys-only"]).await, "a/1\n\nb/1\n\n");
    assert_eq!(ctl(&["get", "--prefix", "", "--limit", "1"]).await, "a/1\nuno\n");
    let sorted = ["get", "--prefix", "", "--sort-by", "MODIFY", "--order", "ASCEND", "--print-value-only"];
    assert_eq!(stdout(served.etcdctl("admin-alpha", &sorted)).await, "other\nuno\n");
    let descending = ["get", "--prefix", "", "--order", "DESCEND", "--print-value-only"];
    assert_eq!(stdout(served.etcdctl("admin-alpha", &descending)).await, "other\nuno\n");
    let counted = ctl(&["get", "--prefix", "", "--limit", "1", "-w", "json"]).await;
    assert!(counted.contains(r#""more":true"#) && counted.contains(r#""count":2"#), "{counted}");

    let future = failure(served.etcdctl("admin-alpha", &["get", "a/1", "--rev", "99"])).await;
    assert!(future.contains("etcdserver: mvcc: required revision is a future revision"), "{future}");
    served.store.compact(Revision(5)).unwrap();
    let compacted = failure(served.etcdctl("admin-alpha", &["get", "a/1", "--rev", "3"])).await;
    assert!(compacted.contains("etcdserver: mvcc: required revision has been compacted"), "{compacted}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch_tells_past_and_present_with_what_was_before() {
    let served = Served::start().await;
    served.store.put("a/1", "one"); // 2
    let mut command = served.etcdctl("admin-alpha", &["watch", "--prefix", "a/", "--rev", "2", "--prev-kv"]);
    let mut watch = Running::spawn(command.stdout(Stdio::piped()));
    let mut lines = lines(&mut watch);
    for line in ["PUT", "a/1", "one"] {
        assert_eq!(next(&mut lines).await, line);
    }
    served.store.apply(vec![
        Mutation::put("a/1", "uno"),
        Mutation::put("a/2", "two"),
        Mutation::put("b/1", "x"),
    ]);
    served.store.delete("a/2");
    for line in ["PUT", "a/1", "one", "a/1", "uno", "PUT", "a/2", "two", "DELETE", "a/2", "two", "a/2", ""] {
        assert_eq!(next(&mut lines).await, line);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_of_what_is_compacted_ends_and_says_from_where_it_can_be_had() {
    let served = Served::start().await;
    for value in 0..5 {
        served.store.put("a", value.to_string());
    }
    served.store.compact(Revision(5)).unwrap();
    let complaint = failure(served.etcdctl("admin-alpha", &["watch", "a", "--rev", "3"])).await;
    assert!(complaint.contains("watch was canceled"), "{complaint}");
    assert!(complaint.contains("required revision has been compacted"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_members_and_health_are_those_of_one_healthy_server() {
    let served = Served::start().await;
    served.store.put("a", "1");
    let status = stdout(served.etcdctl("remote", &["endpoint", "status", "-w", "json"])).await;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let status = &status[0]["Status"];
    assert_eq!(status["version"], "3.5.21");
    assert_eq!(status["header"]["cluster_id"], served.store.id().0);
    assert_eq!(status["header"]["revision"], 2);
    assert_eq!(status["leader"], status["header"]["member_id"]);
    for set in ["dbSize", "raftIndex", "raftTerm"] {
        assert!(status[set].as_u64().unwrap() > 0, "{set} in {status}");
    }
    let members = stdout(served.etcdctl("remote", &["member", "list"])).await;
    assert!(members.contains("started, isthmus"), "{members}");
    let health = stdout(served.etcdctl("remote", &["endpoint", "health", "-w", "json"])).await;
    assert!(health.contains(r#""health":true"#), "{health}");
    assert_eq!(stdout(served.etcdctl("admin-alpha", &["alarm", "list"])).await, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_changes_something_is_refused_even_to_the_administrator() {
    let served = Served::start().await;
    let refused: [&[&str]; 12] = [
        &["put", "a", "1"],
        &["del", "a"],
        &["lease", "grant", "60"],
        &["lease", "revoke", "1234"],
        &["compact", "1"],
        &["defrag"],
        &["move-leader", "1234"],
        &["member", "remove", "1234"],
        &["user", "list"],
        &["user", "add", "eve", "--no-password"],
        &["role", "list"],
        &["auth", "disable"],
    ];
    for arguments in refused {
        let complaint = failure(served.etcdctl("admin-alpha", arguments)).await;
        let denied =
            complaint.contains("etcdserver: permission denied") || complaint.contains("PermissionDenied");
        assert!(denied, "{arguments:?}: {complaint}");
    }
    assert_eq!(served.store.revision(), Revision::INITIAL);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_wider_than_the_grant_is_refused_as_a_whole() {
    let served = Served::start().await;
    served.store.put("cilium/state/nodes/v1/alpha/n1", "{}");
    served.store.put("cilium/cache/nodes/v1/beta/n1", "{}");
    let list = |prefix: &'static str| served.etcdctl("remote", &["get", "--prefix", prefix, "--keys-only"]);
    assert_eq!(stdout(list("cilium/state/")).await, "cilium/state/nodes/v1/alpha/n1\n\n");
    for wider in ["cilium/", "cilium/cache/", "cilium/cluster-config/", ""] {
        let complaint = failure(list(wider)).await;
        assert!(complaint.contains("etcdserver: permission denied"), "{wider}: {complaint}");
    }
    let complaint = failure(served.etcdctl("remote", &["watch", "--prefix", "cilium/"])).await;
    assert!(complaint.contains("etcdserver: permission denied"), "{complaint}");
    let stranger = failure(served.etcdctl("stranger", &["get", "cilium/.heartbeat"])).await;
    assert!(stranger.contains("etcdserver: permission denied"), "{stranger}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interactive_watch_outlives_the_gateway_it_began_with() {
    let mut served = Served::start().await;
    let address = served.gateway.local_addr();
    let mut command = served.etcdctl("admin-alpha", &["watch", "--prefix", "a/", "--rev", "1"]);
    let mut watch = Running::spawn(command.stdout(Stdio::piped()));
    let mut lines = lines(&mut watch);
    served.store.put("a/1", "before");
    for line in ["PUT", "a/1", "before"] {
        assert_eq!(next(&mut lines).await, line);
    }

    let restart = async |address: SocketAddr| {
        Gateway::serve(address, served.pki.server(), served.store.clone(), Grants::cluster_mesh("alpha"))
            .await
    };
    let elsewhere = restart("127.0.0.1:0".parse().unwrap()).await.unwrap();
    std::mem::replace(&mut served.gateway, elsewhere).shutdown().await;
    served.store.put("a/1", "meanwhile");
    let _again = eventually("the same address", async || restart(address).await.ok()).await;
    served.store.put("a/1", "after");
    for line in ["PUT", "a/1", "meanwhile", "PUT", "a/1", "after"] {
        assert_eq!(next(&mut lines).await, line);
    }
}

fn lines(process: &mut Running) -> UnboundedReceiver<String> {
    let (sender, lines) = tokio::sync::mpsc::unbounded_channel();
    let output = BufReader::new(process.0.stdout.take().unwrap());
    std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    lines
}

async fn next(lines: &mut UnboundedReceiver<String>) -> String {
    tokio::time::timeout(DEADLINE, lines.recv()).await.expect("a line").expect("etcdctl runs")
}
