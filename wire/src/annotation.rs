//! The annotations that make a Service global and a namespace part of the mesh, as Cilium's users know them.
//!
//! Each has its present spelling and, for Services, an older alias; the present one wins where both are set. A value that
//! means nothing is reported and replaced by a stated fallback: a typing error must neither stop an exporter nor go
//! unnoticed.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Makes a Service global.
pub const GLOBAL: &str = "service.cilium.io/global";
/// Older alias of [`GLOBAL`].
pub const GLOBAL_ALIAS: &str = "io.cilium/global-service";
/// Whether a global Service's backends may be used by other clusters.
pub const SHARED: &str = "service.cilium.io/shared";
/// Older alias of [`SHARED`].
pub const SHARED_ALIAS: &str = "io.cilium/shared-service";
/// Which backends of a global Service come first.
pub const AFFINITY: &str = "service.cilium.io/affinity";
/// Older alias of [`AFFINITY`].
pub const AFFINITY_ALIAS: &str = "io.cilium/service-affinity";
/// Whether EndpointSlices of remote backends are made for a global Service.
pub const GLOBAL_SYNC_ENDPOINT_SLICES: &str = "service.cilium.io/global-sync-endpoint-slices";
/// On a Namespace: whether its Services, endpoints and identities are part of the mesh.
pub const NAMESPACE_GLOBAL: &str = "clustermesh.cilium.io/global";

/// What a Service's annotations ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServiceAnnotations {
    /// Backends of other clusters count as its own.
    pub global: bool,
    /// Its backends may be used by other clusters; never set unless global.
    pub shared: bool,
    /// Which backends come first; `None` unless global.
    pub affinity: Affinity,
    /// Whether EndpointSlices of remote backends are made; none where the annotation is absent, so that the default
    /// (on for headless Services, off for others) applies.
    pub sync_endpoint_slices: Option<bool>,
}

impl ServiceAnnotations {
    /// Reads a Service's annotations. Always comes to a result: what means nothing is returned beside it.
    pub fn parse(annotations: &BTreeMap<String, String>) -> (Self, Vec<AnnotationError>) {
        let mut errors = Vec::new();
        let global = flag(annotations, &[GLOBAL, GLOBAL_ALIAS], false, &mut errors);
        let shared = flag(annotations, &[SHARED, SHARED_ALIAS], false, &mut errors);
        let affinity = affinity(annotations, &mut errors);
        let sync_endpoint_slices = flag(annotations, &[GLOBAL_SYNC_ENDPOINT_SLICES], false, &mut errors);
        let global = global.unwrap_or(false);
        let parsed = Self {
            global,
            shared: global && shared.unwrap_or(true),
            affinity: if global { affinity } else { Affinity::None },
            sync_endpoint_slices,
        };
        (parsed, errors)
    }
}

/// Whether a namespace's annotations make it part of the mesh; none where they do not say, so that the cluster's default
/// applies.
pub fn namespace_global(annotations: &BTreeMap<String, String>) -> (Option<bool>, Vec<AnnotationError>) {
    let mut errors = Vec::new();
    let global = flag(annotations, &[NAMESPACE_GLOBAL], false, &mut errors);
    (global, errors)
}

/// Which backends of a global Service come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Affinity {
    /// All alike.
    #[default]
    None,
    /// Those of the own cluster; others only when none of them is healthy.
    Local,
    /// Those of other clusters; own ones only when none of them is healthy.
    Remote,
}

impl fmt::Display for Affinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Local => "local",
            Self::Remote => "remote",
        })
    }
}

impl FromStr for Affinity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            _ if text.eq_ignore_ascii_case("none") || text.is_empty() => Ok(Self::None),
            _ if text.eq_ignore_ascii_case("local") => Ok(Self::Local),
            _ if text.eq_ignore_ascii_case("remote") => Ok(Self::Remote),
            other => Err(format!("{:?} is not one of none, local, remote", crate::error::bounded(other))),
        }
    }
}

/// An annotation whose value means nothing, and what is done instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("annotation {annotation}: {value:?} is not one of {allowed}; treated as {fallback:?}")]
pub struct AnnotationError {
    /// Its name, as spelled on the object.
    pub annotation: &'static str,
    /// Its value, cut to a readable length.
    pub value: String,
    /// Values that mean something.
    pub allowed: &'static str,
    /// The value it is treated as.
    pub fallback: &'static str,
}

