//! Services: cluster addresses, address families, ports. And EndpointSlices, which name the same things.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{address, port_name};
use crate::api::forget;
use crate::status::Cause;
use crate::store::Key;

/// Which Service has which cluster address. Follows the store; a Service being made reads it only, so an
/// address is taken when the Service is there and not before.
#[derive(Debug)]
pub(crate) struct Addresses {
    ranges: Vec<IpNet>,
    used: HashMap<IpAddr, Key>,
    by_service: HashMap<Key, Vec<IpAddr>>,
    /// The last address given of each range.
    last: Vec<IpAddr>,
    /// Where the API server itself is reached, for the Service `kubernetes`.
    pub(crate) api_server: Option<SocketAddr>,
}

impl Addresses {
    /// `ranges`: one, or one per family, the cluster's first family first.
    pub(crate) fn new(ranges: Vec<IpNet>, api_server: Option<SocketAddr>) -> Self {
        Self { ranges, used: HashMap::new(), by_service: HashMap::new(), last: Vec::new(), api_server }
    }

    /// Takes note of a committed Service.
    pub(crate) fn record(&mut self, service: &Value) {
        let (key, addresses) = (key(service), addresses(service));
        for ip in addresses.iter().filter(|ip| !self.used.contains_key(*ip)) {
            self.last.retain(|last| last.is_ipv4() != ip.is_ipv4());
            self.last.push(*ip);
        }
        self.used.extend(addresses.iter().map(|ip| (*ip, key.clone())));
        for old in self.by_service.insert(key, addresses.clone()).unwrap_or_default() {
            if !addresses.contains(&old) {
                self.used.remove(&old);
            }
        }
    }

    /// Takes note that a Service is gone.
    pub(crate) fn forget(&mut self, service: &Value) {
        for ip in self.by_service.remove(&key(service)).unwrap_or_default() {
            self.used.remove(&ip);
        }
    }

    fn range(&self, family: &str) -> Option<&IpNet> {
        self.ranges.iter().find(|range| family_of(range.addr()) == family)
    }

    /// The next free address after the last one given: an address is not soon used again.
    fn free(&self, family: &str) -> Option<IpAddr> {
        let range = self.range(family)?;
        // Neither the network's address nor, in IPv4, that of all hosts.
        let first = number(range.network()) + 1;
        let end = number(range.broadcast()) + u128::from(!range.addr().is_ipv4());
        let last = self.last.iter().rfind(|ip| range.contains(*ip));
        let start = last.map_or(first, |ip| number(*ip) + 1);
        let candidates = (start..end).chain(first..start.min(end)).map(|n| address_of(n, range));
        candidates.take(MAX_TRIES).find(|ip| !self.used.contains_key(ip))
    }

    fn families(&self) -> Vec<&'static str> {
        self.ranges.iter().map(|range| family_of(range.addr())).collect()
    }
}

/// More addresses than this are not tried: a range may be larger than anyone can wait for.
const MAX_TRIES: usize = 1 << 20;

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn address_of(number: u128, range: &IpNet) -> IpAddr {
    match u32::try_from(number) {
        Ok(bits) if range.addr().is_ipv4() => Ipv4Addr::from_bits(bits).into(),
        _ => Ipv6Addr::from_bits(number).into(),
    }
}

pub(super) fn prepare_create(known: &Addresses, service: &mut Value) -> Vec<Cause> {
    complete(&mut service["spec"]);
    let mut causes = check(service);
    if causes.is_empty() {
        causes = allocate(known, service);
    }
    causes
}

