//! A change decides live connections again: those no longer allowed are reset, the others never notice.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{BOUND, Lab, ServiceSpec, authorization, eventually, trial_with};
use serde_json::json;

use super::{SOON, Shop, peer};
use crate::knock::{Ended, knock};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("policy::a_change_of_policy_resets_what_it_forbids_alone", lab(), a_change_of_policy),
        trial_with("policy::a_change_of_the_destination_decides_again", lab(), a_change_of_the_destination),
        trial_with("policy::a_malformed_policy_keeps_its_last_good_version", lab(), the_last_good_version),
        trial_with("policy::what_only_observes_is_counted", lab(), what_only_observes_is_counted),
    ]
}

fn a_change_of_policy(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let [mut web, mut teller, mut stranger] = shop.calls()?;
    let bank = json!({"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["bank"]}}]}]});
    shop.enforce(&[authorization("shop/no-bank", bank.clone())])?;
    teller.is_reset("teller, denied through the tunnel")?;
    web.still_talks("web")?;
    stranger.still_talks("stranger")?;
    let line = shop.agents[1].access_line("the connection that was ended", |line| {
        line["source_pod"] == "bank/teller" && line["reason"] == "policy:shop/no-bank"
    })?;
    ensure!(line["direction"] == "inbound", "{line}");
    // The client's agent may have seen the reset before it read the policy.
    shop.agents[0].access_line("the same at the client's agent", |line| {
        line["source_pod"] == "bank/teller" && (line["reason"] == "policy:shop/no-bank" || line["reason"] == "reset")
    })?;
    shop.enforce(&[authorization("shop/no-bank", bank), peer("shop/strict", json!({"mtls": {"mode": "STRICT"}}))])?;
    stranger.is_reset("stranger, denied in plaintext")?;
    web.still_talks("web")?;
    let refused = |line: &serde_json::Value| line["reason"] == "plaintext:shop/strict";
    shop.agents[1].access_line("the plaintext connection that was ended", refused)?;
    shop.enforce(&[authorization("shop/nobody", json!({}))])?;
    web.is_reset("web, whom no ALLOW policy allows")
}

fn a_change_of_the_destination(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let locked = json!({"selector": {"matchLabels": {"tier": "locked"}}, "rules": []});
    let served = json!({"targetRefs": [{"kind": "Service", "name": "late"}], "rules": []});
    let late = || ServiceSpec::new("shop/late").port("http", 8080, 8080);
    lab.service(&late())?;
    shop.enforce(&[authorization("shop/locked", locked), authorization("shop/served", served)])?;
    let [mut web, mut teller, mut stranger] = shop.calls()?;
    for call in [&mut web, &mut teller, &mut stranger] {
        call.still_talks("before any change")?;
    }
    let mut relabelled = shop.cart.manifest().clone();
    relabelled["metadata"]["labels"]["tier"] = "locked".into();
    lab.put(&relabelled)?;
    for (call, name) in [(&mut web, "web"), (&mut teller, "teller"), (&mut stranger, "stranger")] {
        call.is_reset(&format!("{name}, after a new label"))?;
    }
    lab.put(shop.cart.manifest())?;
    lab.settle(&shop.agents)?;
    let [mut web, ..] = shop.calls()?;
    web.still_talks("web, once the label is gone")?;
    lab.service(&late().endpoint(&shop.cart))?;
    web.is_reset("web, once the pod is an endpoint of the Service")
}

fn the_last_good_version(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let bank = json!({"rules": [{"from": [{"source": {"namespaces": ["bank"]}}]}]});
    let mut policy = authorization("shop/bank", bank);
    lab.put(&policy)?;
    lab.settle(&shop.agents)?;
    let outcome = |at: usize| Ok::<_, anyhow::Error>(knock(&shop.callers[at], (shop.cart.ip(), 8080))?.ended);
    let greeted = Ended::Greeted("hello".into());
    ensure!(outcome(0)? == Ended::Refused && outcome(1)? == greeted, "the good version is not in force");
    let mut teller = Call::open(&shop, 1)?;
    policy["spec"]["rules"][0]["from"][0]["source"]["namespaces"] = json!([7]);
    lab.put(&policy)?;
    lab.settle(&shop.agents)?;
    let problems = shop.agents[1].dump()?["manifestProblems"].to_string();
    ensure!(problems.contains("shop/bank") || problems.contains("bank"), "nothing is said of it: {problems}");
    ensure!(outcome(0)? == Ended::Refused && outcome(1)? == greeted, "the last good version is not in force");
    teller.still_talks("teller")
}

fn what_only_observes_is_counted(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let mut dry = authorization("shop/dry", json!({"action": "DENY", "rules": [{}]}));
    dry["metadata"]["annotations"] = json!({"selvedge.dev/dry-run": "true"});
    let audit = authorization("shop/audit", json!({"action": "AUDIT", "rules": [{}]}));
    shop.enforce(&[dry, audit])?;
    for caller in &shop.callers {
        let ended = knock(caller, (shop.cart.ip(), 8080))?.ended;
        ensure!(ended == Ended::Greeted("hello".into()), "it was to change nothing: {ended:?}");
    }
    eventually("what they would have done is counted", BOUND, || {
        let metrics = shop.agents[1].metrics().ok()?;
        let seen = |labels: &[(&str, &str)]| metrics.sum("selvedge_policy_observed_total", labels);
        let wanted =
            seen(&[("policy", "shop/dry"), ("verdict", "deny")]) == 3.0 && seen(&[("policy", "shop/audit")]) == 3.0;
        wanted.then_some(())
    })
}

impl Shop<'_> {
    /// A conversation from each caller.
    fn calls(&self) -> Result<[Call; 3]> {
        Ok([Call::open(self, 0)?, Call::open(self, 1)?, Call::open(self, 2)?])
    }
}

/// A connection that goes on.
struct Call(TcpStream);

impl Call {
    fn open(shop: &Shop, caller: usize) -> Result<Self> {
        let mut stream = shop.callers[caller].connect((shop.cart.ip(), 8080))?;
        stream.set_read_timeout(Some(SOON))?;
        let mut greeting = [0; 5];
        stream.read_exact(&mut greeting).with_context(|| format!("{} hears nothing", shop.callers[caller].name()))?;
        Ok(Self(stream))
    }

    fn still_talks(&mut self, who: &str) -> Result<()> {
        let mut echo = [0; 4];
        self.0.write_all(b"ping").and_then(|()| self.0.read_exact(&mut echo)).with_context(|| who.to_owned())?;
        ensure!(&echo == b"ping", "{who} hears something else");
        Ok(())
    }

    fn is_reset(&mut self, who: &str) -> Result<()> {
        let mut nothing = [0; 1];
        match self.0.read(&mut nothing) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            other => bail!("{who}: not reset within {SOON:?}, but {other:?}"),
        }
    }
}
