//! Who is told of whom.

use clap::ValueEnum;
use isthmus_crds::peer::Relation;

/// Who reads from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConnectionMode {
    /// The source and each destination from each other
    Bidirectional,
    /// The source alone from each destination, which lets it in and does not read from it
    Unicast,
    /// Every cluster from every other one
    Mesh,
}

/// A cluster that is told of another; places in the list of contexts, the source first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// Who is told.
    pub(crate) told: usize,
    /// Of whom.
    pub(crate) of: usize,
    /// What it must be to it, at least.
    pub(crate) at_least: Relation,
}

/// All that `clusters` clusters have to be told.
///
/// A cluster that is only read from is there as well: it has to let the reader in.
pub(crate) fn links(clusters: usize, mode: ConnectionMode) -> Vec<Link> {
    let everybody = (0..clusters).flat_map(|told| (0..clusters).map(move |of| (told, of)));
    everybody
        .filter(|(told, of)| told != of && (mode == ConnectionMode::Mesh || *told == 0 || *of == 0))
        .map(|(told, of)| Link {
            told,
            of,
            at_least: match mode {
                ConnectionMode::Unicast if told != 0 => Relation::Admitted,
                _ => Relation::Connected,
            },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(clusters: usize, mode: ConnectionMode) -> Vec<(usize, usize, bool)> {
        let reads = |link: &Link| link.at_least == Relation::Connected;
        links(clusters, mode).iter().map(|link| (link.told, link.of, reads(link))).collect()
    }

    #[test]
    fn each_mode_has_its_links() {
        let bidirectional = [(0, 1, true), (0, 2, true), (1, 0, true), (2, 0, true)];
        assert_eq!(pairs(3, ConnectionMode::Bidirectional), bidirectional);
        let unicast = [(0, 1, true), (0, 2, true), (1, 0, false), (2, 0, false)];
        assert_eq!(pairs(3, ConnectionMode::Unicast), unicast);
        assert_eq!(pairs(4, ConnectionMode::Mesh).len(), 12);
        assert!(pairs(4, ConnectionMode::Mesh).iter().all(|(_, _, reads)| *reads));
    }
}
