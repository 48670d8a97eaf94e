//! Running a test program, counting what it says, and keeping what its failures say.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::mem;
use std::ops::Add;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use anyhow::{Context, Result};

use crate::style::bad;

/// How many tests passed and failed, and which failed.
#[derive(Clone, Default)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
    pub failures: Vec<Failure>,
    /// Which failed in one run and not in the other.
    pub flaky: Vec<Failure>,
}

/// One test that failed, and what it said.
#[derive(Clone, Default)]
pub struct Failure {
    pub name: String,
    pub said: Excerpt,
}

/// The beginning and the end of a text that may be long: the cause stands first, the logs behind it end with what
/// happened last.
#[derive(Clone, Default)]
pub struct Excerpt {
    first: Vec<String>,
    last: VecDeque<String>,
    left_out: usize,
}

impl Tally {
    pub fn passed_check() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    pub fn fail(&mut self, name: String, said: Excerpt) {
        self.failed += 1;
        self.failures.push(Failure { name, said });
    }

    /// Makes one of two runs of the same tests: what failed in both has failed, what failed in one is flaky. A run that
    /// ended before its tests could is no witness: what the first run says of them stands.
    pub fn and_again(mut self, again: Self) -> Self {
        let whole = |tally: &Self| tally.failed == tally.failures.len() && tally.passed + tally.failed > 0;
        if !whole(&self) || !whole(&again) || again.passed + again.failed < self.passed + self.failed {
            return self;
        }
        let twice = |failure: &Failure| again.failures.iter().any(|other| other.name == failure.name);
        let (failed, once): (Vec<_>, Vec<_>) = mem::take(&mut self.failures).into_iter().partition(twice);
        let new = again.failures.into_iter().filter(|failure| failed.iter().all(|other| other.name != failure.name));
        self.flaky.extend(once.into_iter().chain(new));
        self.passed = again.passed + again.failed - failed.len();
        self.failed = failed.len();
        self.failures = failed;
        self
    }

    pub fn words(&self) -> String {
        let counts = format!("{} passed, {} failed", self.passed, self.failed);
        if self.flaky.is_empty() { counts } else { format!("{counts}, {} of them flaky", self.flaky.len()) }
    }
}

impl Failure {
    /// Prints what the test said, if anything.
    pub fn print(&self, title: &str) {
        let mut lines = self.said.lines().peekable();
        if lines.peek().is_some() {
            println!("\n{} {}", bad(title), self.name);
            lines.for_each(|line| println!("    {line}"));
        }
    }
}

impl Add<&Self> for Tally {
    type Output = Self;

    fn add(mut self, other: &Self) -> Self {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend_from_slice(&other.failures);
        self.flaky.extend_from_slice(&other.flaky);
        self
    }
}

impl Excerpt {
    pub fn of(text: &str) -> Self {
        let mut excerpt = Self::default();
        text.lines().for_each(|line| excerpt.add(line));
        excerpt
    }

    pub fn add(&mut self, line: &str) {
        let line = line
            .char_indices()
            .nth(LONGEST_LINE)
            .map_or_else(|| line.to_owned(), |(at, _)| format!("{}…", &line[..at]));
        if self.first.len() < FIRST_LINES {
            return self.first.push(line);
        }
        if self.last.len() == LAST_LINES {
            self.last.pop_front();
            self.left_out += 1;
        }
        self.last.push_back(line);
    }

    pub fn lines(&self) -> impl Iterator<Item = String> {
        let gap = (self.left_out > 0).then(|| format!("… {} lines are left out here …", self.left_out));
        self.first.iter().cloned().chain(gap).chain(self.last.iter().cloned())
    }
}

/// A command that counts as one test. What it prints is shown, and kept for the case that it fails.
pub fn check(command: &mut Command) -> Result<Tally> {
    let mut tally = Tally::default();
    let (status, said) = follow(command, "", |_| {})?;
    match status.success() {
        true => tally.passed = 1,
        false => tally.fail(format!("{} ended with {status}", words(command)), said),
    }
    Ok(tally)
}

/// Runs test programs, shows what they print, and adds up their results. One that ends badly without a failed test (it
/// did not build, or it crashed) counts as one failure. Each test that failed is run again by itself, at most this often:
/// one that then passes is flaky, where only a few failed.
pub fn count_tests(command: &mut Command, retries: u32) -> Result<Tally> {
    count_labelled(command, retries, "")
}

