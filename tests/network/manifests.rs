//! The watched folder: what is saved takes effect soon, and what looks saved for a moment changes nothing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};
use serde_json::{Value, json};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("manifests::a_save_takes_effect_whichever_the_editor", lab(), whichever_the_editor),
        trial_with("manifests::what_is_half_written_deletes_nothing", lab(), what_is_half_written_deletes_nothing),
        trial_with("manifests::a_bad_object_is_refused_by_name_and_alone", lab(), a_bad_object_is_refused),
        trial_with("manifests::a_policy_that_never_was_good_denies", lab(), a_policy_that_never_was_good_denies),
    ]
}

fn whichever_the_editor(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let _echo = shop.cart.serve_echo(7000)?;
    let file = lab.manifests().join("gate.yaml");
    let ways: [(&str, Save); 5] = [
        ("a rename over it", rename_over),
        ("truncate and write", truncate_and_write),
        ("delete and create", delete_and_create),
        ("move away, write anew, delete the old one", move_away_and_write),
        ("a symbolic link swapped", swap_symlink),
    ];
    for (way, save) in ways {
        save(&file, &deny("nobody")).with_context(|| way.to_owned())?;
        eventually(&format!("{way}: web comes in again"), BOUND, || shop.dial().ok())?;
        let mut live = shop.dial()?;
        let saved = Instant::now();
        save(&file, &deny("web")).with_context(|| way.to_owned())?;
        reset(&mut live).with_context(|| format!("{way}: a connection that is no longer allowed"))?;
        let took = saved.elapsed();
        // A second, on a machine that has time for us.
        ensure!(took < Duration::from_secs(5), "{way}: a save took effect after {took:?}");
        ensure!(shop.dial().is_err(), "{way}: web still comes in");
    }
    Ok(())
}

fn what_is_half_written_deletes_nothing(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    lab.write("gate.yaml", &deny("thief"))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _echo = shop.cart.serve_echo(7000)?;
    let mut live = shop.dial()?;
    ensure!(shop.steal().is_err());
    let gate = lab.manifests().join("gate.yaml");
    let cart = lab.manifests().join("pod-shop-cart.yaml");
    let (gate_text, cart_text) = (fs::read_to_string(&gate)?, fs::read_to_string(&cart)?);
    let mut judged = 0;
    // An editor's pause, as long as it may be; where this machine made a longer one of it, that round tells nothing.
    for round in 0..100 {
        if judged == 6 {
            break;
        }
        let began = Instant::now();
        for (file, text) in [(&gate, &gate_text), (&cart, &cart_text)] {
            let cut = [0, text.len() / 2, text.len() * 3 / 4][round % 3];
            fs::write(file, &text[..cut])?;
        }
        thread::sleep(Duration::from_millis(150));
        let stolen = shop.steal();
        let echoed = echo(&mut live);
        let took = began.elapsed();
        fs::write(&gate, &gate_text)?;
        fs::write(&cart, &cart_text)?;
        if took < Duration::from_millis(350) {
            judged += 1;
            ensure!(stolen.is_err(), "the policy was gone for a moment, in round {round}");
            echoed.with_context(|| format!("the live connection in round {round}"))?;
        } else if echoed.is_err() {
            live = eventually("cart is back", BOUND, || shop.dial().ok())?;
        }
    }
    ensure!(judged > 0, "this machine is too slow to tell");
    ensure!(shop.steal().is_err());
    eventually("nothing is wrong in the end", BOUND, || {
        let fine = |agent: &selvedge_lab::Agent| agent.dump().is_ok_and(|dump| dump["manifestProblems"] == json!([]));
        agents.iter().all(fine).then_some(())
    })
}

