use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a line of the log through once a second, for events that may come by the thousand.
#[derive(Debug)]
pub struct Seldom(Mutex<State>);

#[derive(Debug)]
struct State {
    spoke: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    pub const fn new() -> Self {
        Self(Mutex::new(State { spoke: None, left_out: 0 }))
    }

    /// Whether to speak now, and how often nothing was said since the last time.
    pub fn speaks(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.spoke.is_some_and(|spoke| now.saturating_duration_since(spoke) < PAUSE) {
            state.left_out += 1;
            return None;
        }
        state.spoke = Some(now);
        Some(std::mem::take(&mut state.left_out))
    }
}

impl Default for Seldom {
    fn default() -> Self {
        Self::new()
    }
}

const PAUSE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_tells_how_many_it_stands_for() {
        let (seldom, start) = (Seldom::new(), Instant::now());
        assert_eq!(seldom.speaks(start), Some(0));
        for milliseconds in [0, 1, 999] {
            assert_eq!(seldom.speaks(start + Duration::from_millis(milliseconds)), None);
        }
        assert_eq!(seldom.speaks(start + PAUSE), Some(3));
        assert_eq!(seldom.speaks(start + PAUSE * 2), Some(0));
    }
}
