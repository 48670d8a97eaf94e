use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout, timeout_at};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Status};

use super::{Finished, Observer, proto};
use crate::identity::certificates_from_pem;
use crate::telemetry::{Seldom, catalogue};

/// Where OTLP over gRPC is taken: `http://otel-collector.observability:4317`.
#[derive(Clone, Debug)]
pub struct Collector(Endpoint);

#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    #[error("{0:?} is no address of a collector; write one such as http://otel-collector.observability:4317")]
    Address(String),
    #[error(
        "{address}: a collector that is reached by TLS needs the roots that its certificate leads to; name them by --otlp-ca"
    )]
    NoRoots { address: String },
    #[error("{address}: {file:?} is given as roots, and the address does not speak TLS; write https")]
    NoTls { address: String, file: PathBuf },
    #[error("{file:?}, the roots of the collector, cannot be read: {cause}")]
    Roots { file: PathBuf, cause: String },
}

impl Collector {
    /// `roots`: a file of certificates in PEM, for an address with `https`.
    ///
    /// # Errors
    /// No such address, or no such roots.
    pub fn new(address: &str, roots: Option<&PathBuf>) -> Result<Self, CollectorError> {
        let refused = || CollectorError::Address(address.to_owned());
        let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|_| refused())?;
        let uri = endpoint.uri();
        let is_bare = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
        if uri.host().is_none() || !is_bare {
            return Err(refused());
        }
        let endpoint = match (uri.scheme_str(), roots) {
            (Some("http"), None) => endpoint,
            (Some("http"), Some(file)) => {
                return Err(CollectorError::NoTls { address: address.to_owned(), file: file.clone() });
            }
            (Some("https"), None) => return Err(CollectorError::NoRoots { address: address.to_owned() }),
            (Some("https"), Some(file)) => {
                let unusable = |cause: String| CollectorError::Roots { file: file.clone(), cause };
                let pem = std::fs::read(file).map_err(|error| unusable(error.to_string()))?;
                if certificates_from_pem(&pem).map_err(unusable)?.is_empty() {
                    return Err(unusable("it holds no certificate".to_owned()));
                }
                let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
                endpoint.tls_config(tls).map_err(|error| unusable(error.to_string()))?
            }
            _ => return Err(refused()),
        };
        Ok(Self(endpoint.connect_timeout(ANSWER).timeout(ANSWER)))
    }
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.uri().fmt(f)
    }
}

/// Sends what waits to the collector.
#[must_use = "spans are sent while it runs"]
#[derive(Debug)]
pub struct Exporter {
    collector: Collector,
    observer: Observer,
    finished: mpsc::Receiver<Finished>,
    /// What was gathered, and is not sent yet.
    batch: Vec<Finished>,
    /// What is under way, and of how many spans: it outlives whoever was sending it.
    sending: Option<(ExportTraceServiceRequest, u64)>,
    failing: Seldom,
}

impl Exporter {
    pub(super) fn new(collector: Collector, observer: Observer, finished: mpsc::Receiver<Finished>) -> Self {
        Self { collector, observer, finished, batch: Vec::new(), sending: None, failing: Seldom::default() }
    }

    /// Begins, on the runtime of whoever calls.
    pub fn spawn(self) -> Exporting {
        let (stop, stopped) = oneshot::channel();
        Exporting { stop, task: tokio::spawn(self.run(stopped)) }
    }

    async fn run(mut self, stopped: oneshot::Receiver<()>) {
        let mut client = TraceServiceClient::new(self.collector.0.connect_lazy());
        tokio::select! {
            () = self.send_all(&mut client) => {}
            // Also where whoever holds the other end is dropped.
            _ = stopped => {
                self.finished.close();
                let _ = timeout(FAREWELL, self.send_all(&mut client)).await;
            }
        }
    }

    async fn send_all(&mut self, client: &mut TraceServiceClient<Channel>) {
        loop {
            if self.sending.is_none() {
                if !self.gather().await {
                    return;
                }
                let count = self.batch.len() as u64;
                self.sending = Some((proto::request(std::mem::take(&mut self.batch), &self.observer), count));
            }
            let Some((request, count)) = &self.sending else { return };
            let outcome = match send(client, request).await {
                Ok(()) => "sent",
                Err(status) => {
                    if let Some(unsaid) = self.failing.speaks(Instant::now()) {
                        let (code, cause) = (status.code(), status.message());
                        tracing::warn!(collector = %self.collector, ?code, unsaid, "{count} spans are lost: the collector did not take them: {cause}");
                    }
                    "lost"
                }
            };
            metrics::counter!(catalogue::SPANS, "outcome" => outcome).increment(*count);
            self.sending = None;
        }
    }

    /// Waits for the first span, and then a moment for more. False: no more will come.
    async fn gather(&mut self) -> bool {
        if self.batch.is_empty() && self.finished.recv_many(&mut self.batch, MOST_AT_ONCE).await == 0 {
            return false;
        }
        let until = tokio::time::Instant::now() + GATHERING;
        while self.batch.len() < MOST_AT_ONCE {
            let room = MOST_AT_ONCE - self.batch.len();
            let more = self.finished.recv_many(&mut self.batch, room);
            if !matches!(timeout_at(until, more).await, Ok(1..)) {
                break;
            }
        }
        true
    }
}

/// What may pass is tried again, as the [specification](https://opentelemetry.io/docs/specs/otlp/#failures) has it.
async fn send(client: &mut TraceServiceClient<Channel>, request: &ExportTraceServiceRequest) -> Result<(), Status> {
    let mut pause = FIRST_PAUSE;
    loop {
        let answer = timeout(ANSWER, client.export(request.clone())).await;
        let status = match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time"))) {
            Ok(_) => return Ok(()),
            Err(status) => status,
        };
        let may_pass = [
            Code::Cancelled,
            Code::DeadlineExceeded,
            Code::Aborted,
            Code::OutOfRange,
            Code::Unavailable,
            Code::DataLoss,
        ];
        if pause > LONGEST_PAUSE || !may_pass.contains(&status.code()) {
            return Err(status);
        }
        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause *= 2;
    }
}

/// An exporter at work.
#[must_use = "spans that wait are lost unless it is finished"]
#[derive(Debug)]
pub struct Exporting {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Exporting {
    /// Takes no more spans, and sends those that wait, if the collector takes them within moments.
    pub async fn finish(self) {
        // It may have ended by itself.
        let _ = self.stop.send(());
        let _ = self.task.await;
    }
}

const ANSWER: Duration = Duration::from_secs(10);
const GATHERING: Duration = Duration::from_secs(1);
/// Spans of one export.
const MOST_AT_ONCE: usize = 512;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Behind it a batch is given up: some fifteen seconds in all.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
const FAREWELL: Duration = Duration::from_secs(2);
