//! Stock `kubectl` over TLS, as people use it. `KUBECTL` names another one than that of the PATH.

mod cluster;

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use cluster::{Cluster, within};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

const WEB: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: nginx, ports: [{containerPort: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80}, {name: metrics, port: 9090}]
";

struct Kubectl {
    program: String,
    kubeconfig: PathBuf,
    cache: PathBuf,
}

impl Kubectl {
    fn new(cluster: &Cluster) -> Self {
        Self {
            program: std::env::var("KUBECTL").unwrap_or_else(|_| "kubectl".into()),
            kubeconfig: cluster.kubeconfig_file(),
            cache: cluster.folder().join("cache"),
        }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--cache-dir").arg(&self.cache);
        command.args(line.split_whitespace()).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn output(&self, line: &str, input: &str) -> Output {
        let mut child = self.command(line).stdin(Stdio::piped()).spawn().unwrap_or_else(|e| {
            panic!("{}: {e}; install it (Debian: kubernetes-client) or set KUBECTL", self.program)
        });
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(input.as_bytes()).await.expect("written");
        drop(stdin);
        within(line, child.wait_with_output()).await.expect("an end")
    }

    /// What a command that succeeds says.
    async fn run(&self, line: &str) -> String {
        self.feed(line, "").await
    }

    async fn feed(&self, line: &str, input: &str) -> String {
        let output = self.output(line, input).await;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {line}: {errors}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// What a command that fails says.
    async fn refused(&self, line: &str, input: &str) -> String {
        let output = self.output(line, input).await;
        assert!(!output.status.success(), "kubectl {line} should have failed");
        String::from_utf8(output.stderr).expect("text")
    }

    async fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.run(&format!("{line} -o json")).await).expect("JSON")
    }
}

#[tokio::test]
async fn apply_changes_what_changed_and_nothing_else() {
    let cluster = Cluster::start().await;
    let kubectl = Kubectl::new(&cluster);
    let said = kubectl.feed("apply -f -", WEB).await;
    assert_eq!(said, "deployment.apps/web created\nservice/web created\n");
    let said = kubectl.feed("apply -f -", WEB).await;
    assert_eq!(said, "deployment.apps/web unchanged\nservice/web unchanged\n");
    // One port goes, one changes, the server's own fields stay.
    let before = kubectl.json("get service web").await;
    let changed = WEB.replace("{name: metrics, port: 9090}", "{name: probe, port: 9091}");
    let said = kubectl.feed("apply -f -", &changed).await;
    assert_eq!(said, "deployment.apps/web unchanged\nservice/web configured\n");
    let after = kubectl.json("get service web").await;
    let ports: Vec<&Value> =
        after["spec"]["ports"].as_array().expect("ports").iter().map(|p| &p["port"]).collect();
    assert_eq!(ports, [80, 9091]);
    assert_eq!(before["spec"]["clusterIP"], after["spec"]["clusterIP"]);
    let said = kubectl.feed("diff -f -", &changed).await;
    assert_eq!(said, "", "nothing is left to change");
    kubectl.feed("delete -f -", WEB).await;
    assert!(kubectl.refused("get service web", "").await.contains("(NotFound)"));
    cluster.stop().await;
}

#[tokio::test]
async fn server_side_apply_reports_conflicts_and_forces() {
    let cluster = Cluster::start().await;
    let kubectl = Kubectl::new(&cluster);
    for _ in 0..2 {
        let said = kubectl.feed("apply --server-side -f -", WEB).await;
        assert_eq!(said, "deployment.apps/web serverside-applied\nservice/web serverside-applied\n");
    }
    kubectl.run("scale deployment web --replicas 5").await;
    let conflict = kubectl.refused("apply --server-side -f -", WEB).await;
    assert!(
        conflict.contains("Apply failed with 1 conflict") && conflict.contains(".spec.replicas"),
        "{conflict}"
    );
    kubectl.feed("apply --server-side --force-conflicts -f -", WEB).await;
    assert_eq!(kubectl.json("get deployment web").await["spec"]["replicas"], 2);
    // A field that its only owner gives up is gone.
    let fewer = WEB.replace(", {name: metrics, port: 9090}", "");
    kubectl.feed("apply --server-side -f -", &fewer).await;
    let ports = kubectl.json("get service web").await["spec"]["ports"].clone();
    assert_eq!(ports.as_array().map(Vec::len), Some(1), "{ports}");
    cluster.stop().await;
}

