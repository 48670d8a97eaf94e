//! Agents come and go under load: replaced by the next one, or killed.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{Running, get, kubectl, run_on};
use crate::mesh::{SYSTEM, agent_of, install, join, roll_out, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial_alone};
use crate::wire::Wire;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("agents are replaced under load without a lost or refused connection", replaced_under_load),
        trial_alone("a killed worker resets what it carried, and what is new waits", worker_killed),
        trial_alone("a killed agent is started again, and nothing leaves in plaintext", agent_killed),
    ]
}

fn replaced_under_load(scene: &Scene) -> Result<()> {
    let world = World::make(scene)?;
    let (load, talks, wire) = (world.load()?, world.talks()?, Wire::tap()?);
    let outlives = scene.talk("client", &world.echo)?;
    let before = [agent_of(&world.near)?, agent_of(&world.far)?];
    kubectl(&["rollout", "restart", "--namespace", SYSTEM, "daemonset/selvedge-agent"])?;
    // Connections that are there hold the old agents until the drain limit, and the roll-out with them.
    let taken_over = || {
        let after = [agent_of(&world.near).ok()?, agent_of(&world.far).ok()?];
        (before.iter().all(|old| !after.contains(old)) && after.iter().all(|new| is_ready(new))).then_some(())
    };
    eventually("the next agents have taken over", BOUND, taken_over)?;
    world.ask()?;
    let load = told(load)?;
    ensure!(load["failed"] == 0 && load["answered"].as_u64() > Some(100), "requests failed: {load}");
    ensure!(!wire.carried(&world.header())?, "a request was readable between the nodes");
    for talk in talks {
        let talk = told(talk)?;
        ensure!(talk["broken"].is_null() && talk["heard"].as_u64() > Some(10), "a connection was lost: {talk}");
    }
    // What outlives the drain limit is reset.
    let outlived: Value = serde_json::from_str(&outlives.wait(BOUND)?)?;
    ensure!(is_reset(&outlived["broken"]), "a connection that outlives the limit ended so: {outlived}");
    roll_out()
}

fn worker_killed(scene: &Scene) -> Result<()> {
    let world = World::make(scene)?;
    for node in [&world.near, &world.far] {
        let (load, talk) = (world.load()?, scene.talk("client", &world.echo)?);
        let wire = Wire::tap()?;
        let restarts = restarts_of_agent(node)?;
        // The worker is the one whose parent is of the same name.
        let killed = run_on(node, &["sh", "-c", KILL_WORKER])?;
        ensure!(killed.trim() == "1", "{} workers were killed on {node}", killed.trim());
        let talk: Value = serde_json::from_str(&talk.wait(BOUND)?)?;
        ensure!(is_reset(&talk["broken"]), "what the killed worker carried ended so: {talk}");
        world.ask()?;
        let load = told(load)?;
        let failures = load["failures"].as_array().context("no failures")?;
        ensure!(failures.iter().all(is_reset), "not every failure is a reset: {load}");
        ensure!(failures.len() <= IN_FLIGHT, "more failed than was under way: {load}");
        ensure!(load["answered"].as_u64() > Some(100), "{load}");
        ensure!(!wire.carried(&world.header())?, "a request was readable between the nodes");
        ensure!(restarts_of_agent(node)? == restarts, "the container on {node} was started again");
    }
    Ok(())
}

fn agent_killed(scene: &Scene) -> Result<()> {
    let world = World::make(scene)?;
    for node in [&world.near, &world.far] {
        let (load, talk) = (world.load()?, scene.talk("client", &world.echo)?);
        let wire = Wire::tap()?;
        let restarts = restarts_of_agent(node)?;
        let killed = run_on(node, &["sh", "-c", KILL_PARENT])?;
        ensure!(killed.trim() == "1", "{} agents were killed on {node}", killed.trim());
        let talk: Value = serde_json::from_str(&talk.wait(BOUND)?)?;
        ensure!(is_reset(&talk["broken"]), "what the killed agent carried ended so: {talk}");
        let again = || (restarts_of_agent(node).ok()? == restarts + 1).then_some(());
        eventually("the container is started again", BOUND, again)?;
        roll_out()?;
        world.ask()?;
        let load = told(load)?;
        let failures = load["failures"].as_array().context("no failures")?;
        let in_order = failures.iter().find(|failure| !is_reset(failure) && !is_no_connection(failure));
        ensure!(in_order.is_none(), "a failure that looks like an end in order: {in_order:?}");
        ensure!(load["answered"].as_u64() > Some(100), "{load}");
        ensure!(!wire.carried(&world.header())?, "a request was readable between the nodes");
    }
    Ok(())
}

