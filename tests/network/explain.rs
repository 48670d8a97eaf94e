//! `selvedge explain` and the agents are asked the same, and must agree.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Lab, PodSpec, ServiceSpec, authorization, trial_with};
use serde_json::{Value, json};

use self::world::agrees_in_a_random_world;
use crate::lab;

mod policies;
mod world;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![trial_with("explain::it_answers_people", lab(), it_answers_people)];
    trials.extend(seeds().into_iter().enumerate().map(|(world, seed)| {
        let name = format!("explain::it_agrees_with_the_agents_in_random_world_{}", world + 1);
        trial_with(&name, lab(), move |lab| {
            agrees_in_a_random_world(lab, seed)
                .with_context(|| format!("replay this world with {SEED}={seed}, manifests:\n{}", written(lab)))
        })
    }));
    trials
}

fn it_answers_people(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080))?;
    let old = lab.pod(PodSpec::new("shop/old", "node-b").outside())?;
    lab.service(&ServiceSpec::new("shop/cart-service").cluster_ip(vips(1)[0]).port("http", 80, 8080).endpoint(&cart))?;
    let rule = json!({
        "from": [{"source": {"serviceAccounts": ["web"]}}],
        "to": [{"operation": {"ports": ["8080"]}}],
    });
    lab.put(&authorization("shop/web-only", json!({"rules": [rule]})))?;
    let (web_ip, cart_ip, vip) = (web.ip().to_string(), cart.ip().to_string(), vips(1)[0].to_string());
    // Each name of one destination gives one answer, on the only port it has.
    for from in ["shop/web", &web_ip] {
        for to in ["shop/cart", "pod/shop/cart", &cart_ip, "shop/cart-service", "svc/shop/cart-service", &vip] {
            let output = run_explain(lab, &[from, to])?;
            ensure!(output.code == 0 && output.stdout.contains(": allowed"), "{from} to {to}: {output:?}");
            ensure!(output.stdout.contains("AuthorizationPolicy shop/web-only: rule 1"), "{from} to {to}: {output:?}");
        }
    }
    for (from, to, reason) in [
        ("shop/web", vec!["shop/cart", "--port", "9090"], "policy:shop/web-only"),
        ("shop/old", vec!["shop/cart"], "policy:shop/web-only"),
        ("shop/web", vec!["shop/cart-service", "--port", "81"], "no-endpoint"),
        ("shop/web", vec!["10.244.1.250", "--port", "80"], "unknown-destination"),
        ("shop/web", vec!["shop/cart", "--port", "15008"], "protocol"),
    ] {
        let output = run_explain(lab, &[&[from][..], &to, &["-o", "json"]].concat())?;
        let said: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        ensure!(output.code == 0 && said["verdict"] == "deny" && said["reason"] == reason, "{from} to {to:?}: {said}");
    }
    for (arguments, wanted) in [
        (["shop/nobody", "shop/cart"], "there is no Pod shop/nobody"),
        (["shop/web", "shop/nobody"], "there is neither a Pod nor a Service shop/nobody"),
        (["shop/web", "nobody"], "neither an IP address nor of the form namespace/name"),
        (["shop/web", "shop/old"], "declares no port: give --port"),
        (["shop/web", "192.0.2.1"], "give --port"),
    ] {
        let output = run_explain(lab, &arguments)?;
        ensure!(output.code != 0 && output.stdout.is_empty() && output.stderr.contains(wanted), "{output:?}");
    }
    drop(old);
    Ok(())
}

#[derive(Debug)]
struct Said {
    code: i32,
    stdout: String,
    stderr: String,
}

fn run_explain(lab: &Lab, arguments: &[&str]) -> Result<Said> {
    let output =
        Command::new(lab.binary()?).arg("explain").arg("--manifests").arg(lab.manifests()).args(arguments).output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Said { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) })
}

fn written(lab: &Lab) -> String {
    let objects = selvedge_lab::read_documents(lab.manifests()).unwrap_or_default();
    objects.iter().map(|object| format!("{object}\n")).collect()
}

/// One seed a world: chosen anew each time, or the one that the environment names.
fn seeds() -> Vec<u64> {
    match std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..WORLDS).map(|world| RandomState::new().hash_one(world)).collect(),
    }
}

fn vips(number: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into());
    [Ipv4Addr::new(10, 96, 0, number).into(), v6.into()]
}

const SEED: &str = "SELVEDGE_SEED";
const WORLDS: usize = 3;
const SERVICES: u8 = 3;
