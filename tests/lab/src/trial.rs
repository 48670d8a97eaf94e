//! One real-network test: a lab of its own, and the agents' logs where it fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use libtest_mimic::{Failed, Trial};

use crate::lab::{Lab, LabOptions};

/// A test in a lab of two nodes.
pub fn trial(name: &str, body: impl FnOnce(&Lab) -> Result<()> + Send + 'static) -> Trial {
    trial_with(name, LabOptions::default(), body)
}

/// A test in a lab as described. It fails by an error, by a panic, or by taking longer than any test may.
pub fn trial_with(name: &str, options: LabOptions, body: impl FnOnce(&Lab) -> Result<()> + Send + 'static) -> Trial {
    trial_of(name, Duration::ZERO, options, body)
}

/// As [`trial_with`], of a test that is meant to take so long, and may take what any test may besides.
pub fn trial_of(
    name: &str,
    time: Duration,
    options: LabOptions,
    body: impl FnOnce(&Lab) -> Result<()> + Send + 'static,
) -> Trial {
    let bound = LONGEST + time;
    let named = name.to_owned();
    Trial::test(name, move || {
        let (sender, receiver) = mpsc::channel();
        let test = thread::Builder::new().name(named).spawn(move || {
            // Nobody listens any more where the bound below has passed.
            let _ = sender.send(run(options, body));
        });
        test.map_err(|error| Failed::from(error.to_string()))?;
        match receiver.recv_timeout(bound) {
            Ok(result) => result.map_err(Failed::from),
            Err(_) => Err(Failed::from(format!("still running after {bound:?}"))),
        }
    })
}

fn run(options: LabOptions, body: impl FnOnce(&Lab) -> Result<()>) -> Result<(), String> {
    let lab = Lab::new(options).map_err(|error| format!("cannot make the lab: {error:#}"))?;
    let failure = match catch_unwind(AssertUnwindSafe(|| body(&lab))) {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => format!("{error:#}"),
        Err(panic) => panic_message(panic.as_ref()),
    };
    Err(format!("{failure}\n{}", lab.log_tails()))
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it panicked".into())
}

const LONGEST: Duration = Duration::from_secs(240);
