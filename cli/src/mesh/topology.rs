//! Who is told of whom.

use clap::ValueEnum;

use super::exchange::Reads;

/// Who reads from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConnectionMode {
    /// The source and each destination from each other
    Bidirectional,
    /// The source alone from each destination, with which it must share its CA
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
    /// And what to do with it.
    pub(crate) reads: Reads,
}

/// All that `clusters` clusters have to be told.
///
/// A cluster that is only read from is there as well: where it knows the reader, that is brought up to date.
pub(crate) fn links(clusters: usize, mode: ConnectionMode) -> Vec<Link> {
    let everybody = (0..clusters).flat_map(|told| (0..clusters).map(move |of| (told, of)));
    everybody
        .filter(|(told, of)| told != of && (mode == ConnectionMode::Mesh || *told == 0 || *of == 0))
        .map(|(told, of)| Link {
            told,
            of,
            reads: if mode == ConnectionMode::Unicast && told != 0 { Reads::AsBefore } else { Reads::Yes },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(clusters: usize, mode: ConnectionMode) -> Vec<(usize, usize, bool)> {
        links(clusters, mode).iter().map(|link| (link.told, link.of, link.reads == Reads::Yes)).collect()
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
