use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::{counter, gauge};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::certificate::PendingKey;
use super::metrics::{ANCHORS, EXPIRY, FAILURES, GENERATION, RENEWALS};
use super::{CaError, CertificateAuthority, TrustBundle, TrustSource, WorkloadCertificate};
use crate::mesh::{Identity, TrustDomain};

/// The certificates that this node holds: one for each identity that its pods run as.
pub struct Identities {
    trust_domain: TrustDomain,
    ca: Arc<dyn CertificateAuthority>,
    trust: TrustSource,
    settings: IdentitySettings,
    entries: Mutex<HashMap<Identity, Entry>>,
    /// Woken when the renewal plan changes.
    replan: Notify,
    rotations: watch::Sender<u64>,
}

#[derive(Clone)]
pub struct IdentitySettings {
    /// The validity asked for.
    pub validity: Duration,
    /// How long a connection waits for a certificate that is not there.
    pub wait: Duration,
    /// How long one request to the CA may take.
    pub request: Duration,
    /// After the first failed renewal; doubles with each further one. Demand does not wait for it.
    pub first_backoff: Duration,
    pub longest_backoff: Duration,
    /// What tells whether a certificate is valid.
    pub clock: Arc<dyn TimeProvider>,
}

impl Default for IdentitySettings {
    fn default() -> Self {
        Self {
            validity: Duration::from_secs(24 * 3600),
            wait: Duration::from_secs(5),
            request: Duration::from_secs(15),
            first_backoff: Duration::from_secs(1),
            longest_backoff: Duration::from_secs(60),
            clock: Arc::new(DefaultTimeProvider),
        }
    }
}

/// Why an identity of this node has no certificate.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("no certificate for {identity}: {cause}")]
    Ca { identity: Identity, cause: CaError },
    #[error("no certificate for {identity} within {waited:?}: the CA has not answered")]
    Timeout { identity: Identity, waited: Duration },
}

/// One held certificate, for people: no key in it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CertificateStatus {
    pub identity: String,
    pub serial: Option<String>,
    /// Seconds since 1970.
    pub not_before: Option<u64>,
    pub not_after: Option<u64>,
    /// Why the last request failed, if it did.
    pub problem: Option<String>,
}

#[derive(Default)]
struct Entry {
    held: Option<Arc<WorkloadCertificate>>,
    request: Option<watch::Receiver<Option<Answer>>>,
    /// When the next request is made without anybody asking.
    due: Option<Instant>,
    failures: u32,
    problem: Option<CaError>,
}

type Answer = Result<Arc<WorkloadCertificate>, CaError>;

impl Identities {
    pub fn new(
        trust_domain: TrustDomain,
        ca: Arc<dyn CertificateAuthority>,
        trust: TrustSource,
        settings: IdentitySettings,
    ) -> Arc<Self> {
        Arc::new(Self {
            trust_domain,
            ca,
            trust,
            settings,
            entries: Mutex::default(),
            replan: Notify::new(),
            rotations: watch::Sender::new(0),
        })
    }