pub(super) fn prepare_update(known: &Addresses, old: &Value, new: &mut Value) -> Vec<Cause> {
    complete(&mut new["spec"]);
    let external = |service: &Value| service["spec"]["type"] == "ExternalName";
    if !external(old) && !external(new) {
        let policy = new["spec"]["ipFamilyPolicy"].as_str().unwrap_or_default().to_owned();
        let fields = ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"];
        for field in fields.into_iter().filter(|f| old["spec"].get(f).is_some()) {
            if new["spec"].get(field).is_none_or(|value| value == "" || value == &json!([])) {
                new["spec"][field] = old["spec"][field].clone();
            }
        }
        if old["spec"]["clusterIP"] != new["spec"]["clusterIP"]
            || old["spec"]["clusterIPs"][0] != new["spec"]["clusterIPs"][0]
        {
            let asked = json!([new["spec"]["clusterIP"]]);
            return vec![Cause::invalid("spec.clusterIPs[0]", &asked, "may not change once set")];
        }
        if policy == "SingleStack" {
            for field in ["clusterIPs", "ipFamilies"] {
                if let Some(list) = new["spec"][field].as_array_mut() {
                    list.truncate(1);
                }
            }
        }
    }
    let mut causes = check(new);
    if causes.is_empty() {
        causes = allocate(known, new);
    }
    causes
}

fn complete(spec: &mut Value) {
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        if port.get("targetPort").is_none_or(|target| *target == 0 || *target == "") {
            port["targetPort"] = port["port"].clone();
        }
    }
    if spec["type"] != "ExternalName" && spec.get("internalTrafficPolicy").is_none() {
        spec["internalTrafficPolicy"] = json!("Cluster");
    }
    if matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer"))
        && spec.get("externalTrafficPolicy").is_none()
    {
        spec["externalTrafficPolicy"] = json!("Cluster");
    }
    if spec["sessionAffinity"] == "ClientIP" {
        if spec.pointer("/sessionAffinityConfig/clientIP/timeoutSeconds").is_none() {
            spec["sessionAffinityConfig"] = json!({ "clientIP": { "timeoutSeconds": 10800 } });
        }
    } else {
        forget(spec, "sessionAffinityConfig");
    }
    for field in ["ports", "clusterIPs", "ipFamilies"] {
        if spec[field].is_null() {
            forget(spec, field);
        }
    }
}

fn check(service: &Value) -> Vec<Cause> {
    let spec = &service["spec"];
    let mut causes = Vec::new();
    for (field, allowed) in [
        ("type", &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"][..]),
        ("sessionAffinity", &["ClientIP", "None"]),
        ("internalTrafficPolicy", &["Cluster", "Local"]),
        ("externalTrafficPolicy", &["Cluster", "Local"]),
        ("ipFamilyPolicy", &["PreferDualStack", "RequireDualStack", "SingleStack"]),
        ("trafficDistribution", &["PreferClose", "PreferSameNode", "PreferSameZone"]),
    ] {
        if let Some(value) = spec.get(field).filter(|v| !v.as_str().is_some_and(|v| allowed.contains(&v))) {
            causes.push(Cause::unsupported(format!("spec.{field}"), value, allowed));
        }
    }
    let timeout = spec.pointer("/sessionAffinityConfig/clientIP/timeoutSeconds").and_then(Value::as_i64);
    if let Some(timeout) = timeout.filter(|t| !(1..=86400).contains(t)) {
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        causes.push(Cause::invalid(field, &json!(timeout), "must be greater than 0 and at most 86400"));
    }
    if spec["type"] == "ExternalName" {
        if spec["externalName"].as_str().unwrap_or_default().is_empty() {
            causes.push(Cause::required("spec.externalName", ""));
        }
        return causes;
    }
    let ports = spec["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    if ports.is_empty() && spec["clusterIP"] != "None" {
        causes.push(Cause::required("spec.ports", ""));
    }
    let mut names = HashSet::new();
    let mut numbers = HashSet::new();
    for (index, port) in ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        if ports.len() > 1 && port["name"].as_str().unwrap_or_default().is_empty() {
            causes.push(Cause::required(field("name"), ""));
        } else if !names.insert(&port["name"]) {
            causes.push(Cause::duplicate(field("name"), &port["name"]));
        }
        causes.extend(port_name(field("name"), &port["name"]));
        causes.extend(port_number(field("port"), &port["port"]));
        match &port["targetPort"] {
            Value::Number(_) => causes.extend(port_number(field("targetPort"), &port["targetPort"])),
            name => causes.extend(port_name(field("targetPort"), name)),
        }
        causes.extend(protocol(field("protocol"), &port["protocol"]));
        if !numbers.insert((&port["port"], port["protocol"].as_str())) {
            let both = json!({ "port": port["port"], "protocol": port["protocol"] });
            causes.push(Cause::duplicate(format!("spec.ports[{index}]"), &both));
        }
    }
    causes
}

