//! The tests on a real cluster, which `cargo xtask e2e` brings up once for all of them.
//!
//! Each module is one subject. Each trial has a Kubernetes namespace of its own ([`scene::Scene`]), so that trials run
//! side by side; what it tells of a failure are the events, the pods and the logs.

mod authorizers;
mod canaries;
mod charts;
mod cluster;
mod controller;
mod gateway_api;
mod identity;
mod images;
mod joining;
mod keys;
mod mesh;
mod network_policy;
mod nodes;
mod outages;
mod policies;
mod probes;
mod rotation;
mod scale;
mod scene;
mod services;
mod starting;
mod status;
mod tools;
mod traffic;
mod traffic_policies;
mod turnover;
mod uninstall;
mod upgrade;
mod waypoints;
mod wire;

use std::process::ExitCode;

use libtest_mimic::Arguments;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(3);
    let everyday = [
        nodes::trials(),
        policies::trials(),
        services::trials(),
        images::trials(),
        charts::trials(),
        identity::trials(),
        status::trials(),
        rotation::trials(),
        joining::trials(),
        tools::trials(),
        traffic::trials(),
        gateway_api::trials(),
        traffic_policies::trials(),
        authorizers::trials(),
        keys::trials(),
        network_policy::trials(),
        outages::trials(),
        probes::trials(),
        starting::trials(),
        turnover::trials(),
        upgrade::trials(),
        waypoints::trials(),
        uninstall::trials(),
    ];
    let is_set = |name| std::env::var_os(name).is_some();
    let subjects = match (is_set("SELVEDGE_KWOK"), is_set("SELVEDGE_FLAGGER")) {
        (true, _) => vec![scale::trials()],
        (_, true) => vec![canaries::trials()],
        _ => everyday.into(),
    };
    let (number, of) = share();
    let mine = subjects.into_iter().flatten().enumerate().filter(|(at, _)| at % of == number - 1);
    libtest_mimic::run(&arguments, mine.map(|(_, trial)| trial).collect()).exit_code()
}

/// Which of how many clusters this is, each of which gets its share of the tests: `2/3` is the second of three.
fn share() -> (usize, usize) {
    let said = std::env::var("SELVEDGE_SHARE").unwrap_or_else(|_| "1/1".to_owned());
    let parts = said.split_once('/').and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
    match parts {
        Some((number, of)) if (1..=of).contains(&number) => (number, of),
        _ => panic!("SELVEDGE_SHARE is {said:?}; the second of three is 2/3"),
    }
}
