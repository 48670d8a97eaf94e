//! Policy on real traffic: three callers, one server, and who gets through.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{
    Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, Server, ServiceSpec, eventually, policy, trial_with,
};
use serde_json::Value;

use crate::knock::{Ended, knock};
use crate::lab;

mod live;
mod rules;

pub fn trials() -> Vec<Trial> {
    let table = |name: &str, cases: fn(&Shop) -> Vec<Case>| {
        trial_with(&format!("policy::{name}"), lab(), move |lab| {
            let mut shop = Shop::open(lab)?;
            cases(&shop).iter().enumerate().try_for_each(|(number, case)| shop.hold(number, case))?;
            shop.all_denials_are_counted()
        })
    };
    let mut trials = vec![
        table("a_rule_s_sources_say_who_gets_through", rules::sources),
        table("a_rule_s_operations_and_conditions_say_who_gets_through", rules::operations_and_conditions),
        table("deny_goes_before_allow_and_what_only_observes_changes_nothing", rules::actions),
        table("a_policy_stands_over_the_pods_that_it_selects_however_they_are_reached", rules::scopes),
        table("what_cannot_be_enforced_or_read_fails_closed", rules::closed),
        table("plaintext_is_refused_where_peer_authentication_is_strict", rules::peers),
    ];
    trials.extend(live::trials());
    trials
}

/// Policies, and who gets through to which port with them; a bare name means both.
pub struct Case {
    what: &'static str,
    policies: Vec<Value>,
    allowed: &'static str,
}

/// `shop/cart` on a node of its own, with ports 8080 and 9090; callers `shop/web` and `bank/teller` in the mesh, and
/// `old/stranger` outside it.
pub struct Shop<'a> {
    lab: &'a Lab,
    callers: [Pod; 3],
    cart: Pod,
    servers: Vec<(u16, Server)>,
    agents: Vec<Agent>,
    denied: usize,
}