/// A server, a client on another node, and one on the server's own.
struct World<'a> {
    scene: &'a Scene,
    near: String,
    far: String,
    http: String,
    echo: String,
}

impl<'a> World<'a> {
    fn make(scene: &'a Scene) -> Result<Self> {
        install()?;
        join(scene, true)?;
        let (near, far) = two_nodes()?;
        scene.pod("server", &far, &["serve", "http:8080", "echo:9000"])?;
        scene.pod("client", &near, &["pause"])?;
        scene.pod("neighbour", &far, &["pause"])?;
        for pod in ["server", "client", "neighbour"] {
            wait_captured(scene, pod)?;
        }
        let ip = scene.pod_ip("server")?;
        let world = Self { scene, near, far, http: format!("{ip}:8080"), echo: format!("{ip}:9000") };
        // Until both agents know of each other's pods, connections are plaintext.
        let wire = Wire::tap()?;
        let mut number = 0;
        let hidden = || {
            number += 1;
            let text = format!("a needle of trial {number}");
            scene.run("client", &["tcp", &world.echo, &text]).ok()?;
            (!wire.carried(&text).ok()?).then_some(())
        };
        eventually("nothing is readable between the nodes", BOUND, hidden)?;
        Ok(world)
    }

    fn load(&self) -> Result<Running> {
        let load = self.scene.start("client", &["load", &self.http])?;
        // It is under way before anything is done to it.
        self.ask()?;
        Ok(load)
    }

    fn talks(&self) -> Result<Vec<Running>> {
        ["client", "neighbour"].iter().map(|pod| self.scene.talk(pod, &self.echo)).collect()
    }

    fn ask(&self) -> Result<()> {
        self.scene.run("client", &["get", &self.http, "/well"]).map(drop)
    }

    /// In every request, and nowhere else.
    fn header(&self) -> String {
        format!("host: {}", self.http)
    }
}

fn told(running: Running) -> Result<Value> {
    Ok(serde_json::from_str(&running.end()?)?)
}

fn is_reset(failure: &Value) -> bool {
    failure.as_str().is_some_and(|failure| failure.contains("reset by peer") || failure.contains("Broken pipe"))
}

fn is_no_connection(failure: &Value) -> bool {
    failure.as_str().is_some_and(|failure| failure.contains("cannot connect"))
}

fn is_ready(agent: &str) -> bool {
    let ready = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
    kubectl(&["get", "pod", agent, "--namespace", SYSTEM, "--output", ready]).is_ok_and(|said| said == "True")
}

fn restarts_of_agent(node: &str) -> Result<u64> {
    let agent = get(&["--namespace", SYSTEM, "pod", &agent_of(node)?])?;
    let statuses = agent["status"]["containerStatuses"].as_array().context("no container")?;
    let agent = statuses.iter().find(|status| status["name"] == "agent").context("no container named agent")?;
    agent["restartCount"].as_u64().context("no count of restarts")
}

/// Requests under way at a time, of `selvedge-pod load`.
const IN_FLIGHT: usize = 2;
/// The agent is two processes, of which the parent does nothing but keep listeners; nothing else of the name has a child.
const KILL_WORKER: &str = "for parent in $(pgrep -x selvedge); do pgrep -P $parent -x selvedge; done | tee /tmp/killed | \
                           xargs kill -KILL && wc -l < /tmp/killed";
const KILL_PARENT: &str = "for parent in $(pgrep -x selvedge); do pgrep -P $parent -x selvedge > /dev/null && echo $parent; \
                           done | tee /tmp/killed | xargs kill -KILL && wc -l < /tmp/killed";