fn a_bad_object_is_refused(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    lab.write("gate.yaml", &deny("thief"))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _echo = shop.cart.serve_echo(7000)?;
    let mut live = shop.dial()?;
    ensure!(shop.steal().is_err());

    // Three documents in one file: a policy broken, a pod broken that is new, and a policy that is good.
    let broken = deny("thief").replace("action: DENY", "action: DENIE");
    let good = deny("web").replace("name: gate", "name: second").replace("shop/web", "shop/other");
    let text = format!("{broken}---\n{BROKEN_POD}---\n{good}");
    lab.write("gate.yaml", &text)?;
    for agent in &agents {
        let dump = eventually("both problems are told", BOUND, || {
            let dump = agent.dump().ok()?;
            (dump["manifestProblems"].as_array()?.len() == 2).then_some(dump)
        })?;
        let problems = &dump["manifestProblems"];
        tells(&problems[0], &text, "action: DENIE", "AuthorizationPolicy shop/gate", "spec.action")?;
        tells(&problems[1], &text, "10.0.0", "Pod shop/broken", "status.podIPs[0].ip")?;
        let names: Vec<_> = dump["policies"].as_array().into_iter().flatten().map(|policy| &policy["name"]).collect();
        ensure!(names.len() == 2, "the last good version and the other one are in force: {names:?}");
        eventually("the metric tells", BOUND, || {
            (agent.metrics().ok()?.sum("selvedge_manifest_problems", &[]) == 2.0).then_some(())
        })?;
        let log = agent.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("not in force as written")).collect();
        ensure!(lines.len() == 2, "each problem is logged once:\n{log}");
        ensure!(lines.iter().any(|line| line.contains("gate.yaml") && line.contains("spec.action")), "{lines:?}");
    }
    ensure!(shop.steal().is_err(), "the last good version is gone");
    echo(&mut live)?;

    let validated = |more: &[&str]| -> Result<std::process::Output> {
        Ok(Command::new(lab.binary()?).arg("validate").arg(lab.manifests()).args(more).output()?)
    };
    let (plain, object) = (validated(&[])?, validated(&["-o", "json"])?);
    ensure!(plain.status.code() == Some(1) && object.status.code() == Some(1));
    let report: Value = serde_json::from_slice(&object.stdout)?;
    ensure!(report["valid"] == false, "{report}");
    for index in 0..2 {
        let (theirs, ours) = (&agents[0].dump()?["manifestProblems"][index], &report["problems"][index]);
        for field in ["file", "line", "object", "field"] {
            ensure!(theirs[field] == ours[field], "the agent says {theirs}, selvedge validate {ours}");
        }
        let text = String::from_utf8_lossy(&plain.stdout).into_owned();
        let place = format!("gate.yaml:{}: {}: {}: ", ours["line"], word(ours, "object"), word(ours, "field"));
        ensure!(text.contains(&place), "{place:?} is not in\n{text}");
    }

    lab.write("gate.yaml", &deny("thief"))?;
    for agent in &agents {
        eventually("the problems are gone", BOUND, || {
            (agent.metrics().ok()?.sum("selvedge_manifest_problems", &[]) == 0.0).then_some(())
        })?;
        ensure!(agent.log().contains("problem of a manifest is gone"), "{}", agent.log_tail());
    }
    ensure!(validated(&[])?.status.success());
    Ok(())
}

fn a_policy_that_never_was_good_denies(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let _echo = shop.cart.serve_echo(7000)?;
    let mut live = shop.dial()?;
    lab.write("gate.yaml", &deny("thief").replace("serviceAccounts", "serviceAccount"))?;
    reset(&mut live).context("nobody knows whom the policy means")?;
    ensure!(shop.dial().is_err());
    lab.write("gate.yaml", &deny("thief"))?;
    eventually("the policy is mended", BOUND, || shop.dial().ok())?;
    ensure!(shop.steal().is_err());
    Ok(())
}

struct Shop {
    web: Pod,
    thief: Pod,
    cart: Pod,
}