    /// The certificate of one identity: the held one at once, else a new one, waited for within bounds.
    /// All who ask at one time share one request.
    ///
    /// # Errors
    /// The CA refused or could not be reached, or did not answer in time. A later call asks again.
    pub async fn certificate(
        self: &Arc<Self>,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let waited = self.settings.wait;
        let until = Instant::now() + waited;
        let timeout = || CertificateError::Timeout { identity: identity.clone(), waited };
        let refused = |cause: &CaError| CertificateError::Ca { identity: identity.clone(), cause: cause.clone() };
        // What the CA said last: it tells more than that the time is up while it is asked once more.
        let mut said = None;
        loop {
            let mut answer = {
                let mut entries = self.entries();
                let entry = entries.entry(identity.clone()).or_default();
                if let Some(held) = &entry.held
                    && held.is_valid_at(self.now())
                {
                    return Ok(held.clone());
                }
                self.request(identity, entry)
            };
            let answered = tokio::time::timeout_at(until, answer.wait_for(Option::is_some)).await;
            match answered.map_err(|_| said.take().unwrap_or_else(timeout))?.as_deref() {
                Ok(Some(Ok(certificate))) => return Ok(certificate.clone()),
                // Whoever waits already has time for a CA that comes back.
                Ok(Some(Err(cause))) if cause.may_pass() && Instant::now() + ASK_AGAIN < until => {
                    said = Some(refused(cause));
                }
                Ok(Some(Err(cause))) => return Err(refused(cause)),
                Ok(None) | Err(_) => return Err(said.unwrap_or_else(timeout)),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// What the pods of this node run as: these are fetched ahead and kept fresh, all others dropped.
    pub fn retain(&self, wanted: HashSet<Identity>) {
        let mut entries = self.entries();
        entries.retain(|identity, entry| {
            let keep = wanted.contains(identity);
            if !keep {
                // `/metrics` leaves it out from now on.
                gauge!(EXPIRY, "identity" => identity.to_string()).set(f64::NAN);
                entry.held.take().inspect(|held| held.supersede());
            }
            keep
        });
        for identity in wanted {
            entries.entry(identity).or_insert_with(|| Entry { due: Some(Instant::now()), ..Entry::default() });
        }
        drop(entries);
        self.replan.notify_one();
    }

    /// Renews what falls due and follows the trust bundle, for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        let mut trust = self.trust.clone();
        loop {
            self.report();
            // Wakes now and then without need, lest the gauges pass for idle.
            let next = self.request_due().map_or(REPORT, |due| due.duration_since(Instant::now()).min(REPORT));
            let sleep = tokio::time::sleep(next);
            let changed = async {
                if trust.changed().await.is_err() {
                    // Its source is gone: the bundle stays as it is.
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = sleep => {}
                () = self.replan.notified() => {}
                () = changed => {
                    // A new root may sign from now on, and peers may soon forget the old one.
                    for entry in self.entries().values_mut() {
                        entry.due = Some(Instant::now());
                    }
                    self.rotations.send_modify(|count| *count += 1);
                }
            }
        }
    }

    pub fn trust(&self) -> Arc<TrustBundle> {
        self.trust.borrow().clone()
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub(crate) fn clock(&self) -> &Arc<dyn TimeProvider> {
        &self.settings.clock
    }

    /// Counts up whenever a certificate or the trust bundle was replaced.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.rotations.subscribe()
    }

    pub fn status(&self) -> Vec<CertificateStatus> {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let status = |(identity, entry): (&Identity, &Entry)| CertificateStatus {
            identity: identity.to_string(),
            serial: entry.held.as_ref().map(|held| held.serial.clone()),
            not_before: entry.held.as_ref().map(|held| seconds(held.not_before)),
            not_after: entry.held.as_ref().map(|held| seconds(held.not_after)),
            problem: entry.problem.as_ref().map(ToString::to_string),
        };
        let mut all: Vec<_> = self.entries().iter().map(status).collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Starts what is due; when the next one will be.
    fn request_due(self: &Arc<Self>) -> Option<Instant> {
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for (identity, entry) in self.entries().iter_mut() {
            match entry.due {
                Some(due) if due <= now => {
                    self.request(identity, entry);
                }
                Some(due) => next = Some(next.map_or(due, |at| at.min(due))),
                None => {}
            }
        }
        next
    }

    /// The request that is under way for an identity, or a new one. It goes on when nobody waits any more.
    fn request(self: &Arc<Self>, identity: &Identity, entry: &mut Entry) -> watch::Receiver<Option<Answer>> {
        if let Some(request) = &entry.request
            && request.has_changed().is_ok()
        {
            return request.clone();
        }
        let (sender, receiver) = watch::channel(None);
        entry.request = Some(receiver.clone());
        entry.due = None;
        let (identities, identity) = (self.clone(), identity.clone());
        tokio::spawn(async move {
            let answer = match tokio::time::timeout(identities.settings.request, identities.obtain(&identity)).await {
                Ok(answer) => answer,
                Err(_) => Err(CaError::Unavailable("it did not answer in time".into())),
            };
            identities.settle(&identity, &answer);
            sender.send_replace(Some(answer));
        });
        receiver
    }

    fn obtain(&self, identity: &Identity) -> impl Future<Output = Answer> + Send {
        let ca = self.ca.clone();
        let validity = self.settings.validity;
        let identity = identity.clone();
        async move {
            let key = PendingKey::new(&identity)?;
            let signed = ca.sign(&key.csr, &identity, validity).await?;
            Ok(Arc::new(key.complete(&identity, signed)?))
        }
    }

    fn settle(&self, identity: &Identity, answer: &Answer) {
        let mut entries = self.entries();
        // Dropped in the meantime: those who wait are answered, nothing is kept.
        let Some(entry) = entries.get_mut(identity) else { return };
        entry.request = None;
        match answer {
            Ok(certificate) => {
                counter!(RENEWALS).increment(1);
                let left = certificate.not_after.duration_since(self.now()).unwrap_or_default();
                entry.due = Some(Instant::now() + left.mul_f64(rand::random_range(0.45..0.55)));
                entry.failures = 0;
                entry.problem = None;
                if let Some(old) = entry.held.replace(certificate.clone()) {
                    old.supersede();
                }
                tracing::debug!(%identity, serial = %certificate.serial, "Obtained a certificate.");
            }
            Err(error) => {
                counter!(FAILURES).increment(1);
                let backoff = self.settings.first_backoff.saturating_mul(1 << entry.failures.min(16));
                let backoff = backoff.min(self.settings.longest_backoff).mul_f64(rand::random_range(0.5..1.0));
                entry.due = Some(Instant::now() + backoff);
                entry.failures = entry.failures.saturating_add(1);
                // Demand asks as often as somebody connects: the same news is told once.
                let known = entry.problem.replace(error.clone()).map(|before| before.to_string());
                if known.is_none_or(|known| known != error.to_string()) {
                    tracing::warn!(%identity, %error, "No certificate could be had; what is valid stays in use.");
                } else {
                    tracing::debug!(%identity, %error, failures = entry.failures, "Still no certificate.");
                }
            }
        }
        drop(entries);
        self.replan.notify_one();
        self.rotations.send_modify(|count| *count += 1);
    }

    fn report(&self) {
        let trust = self.trust();
        gauge!(ANCHORS).set(trust.certificates().len() as f64);
        gauge!(GENERATION).set(trust.generation as f64);
        for (identity, entry) in self.entries().iter() {
            if let Some(held) = &entry.held {
                let expiry = held.not_after.duration_since(UNIX_EPOCH).unwrap_or_default();
                gauge!(EXPIRY, "identity" => identity.to_string()).set(expiry.as_secs_f64());
            }
        }
    }

    fn now(&self) -> SystemTime {
        let now = self.settings.clock.current_time();
        now.map_or_else(SystemTime::now, |now| UNIX_EPOCH + Duration::from_secs(now.as_secs()))
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Identity, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While a connection waits, and the CA fails.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// How often the gauges are set anew.
const REPORT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