/// The same with a label before each line that is shown, where several run at the same time.
pub fn count_labelled(command: &mut Command, retries: u32, label: &str) -> Result<Tally> {
    let mut tally = count_once(command, label)?;
    if tally.failed > MOST_REPEATED || tally.failed != tally.failures.len() {
        return Ok(tally);
    }
    for _ in 0..retries {
        for failure in mem::take(&mut tally.failures) {
            println!("{label}{} {}", bad("once more:"), failure.name);
            let again = count_once(&mut only(command, &failure.name), label)?;
            if again.failed == 0 && again.passed > 0 {
                tally.passed += 1;
                tally.failed -= 1;
                tally.flaky.push(failure);
            } else {
                tally.failures.push(failure);
            }
        }
    }
    Ok(tally)
}

fn count_once(command: &mut Command, label: &str) -> Result<Tally> {
    let mut reader = TestOutput::default();
    let (status, said) = follow(command, label, |line| reader.read(line))?;
    let mut tally = reader.tally;
    if !status.success() && tally.failed == 0 {
        tally.fail(format!("{} ended with {status} and no failed test", words(command)), said);
    }
    Ok(tally)
}

/// The same programs with this test alone, whether cargo runs them (what they are to get stands behind `--`) or nobody.
fn only(command: &Command, test: &str) -> Command {
    let by_cargo = command.get_args().next().is_some_and(|verb| verb == "test");
    let mut again = Command::new(command.get_program());
    again.args(command.get_args().take_while(|argument| *argument != "--"));
    again.args(by_cargo.then_some("--")).args(["--exact", test]);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => again.env(name, value),
            None => again.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        again.current_dir(folder);
    }
    again
}

