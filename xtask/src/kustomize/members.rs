//! Members of an etcd believe each other: each looks up the names in a certificate that it is shown, for the address of who shows
//! it. A wildcard has no address. Against one it compares the name that the address has, which ends in the cluster's domain, so
//! that nothing short of that domain in the certificate helps.

use super::Finding;
use super::object::{Objects, Pod, list, text};
use super::programs::expand;

const MEMBERS: &str = "--initial-cluster=";

pub(super) fn check(objects: &Objects) -> Vec<Finding> {
    objects.pods().iter().flat_map(|pod| of_pod(objects, pod)).collect()
}

fn of_pod(objects: &Objects, pod: &Pod<'_>) -> Vec<Finding> {
    let names = certified(objects, pod);
    let mut findings = Vec::new();
    for container in pod.containers() {
        for word in list(&container.value["args"]).map(text) {
            let Some(members) = word.strip_prefix(MEMBERS) else { continue };
            let members = match expand(objects, container.value, members) {
                Ok(members) => members,
                Err(why) => {
                    findings.push(Finding::new(&container.at, why));
                    continue;
                }
            };
            let unknown = members.split(',').map(host).filter(|host| !names.contains(host));
            findings.extend(unknown.map(|host| {
                let problem = format!("no certificate that it mounts has the name {host:?} in so many words");
                Finding::new(&container.at, problem)
            }));
        }
    }
    findings
}

/// Names in the certificates that a pod mounts.
fn certified<'a>(objects: &'a Objects, pod: &Pod<'_>) -> Vec<&'a str> {
    let mounts = |secret: &str| list(&pod.spec["volumes"]).any(|v| v["secret"]["secretName"] == secret);
    let certificates = objects.of("Certificate").filter(|c| mounts(text(&c["spec"]["secretName"])));
    certificates.flat_map(|certificate| list(&certificate["spec"]["dnsNames"])).map(text).collect()
}

/// Of `NAME=https://HOST:PORT`.
fn host(member: &str) -> &str {
    let address = member.split_once("://").map_or(member, |(_, address)| address);
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
kind: Certificate
metadata: {name: c}
spec: {secretName: s, dnsNames: [localhost, e-0.members.svc, e-1.members.svc]}
---
kind: StatefulSet
metadata: {name: e}
spec:
  template:
    spec:
      containers:
      - name: etcd
        env: [{name: DOMAIN, value: svc}]
        args: ['--initial-cluster=e-0=https://e-0.members.$(DOMAIN):2380,e-1=https://e-1.members.$(DOMAIN):2380']
      volumes: [{name: v, secret: {secretName: s}}]
";

    fn findings(yaml: &str) -> Vec<String> {
        let objects = Objects::parse(yaml).expect("YAML");
        check(&objects).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn members_are_certified_by_their_names() {
        assert_eq!(findings(GOOD), [""; 0]);
    }

    #[test]
    fn a_member_whose_name_is_in_no_certificate_is_named() {
        for (from, to, says) in [
            ("e-0.members.svc, e-1.members.svc", "'*.members.svc'", "\"e-0.members.svc\""),
            (", e-1.members.svc]", "]", "\"e-1.members.svc\""),
            ("{secretName: s}}", "{secretName: other}}", "\"e-0.members.svc\""),
            ("{name: DOMAIN, value: svc}", "{name: OTHER, value: svc}", "no variable DOMAIN"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let found = findings(&GOOD.replacen(from, to, 1));
            assert!(found.iter().any(|f| f.contains(says)), "{to}: {found:?}");
        }
    }
}
