//! Who leads: one replica holds the Lease, and knows when it no longer may.
//!
//! As in client-go's leader election: a holder renews every two seconds; one that could not for ten steps down, and only
//! fifteen after the last sign of life, by its own clock, does another take over. Clocks are never compared.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::{Client, Error};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::metrics;

/// Until when this replica leads.
#[derive(Clone)]
pub struct Leadership(watch::Receiver<Option<Instant>>);

impl Leadership {
    pub fn is_leader(&self) -> bool {
        self.0.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Completes once this replica leads.
    pub async fn gained(&mut self) {
        loop {
            if self.is_leader() {
                return;
            }
            if self.0.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Completes once it no longer does.
    pub async fn lost(&mut self) {
        loop {
            let Some(until) = *self.0.borrow_and_update() else { return };
            if Instant::now() >= until {
                return;
            }
            // Either a renewal moves the end, or the end comes.
            let _ = tokio::time::timeout_at(until.into(), self.0.changed()).await;
        }
    }
}

/// One replica's part in the election.
pub struct Elector {
    leases: Api<Lease>,
    namespace: String,
    /// This process, and no other ever.
    me: String,
    until: watch::Sender<Option<Instant>>,
    observed: Observed,
}

impl Elector {
    pub fn new(client: Client, namespace: &str, name: &str) -> (Self, Leadership) {
        let until = watch::Sender::new(None);
        let leadership = Leadership(until.subscribe());
        let me = format!("{name}_{:08x}", rand::random::<u32>());
        let leases = Api::namespaced(client, namespace);
        (Self { leases, namespace: namespace.to_owned(), me, until, observed: Observed::default() }, leadership)
    }

    /// Takes part until `stop` completes, and then gives the Lease back.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        loop {
            // A call that hangs must not make us believe in a Lease that has ended.
            let turn = tokio::time::timeout(CALL, self.turn());
            tokio::select! {
                turn = turn => match turn {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "The Lease could not be renewed or looked at."),
                    Err(_) => debug!("The API server did not answer about the Lease."),
                },
                () = &mut stop => break,
            }
            self.tell();
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = &mut stop => break,
            }
        }
        let led = self.until.borrow().is_some();
        self.until.send_replace(None);
        self.tell();
        if led && tokio::time::timeout(CALL, self.release()).await.is_err() {
            debug!("The Lease could not be given back; it ends by itself.");
        }
    }

    async fn turn(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let lease = self.leases.get_opt(LEASE).await?;
        match self.observed.judge(lease.as_ref(), &self.me, now) {
            Claim::Create => {
                let metadata = ObjectMeta {
                    name: Some(LEASE.to_owned()),
                    namespace: Some(self.namespace.clone()),
                    ..ObjectMeta::default()
                };
                let lease = self.mine(Lease { metadata, spec: None }, true);
                self.settle(self.leases.create(&PostParams::default(), &lease).await, now)
            }
            Claim::Take => {
                let lease = self.mine(lease.unwrap_or_default(), true);
                self.settle(self.leases.replace(LEASE, &PostParams::default(), &lease).await, now)
            }
            Claim::Renew => {
                let lease = self.mine(lease.unwrap_or_default(), false);
                self.settle(self.leases.replace(LEASE, &PostParams::default(), &lease).await, now)
            }
            Claim::Wait => {
                self.until.send_replace(None);
                Ok(())
            }
        }
    }

    /// `now` is from before the call: the Lease lasts at least from there.
    fn settle(&mut self, written: Result<Lease, Error>, now: Instant) -> Result<(), Error> {
        match written {
            Ok(lease) => {
                self.observed.judge(Some(&lease), &self.me, now);
                self.until.send_replace(Some(now + RENEW_DEADLINE));
                Ok(())
            }
            // Another was quicker: what it wrote is read in the next turn. If it took the Lease from us, we led no more.
            Err(Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn mine(&self, mut lease: Lease, is_new: bool) -> Lease {
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_default();
        if is_new {
            spec.acquire_time = Some(now.clone());
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
        }
        spec.holder_identity = Some(self.me.clone());
        spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    async fn release(&self) {
        let Ok(Some(mut lease)) = self.leases.get_opt(LEASE).await else { return };
        if holder(&lease) != Some(&self.me) {
            return;
        }
        lease.spec.get_or_insert_default().holder_identity = None;
        if let Err(error) = self.leases.replace(LEASE, &PostParams::default(), &lease).await {
            debug!(%error, "The Lease could not be given back; it ends by itself.");
        }
    }

    fn tell(&mut self) {
        let leads = self.until.borrow().is_some_and(|until| Instant::now() < until);
        if !leads && self.until.borrow().is_some() {
            self.until.send_replace(None);
            warn!("The Lease could not be renewed in time: this replica no longer leads.");
        }
        if leads != self.observed.told {
            self.observed.told = leads;
            info!(leads, "{}", if leads { "This replica leads." } else { "This replica does not lead." });
        }
        metrics::record_leader(leads);
    }
}

/// What has been seen of the Lease, and when by our own clock.
#[derive(Default)]
struct Observed {
    record: Option<LeaseSpec>,
    since: Option<Instant>,
    told: bool,
}

/// What to do about the Lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Claim {
    Create,
    Take,
    Renew,
    Wait,
}

impl Observed {
    fn judge(&mut self, lease: Option<&Lease>, me: &str, now: Instant) -> Claim {
        let Some(lease) = lease else {
            self.record = None;
            return Claim::Create;
        };
        let record = lease.spec.clone().unwrap_or_default();
        let since = match (&self.record, self.since) {
            (Some(before), Some(since)) if *before == record => since,
            _ => *self.since.insert(now),
        };
        self.record = Some(record);
        match holder(lease) {
            Some(holder) if holder == me => Claim::Renew,
            None => Claim::Take,
            Some(_) => {
                let theirs = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
                let lasts =
                    theirs.and_then(|seconds| u64::try_from(seconds).ok()).map_or(DURATION, Duration::from_secs);
                if now.saturating_duration_since(since) > lasts { Claim::Take } else { Claim::Wait }
            }
        }
    }
}

fn holder(lease: &Lease) -> Option<&String> {
    lease.spec.as_ref()?.holder_identity.as_ref().filter(|holder| !holder.is_empty())
}

pub const LEASE: &str = "selvedge-controller";
const DURATION: Duration = Duration::from_secs(15);
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);
const CALL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
