//! The command line, with the real binary: what it says, and what it exits with.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Result;
use tempfile::TempDir;

#[test]
fn help_names_every_verb_and_every_flag_of_the_agent_has_an_environment_variable() {
    let help = selvedge(&["--help"]);
    assert_eq!(help.code, 0);
    let verbs = [
        "agent",
        "controller",
        "waypoint",
        "validate",
        "explain",
        "check",
        "status",
        "workloads",
        "capture",
        "cni",
        "cni-install",
        "certificate",
        "rotate-root",
        "crd",
        "uninstall",
    ];
    for verb in verbs {
        assert!(help.out.contains(&format!("\n  {verb} ")), "{verb} is not in\n{}", help.out);
        let help = selvedge(&[verb, "--help"]);
        assert_eq!(help.code, 0);
        assert!(help.out.contains("Usage: selvedge"), "{}", help.out);
    }
    let help = selvedge(&["agent", "--help"]).out;
    let paragraphs: Vec<&str> = help.split("\n      --").skip(1).collect();
    assert!(paragraphs.len() > 15, "{help}");
    for paragraph in paragraphs {
        let flag = paragraph.split_whitespace().next().unwrap();
        let said = paragraph.lines().nth(1).unwrap().trim();
        assert!(said.starts_with(|c: char| c.is_uppercase()), "--{flag} says {said:?}");
        let about_it = ["help", "version"].contains(&flag);
        assert!(about_it || paragraph.contains("[env: SELVEDGE_"), "--{flag} has no environment variable");
    }
    assert!(help.lines().all(|line| line.len() <= 100), "lines too long for a terminal:\n{help}");
}

#[test]
fn as_a_plugin_of_kubectl_it_speaks_of_itself_as_it_was_called() {
    let called = |arguments: &[&str]| {
        let mut selvedge = Selvedge::new();
        selvedge.0.arg0("/usr/local/bin/kubectl-selvedge").args(arguments);
        selvedge.run()
    };
    let help = called(&["--help"]);
    assert!(help.code == 0 && help.out.contains("Usage: kubectl selvedge <COMMAND>"), "{}", help.out);
    let help = called(&["capture", "show", "--help"]);
    assert!(help.out.contains("Usage: kubectl selvedge capture show"), "{}", help.out);
    let wrong = called(&["status", "--nosuch"]);
    assert!(wrong.code == 2 && wrong.err.contains("Usage: kubectl selvedge status"), "{}", wrong.err);
    let incomplete = called(&["explain"]);
    assert!(incomplete.code == 2 && incomplete.err.contains("Usage: kubectl selvedge explain"), "{}", incomplete.err);
}

#[test]
fn the_documentation_of_the_verbs_names_no_flag_that_is_not_there() {
    let verbs = [
        &["agent"][..],
        &["controller"],
        &["validate"],
        &["explain"],
        &["capture", "show"],
        &["certificate"],
        &["rotate-root"],
        &["crd"],
    ];
    let known: BTreeSet<String> =
        verbs.iter().flat_map(|verb| flags_in(&selvedge(&[verb, &["--help"][..]].concat()).out)).collect();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    for page in ["how-it-works.md", "identity.md", "metrics.md", "standalone.md", "troubleshooting.md"] {
        for line in fs::read_to_string(docs.join(page)).unwrap().lines().filter(|line| !foreign(line)) {
            for flag in flags_in(line) {
                assert!(known.contains(&flag), "docs/{page} speaks of {flag}: {line}");
            }
        }
    }
}

/// Lines that show the flags of other programs.
fn foreign(line: &str) -> bool {
    line.contains("cargo") || line.contains("kubectl ")
}

#[test]
fn what_makes_no_sense_exits_2_and_says_what_would() {
    for (arguments, words) in [
        (&["agent"][..], &["--node <NAME>"][..]),
        (&["agent", "--nod", "a"], &["--nod", "--node"]),
        (&["agent", "--node", "", "--manifests", "."], &["--node is empty", "spec.nodeName"]),
        (&["agent", "--node", "a", "--manifests", ".", "--log", "loud"], &["\"loud\"", "debug"]),
        (&["agent", "--node", "a", "--manifests", ".", "--drain", "5"], &["\"5\"", "--drain", "30s"]),
        (&["agent", "--node", "a", "--manifests", ".", "--certificate-lifetime", "0s"], &["0s", "at least 1s"]),
        (&["agent", "--node", "a", "--manifests", ".", "--trust-domain", "A!"], &["A!", "lower-case"]),
        (&["agent", "--node", "a", "--manifests", ".", "--capture", "ebpf"], &["ebpf", "tproxy, redirect"]),
        (&["validate"], &["<DIR>"]),
        (&["explain", "--manifests", ".", "shop", "1.2.3.4"], &["\"shop\"", "namespace/name"]),
        (&["explain", "--manifests", ".", "node/a/b", "1.2.3.4"], &["\"node\"", "neither pod nor service"]),
        (&["weave"], &["weave", "--help"]),
    ] {
        let said = selvedge(arguments);
        assert_eq!(said.code, 2, "{arguments:?}: {}", said.err);
        for word in words {
            assert!(said.err.contains(word), "{arguments:?} does not say {word:?}:\n{}", said.err);
        }
    }
}

