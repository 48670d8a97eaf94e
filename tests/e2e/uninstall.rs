//! Installed, removed without a trace, and installed again: by hand, in the order that docs/install.md tells, and by
//! `selvedge uninstall`.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Networking, eventually};
use serde_json::Value;

use crate::cluster::{get, kubectl, netns_of_pod, nodes, run_on, selvedge};
use crate::mesh::{AGENTS, STRICT, SYSTEM, folder, install, is_uninstalled, join, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial_alone};
use crate::wire::Wire;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("it is uninstalled by hand without a trace, and installed again", by_hand),
        trial_alone("selvedge uninstall leaves users' policies and nothing else", by_its_verb),
    ]
}

fn by_hand(scene: &Scene) -> Result<()> {
    let pods = Pods::make(scene)?;
    let talk = scene.talk("client", &pods.to)?;
    let wire = Wire::tap()?;
    kubectl(&["delete", "daemonset", "selvedge-agent", "--namespace", SYSTEM])?;
    is_uninstalled();
    // What is new leaves as without a mesh, while what is there goes on in its tunnel.
    eventually("new connections are not captured any more", BOUND, || {
        scene.run("client", &["tcp", &pods.to, "a needle after the rules"]).ok()?;
        wire.carried("a needle after the rules").ok()?.then_some(())
    })?;
    let talk: Value = serde_json::from_str(&talk.end()?)?;
    ensure!(talk["broken"].is_null() && talk["heard"].as_u64() > Some(10), "a connection was lost: {talk}");
    let bound = format!("--timeout={}s", BOUND.as_secs());
    kubectl(&["wait", "pod", "--for=delete", "--namespace", SYSTEM, "--selector", AGENTS, &bound])?;
    nothing_is_left_on_nodes()?;
    pods.are_as_before()?;
    kubectl(&["delete", "--ignore-not-found", "--kustomize", &folder("daemonset/base")])?;
    kubectl(&["delete", "--ignore-not-found", "--kustomize", &folder("crd")])?;
    nothing_is_left_in_cluster()?;
    let kinds = kubectl(&["get", "customresourcedefinitions", "--output", "name"])?;
    ensure!(!kinds.contains("selvedge.dev"), "kinds are left: {kinds}");
    pods.are_captured_again()
}

fn by_its_verb(scene: &Scene) -> Result<()> {
    let pods = Pods::make(scene)?;
    scene.apply(STRICT)?;
    let told = selvedge(&["uninstall"])?;
    is_uninstalled();
    ensure!(told.contains("DaemonSet selvedge-agent deleted"), "{told}");
    nothing_is_left_on_nodes()?;
    pods.are_as_before()?;
    eventually("its namespace is gone", BOUND, || get(&["namespace", SYSTEM]).err())?;
    nothing_is_left_in_cluster()?;
    get(&["--namespace", &scene.namespace, "peerauthentication", "strict"]).context("a user's policy is gone")?;
    scene.run("client", &["tcp", &pods.to, "without"])?;
    pods.are_captured_again()
}

/// A client and a server that join, and what their network namespaces had before they did.
struct Pods<'a> {
    scene: &'a Scene,
    to: String,
    before: [Networking; 2],
}

impl<'a> Pods<'a> {
    fn make(scene: &'a Scene) -> Result<Self> {
        install()?;
        let (client, server) = two_nodes()?;
        scene.pod("server", &server, &["serve", "echo:9000"])?;
        scene.pod("client", &client, &["pause"])?;
        let to = format!("{}:9000", scene.pod_ip("server")?);
        let pods = Self { scene, to, before: networking(scene)? };
        join(scene, true)?;
        for pod in NAMES {
            wait_captured(scene, pod)?;
        }
        ensure!(networking(scene)? != pods.before, "a captured pod is as one that is not: nothing would be shown");
        let wire = Wire::tap()?;
        let hidden = || {
            wire.clear().ok()?;
            scene.run("client", &["tcp", &pods.to, "a needle"]).ok()?;
            (!wire.carried("a needle").ok()?).then_some(())
        };
        eventually("nothing is readable between the nodes", BOUND, hidden)?;
        Ok(pods)
    }

    fn are_as_before(&self) -> Result<()> {
        for ((pod, before), now) in NAMES.iter().zip(&self.before).zip(networking(self.scene)?) {
            let difference = before.difference(&now);
            ensure!(difference.is_none(), "{pod} was and is\n{}", difference.unwrap_or_default());
        }
        Ok(())
    }

    /// Its pods never left the mesh as far as their namespace says.
    fn are_captured_again(&self) -> Result<()> {
        install()?;
        NAMES.iter().try_for_each(|pod| wait_captured(self.scene, pod))?;
        let said = || self.scene.run("client", &["tcp", &self.to, "again"]).ok().filter(|said| said == "again");
        eventually("they talk again", BOUND, said).map(drop)
    }
}

fn networking(scene: &Scene) -> Result<[Networking; 2]> {
    let of = |pod| {
        let netns = netns_of_pod(&scene.namespace, pod)?;
        // An address that the kernel still tries is not among the routes yet.
        let tried = || netns.sh("ip -6 addr show tentative").ok()?.is_empty().then_some(());
        eventually("the pod's addresses are settled", BOUND, tried)?;
        netns.networking()
    };
    Ok([of(NAMES[0])?, of(NAMES[1])?])
}

fn nothing_is_left_on_nodes() -> Result<()> {
    for node in nodes()? {
        let lists = run_on(&node, &["sh", "-c", "cat /etc/cni/net.d/*"])?;
        let list: Value =
            serde_json::from_str(&lists).with_context(|| format!("{node} has this for a list: {lists}"))?;
        let plugins: Vec<_> = list["plugins"].as_array().context("no plugins")?.iter().map(|at| &at["type"]).collect();
        ensure!(plugins == ["ptp", "portmap"], "{node} has the plugins {plugins:?}");
        let files = run_on(&node, &["sh", "-c", "ls -A /var/lib/selvedge; ls /opt/cni/bin | grep selvedge || true"])?;
        ensure!(files.trim().is_empty(), "{node} has {files} still");
        for table in ["iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"] {
            let all = format!("{table}; for at in /run/netns/*; do nsenter --net=$at {table}; done");
            let rules = run_on(&node, &["sh", "-c", &all])?;
            ensure!(!rules.contains("SELVEDGE"), "{node} or a pod of it has rules still: {rules}");
        }
    }
    Ok(())
}

fn nothing_is_left_in_cluster() -> Result<()> {
    let kinds = "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings";
    let left = kubectl(&["get", kinds, "--selector", "app.kubernetes.io/part-of=selvedge", "--output", "name"])?;
    ensure!(left.trim().is_empty(), "this is left in the cluster: {left}");
    Ok(())
}

const NAMES: [&str; 2] = ["client", "server"];
