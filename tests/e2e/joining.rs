//! Joining and leaving the mesh, starting in it, and the agent's own comings and goings: as users see them.

use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl, nodes, run_on, test_image};
use crate::mesh::{SYSTEM, install, join, nothing_is_left, roll_out, uninstall, wait_captured};
use crate::scene::{BOUND, Scene, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("running pods join without a restart, and leave", joins_and_leaves),
        trial_alone("probes of every kind pass under default-deny, and nothing else does", probes),
        trial_alone("a pod that connects in its first millisecond is captured", first_millisecond),
        trial_alone("without an agent joined pods wait with an event, and all others start", without_agent),
        trial_alone("agents are replaced under load without a failed request", replaced_under_load),
        trial_alone("it is uninstalled without a trace, and installed again", uninstalled_and_installed_again),
    ]
}

fn joins_and_leaves(scene: &Scene) -> Result<()> {
    install()?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080", "echo:9000"])?;
    scene.pod("client", &client, &["pause"])?;
    let to = format!("{}:9000", scene.pod_ip("server")?);
    let started = restarts(scene)?;
    ensure!(readable_on_the_wire(scene, &server, &to, "needle in clear")?, "packets are not seen at all");
    join(scene, true)?;
    wait_captured(scene, "client")?;
    wait_captured(scene, "server")?;
    let hidden = || (!readable_on_the_wire(scene, &server, &to, "needle in the mesh").unwrap_or(true)).then_some(());
    eventually("nothing is readable between the nodes", BOUND, hidden)?;
    // What is outside the mesh is reached as before.
    scene.run("client", &["resolve", "kubernetes.default.svc.cluster.local"])?;
    scene.run("client", &["tcp", "kubernetes.default:443", ""])?;
    join(scene, false)?;
    let clear = || readable_on_the_wire(scene, &server, &to, "needle after leaving").ok()?.then_some(());
    eventually("the pods have left", BOUND, clear)?;
    ensure!(restarts(scene)? == started, "something was restarted");
    Ok(())
}

/// Sends a text and looks for it in the packets that reach a node.
fn readable_on_the_wire(scene: &Scene, node: &str, to: &str, text: &str) -> Result<bool> {
    let packets = thread::scope(|scope| {
        let sniffs = scope.spawn(|| {
            // Until the connection is over, as told by the file.
            let script = "rm -f /tmp/stop; tcpdump -i eth0 -U -w /tmp/packets tcp 2>/tmp/told & \
                          until grep -q listening /tmp/told; do sleep 0.1; done; touch /tmp/ready; \
                          until [ -e /tmp/stop ]; do sleep 0.1; done; kill $!; wait; rm -f /tmp/ready; \
                          strings -n 4 /tmp/packets";
            run_on(node, &["sh", "-c", script])
        });
        let ready = eventually("packets are looked at", BOUND, || run_on(node, &["test", "-e", "/tmp/ready"]).ok());
        let sent = scene.run("client", &["tcp", to, text]);
        let stopped = run_on(node, &["touch", "/tmp/stop"]);
        let packets = sniffs.join().map_err(|_| anyhow::anyhow!("the sniffer panicked"))?;
        ready?;
        stopped?;
        ensure!(sent? == text, "the server sent back something else");
        packets
    })?;
    Ok(packets.contains(text))
}

fn restarts(scene: &Scene) -> Result<Vec<String>> {
    let pods = get(&["--namespace", &scene.namespace, "pods"])?;
    let statuses = pods["items"].as_array().context("no list of pods")?.iter().map(|pod| {
        let status = &pod["status"]["containerStatuses"][0];
        format!("{} {}", status["containerID"], status["restartCount"])
    });
    Ok(statuses.collect())
}

fn probes(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.apply(DENY_ALL)?;
    scene.apply(&format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: server, labels: {{app: server}}}}\n\
         spec:\n  \
           nodeName: {server}\n  \
           terminationGracePeriodSeconds: 1\n  \
           containers:\n  \
           - name: main\n    \
             image: \"{}\"\n    \
             imagePullPolicy: Never\n    \
             args: [serve, \"http:8080\", \"echo:9000\"]\n    \
             startupProbe: {{exec: {{command: [selvedge-pod, get, \"127.0.0.1:8080\", /]}}, periodSeconds: 1}}\n    \
             readinessProbe: {{httpGet: {{port: 8080, path: /}}, periodSeconds: 1}}\n    \
             livenessProbe: {{tcpSocket: {{port: 9000}}, periodSeconds: 1}}\n",
        test_image()?
    ))?;
    scene.wait_for("condition=Ready", "server")?;
    scene.pod("client", &client, &["pause"])?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let refused = scene.run("client", &["get", &to, "/"]);
    ensure!(refused.is_err(), "default-deny let a client in: {refused:?}");
    // From outside, through a node: masqueraded to the address that probes come from.
    scene.apply(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {name: server}\n\
         spec:\n  \
           type: NodePort\n  \
           selector: {app: server}\n  \
           ports: [{port: 80, targetPort: 8080}]\n",
    )?;
    let service = get(&["--namespace", &scene.namespace, "service", "server"])?;
    let (node, port) = (get(&["node", &server])?, &service["spec"]["ports"][0]["nodePort"]);
    let address = node["status"]["addresses"][0]["address"].as_str().context("a node without an address")?;
    let ask = format!("exec 3<>/dev/tcp/{address}/{port} && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && head -c 4 <&3");
    let answer = run_on("control", &["timeout", "10", "bash", "-c", &ask]).unwrap_or_default();
    ensure!(answer.is_empty(), "a client from outside was let in through a NodePort: {answer}");
    let ready = get(&["--namespace", &scene.namespace, "pod", "server"])?;
    let status = &ready["status"]["containerStatuses"][0];
    ensure!(status["ready"] == true && status["restartCount"] == 0, "the pod is not well: {status}");
    Ok(())
}

