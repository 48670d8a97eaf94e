//! Running the suite, and counting its tests by what it prints.
//!
//! The suite's own report is no witness: it leaves out the tests of features that belong to no profile for meshes, and
//! counts none that it never ran. So every test is awaited by its name, and passes when it says so.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::style::{dim, mark};
use crate::test::{Excerpt, Tally};

/// One run of the suite.
pub struct Run<'a> {
    pub program: &'a Path,
    pub kubeconfig: &'a Path,
    /// On the namespaces of its application.
    pub annotations: &'a [(&'a str, &'a str)],
    /// What a test's name must contain.
    pub filter: &'a str,
    /// Whether the application stays.
    pub keep: bool,
    /// Where report and output go.
    pub folder: &'a Path,
}

impl Run<'_> {
    /// Runs it, shows each test as it ends, and counts.
    pub fn run(&self) -> Result<Tally> {
        let awaited: Vec<_> = TESTS.into_iter().filter(|name| name.contains(self.filter)).collect();
        ensure!(!awaited.is_empty(), "no test's name contains {:?}; there are {}", self.filter, TESTS.join(", "));
        let path = self.folder.join("output.log");
        let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut child = self.command(&awaited).stdout(Stdio::piped()).stderr(log.try_clone()?).spawn();
        let child =
            child.as_mut().map_err(|error| anyhow::anyhow!("cannot run {}: {error}", self.program.display()))?;
        let mut output = Output::default();
        let lines = BufReader::new(child.stdout.take().context("no standard output")?);
        for line in lines.split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            writeln!(&log, "{line}")?;
            if let Some(ended) = output.read(&line) {
                println!("  {} {} {}", mark(ended.passed()), ended.name, dim(ended.words()));
            }
        }
        let status = child.wait()?;
        let tally = output.count(&awaited, status.success());
        println!("{}", dim(format!("output and report are in {}", self.folder.display())));
        Ok(tally)
    }

    fn command(&self, awaited: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        let annotations: Vec<_> = self.annotations.iter().map(|(key, value)| format!("{key}={value}")).collect();
        command
            .env("KUBECONFIG", self.kubeconfig)
            .current_dir(self.folder)
            // The form for programs: each line's test is told, and each result at once.
            .arg("-test.v=test2json")
            .arg(format!("-conformance-profiles={}", PROFILES.join(",")))
            .arg(format!("-supported-features={}", FEATURES.join(",")))
            .arg(format!("-namespace-annotations={}", annotations.join(",")))
            .arg(format!("-cleanup-base-resources={}", !self.keep))
            .arg(format!("-report-output={}", self.folder.join("report.yaml").display()))
            .args(["-organization=selvedge", "-project=selvedge"])
            .arg(format!("-url={HOME}"))
            .arg(format!("-contact={HOME}"))
            .arg(format!("-version=v{}", env!("CARGO_PKG_VERSION")));
        // The package has tests of its own options too, which are not about meshes.
        let cases = if awaited.len() < TESTS.len() { format!("/^({})$", awaited.join("|")) } else { String::new() };
        command.arg(format!("-test.run=^{ROOT}${cases}"));
        command
    }
}

/// What the suite said so far.
#[derive(Default)]
struct Output {
    began: BTreeMap<String, Instant>,
    ended: BTreeMap<String, Ended>,
    said: BTreeMap<String, Excerpt>,
    /// The test whose words come now: of a mesh by its name, any other and the suite itself by none.
    speaking: String,
}

/// A test that has come to its end.
#[derive(Clone)]
struct Ended {
    name: String,
    verdict: String,
    /// Go's own figure leaves out cases that ran side by side.
    took: Duration,
}

impl Ended {
    /// A test that was skipped showed nothing.
    fn passed(&self) -> bool {
        self.verdict == "PASS"
    }

    fn words(&self) -> String {
        if self.verdict == "SKIP" { "skipped".to_owned() } else { format!("{:.1} s", self.took.as_secs_f64()) }
    }
}

impl Output {
    /// Reads one line of Go's `-test.v=test2json`. Lines of the test runner begin with a SYN byte:
    /// `=== RUN   TestConformance/MeshBasic/case`, `=== NAME  ...`, `--- PASS: TestConformance/MeshBasic (0.20s)`.
    fn read(&mut self, line: &str) -> Option<Ended> {
        // Words that end no line have the runner's own behind them.
        let (words, event) = line.split_once(MARK).unwrap_or((line, ""));
        if !words.is_empty() {
            self.said.entry(self.speaking.clone()).or_default().add(words);
        }
        if let Some(turn) = event.strip_prefix("=== ") {
            let path = turn.split_whitespace().nth(1).unwrap_or_default();
            self.speaking = of_mesh(path).map(|(name, _)| name.to_owned()).unwrap_or_default();
            self.began.entry(self.speaking.clone()).or_insert_with(Instant::now);
            return None;
        }
        let (verdict, rest) = event.strip_prefix("--- ")?.split_once(": ")?;
        let (name, case) = of_mesh(rest.split(' ').next()?)?;
        if !case.is_empty() {
            self.said.entry(name.to_owned()).or_default().add(event);
            return None;
        }
        let took = self.began.get(name).map(Instant::elapsed).unwrap_or_default();
        let ended = Ended { name: name.to_owned(), verdict: verdict.to_owned(), took };
        self.ended.insert(name.to_owned(), ended.clone());
        Some(ended)
    }