/// Gives the Service the addresses it lacks, by `ipFamilyPolicy`, and checks those it asked for.
fn allocate(known: &Addresses, service: &mut Value) -> Vec<Cause> {
    let own = key(service);
    let spec = &mut service["spec"];
    if spec["type"] == "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            forget(spec, field);
        }
        return Vec::new();
    }
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut ips = texts(&spec["clusterIPs"]);
    let primary = spec["clusterIP"].as_str().unwrap_or_default().to_owned();
    match (primary.is_empty(), ips.first()) {
        (false, None) => ips.push(primary),
        (false, Some(first)) if *first != primary => {
            let rule = "first value must match `clusterIP`";
            return vec![Cause::invalid("spec.clusterIPs", &json!(ips), rule)];
        }
        _ => {}
    }
    let headless = ips.first().is_some_and(|ip| ip == "None");
    let mut families = texts(&spec["ipFamilies"]);
    if families.is_empty() && !headless {
        families = ips.iter().filter_map(|ip| address(ip)).map(|ip| family_of(ip).to_owned()).collect();
    }
    let available = known.families();
    for family in &families {
        if !available.contains(&family.as_str()) {
            let rule = "not configured on this cluster";
            return vec![Cause::invalid("spec.ipFamilies[0]", &json!(family), rule)];
        }
    }
    let given = families.len().max(if headless { 0 } else { ips.len() });
    let policy = spec["ipFamilyPolicy"].as_str().map(str::to_owned);
    let policy = policy.unwrap_or_else(|| if given > 1 { "RequireDualStack" } else { "SingleStack" }.into());
    if policy == "RequireDualStack" && available.len() < 2 {
        let rule = "this cluster is not configured for dual-stack services";
        return vec![Cause::invalid("spec.ipFamilyPolicy", &json!(policy), rule)];
    }
    if policy == "SingleStack" && given > 1 {
        let rule = "may only hold up to 1 value with SingleStack";
        return vec![Cause::invalid("spec.ipFamilyPolicy", &json!(policy), rule)];
    }
    let wanted = if policy == "SingleStack" { 1 } else { available.len() };
    for family in &available {
        if families.len() < wanted && !families.iter().any(|f| f == family) {
            families.push((*family).to_owned());
        }
    }
    let mut causes = Vec::new();
    if !headless {
        for (index, family) in families.iter().enumerate() {
            match ips.get(index) {
                Some(text) => causes.extend(check_address(known, &own, index, text, family)),
                None => match known.free(family) {
                    Some(ip) => ips.push(ip.to_string()),
                    None => causes.push(Cause {
                        reason: "InternalError",
                        field: "spec.clusterIPs".into(),
                        message: "Internal error: failed to allocate a serviceIP: range is full".into(),
                    }),
                },
            }
        }
    }
    spec["clusterIP"] = json!(ips.first());
    spec["clusterIPs"] = json!(ips);
    spec["ipFamilies"] = json!(families);
    spec["ipFamilyPolicy"] = json!(policy);
    causes
}

