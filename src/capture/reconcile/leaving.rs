//! Pods that leave: nothing new is captured, flows end or are reset, then everything goes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Event, MISSING_LOOKS, Reconciler, Tracked};
use crate::capture::pod::Kernel;
use crate::mesh::{PodUid, Workload};

pub(super) struct Departure {
    linger: Instant,
    deadline: Instant,
    reset_at: Option<Instant>,
}

impl Reconciler {
    /// Starts and ends the leaving of pods that are not desired, or whose namespace is no more.
    pub(super) async fn depart(&mut self, desired: &HashMap<PodUid, Arc<Workload>>, present: &HashSet<PodUid>) {
        let now = Instant::now();
        let mut jobs = Vec::new();
        let uids: Vec<PodUid> = self.pods.keys().cloned().collect();
        for uid in uids {
            let Some(mut pod) = self.pods.remove(&uid) else { continue };
            let lost = pod.missing >= MISSING_LOOKS;
            if desired.contains_key(&uid) && !lost {
                self.pods.insert(uid, pod);
                continue;
            }
            let mut step = Step::Wait;
            let departure = pod.leaving.get_or_insert_with(|| {
                let _ = self.events.send(Event::Leaving(uid.clone()));
                step = Step::Begin;
                let (linger, deadline) = (now + self.settings.linger, now + self.settings.drain);
                Departure { linger, deadline, reset_at: None }
            });
            let gone = lost || !present.contains(&uid);
            let live = self.flows.live(&uid);
            if live > 0 && departure.reset_at.is_none() && (gone || now >= departure.deadline) {
                self.flows.reset(&uid);
                departure.reset_at = Some(now);
            }
            let idle = live == 0 && (gone || now >= departure.linger);
            let drained = idle || departure.reset_at.is_some_and(|at| now >= at + RESET_TIME);
            if drained && (step == Step::Wait || gone) {
                step = Step::Finish;
            }
            jobs.push((pod, step));
        }
        for (pod, finished) in self.on_threads(jobs, leave).await {
            let uid = pod.capture.uid().clone();
            if !finished {
                self.pods.insert(uid, pod);
                continue;
            }
            if let Some(cookie) = pod.capture.cookie {
                self.former.insert(cookie, (uid.clone(), pod.capture.workload.pod.ips.clone()));
            }
            tracing::info!(pod = %pod.capture.workload.name(), "The pod has left; nothing of ours is in it.");
            let _ = self.events.send(Event::Gone(uid));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Begin,
    Wait,
    Finish,
}

/// Takes one step of leaving; says whether nothing is left.
fn leave(pod: &mut Tracked, kernel: &Kernel, step: Step) -> bool {
    let name = pod.capture.workload.name().to_string();
    let result = match step {
        Step::Wait => return false,
        Step::Begin => pod.capture.begin_leaving(kernel).map_err(|error| error.to_string()),
        Step::Finish => pod.capture.finish_leaving(kernel).map_err(|error| error.to_string()),
    };
    if let Err(error) = &result {
        tracing::warn!(pod = %name, %error, "A step of leaving failed.");
        pod.failure = Some(error.clone());
    }
    step == Step::Finish
}

/// How long a reset may take to reach the applications before the rules go.
const RESET_TIME: Duration = Duration::from_secs(2);
