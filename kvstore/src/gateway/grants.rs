//! Who may read what: the common name of a client's certificate decides (wire format, section A.7).

use std::sync::Arc;

use crate::memory::KeyRange;

/// The ranges that each client may read. A request is granted if one of its ranges covers it whole.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    client: ClientName,
    ranges: Arc<[KeyRange]>,
}

#[derive(Clone, Debug)]
enum ClientName {
    Exact(String),
    StartsWith(String),
}

impl Grants {
    /// Nobody may read anything.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The roles of a cluster's gateway:
    ///
    /// | common name | reads |
    /// |---|---|
    /// | `remote`, `remote-<any cluster>` | heartbeat, `cilium/state/`, this cluster's `cluster-config` and `synced` |
    /// | `local`, `local-<cluster>` | heartbeat, `cilium/cache/`, `cilium/cluster-config/`, `cilium/synced/` |
    /// | `agent-<cluster>` | what `local` reads, `cilium/state/` and `isthmus/` |
    /// | `admin-<cluster>` | everything |
    ///
    /// `remote` and `local` may also read the key `cilium/.has-cluster-config`, which readers up to Cilium 1.16 ask for.
    #[must_use]
    pub fn cluster_mesh(cluster: &str) -> Self {
        let heartbeat = || KeyRange::prefix("cilium/.heartbeat");
        let has_config = || KeyRange::key("cilium/.has-cluster-config");
        let remote = [
            heartbeat(),
            has_config(),
            KeyRange::prefix("cilium/state/"),
            KeyRange::key(format!("cilium/cluster-config/{cluster}")),
            KeyRange::prefix(format!("cilium/synced/{cluster}/")),
        ];
        let local = [
            heartbeat(),
            has_config(),
            KeyRange::prefix("cilium/cache/"),
            KeyRange::prefix("cilium/cluster-config/"),
            KeyRange::prefix("cilium/synced/"),
        ];
        let agent = local
            .clone()
            .into_iter()
            .chain([KeyRange::prefix("cilium/state/"), KeyRange::prefix("isthmus/")]);
        Self::none()
            .allow("remote", remote.clone())
            .allow_prefixed("remote-", remote)
            .allow("local", local.clone())
            .allow(format!("local-{cluster}"), local)
            .allow(format!("agent-{cluster}"), agent)
            .allow(format!("admin-{cluster}"), [KeyRange::all()])
    }

    /// Lets the client with exactly this common name read `ranges`, beside what it may read already.
    #[must_use]
    pub fn allow(self, common_name: impl Into<String>, ranges: impl IntoIterator<Item = KeyRange>) -> Self {
        self.rule(ClientName::Exact(common_name.into()), ranges)
    }

    /// Lets every client whose common name starts with `start`, and goes on, read `ranges`.
    #[must_use]
    pub fn allow_prefixed(
        self,
        start: impl Into<String>,
        ranges: impl IntoIterator<Item = KeyRange>,
    ) -> Self {
        self.rule(ClientName::StartsWith(start.into()), ranges)
    }

    /// What this client may read. `None` for the name is a certificate without one.
    #[must_use]
    pub fn of(&self, common_name: Option<&str>) -> ClientGrants {
        let rules =
            self.rules.iter().filter(|rule| common_name.is_some_and(|name| rule.client.matches(name)));
        ClientGrants { ranges: rules.map(|rule| rule.ranges.clone()).collect() }
    }

    fn rule(mut self, client: ClientName, ranges: impl IntoIterator<Item = KeyRange>) -> Self {
        self.rules.push(Rule { client, ranges: ranges.into_iter().collect() });
        self
    }
}

impl ClientName {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => name == exact,
            Self::StartsWith(start) => name.len() > start.len() && name.starts_with(start),
        }
    }
}

/// What one client may read.
#[derive(Clone, Debug, Default)]
pub struct ClientGrants {
    ranges: Vec<Arc<[KeyRange]>>,
}

impl ClientGrants {
    /// Whether it may read all of `range`.
    #[must_use]
    pub fn permit(&self, range: &KeyRange) -> bool {
        self.ranges.iter().flat_map(|ranges| ranges.iter()).any(|granted| granted.covers(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_read_what_cluster_mesh_grants_them_and_no_more() {
        let grants = Grants::cluster_mesh("alpha");
        let state = KeyRange::prefix("cilium/state/nodes/v1/");
        let heartbeat = KeyRange::prefix("cilium/.heartbeat");
        let own_config = KeyRange::key("cilium/cluster-config/alpha");
        let other_config = KeyRange::key("cilium/cluster-config/beta");
        let own_synced = KeyRange::prefix("cilium/synced/alpha/");
        let cache = KeyRange::prefix("cilium/cache/ip/v1/beta/");
        let services = KeyRange::prefix("isthmus/services/v1/");
        let everything = KeyRange::all();
        let table = [
            ("remote", vec![&state, &heartbeat, &own_config, &own_synced]),
            ("remote-beta", vec![&state, &heartbeat, &own_config, &own_synced]),
            ("local", vec![&heartbeat, &own_config, &other_config, &own_synced, &cache]),
            ("local-alpha", vec![&heartbeat, &own_config, &other_config, &own_synced, &cache]),
            (
                "agent-alpha",
                vec![&state, &heartbeat, &own_config, &other_config, &own_synced, &cache, &services],
            ),
            ("local-beta", vec![]),
            ("agent-beta", vec![]),
            ("admin-beta", vec![]),
            ("remote-", vec![]),
            ("", vec![]),
        ];
        let ranges =
            [&state, &heartbeat, &own_config, &other_config, &own_synced, &cache, &services, &everything];
        for (client, readable) in table {
            for range in ranges {
                let granted = grants.of(Some(client)).permit(range);
                assert_eq!(granted, readable.contains(&range), "{client} reads {range:?}");
            }
        }
        assert!(ranges.iter().all(|range| grants.of(Some("admin-alpha")).permit(range)));
        assert!(!grants.of(None).permit(&heartbeat));
        let config_of_a_namesake = KeyRange::prefix("cilium/cluster-config/alpha");
        assert!(!grants.of(Some("remote")).permit(&config_of_a_namesake));
    }
}