impl Shop {
    fn open(lab: &Lab) -> Result<Self> {
        lab.namespace("shop", true)?;
        Ok(Self {
            web: lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?,
            thief: lab.pod(PodSpec::new("shop/thief", "node-a").service_account("thief"))?,
            cart: lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?,
        })
    }

    /// A connection whose far side has answered.
    fn dial(&self) -> io::Result<TcpStream> {
        answered(&self.web, &self.cart)
    }

    fn steal(&self) -> io::Result<TcpStream> {
        answered(&self.thief, &self.cart)
    }
}

fn answered(from: &Pod, to: &Pod) -> io::Result<TcpStream> {
    let mut stream = from.connect((to.ip(), 7000))?;
    stream.set_read_timeout(Some(BOUND))?;
    echo(&mut stream)?;
    Ok(stream)
}

fn echo(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"echo")?;
    stream.read_exact(&mut [0; 4])
}

/// Waits until a connection on which nothing is said ends, which must be by a reset.
fn reset(stream: &mut TcpStream) -> Result<()> {
    match stream.read(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        other => bail!("it was not reset, but {other:?}"),
    }
}

type Save = fn(&Path, &str) -> io::Result<()>;

fn rename_over(file: &Path, text: &str) -> io::Result<()> {
    let beside = file.with_extension("yaml~");
    fs::write(&beside, text)?;
    fs::rename(beside, file)
}

fn truncate_and_write(file: &Path, text: &str) -> io::Result<()> {
    let mut opened = OpenOptions::new().write(true).truncate(true).open(file)?;
    let (first, second) = text.split_at(text.len() / 2);
    opened.write_all(first.as_bytes())?;
    opened.flush()?;
    opened.write_all(second.as_bytes())
}

fn delete_and_create(file: &Path, text: &str) -> io::Result<()> {
    fs::remove_file(file)?;
    File::create_new(file)?.write_all(text.as_bytes())
}

fn move_away_and_write(file: &Path, text: &str) -> io::Result<()> {
    let backup = file.with_extension("yaml~");
    fs::rename(file, &backup)?;
    fs::write(file, text)?;
    fs::remove_file(backup)
}

/// As a mounted ConfigMap is updated: the files lie in a hidden folder, and a link to it is swapped.
fn swap_symlink(file: &Path, text: &str) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let version = format!("..{:x}", text.len() * 1000 + text.bytes().map(usize::from).sum::<usize>());
    fs::create_dir_all(folder.join(&version))?;
    fs::write(folder.join(&version).join("gate.yaml"), text)?;
    let _ = fs::remove_file(folder.join("..data_tmp"));
    symlink(&version, folder.join("..data_tmp"))?;
    fs::rename(folder.join("..data_tmp"), folder.join("..data"))?;
    if !file.is_symlink() {
        symlink("..data/gate.yaml", folder.join("..link"))?;
        fs::rename(folder.join("..link"), file)?;
    }
    Ok(())
}

fn deny(account: &str) -> String {
    format!(
        "apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata:
  name: gate
  namespace: shop
spec:
  action: DENY
  rules:
  - from:
    - source:
        serviceAccounts: [shop/{account}]
"
    )
}

/// Whether a problem names the line of `text` that holds `needle`, the object and the field.
fn tells(problem: &Value, text: &str, needle: &str, object: &str, field: &str) -> Result<()> {
    let line = text.lines().position(|line| line.contains(needle)).context("no such line")? + 1;
    ensure!(word(problem, "file").ends_with("gate.yaml"), "{problem}");
    ensure!(problem["line"] == line, "line {line}: {problem}");
    ensure!(problem["object"] == object && problem["field"] == field, "{object}: {field}: {problem}");
    ensure!(!word(problem, "cause").is_empty(), "{problem}");
    Ok(())
}

fn word<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

const BROKEN_POD: &str = "apiVersion: v1
kind: Pod
metadata:
  name: broken
  namespace: shop
spec:
  nodeName: node-a
status:
  podIPs:
  - ip: 10.0.0
";