/// The first of these annotations that is set.
fn first<'a>(
    annotations: &'a BTreeMap<String, String>,
    names: &[&'static str],
) -> Option<(&'static str, &'a str)> {
    names.iter().find_map(|name| annotations.get(*name).map(|value| (*name, value.as_str())))
}

/// Cilium compares with "true" regardless of case and takes everything else for false.
fn flag(
    annotations: &BTreeMap<String, String>,
    names: &[&'static str],
    fallback: bool,
    errors: &mut Vec<AnnotationError>,
) -> Option<bool> {
    let (annotation, value) = first(annotations, names)?;
    if value.eq_ignore_ascii_case("true") {
        return Some(true);
    }
    if !value.eq_ignore_ascii_case("false") {
        errors.push(AnnotationError {
            annotation,
            value: crate::error::bounded(value),
            allowed: "\"true\", \"false\"",
            fallback: if fallback { "true" } else { "false" },
        });
        return Some(fallback);
    }
    Some(false)
}

fn affinity(annotations: &BTreeMap<String, String>, errors: &mut Vec<AnnotationError>) -> Affinity {
    let Some((annotation, value)) = first(annotations, &[AFFINITY, AFFINITY_ALIAS]) else {
        return Affinity::None;
    };
    value.parse().unwrap_or_else(|_| {
        errors.push(AnnotationError {
            annotation,
            value: crate::error::bounded(value),
            allowed: "\"none\", \"local\", \"remote\"",
            fallback: "none",
        });
        Affinity::None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> (ServiceAnnotations, Vec<AnnotationError>) {
        let annotations = pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        ServiceAnnotations::parse(&annotations)
    }

    #[test]
    fn both_spellings_work_and_the_present_one_wins() {
        for spelling in [GLOBAL, GLOBAL_ALIAS] {
            for value in ["true", "True", "TRUE"] {
                let (parsed, errors) = parse(&[(spelling, value)]);
                assert!(parsed.global && parsed.shared && errors.is_empty(), "{spelling}={value}");
            }
        }
        assert!(!parse(&[(GLOBAL, "false"), (GLOBAL_ALIAS, "true")]).0.global);
        assert!(!parse(&[(GLOBAL, "true"), (SHARED_ALIAS, "false")]).0.shared);
        assert_eq!(parse(&[(GLOBAL, "true"), (AFFINITY_ALIAS, "Local")]).0.affinity, Affinity::Local);
        assert_eq!(parse(&[(GLOBAL, "true"), (AFFINITY, "remote")]).0.affinity, Affinity::Remote);
    }

    #[test]
    fn shared_and_affinity_mean_nothing_without_global() {
        let (parsed, errors) = parse(&[(SHARED, "true"), (AFFINITY, "local")]);
        assert_eq!(parsed, ServiceAnnotations::default());
        assert!(errors.is_empty());
    }

    #[test]
    fn a_value_that_means_nothing_is_reported_with_its_fallback() {
        let (parsed, errors) = parse(&[(GLOBAL_ALIAS, "yes"), (SHARED, "tru"), (AFFINITY, "near")]);
        assert_eq!(parsed, ServiceAnnotations::default());
        let text: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(text.len(), 3);
        assert_eq!(
            text[0],
            r#"annotation io.cilium/global-service: "yes" is not one of "true", "false"; treated as "false""#
        );
        assert!(text[2].contains(AFFINITY) && text[2].ends_with(r#"treated as "none""#));
    }

    #[test]
    fn a_namespace_says_yes_no_or_nothing() {
        let read = |value: Option<&str>| {
            namespace_global(
                &value.map(|value| (NAMESPACE_GLOBAL.to_owned(), value.to_owned())).into_iter().collect(),
            )
        };
        assert_eq!(read(None), (None, vec![]));
        assert_eq!(read(Some("TRUE")), (Some(true), vec![]));
        assert_eq!(read(Some("false")), (Some(false), vec![]));
        assert_eq!(read(Some("maybe")).1.len(), 1);
    }
}