#[test]
fn a_reader_that_has_seen_enough_ends_every_verb_quietly() -> Result<()> {
    let dir = TempDir::new()?;
    let pod = |at: u16| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p-{at}}}\nstatus: {{podIP: 10.0.{}.{}}}\n",
            at / 250,
            at % 250 + 1
        )
    };
    // More than a pipe holds, so that the reader is gone while the verb still writes.
    let broken = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: A}\n".repeat(2_000);
    fs::write(dir.path().join("a.yaml"), (0..2_000).map(pod).collect::<String>() + &broken)?;
    let manifests = dir.path().to_str().unwrap();
    let explain = ["explain", "--manifests", manifests, "default/p-1", "default/p-2", "--port", "80"];
    for arguments in [
        &["validate", manifests][..],
        &["validate", manifests, "-o", "json"],
        &explain,
        &[&explain[..], &["-o", "json"]].concat(),
        &["crd"],
        &["capture", "show", "--netns", "/proc/self/ns/net"],
        &["--help"],
        &["agent", "--help"],
        &["--version"],
        &["validate", "/nowhere"],
    ] {
        for reads in [0, 1] {
            let (mut out, into) = io::pipe()?;
            let errors = tempfile::tempfile()?;
            let mut selvedge = Selvedge::new();
            selvedge.0.args(arguments).stdout(into).stderr(errors.try_clone()?);
            let mut child = selvedge.0.spawn()?;
            // Its end of the pipe goes with it.
            drop(selvedge);
            out.read_exact(&mut vec![0; reads]).or(Ok::<_, io::Error>(()))?;
            drop(out);
            let ended = child.wait()?.code();
            (&errors).rewind()?;
            let said = io::read_to_string(errors)?;
            assert!(!said.contains("panicked"), "{arguments:?}: {said}");
            assert!([Some(0), Some(1), Some(141)].contains(&ended), "{arguments:?} ended with {ended:?}: {said}");
        }
        // Nobody reads either of the two.
        let (none, into) = io::pipe()?;
        drop(none);
        let mut selvedge = Selvedge::new();
        selvedge.0.args(arguments).stdout(into.try_clone()?).stderr(into);
        let ended = selvedge.0.status()?;
        assert!(ended.code().is_some_and(|code| code != 101), "{arguments:?} ended with {ended}");
    }
    let mut full = Selvedge::new();
    full.0.args(["crd"]).stdout(fs::File::create("/dev/full")?);
    let said = full.run_with_errors();
    assert_eq!(said.code, 1);
    assert!(said.err.contains("standard output cannot be written: No space left"), "{}", said.err);
    Ok(())
}

#[test]
fn what_a_person_must_mend_ends_the_agent_with_78_at_once() -> Result<()> {
    let (dir, full, open, empty) = (TempDir::new()?, TempDir::new()?, TempDir::new()?, TempDir::new()?);
    fs::write(full.path().join("ca.crt"), "junk")?;
    for name in ["ca.crt", "ca.key"] {
        fs::write(open.path().join(name), "junk")?;
    }
    fs::set_permissions(open.path().join("ca.key"), fs::Permissions::from_mode(0o644))?;
    let (nowhere, no_folder) = (dir.path().join("nowhere"), dir.path().join("no.folder/ca"));
    fs::write(dir.path().join("no.folder"), "")?;
    for (manifests, ca, words) in [
        (nowhere.as_path(), empty.path(), &["nowhere: the folder of manifests cannot be read", "make it"][..]),
        (dir.path(), no_folder.as_path(), &["no.folder/ca: Not a directory", "Create it"]),
        (dir.path(), full.path(), &["ca.key: it is missing", "Restore the key"]),
        (dir.path(), open.path(), &["ca.key: its mode is 644", "chmod 600"]),
    ] {
        let said = agent(manifests, ca).run();
        assert_eq!(said.code, 78, "{}", said.err);
        let last = said.err.lines().last().unwrap_or_default();
        assert!(last.starts_with("selvedge: "), "{}", said.err);
        for word in words {
            assert!(last.contains(word), "{word:?} is not in {last}");
        }
        assert!(!said.err.contains("started again"), "it was started again in vain:\n{}", said.err);
    }
    assert_eq!(fs::read_dir(empty.path())?.count(), 0, "a CA was made for an agent that cannot run");
    Ok(())
}