/// Runs a command to its end; what it prints is shown and, of standard error, an excerpt kept.
fn follow(command: &mut Command, label: &str, mut each: impl FnMut(&str)) -> Result<(ExitStatus, Excerpt)> {
    let about = || format!("cannot run {}", command.get_program().display());
    let about = about();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context(about)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let said = thread::scope(|scope| {
        let errors = scope.spawn(|| {
            let mut said = Excerpt::default();
            for_each_line(stderr, |line| {
                eprintln!("{label}{line}");
                said.add(line);
            })
            .map(|()| said)
        });
        for_each_line(stdout, |line| {
            println!("{label}{line}");
            each(line);
        })?;
        errors.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok((child.wait()?, said))
}

/// Whatever bytes a program prints, its lines are shown.
fn for_each_line(from: Option<impl Read>, mut each: impl FnMut(&str)) -> io::Result<()> {
    let Some(from) = from else { return Ok(()) };
    for line in BufReader::new(from).split(b'\n') {
        each(String::from_utf8_lossy(&line?).trim_end_matches('\r'));
    }
    Ok(())
}

fn words(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Reads what test programs print.
#[derive(Default)]
struct TestOutput {
    tally: Tally,
    /// The failed test whose words come now.
    speaking: Option<usize>,
}

impl TestOutput {
    /// Reads `test NAME ... FAILED`, then `---- NAME stdout ----` and what the test said, and at last
    /// `test result: ok. 3 passed; 1 failed; ...`.
    fn read(&mut self, line: &str) {
        let heading = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----"));
        if let Some(name) = heading.map(|heading| heading.strip_suffix(" stdout").unwrap_or(heading)) {
            // Of programs that have a test of one name, the last one speaks.
            self.speaking = self.tally.failures.iter().rposition(|failure| failure.name == name);
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.speaking = None;
            let words: Vec<_> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
            let before = |word: &str| {
                let at = words.iter().position(|have| *have == word)?;
                words.get(at.checked_sub(1)?)?.parse::<usize>().ok()
            };
            self.tally.passed += before("passed").unwrap_or_default();
            self.tally.failed += before("failed").unwrap_or_default();
        } else if line == "failures:" {
            self.speaking = None;
        } else if let Some(speaker) = self.speaking {
            self.tally.failures[speaker].said.add(line);
        } else if let Some((name, "FAILED")) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once("... ")) {
            self.tally.failures.push(Failure { name: name.trim().to_owned(), said: Excerpt::default() });
        }
    }
}

/// Where more fail than this, it is no accident.
const MOST_REPEATED: usize = 8;
const FIRST_LINES: usize = 20;
const LAST_LINES: usize = 40;
const LONGEST_LINE: usize = 400;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_are_added_up() {
        let mut output = TestOutput::default();
        for line in [
            "test one ... ok",
            "test two   ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.48s",
        ] {
            output.read(line);
        }
        let tally = output.tally;
        assert_eq!((tally.passed, tally.failed), (4, 1));
        assert_eq!(tally.failures.len(), 1);
        assert_eq!(tally.failures[0].name, "two");
    }

    #[test]
    fn what_failed_twice_has_failed_and_what_failed_once_is_flaky() {
        let run = |passed: usize, failed: &[&str]| {
            let mut tally = Tally { passed, ..Tally::default() };
            failed.iter().for_each(|name| tally.fail((*name).to_owned(), Excerpt::default()));
            tally
        };
        let names = |failures: &[Failure]| failures.iter().map(|failure| failure.name.clone()).collect::<Vec<_>>();
        let both = run(8, &["one", "two"]).and_again(run(8, &["two", "three"]));
        assert_eq!((both.passed, both.failed), (9, 1));
        assert_eq!(
            (names(&both.failures), names(&both.flaky)),
            (vec!["two".to_owned()], vec!["one".to_owned(), "three".to_owned()])
        );
        assert_eq!(both.words(), "9 passed, 1 failed, 2 of them flaky");
        // The second run ended before it came to the test that failed, or crashed.
        assert_eq!(run(8, &["one"]).and_again(run(5, &[])).failed, 1);
        assert_eq!(run(8, &["one"]).and_again(Tally::default()).failed, 1);
    }

    #[test]
    fn what_each_failed_test_said_is_kept() {
        let mut output = TestOutput::default();
        for line in [
            "test one ... FAILED",
            "test two ... FAILED",
            "failures:",
            "",
            "---- one stdout ----",
            "the cause of one",
            "test in its words ... FAILED",
            "---- two ----",
            "the cause of two",
            "failures:",
            "    one",
            "test result: FAILED. 0 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            output.read(line);
        }
        let said: Vec<Vec<String>> =
            output.tally.failures.iter().map(|failure| failure.said.lines().collect()).collect();
        assert_eq!(said, [vec!["the cause of one", "test in its words ... FAILED"], vec!["the cause of two"]]);
    }

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end() {
        let mut excerpt = Excerpt::default();
        (0..100).for_each(|number| excerpt.add(&number.to_string()));
        let lines: Vec<String> = excerpt.lines().collect();
        assert_eq!((lines[0].as_str(), lines[20].as_str()), ("0", "… 40 lines are left out here …"));
        assert_eq!((lines[21].as_str(), lines.len()), ("60", 61));
        let mut long = Excerpt::default();
        long.add(&"ä".repeat(500));
        assert_eq!(long.lines().next().map(|line| line.chars().count()), Some(401));
    }

    #[test]
    fn a_command_that_fails_leaves_its_last_words() {
        let tally = check(Command::new("sh").args(["-c", "echo cause >&2; exit 3"])).unwrap();
        assert_eq!(tally.failed, 1);
        assert!(tally.failures[0].said.lines().any(|line| line == "cause"));
        let tally = count_tests(Command::new("sh").args(["-c", "echo it does not build >&2; exit 3"]), 1).unwrap();
        assert_eq!(tally.failures[0].said.lines().collect::<Vec<_>>(), ["it does not build"]);
    }

    #[test]
    fn only_what_failed_is_run_again() {
        let whole = "echo test one ... ok; echo test two ... FAILED; echo test three ... FAILED\n\
                     echo test result: FAILED. 1 passed\\; 2 failed\\;; exit 1";
        let alone = r#"case "$2" in
            two) echo "test result: ok. 1 passed; 0 failed;";;
            three) echo "test three ... FAILED"; echo "test result: FAILED. 0 passed; 1 failed;"; exit 1;;
            *) exit 2;;
            esac"#;
        let script = format!("if [ $# = 0 ]; then {whole}; fi\n{alone}");
        let tally = count_tests(Command::new("sh").args(["-c", &script, "sh"]), 1).unwrap();
        assert_eq!((tally.passed, tally.failed), (2, 1));
        assert_eq!((tally.failures[0].name.as_str(), tally.flaky[0].name.as_str()), ("three", "two"));
    }

    #[test]
    fn a_test_is_run_again_as_it_was_run() {
        let mut first = Command::new("cargo");
        first.args(["test", "--test", "network", "--", "policy"]).env("SELVEDGE_TUNNEL", "hbone").env_remove("A");
        let again = only(&first, "policy::one");
        let arguments: Vec<_> = again.get_args().collect();
        assert_eq!(arguments, ["test", "--test", "network", "--", "--exact", "policy::one"]);
        assert_eq!(again.get_envs().collect::<Vec<_>>(), first.get_envs().collect::<Vec<_>>());
        let mut first = Command::new("setpriv");
        first.arg("network").current_dir("/");
        let again = only(&first, "policy::one");
        assert_eq!(again.get_args().collect::<Vec<_>>(), ["network", "--exact", "policy::one"]);
        assert_eq!(again.get_current_dir(), first.get_current_dir());
    }
}
