//! The tests on a real cluster, which `cargo xtask e2e` brings up once for all of them.
//!
//! Each module is one subject. Each trial has a Kubernetes namespace of its own ([`scene::Scene`]), so that trials run
//! side by side; what it tells of a failure are the events, the pods and the logs.

mod charts;
mod cluster;
mod controller;
mod gateway_api;
mod identity;
mod images;
mod joining;
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
mod turnover;
mod uninstall;
mod upgrade;
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
        network_policy::trials(),
        outages::trials(),
        probes::trials(),
        starting::trials(),
        turnover::trials(),
        upgrade::trials(),
        uninstall::trials(),
    ];
    let subjects = match std::env::var_os("SELVEDGE_KWOK") {
        Some(_) => vec![scale::trials()],
        None => everyday.into(),
    };
    libtest_mimic::run(&arguments, subjects.into_iter().flatten().collect()).exit_code()
}
