//! How often a ClusterPeer may be written: at once when something changes, but a peer that changes all the time, as a hostile one
//! can, makes us write no more than ten times a minute.

use std::time::Duration;

use tokio::time::Instant;

/// Writes in a row that need not wait for [`REFILL`].
const BURST: u32 = 10;
/// The time after which one more is allowed.
const REFILL: Duration = Duration::from_secs(6);
/// Between two writes at least: changes that come together are written together.
const GAP: Duration = Duration::from_secs(1);
/// Between two writes that only bring counts and texts up to date.
const DETAILS: Duration = Duration::from_secs(10);
/// Between two writes of which nothing is news: what the data's age is known by.
const REFRESH: Duration = Duration::from_secs(60);

/// What a write would bring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum News {
    /// Another status or reason of a condition, another endpoint: what somebody may wait for.
    Important,
    /// Other counts, another text.
    Detail,
    /// Nothing but times.
    None,
}

/// When one ClusterPeer was written, and when it may be again.
#[derive(Debug)]
pub(super) struct Pace {
    written: Option<Instant>,
    allowed: u32,
    /// Since when the next refill counts.
    refilled: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { written: None, allowed: BURST, refilled: now }
    }

    /// When `news` may be written, which may be in the past.
    pub(super) fn due(&self, news: News) -> Instant {
        let Some(written) = self.written else { return self.refilled };
        let refill = if self.allowed > 0 { written } else { self.refilled + REFILL };
        match news {
            News::Important => (written + GAP).max(refill),
            News::Detail => (written + DETAILS).max(refill),
            News::None => written + REFRESH,
        }
    }

    pub(super) fn written(&mut self, now: Instant) {
        while self.allowed < BURST && self.refilled + REFILL <= now {
            self.allowed += 1;
            self.refilled += REFILL;
        }
        if self.allowed == BURST {
            self.refilled = now;
        }
        self.allowed = self.allowed.saturating_sub(1);
        self.written = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many writes there are within `time` if there is always `news`.
    fn writes(news: News, time: Duration) -> usize {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        let mut count = 0;
        let mut now = begin;
        loop {
            now = now.max(pace.due(news));
            if now > begin + time {
                return count;
            }
            pace.written(now);
            count += 1;
        }
    }

    #[test]
    fn the_first_is_written_at_once_and_a_few_more_a_second_apart() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert!(pace.due(News::None) <= now);
        pace.written(now);
        assert_eq!(pace.due(News::Important), now + GAP);
        assert_eq!(pace.due(News::Detail), now + DETAILS);
        assert_eq!(pace.due(News::None), now + REFRESH);
        assert_eq!(writes(News::Important, Duration::from_secs(5)), 6);
    }

    #[test]
    fn who_changes_all_the_time_is_written_ten_times_a_minute() {
        let hour = writes(News::Important, Duration::from_secs(3600));
        assert!((600..=611).contains(&hour), "{hour}");
        let hour = writes(News::None, Duration::from_secs(3600));
        assert!((60..=61).contains(&hour), "{hour}");
    }

    #[test]
    fn peace_gives_the_burst_back_and_no_more() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        for second in 0..BURST {
            pace.written(begin + GAP * second);
        }
        let late = begin + Duration::from_secs(100_000);
        pace.written(late);
        assert_eq!(pace.allowed, BURST - 1);
        assert_eq!(pace.due(News::Important), late + GAP);
    }
}
