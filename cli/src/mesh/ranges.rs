//! Ranges of addresses: which ones a cluster uses, and whether two clusters' are apart.

use ipnet::IpNet;

/// A set of ranges, as few as say the same.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ranges(Vec<IpNet>);

impl Ranges {
    /// Merges neighbours and drops what others contain.
    pub(crate) fn new(ranges: impl IntoIterator<Item = IpNet>) -> Self {
        let ranges: Vec<IpNet> = ranges.into_iter().map(|range| range.trunc()).collect();
        let mut merged = IpNet::aggregate(&ranges);
        merged.sort_by_key(|range| (range.addr(), range.prefix_len()));
        Self(merged)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first two that have addresses in common.
    pub(crate) fn overlap(&self, other: &Self) -> Option<(IpNet, IpNet)> {
        // Both are sorted, and no range of one overlaps another of the same: walk them side by side.
        let (mut mine, mut others) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(a), Some(b)) = (mine.peek(), others.peek()) {
            if a.contains(*b) || b.contains(*a) {
                return Some((**a, **b));
            }
            if a.addr() < b.addr() {
                mine.next()
            } else {
                others.next()
            };
        }
        None
    }
}

impl std::fmt::Display for Ranges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 4;
        let shown: Vec<String> = self.0.iter().take(SHOWN).map(ToString::to_string).collect();
        write!(f, "{}", shown.join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// The ranges that an API server names when it refuses a Service's address.
///
/// `... the provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/16`
pub(crate) fn in_refusal(message: &str) -> Vec<IpNet> {
    let Some((_, rest)) = message.split_once("range of valid IPs is ") else { return Vec::new() };
    let word = rest.split_whitespace().next().unwrap_or_default();
    word.trim_end_matches(['.', ',', ';', '"', ')']).parse().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(texts: &[&str]) -> Ranges {
        Ranges::new(texts.iter().map(|text| text.parse::<IpNet>().expect("a range")))
    }

    #[test]
    fn neighbours_are_one_range() {
        let nodes: Vec<String> = (0..256).map(|n| format!("10.1.{n}.0/24")).collect();
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        assert_eq!(ranges(&nodes).to_string(), "10.1.0.0/16");
        assert_eq!(ranges(&["10.0.0.1/8", "10.3.0.0/16"]).to_string(), "10.0.0.0/8");
    }

    #[test]
    fn overlaps_are_found_wherever_they_are() {
        for (one, other, found) in [
            (&["10.0.0.0/16"][..], &["10.1.0.0/16"][..], None),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], Some(("10.0.0.0/8", "10.1.0.0/16"))),
            (&["10.1.0.0/16"], &["10.0.0.0/8"], Some(("10.1.0.0/16", "10.0.0.0/8"))),
            (
                &["10.0.0.0/16", "172.16.0.0/12"],
                &["10.1.0.0/16", "172.20.0.0/16"],
                Some(("172.16.0.0/12", "172.20.0.0/16")),
            ),
            (
                &["10.0.0.0/16", "fd00:1::/48"],
                &["10.1.0.0/16", "fd00:1:0:7::/64"],
                Some(("fd00:1::/48", "fd00:1:0:7::/64")),
            ),
            (&["::/0"], &["10.0.0.0/8"], None),
            (&[], &["10.0.0.0/8"], None),
        ] {
            let expected = found.map(|(a, b)| (a.parse().expect("a range"), b.parse().expect("a range")));
            assert_eq!(ranges(one).overlap(&ranges(other)), expected, "{one:?} {other:?}");
        }
    }

    #[test]
    fn an_api_servers_refusal_tells_its_range() {
        let message = "Service \"x\" is invalid: spec.clusterIPs: Invalid value: [\"0.0.0.1\"]: failed to allocate IP \
                       0.0.0.1: the provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/12";
        assert_eq!(in_refusal(message), ["10.96.0.0/12".parse().expect("a range")]);
        for other in ["", "range of valid IPs is ", "The range of valid IPs is nowhere"] {
            assert_eq!(in_refusal(other), [], "{other}");
        }
    }
}