#[tokio::test]
async fn objects_are_shown_in_every_form() {
    let cluster = Cluster::start().await;
    let kubectl = Kubectl::new(&cluster);
    kubectl.run("create namespace shop").await;
    kubectl.feed("apply -n shop -f -", WEB).await;
    let table = kubectl.run("get deployments,services -n shop").await;
    assert!(table.contains("NAME") && table.contains("UP-TO-DATE") && table.contains("0/2"), "{table}");
    assert!(table.contains("80/TCP,9090/TCP"), "{table}");
    let wide = kubectl.run("get services -n shop -o wide").await;
    assert!(wide.contains("SELECTOR") && wide.contains("app=web"), "{wide}");
    let everywhere = kubectl.run("get services -A").await;
    assert!(everywhere.contains("NAMESPACE") && everywhere.contains("kubernetes"), "{everywhere}");
    let yaml = kubectl.run("get service web -n shop -o yaml").await;
    assert!(yaml.contains("\nkind: Service\n"), "{yaml}");
    assert_eq!(kubectl.run("get service web -n shop -o name").await, "service/web\n");
    let path = kubectl.run("get service web -n shop -o jsonpath={.spec.ports[0].name}").await;
    assert_eq!(path, "http");
    let described = kubectl.run("describe service web -n shop").await;
    assert!(described.contains("app=web"), "{described}");
    let version = kubectl.json("version").await;
    assert!(version["serverVersion"]["gitVersion"].is_string(), "{version}");
    assert!(kubectl.run("api-resources").await.contains("endpointslices"));
    assert!(kubectl.run("explain deployment.spec.replicas").await.contains("Number of desired pods"));
    cluster.stop().await;
}