fn check_address(known: &Addresses, own: &Key, index: usize, text: &str, family: &str) -> Option<Cause> {
    let invalid =
        |rule: &str| Some(Cause::invalid(format!("spec.clusterIPs[{index}]"), &json!([text]), rule));
    let Some(ip) = address(text) else {
        return invalid("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    };
    if family_of(ip) != family {
        return invalid(&format!("expected an {family} value as indicated by `ipFamilies[{index}]`"));
    }
    match known.range(family) {
        Some(range) if !range.contains(&ip) => {
            return invalid(&format!(
                "failed to allocate IP {ip}: the provided IP is not in the valid range. The range of valid IPs is {range}"
            ));
        }
        _ => {}
    }
    match known.used.get(&ip) {
        Some(owner) if owner != own => {
            invalid(&format!("failed to allocate IP {ip}: provided IP is already allocated"))
        }
        _ => None,
    }
}

pub(super) fn check_slice(slice: &mut Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let kind = slice["addressType"].as_str().unwrap_or_default().to_owned();
    if kind.is_empty() {
        causes.push(Cause::required("addressType", ""));
    } else if !["FQDN", "IPv4", "IPv6"].contains(&kind.as_str()) {
        causes.push(Cause::unsupported("addressType", &slice["addressType"], &["FQDN", "IPv4", "IPv6"]));
    }
    for (index, endpoint) in slice["endpoints"].as_array().into_iter().flatten().enumerate() {
        let addresses = endpoint["addresses"].as_array().map(Vec::as_slice).unwrap_or_default();
        if addresses.is_empty() {
            let field = format!("endpoints[{index}].addresses");
            causes.push(Cause::required(field, "must contain at least 1 address"));
        }
        for (at, value) in addresses.iter().enumerate() {
            let parsed = value.as_str().and_then(address);
            let fits = kind == "FQDN" || parsed.is_some_and(|ip| family_of(ip) == kind);
            if !fits {
                let field = format!("endpoints[{index}].addresses[{at}]");
                causes.push(Cause::invalid(field, value, &format!("must be an {kind} address")));
            }
        }
    }
    for (index, port) in slice["ports"].as_array().into_iter().flatten().enumerate() {
        causes.extend(port_name(format!("ports[{index}].name"), &port["name"]));
        causes.extend(protocol(format!("ports[{index}].protocol"), &port["protocol"]));
        if port.get("port").is_some() {
            causes.extend(port_number(format!("ports[{index}].port"), &port["port"]));
        }
    }
    causes
}

fn port_number(field: String, value: &Value) -> Option<Cause> {
    let fits = value.as_i64().is_some_and(|n| (1..=65535).contains(&n));
    (!fits).then(|| Cause::invalid(field, value, "must be between 1 and 65535, inclusive"))
}

fn protocol(field: String, value: &Value) -> Option<Cause> {
    let known = matches!(value.as_str(), Some("SCTP" | "TCP" | "UDP"));
    (!known).then(|| Cause::unsupported(field, value, &["SCTP", "TCP", "UDP"]))
}

fn addresses(service: &Value) -> Vec<IpAddr> {
    let ips = service["spec"]["clusterIPs"].as_array().into_iter().flatten();
    ips.filter_map(Value::as_str).filter_map(address).collect()
}

fn key(service: &Value) -> Key {
    let text = |field: &str| service["metadata"][field].as_str().unwrap_or_default();
    Key::new(text("namespace"), text("name"))
}

fn family_of(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> Value {
        json!({
            "metadata": { "namespace": "ns", "name": name },
            "spec": { "type": "ClusterIP", "sessionAffinity": "None", "ports": [{ "port": 80, "protocol": "TCP" }] },
        })
    }

    #[test]
    fn a_range_is_used_up_and_then_again() {
        let mut known = Addresses::new(vec!["10.0.0.0/29".parse().expect("a range")], None);
        let mut made = Vec::new();
        for n in 0..6 {
            let mut service = service(&format!("s{n}"));
            assert_eq!(prepare_create(&known, &mut service), []);
            known.record(&service);
            made.push(service);
        }
        let ips: Vec<&str> = made.iter().filter_map(|s| s["spec"]["clusterIP"].as_str()).collect();
        assert_eq!(ips, ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert!(prepare_create(&known, &mut service("more"))[0].message.contains("range is full"));
        known.forget(&made[2]);
        let mut again = service("again");
        assert_eq!(prepare_create(&known, &mut again), []);
        assert_eq!(again["spec"]["clusterIP"], "10.0.0.3");
    }
}
