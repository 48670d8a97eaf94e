//! Pods that start: the container runtime calls the plugin, and the first packet is already captured.

use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Node, Pod, PodSpec, eventually, trial_with};
use serde_json::{Value, json};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("cni::a_joined_pod_is_captured_before_anybody_knows_its_address", lab(), captured_at_once),
        trial_with("cni::a_new_sandbox_of_the_same_pod_is_captured_anew", lab(), new_sandbox),
        trial_with("cni::without_an_agent_joined_pods_wait_and_all_others_start", lab(), without_agent),
        trial_with("cni::a_pod_that_the_agent_does_not_know_is_tried_again_if_it_joins", lab(), unknown),
    ]
}

fn captured_at_once(lab: &Lab) -> Result<()> {
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let node = &lab.nodes()[0];
    let _agents = lab.nodes().iter().map(|node| node.start_agent(&options(node))).collect::<Result<Vec<_>>>()?;
    let _server = cart.serve_echo(PORT)?;
    let link = lab.link()?;
    for round in 0..5_u8 {
        let (manifest, pod) = starting(lab, node, "shop", &format!("web-{round}"), 60 + round)?;
        let call = Call::of(node, &pod, &manifest);
        let result = thread::scope(|scope| {
            let added = scope.spawn(|| call.run("ADD"));
            // The kubelet may be faster than the agent.
            lab.put(&without_address(&manifest))?;
            added.join().map_err(|_| anyhow::anyhow!("the call panicked"))?
        })?;
        ensure!(result == call.prev_result(), "the plugin answered {result}");
        // The pod's first millisecond.
        pod.converse((cart.ip(), PORT))?.exchange("needle of the first moment")?;
        ensure!(pod.networking()?.count("SELVEDGE") > 0, "no rules");
        lab.put(&manifest)?;
        pod.converse((cart.ip(), PORT))?.exchange("needle of later")?;
    }
    ensure!(!link.find(b"needle")?.is_found(), "something was readable on the link");
    ensure!(link.tcp_packets(PORT)? == 0, "something went past the mesh");
    Ok(())
}

fn new_sandbox(lab: &Lab) -> Result<()> {
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let node = &lab.nodes()[0];
    let agents = lab.nodes().iter().map(|node| node.start_agent(&options(node))).collect::<Result<Vec<_>>>()?;
    let _server = cart.serve_echo(PORT)?;
    let (manifest, first) = starting(lab, node, "shop", "web", 60)?;
    lab.put(&without_address(&manifest))?;
    let call = Call::of(node, &first, &manifest);
    call.run("ADD")?;
    lab.put(&manifest)?;
    agents[0].wait_pods("captured", 1)?;
    call.run("DEL")?;
    drop(first);
    // Its object still says the first sandbox's address.
    let (_, second) = starting_as(lab, node, &manifest, 61)?;
    Call::of(node, &second, &manifest).run("ADD")?;
    ensure!(second.networking()?.count("SELVEDGE") > 0, "no rules");
    second.converse((cart.ip(), PORT))?.exchange("of the second sandbox")
}

fn without_agent(lab: &Lab) -> Result<()> {
    let node = &lab.nodes()[0];
    lab.namespace("shop", true)?;
    lab.namespace("other", false)?;
    let agent = node.start_agent(&options(node))?;
    // The list is written at leisure.
    eventually("the joined namespaces are on disk", BOUND, || {
        let text = std::fs::read_to_string(node.shared_dir().join("joined.json")).ok()?;
        text.contains("shop").then_some(())
    })?;
    agent.crash();
    let (joined, web) = starting(lab, node, "shop", "web", 60)?;
    let call = Call::of(node, &web, &joined);
    let refused = call.run("ADD").err().context("a joined pod started without an agent")?.to_string();
    ensure!(refused.contains("\"code\":11") && refused.contains("selvedge agent of this node"), "{refused}");
    ensure!(call.run("DEL").is_ok() && call.run("STATUS").is_ok() && call.run("GC").is_ok(), "only ADD may fail");
    let began = Instant::now();
    for (namespace, name, host) in [("other", "web", 61), ("kube-system", "dns", 62), ("selvedge-system", "agent", 63)]
    {
        let (manifest, pod) = starting(lab, node, namespace, name, host)?;
        let call = Call::of(node, &pod, &manifest);
        ensure!(call.run("ADD")? == call.prev_result(), "{namespace}/{name}");
    }
    ensure!(began.elapsed() < Duration::from_secs(5), "pods that do not join waited {:?}", began.elapsed());
    let (own, pod) = starting(lab, node, "other", "joins", 64)?;
    let refused = Call::of(node, &pod, &own).annotation("selvedge.dev/mesh", "enabled").run("ADD");
    ensure!(refused.is_err(), "a pod that joins by itself started without an agent");

    let _agent = node.start_agent(&options(node))?;
    lab.put(&without_address(&joined))?;
    call.run("ADD")?;
    ensure!(web.networking()?.count("SELVEDGE") > 0, "no rules");
    Ok(())
}

