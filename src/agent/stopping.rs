//! How an agent is asked to end.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::error;

use super::uninstall::Uninstall;
use crate::proxy::Connections;

/// Whether the agent was asked to end, by a signal or through its admin port, and whether its rules go with it.
#[derive(Debug)]
pub struct Stopping(watch::Sender<Stop>);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    No,
    Asked,
    RulesStay,
    ForGood,
}

impl Default for Stopping {
    fn default() -> Self {
        Self(watch::Sender::new(Stop::No))
    }
}

impl Stopping {
    pub fn ask(&self) {
        self.0.send_if_modified(|stop| *stop == Stop::No && std::mem::replace(stop, Stop::Asked) == Stop::No);
    }

    async fn asked(&self) {
        // The sender is ours and lives.
        let _ = self.0.subscribe().wait_for(|stop| *stop != Stop::No).await;
    }

    pub async fn asked_for_good(&self) {
        let _ = self.0.subscribe().wait_for(|stop| *stop == Stop::ForGood).await;
    }

    pub fn is_asked(&self) -> bool {
        *self.0.borrow() != Stop::No
    }

    pub fn is_for_good(&self) -> bool {
        *self.0.borrow() == Stop::ForGood
    }

    /// Completes at SIGTERM, SIGINT or a request to drain, once it is known what becomes of the rules.
    pub async fn wait(&self, connections: &Connections, keep_capture: bool, uninstall: Option<&Uninstall>) {
        let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            error!(connections = connections.total(), "Signals cannot be caught; the agent runs until it is killed.");
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = self.asked() => {}
        }
        self.ask();
        let for_good = match uninstall {
            Some(uninstall) => uninstall.is_for_good().await || !keep_capture,
            None => !keep_capture,
        };
        self.0.send_replace(if for_good { Stop::ForGood } else { Stop::RulesStay });
    }
}
