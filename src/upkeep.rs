//! What an agent and a waypoint of its own do alike, as processes: their shares of the machine, and what is done now and then.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use tracing::{error, warn};

use crate::memory::{self, GivingBack};
use crate::policy::{self, Problem};
use crate::proxy::{Limits, Proxy};
use crate::source::Report;
use crate::telemetry::AccessLogWriter;
use crate::transport::fast;

/// What is done now and then: bytes of long connections are counted, and the age of the model.
pub async fn housekeeping(proxy: Arc<Proxy>, report: Arc<Report>) {
    let mut ticks = tokio::time::interval(HOUSEKEEPING);
    let mut unread = Vec::new();
    loop {
        ticks.tick().await;
        proxy.tick();
        report.record_metrics();
        tell_unread(&proxy, &mut unread);
    }
}

/// Counts the policies that are not enforced as written, and says once which of them speak of requests that nobody reads.
fn tell_unread(proxy: &Proxy, told: &mut Vec<Problem>) {
    let state = proxy.model.read();
    policy::record_metrics(&state.not_enforced());
    let unread = state.unread();
    for Problem { policy, field, cause } in unread.iter().filter(|problem| !told.contains(problem)) {
        warn!(%policy, field, cause, "A policy is not in force as written.");
    }
    *told = unread;
}

/// What a load needed of memory is given back once most of it has gone.
pub async fn keep_small(proxy: Arc<Proxy>) {
    let mut ticks = tokio::time::interval(LOOKING_AT_MEMORY);
    let mut giving_back = GivingBack::default();
    loop {
        ticks.tick().await;
        if giving_back.look(proxy.connections.total()) {
            proxy.workers.give_back_buffers().await;
            memory::give_back();
        }
    }
}

pub async fn finish(writer: AccessLogWriter) {
    let flushed = tokio::task::spawn_blocking(move || writer.finish(FLUSH)).await;
    if !matches!(flushed, Ok(true)) {
        error!("The access log's last lines could not be written in time.");
    }
}

/// Tunnels that wait for their next flow hold a descriptor each: an eighth of what connections may have, in all.
pub fn fast_pool(connections: usize, threads: usize) -> fast::PoolSettings {
    let defaults = fast::PoolSettings::default();
    let share = (connections / 8 / threads.max(1)).max(1);
    fast::PoolSettings { idle_total: defaults.idle_total.min(share), ..defaults }
}

pub fn descriptor_share() -> usize {
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    Limits::from_descriptors(soft)
}

const HOUSEKEEPING: Duration = Duration::from_secs(5);
const LOOKING_AT_MEMORY: Duration = Duration::from_secs(1);
const FLUSH: Duration = Duration::from_secs(2);
/// Label sets of metrics; what is beyond them is counted together.
pub const LABEL_SETS: usize = 2000;
