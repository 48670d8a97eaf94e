//! Whether an agent is ready, and why not.

use std::sync::Arc;

use tokio::sync::watch;

use super::stopping::Stopping;
use super::turns::Standing;
use crate::admin::{Control, Readiness};
use crate::capture::show::{CaptureStatus, PodState};
use crate::model::Model;
use crate::proxy::Connections;
use crate::source::Report;

/// What the admin servers ask and tell.
pub struct AgentState {
    pub node: String,
    pub model: Arc<Model>,
    pub capture: CaptureStatus,
    pub report: Arc<Report>,
    pub stopping: Arc<Stopping>,
    pub connections: Arc<Connections>,
    pub standing: watch::Receiver<Standing>,
}

impl AgentState {
    /// The joined pods of this node that are neither captured nor named as failed, and why.
    pub fn not_captured(&self) -> Vec<String> {
        let snapshot = self.capture.snapshot();
        let state = self.model.read();
        let joined = state.mesh.workloads_on(&self.node);
        let mut reasons = Vec::new();
        for workload in joined.filter(|w| w.membership.is_joined() && w.pod.is_live() && !w.pod.ips.is_empty()) {
            let status = snapshot.pods.iter().find(|status| status.uid == workload.uid().as_str());
            // A pod whose capture failed is named in metrics and by `selvedge capture show`; it must not take the
            // readiness of all others with it.
            if !status.is_some_and(|status| matches!(status.state, PodState::Captured | PodState::Failed)) {
                let why = status.and_then(|status| status.reason.as_deref()).unwrap_or("under way");
                reasons.push(format!("pod {} is not captured yet: {why}", workload.name()));
            }
        }
        reasons
    }
}

impl Control for AgentState {
    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if !self.model.is_synced() {
            match &*self.report.waiting() {
                [] => reasons.push("the objects have not all been read yet".to_owned()),
                waiting => reasons.extend_from_slice(waiting),
            }
        }
        if self.stopping.is_asked() {
            reasons.push(format!("the agent drains; {} connections are left", self.connections.total()));
        }
        match *self.standing.borrow() {
            Standing::Waits => reasons.push("another agent of this node has not handed over yet".to_owned()),
            Standing::Works => reasons.extend(self.not_captured()),
            // What it carries goes on; what is new is the next agent's.
            Standing::Succeeded => {}
        }
        Readiness { reasons }
    }

    fn drain(&self) {
        self.stopping.ask();
    }
}