    /// One result for each awaited test, and one more where the suite failed before or beside them.
    fn count(mut self, awaited: &[&str], succeeded: bool) -> Tally {
        let mut tally = Tally::default();
        let nothing_ran = self.ended.is_empty();
        for name in awaited {
            let said = self.said.remove(*name).unwrap_or_default();
            match self.ended.remove(*name) {
                Some(ended) if ended.passed() => tally.passed += 1,
                Some(ended) if ended.verdict == "SKIP" => tally.fail(format!("{name} was skipped"), said),
                Some(_) => tally.fail((*name).to_owned(), said),
                None => tally.fail(format!("{name} was not run"), said),
            }
        }
        // A later suite may have tests that this page does not know.
        for ended in self.ended.into_values() {
            let said = self.said.remove(&ended.name).unwrap_or_default();
            tally.fail(format!("{} is not among the tests that are awaited", ended.name), said);
        }
        if nothing_ran || !succeeded && tally.failed == 0 {
            tally.fail("the suite itself".to_owned(), self.said.remove("").unwrap_or_default());
        }
        tally
    }
}

/// The test for meshes that a path of Go's belongs to, and the case within it.
fn of_mesh(path: &str) -> Option<(&str, &str)> {
    let path = path.strip_prefix(ROOT)?.strip_prefix('/')?;
    let (name, case) = path.split_once('/').unwrap_or((path, ""));
    name.starts_with("Mesh").then_some((name, case))
}

const ROOT: &str = "TestConformance";
const MARK: char = '\u{16}';
const HOME: &str = "https://selvedge.dev";
const PROFILES: [&str; 2] = ["MESH-HTTP", "MESH-GRPC"];

/// The features beyond the profiles' core. The last five belong to no profile for meshes, and seven tests need them.
const FEATURES: [&str; 14] = [
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
];

/// Every test that the suite has for meshes.
const TESTS: [&str; 22] = [
    "MeshBasic",
    "MeshConsumerRoute",
    "MeshFrontend",
    "MeshFrontendHostname",
    "MeshGRPCRouteWeight",
    "MeshHTTPRoute303Redirect",
    "MeshHTTPRoute307Redirect",
    "MeshHTTPRoute308Redirect",
    "MeshHTTPRouteBackendRequestHeaderModifier",
    "MeshHTTPRouteMatching",
    "MeshHTTPRouteNamedRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectHostAndStatus",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRequestHeaderModifier",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "MeshHTTPRouteSimpleSameNamespace",
    "MeshHTTPRouteWeight",
    "MeshPorts",
    "MeshTrafficSplit",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_passes_when_it_says_so_and_not_else() {
        let mut output = Output::default();
        for line in [
            "\u{16}=== RUN   TestConformance",
            "setting up",
            "\u{16}=== RUN   TestConformance/GatewayBasic",
            "\u{16}--- SKIP: TestConformance/GatewayBasic (0.00s)",
            "\u{16}=== RUN   TestConformance/MeshBasic",
            "\u{16}=== RUN   TestConformance/MeshBasic/a_case",
            "\u{16}--- PASS: TestConformance/MeshBasic/a_case (0.10s)",
            "\u{16}--- PASS: TestConformance/MeshBasic (0.20s)",
            "\u{16}=== RUN   TestConformance/MeshPorts",
            "\u{16}=== RUN   TestConformance/MeshPorts/a_case",
            "no header",
            "half a line\u{16}--- FAIL: TestConformance/MeshPorts/a_case (30.00s)",
            "\u{16}=== NAME  TestConformance/MeshPorts",
            "its own words",
            "\u{16}--- FAIL: TestConformance/MeshPorts (30.10s)",
            "\u{16}=== RUN   TestConformance/MeshFrontend",
            "\u{16}--- SKIP: TestConformance/MeshFrontend (0.00s)",
            "\u{16}--- PASS: TestConformance/MeshOfTomorrow (0.00s)",
            "\u{16}=== NAME  TestConformance",
            "\u{16}--- FAIL: TestConformance (40.00s)",
        ] {
            output.read(line);
        }
        let tally = output.count(&["MeshBasic", "MeshPorts", "MeshFrontend", "MeshTrafficSplit"], false);
        assert_eq!((tally.passed, tally.failed), (1, 4));
        let names: Vec<_> = tally.failures.iter().map(|failure| failure.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "MeshPorts",
                "MeshFrontend was skipped",
                "MeshTrafficSplit was not run",
                "MeshOfTomorrow is not among the tests that are awaited"
            ]
        );
        let said: Vec<_> = tally.failures[0].said.lines().collect();
        assert_eq!(
            said,
            ["no header", "half a line", "--- FAIL: TestConformance/MeshPorts/a_case (30.00s)", "its own words"]
        );
    }

    #[test]
    fn a_suite_that_ran_nothing_has_failed() {
        let mut output = Output::default();
        output.read("error loading Kubernetes config");
        let tally = output.count(&["MeshBasic"], true);
        assert_eq!((tally.passed, tally.failed), (0, 2));
        assert_eq!(tally.failures[1].said.lines().collect::<Vec<_>>(), ["error loading Kubernetes config"]);
    }

    #[test]
    fn no_test_is_awaited_twice() {
        assert!(TESTS.is_sorted_by(|one, other| one < other));
    }
}