impl<'a> Shop<'a> {
    fn open(lab: &'a Lab) -> Result<Self> {
        lab.namespace("old", false)?;
        let caller = |name: &str| {
            let account = name.split('/').next_back().unwrap_or(name);
            lab.pod(PodSpec::new(name, "node-a").service_account(account))
        };
        let callers = [caller("shop/web")?, caller("bank/teller")?, caller("old/stranger")?];
        let spec = PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080).port("admin", 9090);
        let cart = lab.pod(spec)?;
        lab.service(&ServiceSpec::new("shop/cart").cluster_ip(SERVICE.ip()).port("http", 80, 8080).endpoint(&cart))?;
        let mut servers = Vec::new();
        for port in PORTS {
            servers.push((port, cart.serve_greeting(port, "hello")?));
        }
        let agents = lab.start_agents(&AgentOptions::default())?;
        Ok(Self { lab, callers, cart, servers, agents, denied: 0 })
    }

    /// Puts policies in force, in the place of those before.
    fn enforce(&self, policies: &[Value]) -> Result<()> {
        enforce(self.lab, &self.agents, policies)
    }

    /// Every caller calls every port, and gets through where the case says so.
    fn hold(&mut self, number: usize, case: &Case) -> Result<()> {
        let what = case.what;
        let mut policies = case.policies.clone();
        // A name of its own, so that it is seen when it is in force.
        for policy in &mut policies {
            policy["metadata"]["name"] = format!("{}-{number}", text(&policy["metadata"]["name"])).into();
        }
        self.enforce(&policies)?;
        for at in 0..self.callers.len() {
            let name = self.callers[at].name().to_owned();
            let mut ways = PORTS.map(|port| (SocketAddr::new(self.cart.ip(), port), port)).to_vec();
            // Nobody leads a pod outside the mesh from a Service's address to its endpoints here.
            if name != "stranger" {
                ways.push((SERVICE, 8080));
            }
            for (to, port) in ways {
                let allowed = case.allowed.split(' ').any(|one| one == name || one == format!("{name}:{port}"));
                self.call(at, to, port, allowed).map_err(|error| error.context(format!("{what}: {name} to {to}")))?;
            }
        }
        Ok(())
    }

    /// `port` is the pod's, whatever was dialled.
    fn call(&mut self, caller: usize, to: SocketAddr, port: u16, allowed: bool) -> Result<()> {
        let caller = &self.callers[caller];
        let accepted = || self.servers.iter().map(|(_, server)| server.peers().len()).sum::<usize>();
        let (accepted_before, inbound_before) = (accepted(), self.inbound()?.len());
        let call = knock(caller, to)?;
        if allowed {
            ensure!(call.ended == Ended::Greeted("hello".into()), "it is to be allowed: {:?}", call.ended);
            return Ok(());
        }
        ensure!(call.ended == Ended::Refused, "it is to be denied: {:?}", call.ended);
        ensure!(accepted() == accepted_before, "the application accepted a connection that was denied");
        self.denied += 1;
        // The lines of calls before may come late.
        let line = eventually("the inbound denial is logged", BOUND, || {
            let lines = self.inbound().ok()?;
            let new = lines.into_iter().skip(inbound_before);
            new.rev().find(|line| {
                line["verdict"] == "deny"
                    && line["source_pod"] == caller.full_name()
                    && text(&line["destination_addr"]).ends_with(&format!(":{port}"))
            })
        })?;
        let reason = text(&line["reason"]);
        ensure!(reason.starts_with("policy:") || reason.starts_with("plaintext:"), "{line}");
        if caller.namespace_name() != "old" {
            // A port may have been used before: the reason's name tells whose line it is.
            let from = call.from.to_string();
            self.agents[0].access_line(&format!("the outbound denial, with reason {reason}"), |line| {
                line["source_addr"] == from && line["reason"] == reason
            })?;
        }
        Ok(())
    }

    fn inbound(&self) -> Result<Vec<Value>> {
        self.agents[1].access_log()
    }

    fn all_denials_are_counted(&self) -> Result<()> {
        eventually(&format!("{} denials are counted", self.denied), BOUND, || {
            let metrics = self.agents[1].metrics().ok()?;
            let failed = |reason| metrics.sum("selvedge_connections_failed_total", &[("reason", reason)]);
            let decided = metrics.sum("selvedge_policy_decisions_total", &[("verdict", "deny")]);
            let all = self.denied as f64;
            (failed("policy") + failed("plaintext") == all && decided == all).then_some(())
        })
    }
}

/// Writes policies in the place of those before, and waits until the agents have them. Names tell versions apart.
pub fn enforce(lab: &Lab, agents: &[Agent], policies: &[Value]) -> Result<()> {
    let documents: Vec<String> = policies.iter().map(ToString::to_string).collect();
    lab.write("policies.yaml", &documents.join("\n---\n"))?;
    let name = |policy: &Value| {
        let metadata = &policy["metadata"];
        format!("{} {}/{}", text(&policy["kind"]), text(&metadata["namespace"]), text(&metadata["name"]))
    };
    let mut wanted: Vec<String> = policies.iter().map(name).collect();
    wanted.sort();
    for agent in agents {
        eventually(&format!("{} has {wanted:?}", agent.node()), BOUND, || {
            let dump = agent.dump().ok()?;
            let mut have: Vec<&str> = dump["policies"].as_array()?.iter().map(|p| text(&p["name"])).collect();
            have.sort_unstable();
            (have == wanted).then_some(())
        })?;
    }
    Ok(())
}

fn peer(full_name: &str, spec: Value) -> Value {
    policy("PeerAuthentication", full_name, spec)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)), 80);
const PORTS: [u16; 2] = [8080, 9090];
/// A change of policy is to be felt at once; this bounds "at once" on a busy machine.
const SOON: Duration = Duration::from_secs(10);
