//! Versions that work together: those at most one minor version apart.

use super::Finding;

/// The skew that is tested and kept working, in minor versions.
const SKEW: u64 = 1;

#[derive(Debug, PartialEq, Eq)]
struct Version {
    major: u64,
    minor: u64,
}

fn parse(text: &str) -> Option<Version> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let mut parts = text.split(['.', '-', '+']);
    Some(Version { major: parts.next()?.parse().ok()?, minor: parts.next()?.parse().ok()? })
}

/// `a` and `b`: cluster name and version.
pub(super) fn of_pair(both: &[&str], a: (&str, &str), b: (&str, &str)) -> Option<Finding> {
    let said = format!("{} runs version {} and {} version {}", a.0, a.1, b.0, b.1);
    let (Some(first), Some(second)) = (parse(a.1), parse(b.1)) else {
        return (a.1 != b.1).then(|| {
            Finding::warning(
                both,
                said,
                "these versions cannot be compared; one minor version apart is kept working",
            )
        });
    };
    if first.major == second.major && first.minor.abs_diff(second.minor) <= SKEW {
        return None;
    }
    let older = if (first.major, first.minor) < (second.major, second.minor) { a.0 } else { b.0 };
    Some(Finding::error(
        both,
        format!("{said}: more than one minor version apart"),
        format!("upgrade {older} first, one minor version at a time"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_minor_version_apart_is_near_enough() {
        for (a, b, level) in [
            ("0.1.0", "0.1.0", None),
            ("0.1.0", "0.2.7", None),
            ("v0.2.0-rc.1", "0.1.0", None),
            ("0.1.0", "0.3.0", Some(true)),
            ("1.0.0", "0.9.0", Some(true)),
            ("built by hand", "built by hand", None),
            ("built by hand", "0.1.0", Some(false)),
        ] {
            let found = of_pair(&["a", "b"], ("alpha", a), ("beta", b));
            assert_eq!(found.map(|finding| finding.is_error()), level, "{a} {b}");
        }
        let finding = of_pair(&["a", "b"], ("alpha", "0.1.0"), ("beta", "0.3.0")).expect("too far");
        assert!(finding.advice.contains("upgrade alpha first"), "{}", finding.advice);
    }
}
