//! The real-network tests: nodes and pods as namespaces, the real kernel, the real binary.
//!
//! Each module is one subject. Each trial makes a lab of its own, so that trials run side by side; `--test-threads`
//! says how many (4 unless said otherwise).

use std::path::PathBuf;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use selvedge_lab::{LabOptions, enter};

mod access_log;
mod admin;
mod capture;
mod capture_modes;
mod cni;
mod crash;
mod drain;
mod drift;
mod explain;
mod exposition;
mod floods;
mod hbone;
mod held;
mod http;
mod identity;
mod knock;
mod lifecycle;
mod load;
mod manifests;
mod observability;
mod plain;
mod policy;
mod pool;
mod probes;
mod proof;
mod raw_peer;
mod retry;
mod reuse;
mod rotation;
mod same_node;
mod services;
mod soak;
mod source_address;
mod transport;
mod truthful;
mod tunnel;
mod turns;
mod waypoints;

fn main() -> ExitCode {
    if let Some(code) = load::application() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    enter();
    arguments.test_threads.get_or_insert(4);
    libtest_mimic::run(&arguments, trials()).exit_code()
}

fn trials() -> Vec<Trial> {
    let modules = [
        access_log::trials(),
        admin::trials(),
        capture::trials(),
        capture_modes::trials(),
        cni::trials(),
        crash::trials(),
        drain::trials(),
        drift::trials(),
        explain::trials(),
        floods::trials(),
        hbone::trials(),
        held::trials(),
        http::trials(),
        identity::trials(),
        lifecycle::trials(),
        load::trials(),
        manifests::trials(),
        observability::trials(),
        plain::trials(),
        policy::trials(),
        pool::trials(),
        probes::trials(),
        proof::trials(),
        retry::trials(),
        reuse::trials(),
        rotation::trials(),
        same_node::trials(),
        services::trials(),
        soak::trials(),
        source_address::trials(),
        transport::trials(),
        truthful::trials(),
        tunnel::trials(),
        turns::trials(),
        waypoints::trials(),
    ];
    modules.into_iter().flatten().collect()
}

/// What carries connections between the agents of this run: `SELVEDGE_TUNNEL` reaches them by the environment.
fn tunnel() -> &'static str {
    if std::env::var("SELVEDGE_TUNNEL").is_ok_and(|how| how == "hbone") { "hbone" } else { "fast" }
}

/// Two nodes, both families, and the binary that this test was built with.
fn lab() -> LabOptions {
    LabOptions { binary: Some(PathBuf::from(env!("CARGO_BIN_EXE_selvedge"))), ..LabOptions::default() }
}
