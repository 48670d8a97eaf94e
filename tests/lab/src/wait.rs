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
        if let Some(answer) = probe() {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("not within {bound:?}: {what}");
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
