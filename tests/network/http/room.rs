//! How much the agent holds for the requests of one pod.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, eventually, trial_with};
use serde_json::json;

use super::{Keeping, Shop};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![trial_with("http::room::one_pod_holds_so_much_and_no_more", lab(), so_much_and_no_more)]
}

/// Some more bodies than a pod may have kept for another try: those beyond pass, and are not kept.
fn so_much_and_no_more(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    lab.put(&json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "TrafficPolicy",
        "metadata": {"namespace": "shop", "name": "cart"},
        "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "cart"}], "retry": {"attempts": 1}},
    }))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let read = |name: &str, labels: &[(&str, &str)]| Some(agents[0].metrics().ok()?.sum(name, labels));
    let held = || read("selvedge_http_held_bytes", &[]);
    let (requests, most) = (1400, f64::from(64 << 20));
    let script = format!(
        "cd $(mktemp -d) && head -c 60000 /dev/zero > body && h2load -n {requests} -c 7 -m 200 -ph2c -d body {}; \
         rm -r $PWD",
        shop.url("/hold")
    );
    let said = std::thread::scope(|scope| -> Result<String> {
        let load = scope.spawn(|| shop.web.sh(&script));
        // However this goes, the load is to end.
        let looked = (|| {
            eventually("there is no more room", 4 * BOUND, || {
                let crowded = read("selvedge_http_crowded_total", &[("what", "body")])?;
                (crowded > 50.0).then_some(())
            })?;
            let held = held().unwrap_or_default();
            ensure!(held > most * 0.75 && held < most * 1.25, "{held} bytes are held");
            // Others go on, of the same pod too.
            Keeping::connect(&shop.web, shop.vip())?.get("/x").map(drop)
        })();
        shop.near.release();
        shop.far.release();
        let said = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        looked.map(|()| said)
    })?;
    ensure!(said.contains(&format!("{requests} succeeded, 0 failed, 0 errored, 0 timeout")), "{said}");
    // What is left is the windows of connections that wait.
    eventually("it is given back", BOUND, || (held()? < most / 2.0).then_some(()))
}
