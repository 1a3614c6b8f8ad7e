//! Where a node's connections to gateways end, once the node has chosen a pod behind the Service: `conntrack`, which is in
//! kind's node image since kube-proxy wants it.

use std::net::IpAddr;

use isthmus_crds::names::GATEWAY_PORT;

use crate::names::Families;

/// As `conntrack` calls address families; it shows one at a time.
pub(super) fn families(families: Families) -> impl Iterator<Item = &'static str> {
    families.v4().then_some("ipv4").into_iter().chain(families.v6().then_some("ipv6"))
}

/// The command that shows the connections to gateways that are in use.
pub(super) fn command(family: &str) -> [String; 10] {
    let port = GATEWAY_PORT.to_string();
    let words = [
        "conntrack",
        "--dump",
        "--family",
        family,
        "--proto",
        "tcp",
        "--state",
        "ESTABLISHED",
        "--orig-port-dst",
        &port,
    ];
    words.map(str::to_owned)
}

/// The addresses that answer, of each connection that is shown. A line names source and destination of what is asked, and
/// behind them source and destination of what is answered:
///
/// ```text
/// tcp 6 86388 ESTABLISHED src=172.18.0.3 dst=10.101.0.9 sport=4711 dport=2379 src=10.1.0.5 dst=172.18.0.3 sport=2379 dport=4711 [ASSURED] mark=0 use=1
/// ```
pub(super) fn ends(shown: &str) -> impl Iterator<Item = IpAddr> {
    shown.lines().filter_map(|line| {
        let mut sources = line.split_ascii_whitespace().filter_map(|word| word.strip_prefix("src="));
        sources.next_back()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_answers_stands_behind_who_was_asked() {
        let shown = "\
tcp      6 86388 ESTABLISHED src=172.18.0.3 dst=10.101.0.9 sport=4711 dport=2379 src=10.1.0.5 dst=172.18.0.3 sport=2379 dport=4711 [ASSURED] mark=0 use=1
tcp      6 86399 ESTABLISHED src=fc00::3 dst=fd00:10:1::5 sport=5 dport=2379 src=fd00:10:1::5 dst=fc00::3 sport=2379 dport=5 [ASSURED] mark=0 use=1

conntrack v1.4.8: 2 flow entries have been shown.
";
        let expected: Vec<IpAddr> = vec!["10.1.0.5".parse().unwrap(), "fd00:10:1::5".parse().unwrap()];
        assert_eq!(ends(shown).collect::<Vec<_>>(), expected);
        assert_eq!(families(Families::Dual).collect::<Vec<_>>(), ["ipv4", "ipv6"]);
        assert_eq!(families(Families::V6).collect::<Vec<_>>(), ["ipv6"]);
    }
}
