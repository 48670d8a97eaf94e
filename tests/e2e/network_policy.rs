//! What a NetworkPolicy forbids stays forbidden, also between two joined pods of one node.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;

use crate::cluster::{kubectl, run_on};
use crate::controller::two_nodes;
use crate::mesh::{install, join, wait_captured};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![trial("a NetworkPolicy separates joined pods of one node", separates_on_one_node)]
}

/// The CNI here enforces none, so what one that does would write is written by hand: between two pods of a node, every
/// packet crosses its FORWARD chain.
fn separates_on_one_node(scene: &Scene) -> Result<()> {
    let [node, _] = two_nodes()?;
    install()?;
    join(scene, true)?;
    scene.pod("server", &node, &["serve", "http:8080"])?;
    scene.pod("client", &node, &["pause"])?;
    wait_captured(scene, "server")?;
    wait_captured(scene, "client")?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    scene.run("client", &["get", &to, "/"])?;
    let rule = Drops::between(&node, &scene.pod_ip("client")?, &scene.pod_ip("server")?)?;
    // That the rule alone is not enough makes this a test: without a NetworkPolicy nothing of it crosses the chain.
    scene.run("client", &["get", &to, "/"]).context("two joined pods of a node are not joined directly")?;
    ensure!(rule.packets()? == 0, "packets went through the chain");
    scene.apply(
        "apiVersion: networking.k8s.io/v1\n\
         kind: NetworkPolicy\n\
         metadata: {name: nobody}\n\
         spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress]}\n",
    )?;
    let refused = || scene.run("client", &["get", &to, "/"]).err();
    eventually("the NetworkPolicy separates them", BOUND, refused)?;
    ensure!(rule.packets()? > 0, "something else than the rule separates them");
    ensure!(scene.run("client", &["get", &to, "/"]).is_err(), "it separated them once only");
    kubectl(&["delete", "networkpolicy", "nobody", "--namespace", &scene.namespace])?;
    let answered = || scene.run("client", &["get", &to, "/"]).ok();
    eventually("without it they are joined again", BOUND, answered).map(|_| ())
}

/// A rule of a node's FORWARD chain, for as long as this is there.
struct Drops {
    node: String,
    rule: Vec<String>,
}

impl Drops {
    fn between(node: &str, from: &str, to: &str) -> Result<Self> {
        let rule = ["FORWARD", "-s", from, "-d", to, "-j", "DROP"].map(str::to_owned).to_vec();
        let drops = Self { node: node.to_owned(), rule };
        drops.iptables("-I")?;
        Ok(drops)
    }

    fn iptables(&self, what: &str) -> Result<String> {
        let rule = self.rule.iter().map(String::as_str);
        run_on(&self.node, &["iptables", "-w", what].into_iter().chain(rule).collect::<Vec<_>>())
    }

    /// How many packets it met.
    fn packets(&self) -> Result<u64> {
        let chain = run_on(&self.node, &["iptables", "-w", "-nvxL", "FORWARD"])?;
        let (from, to) = (&self.rule[2], &self.rule[4]);
        let mut lines = chain.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let rule = lines.find(|words| words.contains(&"DROP") && words.contains(&&**from) && words.contains(&&**to));
        Ok(rule.context("the rule is gone")?[0].parse()?)
    }
}

impl Drop for Drops {
    fn drop(&mut self) {
        let _ = self.iptables("-D");
    }
}
