use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything that is going to happen, on a slow and busy machine too.
pub const BOUND: Duration = Duration::from_secs(30);

/// Waits until `probe` has an answer, and fails by the name of what did not happen.
pub fn eventually<T>(what: &str, bound: Duration, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + bound;
    let mut pause = Duration::from_millis(2);
    loop {
        let began = Instant::now();
        if let Some(answer) = probe() {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("not within {bound:?}: {what}");
        }
        // A probe that costs much is not to be what keeps the machine busy.
        thread::sleep(pause.max((began.elapsed() * 2).min(LONGEST_PAUSE)));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

const LONGEST_PAUSE: Duration = Duration::from_secs(1);
