//! Ids of backend records.

use std::collections::{HashSet, VecDeque};

/// So many freed ids rest before one is given out again, while there are fresh ones: a connection that still
/// remembers a freed record then finds it empty rather than with another backend.
const RESTING: usize = 4096;

/// Gives out ids below a capacity. A freed id rests as long as possible.
#[derive(Debug)]
pub(super) struct BackendIds {
    capacity: u32,
    fresh: u32,
    freed: VecDeque<u32>,
}

impl BackendIds {
    /// All ids below `capacity` but those in use.
    pub(super) fn new(capacity: u32, used: &HashSet<u32>) -> Self {
        let fresh = used.iter().max().map_or(0, |highest| highest.saturating_add(1)).min(capacity);
        let freed = (0..fresh).filter(|id| !used.contains(id)).collect();
        Self { capacity, fresh, freed }
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        if self.freed.len() <= RESTING && self.fresh < self.capacity {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        self.freed.pop_front()
    }

    pub(super) fn free(&mut self, id: u32) {
        self.freed.push_back(id);
    }

    pub(super) fn in_use(&self) -> usize {
        self.fresh as usize - self.freed.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_run_out_at_the_capacity_and_come_back_when_freed() {
        let mut ids = BackendIds::new(3, &HashSet::from([1]));
        let mut given = vec![ids.take(), ids.take()];
        given.sort();
        assert_eq!(given, [Some(0), Some(2)]);
        assert_eq!(ids.take(), None);
        ids.free(1);
        assert_eq!(ids.take(), Some(1));
        assert_eq!(ids.in_use(), 3);
    }

    #[test]
    fn a_freed_id_rests_while_there_are_fresh_ones() {
        let mut ids = BackendIds::new(100_000, &HashSet::new());
        let first = ids.take().expect("an id");
        ids.free(first);
        for _ in 0..1000 {
            assert_ne!(ids.take(), Some(first));
        }
    }
}
