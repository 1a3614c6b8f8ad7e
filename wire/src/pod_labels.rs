//! The labels of a pod's identity: what of its own labels counts, and what is added. Whoever derives an identity from a
//! pod (the exporter for the mesh, an agent for the pods of its node) does it here, so that both come to the same.
//!
//! Labels that differ from pod to pod would give every pod an identity of its own. What is left out is what Cilium
//! leaves out by default, so that a label set means the same in a mesh of both:
//!
//! | left out | except |
//! |---|---|
//! | `io.kubernetes*`, `kubernetes.io*` | `io.kubernetes.pod.namespace` (set by us) |
//! | `*beta.kubernetes.io*`, `k8s.io*` | |
//! | `statefulset.kubernetes.io/pod-name`, `apps.kubernetes.io/pod-index` | `app.kubernetes.io*` is kept |
//! | `batch.kubernetes.io/job-completion-index`, `batch.kubernetes.io/controller-uid`, `controller-uid*` | |
//! | `pod-template-generation*`, `pod-template-hash*`, `controller-revision-hash*` | |
//! | `annotation*`, `etcd_node*` | |
//! | `io.cilium.k8s*`: reserved, a pod must not claim another cluster, namespace label or service account | |

use std::collections::BTreeMap;

use crate::{ClusterName, Labels};

/// Whether a pod's label is part of its identity.
pub fn is_identity_relevant(key: &str) -> bool {
    !is_reserved(key) && (key.starts_with("app.kubernetes.io") || !is_ignored(key))
}

/// The labels of the identity of a pod: those of its own that count, its namespace's, its service account (if there is
/// one), cluster and namespace.
pub fn identity_labels(
    cluster: &ClusterName,
    namespace: &str,
    namespace_labels: &BTreeMap<String, String>,
    pod_labels: &BTreeMap<String, String>,
    service_account: &str,
) -> Labels {
    let mut labels = Labels::new();
    // Kubernetes admits no label that the text form could not carry; if one comes regardless, it does not count.
    let mut insert = |key: &str, value: &str| drop(labels.insert_k8s(key, value));
    for (key, value) in pod_labels.iter().filter(|(key, _)| is_identity_relevant(key)) {
        insert(key, value);
    }
    for (key, value) in namespace_labels {
        insert(&format!("{}{key}", Labels::NAMESPACE_LABEL_PREFIX), value);
    }
    if !service_account.is_empty() {
        insert(Labels::SERVICE_ACCOUNT, service_account);
    }
    insert(Labels::CLUSTER, cluster.as_str());
    insert(Labels::NAMESPACE, namespace);
    labels
}

/// Keys that only Isthmus sets.
fn is_reserved(key: &str) -> bool {
    key.starts_with("io.cilium.k8s")
}

fn is_ignored(key: &str) -> bool {
    const PREFIXES: &[&str] = &[
        "io.kubernetes",
        "kubernetes.io",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/job-completion-index",
        "batch.kubernetes.io/controller-uid",
        "k8s.io",
        "pod-template-generation",
        "pod-template-hash",
        "controller-revision-hash",
        "controller-uid",
        "annotation",
        "etcd_node",
    ];
    PREFIXES.iter().any(|prefix| key.starts_with(prefix)) || key.contains("beta.kubernetes.io")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_differ_from_pod_to_pod_are_left_out() {
        for key in [
            "pod-template-hash",
            "controller-revision-hash",
            "statefulset.kubernetes.io/pod-name",
            "apps.kubernetes.io/pod-index",
            "batch.kubernetes.io/job-completion-index",
            "batch.kubernetes.io/controller-uid",
            "controller-uid",
            "failure-domain.beta.kubernetes.io/zone",
            "io.kubernetes.container.name",
            "kubernetes.io/os",
        ] {
            assert!(!is_identity_relevant(key), "{key}");
        }
    }

    #[test]
    fn labels_that_say_what_a_pod_is_are_kept() {
        for key in [
            "app",
            "app.kubernetes.io/name",
            "topology.kubernetes.io/zone",
            "team",
            "batch.kubernetes.io/job-name",
        ] {
            assert!(is_identity_relevant(key), "{key}");
        }
    }

    #[test]
    fn a_pod_cannot_claim_what_only_isthmus_says() {
        for key in [
            "io.cilium.k8s.policy.cluster",
            "io.cilium.k8s.policy.serviceaccount",
            "io.cilium.k8s.namespace.labels.team",
            "io.kubernetes.pod.namespace",
        ] {
            assert!(!is_identity_relevant(key), "{key}");
        }
    }

    #[test]
    fn a_pod_s_identity_is_its_labels_and_where_it_lives() {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        let labels = identity_labels(
            &"alpha".parse().expect("valid"),
            "app",
            &map(&[("team", "blue")]),
            &map(&[("app", "echo"), ("pod-template-hash", "abc"), ("io.kubernetes.pod.namespace", "other")]),
            "default",
        );
        assert_eq!(
            labels.to_string(),
            "k8s:app=echo;k8s:io.cilium.k8s.namespace.labels.team=blue;k8s:io.cilium.k8s.policy.cluster=alpha;\
             k8s:io.cilium.k8s.policy.serviceaccount=default;k8s:io.kubernetes.pod.namespace=app;"
        );
    }
}
