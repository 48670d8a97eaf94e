//! What goes on while something around the mesh is down: the API server, and the controllers.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Metrics, eventually};

use crate::cluster::{get, kubectl, order, run_on, test_image};
use crate::controller::{account_and_pod, two_nodes};
use crate::mesh::{DENY_ALL, STRICT, SYSTEM, agent_of, install, join, roll_out, set_lifetime, wait_captured};
use crate::scene::{BOUND, Scene, trial_alone};
use crate::traffic::Told;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone(
            "outages: traffic goes on without API server and etcd, and changes arrive afterwards",
            without_api_server,
        ),
        trial_alone(
            "outages: without a controller traffic goes on for as long as certificates are good",
            without_controller,
        ),
    ]
}

fn without_api_server(scene: &Scene) -> Result<()> {
    let [first, second] = two_nodes()?;
    install()?;
    join(scene, true)?;
    scene.pod("server", &second, &["serve", "http:8080"])?;
    scene.pod("client", &first, &["pause"])?;
    wait_captured(scene, "server")?;
    wait_captured(scene, "client")?;
    scene.apply(SERVICE)?;
    let ask = || scene.run("client", &["get", "server:80", "/"]).ok();
    eventually("the Service answers", BOUND, ask)?;
    // Nobody can be asked to run anything later on: a pod by itself asks for as long as it takes.
    scene.apply(&load_pod(&first)?)?;
    scene.wait_for("condition=Ready", "load")?;
    wait_captured(scene, "load")?;
    let agents = [Exporter::of(&first)?, Exporter::of(&second)?];
    let age = |agent: &Exporter| agent.value("selvedge_model_age_seconds", &[]);
    let stop_and_wait = || {
        order("stop", "control", "kube-apiserver")?;
        order("stop", "control", "etcd")?;
        agents.iter().try_for_each(|agent| {
            let old = || age(agent).ok().filter(|age| *age > OUTAGE_SECONDS);
            eventually("the agent's view grows old", BOUND, old).map(drop)
        })
    };
    let aged = stop_and_wait();
    // Whatever happened, the cluster comes back.
    order("start", "control", "etcd")?;
    order("start", "control", "kube-apiserver")?;
    eventually("the API server answers", BOUND, || kubectl(&["get", "--raw", "/readyz"]).ok())?;
    aged?;
    for agent in &agents {
        let young = || age(agent).ok().filter(|age| *age < YOUNG_SECONDS);
        eventually("the agent's view is young again", BOUND, young)?;
    }
    // A cluster whose nodes could not report for so long names nobody until they have.
    eventually("the Service answers again", BOUND, ask)?;
    scene.wait_for("jsonpath={.status.phase}=Succeeded", "load")?;
    let mut told = Told::default();
    told.add(scene.logs("load")?.trim())?;
    ensure!(told.failures.is_empty() && told.answered > 100, "{told:?}");
    // Changes arrive again.
    scene.apply(DENY_ALL)?;
    let refused = || scene.run("client", &["get", "server:80", "/"]).err();
    eventually("a policy that came afterwards is in force", BOUND, refused).map(drop)
}

fn without_controller(scene: &Scene) -> Result<()> {
    let [first, second] = two_nodes()?;
    install()?;
    set_lifetime(&format!("={LIFETIME_SECONDS}s"))?;
    let result = scale_controller(2).and_then(|()| outlives_controller(scene, &first, &second));
    // Whoever installs next waits for it.
    set_lifetime("-")?;
    scale(2)?;
    result
}