fn first_millisecond(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080"])?;
    wait_captured(scene, "server")?;
    scene.apply(STRICT)?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    for round in 0..10 {
        let name = format!("quick-{round}");
        scene.apply(&format!(
            "apiVersion: v1\n\
             kind: Pod\n\
             metadata: {{name: {name}}}\n\
             spec:\n  \
               nodeName: {client}\n  \
               restartPolicy: Never\n  \
               containers:\n  \
               - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [get, \"{to}\", /first]}}\n",
            test_image()?
        ))?;
    }
    for round in 0..10 {
        // In plaintext it would be refused.
        scene.wait_for("jsonpath={.status.phase}=Succeeded", &format!("quick-{round}"))?;
    }
    Ok(())
}

fn without_agent(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (node, _) = two_nodes()?;
    scene.pod("first", &node, &["pause"])?;
    wait_captured(scene, "first")?;
    // A DaemonSet that wants no node has no agents, and is not deleted.
    let nowhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"selvedge.dev/nowhere":"true"}}}}}"#;
    let anywhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"selvedge.dev/nowhere":null}}}}}"#;
    let patch = |text: &str| kubectl(&["patch", "daemonset", "selvedge-agent", "--namespace", SYSTEM, "--patch", text]);
    patch(nowhere)?;
    let bound = format!("--timeout={}s", BOUND.as_secs());
    let agents = "app.kubernetes.io/name=selvedge-agent";
    let waited = kubectl(&["wait", "pod", "--for=delete", "--namespace", SYSTEM, "--selector", agents, &bound]);
    let tried = waited.and_then(|_| {
        pod_without_waiting(scene, "waits", &node)?;
        eventually("an event says what the pod waits for", BOUND, || {
            let events = get(&["--namespace", &scene.namespace, "events"]).ok()?;
            let mut messages = events["items"].as_array()?.iter().filter_map(|event| event["message"].as_str());
            messages.any(|message| message.contains("selvedge agent of this node does not answer")).then_some(())
        })?;
        kubectl(&["annotate", "--overwrite", "namespace", &scene.namespace, "selvedge.dev/mesh-"])?;
        let other = format!("{}-other", scene.namespace);
        kubectl(&["create", "namespace", &other])?;
        let other = Scene { namespace: other };
        other.pod("starts", &node, &["pause"])
    });
    // The cluster is to be whole again, whatever happened.
    join(scene, true)?;
    patch(anywhere)?;
    roll_out()?;
    tried?;
    scene.wait_for("condition=Ready", "waits")?;
    wait_captured(scene, "waits")
}

fn pod_without_waiting(scene: &Scene, name: &str, node: &str) -> Result<()> {
    scene.apply(&format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: {name}}}\n\
         spec:\n  \
           nodeName: {node}\n  \
           terminationGracePeriodSeconds: 1\n  \
           containers:\n  \
           - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [pause]}}\n",
        test_image()?
    ))
}

fn replaced_under_load(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080"])?;
    scene.pod("client", &client, &["pause"])?;
    wait_captured(scene, "server")?;
    wait_captured(scene, "client")?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let told: Value = thread::scope(|scope| {
        let load = scope.spawn(|| scene.run("client", &["load", &to, "60"]));
        let replaced = kubectl(&["rollout", "restart", "--namespace", SYSTEM, "daemonset/selvedge-agent"])
            .and_then(|_| roll_out());
        let told = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        replaced?;
        Ok::<_, anyhow::Error>(serde_json::from_str(&told?)?)
    })?;
    ensure!(told["failed"] == 0 && told["answered"].as_u64() > Some(100), "{told}");
    Ok(())
}

fn uninstalled_and_installed_again(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080"])?;
    scene.pod("client", &client, &["pause"])?;
    wait_captured(scene, "client")?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    uninstall()?;
    nothing_is_left()?;
    scene.run("client", &["get", &to, "/without"])?;
    install()?;
    wait_captured(scene, "client")?;
    wait_captured(scene, "server")?;
    scene.run("client", &["get", &to, "/again"]).map(drop)
}

fn two_nodes() -> Result<(String, String)> {
    let mut nodes = nodes()?.into_iter();
    nodes.next().zip(nodes.next()).context("this needs two nodes")
}

const DENY_ALL: &str = "apiVersion: selvedge.dev/v1alpha1\n\
                        kind: AuthorizationPolicy\n\
                        metadata: {name: deny-all}\n\
                        spec: {}\n";
const STRICT: &str = "apiVersion: selvedge.dev/v1alpha1\n\
                      kind: PeerAuthentication\n\
                      metadata: {name: strict}\n\
                      spec: {mtls: {mode: STRICT}}\n";
