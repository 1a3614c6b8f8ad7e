//! Which of a pod's labels count towards its identity.
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

/// Whether a pod's label is part of its identity.
pub(crate) fn is_identity_relevant(key: &str) -> bool {
    !is_reserved(key) && (key.starts_with("app.kubernetes.io") || !is_ignored(key))
}

/// Keys that only the exporter sets.
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
    fn a_pod_cannot_claim_what_only_the_exporter_says() {
        for key in [
            "io.cilium.k8s.policy.cluster",
            "io.cilium.k8s.policy.serviceaccount",
            "io.cilium.k8s.namespace.labels.team",
            "io.kubernetes.pod.namespace",
        ] {
            assert!(!is_identity_relevant(key), "{key}");
        }
    }
}
