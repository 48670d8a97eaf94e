//! Running a test program, and counting what it says.

use std::io::{BufRead, BufReader};
use std::ops::Add;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// How many tests passed and failed, and which failed.
#[derive(Clone, Default)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
    pub failures: Vec<String>,
}

impl Tally {
    pub fn passed_check() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    pub fn failed_check() -> Self {
        Self { failed: 1, ..Self::default() }
    }

    pub fn fail(&mut self, name: String) {
        self.failed += 1;
        self.failures.push(name);
    }
}

impl Add<&Self> for Tally {
    type Output = Self;

    fn add(mut self, other: &Self) -> Self {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend_from_slice(&other.failures);
        self
    }
}

/// Runs test programs, shows what they print, and adds up their results. One that ends badly without a failed test (it
/// did not build, or it crashed) counts as one failure.
pub fn count_tests(command: &mut Command) -> Result<Tally> {
    let about = || format!("cannot run {}", command.get_program().display());
    let about = about();
    let mut child = command.stdout(Stdio::piped()).spawn().context(about)?;
    let mut tally = Tally::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            println!("{line}");
            tally.read(&line);
        }
    }
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        tally.fail(format!("ended with {status} and no failed test: see above"));
    }
    Ok(tally)
}

impl Tally {
    /// Reads `test result: ok. 3 passed; 1 failed; ...` and `test NAME ... FAILED`.
    fn read(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let words: Vec<_> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
            let before = |word: &str| {
                let at = words.iter().position(|have| *have == word)?;
                words.get(at.checked_sub(1)?)?.parse::<usize>().ok()
            };
            self.passed += before("passed").unwrap_or_default();
            self.failed += before("failed").unwrap_or_default();
        } else if let Some((name, "FAILED")) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once("... ")) {
            self.failures.push(name.trim().to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_are_added_up() {
        let mut tally = Tally::default();
        for line in [
            "test one ... ok",
            "test two   ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.48s",
        ] {
            tally.read(line);
        }
        assert_eq!((tally.passed, tally.failed), (4, 1));
        assert_eq!(tally.failures, ["two"]);
    }
}
