//! The images that `cargo xtask image` makes run as containers, with what they need inside.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use crate::cluster::{agent_image, nodes};
use crate::scene::{Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a pod of the agent's image prints its version", prints_version),
        trial("the agent's image has iptables with both back ends", has_iptables),
    ]
}

fn prints_version(scene: &Scene) -> Result<()> {
    for (number, node) in (1..).zip(nodes()?) {
        let pod = format!("version-{number}");
        let said = run_to_the_end(scene, &pod, &node, r#"args: ["--version"]"#)?;
        let wanted = concat!("selvedge ", env!("CARGO_PKG_VERSION"));
        ensure!(said.trim().starts_with(wanted), "on {node} it said {said:?}");
    }
    Ok(())
}

fn has_iptables(scene: &Scene) -> Result<()> {
    let node = nodes()?.into_iter().next().context("no node")?;
    for (program, back_end) in [
        ("iptables-nft", "nf_tables"),
        ("ip6tables-nft", "nf_tables"),
        ("iptables-legacy", "legacy"),
        ("ip6tables-legacy", "legacy"),
    ] {
        let said = run_to_the_end(scene, program, &node, &format!(r#"command: ["{program}", "--version"]"#))?;
        ensure!(said.contains(back_end), "{program} said {said:?}");
    }
    // An extension and its libraries are found.
    let help = r#"command: ["iptables-nft", "-j", "TPROXY", "--help"]"#;
    let said = run_to_the_end(scene, "extension", &node, help)?;
    ensure!(said.contains("--on-port"), "iptables knows no TPROXY: {said}");
    Ok(())
}

/// Runs a pod of the agent's image, and returns what it said.
fn run_to_the_end(scene: &Scene, name: &str, node: &str, start: &str) -> Result<String> {
    scene.apply(&format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: {name}}}\n\
         spec:\n  \
           nodeName: {node}\n  \
           restartPolicy: Never\n  \
           containers:\n  \
           - name: main\n    \
             image: \"{}\"\n    \
             imagePullPolicy: Never\n    \
             {start}\n",
        agent_image()?
    ))?;
    scene.wait_for("jsonpath={.status.phase}=Succeeded", name)?;
    scene.logs(name)
}