fn outlives_controller(scene: &Scene, first: &str, second: &str) -> Result<()> {
    join(scene, true)?;
    // Accounts of their own, of which no agent holds a certificate yet that lives longer.
    for (name, node) in [("server", second), ("client", first)] {
        scene.apply(&account_and_pod(name, node).replace("args: [pause]", "args: [serve, \"http:8080\"]"))?;
        scene.wait_for("condition=Ready", name)?;
        wait_captured(scene, name)?;
    }
    scene.apply(STRICT)?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    scene.run("client", &["get", &to, "/"])?;
    let agents = [(Exporter::of(first)?, "client"), (Exporter::of(second)?, "server")];
    let ends = |(agent, account): &(Exporter, &str)| {
        let identity = format!("spiffe://cluster.local/ns/{}/sa/{account}", scene.namespace);
        agent.value("selvedge_certificate_expiry_timestamp_seconds", &[("identity", &identity)])
    };
    let first_end = |_| agents.iter().map(ends).try_fold(f64::MAX, |least, end| anyhow::Ok(least.min(end?)));
    let mut told = Told::default();
    let mut load = || told.add(&scene.run("client", &["load", &to, "1"])?);
    // With a controller they are renewed.
    let before = first_end(())?;
    let renewed = || load().ok().and_then(|()| first_end(()).ok()).filter(|end| *end > before + 1.0);
    eventually("certificates are renewed under load", BOUND, renewed)?;
    scale_controller(0)?;
    let end = first_end(())?;
    ensure!(end > now() + 5.0, "the controllers took so long to end that nothing is left to see");
    let mut rounds = 0;
    while first_end(())? > now() + 5.0 {
        load()?;
        rounds += 1;
    }
    ensure!(rounds > 0 && told.failures.is_empty(), "{rounds} rounds, {told:?}");
    ensure!(first_end(())? <= end, "somebody renewed certificates");
    let refused = || scene.run("client", &["get", &to, "/"]).err();
    eventually("nobody is believed whose certificate has ended", BOUND, refused)?;
    scale_controller(2)?;
    let answered = || scene.run("client", &["get", &to, "/"]).ok();
    eventually("with a controller it goes on", BOUND, answered)?;
    ensure!(first_end(())? > end, "nothing was renewed");
    Ok(())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn scale(replicas: usize) -> Result<()> {
    let replicas = format!("--replicas={replicas}");
    kubectl(&["scale", "--namespace", SYSTEM, "deployment/selvedge-controller", &replicas]).map(drop)
}

/// Comes back once as many are there, and none of before.
fn scale_controller(replicas: usize) -> Result<()> {
    scale(replicas)?;
    roll_out()?;
    let controllers = "--selector=app.kubernetes.io/name=selvedge-controller";
    eventually("no other controller is left", BOUND, || {
        let pods = get(&["--namespace", SYSTEM, "pods", controllers]).ok()?;
        (pods["items"].as_array()?.len() == replicas).then_some(())
    })
}

/// One agent's metrics, read from its node: that needs no API server.
struct Exporter {
    node: String,
    url: String,
}

impl Exporter {
    fn of(node: &str) -> Result<Self> {
        let pod = get(&["--namespace", SYSTEM, "pod", &agent_of(node)?])?;
        let ip = pod["status"]["podIP"].as_str().context("an agent without an address")?;
        Ok(Self { node: node.to_owned(), url: format!("http://{ip}:15020/metrics") })
    }

    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let metrics = Metrics::parse(&run_on(&self.node, &["curl", "--silent", "--max-time", "10", &self.url])?)?;
        let value = metrics.series(name, labels).next().map(|(_, value)| value);
        value.with_context(|| format!("{} has no {name} with {labels:?}", self.url))
    }
}

fn load_pod(node: &str) -> Result<String> {
    Ok(format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: load}}\n\
         spec:\n  \
           nodeName: {node}\n  \
           restartPolicy: Never\n  \
           terminationGracePeriodSeconds: 1\n  \
           containers:\n  \
           - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [load, \"server:80\", \"{LOAD_SECONDS}\"]}}\n",
        test_image()?
    ))
}

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
";
/// Longer than the leases of nodes and replicas.
const OUTAGE_SECONDS: f64 = 60.0;
/// Over the outage, and the time before and after.
const LOAD_SECONDS: u32 = 90;
/// A view is at most some ten seconds old where the API server answers.
const YOUNG_SECONDS: f64 = 15.0;
const LIFETIME_SECONDS: u32 = 30;