#[tokio::test]
async fn objects_are_changed_in_every_way() {
    let cluster = Cluster::start().await;
    let kubectl = Kubectl::new(&cluster);
    kubectl.feed("create -f -", WEB).await;
    kubectl.run("annotate service web io.cilium/global-service=true").await;
    kubectl.run("annotate service web io.cilium/global-service=false --overwrite").await;
    kubectl.run("label service web tier=front").await;
    kubectl.run("label service web tier=back --overwrite").await;
    kubectl.run("label service web tier-").await;
    kubectl.run("scale deployment web --replicas=0").await;
    kubectl.run(r#"patch service web --type=merge -p {"spec":{"sessionAffinity":"ClientIP"}}"#).await;
    kubectl.run(r#"patch service web --type=json -p [{"op":"remove","path":"/spec/ports/1"}]"#).await;
    kubectl.run(r#"patch service web -p {"spec":{"ports":[{"port":443,"name":"https"}]}}"#).await;
    kubectl.run("set image deployment/web web=nginx:2").await;
    let service = kubectl.json("get service web").await;
    assert_eq!(service["metadata"]["annotations"]["io.cilium/global-service"], "false");
    assert_eq!(service["metadata"]["labels"].get("tier"), None);
    assert_eq!(service["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], 10800);
    let ports: Vec<&Value> =
        service["spec"]["ports"].as_array().expect("ports").iter().map(|p| &p["name"]).collect();
    assert!(
        ports.contains(&&json!("http")) && ports.contains(&&json!("https")) && ports.len() == 2,
        "{ports:?}"
    );
    let deployment = kubectl.json("get deployment web").await;
    assert_eq!(deployment["spec"]["replicas"], 0);
    assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["image"], "nginx:2");
    // What an editor does: read, change, replace.
    let mut edited = service.clone();
    edited["metadata"]["labels"]["edited"] = json!("yes");
    kubectl.feed("replace -f -", &edited.to_string()).await;
    let conflict = kubectl.refused("replace -f -", &service.to_string()).await;
    assert!(conflict.contains("the object has been modified"), "{conflict}");
    cluster.stop().await;
}

#[tokio::test]
async fn simple_objects_are_created_by_command() {
    let cluster = Cluster::start().await;
    let kubectl = Kubectl::new(&cluster);
    kubectl.run("create namespace shop").await;
    kubectl.run("create deployment web --image=nginx --replicas=3 --port=80 -n shop").await;
    kubectl.run("expose deployment web -n shop").await;
    kubectl.run("create configmap c --from-literal=a=b -n shop").await;
    kubectl.run("create secret generic s --from-literal=a=b -n shop").await;
    kubectl.run("create serviceaccount bob -n shop").await;
    kubectl.run("create role r --verb=get --resource=pods -n shop").await;
    kubectl.run("create rolebinding rb --role=r --serviceaccount=shop:bob -n shop").await;
    let deployment = kubectl.json("get deployment web -n shop").await;
    assert_eq!(deployment["spec"]["replicas"], 3);
    assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"], 80);
    assert_eq!(kubectl.json("get secret s -n shop").await["data"]["a"], "Yg==");
    assert_eq!(kubectl.run("auth can-i get pods").await, "yes\n");
    let can = "auth can-i get pods -n shop --as=nobody";
    assert!(!kubectl.output(can, "").await.status.success());
    cluster.stop().await;
}

#[tokio::test]
async fn mistakes_are_explained() {
    let cluster = Cluster::start().await;
    let kubectl = Kubectl::new(&cluster);
    let unknown = WEB.replace("replicas: 2", "replicaz: 2");
    let said = kubectl.refused("apply -f -", &unknown).await;
    assert!(said.contains("replicaz"), "{said}");
    let wrong_type = WEB.replace("replicas: 2", "replicas: many");
    assert!(kubectl.refused("apply -f -", &wrong_type).await.contains("replicas"));
    let bad_port = WEB.replace("port: 9090", "port: 99999");
    let said = kubectl.refused("apply -f -", &bad_port).await;
    assert!(said.contains("The Service \"web\" is invalid"), "{said}");
    let cause = "spec.ports[1].port: Invalid value: 99999: must be between 1 and 65535, inclusive";
    assert!(said.contains(cause), "{said}");
    let said = kubectl.refused("label service kubernetes a=b/c", "").await;
    assert!(said.contains("a valid label must be"), "{said}");
    let said = kubectl.refused("get nonsense", "").await;
    assert!(said.contains("the server doesn't have a resource type \"nonsense\""), "{said}");
    cluster.stop().await;
}

#[tokio::test]
async fn waits_and_watches_end_when_the_time_has_come() {
    let cluster = Cluster::start().await;
    let kubectl = Kubectl::new(&cluster);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "p" },
        "spec": { "nodeName": "n", "containers": [{ "name": "c", "image": "i" }] },
    });
    kubectl.feed("apply -f -", &pod.to_string()).await;
    let mut watch = kubectl.command("get pods --watch -o name").spawn().expect("kubectl");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    let mut next = async || within("a line", lines.next_line()).await.expect("text").expect("a line");
    assert_eq!(next().await, "pod/p", "what there is");
    let waiting = kubectl.command("wait --for=condition=Ready pod/p --timeout=25s").spawn().expect("kubectl");
    let pods: Api<Pod> = Api::default_namespaced(cluster.admin().await);
    let ready =
        json!({ "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] } });
    pods.patch_status("p", &PatchParams::default(), &Patch::Strategic(ready)).await.expect("patched");
    assert_eq!(next().await, "pod/p", "what changed");
    let output = within("kubectl wait", waiting.wait_with_output()).await.expect("an end");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Deleting waits for the pod to end, which its kubelet reports.
    let deleting = kubectl.command("delete pod p --timeout=25s").spawn().expect("kubectl");
    within("the mark", async {
        while pods.get("p").await.expect("there").metadata.deletion_timestamp.is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.expect("ended");
    let output = within("kubectl delete", deleting.wait_with_output()).await.expect("an end");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.stop().await;
}
