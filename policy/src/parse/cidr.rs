//! Addresses and prefixes.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::fields::{Fields, describe};
use super::problem::{ProblemKind, short};
use super::report::{Report, bounded};
use crate::model::{CidrSelector, Effect, Entity, Peer};

/// Most exceptions of a prefix.
const MAX_EXCEPTIONS: usize = 1000;

/// `a.b.c.d/n`, or an address alone where that is allowed. Host bits do not count.
pub(super) fn prefix(value: &Value, address_alone: bool) -> Result<IpNet, String> {
    let text = value.as_str().ok_or_else(|| format!("{} is not a text", describe(value)))?;
    if let Ok(net) = text.parse::<IpNet>() {
        return Ok(net.trunc());
    }
    match text.parse::<IpAddr>() {
        Ok(address) if address_alone => Ok(address.into()),
        _ => Err(format!("{:?} is not a prefix such as 10.1.0.0/16", short(text))),
    }
}

/// An element of `fromCIDR` or `toCIDR`.
pub(super) fn plain(path: &str, value: &Value, effect: Effect, report: &mut Report) -> Option<Peer> {
    match prefix(value, true) {
        Ok(net) => Some(Peer::Cidr(CidrSelector { net, except: Vec::new() })),
        Err(what) => {
            report.invalid(path, what, effect);
            unreadable(effect)
        }
    }
}

/// An element of `fromCIDRSet` or `toCIDRSet`, or an `ipBlock`.
pub(super) fn with_exceptions(
    path: &str,
    value: &Value,
    effect: Effect,
    report: &mut Report,
) -> Option<Peer> {
    let mut fields = match Fields::of(path, value) {
        Ok(fields) => fields,
        Err(what) => {
            report.invalid(path, what, effect);
            return unreadable(effect);
        }
    };
    for field in ["cidrGroupRef", "cidrGroupSelector"] {
        let set = fields.get(field).is_some_and(|value| value.as_str() != Some(""));
        if set {
            report.unsupported(fields.at(field), effect);
            return unreadable(effect);
        }
    }
    let net =
        match fields.get("cidr").ok_or_else(|| "it is required".to_owned()).and_then(|v| prefix(v, false)) {
            Ok(net) => net,
            Err(what) => {
                report.invalid(fields.at("cidr"), what, effect);
                return unreadable(effect);
            }
        };
    let (except, mut complete) = exceptions(&mut fields, net, effect, report);
    complete &= !report.unknown(&fields, effect);
    // With an exception less it is more than what is meant: fit to deny, not to allow.
    (complete || effect == Effect::Deny).then_some(Peer::Cidr(CidrSelector { net, except }))
}

fn exceptions(
    fields: &mut Fields<'_>,
    net: IpNet,
    effect: Effect,
    report: &mut Report,
) -> (Vec<IpNet>, bool) {
    let path = fields.at("except");
    let listed = match fields.list("except") {
        Ok(listed) => listed.unwrap_or_default(),
        Err(what) => {
            report.invalid(path, what, effect);
            return (Vec::new(), false);
        }
    };
    let (listed, mut complete) = bounded(listed, MAX_EXCEPTIONS, &path, effect, report);
    let mut except = Vec::with_capacity(listed.len());
    for (index, value) in listed.iter().enumerate() {
        let read = prefix(value, false).and_then(|inner| {
            net.contains(&inner).then_some(inner).ok_or_else(|| format!("{inner} does not lie within {net}"))
        });
        match read {
            Ok(inner) => except.push(inner),
            Err(what) => {
                report.fail(format!("{path}[{index}]"), ProblemKind::Invalid, what, effect);
                complete = false;
            }
        }
    }
    except.sort_unstable();
    except.dedup();
    (except, complete)
}

/// Whatever it was, it was about addresses outside of the mesh.
fn unreadable(effect: Effect) -> Option<Peer> {
    (effect == Effect::Deny).then_some(Peer::Entity(Entity::World))
}