fn unknown(lab: &Lab) -> Result<()> {
    let node = &lab.nodes()[0];
    lab.namespace("shop", true)?;
    lab.namespace("other", false)?;
    let _agent = node.start_agent(&options(node))?;
    thread::scope(|scope| {
        let calls: Vec<_> = [("shop", 60, false), ("other", 61, true)]
            .into_iter()
            .map(|(namespace, host, starts)| {
                scope.spawn(move || -> Result<()> {
                    let (manifest, pod) = starting(lab, node, namespace, "ghost", host)?;
                    let answer = Call::of(node, &pod, &manifest).run("ADD");
                    ensure!(answer.is_ok() == starts, "{namespace}: {answer:?}");
                    Ok(())
                })
            })
            .collect();
        calls.into_iter().try_for_each(|call| call.join().map_err(|_| anyhow::anyhow!("a call panicked"))?)
    })
}

/// A pod's manifest, with the address it will have, and its network namespace; nothing of it is told to the agents.
fn starting(lab: &Lab, node: &Node, namespace: &str, name: &str, host: u8) -> Result<(Value, Pod)> {
    let manifest = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "uid": format!("{namespace}-{name}-uid")},
        "spec": {
            "nodeName": node.name(),
            "serviceAccountName": "web",
            "containers": [{"name": "app", "image": "app"}],
        },
    });
    starting_as(lab, node, &manifest, host)
}

fn starting_as(lab: &Lab, node: &Node, manifest: &Value, host: u8) -> Result<(Value, Pod)> {
    let Some(IpAddr::V4(gateway)) = node.gateways().into_iter().find(IpAddr::is_ipv4) else { bail!("no IPv4") };
    let [a, b, c, _] = gateway.octets();
    let ip = format!("{a}.{b}.{c}.{host}");
    let mut manifest = manifest.clone();
    manifest["status"] = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]});
    let pod = lab.pod_from(&manifest)?;
    Ok((manifest, pod))
}

fn without_address(manifest: &Value) -> Value {
    let mut manifest = manifest.clone();
    manifest["status"] = json!({"phase": "Pending"});
    manifest
}

/// A call of the plugin, as containerd makes it.
struct Call<'a> {
    node: &'a Node,
    pod: &'a Pod,
    arguments: String,
    sandbox: String,
    annotations: Value,
}

impl<'a> Call<'a> {
    fn of(node: &'a Node, pod: &'a Pod, manifest: &Value) -> Self {
        let of = |field: &str| manifest["metadata"][field].as_str().unwrap_or_default().to_owned();
        let (namespace, name, uid) = (of("namespace"), of("name"), of("uid"));
        let arguments = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}");
        Self { node, pod, arguments, sandbox: format!("sandbox-{}", pod.ip()), annotations: json!({}) }
    }

    fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations[key] = value.into();
        self
    }

    fn prev_result(&self) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "veth"}, {"name": "eth0", "sandbox": path(self.pod)}],
            "ips": [{"address": format!("{}/24", self.pod.ip()), "interface": 1}],
        })
    }

    /// Runs it; what it answers, or what it complains of.
    fn run(&self, command: &str) -> Result<Value> {
        let config = json!({
            "cniVersion": "1.0.0",
            "name": "lab",
            "type": "selvedge",
            "sharedDir": self.node.shared_dir(),
            "runtimeConfig": {"io.kubernetes.cri.pod-annotations": self.annotations},
            "prevResult": self.prev_result(),
        });
        let mut plugin = Command::new(env!("CARGO_BIN_EXE_selvedge"));
        plugin.env("CNI_COMMAND", command).env("CNI_CONTAINERID", &self.sandbox).env("CNI_IFNAME", "eth0");
        plugin.env("CNI_NETNS", path(self.pod)).env("CNI_ARGS", &self.arguments);
        let mut child = self.node.spawn(plugin.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        child.stdin.take().context("no standard input")?.write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8(output.stdout)?;
        ensure!(output.status.success(), "{said}");
        if said.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&said)?) }
    }
}

fn path(pod: &Pod) -> &Path {
    pod.network().path()
}

fn options(node: &Node) -> AgentOptions {
    AgentOptions::default().arg("--shared-dir").arg(&node.shared_dir().to_string_lossy())
}

const PORT: u16 = 9000;