#[test]
fn an_agent_without_capabilities_says_what_it_lacks() -> Result<()> {
    let (manifests, ca) = (TempDir::new()?, TempDir::new()?);
    let mut agent = agent(manifests.path(), ca.path());
    // SAFETY: runs between fork and exec, and makes system calls only.
    unsafe {
        agent.0.pre_exec(|| {
            // What is not in the bounding set no exec gives back. Refused where we have no capabilities to begin with.
            for capability in 0..=MOST_CAPABILITIES {
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
            Ok(())
        });
    }
    let said = agent.run();
    assert_eq!(said.code, 78, "{}", said.err);
    assert!(said.err.contains("capture works in no way on this node"), "{}", said.err);
    assert!(said.err.contains("run as root") && said.err.contains("install iptables"), "{}", said.err);
    Ok(())
}

#[test]
fn validate_says_what_is_wrong_and_exits_1() -> Result<()> {
    let dir = TempDir::new()?;
    let file = dir.path().join("pods.yaml");
    fs::write(
        &file,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: b}\nstatus:\n  podIPs: [{ip: 10.0.0.1}]\n",
    )?;
    let path = dir.path().to_str().unwrap();
    let good = selvedge(&["validate", path]);
    assert_eq!(good.code, 0, "{}{}", good.out, good.err);
    assert!(good.out.contains("1 objects, 0 of other kinds passed over, nothing to object to"), "{}", good.out);
    let report: serde_json::Value = serde_json::from_str(&selvedge(&["validate", path, "-o", "json"]).out)?;
    assert_eq!(report, serde_json::json!({"valid": true, "objects": 1, "ignored": 0, "problems": []}));

    fs::write(
        &file,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: b}\nstatus:\n  podIPs: [{ip: 10.0.0}]\n",
    )?;
    let bad = selvedge(&["validate", path]);
    assert_eq!(bad.code, 1);
    assert!(bad.out.contains("pods.yaml:5: Pod b/a: status.podIPs[0].ip: "), "{}", bad.out);
    assert!(bad.out.contains("such as 10.0.1.2"), "no cure: {}", bad.out);
    let bad = selvedge(&["validate", path, "-o", "json"]);
    assert_eq!(bad.code, 1);
    let report: serde_json::Value = serde_json::from_str(&bad.out)?;
    let problem = &report["problems"][0];
    assert_eq!((&report["valid"], &problem["line"]), (&false.into(), &5.into()), "{report}");
    assert_eq!((&problem["object"], &problem["field"]), (&"Pod b/a".into(), &"status.podIPs[0].ip".into()), "{report}");

    let missing = selvedge(&["validate", "/nowhere"]);
    assert_eq!(missing.code, 1);
    assert!(missing.err.contains("/nowhere") && missing.err.contains("make it, or name another"), "{}", missing.err);
    Ok(())
}

#[test]
fn crd_prints_the_files_that_are_checked_in() -> Result<()> {
    let checked_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("crd");
    let written = TempDir::new()?;
    assert_eq!(selvedge(&["crd", "--out", written.path().to_str().unwrap()]).code, 0);
    let printed = selvedge(&["crd"]).out;
    let mut files = 0;
    for entry in fs::read_dir(&checked_in)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        assert_eq!(fs::read_to_string(written.path().join(path.file_name().unwrap()))?, text, "{}", path.display());
        assert!(printed.contains(text.trim()), "{} is not printed", path.display());
        files += 1;
    }
    assert!(files > 0 && fs::read_dir(written.path())?.count() == files);
    Ok(())
}

#[test]
fn capture_show_without_an_agent_says_where_to_run_it() {
    // Nothing listens on the port of TCP's own number: reserved, and never given out.
    let said = selvedge(&["capture", "show", "--admin-port", "1"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("127.0.0.1:1") && said.err.contains("--netns"), "{}", said.err);
}

/// What a run of the binary said.
struct Said {
    code: i32,
    out: String,
    err: String,
}

struct Selvedge(Command);

impl Selvedge {
    fn new() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SELVEDGE_")) {
            command.env_remove(name);
        }
        Self(command)
    }

    fn run_with_errors(mut self) -> Said {
        let output = self.0.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Said { code: output.status.code().unwrap(), out: String::new(), err: text(output.stderr) }
    }

    fn run(mut self) -> Said {
        let output = self.0.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Said { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }
}

fn selvedge(arguments: &[&str]) -> Said {
    let mut selvedge = Selvedge::new();
    selvedge.0.args(arguments);
    selvedge.run()
}

/// An agent that ends before it touches anything of this machine.
fn agent(manifests: &Path, ca: &Path) -> Selvedge {
    let mut selvedge = Selvedge::new();
    selvedge.0.args(["agent", "--node", "one", "--manifests"]).arg(manifests).arg("--ca-dir").arg(ca);
    selvedge
}

fn flags_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c == '-'));
    words.filter(|word| word.starts_with("--") && word.len() > 3 && !word.ends_with('-')).map(str::to_owned).collect()
}

/// More than any kernel has: the rest is refused, and that is all.
const MOST_CAPABILITIES: i32 = 63;
